"""Three-axis position ids (time, row, column) of a prompt. Pure arithmetic; knows no tokens and no pixels.

Text advances all axes by one per token. A visual block that begins at p gives the token (f, i, j) of its merged
grid the position (p + tau_f, p + i, p + j); what follows begins one past the largest position used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

MediaKind = Literal["image", "video"]


@dataclass(frozen=True)
class MediaGrid:
    """One block of patches that attends jointly: a picture, a 1.5 frame (t = 1), or a whole Preview clip.

    grid_thw          frames, patch rows, patch columns (before the 2x2 merge)
    seconds_per_grid  seconds between frames of a Preview clip; None: no clock, all frames at tau 0
    """

    kind: MediaKind
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float | None = None

    @property
    def num_patches(self) -> int:
        t, gh, gw = self.grid_thw
        return t * gh * gw

    def num_tokens(self, merge_size: int = 2) -> int:
        return self.num_patches // merge_size**2


def block_positions(grid: MediaGrid, merge_size: int = 2, tokens_per_second: float = 2.0) -> torch.Tensor:
    """Positions of one block relative to its beginning: int64 [3, tokens], tokens in raster order."""
    t, gh, gw = grid.grid_thw
    rows, columns = gh // merge_size, gw // merge_size
    tau = torch.zeros(t, dtype=torch.int64)
    if grid.seconds_per_grid is not None:
        # fp32 in this order: the truncation must fall where the reference's does.
        tau = (torch.arange(t).float() * float(grid.seconds_per_grid) * tokens_per_second).long()
    axes = (tau[:, None, None], torch.arange(rows)[None, :, None], torch.arange(columns)[None, None, :])
    return torch.stack([axis.expand(t, rows, columns).reshape(-1) for axis in axes])


def mrope_positions(
    num_tokens: int,
    blocks: Sequence[tuple[int, MediaGrid]],
    merge_size: int = 2,
    tokens_per_second: float = 2.0,
) -> tuple[torch.Tensor, int]:
    """Position ids of a prompt of `num_tokens` tokens.

    Args     blocks  (index of the first pad token, grid) in order; everything else is text
    Returns  int64 [3, num_tokens], and delta: the token decoded at cache length n has position n + delta
    Raises   ValueError where blocks overlap or leave the prompt
    """
    positions = torch.empty(3, num_tokens, dtype=torch.int64)
    index = position = 0
    for start, grid in blocks:
        end = start + grid.num_tokens(merge_size)
        if start < index or end > num_tokens:
            raise ValueError(
                f"mrope_positions: a block at {start}:{end} overlaps {index} or leaves {num_tokens} tokens"
            )
        positions[:, index:start] = torch.arange(position, position + start - index)
        position += start - index
        block = block_positions(grid, merge_size, tokens_per_second)
        positions[:, start:end] = block + position
        position += int(block.max()) + 1
        index = end
    positions[:, index:] = torch.arange(position, position + num_tokens - index)
    return positions, position - index
