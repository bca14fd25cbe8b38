"""Passes of fixed sizes, recorded once and replayed over buffers whose addresses never change.

Knows buffers and what is computed from them; must not know what a pass means. On a GPU a recorded pass is a CUDA
graph: one launch instead of hundreds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvkeye.engine.staging import to_device

# Takes what is to be done, does it once, and returns what does it again.
Recorder = Callable[[Callable[[], object]], Callable[[], object]]
Body = Callable[[Any], Sequence[Tensor]]


def rerun(body: Callable[[], object]) -> Callable[[], object]:
    """A recorder without a recording: the same operations on the same buffers, launched one by one."""
    body()
    return body


class CudaRecorder:
    """Captures CUDA graphs on one device whose temporary tensors share one pool: record the largest first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], object]) -> Callable[[], object]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                body()  # what is made once, such as compiled kernels and workspaces, is made before the capture
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                body()
        return graph.replay


class RecordedPass:
    """body(inputs) -> outputs for one size.

    inputs   a dataclass of host tensors, valid for a first run; later ones have the same shapes and dtypes
    outputs  what the body's results are copied to
    """

    def __init__(self, inputs: Any, outputs: Sequence[Tensor], body: Body, record: Recorder) -> None:
        own, self._buffer = to_device(inputs, outputs[0].device)
        self._outputs = outputs
        self._replay = record(lambda: [kept.copy_(new) for kept, new in zip(outputs, body(own), strict=True)])

    def __call__(self, packed: Tensor) -> Sequence[Tensor]:
        """`packed` begins with the inputs as `to_device` packs them; where it ends early, what was there stays.

        The results are overwritten by the next pass.
        """
        own = self._buffer[: len(packed)]
        own.copy_(packed[: len(own)])
        self._replay()
        return self._outputs


def smallest(sizes: Sequence[int], wanted: int) -> int | None:
    """The smallest of the ascending sizes that holds `wanted`, or None."""
    place = bisect_left(sizes, wanted)
    return sizes[place] if place < len(sizes) else None
