"""Three stages from nothing: the VAE, the text-to-video denoiser with its text encoder, the image-to-video denoiser.

Batches come from (seed, stage, step) alone and the whole state is saved, so an interrupted run continues to the same
bits. Attention may be replaced by the caller's, so that the project's ops train too.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvkeye.train import checkpoint
from kvkeye.train.clips import models
from kvkeye.train.clips.motion import Motion, draw
from kvkeye.train.clips.recipe import STAGES, VideoRecipe, load, stage_steps
from kvkeye.train.optimizer import Updater

_log = logging.getLogger("kvkeye.train")
_LATENT_CLIPS = 512  # whose latents set the normalisation
Attention = Callable[[Any], object]


class VideoTrainer:
    """All components, and the stage and step that come next."""

    def __init__(self, recipe: VideoRecipe, attention: Attention | None = None) -> None:
        self.recipe = recipe
        tokenizer, text = models.build_text(recipe)
        self.parts: dict[str, Any] = {
            "tokenizer": tokenizer,
            "text": text,
            "vae": models.build_vae(recipe),
            "t2v": models.build_denoiser(recipe, recipe.t2v, image=False),
            "i2v": models.build_denoiser(recipe, recipe.i2v, image=True),
        }
        if attention is not None:
            for stage in ("t2v", "i2v"):
                attention(self.parts[stage])
        self.stage, self.step = STAGES[0], 0
        self._begin(self.stage)

    # One stage

    def _begin(self, stage: str) -> None:
        """Optimiser and moving average of a stage."""
        self.stage, self.step = stage, 0
        settings = self.recipe.optimizer
        if stage == "vae":
            settings = replace(settings, lr=self.recipe.vae.lr)
        self.named = list(self._learning())
        self.updater = Updater(self.named, settings)
        self.average = {name: value.detach().clone() for name, value in self.named}

    def _learning(self) -> Iterable[tuple[str, nn.Parameter]]:
        for part in (self.stage, "text") if self.stage == "t2v" else (self.stage,):
            yield from ((f"{part}.{name}", value) for name, value in self.parts[part].named_parameters())

    def finish_stage(self) -> None:
        """Puts the averaged weights in place and prepares what the next stage builds on."""
        with torch.no_grad():
            if self.stage != "vae":
                for name, value in self.named:
                    value.copy_(self.average[name])
            else:
                self._normalise()
            if self.stage == "t2v":
                self._start_i2v()
        follows = STAGES.index(self.stage) + 1
        if follows < len(STAGES):
            self._begin(STAGES[follows])
        else:
            self.stage = ""

    def _normalise(self) -> None:
        """Writes mean and deviation of the latents into the VAE's configuration."""
        vae, size = self.parts["vae"], self.recipe.vae.batch
        clips = [self._clips("vae", -1 - i)[1] for i in range(max(1, min(_LATENT_CLIPS, 64 * size) // size))]
        latents = torch.cat([vae.encode(clip).latent_dist.mode() for clip in clips])
        std, mean = torch.std_mean(latents, (0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())

    def _start_i2v(self) -> None:
        """The image-to-video denoiser begins as the trained one that does not look at its guide."""
        own, other = self.parts["i2v"].state_dict(), self.parts["t2v"].state_dict()
        for name, value in own.items():
            if name in other and other[name].shape == value.shape:
                value.copy_(other[name])
            elif name == "patch_embedding.weight" and other[name].shape[0] == value.shape[0]:
                value.zero_()
                value[:, : other[name].shape[1]].copy_(other[name])

    # Data

    def _clips(self, stage: str, step: int) -> tuple[list[Motion], Tensor]:
        """Motions and clips [B, 3, F, H, W] in [-1, 1] of a step."""
        size = getattr(self.recipe, stage).batch
        draws = torch.Generator().manual_seed(hash_of(self.recipe.seed, stage, step))
        motions = [draw(int(seed), self.recipe.size) for seed in torch.randint(1 << 62, (size,), generator=draws)]
        clips = torch.stack([motion.frames(self.recipe.num_frames) for motion in motions])
        return motions, clips.transpose(1, 2) * 2 - 1

    def _latents(self, clips: Tensor) -> Tensor:
        """Normalised latents [B, z, T, h, w], as the pipelines have them."""
        config = self.parts["vae"].config
        mean, std = (torch.tensor(getattr(config, f"latents_{name}")).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            latents: Tensor = (self.parts["vae"].encode(clips).latent_dist.mode() - mean) / std
            return latents

    # Losses

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        """The loss of this step's batch, and what to report."""
        motions, clips = self._clips(self.stage, self.step)
        if self.stage == "vae":
            return self._vae_loss(clips)
        return self._flow_loss(motions, clips)

    def _vae_loss(self, clips: Tensor) -> tuple[Tensor, dict[str, float]]:
        vae = self.parts["vae"]
        posterior = vae.encode(clips).latent_dist
        noise = torch.Generator().manual_seed(hash_of(self.recipe.seed, "vae noise", self.step))
        back = vae.decode(posterior.sample(noise)).sample
        pixels = (back - clips).abs().mean() + (back - clips).square().mean()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return pixels + self.recipe.vae.kl * divergence, {"pixels": float(pixels.detach())}

    def _flow_loss(self, motions: list[Motion], clips: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Flow matching: the velocity noise - x0 at a shifted time (Lipman et al. 2023; Esser et al. 2024)."""
        sizes, denoiser = getattr(self.recipe, self.stage), self.parts[self.stage]
        draws = torch.Generator().manual_seed(hash_of(self.recipe.seed, self.stage + " noise", self.step))
        x0 = self._latents(clips)
        noise = torch.randn(x0.shape, generator=draws)
        plain = torch.rand(len(x0), generator=draws)
        sigma = (sizes.shift * plain / (1 + (sizes.shift - 1) * plain)).view(-1, 1, 1, 1, 1)
        dropped = torch.rand(len(x0), generator=draws) < sizes.drop_prompt
        captions = ["" if gone else motion.prompt for gone, motion in zip(dropped.tolist(), motions)]
        with torch.set_grad_enabled(self.stage == "t2v"):
            text = models.encode_captions(self.parts["tokenizer"], self.parts["text"], captions)
        x = (1 - sigma) * x0 + sigma * noise
        if self.stage == "i2v":
            x = torch.cat([x, self._condition(clips)], 1)
        velocity = denoiser(x, 1000 * sigma.flatten(), text, return_dict=False)[0]
        loss = (velocity - (noise - x0)).square().mean()
        return loss, {"flow": float(loss.detach())}

    def _condition(self, clips: Tensor) -> Tensor:
        """Mask and latents of the first frame, as `WanImageToVideoPipeline` makes them: [B, 4 + z, T, h, w]."""
        guide = torch.cat([clips[:, :, :1], torch.zeros_like(clips[:, :, 1:])], 2)
        latents = self._latents(guide)
        mask = torch.zeros(len(latents), models.RATIO, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], 1)

    # Steps

    def train_step(self) -> dict[str, float]:
        """One update; returns the losses and the gradients' norm."""
        loss, report = self.loss()
        loss.backward()
        norm = self.updater.step(self.step, stage_steps(self.recipe, self.stage))
        self.step += 1
        if self.stage != "vae":
            decay = min(getattr(self.recipe, self.stage).ema, (1 + self.step) / (10 + self.step))
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


def hash_of(seed: int, what: str, step: int) -> int:
    """A seed of its own for every use and step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}/{step}".encode()).digest()[:7], "big")


def run(recipe: Path, overrides: Mapping[str, Any] | None = None, attention: Attention | None = None) -> Path:
    """Trains a recipe to its last step, resuming where an earlier run stopped; returns the output folder.

    Raises:
        ConfigError: the recipe is unusable.
    """
    loaded = load(recipe, overrides)
    trainer = VideoTrainer(loaded, attention)
    state = checkpoint.load_state(loaded.output)
    if state is not None:
        trainer.load_state_dict(state)
        _log.info("resumed %s at %s, step %d", loaded.name, trainer.stage or "the end", trainer.step)
    while trainer.stage:
        _run_stage(trainer)
    models.export(loaded, trainer.parts)
    return loaded.output


def _run_stage(trainer: VideoTrainer) -> None:
    recipe, stage = trainer.recipe, trainer.stage
    steps, begin, first = stage_steps(recipe, stage), time.monotonic(), trainer.step
    while trainer.step < steps:
        report = trainer.train_step()
        step = trainer.step
        if step % recipe.report_every == 0 or step == steps:
            speed = (time.monotonic() - begin) / (step - first)
            losses = "  ".join(f"{name} {value:.4f}" for name, value in report.items())
            _log.info("%s %d/%d  %s  %.0f min left", stage, step, steps, losses, (steps - step) * speed / 60)
        if step % recipe.save_every == 0 and step < steps:
            checkpoint.save_state(recipe.output, trainer.state_dict())
    trainer.finish_stage()
    checkpoint.save_state(recipe.output, trainer.state_dict())
