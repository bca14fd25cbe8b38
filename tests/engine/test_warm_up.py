"""What is recorded before the first request, and that rehearsing and recording leave nothing behind."""

from __future__ import annotations

import pytest
import torch

from kvkeye.engine import EngineConfig
from kvkeye.engine.graphs import rerun
from kvkeye.engine.runner import Runner
from kvkeye.engine.warm_up import record_passes, warm_up, working_bytes
from tests.engine.tiny import engine, greedy, model, prompt, run


def runner():
    return Runner(model(), 4, 32, "cpp")


@pytest.mark.parametrize(
    "config, steps, packs",
    [
        ({"max_num_seqs": 4, "max_num_encoder_patches": 256}, 3, 2),  # 1, 2, 4 tokens; 128, 256 patches
        ({"max_num_seqs": 1, "max_num_encoder_patches": 1}, 1, 1),
        ({"max_num_seqs": 2, "max_num_encoder_patches": 1, "speculation": {"num_speculative_tokens": 3}}, 4, 1),
        (
            {
                "max_num_seqs": 2,
                "max_num_encoder_patches": 1,
                "speculation": {"num_speculative_tokens": 3, "tree_width": 2},
            },
            8,
            1,
        ),
    ],
)
def test_a_recording_per_size(config, steps, packs):
    bodies = []

    def record(body):
        bodies.append(body)
        return body

    record_passes(runner(), EngineConfig("tiny", **config), 512, record)
    assert len(bodies) == steps + packs


def test_recorded_engine_answers_as_an_eager_one():
    answers = []
    for is_recorded in (False, True):
        served = engine(max_num_seqs=4, max_num_encoder_patches=256)
        if is_recorded:
            record_passes(served.runner, served.config, served.max_model_len, rerun)
        for i in range(6):
            served.add(str(i), prompt(i, 4 + 9 * i), greedy(12))
        answers.append({name: output.outputs[0].token_ids for name, output in run(served).items()})
    assert answers[0] == answers[1] and len(answers[0]) == 6


def test_rehearsal_leaves_nothing_behind():
    rehearsed = runner()
    rehearsed.rehearse(96, 4, 250)
    assert not rehearsed.media_embeds
    assert not any(cache.count_nonzero() for cache in (*rehearsed.k_caches, *rehearsed.v_caches))


def test_a_cpu_records_and_measures_nothing():
    plain, config = runner(), EngineConfig("tiny")
    warm_up(plain, config, 512)
    assert plain._graphs is None and plain._encoder_graphs is None
    assert working_bytes(model(), config, 512, "cpp") == 0


def test_embeddings_may_hold_infinities_beside_padding():
    """A picture that breaks the tower breaks its own embeddings alone, not those of a later pack of the same size."""
    from tests.engine.test_graphs import pack

    broken, clean = pack([0]), pack([3])
    broken.pixel_values[0][:] = float("inf")
    recorded = runner()
    recorded.record_encoder([128], rerun)
    recorded.encode(clean)
    kept = recorded.media_embeds.pop(b"\3")
    recorded.encode(broken)
    recorded.encode(clean)
    assert torch.equal(recorded.media_embeds[b"\3"], kept) and torch.isfinite(kept).all()
