"""Long videos from short-video models: VideoMerge and the k-step chunk rollout on diffusers pipelines.

`apply_videomerge(pipe, VideoMergeConfig(...))`, `ChunkRollout(pipe, KStepConfig(...))`; see README.md in this folder.
Importing this package imports neither torch nor diffusers: public names are resolved at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvkeye.video.config import KStepConfig, VideoMergeConfig
    from kvkeye.video.fusion import apply_videomerge, remove_videomerge
    from kvkeye.video.progress import VideoCancelled
    from kvkeye.video.rollout import ChunkRollout

_PUBLIC = {
    "ChunkRollout": "kvkeye.video.rollout",
    "KStepConfig": "kvkeye.video.config",
    "VideoCancelled": "kvkeye.video.progress",
    "VideoMergeConfig": "kvkeye.video.config",
    "apply_videomerge": "kvkeye.video.fusion",
    "remove_videomerge": "kvkeye.video.fusion",
}
__all__ = ["ChunkRollout", "KStepConfig", "VideoCancelled", "VideoMergeConfig", "apply_videomerge", "remove_videomerge"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvkeye.video' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
