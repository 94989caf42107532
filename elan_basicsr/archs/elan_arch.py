"""ELAN: Efficient Long-Range Attention Network for Image Super-resolution (Zhang et al., ECCV 2022, arXiv 2203.06697).

The file reads in the order data flows: shift convolution, local feature extraction (LFE), group-wise multi-scale
self-attention (GMSA), a block of both (ELAB), the network. Shapes are (batch, channels, height, width).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elan_basicsr.archs import cpu, gpu

from basicsr.utils.registry import ARCH_REGISTRY

NUM_SHIFT_GROUPS = 5
MOST_WINDOWS = 65_535  # that CUDA's fused attention takes at once


def shift(x: Tensor) -> Tensor:
    """Let five groups of channels read their right, left, lower, upper neighbour and themselves, zero outside.

    The first four groups have `C // 5` channels each; what is left over belongs to the last. (B, C, H, W) -> the same.
    """
    group = x.shape[1] // NUM_SHIFT_GROUPS
    right, left, below, above, same = x.split([group] * 4 + [x.shape[1] - 4 * group], dim=1)
    return torch.cat([
        F.pad(right[..., :, 1:], (0, 1, 0, 0)),
        F.pad(left[..., :, :-1], (1, 0, 0, 0)),
        F.pad(below[..., 1:, :], (0, 0, 0, 1)),
        F.pad(above[..., :-1, :], (0, 0, 1, 0)),
        same,
    ], dim=1)


class ShiftConv(nn.Conv2d):
    """A 1x1 convolution of shifted channels, with the reach of a 3x3 one. (B, C, H, W) -> (B, D, H, W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(shift(x))


class LFE(nn.Module):
    """Local feature extraction: shift convolution, ReLU, shift convolution. (B, C, H, W) -> the same."""

    def __init__(self, channels: int, expansion: int):
        super().__init__()
        self.conv0 = ShiftConv(channels, channels * expansion)
        self.conv1 = ShiftConv(channels * expansion, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu(self.conv0(x)))


def cut_windows(x: Tensor, window: int, shifted: bool) -> Tensor:
    """Cut a map into windows of tokens: (B, C, H, W) -> (B * H/window * W/window, window², C).

    Shifted windows start half a window further to the right and below; the map is a torus for them, without a mask.
    """
    if shifted:
        # For an odd window the authors' code rolls by the larger half here and back by the smaller one.
        x = x.roll((-((window + 1) // 2),) * 2, dims=(2, 3))
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // window, window, w // window, window)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(-1, window * window, c)


def paste_windows(tokens: Tensor, size: Sequence[int], window: int, shifted: bool) -> Tensor:
    """The inverse of `cut_windows`: (B * H/window * W/window, window², C) -> (B, C, H, W) with `size` = (H, W)."""
    h, w = size
    c = tokens.shape[-1]
    x = tokens.reshape(-1, h // window, w // window, window, window, c)
    x = x.transpose(2, 3).reshape(-1, h, w, c).permute(0, 3, 1, 2)
    if shifted:
        x = x.roll((window // 2,) * 2, dims=(2, 3))
    return x


def attend(q: Tensor, v: Tensor) -> Tensor:
    """softmax(q qᵀ) v within each window: keys equal queries, no scale, no bias, one head. Both (N, window², C)."""
    windows = q.shape[0]
    if isinstance(windows, int) and windows > MOST_WINDOWS:  # it is none in a graph exported for every size
        return torch.cat([attend(*part) for part in zip(q.split(MOST_WINDOWS), v.split(MOST_WINDOWS), strict=True)])
    q, v = q[:, None], v[:, None]
    return F.scaled_dot_product_attention(q, q, v, scale=1.0)[:, 0]


class GMSA(nn.Module):
    """Group-wise multi-scale self-attention: each group of channels attends within windows of its own size.

    Args:
        channels: Width of input and output, a multiple of the number of windows.
        window_sizes: Window edge in pixels, one per group.
        shifted: Whether the windows are shifted by half their size.
        shares: Whether the queries of an earlier module are used; only values are projected then.
    """

    def __init__(self, channels: int, window_sizes: Sequence[int], shifted: bool, shares: bool):
        super().__init__()
        self.window_sizes = tuple(window_sizes)
        self.shifted = shifted
        self.shares = shares
        projected = channels if shares else 2 * channels
        self.project_in = nn.Conv2d(channels, projected, kernel_size=1)
        self.norm = nn.BatchNorm2d(projected)
        self.project_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor, queries: Sequence[Tensor] = ()) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the attended map (B, C, H, W) and the queries, one (N, window², C/groups) per window size."""
        # The logits are unscaled and reach hundreds: half-precision queries would be wrong by whole units. (On NVIDIA
        # GPUs from Ampere on the projection rounds its factors to TF32, cuDNN's default: logits up to 427 of a trained
        # network move by at most 0.44, its output by at most 0.6 grey levels. Attention does not round.)
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype in (torch.bfloat16, torch.float16) and self.project_in.weight.dtype == torch.float32:
                x = x.float()
            groups = self.norm(self.project_in(x)).chunk(len(self.window_sizes), dim=1)
            if not self.shares:
                pairs = [group.chunk(2, dim=1) for group in groups]
                groups = [value for _, value in pairs]
                queries = [cut_windows(q, w, self.shifted) for (q, _), w in zip(pairs, self.window_sizes, strict=True)]
            attended = [
                paste_windows(attend(q, cut_windows(v, w, self.shifted)), x.shape[2:], w, self.shifted)
                for q, v, w in zip(queries, groups, self.window_sizes, strict=True)
            ]
        return self.project_out(torch.cat(attended, dim=1)), queries


class ELAB(nn.Module):
    """A block of `1 + num_share` modules, each LFE and GMSA with a residual; the first one's attention serves all."""

    def __init__(self, channels: int, expansion: int, window_sizes: Sequence[int], shifted: bool, num_share: int):
        super().__init__()
        self.lfe = nn.ModuleList(LFE(channels, expansion) for _ in range(1 + num_share))
        self.gmsa = nn.ModuleList(
            GMSA(channels, window_sizes, shifted, shares=i > 0) for i in range(1 + num_share))

    def forward(self, x: Tensor) -> Tensor:
        queries: Sequence[Tensor] = ()
        for lfe, gmsa in zip(self.lfe, self.gmsa, strict=True):
            x = lfe(x) + x
            y, queries = gmsa(x, queries)
            x = y + x
        return x


def reflect_pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Extend (B, C, H, W) at the right and below by reflection until H and W are multiples; any size from 1x1 works."""
    for dim in (2, 3):
        size = x.shape[dim]
        windows = (size + multiple - 1) // multiple
        if isinstance(size, torch.SymInt) and torch.compiler.is_exporting():
            # The exporter is to take this for a size of its own. What it knows about the input's size it would reason
            # about at every operation, for minutes, and hold the graph to what happened to be true of the example.
            windows = torch.full((), windows, dtype=torch.int64).item()
            torch._check(windows >= 1)
            torch._check(windows * multiple >= size)
        padded = windows * multiple
        if not isinstance(size, int) or padded > size:  # a traced graph pads whether it must or not
            # Reflection without repeating the edge has the period 2 * (size - 1), but 1 for a single pixel; one index
            # per output row covers maps smaller than their padding, which torch's reflect padding refuses.
            index = torch.arange(padded, device=x.device)
            period = torch.ones_like(index) * (2 * (size - 1) + 1 // size)  # a tensor: ONNX has no % of two sizes
            index = index % period
            x = x.index_select(dim, torch.where(index < size, index, period - index))
    return x


def _counted_once(run: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor) -> Tensor:
    """Run a block under `checkpoint`: BatchNorm's statistics have a batch once, though a backward pass runs it again.

    A graph that a compiler makes of both holds the statistics' change once by itself. What it leaves to Python comes
    here twice, as without a compiler.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:  # in no backward pass
        return run(x)
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.
    try:
        return run(x)
    finally:  # a run again may also stop where it has what it is for
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= 1


@ARCH_REGISTRY.register()
class ELAN(nn.Module):
    """Efficient long-range attention network. RGB (or grey) in 0..1: (B, C, h, w) -> (B, C', h * upscale, w * upscale).

    ELAN-light is `num_feat=60, num_block=24, num_share=1`; ELAN is `num_feat=180, num_block=36, num_share=0`.

    Args:
        upscale: Enlargement, an integer from 1.
        num_in_ch, num_out_ch: Channels of input and output: 3, or 1 for grey or Y.
        num_feat: Width of the body, a multiple of the number of window sizes.
        num_block: Number of LFE + GMSA modules, a multiple of `1 + num_share`.
        num_share: How many modules reuse the attention of the one before them.
        expansion: Widening inside an LFE.
        window_sizes: Attention window edges in pixels, one per group of channels.
        img_range: The network computes on values of 0..img_range.
        rgb_mean: Mean colour in 0..1, subtracted from the input and added to the output.
        use_checkpoint: Recompute each block in the backward pass: less memory for about a third more time.

    Raises:
        ValueError: A hyper-parameter cannot work; the message names it and the values allowed.
    """
    mean_in: Tensor
    mean_out: Tensor

    def __init__(self,
                 upscale: int = 4,
                 num_in_ch: int = 3,
                 num_out_ch: int = 3,
                 num_feat: int = 60,
                 num_block: int = 24,
                 num_share: int = 1,
                 expansion: int = 2,
                 window_sizes: Sequence[int] = (4, 8, 16),
                 img_range: float = 255.,
                 rgb_mean: Sequence[float] = (0.4488, 0.4371, 0.4040),
                 use_checkpoint: bool = False):
        super().__init__()
        for name, value, lowest in (('upscale', upscale, 1), ('num_in_ch', num_in_ch, 1), ('num_out_ch', num_out_ch, 1),
                                    ('num_feat', num_feat, 1), ('num_block', num_block, 1),
                                    ('num_share', num_share, 0), ('expansion', expansion, 1)):
            _require(_is_int(value) and value >= lowest, name, value, f'an integer from {lowest}')
        _require(isinstance(window_sizes, Sequence) and not isinstance(window_sizes, str) and len(window_sizes) > 0
                 and all(_is_int(w) and w >= 1 for w in window_sizes),
                 'window_sizes', window_sizes, 'a non-empty list of positive integers, such as [4, 8, 16]')
        _require(num_feat % len(window_sizes) == 0, 'num_feat', num_feat,
                 f'a multiple of the number of window_sizes, {len(window_sizes)}')
        _require(num_block % (1 + num_share) == 0, 'num_block', num_block,
                 f'a multiple of 1 + num_share, {1 + num_share}')
        _require(_is_number(img_range) and 0 < img_range < math.inf, 'img_range', img_range, 'a positive number')

        self.upscale = upscale
        self.window_sizes = tuple(window_sizes)
        self.img_range = float(img_range)
        self.use_checkpoint = use_checkpoint
        self.register_buffer('mean_in', _channel_mean(rgb_mean, num_in_ch, img_range), persistent=False)
        self.register_buffer('mean_out', _channel_mean(rgb_mean, num_out_ch, img_range), persistent=False)

        self.head = nn.Conv2d(num_in_ch, num_feat, kernel_size=3, padding=1)
        self.body = nn.ModuleList(
            ELAB(num_feat, expansion, self.window_sizes, shifted=i % 2 == 1, num_share=num_share)
            for i in range(num_block // (1 + num_share)))
        self.tail = nn.Conv2d(num_feat, num_out_ch * upscale**2, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        x = reflect_pad_to_multiple(x, math.lcm(*self.window_sizes))
        head = _without_autocast(self.head, x * self.img_range - self.mean_in)
        x = self._run_body(head)
        x = head + x  # in this order: a sum has its first term's layout in memory, and discriminators view the output
        x = F.pixel_shuffle(_without_autocast(self.tail, x), self.upscale)
        x = (x + self.mean_out) / self.img_range
        return x[..., :h * self.upscale, :w * self.upscale]

    def _run_body(self, x: Tensor) -> Tensor:
        on = gpu if x.is_cuda else cpu
        kernels = on.stand_in(self.body, x, self.window_sizes, _PLAIN_TYPES)
        if kernels is cpu.inference:
            return kernels.run_body(self.body, x, self.window_sizes)
        if kernels is None:  # channels last, as functorch takes it too: windows and shifts are copied in runs of them
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        for block in self.body:
            run = partial(kernels.run_block, block) if kernels else block
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(_counted_once, run, block, x, use_reentrant=False)
            else:
                x = run(x)
        return x


def _without_autocast(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution in its weights' type: what carries whole grey levels has no room in bfloat16's 8 bits."""
    with torch.autocast(x.device.type, enabled=False):
        return conv(x.to(conv.weight.dtype))


# What kernels know how to compute.
_PLAIN_TYPES = {nn.ModuleList, ELAB, LFE, ShiftConv, GMSA, nn.Conv2d, nn.BatchNorm2d}


def _channel_mean(rgb_mean: Sequence[float], channels: int, img_range: float) -> Tensor:
    """The mean colour on the network's range, (1, channels, 1, 1); grey takes the average of the colours."""
    _require(isinstance(rgb_mean, Sequence) and len(rgb_mean) > 0 and all(_is_number(v) for v in rgb_mean),
             'rgb_mean', rgb_mean, 'a list of numbers in 0..1, one per channel')
    if channels == 1 and len(rgb_mean) != 1:
        rgb_mean = [sum(rgb_mean) / len(rgb_mean)]
    _require(len(rgb_mean) == channels, 'rgb_mean', rgb_mean, f'one number for each of the {channels} channels')
    # In float32, as the authors' checkpoints hold it: their float64 results rest on the rounded product.
    return (torch.tensor(rgb_mean, dtype=torch.float32) * img_range).view(1, -1, 1, 1)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f'ELAN: {name} is {value!r}; it must be {allowed}')


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
