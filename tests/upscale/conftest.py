"""Small pictures of every kind, and a network that takes a moment on them."""
import cv2
import numpy as np
import pytest
import skimage.data

from elan_basicsr.cli import main
from tests.archs.golden import FOLDERS

WEIGHTS = FOLDERS[0] / 'tiny_shared_x2.pt'


@pytest.fixture
def photograph() -> np.ndarray:
    """(21, 30, 3) RGB uint8."""
    return cv2.resize(skimage.data.astronaut(), (30, 21), interpolation=cv2.INTER_AREA)


@pytest.fixture
def run(tmp_path, capfd, monkeypatch):
    """Call `basicsr upscale` in an empty folder; gives the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, weights=WEIGHTS, device: str = 'cpu') -> tuple[int, str, str]:
        code = main(['upscale', *words, '--weights', str(weights), '--device', device])
        return code, *capfd.readouterr()
    return call
