"""The compiled library (`kernels/`): finding it, loading it, and the form in which its functions take what they get.

It is compiled when the package is installed, where there is a C++ compiler.
"""
from __future__ import annotations

import ctypes
import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from elan_basicsr.archs.stand_in import setting

PIXELS = 64  # of a tile, at most
LINE = 16  # numbers that lines are multiples of
BAND = 16  # rows, at least: local features compute two more of them for each
PIECES = 8  # of a stage, at least, for each thread


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they are not installed, not for this processor, or `ELAN_KERNELS` is 0.

    `ELAN_KERNELS=avx2` has a processor with AVX-512 take the kernels for AVX2.
    """
    if setting() == '0':
        return None
    path = Path(__file__).with_name('_kernels.abi3.so')
    try:
        found = ctypes.CDLL(str(path))
    except OSError:  # there is none, or it is one of another machine, in a folder that both see
        return None
    if not _are_of_these_sources(found):
        warnings.warn(f'{path} is not compiled from the sources beside it and left aside, so that the network is '
                      'slower; install the package again as its README says', stacklevel=2)
        return None
    return found if found.elan_lanes() else None


def _are_of_these_sources(kernels: ctypes.CDLL) -> bool:
    """An editable installation keeps the kernels of its day, whose functions may take other arguments."""
    sources = Path(__file__).with_name('kernels')
    if not sources.is_dir():  # in a wheel they come together
        return True
    files = [sources / 'kernels.cpp', *sorted(sources.glob('*.h'))]
    digest = hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()
    try:
        kernels.elan_sources.restype = ctypes.c_char_p
        return kernels.elan_sources().decode() == digest
    except AttributeError:
        return False


def vector_lanes() -> int:
    """Numbers that the kernels' vectors hold: 4, 8 or 16; 0 where there are no kernels."""
    found = library()
    return found.elan_lanes() if found else 0


def call(name: str, *arguments: Tensor | int | bool | None) -> None:
    """Call a kernel: tensors as addresses of float32, numbers as integers."""
    getattr(library(), name)(*(ctypes.c_void_p(a.data_ptr() if a is not None else None)
                               if a is None or isinstance(a, Tensor) else ctypes.c_long(a) for a in arguments))


def has_bf16() -> bool:
    """Whether kernels multiply in bfloat16 on this processor."""
    found = library()
    return bool(found and found.elan_has_bf16())


def packed(weight: Tensor, bias: Tensor | None = None, bf16: bool = False) -> tuple[Tensor, Tensor | None]:
    """Weight (D, C) and bias (D) of a 1x1 convolution as kernels read them: in blocks of the outputs of a tile.

    With `bf16` the weights are rounded to bfloat16, and those of two inputs share 32 bits.

    Returns:
        (blocks, C, outputs) or (blocks, C / 2, outputs), and (blocks outputs).
    """
    n, k = weight.shape
    outputs = _outputs()
    to = weight.new_empty(-(-n // outputs), k // 2 if bf16 else k, outputs)
    call('elan_pack_weights', weight, *weight.stride(), to, n, k, bf16)
    if bias is not None:
        bias = F.pad(bias, (0, -n % outputs)) if n % outputs else bias.contiguous()
    return to, bias


@cache
def _outputs() -> int:
    found = library()
    assert found is not None  # or nobody would ask
    return found.elan_outputs()


def windows_together(window: int) -> int:
    """How many windows a kernel works on at a time."""
    return max(PIXELS // window**2, 1)


def split(height: int, batch: int = 1, window_sizes: Sequence[int] = (1,)) -> tuple[int, int, int]:
    """How a kernel's threads divide the rows of a map: rows of a band, pieces of a band, and how many threads."""
    threads, step = torch.get_num_threads(), math.lcm(*window_sizes)
    rows = -(-BAND // step) * step
    # Small pieces for many threads, at the price of more rows of local features that are computed twice.
    return rows, min(rows, -(-PIECES * threads // (batch * -(-height // rows)))), threads


def addresses(tensors: Iterable[Tensor | None]) -> Tensor:
    """Of what the tensors hold, 0 for None: a table that a kernel reads. Keep the tensors until it is done."""
    return torch.tensor([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
