"""Which candidate continues the guide best. A scorer is any callable from candidates to terms; "score" ranks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.errors import ConfigError


@dataclass(frozen=True)
class Candidate:
    """A candidate's clean prediction.

    Shapes     latents [C, T, h, w] fp32  guide_latent [C, h, w] fp32  guide [3, H, W] in [0, 1]
    decode     gives its frames, [F, 3, H, W] in [0, 1]; costs a pass of the VAE
    """

    seed: int
    latents: Tensor
    guide_latent: Tensor
    guide: Tensor
    decode: Callable[[], Tensor]


class Scorer(Protocol):
    """Terms of each candidate, all higher-is-better or informative; "score" is what is compared."""

    def __call__(self, candidates: Sequence[Candidate]) -> list[dict[str, float]]: ...


@dataclass(frozen=True)
class GuideScore:
    """Similarity to the guide, less seam and colour drift, above a floor on motion (a frozen clip is the most similar).

    similarity = min or mean over frames of the cosine to the guide;  seam = mean change from the guide to the first
    frame;  drift = the last frame's change of channel means;  motion = mean change between frames. A candidate whose
    motion is below `motion_floor` times the candidates' largest ranks below all that are not.

    on         "latents" costs no decoding; "pixels" decodes every candidate, as published
    """

    on: str = "latents"
    reduce: str = "min"
    motion_floor: float = 0.25
    seam_weight: float = 0.0
    drift_weight: float = 0.0
    grid: int = 4

    def __post_init__(self) -> None:
        for name, known in (("on", ("latents", "pixels")), ("reduce", ("min", "mean"))):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"GuideScore.{name}: got {getattr(self, name)!r}; expected one of {', '.join(known)}."
                )
        if not 0 <= self.motion_floor <= 1:
            raise ConfigError(f"GuideScore.motion_floor: got {self.motion_floor!r}; expected a number from 0 to 1.")

    def __call__(self, candidates: Sequence[Candidate]) -> list[dict[str, float]]:
        terms = [self._terms(candidate) for candidate in candidates]
        most = max(term["motion"] for term in terms)
        for term in terms:
            still = term["motion"] < self.motion_floor * most
            score = term["similarity"] - self.seam_weight * term["seam"] - self.drift_weight * term["drift"]
            term["score"] = score - (math.inf if still else 0.0)
        return terms

    def _terms(self, candidate: Candidate) -> dict[str, float]:
        if self.on == "latents":
            frames, guide = candidate.latents, candidate.guide_latent
        else:
            frames, guide = candidate.decode().float().transpose(0, 1), candidate.guide
        grid = min(self.grid, *frames.shape[2:])
        x = frames[None].float().contiguous()
        similarity, motion, drift = ops.score_candidates(x, torch.zeros_like(x), 0.0, guide.float().contiguous(), grid)
        return {
            "similarity": float(similarity.min() if self.reduce == "min" else similarity.mean()),
            "seam": float(motion[0, 0]),
            "motion": float(motion[0, 1:].mean()) if frames.shape[1] > 1 else 0.0,
            "drift": float(drift[0, -1]),
        }


@dataclass(frozen=True)
class WeightedScore:
    """A weighted sum of several scorers' scores; their terms are kept under their names."""

    parts: Mapping[str, tuple[float, Scorer]]

    def __call__(self, candidates: Sequence[Candidate]) -> list[dict[str, float]]:
        found: list[dict[str, float]] = [{"score": 0.0} for _ in candidates]
        for name, (weight, scorer) in self.parts.items():
            for total, terms in zip(found, scorer(candidates)):
                total["score"] += weight * terms["score"]
                total |= {f"{name}/{key}": value for key, value in terms.items()}
        return found


@dataclass(frozen=True)
class JudgeScore:
    """A judge that looks at frames, e.g. a Keye-VL model: `judge(frames [F, 3, H, W] in [0, 1])`, higher is better."""

    judge: Callable[[Tensor], float]

    def __call__(self, candidates: Sequence[Candidate]) -> list[dict[str, float]]:
        return [{"score": float(self.judge(candidate.decode()))} for candidate in candidates]
