"""Streamed text: its pieces add up to the whole, never take anything back, and end before a stop string."""

from __future__ import annotations

import random
import re

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from kvkeye.engine.detokenize import Detokenizer, StopStrings
from kvkeye.testing.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
SPECIAL = [token.content for token in TOKENIZER.get_added_tokens_decoder().values() if token.special]


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
@example("a<|im_start|>é<|im_end|>")
def test_pieces_add_up_and_never_show_half_a_character(text):
    whole = re.sub("|".join(map(re.escape, SPECIAL)), "", text)  # special tokens are not text
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(decode)
    shown = ""
    for token in ids:
        shown += detokenizer.push(token)
        assert whole.startswith(shown)
    assert shown + detokenizer.flush() == whole


def test_a_character_of_four_bytes_appears_at_its_last_byte():
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.push(token) for token in TOKENIZER.encode("a🐟b").ids]
    assert pieces == ["a", "", "", "", "🐟", "b"]


def test_an_unfinished_character_is_shown_as_such_at_the_end():
    detokenizer = Detokenizer(decode)
    ids = TOKENIZER.encode("é").ids
    assert detokenizer.push(ids[0]) == ""
    assert detokenizer.flush() == "\ufffd" and detokenizer.flush() == ""


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_add_up_to_what_a_single_decode_gives(seed):
    rng = random.Random(seed)
    ids = [rng.randrange(256) for _ in range(200)]
    detokenizer = Detokenizer(decode)
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == decode(ids)


def test_endless_noise_is_let_go():
    detokenizer = Detokenizer(decode)
    broken = TOKENIZER.encode("é").ids[0]
    assert "".join(detokenizer.push(broken) for _ in range(100))


def stream(text, stops, sizes):
    filter = StopStrings(stops)
    shown, start = "", 0
    for size in [*sizes, len(text)]:
        shown += filter.push(text[start : start + size])
        start += size
        if filter.matched is not None or start >= len(text):
            break
    return shown + ("" if filter.matched else filter.flush()), filter.matched


@settings(max_examples=500, deadline=None)
@given(
    st.text(alphabet="ab\n", max_size=12),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), min_size=12, max_size=12),
)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(text, stops, sizes):
    shown, matched = stream(text, stops, sizes)
    # The first stop string to be complete counts; of those, the one that begins first.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (shown, matched) == (text, None)
        return
    assert matched in stops
    assert text.startswith(shown + matched)
    assert not any(stop in shown for stop in stops)


def test_nothing_that_could_become_a_stop_string_is_shown():
    filter = StopStrings(["END", "E!"])
    assert [filter.push(piece) for piece in ("xE", "N", "d E", "N", "D")] == ["x", "", "ENd ", "", ""]
    assert filter.matched == "END" and filter.push("more") == "" and filter.flush() == ""


def test_without_stop_strings_everything_passes():
    filter = StopStrings(())
    assert filter.push("abc") == "abc" and filter.flush() == ""
