"""The body of ELAN for inference on a CPU: the function of `elan_arch`, with less traffic through memory.

An image's map is one (C + 1, H, W) tensor whose last row is ones, so that every 1x1 convolution, its bias and its
residual are one matrix product written in place. LFEs run over bands of rows, whose widened maps stay in the cache.
The projection into attention writes its tokens with the channels last, which a product gives for nothing, and windows
are cut from those, the cyclic shift included. All buffers are made once per call: calls share nothing.

BatchNorm is folded into the projection at every call. A cached fold would have to notice changed weights, and updates
through `.data`, as the toolbox's moving average makes them, leave no trace in a tensor's version.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_SHIFT_GROUPS = 5
# Pixels per band: the widened map of a band of ELAN-light is then some 2.5 MB of float32.
BAND_PIXELS = 5120
# Below this many tokens a window's attention map is cheaper to keep and multiply than the fused call is to start.
LARGEST_KEPT_WINDOW = 4


def serves(body: nn.ModuleList, x: Tensor, window_sizes: Sequence[int], plain_types: set[type]) -> bool:
    """Whether `run_body` may stand in for the modules: evaluation of unmodified modules on a CPU, nothing watching."""
    if (body.training or type(x) is not Tensor or x.device.type != 'cpu'
            or x.dtype not in (torch.float32, torch.float64) or any(w % 2 for w in window_sizes)):
        return False
    if (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
            or torch.is_autocast_enabled('cpu') or torch._C._functorch.maybe_current_level() is not None):
        return False
    for module in body.modules():
        if (module.training or type(module) not in plain_types or module._forward_hooks or module._forward_pre_hooks
                or (isinstance(module, nn.BatchNorm2d) and module.running_mean is None)):
            return False
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in body.parameters())):
        return False
    return all(p.dtype == x.dtype and p.device == x.device for p in body.parameters())


def run_body(body: nn.ModuleList, x: Tensor, window_sizes: Sequence[int]) -> Tensor:
    """Run all blocks on a padded map. (B, C, H, W) -> the same, a new tensor."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with torch.no_grad():
        runner = _Runner(body, x.shape[1:], x, window_sizes)
        for image, result in zip(x, out, strict=True):
            result.copy_(runner.run(image))
    return out


def _with_bias(conv: nn.Conv2d) -> Tensor:
    """Weight and bias of a 1x1 convolution as one matrix, (out, in + 1)."""
    return torch.cat([conv.weight.flatten(1), conv.bias[:, None]], dim=1)


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """The same of a 1x1 convolution followed by BatchNorm on its running statistics."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale * norm.weight if norm.weight is not None else scale
    matrix = _with_bias(conv)
    matrix[:, -1] -= norm.running_mean
    matrix *= scale[:, None]
    if norm.bias is not None:
        matrix[:, -1] += norm.bias
    return matrix


def _shift_rows(source: Tensor, first: int, target: Tensor, start: int, height: int, relu: bool) -> None:
    """Write rows `start`.. of the shifted map into `target` (C, R, W), through a ReLU if asked.

    `source` (C, rows, W) holds the map's rows from `first` on, one more on each side than `target` where the map has
    them; `height` is the map's. Outside the map is zero.
    """
    channels, rows, w = target.shape
    group = channels // NUM_SHIFT_GROUPS
    top = start - first

    def put(to: Tensor, of: Tensor) -> None:
        if relu:
            torch.clamp_min(of, 0, out=to)
        else:
            to.copy_(of)

    part = source[:, top:top + rows]
    put(target[:group, :, :w - 1], part[:group, :, 1:])
    target[:group, :, w - 1] = 0
    put(target[group:2 * group, :, 1:], part[group:2 * group, :, :w - 1])
    target[group:2 * group, :, 0] = 0

    below = slice(2 * group, 3 * group)
    here = min(rows, height - 1 - start)
    put(target[below, :here], source[below, top + 1:top + 1 + here])
    target[below, here:] = 0

    above = slice(3 * group, 4 * group)
    skipped = 1 if start == 0 else 0
    put(target[above, skipped:], source[above, top + skipped - 1:top + rows - 1])
    target[above, :skipped] = 0
    put(target[4 * group:], part[4 * group:])


class _Runner:
    """The buffers of one call and the passes over them."""

    def __init__(self, body: nn.ModuleList, size: Sequence[int], like: Tensor, window_sizes: Sequence[int]):
        self.body = body
        self.window_sizes = window_sizes
        c, self.h, self.w = size
        self.c = c
        self.like = like
        step = max(window_sizes)
        self.band = min(self.h, max(BAND_PIXELS // (self.w * step), 1) * step)
        hidden = max(lfe.conv0.out_channels for block in body for lfe in block.lfe)
        self.x, self.y = self._map(c), self._map(c)
        rows = min(self.band + 2, self.h)
        self.shifted = self._ones_below(c, rows * self.w)
        self.hidden = like.new_empty(hidden * rows * self.w)
        self.shifted_hidden = self._ones_below(hidden, self.band * self.w)
        width = c // len(window_sizes)
        self.tokens = like.new_empty(self.h * self.w, 2 * width)
        # A last column of ones for the bias of the projection out.
        self.attended = like.new_ones(self.h * self.w, c + 1)

    def _map(self, channels: int) -> Tensor:
        return self.like.new_ones(channels + 1, self.h, self.w)

    def _ones_below(self, channels: int, pixels: int) -> Tensor:
        """Flat rows for any number of pixels up to `pixels`; the ones are written where they belong on use."""
        return self.like.new_empty((channels + 1) * pixels)

    def run(self, image: Tensor) -> Tensor:
        """All blocks on one (C, H, W) map; the result is a view of a buffer."""
        self.x[:-1] = image
        for block in self.body:
            kept: list[Tensor] = []
            for lfe, gmsa in zip(block.lfe, block.gmsa, strict=True):
                self._lfe(lfe)
                kept = self._gmsa(gmsa, kept)
        return self.x[:-1]

    def _lfe(self, lfe: nn.Module) -> None:
        first, second = _with_bias(lfe.conv0), _with_bias(lfe.conv1)
        c, wide = self.c, lfe.conv0.out_channels
        for start in range(0, self.h, self.band):
            rows = min(self.band, self.h - start)
            low, high = max(start - 1, 0), min(start + rows + 1, self.h)
            near = self.shifted[:(c + 1) * (high - low) * self.w].view(c + 1, high - low, self.w)
            near[-1] = 1
            _shift_rows(self.x[:-1], 0, near[:-1], low, self.h, relu=False)
            hidden = self.hidden[:wide * (high - low) * self.w].view(wide, high - low, self.w)
            torch.mm(first, near.flatten(1), out=hidden.flatten(1))
            far = self.shifted_hidden[:(wide + 1) * rows * self.w].view(wide + 1, rows, self.w)
            far[-1] = 1
            _shift_rows(hidden, low, far[:-1], start, self.h, relu=True)
            pixels = slice(start * self.w, (start + rows) * self.w)
            torch.addmm(self.x[:-1].flatten(1)[:, pixels], second, far.flatten(1),
                        out=self.y[:-1].flatten(1)[:, pixels])
        self.x, self.y = self.y, self.x

    def _gmsa(self, gmsa: nn.Module, kept: list[Tensor]) -> list[Tensor]:
        """Add attention to the map. `kept` holds queries, or attention maps, of the block's first module."""
        matrix = _folded(gmsa.project_in, gmsa.norm)
        pixels = self.x.flatten(1)
        width = self.c // len(self.window_sizes)
        keep = []
        for i, (rows, window) in enumerate(zip(matrix.chunk(len(self.window_sizes)), self.window_sizes, strict=True)):
            tokens = self.tokens.flatten()[:pixels.shape[1] * len(rows)].view(-1, len(rows))
            torch.mm(pixels.t(), rows.t(), out=tokens)
            shift = window // 2 if gmsa.shifted else 0
            windows = self._cut(tokens, window, shift)
            if gmsa.shares:
                keep.append(kept[i])
                values = windows
            else:
                queries, values = windows[..., :width], windows[..., width:]
                keep.append(self._attention(queries) if window <= LARGEST_KEPT_WINDOW else queries)
            if window <= LARGEST_KEPT_WINDOW:
                result = torch.bmm(keep[i], values)
            else:
                result = F.scaled_dot_product_attention(
                    keep[i][:, None], keep[i][:, None], values[:, None], scale=1.0)[:, 0]
            self._paste(result, self.attended[:, i * width:(i + 1) * width], window, shift)
        body = self.x[:-1].flatten(1)
        torch.addmm(body, _with_bias(gmsa.project_out), self.attended.t(), out=body)
        return keep

    @staticmethod
    def _attention(queries: Tensor) -> Tensor:
        return torch.softmax(torch.bmm(queries, queries.transpose(1, 2)), dim=-1)

    def _grid(self, windows: Tensor, window: int) -> Tensor:
        """(N, window², C) as (H, W, C), indexed as the rolled map; a view of six axes."""
        return windows.view(self.h // window, self.w // window, window, window, -1).transpose(1, 2)

    def _pieces(self, window: int, shift: int) -> list[tuple[tuple[slice, ...], slice, slice]]:
        """Which part of the window grid (h, i, w, j) comes from which rows and columns of the map.

        A shifted map begins `shift` pixels further on; only the last window in each direction wraps around.
        """
        def axis(size: int) -> list[tuple[slice, slice, slice]]:
            whole = (size - shift) // window
            spans = [(slice(0, whole), slice(0, window), slice(shift, shift + whole * window))]
            if shift:
                spans += [(slice(whole, whole + 1), slice(0, window - shift), slice(size - window + shift, size)),
                          (slice(whole, whole + 1), slice(window - shift, window), slice(0, shift))]
            return [span for span in spans if span[0].stop > span[0].start]
        return [((nh, i, nw, j), ys, xs) for nh, i, ys in axis(self.h) for nw, j, xs in axis(self.w)]

    def _cut(self, tokens: Tensor, window: int, shift: int) -> Tensor:
        """(H * W, C) -> (N, window², C), a new tensor."""
        windows = torch.empty_like(tokens).view(-1, window * window, tokens.shape[1])
        self._move(tokens, windows, window, shift, cut=True)
        return windows

    def _paste(self, windows: Tensor, tokens: Tensor, window: int, shift: int) -> None:
        """The inverse of `_cut`, into `tokens`."""
        self._move(tokens, windows, window, shift, cut=False)

    def _move(self, tokens: Tensor, windows: Tensor, window: int, shift: int, cut: bool) -> None:
        grid = self._grid(windows, window)
        image = tokens.view(self.h, self.w, -1)
        for at, ys, xs in self._pieces(window, shift):
            of = grid[at]
            nh, i, nw, j, _ = of.shape
            part = image[ys, xs].unflatten(1, (nw, j)).unflatten(0, (nh, i))
            if cut:
                of.copy_(part)
            else:
                part.copy_(of)
