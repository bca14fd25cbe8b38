"""What a caller learns between tiles, and how it stops a run."""

from __future__ import annotations

from dataclasses import dataclass

from kvkeye.errors import KvkeyeError


class VideoCancelled(KvkeyeError, RuntimeError):
    """The caller's progress function asked to stop, or the pipeline was interrupted."""


@dataclass(frozen=True)
class TileProgress:
    """Before a forward pass: which tiles of which step. Counts from 0; `branch` counts guidance passes of the step."""

    step: int
    num_steps: int
    first_tile: int
    num_tiles: int
    branch: int
