"""From a network and a tensor to a tensor: tiles for what does not fit, self-ensemble, precision."""
from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

WINDOW = 16
"""Tile positions are multiples of this: ELAN's largest window, so that a tile's windows lie where the image's lie."""
_TOO_LARGE = (
    'out of memory',  # CUDA's own words outside torch's allocator, as when it loads a kernel; and ONNX Runtime's
    'allocate',  # main memory, for which torch has no exception; and ONNX Runtime's arena
    'bad_alloc', 'alloc_failed', 'allocation_failed',  # of the C++ library, cuBLAS and cuDNN
    'cudnn_status_not_supported', 'unable to find an engine',  # what cuDNN says where its workspace does not fit, too
    'invalid configuration argument',  # a kernel launched with more blocks than CUDA counts
    '32bitindexmath', 'int_max',  # a kernel that counts elements in 32 bits
)


def forward(net: nn.Module | Callable[[Tensor], Tensor], x: Tensor, *, scale: int, tile: int = 0,
            tile_overlap: int = 16, window: int = WINDOW, self_ensemble: bool = False) -> Tensor:
    """Run `net` on an image batch; what is too large for the device at once, in smaller tiles and with a warning.

    Args:
        net: Maps (B, C, h, w) in 0..1 to (B, C', h * scale, w * scale).
        x: Images, (B, C, H, W) in 0..1.
        scale: Enlargement of the network.
        tile: Edge of the tiles in input pixels, rounded up to a multiple of `window`; 0 for the whole image at once.
        tile_overlap: Input pixels that a tile sees beyond each of its edges and that are cut off again; rounded up to a
            multiple of `window`. 16 gives 58 dB between tiled and whole on photographs; more did not help.
        window: Multiple that tiles are aligned to.
        self_ensemble: Average over the eight flips and rotations (Timofte et al., CVPR 2016).

    Returns:
        (B, C', H * scale, W * scale), on the device of `x`, unclipped.
    """
    def in_tiles(edge: int) -> Tensor:
        def run(image: Tensor) -> Tensor:
            if edge <= 0 or (edge >= image.shape[2] and edge >= image.shape[3]):
                return net(image)
            return _forward_tiles(net, image, scale, _round_up(edge, window), _round_up(tile_overlap, window))
        return average_of_turns(run, x) if self_ensemble else run(x)

    h, w = x.shape[2:]
    tiles = tiles_to_try(tile, h, w, window)
    for edge, smaller in pairwise(tiles):
        with unless_too_large():
            return in_tiles(edge)
        warnings.warn(f'{w}x{h} pixels are too many for {x.device} at once; they go through in tiles of {smaller}',
                      stacklevel=2)
    return in_tiles(tiles[-1])


def average_of_turns(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The average of what `run` makes of the eight flips and rotations of `x`, turned back."""
    results = (turn(run(turn(x, turns, flipped).contiguous()), turns, flipped, back=True)
               for turns in range(4) for flipped in (False, True))
    total = next(results).clone()
    for y in results:
        total += y
    return total / 8


def turn(x: Tensor, turns: int, flipped: bool, back: bool = False) -> Tensor:
    """Flip (B, C, H, W) left to right if asked, then rotate by quarter turns; with `back` the inverse."""
    if back:
        x = torch.rot90(x, -turns, dims=(2, 3))
        return x.flip(3) if flipped else x
    x = x.flip(3) if flipped else x
    return torch.rot90(x, turns, dims=(2, 3))


def too_large(error: BaseException) -> bool:
    """Whether an error means that a smaller piece may pass: too little memory, or more than a kernel takes.

    Only a part of such errors is a torch.OutOfMemoryError; the others are told by their words.
    """
    words = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(part in words for part in _TOO_LARGE)


@contextmanager
def unless_too_large() -> Iterator[None]:
    """Go on behind the block where it fails because a piece was too large, with the device's memory free again."""
    try:
        yield
    except Exception as error:  # ONNX Runtime's share no class
        if not too_large(error):
            raise
        traceback.clear_frames(error.__traceback__)  # which hold tensors
        with suppress(RuntimeError):  # a device that is lost says so when it is used next
            torch.cuda.empty_cache()


def tiles_to_try(tile: int, h: int, w: int, window: int) -> list[int]:
    """`tile`, 0 for the whole image, and what to try where that is too large: half the edge, down to one window."""
    tiles, edge = [tile], min(tile or max(h, w), max(h, w))
    while edge > window:
        edge = _round_up(edge // 2, window)
        tiles.append(edge)
    return tiles


def _forward_tiles(net, x: Tensor, scale: int, tile: int, overlap: int) -> Tensor:
    h, w = x.shape[2:]
    out = None
    for part in cut_tiles(h, w, tile, overlap):
        seen, place, inner = ((..., *slices) for slices in (part.seen, part.place(scale), part.inner(scale)))
        y = net(x[seen].contiguous())
        if out is None:
            out = y.new_empty((*y.shape[:2], h * scale, w * scale))
        out[place] = y[inner]
    assert out is not None  # an image has a tile
    return out


class Tile(NamedTuple):
    """A rectangle of an image in input pixels, and the larger one that the network sees for it."""
    rows: tuple[int, int]
    columns: tuple[int, int]
    seen_rows: tuple[int, int]
    seen_columns: tuple[int, int]

    @property
    def seen(self) -> tuple[slice, slice]:
        """What the network sees, as rows and columns of the input."""
        return slice(*self.seen_rows), slice(*self.seen_columns)

    def place(self, scale: int) -> tuple[slice, slice]:
        """Where the tile lies in the image's output."""
        return _scaled(self.rows, 0, scale), _scaled(self.columns, 0, scale)

    def inner(self, scale: int) -> tuple[slice, slice]:
        """Where the tile lies in the network's output for what it sees."""
        return _scaled(self.rows, self.seen_rows[0], scale), _scaled(self.columns, self.seen_columns[0], scale)


def _scaled(span: tuple[int, int], first: int, scale: int) -> slice:
    return slice((span[0] - first) * scale, (span[1] - first) * scale)


def cut_tiles(h: int, w: int, tile: int, overlap: int) -> Iterator[Tile]:
    """The tiles of an image of h x w pixels, row by row; `tile` 0 gives the whole image as one."""
    for rows in _spans(h, tile):
        for columns in _spans(w, tile):
            yield Tile(rows, columns, *((max(start - overlap, 0), min(end + overlap, size))
                                        for (start, end), size in ((rows, h), (columns, w))))


def _spans(size: int, tile: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, tile or size):
        yield start, min(start + tile, size) if tile else size


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
