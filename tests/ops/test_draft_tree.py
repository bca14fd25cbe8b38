"""ops.draft_tree beyond its case table: what the reference asks of a device."""

from __future__ import annotations

import pytest
import torch

from kvkeye import ops
from kvkeye.testing.case import Sample
from kvkeye.testing.cases.speculative import tree_call
from kvkeye.testing.compare import mapped
from tests.watch import Watch


def on_meta(width):
    arguments = tree_call(Sample(torch.float32), [3, 1], [30, 17], 4, width, 0.1, packed=False)
    return mapped(lambda tensor: tensor.to("meta"), arguments)


def test_chains_are_proposed_without_a_value_read_by_the_host():
    """On the meta device there is none to read."""
    arguments = on_meta(width=1)
    with Watch() as watch:
        tokens, parents, scores = ops.OPS["draft_tree"].reference(*arguments)
    assert tokens.shape == parents.shape == scores.shape == (2, 4)
    assert watch.seen.count("paged_attention") == 4  # all sequences at once: the known rows, then three levels


def test_trees_are_not():
    with pytest.raises(RuntimeError, match="meta"):
        ops.OPS["draft_tree"].reference(*on_meta(width=2))


def test_a_sequence_beside_others_gets_what_it_gets_alone():
    together = tree_call(Sample(torch.float32), [3, 1, 2], [30, 17, 5], 5, 1, 0.15, packed=False)
    features, embeds, bounds, lengths, tables, positions = (together[i] for i in (0, 1, 7, 8, 6, 9))
    found = ops.OPS["draft_tree"].reference(*together)
    assert (found[0] == -1).any() and (found[0] >= 0).any()  # some end early
    for b, (first, last) in enumerate(zip(bounds.tolist(), bounds[1:].tolist())):
        alone = list(together)
        alone[0], alone[1], alone[9] = features[first:last], embeds[first:last], positions[first:last]
        alone[6], alone[7], alone[8] = tables[b : b + 1], torch.tensor([0, last - first]).int(), lengths[b : b + 1]
        tokens, parents, scores = ops.OPS["draft_tree"].reference(*alone)
        assert torch.equal(tokens[0], found[0][b]) and torch.equal(parents[0], found[1][b])
        torch.testing.assert_close(scores[0], found[2][b])


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_a_broken_sequence_proposes_nothing_and_leaves_the_others_alone(backend):
    arguments = tree_call(Sample(torch.float32), [3, 1], [30, 17], 4, 1, 0.0)
    if backend == "cpp" and ops.OPS["draft_tree"].implementations["cpp"].absent() is not None:
        pytest.skip("the C++ kernels are not built")
    with ops.use_backends(backend):
        sound = ops.draft_tree(*mapped(torch.clone, arguments))
        broken = list(mapped(torch.clone, arguments))
        broken[0][3] = float("nan")
        found = ops.draft_tree(*broken)
    assert all(torch.equal(mine[0], other[0]) for mine, other in zip(found, sound))
    assert (found[0][1] == -1).all() and (found[1][1] == -1).all() and (found[2][1] == 0).all()
