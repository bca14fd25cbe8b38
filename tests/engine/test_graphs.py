"""Recorded passes give the bits of the passes that they stand for, whatever came before them.

The recorder of these tests runs the recorded function again, over the buffers that a CUDA graph would read and write.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from kvkeye import ops
from kvkeye.engine.batch import EncodeBatch, TokenInputs
from kvkeye.engine.decode_graphs import DecodeGraphs, padded, token_sizes
from kvkeye.engine.encoder_graphs import EncoderGraphs, patch_sizes
from kvkeye.engine.graphs import rerun, smallest
from kvkeye.engine.runner import Runner
from kvkeye.engine.staging import ALIGNMENT, Layout, staged, tensors_of, to_device
from kvkeye.models.keye.positions import MediaGrid
from kvkeye.testing.tiny import tiny_keye_model
from tests.engine import test_bits, test_speculation
from tests.engine.heads import drafted, random_head
from tests.engine.logits import check_lossless, logits_of, preempt_often
from tests.engine.test_bits import MANY, PROMPTS, check
from tests.engine.tiny import greedy, model, prompt
from tests.watch import Watch

WIDTH = 20  # blocks of 32 tokens in contexts of 640
CPU = torch.device("cpu")


class Counting:
    """A recorder that counts replays."""

    def __init__(self):
        self.num_replays = 0

    def __call__(self, body):
        body()

        def replay():
            self.num_replays += 1
            body()

        return replay


def recorded(served, most=32, trees=False):
    """An engine whose steps of up to `most` tokens and packs of up to 256 patches are recorded, and their counters."""
    steps, packs = Counting(), Counting()
    served.runner.record(token_sizes(most), 640 // served.config.block_size, steps, trees)
    served.runner.record_encoder(patch_sizes(256), packs)
    return served, steps, packs


# Steps in an engine


@pytest.mark.parametrize("num_seqs", [1, 3, 7, 16])
def test_batches_of_every_size(num_seqs):
    served, steps, packs = recorded(test_bits.served_by(max_num_seqs=num_seqs))
    check(logits_of(served, MANY if num_seqs > 8 else PROMPTS))
    assert steps.num_replays > 40 and packs.num_replays > 0


WAYS = {
    "chunks of 7": ({"max_prefill_chunk": 7}, {}),
    "a budget of 13": ({"max_num_batched_tokens": 13}, {}),
    "blocks of 16": ({"block_size": 16}, {}),
    "cached prefixes": ({}, {"rounds": 2}),
    "blocks run out": ({"num_blocks": 22}, {}),
    "preemption at any moment": ({"max_prefill_chunk": 19}, {"interrupt": preempt_often}),
    "media encoded again": ({"encoder_cache_memory": 0, "enable_prefix_cache": False}, {"rounds": 2}),
}


@pytest.mark.parametrize("way", WAYS)
def test_after_anything_that_came_before(way):
    config, how = WAYS[way]
    served, steps, _ = recorded(test_bits.served_by(**config))
    check(logits_of(served, PROMPTS, **how))
    assert steps.num_replays > 40


@pytest.mark.parametrize("version, dtype", [("1.5", torch.float32), ("preview", torch.bfloat16)])
def test_other_version_and_dtype(version, dtype):
    served, steps, packs = recorded(test_bits.served_by(version, dtype, max_prefill_chunk=7))
    check(logits_of(served, PROMPTS), version=version, dtype=dtype)
    assert steps.num_replays > 40 and packs.num_replays > 0


@pytest.mark.parametrize("width", [1, 3])
def test_verification_of_proposals(width):
    served, steps, _ = recorded(test_speculation.scripted(width=width), most=96, trees=True)
    counts = check_lossless(served, PROMPTS, test_speculation.truth(), interrupt=preempt_often)
    assert counts.num_accepted_tokens > 50 and steps.num_replays > 15


class Seen:
    """An observer that keeps copies of what it is shown, and where the originals lay."""

    depths = (0, 1, 2)

    def __init__(self):
        self.steps, self.places = [], set()

    def observe(self, batch, embeds, features, accepted):
        rows = batch.bounds[-1]
        self.steps.append((embeds[:rows].clone(), features[:rows].clone(), accepted))
        self.places.add((embeds.data_ptr(), features.data_ptr()))


@pytest.mark.parametrize("version, dtype", [("preview", torch.float32), ("1.5", torch.bfloat16)])
@pytest.mark.parametrize("width", [1, 3])
def test_an_observer_sees_what_a_plain_pass_shows(width, version, dtype):
    """Embeddings, features and accepted proposals of every step; those of all recorded sizes lie in one place."""
    shown = []
    for is_recorded in (False, True):
        served = test_speculation.scripted(version, dtype, width=width, max_prefill_chunk=19)
        served.runner.observer = seen = Seen()
        steps = Counting()
        if is_recorded:
            served.runner.record(token_sizes(256), 640 // 32, steps, trees=True)
        check_lossless(served, PROMPTS, test_speculation.truth(version, dtype))
        shown.append(seen)
    plain, recorded_ = (seen.steps for seen in shown)
    assert len(plain) == len(recorded_) and steps.num_replays > len(plain) / 2
    for (embeds, features, accepted), (*others, also_accepted) in zip(plain, recorded_):
        assert torch.equal(embeds, others[0]) and torch.equal(features, others[1]) and accepted == also_accepted
    assert len(shown[1].places) <= 1 + len(plain) - steps.num_replays


def test_accepted_proposals_are_named_by_their_place_in_the_step():
    """In a prompt's own pass too, where other tokens come before the tree."""
    served = test_speculation.scripted(width=2, accuracy=1.0)
    served.runner.observer = seen = Seen()
    tables = served.runner.model.language.embed_tokens.weight
    served.add("long", PROMPTS["long"](), greedy(16))
    tokens = []
    while served.has_work:
        (output,) = served.step()
        embeds, _, accepted = seen.steps[-1]
        drawn = output.outputs[0].token_ids[len(tokens) :]
        for places in accepted.values():
            assert len(places) == len(drawn)
            assert torch.equal(embeds[places[1:]], tables[drawn[:-1]])  # each is drawn after the one before it
        tokens += drawn
    assert len(seen.steps) < 8


def test_whatever_lies_in_unwritten_blocks():
    served, _, _ = recorded(test_bits.served_by())
    for cache in (*served.runner.k_caches, *served.runner.v_caches):
        cache.fill_(float("nan"))
    check(logits_of(served, PROMPTS))


# One step


def step_of(lengths, context=40, blocks=64, width=3, seed=0):
    """Rows of these numbers of new tokens after `context` others, each in `width` blocks of its own from 1 on."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, counts = sum(lengths), torch.tensor(lengths)
    table = 1 + torch.randperm(blocks - 1, generator=generator)[: len(lengths) * width].view(len(lengths), width)
    places = torch.cat([torch.arange(context, context + count) for count in lengths])
    owner = torch.repeat_interleave(torch.arange(len(lengths)), counts)
    return TokenInputs(
        token_ids=torch.randint(0, 256, (num_tokens,), generator=generator),
        positions=places.expand(3, -1),
        block_table=table.int(),
        cu_seqlens_q=torch.tensor([0, *counts.cumsum(0)], dtype=torch.int32),
        context_lens=(context + counts).int(),
        slot_mapping=table[owner, places // 32] * 32 + places % 32,
    )


def runner_of(poison=None):
    runner = Runner(model(), 64, 32, "cpp")
    generator = torch.Generator().manual_seed(9)
    for cache in (*runner.k_caches, *runner.v_caches):
        cache.copy_(torch.randn(cache.shape, generator=generator))
        if poison is not None:
            cache[0].fill_(poison)  # the block that padding tokens look at
    return runner


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [1] * 9, [5], [1, 4, 1], [17, 1, 1, 9]], ids=str)
def test_padding_writes_nothing_and_is_not_read(lengths):
    runner, plain = runner_of(poison=float("nan")), runner_of()
    inputs = step_of(lengths)
    size = smallest(token_sizes(32), sum(lengths))
    before = [cache.clone() for cache in (*runner.k_caches, *runner.v_caches)]
    with torch.inference_mode(), ops.use_backends("cpp"):
        (logits,) = runner._all_rows(padded(inputs, size, WIDTH))
        (expected,) = plain._all_rows(inputs)
    assert len(logits) == size and torch.equal(logits[: sum(lengths)], expected)
    block, offset = inputs.slot_mapping // 32, inputs.slot_mapping % 32
    for cache, old in zip((*runner.k_caches, *runner.v_caches), before):
        assert not torch.equal(cache[block, :, offset], old[block, :, offset])
        cache[block, :, offset] = old[block, :, offset]
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.parametrize("observer", [None, Seen()], ids=["plain", "observed"])
@pytest.mark.parametrize("trees", [False, True])
def test_recorded_steps_read_no_value_and_keep_their_shapes(trees, observer):
    """On the meta device there is nothing to read, and nothing that depends on a value has a shape."""
    runner = Runner(tiny_keye_model().to("meta"), 4, 32, observer=observer)
    inputs = replace(step_of([1, 4, 1]), tree_mask=torch.ones(6, dtype=torch.int64) if trees else None)
    inputs, _ = to_device(padded(inputs, 8, WIDTH), torch.device("meta"))
    with torch.inference_mode(), Watch() as watch:
        shapes = [rows.shape for rows in runner._all_rows(inputs)]
    assert shapes == [(8, 320), (8, 128), (8, 384)][: 1 if observer is None else 3]
    layers = len(runner.model.language.layers)
    assert watch.seen.count("paged_attention") == watch.seen.count("qk_norm_mrope_append") == layers


def test_recording_writes_no_keys():
    runner = runner_of()
    before = [cache.clone() for cache in (*runner.k_caches, *runner.v_caches)]
    runner.record(token_sizes(8), WIDTH, rerun, trees=True)
    assert all(map(torch.equal, before, (*runner.k_caches, *runner.v_caches)))


def test_buffers_stay_where_they_are_and_the_largest_is_recorded_first():
    seen, sizes = [], []

    def body(inputs):
        sizes.append(len(inputs.token_ids))
        seen.append([tensor.data_ptr() for tensor in tensors_of(inputs)])
        return [torch.zeros(len(inputs.token_ids), width) for width in (8, 3)]

    outputs = [torch.zeros(4, 8), torch.zeros(4, 3)]
    graphs = DecodeGraphs(body, outputs, [1, 2, 4], WIDTH, rerun)
    assert sizes == [4, 2, 1]
    for lengths in ([1, 1, 1], [4], [1, 2]):
        inputs, packed = to_device(padded(step_of(lengths), 4, WIDTH), CPU)
        found = graphs(inputs, packed)
        assert [rows.data_ptr() for rows in found] == [rows.data_ptr() for rows in outputs]
    assert seen[3:] == [seen[0]] * 3


@pytest.mark.parametrize("most", [1, 3, 17, 256, 5000])
def test_sizes(most):
    sizes = token_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1
    assert most > 256 or (sizes[-1] >= most and (len(sizes) == 1 or sizes[-2] < most))
    packs = patch_sizes(most)
    assert packs[-1] >= most and all(b - a <= max(128, a / 4) for a, b in itertools.pairwise(packs))


def test_a_step_reads_from_the_device_once(monkeypatch):
    """Tokens and log-probabilities of all rows in one piece; building a step reads nothing that was on the device."""
    served, _, _ = recorded(test_bits.served_by(speculation=None))
    for i in range(4):
        served.add(str(i), prompt(i, 20), greedy(8, logprobs=3 if i % 2 else None))
    while served.scheduler.waiting or any(seq.num_generated < 2 for seq in served.scheduler.running):
        served.step()
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or tolist(tensor))
    with Watch():
        outputs = served.step()
    assert len(outputs) == 4 and len(reads) == 1


def test_a_step_with_a_draft_head_reads_its_proposals_and_what_was_drawn(monkeypatch):
    served, steps, _ = recorded(drafted(random_head(), width=2, speculation={"tree_width": 2}), most=64, trees=True)
    for i in range(4):
        served.add(str(i), prompt(i, 20), greedy(24))
    while served.scheduler.waiting or any(seq.num_generated < 2 for seq in served.scheduler.running):
        served.step()
    reads, tolist, num_replays = [], torch.Tensor.tolist, steps.num_replays
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.shape) or tolist(tensor))
    with Watch():
        outputs = served.step()
    assert len(outputs) == 4 and len(reads) == 2 and steps.num_replays == num_replays + 1
    outputs = {rows.untyped_storage().data_ptr() for rows in served.runner._graphs._outputs}
    kept = served.speculation.drafter._rows.values()
    assert kept and outputs.isdisjoint(row.features.untyped_storage().data_ptr() for row in kept)


# The encoder

GRIDS = [(1, 6, 10), (1, 2, 2), (3, 4, 6), (1, 6, 10), (1, 2, 40), (2, 4, 6), (1, 4, 4), (1, 14, 18)]


def pack(indices, dtype=torch.float32):
    items = [MediaGrid("video" if GRIDS[i][0] > 1 else "image", GRIDS[i]) for i in indices]
    pixels = [
        torch.randn(item.num_patches, 588, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, item in zip(indices, items)
    ]
    return EncodeBatch([bytes([i]) for i in indices], pixels, items)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_any_packing_of_pictures(version, dtype):
    net = model(version, dtype)
    with ops.use_backends("cpp"):
        graphs = EncoderGraphs(net, [128, 256, 640], rerun)
        for indices in ([7, 0, 1, 2], [1], [0, 3], [2, 5, 6], [4, 1, 6], [7], list(range(8))):
            batch = pack(indices, dtype)
            expected = net.encode_media(torch.cat(batch.pixel_values), batch.grids)
            assert torch.equal(graphs(batch), expected), indices


@torch.no_grad()
def test_packs_that_fit_no_size_are_left_to_the_plain_pass():
    graphs = EncoderGraphs(model(), [128, 256], rerun)
    assert graphs(pack([7, 7])) is None  # 504 patches
    assert graphs(pack([1] * 8)) is None  # as many segments as the size has, and none left for padding
    runner = Runner(model(), 4, 32)
    runner.record_encoder([128, 256], rerun)
    runner.encode(pack([7, 7, 1, 1]))
    assert {name: len(rows) for name, rows in runner.media_embeds.items()} == {b"\7": 63, b"\1": 1}


@torch.no_grad()
def test_embeddings_are_not_overwritten_by_the_next_pass():
    runner = Runner(model(), 4, 32)
    runner.record_encoder([128, 256], rerun)
    runner.encode(pack([0]))
    kept = runner.media_embeds[b"\0"].clone()
    runner.encode(pack([3]))
    assert torch.equal(runner.media_embeds[b"\0"], kept)


@torch.no_grad()
@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_recorded_packs_read_no_value(version):
    net = tiny_keye_model(version).to("meta")
    seen = []

    def record(body):
        with Watch() as watch:
            body()
        seen.extend(watch.seen)
        return body

    EncoderGraphs(net, [128], record)
    assert seen.count("varlen_attention") == len(net.visual.layers)


@torch.no_grad()
@pytest.mark.parametrize("version", ["preview", "1.5"])
def test_the_order_of_merging_is_that_of_merge_patches(version):
    net = model(version)
    items = [MediaGrid("video", grid) for grid in GRIDS]
    features = torch.randn(sum(item.num_patches for item in items), 144)
    with ops.use_backends("cpp"):
        found = net.projector.gather(features, net.projector.merge_rows(items))
        assert torch.equal(found, net.projector(features, items))


# Staging


def test_one_copy_holds_every_tensor():
    inputs = step_of([1, 4, 1])
    moved, packed = to_device(inputs, CPU)
    for mine, other in zip(tensors_of(inputs), tensors_of(moved), strict=True):
        assert torch.equal(mine, other) and mine.dtype == other.dtype
        assert other.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
        assert other.storage_offset() * other.element_size() % ALIGNMENT == 0


def test_a_beginning_of_the_list_lies_the_same():
    tensors = [torch.arange(5), torch.empty(0, 3), torch.rand(7, 3), torch.ones(1, dtype=torch.int32)]
    whole = staged(tensors, pinned=False)
    for count in range(5):
        part = staged(tensors[:count], pinned=False)
        views = Layout.of(tensors[:count]).views(whole[: len(part)])
        assert all(map(torch.equal, views, tensors))
