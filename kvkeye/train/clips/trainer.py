"""Two stages from nothing: the VAE, then one denoiser for text and image to video with its text encoder.

Batches come from (seed, stage, step) alone and the whole state is saved, so an interrupted run continues to the same
bits. Attention may be replaced by the caller's, so that the project's ops train too.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvkeye.train import checkpoint
from kvkeye.train.clips import models
from kvkeye.train.clips.latents import Pool, fill, splice
from kvkeye.train.clips.motion import Motion, draw
from kvkeye.train.clips.recipe import STAGES, VideoRecipe, load, stage_steps
from kvkeye.train.optimizer import Updater
from kvkeye.train.parallel import average_gradients, launch

_log = logging.getLogger("kvkeye.train")
_LATENT_CLIPS = 512  # whose latents set the normalisation
_SHORT = 5  # frames of the VAE's cheap steps
Attention = Callable[[Any], object]


class VideoTrainer:
    """All components, and the stage and step that come next."""

    def __init__(self, recipe: VideoRecipe, attention: Attention | None = None, rank: int = 0) -> None:
        self.recipe, self.rank = recipe, rank
        tokenizer, text = models.build_text(recipe)
        self.parts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text": text,
            "vae": models.build_vae(recipe),
            "denoiser": models.build_denoiser(recipe),
        }
        if attention is not None:
            attention(self.parts["denoiser"])
        self.pool: Pool | None = None  # of the denoiser, filled at its first step
        self._begin(STAGES[0])

    # One stage

    def _begin(self, stage: str) -> None:
        """Optimiser and moving average of a stage."""
        self.stage, self.step, self.pool = stage, 0, None
        own = getattr(self.recipe, stage)
        settings = replace(self.recipe.optimizer, lr=own.lr, muon_lr=own.muon_lr, decay=own.decay)
        self.named = list(self._learning())
        self.updater = Updater(self.named, settings)
        self.average = {name: value.detach().clone() for name, value in self.named}

    def _learning(self) -> Iterable[tuple[str, nn.Parameter]]:
        for part in {"vae": ("vae",), "denoiser": ("denoiser", "text")}[self.stage]:
            for name, value in self.parts[part].named_parameters():
                yield f"{part}.{name}", value

    def finish_stage(self) -> None:
        """Puts the averaged weights in place, or prepares what the denoiser builds on."""
        with torch.no_grad():
            if self.stage == "vae":
                self._normalise()
            if self.stage == "denoiser":
                for name, value in self.named:
                    value.copy_(self.average[name])
        follows = STAGES.index(self.stage) + 1
        if follows < len(STAGES):
            self._begin(STAGES[follows])
        else:
            self.stage = ""

    def _normalise(self) -> None:
        """Writes mean and deviation of the latents into the VAE's configuration."""
        vae, size = self.parts["vae"], self.recipe.vae.batch
        count = max(1, min(_LATENT_CLIPS, 64 * size) // size)
        clips = [self._clips("normalise", i, size)[1] for i in range(count)]
        found = torch.cat([vae.encode(clip).latent_dist.mode() for clip in clips])
        std, mean = torch.std_mean(found, (0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())

    # Data

    def _clips(self, what: str, step: int, size: int, num_frames: int = 0) -> tuple[list[Motion], Tensor]:
        """Motions and clips [size, 3, F, H, W] in [-1, 1] of a step, as long as the pipelines' unless told."""
        draws = self._draws(what, step)
        motions = [draw(int(seed), self.recipe.size) for seed in torch.randint(1 << 62, (size,), generator=draws)]
        clips = torch.stack([motion.frames(num_frames or self.recipe.num_frames) for motion in motions])
        return motions, clips.transpose(1, 2) * 2 - 1

    def _draws(self, what: str, step: int) -> torch.Generator:
        """Random numbers of their own for every use, step and process; all processes normalise alike."""
        rank = 0 if what == "normalise" else self.rank
        text = f"{self.recipe.seed}/{rank}/{what}/{step}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)

    # Losses

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        """The loss of this step's batch, and what to report."""
        size = getattr(self.recipe, self.stage).batch
        if self.stage == "vae":
            is_long = self.step % 4 == 3
            count, num_frames = (max(1, size // 2), self.recipe.vae.num_frames) if is_long else (size, _SHORT)
            clips = self._clips("vae", self.step, count, num_frames)[1]
            return self._vae_loss(*splice(self.parts["vae"], clips, self._draws("splice", self.step)))
        if self.pool is None:
            count = self.recipe.pool // self.recipe.processes
            self.pool = fill(self.parts["vae"], partial(self._clips, "pool"), count)
        return self._flow_loss(*self.pool.draw(size, self._draws("denoiser", self.step)))

    def _vae_loss(self, clips: Tensor, latents: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Errors of the pixels after noise on the latents, so that a denoiser's small errors do little harm."""
        vae, share = self.parts["vae"], self.recipe.vae.noise
        noise = torch.randn(latents.shape, generator=self._draws("vae noise", self.step))
        spread = latents.detach().std((0, 2, 3, 4), keepdim=True)
        error = vae.decode(latents + share * spread * noise).sample - clips
        loss = error.square().mean()
        return loss, {"square": float(loss.detach())}

    def _flow_loss(self, motions: list[Motion], x0: Tensor, guides: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Flow matching: the velocity noise - x0 at a shifted time (Lipman et al. 2023; Esser et al. 2024).

        One step in four pads captions as the pipelines do unless told: cross attention sees the zeros, unmasked.
        """
        sizes = self.recipe.denoiser
        draws = self._draws("denoiser noise", self.step)
        noise = torch.randn(x0.shape, generator=draws)
        plain, guided, dropped = torch.rand(3, len(x0), generator=draws)
        sigma = _spread(sizes.shift * plain / (1 + (sizes.shift - 1) * plain))
        captions = ["" if share < sizes.drop_prompt else m.prompt for share, m in zip(dropped.tolist(), motions)]
        length = models.PADDED_TOKENS if self.step % 4 == 3 else models.MAX_TOKENS
        text = models.encode_captions(self.parts["tokenizer"], self.parts["text"], captions, length)
        x = torch.cat([(1 - sigma) * x0 + sigma * noise, guides * _spread(guided < sizes.guided)], 1)
        velocity = self.parts["denoiser"](x, 1000 * sigma.flatten(), text, return_dict=False)[0]
        loss = (velocity - (noise - x0)).square().mean()
        return loss, {"flow": float(loss.detach())}

    # Steps

    def train_step(self) -> dict[str, float]:
        """One update; returns the losses and the gradients' norm."""
        loss, report = self.loss()
        loss.backward()
        average_gradients(self.updater.parameters)
        norm = self.updater.step(self.step, stage_steps(self.recipe, self.stage))
        self.step += 1
        if self.stage == "denoiser":
            decay = min(self.recipe.denoiser.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for name, value in self.named:
                    self.average[name].lerp_(value, 1 - decay)
        return {**report, "norm": norm}

    def state_dict(self) -> dict[str, Any]:
        weights = {name: part.state_dict() for name, part in self.parts.items() if isinstance(part, nn.Module)}
        config = self.parts["vae"].config
        return {
            "stage": self.stage,
            "step": self.step,
            "parts": weights,
            "updater": self.updater.state_dict(),
            "average": self.average,
            "latents": [list(config.latents_mean), list(config.latents_std)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, weights in state["parts"].items():
            self.parts[name].load_state_dict(weights)
        mean, std = state["latents"]
        self.parts["vae"].register_to_config(latents_mean=mean, latents_std=std)
        if state["stage"]:
            self._begin(state["stage"])
            self.updater.load_state_dict(state["updater"])
            self.average = state["average"]
        self.stage, self.step = state["stage"], state["step"]


def _spread(values: Tensor) -> Tensor:
    """[B] against [B, C, T, h, w]."""
    return values.view(-1, 1, 1, 1, 1)


def run(recipe: Path, overrides: Mapping[str, Any] | None = None, attention: Attention | None = None) -> Path:
    """Trains a recipe to its last step, resuming where an earlier run stopped; returns the output folder.

    Raises:
        ConfigError: the recipe is unusable.
    """
    loaded = load(recipe, overrides)
    launch(_run, loaded.processes, loaded, attention)
    return loaded.output


def _run(rank: int, recipe: VideoRecipe, attention: Attention | None) -> None:
    trainer = VideoTrainer(recipe, attention, rank)
    state = checkpoint.load_state(recipe.output)
    if state is not None:
        trainer.load_state_dict(state)
        _log.info("resumed %s at %s, step %d", recipe.name, trainer.stage or "the end", trainer.step)
    while trainer.stage:
        _run_stage(trainer)
    if rank == 0:
        models.export(recipe, trainer.parts)


def _run_stage(trainer: VideoTrainer) -> None:
    recipe, stage = trainer.recipe, trainer.stage
    steps, begin, first = stage_steps(recipe, stage), time.monotonic(), trainer.step
    while trainer.step < steps:
        report = trainer.train_step()
        step = trainer.step
        if trainer.rank == 0 and (step % recipe.report_every == 0 or step == steps):
            speed = (time.monotonic() - begin) / (step - first)
            losses = "  ".join(f"{name} {value:.4f}" for name, value in report.items())
            _log.info("%s %d/%d  %s  %.0f min left", stage, step, steps, losses, (steps - step) * speed / 60)
        if trainer.rank == 0 and step % recipe.save_every == 0 and step < steps:
            checkpoint.save_state(recipe.output, trainer.state_dict())
    trainer.finish_stage()
    if trainer.rank == 0:
        checkpoint.save_state(recipe.output, trainer.state_dict())
