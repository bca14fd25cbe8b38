"""How far a clip is from what its caption says: place, speed, colour and shape against the known motion."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvkeye.train.clips.motion import BACKGROUND, DIRECTIONS, SHAPES, SPEEDS, Motion, wrapped
from kvkeye.train.scenes import COLORS

_FAINT = 0.15  # contrast to the background that counts as nothing
_ENOUGH = 2.0  # contrast, summed over a frame, of a shape that is seen


@dataclass(frozen=True)
class MotionScores:
    """Errors of one clip; a clip without a shape has the largest.

    position   root mean square distance in pixels between the shape's centre and where it should be: on the line at
               the captioned velocity that fits best, or on the motion's own
    velocity   error of the measured mean velocity, in pixels per frame
    color      mean distance of the shape's colour from the captioned one, 0 to 1.7
    drift      change of the colour error from the first to the last quarter
    presence   share of frames in which a shape is seen
    identity   share of frames whose shape and colour are nearer to the captioned ones than to any other
    """

    position: float
    velocity: float
    color: float
    drift: float
    presence: float
    identity: float


def measure(frames: Tensor, motion: Motion, placed: bool = False) -> MotionScores:
    """Compares [F, 3, size, size] in [0, 1] with a motion; its own `x` and `y` count only if `placed`."""
    frames = frames.float()
    size, num_frames = frames.shape[-1], len(frames)
    centres, mass = _centres(frames)
    seen = mass > _ENOUGH
    both = seen[1:] & seen[:-1]
    if not both.any():
        return MotionScores(size / 2, float("nan"), 1.7, 0.0, float(seen.float().mean()), 0.0)
    along = (centres - torch.tensor(motion.velocity) * torch.arange(num_frames)[:, None])[seen]
    start = torch.tensor([motion.x, motion.y]) if placed else _circular_mean(along, size)
    off_line = wrapped(along - start, size)
    steps = wrapped(centres[1:] - centres[:-1], size)[both]
    colors = _colors(frames)
    off_color = (colors - _rgb(motion.color)).norm(dim=1)
    quarter = max(1, num_frames // 4)
    right = seen & (_nearest_color(colors) == list(COLORS).index(motion.color))
    right &= _nearest_shape(frames, centres, colors, motion) == SHAPES.index(motion.shape)
    return MotionScores(
        position=float(off_line.square().sum(1).mean().sqrt()),
        velocity=float((steps.mean(0) - torch.tensor(motion.velocity)).norm()),
        color=float(off_color[seen].mean()),
        drift=float(off_color[-quarter:].mean() - off_color[:quarter].mean()),
        presence=float(seen.float().mean()),
        identity=float(right.float().mean()),
    )


@dataclass(frozen=True)
class Recognised:
    """What a clip shows, each the nearest of the captions' words: by most frames, and by the mean velocity."""

    color: str
    shape: str
    speed: str
    direction: str


def recognise(frames: Tensor, motion: Motion) -> Recognised | None:
    """Names what [F, 3, size, size] shows; `motion` gives the sizes alone. None: no shape is seen."""
    frames = frames.float()
    centres, mass = _centres(frames)
    seen = mass > _ENOUGH
    both = seen[1:] & seen[:-1]
    if not both.any():
        return None
    steps = wrapped(centres[1:] - centres[:-1], frames.shape[-1])[both].mean(0)
    known = [replace(motion, speed=speed, direction=direction) for speed in SPEEDS for direction in DIRECTIONS]
    nearest = min(known, key=lambda other: float((steps - torch.tensor(other.velocity)).norm()))
    colors = _colors(frames)
    color = list(COLORS)[int(_nearest_color(colors)[seen].mode().values)]
    shape = SHAPES[int(_nearest_shape(frames, centres, colors, motion)[seen].mode().values)]
    return Recognised(color, shape, nearest.speed, nearest.direction)


def _weight(frames: Tensor) -> Tensor:
    """Contrast to the background, [F, size, size]."""
    return ((frames - BACKGROUND).abs().amax(1) - _FAINT).clamp_min(0)


def _centres(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Circular means of the contrast [F, 2] (x, y) in pixels, and its sums [F]."""
    weight, size = _weight(frames), frames.shape[-1]
    angle = 2 * torch.pi * (torch.arange(size) + 0.5) / size
    turn = torch.polar(torch.ones(size), angle)
    sums = torch.stack([weight.sum(1), weight.sum(2)], 1)  # [F, 2, size]
    return (sums.to(turn.dtype) @ turn).angle() * size / (2 * torch.pi), weight.sum((1, 2))


def _circular_mean(places: Tensor, size: int) -> Tensor:
    """Of [n, 2] on a torus."""
    turns = torch.polar(torch.ones_like(places), places * 2 * torch.pi / size)
    return turns.mean(0).angle() * size / (2 * torch.pi)


def _rgb(color: str) -> Tensor:
    return torch.tensor(COLORS[color]) / 255


def _colors(frames: Tensor) -> Tensor:
    """The shape's colour per frame, [F, 3]: the mean where the contrast is above four fifths of the largest."""
    weight = _weight(frames)
    core = weight / weight.amax((1, 2), keepdim=True).clamp_min(1e-6) > 0.8
    return (frames * core[:, None]).sum((2, 3)) / core.sum((1, 2)).clamp_min(1)[:, None]


def _nearest_color(colors: Tensor) -> Tensor:
    """Index of the nearest named colour, [F]."""
    return torch.cdist(colors, torch.stack([_rgb(name) for name in COLORS])).argmin(1)


def _nearest_shape(frames: Tensor, centres: Tensor, colors: Tensor, motion: Motion) -> Tensor:
    """Index of the shape that, drawn at the measured centre in the measured colour, differs least: [F]."""
    errors = []
    for shape in SHAPES:
        inside = replace(motion, shape=shape).inside(centres)[:, None]  # [F, 1, size, size]
        drawn = BACKGROUND + inside * (colors[:, :, None, None] - BACKGROUND)
        errors.append((frames - drawn).square().mean((1, 2, 3)))
    return torch.stack(errors).argmin(0)
