"""Small pieces on a GPU by CUDA graphs: one launch in place of hundreds, for which the GPU would wait."""
from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elan_basicsr import inference

MOST_PIXELS = 2**18  # of larger pieces a GPU has enough to do
KEPT = 2  # shapes: self-ensemble goes to and fro between h x w and w x h


class Recording(NamedTuple):
    """A graph, and the tensors that it reads and writes."""
    graph: torch.cuda.CUDAGraph
    x: Tensor
    y: Tensor

    def replay(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return self.y.clone()


class Replayed:
    """A network that records a small piece when its shape comes again, and replays it from then on.

    The results are the network's, to the bit. Precision and weights stay what they were when a shape was recorded.
    Where memory, or anything else, does not allow a recording, none is made any more.

    Args:
        net: On a GPU, in eval mode; called without gradients. (B, C, h, w) to (B, C', h', w').
    """

    def __init__(self, net: nn.Module):
        self.net = net
        self.records = True
        self.recordings: dict[torch.Size, Recording] = {}  # what was used last comes last
        self._seen: deque[torch.Size] = deque(maxlen=KEPT)

    def __call__(self, x: Tensor) -> Tensor:
        if recording := self._recording(x):
            return recording.replay(x)
        if self.recordings:
            with inference.unless_too_large():
                return self.net(x)
            self._give_up()  # a piece that passes without recordings passes
        return self.net(x)

    def _recording(self, x: Tensor) -> Recording | None:
        """The recording of a piece's shape, made if that has come before."""
        shape = x.shape
        recording = self.recordings.pop(shape, None)
        if recording is None and self.records and shape[0] * shape[2] * shape[3] <= MOST_PIXELS:
            if shape in self._seen:
                recording = self._try_to_record(x)
            else:
                self._seen.append(shape)
        if recording is not None:
            self.recordings[shape] = recording
            for oldest in [*self.recordings][:-KEPT]:
                del self.recordings[oldest]
        return recording

    def _try_to_record(self, x: Tensor) -> Recording | None:
        try:
            # Outside inference mode: what PyTorch itself makes for the first graph, later ones fill in whatever mode.
            # Without autocast's cache, since a cast that comes out of it is not recorded.
            with (torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device), torch.autocast(
                    'cuda', torch.get_autocast_dtype('cuda'), torch.is_autocast_enabled('cuda'), cache_enabled=False)):
                return self._record(x.clone())
        except Exception:  # whatever it is, the network does without
            self._give_up()
            return None

    def _record(self, x: Tensor) -> Recording:
        """Record what is to be read from x."""
        # Recordings follow each other on one stream, and what they give is copied at once: they can share memory.
        pool = next((recording.graph.pool() for recording in self.recordings.values()), None)
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # which torch.cuda.graph alone does not leave where it fails
            self.net(x)  # what libraries hold for each stream is not to be part of a graph
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode='thread_local'):
                y = self.net(x)
        return Recording(graph, x, y)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def _give_up(self) -> None:
        self.records = False
        self.recordings.clear()
