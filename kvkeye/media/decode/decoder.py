"""Where files become pixels: the interface, and its form that decodes in the calling process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO, Protocol

from kvkeye.media.decode.picture import Alpha, decode_picture
from kvkeye.media.decode.video import VideoFile
from kvkeye.media.frame import Clip, Frame
from kvkeye.media.limits import MediaLimits


class Decoder(Protocol):
    """Takes files that are already open and whose sizes are checked. Raises `MediaError`."""

    def picture(
        self, file: BinaryIO, limits: MediaLimits, where: str, alpha: Alpha, apply_orientation: bool
    ) -> Frame: ...

    def video(self, file: BinaryIO, limits: MediaLimits, where: str) -> AbstractContextManager[Clip]:
        """The clip may be used inside the context only."""
        ...


class InProcess:
    """Decodes here. A codec that crashes takes the process with it, and one that stalls cannot be stopped."""

    def picture(self, file: BinaryIO, limits: MediaLimits, where: str, alpha: Alpha, apply_orientation: bool) -> Frame:
        return decode_picture(file, limits, where, alpha, apply_orientation)

    def video(self, file: BinaryIO, limits: MediaLimits, where: str) -> AbstractContextManager[Clip]:
        return nullcontext(VideoFile(file, limits, where))


IN_PROCESS = InProcess()
