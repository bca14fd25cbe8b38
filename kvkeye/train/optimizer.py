"""The update rule: AdamW, optionally with orthogonalised momentum for the hidden weight matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kvkeye.train.recipe import Optimizer


def rate(settings: Optimizer, step: int, steps: int) -> float:
    """The factor on the learning rate at `step` of `steps`: linear warm-up, constant, cosine to 2 % at the end."""
    warm = min(1.0, (step + 1) / max(1, settings.warmup))
    begin = max(steps - settings.decay, 0)
    if step < begin:
        return warm
    return warm * (0.51 + 0.49 * math.cos(math.pi * min(1.0, (step - begin) / max(1, steps - begin))))


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix, or a filter that is one with its window flattened, of the layers between the ends."""
    inside = any(part in name for part in (".layers.", ".blocks.", "_blocks.", "_block."))
    inside |= name.startswith("midlayer.")
    return inside and parameter.dim() >= 2 and min(parameter.flatten(1).shape) > 1


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """An approximately orthogonal matrix with the singular vectors of `matrix` [m, n].

    Quintic Newton-Schulz iteration with the coefficients of Jordan et al. 2024 (Muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Updater:
    """Holds the optimiser state of named parameters and applies one step. Gradients are clipped by their norm."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], settings: Optimizer) -> None:
        self.settings = settings
        named = list(named)
        self.parameters = [p for _, p in named]
        muon = [(n, p) for n, p in named if settings.muon_lr > 0 and _is_hidden(n, p)]
        chosen = {id(p) for _, p in muon}
        rest = [p for p in self.parameters if id(p) not in chosen]
        self._muon = [p for _, p in muon]
        self._momentum = [torch.zeros_like(p) for p in self._muon]
        self._adam = torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.dim() >= 2], "weight_decay": settings.weight_decay},
                {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            fused=True,
        )

    def step(self, step: int, steps: int) -> float:
        """Updates the parameters from their gradients and clears them; returns the gradients' norm."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        factor = rate(self.settings, step, steps)
        for group in self._adam.param_groups:
            group["lr"] = self.settings.lr * factor
        self._adam.step()
        self._step_muon(factor)
        for parameter in self.parameters:
            parameter.grad = None
        return float(norm)

    @torch.no_grad()
    def _step_muon(self, factor: float) -> None:
        lr = self.settings.muon_lr * factor
        for parameter, momentum in zip(self._muon, self._momentum):
            if parameter.grad is None:
                continue
            momentum.lerp_(parameter.grad, 0.05)
            update = orthogonalise(parameter.grad.lerp(momentum, 0.95).flatten(1))
            # The scale makes the update's RMS that of a typical AdamW step (Liu et al. 2025).
            scale = 0.2 * math.sqrt(max(update.shape))
            parameter.mul_(1 - lr * self.settings.weight_decay).add_(update.view_as(parameter), alpha=-lr * scale)

    def state_dict(self) -> dict[str, Any]:
        return {"adam": self._adam.state_dict(), "momentum": self._momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state["adam"])
        for own, saved in zip(self._momentum, state["momentum"], strict=True):
            own.copy_(saved)
