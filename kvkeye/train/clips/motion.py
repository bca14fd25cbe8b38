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
SPEEDS = {"slowly": 0.5, "quickly": 1.5}  # pixels per frame and axis
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
        color = torch.tensor(COLORS[self.color])[:, None, None] / 255
        return BACKGROUND + self.inside(self.centres(num_frames))[:, None] * (color - BACKGROUND)

    def inside(self, centres: Tensor) -> Tensor:
        """How much of each pixel the shape covers at centres [F, 2]: [F, size, size], 0 to 1."""
        at = torch.arange(self.size) + 0.5
        x, y = centres.T[..., None, None]  # [F, 1, 1] each
        dx, dy = wrapped(at - x, self.size), wrapped(at[:, None] - y, self.size)
        return (0.5 - _distance(self.shape, dx, dy) / _SOFT).clamp(0, 1)


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


def wrapped(delta: Tensor, size: int) -> Tensor:
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
