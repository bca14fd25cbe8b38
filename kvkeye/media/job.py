"""What one load needs to know and what it gives back; shared by `load` and the versions' rules for clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvkeye.errors import MediaError
from kvkeye.media.frame import Frame
from kvkeye.media.limits import MediaLimits
from kvkeye.media.options import Kind, MediaOptions
from kvkeye.media.resize import BICUBIC, FACTOR
from kvkeye.media.sampling import VideoPolicy

CLIENT_PIXELS = {"preview": (4 * 784, 16_384 * 784), "1.5": (4 * 784, 20_480 * 784)}  # of the client utilities


@dataclass(frozen=True)
class MediaSettings:
    """What a checkpoint's `preprocessor_config.json` says, and the version's rules for clips. Pixels are areas."""

    version: str
    min_pixels: int
    max_pixels: int
    resample: int = BICUBIC
    client_resize: bool = False  # the reference client's own resize before the processor's
    video: VideoPolicy = field(default_factory=VideoPolicy)


@dataclass(frozen=True)
class LoadedMedia:
    """A picture or a clip, ready to be cut into patches.

    groups            uint8 [t, height, width, 3] each; a group attends jointly. One per picture, per Preview clip,
                      per 1.5 frame
    resize_to         (height, width) of the picture's patches where it is still to be resized, by Pillow's bicubic
                      rule: packing does that on the way
    seconds_per_grid  seconds between the frames of a Preview clip
    timestamps        seconds, one per 1.5 frame; None where the clock is unknown
    frame_types       0 slow, 1 fast, one per 1.5 frame
    """

    kind: Kind
    groups: tuple[Frame, ...]
    resize_to: tuple[int, int] | None = None
    seconds_per_grid: float | None = None
    timestamps: tuple[float, ...] | None = None
    frame_types: tuple[int, ...] | None = None

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each group's frames once packed."""
        return [self.resize_to or group.shape[1:3] for group in self.groups]


@dataclass(frozen=True)
class Job:
    """One item's options under one checkpoint's settings and one server's limits; `where` names it in errors.

    `check_tokens` is called with the number of language tokens as soon as sizes are known; it raises to refuse.
    A clip whose options leave its cost open is shrunk to `room` tokens where the published rule would exceed them.
    """

    options: MediaOptions
    settings: MediaSettings
    limits: MediaLimits
    where: str
    check_tokens: Callable[[int], None]
    room: int | None = None

    def limit(self, name: str, most: float) -> None:
        self.options.limit(name, most, self.where)

    def must_shrink(self, tokens: int) -> bool:
        return self.room is not None and tokens > self.room and not self.options.sets_cost

    def given_size(self, max_pixels: float) -> tuple[int, int] | None:
        """resized_height and resized_width where given, kept under `max_pixels`."""
        height, width = self.options.resized_height, self.options.resized_width
        if height is None or width is None:
            return None
        self.limit("resized_height", max_pixels / width)
        return height, width

    def check_held(self, frames: int, size: tuple[int, int]) -> None:
        """Raises `MediaError` where the resized frames of a clip would take too much memory."""
        held = frames * size[0] * size[1] * 3
        if held > self.limits.max_decoded_bytes:
            raise MediaError(
                f"{self.where}: {frames} frames of {size[1]}x{size[0]} pixels take {held} bytes; at most "
                f"{self.limits.max_decoded_bytes} are held. Lower fps, max_frames or max_pixels."
            )


def num_tokens(frames: int, size: tuple[int, int]) -> int:
    """Language tokens of `frames` frames of `size` (height, width)."""
    return frames * (size[0] // FACTOR) * (size[1] // FACTOR)
