"""Chunk rollout: a long clip from an image-to-video pipeline, chunk after chunk, each from the best of several noises.

Source: k-step search (arXiv 2411.18668). The pipeline is called as it is; candidates are calls that stop after k steps,
and the winner is a call that starts there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvkeye.errors import ConfigError
from kvkeye.video.config import KStepConfig
from kvkeye.video.guides import guide_adapter_of
from kvkeye.video.progress import VideoCancelled
from kvkeye.video.scorers import Candidate, GuideScore, Scorer
from kvkeye.video.state_file import load_state, save_state
from kvkeye.video.steps import SamplingState, StepControl, StopSampling


@dataclass
class Cost:
    """Denoising steps, each of one clip: computed, and saved by keeping the winner's steps and by halving."""

    steps: int = 0
    saved: int = 0
    decodes: int = 0


@dataclass(frozen=True)
class Chunk:
    """One finished chunk.

    Shapes     frames [F, 3, H, W] fp32 in [0, 1], the repeated guide left out  latents as the pipeline's, canonical
    scores     terms of every candidate that was scored, by seed, in the order of the rungs
    """

    index: int
    frames: Tensor
    latents: Tensor
    guide: Tensor
    seeds: tuple[int, ...]
    chosen: int
    scores: tuple[dict[str, float], ...]
    cost: Cost = field(compare=False)


class ChunkRollout:
    """Rolls out chunks on a pipeline; `run` yields them as they are made.

    Args       pipe one of `kvkeye.video.guides`;  scorer ranks candidates;  folder keeps checkpoints, from which the
               same call continues to the same bits;  on_step(chunk, what, step) is called after each denoising step,
               returning False cancels
    Raises     ConfigError: an unsupported pipeline
    """

    def __init__(
        self,
        pipe: Any,
        config: KStepConfig | None = None,
        scorer: Scorer | None = None,
        folder: Path | None = None,
        on_step: Callable[[int, str, int], bool | None] | None = None,
    ) -> None:
        self.pipe, self.config = pipe, config or KStepConfig()
        self.adapter = guide_adapter_of(pipe)
        self.scorer = scorer or GuideScore(on="pixels" if self.config.search == "coarse" else "latents")
        self.folder, self.on_step = folder, on_step
        self._anchor: Tensor | None = None
        self._cost = Cost()

    def run(self, image: Any, num_chunks: int, call: Mapping[str, Any]) -> Iterator[Chunk]:
        """Yields `num_chunks` chunks, the first from `image`.

        Args     image a PIL image or [1, 3, H, W] in [0, 1];  call the pipeline's other arguments, height, width,
                 num_frames and num_inference_steps among them, without generator, latents and output_type
        Raises   ConfigError before any compute;  VideoCancelled
        """
        self._check(call)
        guide = self._as_guide(image, call)
        draws = torch.Generator().manual_seed(self.config.seed)
        seeds = torch.randint(1 << 31, (num_chunks, self.config.num_candidates), generator=draws).tolist()
        for index in range(num_chunks):
            with self.adapter.sharing(self.pipe):
                chunk = self._chunk(index, guide, tuple(seeds[index]), dict(call))
            guide = chunk.guide
            yield chunk

    def _check(self, call: Mapping[str, Any]) -> None:
        needed = {"height", "width", "num_frames", "num_inference_steps"}
        if missing := needed - call.keys():
            raise ConfigError(
                f"ChunkRollout.run: {', '.join(sorted(missing))} missing; add them to the call's arguments."
            )
        if ours := {"generator", "latents", "output_type", "image"} & call.keys():
            raise ConfigError(
                f"ChunkRollout.run: {', '.join(sorted(ours))} given; the rollout sets these. Leave them out."
            )
        last, steps = self.config.rungs()[-1][0], call["num_inference_steps"]
        if self.config.num_candidates > 1 and last > steps:
            raise ConfigError(
                f"KStepConfig: a search of {last} steps; the full schedule has {steps}. Lower k or halving."
            )

    def _as_guide(self, image: Any, call: Mapping[str, Any]) -> Tensor:
        pixels = self.pipe.video_processor.preprocess(image, height=call["height"], width=call["width"])
        guide: Tensor = (pixels.float().cpu() + 1) / 2
        return guide

    def _chunk(self, index: int, guide: Tensor, seeds: tuple[int, ...], call: dict[str, Any]) -> Chunk:
        self._cost = Cost()
        call |= {"image": guide, "output_type": "pt"}
        record = self._record(index)
        start, facts = load_state(record) if record is not None and record.exists() else (None, {})
        key = fingerprint(self.config, seeds, call)
        if start is not None and facts["key"] != key:
            raise ConfigError(f"{record}: saved by a run with other settings. Choose another folder or delete it.")
        if start is None:
            start, facts = self._search(index, guide, seeds, call)
        facts = {**facts, "key": key}
        frames, state = self._finish(index, start, facts, call)
        latents = self.adapter.canonical(state.latents)
        if self._anchor is None:
            self._anchor = latents
        repeated = index > 0 and self.config.drop_guide and self.adapter.repeats_guide(self.pipe)
        kept = frames[1:] if repeated else frames
        scores = tuple(facts["scores"])
        return Chunk(index, kept, latents, frames[-1:].clone(), seeds, facts["chosen"], scores, self._cost)

    # The search

    def _search(
        self, index: int, guide: Tensor, seeds: tuple[int, ...], call: dict[str, Any]
    ) -> tuple[SamplingState | None, dict[str, Any]]:
        """The winner's state (None: start anew) and the facts that go into the record."""
        if len(seeds) == 1:
            return None, {"chosen": seeds[0], "scores": []}
        guide_latent = self.adapter.guide_latent(self.pipe, guide, call["height"], call["width"])
        if self.config.search == "coarse":
            return self._coarse(index, guide, guide_latent, seeds, call)
        alive: list[tuple[int, SamplingState | None]] = [(seed, None) for seed in seeds]
        scores: list[dict[str, float]] = []
        for step, keep in self.config.rungs():
            advanced = self._advance(index, alive, step, call)
            terms = self.scorer([self._candidate(seed, state, guide, guide_latent, call) for seed, state in advanced])
            scores += [{"seed": seed, "step": step, **term} for (seed, _), term in zip(advanced, terms)]
            ranked = sorted(range(len(advanced)), key=lambda i: (-terms[i]["score"], i))
            alive = [advanced[i] for i in sorted(ranked[:keep])]
        last = self.config.rungs()[-1][0]
        # A search that starts its winner anew spends N k + S steps.
        self._cost.saved = len(seeds) * last - self._cost.steps + last
        seed, state = alive[0]
        return state, {"chosen": seed, "scores": scores}

    def _advance(
        self, index: int, alive: Sequence[tuple[int, SamplingState | None]], step: int, call: dict[str, Any]
    ) -> list[tuple[int, SamplingState]]:
        """Candidates run on to `step`, as many at a time as asked for."""
        found: list[tuple[int, SamplingState]] = []
        size = self.config.candidate_batch if alive[0][1] is None else 1  # later rungs continue one by one
        for first in range(0, len(alive), size):
            group = alive[first : first + size]
            control = self._sample(index, "search", [seed for seed, _ in group], call, group[0][1], stop=step)
            assert control.state is not None
            found += [(seed, control.state.row(i, len(group))) for i, (seed, _) in enumerate(group)]
        return found

    def _coarse(
        self, index: int, guide: Tensor, guide_latent: Tensor, seeds: tuple[int, ...], call: dict[str, Any]
    ) -> tuple[None, dict[str, Any]]:
        """As published: every candidate through a k-step schedule of its own; the winner starts anew."""
        candidates = []
        for seed in seeds:
            control = self._sample(index, "search", [seed], call | {"num_inference_steps": self.config.k})
            assert control.state is not None and control.frames is not None
            latents, frames = self.adapter.canonical(control.state.latents)[0].float(), control.frames
            self._cost.decodes += 1
            candidates.append(Candidate(seed, latents, guide_latent, guide[0], lambda frames=frames: frames))  # type: ignore[misc]
        terms = self.scorer(candidates)
        best = max(range(len(seeds)), key=lambda i: (terms[i]["score"], -i))
        scores = [{"seed": seed, "step": self.config.k, **term} for seed, term in zip(seeds, terms)]
        return None, {"chosen": seeds[best], "scores": scores}

    def _candidate(
        self, seed: int, state: SamplingState, guide: Tensor, guide_latent: Tensor, call: dict[str, Any]
    ) -> Candidate:
        def decode() -> Tensor:
            self._cost.decodes += 1
            ending = SamplingState(
                call["num_inference_steps"], (state.clean, state.clean), {}, None, state.shape, state.clean
            )
            control = self._sample(0, "preview", [seed], call, ending)
            assert control.frames is not None
            return control.frames

        return Candidate(seed, self.adapter.canonical(state.clean)[0].float(), guide_latent, guide[0], decode)

    # The winner

    def _finish(
        self, index: int, start: SamplingState | None, facts: dict[str, Any], call: dict[str, Any]
    ) -> tuple[Tensor, SamplingState]:
        """The rest of the schedule and the decoded frames; the state is on disk before anything is decoded."""
        record = self._record(index)
        if record is not None and start is not None and not record.exists():
            save_state(record, start, **facts)

        def keep(state: SamplingState, is_last: bool) -> None:
            if record is not None:
                save_state(record, state, **facts)

        control = self._sample(index, "chunk", [facts["chosen"]], call, start, keep=keep)
        final = control.state or start
        assert final is not None and control.frames is not None
        if self._anchor is not None and self.config.color_anchor:
            final = SamplingState(final.step, (self._anchored(final.latents),), {}, None, final.shape, final.clean)
        return control.frames, final

    def _anchored(self, latents: Tensor) -> Tensor:
        """Latents whose channel means and deviations are pulled to the first chunk's (AdaIN)."""
        assert self._anchor is not None
        x, axes = self.adapter.canonical(latents), (-3, -2, -1)
        first = self._anchor.to(x)
        std, mean = torch.std_mean(x, axes, keepdim=True)
        goal_std, goal_mean = torch.std_mean(first, axes, keepdim=True)
        goal = (x - mean) / std.clamp_min(1e-6) * goal_std + goal_mean
        return self.adapter.canonical(torch.lerp(x, goal, self.config.color_anchor)).contiguous()

    def _record(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"chunk-{index:04d}.safetensors"

    # One call of the pipeline

    def _sample(
        self,
        index: int,
        what: str,
        seeds: Sequence[int],
        call: dict[str, Any],
        start: SamplingState | None = None,
        stop: int | None = None,
        keep: Callable[[SamplingState, bool], None] | None = None,
    ) -> Sampled:
        generators = [torch.Generator(self.pipe._execution_device).manual_seed(seed) for seed in seeds]
        batch = len(seeds)
        generator = generators[0] if batch == 1 else generators

        def on_step(state: SamplingState, is_last: bool) -> None:
            if what != "preview":
                self._cost.steps += batch
            if keep is not None:
                keep(state, is_last)
            if self.on_step is not None and self.on_step(index, what, state.step) is False:
                raise VideoCancelled(f"cancelled by on_step in chunk {index} after step {state.step}.")

        anchored = self._anchored if what == "chunk" and self._anchor is not None and self.config.color_anchor else None
        control = StepControl(
            self.adapter.modules(self.pipe),
            self.pipe.scheduler,
            generators,
            start,
            stop,
            on_step,
            anchored,
        )
        with control.watching():
            try:
                output = self.pipe(
                    **call | batched(call, batch, self.adapter.image_per_clip) | {"generator": generator}
                )
            except StopSampling:
                return Sampled(control.state, None)
        return Sampled(control.state, output.frames[0].float().cpu())


@dataclass(frozen=True)
class Sampled:
    """What one call of the pipeline left: the last computed step, and frames [F, 3, H, W] unless it was stopped."""

    state: SamplingState | None
    frames: Tensor | None


def batched(call: Mapping[str, Any], batch: int, image: bool) -> dict[str, Any]:
    """The call's prompt and image for several candidates at once."""
    if batch == 1:
        return {}
    found: dict[str, Any] = {}
    for name, value in call.items():
        if name in ("prompt", "negative_prompt") and isinstance(value, str):
            found[name] = [value] * batch
        elif isinstance(value, Tensor) and (image if name == "image" else "embeds" in name or "mask" in name):
            found[name] = value.repeat(batch, *[1] * (value.ndim - 1))
    return found


def fingerprint(*parts: Any) -> str:
    """Of settings and arguments: a checkpoint is continued only by the run that wrote it."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for name in sorted(value):
                feed((name, value[name]))
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        elif not callable(value):
            digest.update(repr(value).encode())

    feed(parts)
    return digest.hexdigest()
