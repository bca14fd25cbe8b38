"""A clip given as a list of pictures or as one array, as numbered frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kvkeye.errors import MediaError
from kvkeye.media.decode.decoder import IN_PROCESS, Decoder
from kvkeye.media.frame import Frame
from kvkeye.media.image import load_image
from kvkeye.media.limits import MediaLimits

# A list of pictures, uint8 [F, H, W, 3], or uint8 [F, 3, H, W].
Frames: TypeAlias = "Sequence[object] | npt.NDArray[Any] | torch.Tensor"


class FrameList:
    """Pictures given as a list, decoded one at a time; each may be anything that `load_image` takes."""

    def __init__(
        self, sources: Frames, fps: float | None, limits: MediaLimits, where: str, decoder: Decoder = IN_PROCESS
    ) -> None:
        if isinstance(sources, (np.ndarray, torch.Tensor)) and sources.ndim != 4:
            raise MediaError(
                f"{where}: an array of shape {tuple(sources.shape)}; required is "
                "[F, H, W, 3] in numpy or [F, 3, H, W] in torch."
            )
        if len(sources) == 0:
            raise MediaError(f"{where}: a list of 0 frames; at least 1 is required.")
        if len(sources) > limits.max_frames:
            raise MediaError(
                f"{where}: a list of {len(sources)} frames; at most {limits.max_frames} are accepted. Send fewer."
            )
        self.sources, self.limits, self.where, self.decoder = sources, limits, where, decoder
        self.num_frames, self.fps = len(sources), fps
        first = self._load(0)
        self.height, self.width = first.shape[:2]

    def _load(self, index: int) -> Frame:
        where = f"{self.where}: frame {index}"
        return load_image(self.sources[index], self.limits, where, decoder=self.decoder)

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        for index in indices:
            frame = self._load(index)
            if frame.shape[:2] != (self.height, self.width):
                raise MediaError(
                    f"{self.where}: frame {index} has {frame.shape[1]}x{frame.shape[0]} pixels, frame 0 has "
                    f"{self.width}x{self.height}; all frames of a clip must share one size."
                )
            yield frame
