"""What benchmarks/gpu.py checks of the engine.

Parity with the CPU, recorded passes, bits that do not depend on the batch, FP8 caches, proposals of a draft head, one
wait of the host per step; on the bundled tiny-keye, with pictures and clips.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvkeye.cli.bundled import resolve_model
from kvkeye.cli.drawings import draw
from kvkeye.engine import Engine, EngineConfig, SamplingParams
from kvkeye.engine.backends import FP8_REFERENCE
from kvkeye.engine.graphs import rerun
from kvkeye.engine.warm_up import record_passes

NUM_TOKENS = 24
#: What requests with media need beside PyTorch.
PACKAGES = ("av", "blake3", "jinja2", "PIL", "safetensors", "tokenizers")
HEAD = {"method": "eagle3", "model": "tiny-keye-eagle3", "num_speculative_tokens": 7, "adaptive": False}
Check = Callable[[], str]
Answers = dict[str, Tensor]  # logits [NUM_TOKENS, V] fp32 on the CPU, by question


@cache
def questions(pictures: int = 6, clips: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Messages by name, over freshly drawn scenes."""
    drawings = draw(7, pictures, clips, Path(tempfile.mkdtemp(prefix="kvkeye-gpu-")))
    return {
        str(i): [{"role": "user", "content": [drawing.item, {"type": "text", "text": drawing.turns[0].question}]}]
        for i, drawing in enumerate(drawings)
    }


def open_engine(device: str, dtype: str, is_recorded: bool = True, **config: Any) -> Engine:
    """tiny-keye on `device`. On a CPU a recording is the same operations over the recording's buffers."""
    values = {"max_model_len": 2048, "kv_cache_memory": 1 << 28, "speculation": None, "enforce_eager": not is_recorded}
    engine = Engine.from_config(
        EngineConfig(str(resolve_model(None)), device=device, dtype=dtype, **values | config)  # type: ignore[arg-type]
    )
    if device == "cpu" and is_recorded:
        record_passes(engine.runner, engine.config, engine.max_model_len, rerun)
    return engine


def answers(engine: Engine, names: list[str]) -> Answers:
    """Greedy answers to these questions, computed together."""
    found: dict[tuple[str, int], Tensor] = {}

    def hook(rows: list[tuple[int, int]], logits: Tensor) -> None:
        copied = logits.float().cpu().clone()  # what is shown lies in a buffer of the next step
        for (seq_id, position), row in zip(rows, copied, strict=True):
            found[engine.scheduler.sequence(seq_id).request.request_id, position] = row

    engine.runner.logits_hook = hook
    for name in names:
        engine.add(name, questions()[name], SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
    rows = {name: [row for (owner, _), row in sorted(found.items()) if owner == name] for name in names}
    assert all(len(part) == NUM_TOKENS for part in rows.values()), "an answer is not complete"
    return {name: torch.stack(part) for name, part in rows.items()}


def answered(device: str, dtype: str, is_recorded: bool = True, one_by_one: bool = False, **config: Any) -> Answers:
    with closing(open_engine(device, dtype, is_recorded, **config)) as engine:
        names = list(questions())
        if not one_by_one:
            return answers(engine, names)
        return {name: answers(engine, [name])[name] for name in names}


cached = cache(answered)


def distance(found: Answers, truth: Answers) -> tuple[float, float]:
    """Largest relative error of an answer's logits up to where its tokens part, and the share of equal tokens."""
    errors, equal = [], 0
    for name, logits in truth.items():
        same = (found[name].argmax(-1) == logits.argmax(-1)).int().cumprod(0)
        equal += int(same.sum())
        until = int(same.sum()) + 1  # the logits that parted had the same tokens before them
        errors.append(float((found[name][:until] - logits[:until]).norm() / logits[:until].norm()))
    return max(errors), equal / (NUM_TOKENS * len(truth))


def parity(device: str, dtype: str) -> str:
    """In fp32 as close as two orders of summation are; in bf16 as close to fp32 as the CPU's bf16 is, within twice."""
    truth = cached("cpu", "float32", False)
    error, share = distance(answered(device, dtype), truth)
    bound = 1e-3
    if dtype == "bfloat16":
        bound = 2 * distance(cached("cpu", "bfloat16", False), truth)[0]
    assert error <= bound, f"logits are {error:.2e} from the CPU's in fp32; {bound:.2e} is allowed"
    return f"pass: error {error:.1e} of {bound:.1e} allowed, {share:.0%} of tokens equal"


def replay_equals_eager(device: str, dtype: str) -> str:
    _assert_equal(answered(device, dtype, True, invariant=True), answered(device, dtype, False, invariant=True))
    return "pass"


def alone_equals_together(device: str, dtype: str, **config: Any) -> str:
    together = answered(device, dtype, True, invariant=True, **config)
    _assert_equal(answered(device, dtype, True, True, invariant=True, **config), together)
    _assert_equal(answered(device, dtype, True, invariant=True, max_prefill_chunk=19, **config), together)
    return "pass"


def _assert_equal(found: Answers, expected: Answers) -> None:
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not wrong, f"questions {', '.join(wrong)} of {len(expected)} have other bits"


def fp8_is_near_plain(device: str, dtype: str) -> str:
    """FP8 caches beside plain ones; an e4m3 value is off by at most 1 / 16."""
    fp8 = {"kv_cache_dtype": "fp8"} | ({"backends": FP8_REFERENCE} if device == "cpu" else {})
    error, share = distance(answered(device, dtype, **fp8), cached(device, dtype))
    assert error <= 1 / 16, f"logits are {error:.3f} from those with plain caches; {1 / 16:.3f} is allowed"
    return f"pass: error {error:.3f} of {1 / 16:.3f} allowed, {share:.0%} of tokens equal"


def fp8_alone_equals_together(device: str, dtype: str) -> str:
    if device == "cpu":
        return "refuse: on a CPU the reference runs, whose sums depend on the number of rows"
    return alone_equals_together(device, dtype, kv_cache_dtype="fp8")


def head_equals_plain(device: str, dtype: str) -> str:
    """Recorded steps that a draft head watches and whose proposals are verified, beside plain ones."""
    found = answered(device, dtype, True, invariant=True, speculation=HEAD)
    _assert_equal(found, answered(device, dtype, False, invariant=True))
    return "pass"


def waits_per_step(device: str, dtype: str, head: bool = False) -> str:
    """A decoding step makes the host wait once: when it reads the drawn tokens and their log-probabilities.

    With a draft head it waits for the proposals too.
    """
    if device == "cpu":
        return "refuse: a CPU has nothing to wait for"
    with closing(open_engine(device, dtype, speculation=HEAD if head else None)) as engine:
        for number, (name, messages) in enumerate(questions().items()):
            logprobs = 3 if number < 2 and not head else None
            engine.add(name, messages, SamplingParams(temperature=0, ignore_eos=True, logprobs=logprobs))
        while any(seq.num_generated < 2 for seq in engine.scheduler.running) or engine.scheduler.waiting:
            engine.step()
        counts = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(4):
                with warnings.catch_warnings(record=True) as seen:
                    warnings.simplefilter("always")
                    engine.step()
                counts.append(sum("synchroniz" in str(warning.message) for warning in seen))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert counts == [1 + head] * 4, f"the host waited {counts} times in steps of decoding, {1 + head} are needed"
    return "pass"


def _complete(check: Check) -> str:
    """The check, or what it lacks: the other steps do without."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    assert not absent, (
        f"the engine needs the packages {', '.join(absent)}: install them, or carry their wheels along, unpacked, on "
        "PYTHONPATH"
    )
    return check()


def engine_checks(device: str) -> Iterator[tuple[str, Check]]:
    """(key, check) of every row."""
    return ((key, partial(_complete, check)) for key, check in _checks(device))


def _checks(device: str) -> Iterator[tuple[str, Check]]:
    for dtype in ("float32", "bfloat16"):
        yield f"engine/parity/{dtype}", partial(parity, device, dtype)
    for check in (
        replay_equals_eager, alone_equals_together, fp8_is_near_plain, fp8_alone_equals_together, head_equals_plain,
        waits_per_step,
    ):  # fmt: skip
        yield f"engine/{check.__name__}", partial(check, device, "bfloat16")
    yield "engine/waits_with_head", partial(waits_per_step, device, "bfloat16", True)
