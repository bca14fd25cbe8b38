"""An engine on a GPU that is not there: every tensor is where it has to be, and a step reads from the device once.

Warm-up, encoding, chunked prefill, decoding and verification run as they would there, but for values: fake tensors have
none. Recorded passes are run again instead of replayed.
"""

from __future__ import annotations

import pytest
import torch

from kvkeye.engine import Engine, EngineConfig, SamplingParams
from kvkeye.engine import engine as engine_module
from kvkeye.engine import warm_up as warm_up_module
from kvkeye.engine.backends import COMPOSED, SERVING_OPS
from kvkeye.engine.draft_head import HeadDrafter
from kvkeye.engine.draft_model import DraftModel
from kvkeye.engine.graphs import rerun
from kvkeye.models.draft.config import HeadConfig
from kvkeye.models.draft.head import DraftHead
from kvkeye.models.keye.model import KeyeModel
from kvkeye.models.keye.parsing import OutputParser
from kvkeye.ops import Op
from kvkeye.testing.tiny import tiny_keye_config
from tests.engine.scripted import ScriptedDrafter
from tests.engine.tiny import Processor, greedy, picture, prompt
from tests.fake_gpu import GPU, fake_gpu, zeros

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch):
    """What the machine would say: memory, of which the largest passes take a part, and a recorder."""
    free = iter([4 * GIB, 3 * GIB])  # before and after what warm-up tries
    monkeypatch.setattr(warm_up_module, "available_bytes", lambda device: next(free))
    monkeypatch.setattr(engine_module, "available_bytes", lambda device: 4 * GIB)
    monkeypatch.setattr(warm_up_module, "CudaRecorder", lambda device: rerun)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def served_by(version="preview", drafter=None, **config):
    values = {"model": "tiny", "max_model_len": 256, "max_num_seqs": 4, "max_num_encoder_patches": 256}
    with fake_gpu(), torch.device(GPU):
        model = KeyeModel(tiny_keye_config(version))
    with fake_gpu():
        return Engine(EngineConfig(**values | config), model, Processor(), OutputParser, drafter)


def steps(served, *prompts, answer=zeros):
    """(rows with tokens to draw, shapes read from the device) of every step; prompts are made of real tensors."""
    for i, prepared in enumerate(prompts):
        served.add(str(i), prepared, greedy(6, logprobs=2 if i == 1 else None))
    found = []
    while served.has_work:
        reads = []
        with fake_gpu(reads, answer):
            outputs = served.step()
        assert [output.error for output in outputs if output.error] == []
        found.append((len(outputs), reads))
    return found


@pytest.mark.parametrize("version", ["preview", "1.5"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_step_reads_once_and_mixes_no_devices(gpu, version, enforce_eager):
    served = served_by(version, max_prefill_chunk=19, enforce_eager=enforce_eager)
    assert (served.runner._graphs is None) == enforce_eager
    pictures = picture(1, (1, 6, 10)), picture(2, (1, 4, 4), (1, 4, 4), kind="video")
    found = steps(served, prompt(0, 30), prompt(1, 5), prompt(2, 40, *pictures), prompt(3, 21, pictures[0]))
    assert all(len(reads) == (rows > 0) for rows, reads in found) and len(found) > 8
    assert served.stats().num_encoder_steps > 0


PROPOSING = {"num_speculative_tokens": 3, "tree_width": 2, "adaptive": False}


@pytest.mark.parametrize("config", [{}, {"kv_cache_dtype": "fp8", "backends": "eager"}], ids=["plain", "fp8"])
def test_verification_reads_once(gpu, config):
    """Drawn tokens, the rows they were drawn from, and their counts in one piece; recorded with and without trees."""
    drafter = ScriptedDrafter(lambda seq: [0, 0, 0], 320, accuracy=0.9, width=2, depth=3)
    served = served_by(drafter=drafter, speculation=PROPOSING, **config)
    served.add("a", prompt(0, 20), greedy(8))
    while served.has_work:
        reads = []
        with fake_gpu(reads, one_drawn):
            served.step()
        assert len(reads) == 1
    assert drafter.num_drafts > 5


def one_drawn(shape):
    """What a draft head proposes is a chain; of every tree one token is drawn, somewhere in the second row."""
    if len(shape) == 3:
        rows, _, count = shape
        return [[[1.0] * count, [i - 1.0 for i in range(count)], [0.5] * count]] * rows
    return [1] * shape[0]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_draft_head_reads_once_more(gpu, enforce_eager):
    """Its proposals, then what is drawn, then log-probabilities of these; what it watches moves nothing to the host."""
    served = served_by(drafter=head_on_gpu(), speculation=PROPOSING, max_prefill_chunk=19, enforce_eager=enforce_eager)
    found = steps(served, prompt(0, 30), prompt(2, 40, picture(1, (1, 6, 10))), answer=one_drawn)
    assert served.stats().speculation.num_drafts > 4
    assert {len(reads) for _, reads in found} == {0, 1, 2, 3} and max(rows for rows, _ in found) == 2


@pytest.fixture
def called(monkeypatch):
    """The names of the ops that have been called on the GPU, but for those that the body of such an op calls."""
    names, plain, depth = set(), Op.__call__, []

    def call(op, *args):
        if not depth and any(isinstance(each, torch.Tensor) and each.is_cuda for each in args):
            names.add(op.name)
        depth.append(op)
        try:
            return plain(op, *args)
        finally:
            depth.pop()

    monkeypatch.setattr(Op, "__call__", call)
    return names


def test_every_op_of_a_request_is_one_that_the_engine_has_chosen_a_kernel_for(gpu, called):
    """So that none is left to a default order that ends at the reference."""
    served = served_by("1.5", drafter=head_on_gpu(), speculation=PROPOSING, max_prefill_chunk=19, invariant=True)
    pictures = picture(1, (1, 6, 10)), picture(2, (1, 4, 4), (1, 4, 4), kind="video")
    served.add("forked", prompt(3, 20), SamplingParams(n=2, max_tokens=6, seed=1, ignore_eos=True))
    steps(served, prompt(0, 30), prompt(1, 5), prompt(2, 40, *pictures), answer=one_drawn)
    assert called == {*SERVING_OPS, *COMPOSED}


def test_a_draft_model_reads_once_per_proposed_token(gpu):
    """All rows' tokens side by side; what it is given travels from pinned memory, like the steps' own tensors."""
    with fake_gpu(), torch.device(GPU):
        drafter = DraftModel(KeyeModel(tiny_keye_config()), num_blocks=64)
    served = served_by(drafter=drafter, speculation=PROPOSING, max_prefill_chunk=19)
    found = steps(served, prompt(0, 30), prompt(2, 40, picture(1, (1, 6, 10))), answer=one_drawn)
    counts = [len(reads) for _, reads in found]
    # A token each, what is drawn, its log-probabilities; before, each prompt's last chunk has proposals of its own.
    assert counts[:3] == [0, 4, 8] and max(counts[3:]) == PROPOSING["num_speculative_tokens"] + 2


def head_on_gpu():
    with fake_gpu(), torch.device(GPU):
        target = KeyeModel(tiny_keye_config())
        return HeadDrafter(DraftHead(HeadConfig.for_target(target.config.text, "0" * 64, (0, 1, 2))), target, width=2)


def test_what_passes_take_is_left_free(gpu, caplog):
    caplog.set_level("INFO", logger="kvkeye.engine")
    served_by()
    assert "passes and recordings take 1.00 GiB" in caplog.text
    assert caplog.text.count("recorded a step of") == 2 * 3 and caplog.text.count("recorded an encoder pass") == 2 * 2


@pytest.mark.parametrize(
    ("move", "says"),
    [
        (lambda: torch.ones(3).to(GPU), "the host waits for a copy"),
        (lambda: torch.ones(3).to(GPU, non_blocking=True), "memory that is not pinned"),
        (lambda: torch.tensor([1.0], device=GPU), "copies from plain memory"),
        (lambda: torch.ones(3, device=GPU).cpu(), "cpu reads a tensor"),
        (lambda: torch.ones(3, device=GPU).to("cpu"), "to reads a tensor"),
        (lambda: torch.empty(3, device=GPU).copy_(torch.ones(3)), "from cpu to cuda"),
    ],
)
def test_what_a_step_would_wait_for_is_an_error_on_it(move, says):
    with fake_gpu([]), pytest.raises(AssertionError, match=says):
        move()


def test_reading_a_value_is_an_error_on_it():
    with fake_gpu(), pytest.raises(RuntimeError):
        torch.ones(3, device=GPU).tolist()
    with fake_gpu(), pytest.raises(RuntimeError):
        torch.ones(3, device=GPU) + torch.ones(3)
