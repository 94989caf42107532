"""MATLAB's bicubic `imresize`, to the byte: the degradation behind every published PSNR table."""
from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
from scipy.sparse import csr_matrix

_CUBIC_WIDTH = 4  # support of the cubic kernel, in pixels
_CHUNK = 2**22  # values that are held as float64 at a time


def imresize(img: np.ndarray, scale: float | Fraction) -> np.ndarray:
    """What MATLAB's `imresize(img, scale, 'bicubic')` returns for integer images.

    MATLAB rounds to the image's type after the first dimension, then resizes the second; both are equal here, so rows
    come first. (BasicSR's `imresize` stays in floats between them and differs in 10 to 15 % of the pixels.)

    Args:
        img: (H, W) or (H, W, C), uint8 or uint16, at least 1x1.
        scale: Enlargement; 1/4 makes an x4 LR image. Rational numbers are taken exactly: 1/3 may be given as a float.

    Returns:
        (ceil(H * scale), ceil(W * scale)[, C]), of the same type.

    Raises:
        TypeError: The image is of another type.
        ValueError: The image is empty, of another shape, or the scale is not positive.
    """
    if img.dtype not in (np.uint8, np.uint16):
        raise TypeError(f'imresize: img is {img.dtype}; it must be uint8 or uint16, as MATLAB rounds in between')
    if img.ndim not in (2, 3) or 0 in img.shape:
        raise ValueError(f'imresize: img has shape {img.shape}; it must be (H, W) or (H, W, C), none of them 0')
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f'imresize: scale is {scale}; it must be a positive number')
    scale = Fraction(scale).limit_denominator(10_000)
    if scale == 1:
        return img.copy()
    return _resize_rows(_resize_rows(img, scale).swapaxes(0, 1), scale).swapaxes(0, 1).copy()


def _resize_rows(img: np.ndarray, scale: Fraction) -> np.ndarray:
    operator = _operator(img.shape[0], scale)
    flat = img.reshape(img.shape[0], -1)
    out = np.empty((operator.shape[0], flat.shape[1]), img.dtype)
    step = max(_CHUNK // max(operator.shape), 1)
    for start in range(0, flat.shape[1], step):
        part = operator @ flat[:, start:start + step].astype(np.float64)
        np.floor(np.add(part, 0.5, out=part), out=part)
        np.clip(part, 0, np.iinfo(img.dtype).max, out=part)
        out[:, start:start + step] = part
    return out.reshape(-1, *img.shape[1:])


@lru_cache(maxsize=64)
def _operator(size: int, scale: Fraction) -> csr_matrix:
    """The weights of one dimension, (ceil(size * scale), size), as MATLAB's `contributions` computes them.

    Shrinking widens the kernel by 1 / scale (antialiasing); beyond the edges the image is mirrored with its edge twice.
    """
    factor = float(scale)
    stretch = min(factor, 1.0)
    width = _CUBIC_WIDTH / stretch
    out = math.ceil(size * scale)
    # Output pixel x (from 1) lies at input coordinate u (from 1), so that pixel areas coincide.
    u = np.arange(1, out + 1) / factor + 0.5 * (1 - 1 / factor)
    left = np.floor(u - width / 2)
    taps = left[:, None] + np.arange(math.ceil(width) + 2)
    weights = stretch * _cubic(stretch * (u[:, None] - taps))
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = np.concatenate([np.arange(size), np.arange(size)[::-1]])
    columns = mirrored[(taps.astype(np.int64) - 1) % (2 * size)]
    rows = np.repeat(np.arange(out), taps.shape[1])
    return csr_matrix((weights.ravel(), (rows, columns.ravel())), shape=(out, size))


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2 (IEEE Trans. ASSP 29(6), 1981, eq. 15)."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
