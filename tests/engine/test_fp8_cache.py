"""Engines with FP8 KV caches: near those with plain ones, and an answer's bits its own.

On the CPU the reference runs them. Its sums depend on the number of rows, so where bits are compared attention is the
C++ kernel over the values that levels and scales stand for.
"""

from __future__ import annotations

import functools

import pytest
import torch

from kvkeye import ops
from kvkeye.engine import Engine, EngineConfig, SamplingParams
from kvkeye.engine.backends import FP8_REFERENCE, check_fp8, gpu_backends
from kvkeye.engine.graphs import rerun
from kvkeye.engine.memory import block_bytes
from kvkeye.engine.warm_up import record_passes
from kvkeye.errors import ConfigError
from tests.engine.heads import drafted, random_head
from tests.engine.logits import check_lossless, logits_of, plain_answers, preempt_often, script_of
from tests.engine.test_backends import CPU, GPU, chosen
from tests.engine.test_bits import PROMPTS
from tests.engine.tiny import engine, greedy, model, prompt, run

#: Of logits, in the L2 norm: an e4m3 value is off by at most 1 / 16 of itself.
TOLERANCE = 1 / 16
FEW = {name: PROMPTS[name] for name in ("short", "block", "long", "picture")}


def served_by(dtype=torch.float32, drafter=None, **config):
    values = {"backends": FP8_REFERENCE, "kv_cache_dtype": "fp8", "max_model_len": 320, "speculation": None} | config
    return engine("preview", dtype, drafter, **values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_near_those_of_plain_caches(dtype):
    found, plain = (logits_of(served_by(dtype, kv_cache_dtype=name), FEW) for name in ("fp8", "auto"))
    for name, truth in plain.items():
        same = int((found[name].argmax(-1) == truth.argmax(-1)).int().cumprod(0).sum())
        until = min(same + 1, len(truth))  # the logits that parted had the same tokens before them
        error = (found[name][:until].float() - truth[:until].float()).norm() / truth[:until].float().norm()
        assert 0 < error < TOLERANCE, f"{name}: {error:.3f}"


@pytest.fixture
def by_rows(monkeypatch):
    """Attention over FP8 caches by the C++ kernel, whose rows do not know each other."""

    def attend(q, k_cache, v_cache, table, bounds, context, tree, softmax_scale, k_scales, v_scales):
        keys, values = (
            (levels.float() * scales[..., None]).to(q.dtype)
            for levels, scales in ((k_cache, k_scales), (v_cache, v_scales))
        )
        return torch.ops.kvkeye_cpu.paged_attention(q, keys, values, table, bounds, context, tree, softmax_scale)

    monkeypatch.setattr(ops.OPS["paged_attention"], "reference", attend)


@functools.cache
def alone(name):
    return logits_of(served_by(enable_prefix_cache=False), {name: FEW[name]})[name]


WAYS = {
    "a batch": ({}, {}),
    "chunks of 7": ({"max_prefill_chunk": 7}, {}),
    "blocks of 8": ({"block_size": 8}, {}),
    "cached prefixes": ({}, {"rounds": 2}),
    "few blocks": ({"num_blocks": 11}, {}),
    "preemption": ({"max_prefill_chunk": 19}, {"interrupt": preempt_often}),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_has_its_own_bits(way, by_rows):
    config, how = WAYS[way]
    served = served_by(**config)
    answers = logits_of(served, FEW, **how)
    for name, logits in answers.items():
        assert torch.equal(logits, alone(name)), name
    stats = served.stats()
    assert way != "cached prefixes" or stats.num_cached_tokens >= 32
    assert way not in ("few blocks", "preemption") or stats.num_preemptions > 0


def test_recorded_passes(by_rows):
    """Padding tokens look at block 0 and write nothing, scales neither."""
    served = served_by(max_num_seqs=4, max_num_encoder_patches=256)
    record_passes(served.runner, served.config, served.max_model_len, rerun)
    for name, logits in logits_of(served, FEW).items():
        assert torch.equal(logits, alone(name)), name


@pytest.mark.parametrize("width", [1, 3])
def test_proposals_change_nothing(width, by_rows):
    """Accepted branches move with their scales."""
    truth = plain_answers(served_by(), FEW)
    served = served_by(speculation={"num_speculative_tokens": 63, "adaptive": False})
    served.speculation.drafter = script_of(truth, served.vocab_size, accuracy=0.7, width=width, depth=4)
    counts = check_lossless(served, FEW, truth)
    assert counts.num_accepted_tokens > 30


def test_a_draft_head_changes_nothing(by_rows):
    """Its own keys and values stay plain, in the target's blocks."""
    config = {"backends": FP8_REFERENCE, "kv_cache_dtype": "fp8", "max_model_len": 320}
    served = drafted(random_head(), **config)
    assert served.speculation.drafter.k_cache.dtype == torch.float32
    check_lossless(served, FEW, plain_answers(served_by(), FEW))


def test_copied_blocks_bring_their_scales(by_rows):
    """Two answers share a prompt's last block until one of them writes to it."""
    sampling = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    forked = served_by()
    forked.add("both", prompt(2, 40), SamplingParams(**{**vars(sampling), "n": 2}))
    both = run(forked)["both"].outputs
    again = served_by(enable_prefix_cache=False, max_prefill_chunk=1)
    again.add("both", prompt(2, 40), SamplingParams(**{**vars(sampling), "n": 2}))
    assert [answer.token_ids for answer in both] == [answer.token_ids for answer in run(again)["both"].outputs]
    assert both[0].token_ids != both[1].token_ids


def test_whatever_lies_in_unwritten_slots(by_rows):
    served = served_by()
    for scales in (*served.runner.k_scales, *served.runner.v_scales):
        scales.fill_(float("nan"))
    assert torch.equal(logits_of(served, {"long": FEW["long"]})["long"], alone("long"))


def test_nearly_twice_as_many_blocks_in_the_same_memory():
    text, memory = model().config.text, 1 << 24
    counts = {}
    for name in ("auto", "fp8"):
        served = served_by(torch.bfloat16, kv_cache_dtype=name, kv_cache_memory=memory)
        runner = served.runner
        caches = (*runner.k_caches, *runner.v_caches, *runner.k_scales, *runner.v_scales)
        counts[name] = served.stats().num_blocks
        assert sum(cache.nbytes for cache in caches) == counts[name] * (memory // counts[name] // 64 * 64)
    plain, fp8 = (block_bytes(text, 32, dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn))
    assert fp8 / plain == (text.head_dim + 4) / (2 * text.head_dim)
    assert counts["fp8"] / counts["auto"] > 0.99 * plain / fp8


def test_the_default_backends_of_a_cpu_refuse_with_a_way_out():
    with pytest.raises(ConfigError, match=r"on cpu paged_attention runs on cpp; FP8 .* cuda in bfloat16, and by eager"):
        engine(kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match="kv_cache_dtype: got 'fp8'"):  # before the folder is looked at
        Engine.from_config(EngineConfig("nowhere", kv_cache_dtype="fp8", device="cpu"))
    with pytest.raises(ConfigError, match="kv_cache_dtype: got 'int8'; expected one of auto, fp8"):
        EngineConfig("tiny", kv_cache_dtype="int8")
    check_fp8(FP8_REFERENCE, CPU)


@pytest.mark.parametrize(
    "dtype, refused", [(torch.bfloat16, None), (torch.float32, "on cuda paged_attention runs on triton")]
)
def test_on_a_gpu_the_cuda_kernels_take_it(dtype, refused):
    backends = gpu_backends(chosen(dtype), GPU, False)
    if refused is None:
        return check_fp8(backends, GPU)
    with pytest.raises(ConfigError, match=refused):
        check_fp8(backends, GPU)


def test_greedy_answers_end():
    served = served_by()
    served.add("a", prompt(1, 5), greedy(4))
    assert len(run(served)["a"].outputs[0].token_ids) == 4
