"""The training loop: supervised fine-tuning over packed chats, in one process or several, data from worker processes.

A run is a function of its recipe: batches come from (seed, step), there is no dropout, and the whole state is saved,
so an interrupted run continues to the same bits.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Generator, Mapping
from contextlib import closing, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvkeye import ops
from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.model import KeyeModel
from kvkeye.train import checkpoint
from kvkeye.train import recipe as recipes
from kvkeye.train.data import Batch, ChatEncoder, batch
from kvkeye.train.evaluate import exact_turns
from kvkeye.train.losses import PatchHead, answer_logits, next_token_loss, patch_loss
from kvkeye.train.optimizer import Updater
from kvkeye.train.parallel import average_gradients, launch, total, world_size
from kvkeye.train.recipe import Recipe
from kvkeye.train.render import LABELS
from kvkeye.train.tokenizer import build_tokenizer

_log = logging.getLogger("kvkeye.train")
_AHEAD = 6


def initialise(model: KeyeModel, seed: int) -> None:
    """Starting weights: truncated normal of variance 0.64 / K, branches into the residual stream at a third of it,
    and a smooth position table, so that interpolation at any grid starts meaningful."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        std = 0.02 if "embed_tokens" in name or "lm_head" in name else 0.8 / math.sqrt(parameter.shape[-1])
        if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
            std *= 0.35
        nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)
    with torch.no_grad():
        model.visual.position_embedding.copy_(_smooth_table(*model.visual.position_embedding.shape[1:]))


def _smooth_table(side: int, size: int) -> Tensor:
    """Sines and cosines of the row and of the column, up to four periods over the picture: [side, side, size]."""
    quarter = size // 4
    at = (torch.arange(side) + 0.5) / side
    phase = at[:, None] * (math.pi * 8 * torch.arange(1, quarter + 1) / quarter)
    waves = torch.cat([phase.sin(), phase.cos()], 1)  # [side, size / 2]
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    return 0.3 * torch.cat([rows, columns], -1)


def _produce(connection: Any, recipe: Recipe, start: int, rank: int) -> None:
    """Worker: sends the batches of steps start, start + 1, ... until the other end closes."""
    torch.set_num_threads(1)
    encoder = ChatEncoder(build_tokenizer())
    try:
        for step in range(start, recipe.steps):
            made = batch(recipe.stage(step).mixture, encoder, recipe.seed, step, rank)
            plain = {f.name: getattr(made, f.name) for f in fields(made)}
            arrays = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in plain.items()}
            connection.send(arrays)
    except (BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        pass


def batches(recipe: Recipe, start: int, rank: int = 0) -> Generator[Batch, None, None]:
    """The batches from step `start` on, made ahead of time by a worker process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_produce, args=(sender, recipe, start, rank), daemon=True)
    worker.start()
    sender.close()
    try:
        for _ in range(start, recipe.steps):
            plain = receiver.recv()
            found: dict[str, Any] = {k: torch.from_numpy(v) if hasattr(v, "dtype") else v for k, v in plain.items()}
            yield Batch(**found)
    finally:
        receiver.close()
        worker.terminate()
        worker.join()


class Trainer:
    """Model, auxiliary head, optimiser and moving average of one run."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = KeyeModel(KeyeConfig.from_dict(checkpoint.model_config(recipe.model)))
        initialise(self.model, recipe.seed)
        self.head = PatchHead(self.model.config.vision.hidden_size)
        generator = torch.Generator().manual_seed(recipe.seed + 1)
        nn.init.trunc_normal_(self.head.linear.plain_weight(), std=0.02, generator=generator)
        self.named = [*self.model.named_parameters(), *((f"head.{n}", p) for n, p in self.head.named_parameters())]
        self.updater = Updater(self.named, recipe.optimizer)
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.step = 0

    def train_step(self, data: Batch) -> dict[str, float]:
        """One update. Returns the losses, the gradients' norm and the exact-match rate per task."""
        answered = self.recipe.stage(self.step).answers
        share = len(data.targets) * world_size() / total(len(data.targets)) if answered else 1.0
        loss, report = self.loss_of(data, share)
        loss.backward()
        average_gradients([p for _, p in self.named])
        return {**report, "norm": self.update()}

    def loss_of(self, data: Batch, share: float = 1.0) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch at the current stage, and what to report.

        `share` is this process's answer tokens over the mean of all processes: with it the mean over the processes
        is the mean over all answer tokens.
        """
        stage = self.recipe.stage(self.step)
        report: dict[str, float] = {}
        if stage.answers:
            logits, features = answer_logits(self.model, data)
            loss = next_token_loss(logits, data)
            report |= {"loss": loss.item(), **exact_match(logits.detach(), data)}
            loss = loss * share
        else:
            features = self.model.visual(data.pixel_values(self.model.dtype), data.grids)
            loss = features.new_zeros(())
        if stage.patch_weight:
            scores = self.head(features)
            patches = patch_loss(scores, data.labels)
            report |= {"patch_loss": patches.item(), **named_patches(scores, data.labels)}
            loss = loss + stage.patch_weight * patches
        return loss, report

    def update(self) -> float:
        """One step of the optimiser and of the moving average; returns the gradients' norm."""
        norm = self.updater.step(self.step, self.recipe.steps)
        self.step += 1
        self._move_average()
        return norm

    @torch.no_grad()
    def _move_average(self) -> None:
        decay = min(self.recipe.optimizer.ema, (1 + self.step) / (10 + self.step))
        pairs = [(self.average[n], p) for n, p in self.model.named_parameters()]
        torch._foreach_lerp_([a for a, _ in pairs], [p.detach() for _, p in pairs], 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "updater": self.updater.state_dict(),
            "average": self.average,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.head.load_state_dict(state["head"])
        self.updater.load_state_dict(state["updater"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)


def exact_match(logits: Tensor, data: Batch) -> dict[str, float]:
    """Per task, the share of turns that greedy decoding would answer exactly."""
    found: dict[str, list[bool]] = defaultdict(list)
    for turn, right in zip(data.turns, exact_turns(logits, data)):
        found[turn.task].append(right)
    return {f"exact/{task}": sum(hits) / len(hits) for task, hits in found.items()}


@torch.no_grad()
def named_patches(scores: tuple[Tensor, ...], labels: Tensor) -> dict[str, float]:
    """Per kind of label, the share of the patches that show something which the head names rightly."""
    found = {}
    for name, score, label in zip(LABELS, scores, labels.unbind(1)):
        shown = label > 0
        if shown.any():
            found[f"exact/{name}-patches"] = float((score[shown].argmax(1) == label[shown]).float().mean())
    return found


class _Means:
    """Running means of the reported numbers since the last line."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._values[name].append(value)

    def take(self) -> dict[str, float]:
        means = {name: sum(v) / len(v) for name, v in self._values.items()}
        self._values.clear()
        return means


def run(recipe: Path, overrides: Mapping[str, Any] | None = None) -> Path:
    """Trains a recipe to its last step, resuming where a former run stopped; returns the exported folder.

    Raises:
        ConfigError: the recipe is unusable.
    """
    loaded = recipes.load(recipe, overrides)
    launch(_run, loaded.processes, loaded)
    return loaded.output / loaded.name


def _run(rank: int, recipe: Recipe) -> None:
    """One process of a run; rank 0 reports and saves."""
    trainer = Trainer(recipe)
    state = checkpoint.load_state(recipe.output)
    if state is not None:
        trainer.load_state_dict(state)
        _log.info("resumed %s at step %d of %d", recipe.name, trainer.step, recipe.steps)
    with ops.use_backends(recipe.backends) if recipe.backends else nullcontext():
        _loop(trainer, rank)
    if rank == 0:
        checkpoint.export(trainer.model, trainer.average, recipe.model, recipe.output / recipe.name)


def _loop(trainer: Trainer, rank: int) -> None:
    recipe, means = trainer.recipe, _Means()
    begin, first, samples = time.monotonic(), trainer.step, 0
    with closing(batches(recipe, trainer.step, rank)) as source:
        for data in source:
            means.add(trainer.train_step(data))
            samples += len(data.grids) * recipe.processes
            done, step = trainer.step == recipe.steps, trainer.step
            if rank == 0 and (step % recipe.report_every == 0 or done):
                speed = (time.monotonic() - begin) / (step - first)
                _report(step, recipe.steps, means.take(), samples / (time.monotonic() - begin), speed)
            if rank == 0 and (step % recipe.save_every == 0 or done):
                checkpoint.save_state(recipe.output, trainer.state_dict())


def _report(step: int, steps: int, means: dict[str, float], rate: float, seconds: float) -> None:
    tasks = " ".join(f"{k[6:]} {100 * v:.0f}" for k, v in sorted(means.items()) if k.startswith("exact/"))
    _log.info(
        "step %d/%d  loss %.3f  patch %.3f  norm %.2f  %.1f samples/s  %.0f min left  | %s",
        step,
        steps,
        means.get("loss", 0.0),
        means.get("patch_loss", 0.0),
        means["norm"],
        rate,
        (steps - step) * seconds / 60,
        tasks,
    )
