"""The n-gram index: both implementations propose the same, and what they propose follows from the text."""

from __future__ import annotations

import random

import pytest

from kvkeye import _host_ngram_py

try:
    from kvkeye import _host
except ImportError:
    _host = None

NOT_BUILT = pytest.mark.skipif(_host is None, reason="kvkeye._host was not built (no C++ compiler)")


@pytest.fixture(params=[pytest.param("cpp", marks=NOT_BUILT), "python"])
def index_class(request):
    return _host.NgramIndex if request.param == "cpp" else _host_ngram_py.NgramIndex


def index_of(index_class, text, shortest=2, longest=4, candidates=32):
    index = index_class(shortest, longest, candidates)
    index.append([ord(letter) if letter != "|" else -1 for letter in text])
    return index


def words(proposal):
    tokens, parents, scores, length = proposal
    return "".join(map(chr, tokens)), parents, scores, length


def test_a_repeated_text_goes_on_as_before(index_class):
    index = index_of(index_class, "the cat sat. the ca")
    assert words(index.propose(6, 1)) == ("t sat.", [0, 1, 2, 3, 4, 5], [1.0] * 6, 6)


def test_nothing_is_proposed_for_what_was_never_seen(index_class):
    assert words(index_of(index_class, "abcdef").propose(5, 2)) == ("", [], [], 0)
    assert words(index_of(index_class, "").propose(5, 2)) == ("", [], [], 0)
    assert words(index_of(index_class, "xaxa").propose(0, 2))[:3] == ("", [], [])


def test_a_period_goes_on_beyond_the_end_of_the_text(index_class):
    assert words(index_of(index_class, "abcabcab").propose(7, 1))[0] == "cabcabc"
    assert words(index_of(index_class, "aaa").propose(4, 1))[0] == "aaaa"


def test_the_longest_match_decides(index_class):
    text = "in a tree, on a roof, in a tree, by a roof, in a "
    assert words(index_of(index_class, text, longest=8).propose(4, 1))[0] == "tree"


def test_branches_by_counts_the_likeliest_first(index_class):
    text = "ak=1 bk=2 ck=2 dk=3 ek=3 gk=2 fk="
    tokens, parents, scores, length = words(index_of(index_class, text, 2, 2).propose(3, 3))
    assert (tokens, parents, length) == ("2 3", [0, 1, 0], 2)
    assert scores == [3 / 6, 3 / 6, 2 / 6]


def test_the_newest_of_equals_comes_first(index_class):
    assert words(index_of(index_class, "ab1 ab2 ab", 2, 2).propose(2, 2))[0] in ("2 ", "21")
    assert words(index_of(index_class, "ab1 ab2 ab", 2, 2).propose(1, 1))[0] == "2"


def test_texts_are_apart(index_class):
    index = index_of(index_class, "abcd|bxyz|")
    assert words(index.propose(4, 1)) == ("", [], [], 0)
    assert words(index.propose_after([ord("a"), ord("b")], 4, 1))[:2] == ("cd", [0, 1])
    assert words(index.propose_after([ord("c"), ord("d")], 4, 1))[0] == ""
    assert words(index.propose_after([ord("d"), -1, ord("b")], 4, 1))[0] == ""  # one token is not two


def test_old_text_can_be_forgotten(index_class):
    index = index_of(index_class, "old text. new text. ")
    index.keep_last(11)
    assert index.size == 11
    assert words(index.propose_after([ord(c) for c in "ol"], 3, 1))[0] == ""
    assert words(index.propose_after([ord(c) for c in "ne"], 3, 1))[0] == "w t"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda new: new(0, 3, 1), "expected 1 <= min_length <= max_length"),
        (lambda new: new(3, 2, 1), "lengths from 3 to 2"),
        (lambda new: new(2, 33, 1), "<= 32"),
        (lambda new: new(2, 3, 0), "max_candidates is 0; expected at least 1"),
        (lambda new: new(2, 3, 1).append([1, -2]), "token -2; expected at least -1"),
        (lambda new: new(2, 3, 1).keep_last(-1), "count is -1; expected at least 0"),
    ],
)
def test_misuse_is_refused(index_class, call, message):
    with pytest.raises(ValueError, match=message):
        call(index_class)


@NOT_BUILT
@pytest.mark.parametrize("seed", range(8))
def test_native_and_python_agree_on_every_answer(seed):
    rng = random.Random(seed)
    shortest = rng.randint(1, 3)
    settings = shortest, shortest + rng.randint(0, 4), rng.choice([1, 3, 32])
    indices = _host.NgramIndex(*settings), _host_ngram_py.NgramIndex(*settings)
    alphabet = rng.choice([2, 3, 8, 2**40])
    proposed = 0

    def both(name, *args):
        first, second = (getattr(index, name)(*args) for index in indices)
        assert first == second, (name, args)
        return first

    for _ in range(600):
        action = rng.random()
        if action < 0.5:
            both("append", [rng.randrange(-1, alphabet) for _ in range(rng.randint(0, 4))])
        elif action < 0.51:
            both("keep_last", rng.randint(0, 200))
        elif action < 0.8:
            tokens, parents, scores, length = both("propose", rng.randint(0, 12), rng.randint(1, 4))
            check(tokens, parents, scores)
            assert not tokens or length >= shortest
            proposed += bool(tokens)
        else:
            tail = [rng.randrange(-1, alphabet) for _ in range(rng.randint(0, 6))]
            tokens, parents, scores, _ = both("propose_after", tail, rng.randint(0, 12), rng.randint(1, 4))
            check(tokens, parents, scores)
        assert indices[0].size == indices[1].size
    assert proposed > 10 or alphabet > 8


def check(tokens, parents, scores):
    """Parents first, siblings apart, a child never likelier than its parent, and no separator."""
    assert len(tokens) == len(parents) == len(scores) and -1 not in tokens
    assert len(set(zip(parents, tokens))) == len(tokens)
    for row, (parent, score) in enumerate(zip(parents, scores), 1):
        assert 0 <= parent < row and 0 < score <= (scores[parent - 1] if parent else 1) + 1e-12
