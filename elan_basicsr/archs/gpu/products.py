"""Products of matrices on tensor cores, in what precision their factors have."""
from __future__ import annotations

from enum import Enum

import torch
import triton
import triton.language as tl


class Precision(Enum):
    """Of the factors; sums are in float32.

    `EXACT` is float32 as the sum of two TF32s each, all but their last bits. `TF32` has 11 significant bits, as
    cuDNN's convolutions have by default.
    """
    EXACT = 'tf32x3'
    TF32 = 'tf32'
    BFLOAT16 = 'bf16'
    FLOAT16 = 'fp16'

    @property
    def dtype(self) -> torch.dtype:
        return {Precision.BFLOAT16: torch.bfloat16, Precision.FLOAT16: torch.float16}.get(self, torch.float32)

    @staticmethod
    def of(dtype: torch.dtype) -> Precision:
        return {torch.bfloat16: Precision.BFLOAT16, torch.float16: Precision.FLOAT16}[dtype]


def try_a_kernel(device: torch.device) -> None:
    """Compile and run a kernel that does next to nothing."""
    x = torch.zeros(1, device=device)
    with torch.cuda.device_of(x):
        _one_kernel[(1,)](x)


@triton.jit
def _one_kernel(x):
    tl.store(x, 1.)


@triton.jit
def _to_tf32(x):
    """To the nearest; tensor cores cut off what is left, which makes all products smaller."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x1000) & -0x2000
    return tl.where((bits & 0x7FFFFFFF) < 0x7F800000, rounded, bits).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr):
    """a b + sums, for a (M, K), b (K, N) and sums (M, N), which are float32."""
    if PRECISION == 'tf32':
        return tl.dot(_to_tf32(a.to(tl.float32)), _to_tf32(b.to(tl.float32)), sums, input_precision='tf32')
    elif PRECISION == 'tf32x3':
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision='tf32x3')
    elif PRECISION == 'bf16':
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
    else:
        return tl.dot(a.to(tl.float16), b.to(tl.float16), sums)
