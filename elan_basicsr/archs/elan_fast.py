"""The body of ELAN for inference on a CPU: the function of `elan_arch`, with less traffic through memory.

An image's map is one (H, W, C) tensor that every module updates in place. Work goes in bands of rows whose temporaries
stay in the cache: widened maps of an LFE, tokens, windows and attention maps of a GMSA. With the channels last a 1x1
convolution is one matrix product, a shift moves runs of memory, and windows are cut from the rows of a band, the cyclic
shift included. All buffers are made once per call: calls share nothing.

BatchNorm is folded into the projection at every call. A cached fold would have to notice changed weights, and updates
through `.data`, as the toolbox's moving average makes them, leave no trace in a tensor's version.

Under autocast to bfloat16, local features and the projection out of attention are computed in it. The map itself,
queries and attention stay in float32.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_SHIFT_GROUPS = 5
# Pixels per band: a band of ELAN-light's widened map is then some 2.5 MB of float32.
BAND_PIXELS = 5120
# From this many tokens a window's attention is computed fused, and again by each module that shares it; below, the
# attention map is cheaper to make, and to keep for those modules.
SMALLEST_FUSED = 256


def serves(body: nn.ModuleList, x: Tensor, window_sizes: Sequence[int], plain_types: set[type]) -> bool:
    """Whether `run_body` may stand in for the modules: evaluation of unmodified modules on a CPU, nothing watching."""
    if (body.training or type(x) is not Tensor or x.device.type != 'cpu'
            or x.dtype not in (torch.float32, torch.float64) or any(w % 2 for w in window_sizes)):
        return False
    if (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
            or (torch.is_autocast_enabled('cpu') and _low_precision(x.dtype) != torch.bfloat16)
            or torch._C._functorch.maybe_current_level() is not None):
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
    out = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    low = _low_precision(x.dtype)
    with torch.no_grad(), torch.autocast('cpu', enabled=False):
        for image, result in zip(x, out, strict=True):
            result.copy_(_Runner(body, image, window_sizes, low).run())
    return out


def _low_precision(dtype: torch.dtype) -> torch.dtype:
    """What autocast asks for in place of float32."""
    return torch.get_autocast_dtype('cpu') if dtype == torch.float32 and torch.is_autocast_enabled('cpu') else dtype


def _matrix(conv: nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution as weight (in, out) and bias (out), for tokens with the channels last."""
    return conv.weight.flatten(1).t().to(dtype), conv.bias.to(dtype)


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The same of a 1x1 convolution followed by BatchNorm on its running statistics."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale * norm.weight if norm.weight is not None else scale
    weight, bias = _matrix(conv, conv.weight.dtype)
    bias = (bias - norm.running_mean) * scale
    return weight * scale, bias + norm.bias if norm.bias is not None else bias


def _shift_rows(source: Tensor, first: int, target: Tensor, start: int, height: int, relu: bool) -> None:
    """Write rows `start`.. of the shifted map into `target` (R, W, C), through a ReLU if asked.

    `source` (rows, W, C) holds the map's rows from `first` on, one more on each side than `target` where the map has
    them; `height` is the map's. Outside the map is zero.
    """
    rows, w, channels = target.shape
    group = channels // NUM_SHIFT_GROUPS
    top = start - first

    def put(to: Tensor, of: Tensor) -> None:
        if relu:
            torch.clamp_min(of, 0, out=to)
        else:
            to.copy_(of)

    part = source[top:top + rows]
    put(target[:, :w - 1, :group], part[:, 1:, :group])
    target[:, w - 1, :group] = 0
    put(target[:, 1:, group:2 * group], part[:, :w - 1, group:2 * group])
    target[:, 0, group:2 * group] = 0

    below = slice(2 * group, 3 * group)
    here = min(rows, height - 1 - start)
    put(target[:here, :, below], source[top + 1:top + 1 + here, :, below])
    target[here:, :, below] = 0

    above = slice(3 * group, 4 * group)
    skipped = 1 if start == 0 else 0
    put(target[skipped:, :, above], source[top + skipped - 1:top + rows - 1, :, above])
    target[:skipped, :, above] = 0
    put(target[..., 4 * group:], part[..., 4 * group:])


class _Attention:
    """What the passes need of a GMSA module: its projections as matrices, one into each group of windows."""

    def __init__(self, gmsa: nn.Module, sharing: bool, low: torch.dtype):
        weight, bias = folded(gmsa.project_in, gmsa.norm)
        groups = len(gmsa.window_sizes)
        self.projections = [(part.contiguous(), offset)
                            for part, offset in zip(weight.chunk(groups, 1), bias.chunk(groups), strict=True)]
        self.project_out = _matrix(gmsa.project_out, low)
        self.shifted = gmsa.shifted
        self.shares = gmsa.shares
        self.sharing = sharing


class _Runner:
    """The map and the buffers of one image, and the passes over them."""

    def __init__(self, body: nn.ModuleList, image: Tensor, window_sizes: Sequence[int], low: torch.dtype):
        self.body = body
        self.window_sizes = window_sizes
        self.low = low
        self.c, self.h, self.w = image.shape
        self.x = image.permute(1, 2, 0).contiguous()
        step = max(window_sizes)
        self.band = min(self.h, max(BAND_PIXELS // (self.w * step), 1) * step)
        hidden = max(lfe.conv0.out_channels for block in body for lfe in block.lfe)
        self.shifted = image.new_empty(self.band + 1, self.w, self.c, dtype=low)
        self.hidden = image.new_empty((self.band + 2) * self.w * hidden, dtype=low)
        self.shifted_hidden = image.new_empty(self.band * self.w * hidden, dtype=low)
        self.delta = image.new_empty(self.band, self.w, self.c, dtype=low)
        width = self.c // len(window_sizes)
        self.tokens = image.new_empty(self.band * self.w * 2 * width)
        self.attended = image.new_empty(self.h, self.w, self.c, dtype=low)
        self.maps = self._room_for_maps(image)

    def _room_for_maps(self, image: Tensor) -> dict[int, Tensor]:
        """By group, memory for the attention maps that modules share: `window²` numbers for each pixel."""
        if all(len(block.gmsa) == 1 for block in self.body):
            return {}
        return {i: image.new_empty(self.h * self.w // window**2, window**2, window**2)
                for i, window in enumerate(self.window_sizes) if window**2 < SMALLEST_FUSED}

    def run(self) -> Tensor:
        """All blocks; the result (C, H, W) is a view of the map."""
        for block in self.body:
            queries: dict[tuple[int, int], Tensor] = {}
            for lfe, gmsa in zip(block.lfe, block.gmsa, strict=True):
                self._module(lfe, _Attention(gmsa, len(block.gmsa) > 1, self.low), queries)
        return self.x.permute(2, 0, 1)

    def _module(self, lfe: nn.Module, gmsa: _Attention, queries: dict[tuple[int, int], Tensor]) -> None:
        """Add local features, then attention, to one band after the other while it is in the cache.

        Shifted windows reach into the next band, and from the last into the first: attention is one band behind then,
        and added at the end.
        """
        before = None
        for band in self._lfe(lfe):
            if not gmsa.shifted:
                self._attend_band(gmsa, queries, *band)
                self._add_attended(gmsa, *band)
            elif before:
                self._attend_band(gmsa, queries, *before)
            before = band
        if gmsa.shifted:
            self._attend_band(gmsa, queries, *before)
            for band in self._bands():
                self._add_attended(gmsa, *band)

    def _bands(self) -> Iterator[tuple[int, int]]:
        """First row and end of each band."""
        for start in range(0, self.h, self.band):
            yield start, min(start + self.band, self.h)

    def _lfe(self, lfe: nn.Module) -> Iterator[tuple[int, int]]:
        """Add local features to the map, band by band; yields each band that is done, which may then be changed.

        A band's widened map is made one row ahead of the band, so that it rests on rows that are not yet updated.
        """
        (weight0, bias0), (weight1, bias1) = _matrix(lfe.conv0, self.low), _matrix(lfe.conv1, self.low)
        c, wide = self.c, lfe.conv0.out_channels
        hidden = self.hidden[:(self.band + 2) * self.w * wide].view(-1, self.w, wide)
        first = ahead = 0  # the rows of the map that `hidden` holds: from `first` to before `ahead`
        for start, end in self._bands():
            if start:
                hidden[:2] = hidden[ahead - 2 - first:ahead - first].clone()
                first = ahead - 2
            new = slice(ahead, min(end + 1, self.h))
            near, made = self.shifted[:new.stop - new.start], hidden[new.start - first:new.stop - first]
            _shift_rows(self.x, 0, near, new.start, self.h, relu=False)
            torch.addmm(bias0, near.view(-1, c), weight0, out=made.view(-1, wide))
            ahead = new.stop
            far = self.shifted_hidden[:(end - start) * self.w * wide].view(-1, self.w, wide)
            _shift_rows(hidden, first, far, start, self.h, relu=True)
            delta = self.delta[:end - start]
            torch.addmm(bias1, far.view(-1, wide), weight1, out=delta.view(-1, c))
            self.x[start:end] += delta
            yield start, end

    def _attend_band(self, gmsa: _Attention, queries: dict[tuple[int, int], Tensor], start: int, end: int) -> None:
        """Attention of a band's windows. `queries` of the block's first module stand in where its maps are not kept."""
        width = self.c // len(self.window_sizes)
        for i, window in enumerate(self.window_sizes):
            shift = window // 2 if gmsa.shifted else 0
            windows = self._windows(*gmsa.projections[i], start, end, window, shift)
            first = start * self.w // window**2
            attention = self.maps[i][first:first + len(windows)] if gmsa.sharing and i in self.maps else None
            if gmsa.shares:
                q, v = queries.get((i, start)), windows
            else:
                q, v = windows[..., :width], windows[..., width:]
                if gmsa.sharing and attention is None:
                    queries[i, start] = q
            result = _attend(q, v, attention, known=gmsa.shares)
            self._paste(result, self.attended[..., i * width:(i + 1) * width], start, end, window, shift)

    def _add_attended(self, gmsa: _Attention, start: int, end: int) -> None:
        """Project what a band attended to, and add it to the map."""
        weight, bias = gmsa.project_out
        delta = self.delta[:end - start]
        torch.addmm(bias, self.attended[start:end].view(-1, self.c), weight, out=delta.view(-1, self.c))
        self.x[start:end] += delta

    def _windows(self, weight: Tensor, bias: Tensor, start: int, end: int, window: int, shift: int) -> Tensor:
        """Project a band, its rows `shift` further down on the torus, and cut it: (N, window², C), a new tensor."""
        channels = len(bias)
        tokens = self.tokens[:(end - start) * self.w * channels].view(end - start, self.w, channels)
        for of, to in self._rows(start, end, shift):
            torch.addmm(bias, self.x[of].view(-1, self.c), weight, out=tokens[to].view(-1, channels))
        windows = tokens.new_empty((end - start) // window, self.w // window, window, window, channels)
        for columns, across, inside in self._columns(window, shift):
            windows[:, across, :, inside].copy_(_grid(tokens[:, columns], window, inside))
        return windows.view(-1, window**2, channels)

    def _paste(self, result: Tensor, image: Tensor, start: int, end: int, window: int, shift: int) -> None:
        """Put the windows of a band where they came from in `image` (H, W, C)."""
        channels = result.shape[-1]
        windows = result.view((end - start) // window, self.w // window, window, window, channels)
        rows = self._rows(start, end, shift)
        wraps = len(rows) > 1
        band = image.new_empty(end - start, self.w, channels) if wraps else image[rows[0][0]]
        for columns, across, inside in self._columns(window, shift):
            _grid(band[:, columns], window, inside).copy_(windows[:, across, :, inside])
        if wraps:
            for of, to in rows:
                image[of] = band[to]

    def _rows(self, start: int, end: int, shift: int) -> list[tuple[slice, slice]]:
        """Which rows of the map, and of the band, a band `shift` further down on the torus consists of."""
        inside = min(end + shift, self.h) - start - shift
        rows = [(slice(start + shift, start + shift + inside), slice(0, inside))]
        if inside < end - start:
            rows.append((slice(0, end + shift - self.h), slice(inside, end - start)))
        return rows

    def _columns(self, window: int, shift: int) -> list[tuple[slice, slice, slice]]:
        """Which columns of the map are which windows, and which columns inside them; the last window wraps around."""
        number, edge = self.w // window, self.w - window + shift
        if not shift:
            return [(slice(0, self.w), slice(0, number), slice(0, window))]
        columns = [(slice(edge, self.w), slice(number - 1, number), slice(0, window - shift)),
                   (slice(0, shift), slice(number - 1, number), slice(window - shift, window))]
        if number > 1:
            columns.append((slice(shift, edge), slice(0, number - 1), slice(0, window)))
        return columns


def _attend(q: Tensor | None, v: Tensor, attention: Tensor | None, known: bool) -> Tensor:
    """softmax(q qᵀ) v, all (N, window², C). An attention map is written into `attention` if given, or read if known."""
    if attention is None and v.shape[1] >= SMALLEST_FUSED:
        return F.scaled_dot_product_attention(q[:, None], q[:, None], v[:, None], scale=1.0)[:, 0]
    if attention is None or not known:
        attention = torch.bmm(q, q.transpose(1, 2), **({} if attention is None else {'out': attention}))
        torch.softmax(attention, dim=-1, out=attention)
    return torch.bmm(attention, v)


def _grid(rows: Tensor, window: int, inside: slice) -> Tensor:
    """Rows of a map (R, columns, C) as a view (R / window, windows across, window, columns inside one, C)."""
    width = inside.stop - inside.start
    return rows.unflatten(1, (-1, width)).unflatten(0, (-1, window)).transpose(1, 2)
