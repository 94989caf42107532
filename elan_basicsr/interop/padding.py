"""Making an image as large as a network wants it."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def extend(x: Tensor, height: int, width: int) -> Tensor:
    """Extend (B, C, h, w) at the bottom and right: by reflection as far as it reaches, then by the last pixel."""
    for mode in ('reflect', 'replicate'):
        h, w = x.shape[2:]
        down, right = height - h, width - w
        if mode == 'reflect':
            down, right = min(down, h - 1), min(right, w - 1)
        if down or right:
            x = F.pad(x, (0, right, 0, down), mode)
    return x
