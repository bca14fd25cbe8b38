"""Recorded passes of the vision tower and the projector over packs of any pictures, by number of patches.

What differs between packs of a size is in tensors on the device: bounds of segments, positions, the order in which
patches are merged. Padding patches are a segment of their own that nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvkeye.engine.batch import EncodeBatch
from kvkeye.engine.graphs import RecordedPass, Recorder, smallest
from kvkeye.engine.staging import to_device
from kvkeye.layers import PackedContext
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.vision import PackLayout

logger = logging.getLogger("kvkeye.engine")
SMALLEST = 128  # patches
PATCHES_PER_SEGMENT = 16  # of a size, those of the smallest picture: a pack of more segments is not recorded


def patch_sizes(most: int) -> list[int]:
    """Sizes up to the first that holds `most` patches, four between one power of two and the next."""
    sizes = [SMALLEST]
    while sizes[-1] < most:
        power = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + max(SMALLEST, power // 4))
    return sizes


@dataclass(frozen=True)
class PackInputs:
    """What the host decides of a pack. Rows of pixel_values after the pack's own keep what they held before.

    cu_seqlens [S + 1] int32    merge_rows [N] int64    pixel_values [n, 588], n <= N
    """

    cu_seqlens: Tensor
    merge_rows: Tensor
    pixel_values: Tensor


class EncoderGraphs:
    """Recorded passes from pixels to media embeddings. sizes: ascending numbers of patches."""

    def __init__(self, model: KeyeModel, sizes: Sequence[int], record: Recorder) -> None:
        self._model, self._sizes = model, list(sizes)
        vision, most = model.config.vision, sizes[-1]
        self._merge = vision.spatial_merge_size**2

        def zeros(rows: int, columns: int, dtype: torch.dtype = model.dtype) -> Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=model.device)

        angles = [zeros(most, vision.head_dim // 2, torch.float32) for _ in range(2)]
        self._tables = [zeros(most, vision.hidden_size), *angles]  # positions, cos, sin
        output = zeros(most // self._merge, model.config.text.hidden_size)
        self._passes: dict[int, RecordedPass] = {}
        for size in reversed(self._sizes):
            first = self._padded([], torch.empty(0, dtype=torch.int64), torch.zeros(size, vision.patch_dim), size)
            self._passes[size] = RecordedPass(first, [output[: size // self._merge]], self._encode, record)
            logger.info("recorded an encoder pass of %d patches", size)

    def _encode(self, inputs: PackInputs) -> list[Tensor]:
        size = len(inputs.merge_rows)
        positions, cos, sin = (table[:size] for table in self._tables)
        layout = PackLayout(positions, cos, sin, PackedContext(inputs.cu_seqlens, size))
        return [self._model.encode_packed(inputs.pixel_values, layout, inputs.merge_rows)]

    def _padded(self, lengths: list[int], merge_rows: Tensor, pixel_values: Tensor, size: int) -> PackInputs:
        """A pack of segments of these lengths as one of `size` patches."""
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        num_segments = size // PATCHES_PER_SEGMENT
        return PackInputs(
            cu_seqlens=pad(bounds, (0, num_segments - len(lengths)), value=size),
            merge_rows=torch.cat((merge_rows, torch.arange(len(merge_rows), size))),
            pixel_values=pixel_values.to(self._model.dtype),
        )

    def __call__(self, batch: EncodeBatch) -> Tensor | None:
        """Embeddings [n, hidden] of all items, which the next pass overwrites; None for a pack that fits no size."""
        visual = self._model.visual
        num_patches = sum(grid.num_patches for grid in batch.grids)
        size = smallest(self._sizes, num_patches)
        lengths = visual.segments(batch.grids)
        if size is None or len(lengths) >= size // PATCHES_PER_SEGMENT:
            return None
        for table, rows in zip(self._tables, visual.tables(batch.grids)):
            table[:num_patches].copy_(rows)
        merge_rows = self._model.projector.merge_rows(batch.grids)
        inputs = self._padded(lengths, merge_rows, torch.cat(batch.pixel_values), size)
        _, packed = to_device(inputs, self._model.device)
        (embeds,) = self._passes[size](packed)
        return embeds[: num_patches // self._merge]
