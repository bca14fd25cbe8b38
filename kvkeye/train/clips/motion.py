"""Clips of one shape that moves at constant speed and wraps around the frame: a pure function of a seed.

The caption states colour, shape, speed and direction, so the right continuation of any clip is known for ever.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from kvkeye.train.scenes import COLORS

SHAPES = ("disc", "square", "cross", "ring")
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
    "down right": (1, 1), "up left": (-1, -1),
}  # fmt: skip
SPEEDS = {"slowly": 0.5, "quickly": 1.0}  # pixels per frame and axis
BACKGROUND = 0.12
RADIUS = 6.0  # pixels
_SOFT = 0.7  # pixels over which an edge fades


@dataclass(frozen=True)
class Motion:
    """What a clip shows. `x`, `y` is the centre in frame 0, in pixels; it moves by `velocity` a frame."""

    color: str
    shape: str
    speed: str
    direction: str
    x: float
    y: float
    size: int = 32

    @property
    def prompt(self) -> str:
        return f"a {self.color} {self.shape} moves {self.speed} {self.direction}"

    @property
    def velocity(self) -> tuple[float, float]:
        across, along = DIRECTIONS[self.direction]
        return across * SPEEDS[self.speed], along * SPEEDS[self.speed]

    def centres(self, num_frames: int) -> Tensor:
        """Centres [F, 2] (x, y) in pixels."""
        start, step = torch.tensor([self.x, self.y]), torch.tensor(self.velocity)
        return (start + step * torch.arange(num_frames)[:, None]) % self.size

    def frames(self, num_frames: int) -> Tensor:
        """[F, 3, size, size] in [0, 1]."""
        at = torch.arange(self.size) + 0.5
        x, y = self.centres(num_frames).T[..., None, None]  # [F, 1, 1] each
        dx, dy = _wrapped(at - x, self.size), _wrapped(at[:, None] - y, self.size)
        inside = (0.5 - _distance(self.shape, dx, dy) / _SOFT).clamp(0, 1)  # [F, size, size]
        color = torch.tensor(COLORS[self.color])[:, None, None] / 255
        return BACKGROUND + inside[:, None] * (color - BACKGROUND)


def draw(seed: int, size: int = 32) -> Motion:
    """The motion of a seed."""
    rng = random.Random(seed)
    return Motion(
        rng.choice(list(COLORS)),
        rng.choice(SHAPES),
        rng.choice(list(SPEEDS)),
        rng.choice(list(DIRECTIONS)),
        rng.uniform(0, size),
        rng.uniform(0, size),
        size,
    )


def vocabulary() -> list[str]:
    """Every word of every caption."""
    words = {"a", "moves", *COLORS, *SHAPES, *SPEEDS}
    return sorted(words | {word for direction in DIRECTIONS for word in direction.split()})


def _wrapped(delta: Tensor, size: int) -> Tensor:
    """Differences on a circle of `size`, in [-size / 2, size / 2)."""
    return (delta + size / 2) % size - size / 2


def _distance(shape: str, dx: Tensor, dy: Tensor) -> Tensor:
    """Signed distance to the shape's edge in pixels, negative inside (Chebyshev for squares)."""
    dx, dy = torch.broadcast_tensors(dx, dy)
    radius = (dx.square() + dy.square()).sqrt()
    if shape == "disc":
        return radius - RADIUS
    if shape == "ring":
        return (radius - RADIUS + 1.5).abs() - 1.5
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.85 * RADIUS
    near, far = torch.minimum(dx.abs(), dy.abs()), torch.maximum(dx.abs(), dy.abs())
    return torch.maximum(near - 0.35 * RADIUS, far - RADIUS)


@dataclass(frozen=True)
class MotionScores:
    """How far a clip is from what its caption says, whatever place it began at.

    position   root mean square distance in pixels between the shape's centre and the line that best fits it at the
               captioned velocity
    velocity   error of the measured mean velocity, in pixels per frame
    color      mean distance of the shape's colour from the captioned one, 0 to 1.7
    drift      change of the colour error from the first to the last quarter
    presence   share of frames in which a shape is seen
    """

    position: float
    velocity: float
    color: float
    drift: float
    presence: float


def measure(frames: Tensor, motion: Motion) -> MotionScores:
    """Compares [F, 3, size, size] in [0, 1] with the captioned motion; its own `x` and `y` are not used."""
    frames = frames.float()
    size, num_frames = frames.shape[-1], len(frames)
    weight = ((frames - BACKGROUND).abs().amax(1) - 0.15).clamp_min(0)  # [F, size, size]
    mass = weight.sum((1, 2))
    seen = mass > 2.0
    if int(seen.sum()) < 2:
        return MotionScores(size / 2, float("nan"), 1.7, 0.0, float(seen.float().mean()))
    angle = 2 * torch.pi * (torch.arange(size) + 0.5) / size
    turn = torch.polar(torch.ones(size), angle)
    x = (weight.sum(1).to(turn.dtype) @ turn).angle() * size / (2 * torch.pi)
    y = (weight.sum(2).to(turn.dtype) @ turn).angle() * size / (2 * torch.pi)
    centres = torch.stack([x, y], 1)  # [F, 2], circular means
    times = torch.arange(num_frames)[:, None]
    along = centres - torch.tensor(motion.velocity) * times
    phase = torch.polar(torch.ones_like(along[seen]), along[seen] * 2 * torch.pi / size).mean(0).angle()
    left = _wrapped(along - phase * size / (2 * torch.pi), size)[seen]
    steps = _wrapped(centres[1:] - centres[:-1], size)[seen[1:] & seen[:-1]]
    wanted = torch.tensor(COLORS[motion.color])[None] / 255
    core = weight / weight.amax((1, 2), keepdim=True).clamp_min(1e-6) > 0.8
    color = (frames * core[:, None]).sum((2, 3)) / core.sum((1, 2)).clamp_min(1)[:, None]
    off = (color - wanted).norm(dim=1)
    quarter = max(1, num_frames // 4)
    velocity = (steps.mean(0) - torch.tensor(motion.velocity)).norm() if len(steps) else torch.tensor(float("nan"))
    return MotionScores(
        position=float(left.square().sum(1).mean().sqrt()),
        velocity=float(velocity),
        color=float(off[seen].mean()),
        drift=float(off[-quarter:].mean() - off[:quarter].mean()),
        presence=float(seen.float().mean()),
    )
