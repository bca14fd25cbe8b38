"""The head as a drafter: what it proposes is what the head says about the whole text, however that was served."""

from __future__ import annotations

import pytest
import torch

from kvkeye.engine.decode_graphs import token_sizes
from kvkeye.engine.graphs import rerun
from kvkeye.layers import PackedContext
from tests.engine.heads import drafted, random_head
from tests.engine.logits import logits_of
from tests.engine.test_bits import PROMPTS
from tests.engine.tiny import greedy, prompt, run


def whole(served, seq, count):
    """The head's chain after a row's tokens, from one dense pass over all of them."""
    head, target, payload = served.speculation.drafter.head, served.runner.model, seq.request.payload
    tokens, num_prompt = list(seq.tokens), seq.num_prompt
    later = torch.arange(num_prompt, len(tokens) + count) + payload.position_delta
    positions = torch.cat([payload.positions, later.expand(3, -1)], 1)
    embeds = target.embed(torch.tensor(tokens))
    for span in seq.request.media:
        embeds[span.start : span.end] = served.runner.media_embeds[span.embeds]
    context = PackedContext.from_lengths([len(tokens) - 1])
    features = target.language.forward_features(embeds[:-1], positions[:, : len(tokens) - 1], context, (0, 1, 2))[1]
    hidden = torch.cat([torch.zeros_like(embeds[:1]), head.fuse(torch.cat(features, -1))])
    proposed = []
    for _ in range(count):
        states = head(hidden, embeds, positions[:, : len(embeds)], PackedContext.from_lengths([len(embeds)]))
        proposed.append(int(head.token_ids[head.logits(states[-1:]).argmax()]))
        hidden = torch.cat([hidden, states[-1:]])
        embeds = torch.cat([embeds, target.embed(torch.tensor(proposed[-1:]))])
    return proposed


class Checked:
    """The engine's drafter, every proposal compared with `whole`; asked every `rhythm` steps."""

    def __init__(self, served, rhythm=1):
        self.served, self.inner, self.rhythm = served, served.speculation.drafter, rhythm
        self.num_calls = self.num_checked = 0
        served.speculation.drafter = self

    @property
    def head(self):
        return self.inner.head

    def propose(self, sequences, num_tokens):
        self.num_calls += 1
        if self.num_calls % self.rhythm:
            return {}
        drafts = self.inner.propose(sequences, num_tokens)
        with torch.inference_mode():
            for seq in sequences if self.num_calls % (11 * self.rhythm) == 0 else ():
                wanted = whole(self.served, seq, num_tokens[seq.seq_id])
                assert drafts[seq.seq_id].tokens == wanted
                assert drafts[seq.seq_id].parents == list(range(len(wanted)))
                self.num_checked += 1
        return drafts

    def forget(self, sequence):
        self.inner.forget(sequence)


WAYS = {
    "a batch": {},
    "chunks of 7": {"max_prefill_chunk": 7},
    "a budget of 13": {"max_num_batched_tokens": 13},
    "blocks of 1": {"block_size": 1},
    "blocks of 128": {"block_size": 128},
}


@pytest.mark.parametrize("way", WAYS)
def test_proposals_are_those_of_one_pass_over_the_text(way):
    served = drafted(random_head(), enable_prefix_cache=False, **WAYS[way])
    checked = Checked(served)
    logits_of(served, PROMPTS)
    assert checked.num_checked > 15


@pytest.mark.parametrize("way", ["a batch", "chunks of 7"])
def test_recorded_steps(way):
    served = drafted(random_head(), enable_prefix_cache=False, **WAYS[way])
    served.runner.record(token_sizes(128), 640 // 32, rerun)
    checked = Checked(served)
    logits_of(served, PROMPTS)
    assert checked.num_checked > 15


@pytest.mark.parametrize("rhythm", [2, 5])
def test_a_row_that_was_not_asked_catches_up(rhythm):
    served = drafted(random_head(), enable_prefix_cache=False)
    checked = Checked(served, rhythm)
    logits_of(served, PROMPTS)
    assert checked.num_checked >= 3


def test_a_reduced_vocabulary():
    head = random_head(draft_vocab_size=40)
    served = drafted(head, enable_prefix_cache=False)
    checked = Checked(served)
    logits_of(served, {"long": PROMPTS["long"], "picture": PROMPTS["picture"]})
    assert checked.num_checked >= 3


def test_nothing_is_kept_of_rows_that_ended():
    served = drafted(random_head(), max_num_seqs=2)
    for i in range(4):
        served.add(str(i), prompt(i, 20), greedy(12))
    for _ in range(5):
        served.step()
    served.abort("0")
    run(served)
    assert served.speculation.drafter._rows == {} and served.scheduler.blocks.pool.num_used == 0


def test_broken_features_propose_nothing():
    """A head that gives NaN costs its proposals, never an answer."""
    head = random_head()
    served = drafted(head, min_score=0.1)
    plain = logits_of(served, {"long": PROMPTS["long"]})
    broken = drafted(head, min_score=0.1)
    for cache in (broken.speculation.drafter.k_cache, broken.speculation.drafter.v_cache):
        cache.fill_(float("nan"))
    found = logits_of(broken, {"long": PROMPTS["long"]})
    assert torch.equal(found["long"], plain["long"])


@pytest.mark.parametrize("width, block_size", [(1, 32), (3, 4), (6, 1)])
def test_its_memory_is_known_before_it_is_taken(width, block_size):
    served = drafted(random_head(draft_vocab_size=40), width=width, block_size=block_size, num_blocks=640)
    drafter = served.speculation.drafter
    taken = drafter.k_cache.nbytes + drafter.v_cache.nbytes + drafter.vocabulary.nbytes
    assert taken == 640 * drafter.block_bytes(block_size) + drafter.fixed_bytes(block_size, 16, 5)
