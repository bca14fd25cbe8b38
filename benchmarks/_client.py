"""The published client package over frames that are already decoded, up to packed patches."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from _keye_vl_utils import load
from torch.nn.functional import interpolate


def reads(version: str, frames: dict[int, Any], num_frames: int, fps: float) -> ModuleType:
    """The package, its reader replaced by one that hands out `frames`."""
    client = load(version)

    class Reader:
        """The part of decord's reader that the package calls."""

        def __init__(self, _: object) -> None: ...

        def __len__(self) -> int:
            return num_frames

        def get_avg_fps(self) -> float:
            return fps

        def get_batch(self, indices: list[int]) -> Any:
            return SimpleNamespace(asnumpy=lambda: np.stack([frames[k] for k in indices]))

    decord = ModuleType("decord")
    decord.VideoReader = Reader  # type: ignore[attr-defined]
    sys.modules["decord"] = decord
    if hasattr(client, "get_video_reader_backend"):
        client.get_video_reader_backend = lambda: "decord"
    return client


def client_patches(client: Any, model_version: str) -> torch.Tensor:
    """What the client returns for the clip, then the checkpoint's processor in a few torch operations: [N, 588]."""
    if model_version == "preview":
        return _patches(client.fetch_video({"video": "clip"}))
    video, about = client.fetch_video({"video": "clip"})
    is_fast = about["frame_types"].bool()
    parts: list[torch.Tensor] = [torch.empty(0)] * len(video)
    sides = ((about["height"], about["width"]), (about["fast_height"], about["fast_width"]))
    for kind, size in enumerate(sides):
        chosen = torch.nonzero(is_fast == bool(kind)).flatten()
        if len(chosen):
            resized = interpolate(video[chosen], size, mode="bilinear", antialias=True)  # uint8
            rows = _patches(resized).view(len(chosen), -1, 588)
            for k, row in zip(chosen.tolist(), rows):
                parts[k] = row
    return torch.cat(parts)


def _patches(video: torch.Tensor) -> torch.Tensor:
    """[t, 3, H, W] of 0..255 -> [t * H/14 * W/14, 588], normalised."""
    t, c, height, width = video.shape
    x = video.float().div_(255).sub_(0.5).div_(0.5)
    x = x.view(t, c, height // 14, 14, width // 14, 14).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, c * 14 * 14)
