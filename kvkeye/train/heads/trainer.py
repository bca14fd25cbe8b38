"""The loop: a frozen target gives features and distributions, the head learns to continue the ones to the others.

A run is a function of its recipe and of the target's answers, and the whole state is saved: an interrupted run
continues to the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.layers import PackedContext
from kvkeye.models.draft.config import HeadConfig
from kvkeye.models.draft.head import DraftHead
from kvkeye.models.draft.weights import save_head, target_hash
from kvkeye.models.keye.processor import load_tokenizer
from kvkeye.models.keye.weights import load_model
from kvkeye.train import checkpoint
from kvkeye.train.data import Batch, ChatEncoder
from kvkeye.train.heads.data import Answerer, Sample, Source, frequent_tokens, load_answers
from kvkeye.train.heads.recipe import HeadRecipe, load
from kvkeye.train.heads.unroll import unroll
from kvkeye.train.optimizer import Updater

_log = logging.getLogger("kvkeye.train")


class HeadTrainer:
    """The target, the head, its optimiser and its moving average."""

    def __init__(self, recipe: HeadRecipe, samples: list[Sample]) -> None:
        self.recipe = recipe
        self.target = load_model(recipe.target, torch.float32).requires_grad_(False)
        encoder = ChatEncoder(load_tokenizer(recipe.target))
        self.source = Source(samples, encoder, self.target, recipe.seed)
        self.head = new_head(recipe, self.target.language, samples, encoder.end)
        self.named = list(self.head.named_parameters())
        self.updater = Updater(self.named, recipe.optimizer)
        self.average = {name: value.detach().clone() for name, value in self.named}
        self.step = 0

    def train_step(self) -> dict[str, float]:
        """One update; returns the loss, the gradients' norm and per draft step the share of right proposals."""
        with torch.no_grad():
            data, embeds = self.source.batch(self.step, self.recipe.data.images)
        loss, report = self.loss_of(data, embeds)
        loss.backward()
        norm = self.updater.step(self.step, self.recipe.steps)
        self.step += 1
        decay = min(self.recipe.optimizer.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            pairs = [(self.average[name], value.detach()) for name, value in self.named]
            torch._foreach_lerp_([own for own, _ in pairs], [value for _, value in pairs], 1 - decay)
        return {**report, "norm": norm}

    def loss_of(self, data: Batch, embeds: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy with the target's distribution over the head's vocabulary, over all draft steps."""
        with torch.no_grad():
            features, wanted = self._target(data, embeds)
        place = torch.full((len(data.ids),), -1)
        place[data.rows] = torch.arange(len(data.rows))
        loss, weights, report = embeds.new_zeros(()), 0.0, {}
        for number, drafted in enumerate(unroll(self.head, features, embeds, data, self.recipe.depth)):
            goal = wanted[place[drafted.rows]]
            entropy = -(goal * drafted.logits.log_softmax(-1)).sum(-1).mean()
            weight = self.recipe.decay**number
            loss, weights = loss + weight * entropy, weights + weight
            hits = drafted.logits.argmax(-1) == goal.argmax(-1)
            report[f"right/{number + 1}"] = float(hits.float().mean())
        loss = loss / max(weights, 1e-9)
        return loss, {"loss": float(loss.detach()), **report}

    def _target(self, data: Batch, embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Features [T, 3 H], and for the answer rows probabilities [A, Vd] over the head's vocabulary."""
        context = PackedContext(data.cu_seqlens, data.max_seqlen)
        layers = self.head.config.feature_layers
        hidden, features = self.target.language.forward_features(embeds, data.positions, context, layers)
        logits = self.target.logits(hidden[data.rows])
        return torch.cat(features, -1), logits[:, self.head.token_ids].softmax(-1)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "head": self.head.state_dict(),
            "updater": self.updater.state_dict(),
            "average": self.average,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.head.load_state_dict(state["head"])
        self.updater.load_state_dict(state["updater"])
        for name, value in state["average"].items():
            self.average[name].copy_(value)


def new_head(recipe: HeadRecipe, language: Any, samples: list[Sample], end: int) -> DraftHead:
    """A head that begins with the target's norm and output weights. Raises ConfigError where sizes do not fit."""
    sizes = {"intermediate_size": recipe.head.intermediate_size, "draft_vocab_size": recipe.head.draft_vocab_size}
    chosen = {name: value for name, value in sizes.items() if value}
    config = HeadConfig.for_target(language.config, target_hash(recipe.target), recipe.head.feature_layers, **chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        head = DraftHead(config)
    if config.is_reduced:
        head.token_ids.copy_(torch.tensor(frequent_tokens(samples, config.draft_vocab_size, end)))
    output = language.embed_tokens if language.lm_head is None else language.lm_head
    with torch.no_grad():
        head.norm.weight.copy_(language.norm.weight)
        head.lm_head.plain_weight().copy_(output.plain_weight()[head.token_ids])
    return head


def run(recipe: Path, answer: Answerer, overrides: Mapping[str, Any] | None = None) -> Path:
    """Trains a recipe to its last step, resuming where an earlier run stopped; returns the head's folder.

    answer  asks the target, unless the output folder holds its answers already

    Raises:
        ConfigError: the recipe is unusable.
    """
    loaded = load(recipe, overrides)
    samples = load_answers(loaded, answer)
    trainer = HeadTrainer(loaded, samples)
    state = checkpoint.load_state(loaded.output)
    if state is not None:
        trainer.load_state_dict(state)
        _log.info("resumed %s at step %d of %d", loaded.name, trainer.step, loaded.steps)
    with ops.use_backends(loaded.backends) if loaded.backends else nullcontext():
        _loop(trainer)
    folder = loaded.output / loaded.name
    save_head(trainer.head, folder, trainer.average, torch.bfloat16)
    return folder


def _loop(trainer: HeadTrainer) -> None:
    recipe = trainer.recipe
    begin, first = time.monotonic(), trainer.step
    reports: list[dict[str, float]] = []
    while trainer.step < recipe.steps:
        reports.append(trainer.train_step())
        step, done = trainer.step, trainer.step == recipe.steps
        if step % recipe.report_every == 0 or done:
            names = sorted({name for report in reports for name in report})
            means = {n: sum(r[n] for r in reports if n in r) / sum(n in r for r in reports) for n in names}
            right = " ".join(f"{100 * value:.0f}" for name, value in means.items() if name.startswith("right/"))
            left = (recipe.steps - step) * (time.monotonic() - begin) / (step - first) / 60
            _log.info(
                "step %d/%d  loss %.3f  norm %.2f  right by draft step %s  %.0f min left",
                step, recipe.steps, means["loss"], means["norm"], right, left,
            )  # fmt: skip
            reports.clear()
        if step % recipe.save_every == 0 or done:
            checkpoint.save_state(recipe.output, trainer.state_dict())
