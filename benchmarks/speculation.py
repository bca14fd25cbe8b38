"""Speculative decoding against plain decoding of the same engine, and against transformers' two ways of it.

    python benchmarks/speculation.py --json benchmarks/results/speculation.jsonl
    python benchmarks/speculation.py --rows repeating fresh

verify      a step of one answer with 7 proposals, all wrong, beside a step of one token; large geometry
acceptance  time per token at stated shares of right proposals, 7 a step; large geometry
repeating   tiny-keye on benchmarks/prompts/repeating.jsonl, whose answers repeat the prompt: decode time; n-grams of
            the request alone, and the default, which looks into the answers before it too
fresh       random weights sampling random tokens, where every match misleads: decode time
head        tiny-keye describing held-out scenes with its bundled draft head: decode time; chains and trees
lookup      tiny-keye's language half as a Qwen3 checkpoint, text alone: forwards per token, and time
assisted    the same with its own first two layers as the draft model of both sides

Tokens of all sides are compared first; those of one engine must be equal.
"""

# ruff: noqa: E402
from __future__ import annotations

import _isa

_isa.ensure_bf16()

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _repeating
import torch
from _engine_checkpoint import GEOMETRIES, write_checkpoint
from _limits import measure_limits
from _measure import Bar, Peer, Result, Row, append, machine, parser, record, show
from _speculation_peer import Qwen3

from kvkeye.engine import Engine, EngineConfig, SamplingParams
from kvkeye.engine.draft import Draft
from kvkeye.engine.draft_model import DraftModel
from kvkeye.engine.loading import load_drafter
from kvkeye.engine.request import Sequence
from kvkeye.layers import pack_weights
from kvkeye.models.keye.model import KeyeModel
from kvkeye.train.data import questions_of
from kvkeye.train.heads.data import messages
from kvkeye.utils.assets import folder_of

ROWS = ("verify", "acceptance", "repeating", "fresh", "head", "lookup", "assisted")
TINY = str(folder_of("tiny-keye"))
HEAD = "tiny-keye-eagle3"
NUM_PROPOSALS = 7
NUM_DRAFT_LAYERS = 2


class Script:
    """Proposes the known answer, each token right with some chance; a drafter that costs nothing."""

    def __init__(self, answer: list[int], accuracy: float) -> None:
        self.answer, self.accuracy, self.rng = answer, accuracy, random.Random(0)

    def propose(self, sequences: SequenceOf[Sequence], num_tokens: Any) -> dict[int, Draft]:
        found = {}
        for seq in sequences:
            coming = self.answer[seq.num_generated :][: min(NUM_PROPOSALS, num_tokens[seq.seq_id])]
            tokens = [token if self.rng.random() < self.accuracy else token ^ 1 for token in coming]
            found[seq.seq_id] = Draft(tokens, list(range(len(tokens))), [1.0] * len(tokens))
        return found

    def forget(self, sequence: Sequence) -> None:
        pass


class Geometry:
    """Engines over one random checkpoint of a real geometry: plain, and with a scripted drafter."""

    def __init__(self, given: argparse.Namespace) -> None:
        geometry = GEOMETRIES["tiny" if given.quick else "qwen3-0.6b"]
        folder = (
            given.folder
            or Path(tempfile.gettempdir()) / f"kvkeye-benchmark-{'tiny' if given.quick else geometry.name.lower()}"
        )
        keye, _ = write_checkpoint(folder, geometry)
        self.name = geometry.name
        config = self._config(str(keye), None)
        self.plain = Engine.from_config(config)
        generator = torch.Generator().manual_seed(1)
        length = 32 if given.quick else given.prompt
        self.prompt = torch.randint(0, geometry.text.vocab_size, (length,), generator=generator).tolist()
        self.num_tokens = 16 if given.quick else 40
        self.answer = self.decode(self.plain)[0]

    def _config(self, folder: str, speculation: Any) -> EngineConfig:
        return EngineConfig(
            folder, dtype="bfloat16", max_model_len=1024, max_num_seqs=1, enable_prefix_cache=False,
            speculation=speculation,
        )  # fmt: skip

    def scripted(self, accuracy: float) -> Engine:
        settings = {"num_speculative_tokens": NUM_PROPOSALS, "adaptive": False}
        config = self._config(self.plain.config.model, settings)
        return Engine(config, self.plain.runner.model, self.plain.processor, drafter=Script(self.answer, accuracy))

    def decode(self, engine: Engine) -> tuple[list[int], list[float]]:
        """The answer's tokens, and the seconds of every decoding step."""
        engine.add("a", self.prompt, SamplingParams(temperature=0, ignore_eos=True, max_tokens=self.num_tokens))
        (output,), times = engine.step(), []
        while engine.has_work:
            begin = time.perf_counter()
            (output,) = engine.step()
            times.append(time.perf_counter() - begin)
        return output.outputs[0].token_ids, times

    def times(self, engines: list[Engine], seconds: float) -> list[list[float]]:
        """Seconds per step; the engines take turns of an answer each."""
        found: list[list[float]] = [[] for _ in engines]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(found[0]) < 3:
            for engine, own in zip(engines, found):
                tokens, times = self.decode(engine)
                assert tokens == self.answer, "proposals changed an answer"
                own += times[1:-1] or times  # the last step may have fewer proposals
        return found


def verify(geometry: Geometry, given: argparse.Namespace) -> Result:
    checked, plain = geometry.times([geometry.scripted(0.0), geometry.plain], given.seconds)
    name = f"{geometry.name}: a step that checks {NUM_PROPOSALS} proposals of one answer"
    return Result(Row(name, [Peer("a step of one token", "")], [Bar("a step of one token", 0.8)]), [checked, plain])


def acceptance(geometry: Geometry, given: argparse.Namespace, accuracy: float) -> Result:
    """Seconds per token."""
    engines = [geometry.scripted(accuracy), geometry.plain]
    found: list[list[float]] = [[] for _ in engines]
    end = time.perf_counter() + given.seconds / 3
    while time.perf_counter() < end or len(found[0]) < 3:
        for engine, own in zip(engines, found):
            tokens, times = geometry.decode(engine)
            assert tokens == geometry.answer, "proposals changed an answer"
            own.append(sum(times) / (len(tokens) - 1))
    name = f"{geometry.name}: a token, {accuracy:.0%} of {NUM_PROPOSALS} proposals right"
    return Result(Row(name, [Peer("plain decoding", "")], []), found)


class Small:
    """Engines over one small checkpoint, by their speculation."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.base = Engine.from_config(self._config(None))

    def _config(self, speculation: Any) -> EngineConfig:
        return EngineConfig(
            self.folder, max_model_len=1024, num_blocks=64, enable_prefix_cache=False, speculation=speculation
        )

    def engine(self, speculation: Any) -> Engine:
        config, model = self._config(speculation), self.base.runner.model
        return Engine(config, model, self.base.processor, drafter=load_drafter(config, model))

    def compare(self, name: str, speculation: Any, prompts: list[Any], sampling: SamplingParams, given: Any) -> Result:
        """Time of all answers, one after the other, each less plain decoding's time to its first token.

        Proposals are checked with the prompt's own pass too: what that costs counts as decoding.
        """
        found: list[list[float]] = [[], []]
        end = time.perf_counter() + given.seconds
        while time.perf_counter() < end or len(found[0]) < 2:
            engines = [self.engine(speculation), self.engine(None)]
            sums = [0.0, 0.0]
            for seed, prompt in enumerate(prompts):
                answers, metrics = [], []
                for engine in engines:
                    engine.add("a", prompt, replace(sampling, seed=seed))
                    while engine.has_work:
                        (output,) = engine.step()
                    metrics.append(output.metrics)
                    answers.append(output.outputs[0].token_ids)
                assert answers[0] == answers[1], "proposals changed an answer"
                for side, own in enumerate(metrics):
                    took = (own.ttft_ms or 0.0) + (own.decode_ms or 0.0) - (metrics[1].ttft_ms or 0.0)
                    sums[side] += took / 1e3
            for own, total in zip(found, sums):
                own.append(total)
            counts = engines[0].stats().speculation
        print(f"  {counts}")
        return Result(Row(name, [Peer("plain decoding", "")], []), found)


def repeating(tiny: Small, items: list[dict[str, Any]], given: argparse.Namespace) -> Iterator[Result]:
    prompts = [tiny.base.prepare(_repeating.messages(item)) for item in items]
    name = f"tiny-keye: {len(prompts)} answers that repeat their prompt"
    sampling = SamplingParams(temperature=0, max_tokens=200)
    for speculation, title, bars in (
        ({"method": "ngram"}, f"{name}, n-grams of the request", [Bar("plain decoding", 1.8)]),
        ("auto", f"{name}, and of the answers before it", []),
    ):
        result = tiny.compare(title, speculation, prompts, sampling, given)
        yield replace(result, row=replace(result.row, bars=bars))


def fresh(given: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        geometry = GEOMETRIES["tiny"]
        random_weights = Small(str(write_checkpoint(Path(folder), geometry)[0]))
        generator = torch.Generator().manual_seed(2)
        shape = (2 if given.quick else 8, 300)
        prompts = torch.randint(0, geometry.text.vocab_size, shape, generator=generator).tolist()
        sampling = SamplingParams(temperature=2.0, ignore_eos=True, max_tokens=200)
        name = f"random weights of {geometry.text.hidden_size}: {len(prompts)} answers of random tokens"
        result = random_weights.compare(name, "auto", prompts, sampling, given)
        return replace(result, row=replace(result.row, bars=[Bar("plain decoding", 0.97)]))


def described(tiny: Small, given: argparse.Namespace) -> Iterator[Result]:
    """Descriptions of 25 tokens and more, of scenes that neither the model nor the head was trained on."""
    items = questions_of("describe", 3 if given.quick else 100, "held_out", seed=3)
    prompts = [tiny.base.prepare(messages(scene, turn.question)) for scene, turn in items]
    sampling = SamplingParams(temperature=0, max_tokens=200)
    for width, title in ((1, "chains"), (2, "trees two nodes wide")):
        speculation = {"method": "eagle3", "model": HEAD, "tree_width": width}
        name = f"tiny-keye: {len(prompts)} descriptions, its draft head, {title}"
        result = tiny.compare(name, speculation, prompts, sampling, given)
        yield replace(result, row=replace(result.row, bars=[Bar("plain decoding", 1.6)]))


class TextAlone:
    """tiny-keye in fp32 without pictures, so that a Qwen3 model of the same weights says the same; 64 tokens each."""

    def __init__(self, tiny: Small, items: list[dict[str, Any]]) -> None:
        self.prompts = [tiny.base.prepare(_repeating.messages(item, with_picture=False)) for item in items]
        self.config = EngineConfig(
            TINY, dtype="float32", max_model_len=1024, num_blocks=64, enable_prefix_cache=False,
            speculation={"method": "ngram", "num_speculative_tokens": NUM_PROPOSALS, "adaptive": False},
        )  # fmt: skip
        self.ours = Engine.from_config(self.config)
        text = self.ours.runner.model.config.text
        self.peer = Qwen3(TINY, text, text.num_hidden_layers)
        self.assistant = Qwen3(TINY, text, NUM_DRAFT_LAYERS)

    def lookup(self) -> tuple[Result, dict[str, float]]:
        row = Row("tiny-keye, text: an answer of 64 tokens", [Peer("transformers", "prompt lookup")], [])
        return self._compare(row, self.ours, lambda prompt: self.peer.lookup(prompt, 64, NUM_PROPOSALS))

    def assisted(self) -> tuple[Result, dict[str, float]]:
        model = self.ours.runner.model
        shallow = replace(model.config, text=replace(model.config.text, num_hidden_layers=NUM_DRAFT_LAYERS))
        small = KeyeModel(shallow).eval()
        small.load_state_dict({name: value for name, value in model.state_dict().items() if name in small.state_dict()})
        pack_weights(small)
        settings = {"num_speculative_tokens": NUM_PROPOSALS, "adaptive": False}
        config = replace(self.config, speculation=settings)
        ours = Engine(config, model, self.ours.processor, drafter=DraftModel(small, 64, 32, "cpp"))
        name = f"tiny-keye, text: an answer of 64 tokens, its first {NUM_DRAFT_LAYERS} layers as draft model"
        row = Row(name, [Peer("transformers", "assisted generation")], [])
        return self._compare(row, ours, lambda prompt: self.peer.assisted(prompt, 64, NUM_PROPOSALS, self.assistant))

    def _compare(
        self, row: Row, ours: Engine, generate: Callable[[list[int]], tuple[list[int], int]]
    ) -> tuple[Result, dict[str, float]]:
        found: list[list[float]] = [[], []]
        equal, steps, forwards = 0, 0, 0
        for prompt in self.prompts:
            begin = time.perf_counter()
            ours.add("a", prompt, SamplingParams(temperature=0, ignore_eos=True, max_tokens=64))
            while ours.has_work:
                (output,) = ours.step()
                steps += 1
            found[0].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            tokens, count = generate(prompt.token_ids)
            found[1].append(time.perf_counter() - begin)
            forwards += count
            equal += sum(a == b for a, b in zip(tokens, output.outputs[0].token_ids))
        total = 64 * len(self.prompts)
        counts = {"forwards_per_token": steps / total, "peer_forwards_per_token": forwards / total}
        print(f"  {equal} of {total} tokens equal; {counts}")
        return Result(replace(row, bars=[Bar("transformers", 1.0)]), found), counts


def results(given: argparse.Namespace) -> Any:
    """(row, what else was counted) of the chosen rows."""
    names = set(given.rows)
    if names & {"verify", "acceptance"}:
        geometry = Geometry(given)
        if "verify" in names:
            yield verify(geometry, given), {}
        for accuracy in (0.5, 0.8, 1.0) if "acceptance" in names else ():
            yield acceptance(geometry, given, accuracy), {}
    if "fresh" in names:
        yield fresh(given), {}
    if not names & {"repeating", "head", "lookup", "assisted"}:
        return
    tiny, items = Small(TINY), _repeating.load()[:: 30 if given.quick else 1]
    if "repeating" in names:
        for result in repeating(tiny, items, given):
            yield result, {}
    if "head" in names:
        for result in described(tiny, given):
            yield result, {}
    if names & {"lookup", "assisted"}:
        text = TextAlone(tiny, items[::4] if not given.quick else items[:2])
        if "lookup" in names:
            yield text.lookup()
        if "assisted" in names:
            yield text.assisted()


def main() -> None:
    options = parser(__doc__, ROWS, seconds=20.0)
    options.add_argument("--prompt", type=int, default=512, help="tokens of the large geometry's prompt")
    options.add_argument("--folder", type=Path, help="where the random checkpoint is kept between runs")
    given = options.parse_args()
    if given.quick:
        given.seconds = 0.1
    torch.set_num_threads(given.threads)
    packages = {name: version(name) for name in ("torch", "transformers")}
    about = machine() | {"packages": packages, "quick": given.quick}
    limits = measure_limits(1 << 24)
    print(about)
    for result, counts in results(given):
        show(result, limits)
        append(given.json, about | limits.row() | record(result, limits) | counts)


if __name__ == "__main__":
    main()
