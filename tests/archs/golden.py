"""The reference numbers in tests/golden, and the large ones beside the checkout where they are."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from elan_basicsr.forms import to_native
from tests.conftest import SHARED

FOLDERS = (Path(__file__).parents[1] / 'golden', SHARED / 'golden')
GOLDEN = sorted({path.stem for folder in FOLDERS for path in folder.glob('*.npz')})


@dataclass
class Golden:
    """One reference: the path of its weights and its arrays."""
    checkpoint: Path
    arrays: dict[str, np.ndarray]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])

    def native(self, kind: str) -> dict[str, Tensor]:
        """The tensors under `kind/OFFICIAL_NAME`, by our names."""
        prefix = f'{kind}/'
        return to_native({key.removeprefix(prefix): torch.from_numpy(value) for key, value in self.arrays.items()
                          if key.startswith(prefix)})


def load_golden(name: str) -> Golden:
    folder = next(folder for folder in FOLDERS if (folder / f'{name}.npz').exists())
    with np.load(folder / f'{name}.npz') as file:
        return Golden(folder / f'{name}.pt', dict(file))
