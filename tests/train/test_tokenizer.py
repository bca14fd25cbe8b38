"""The bundled tokenizer: loses nothing, keeps template words whole, spells rendered words."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeye.train.questions import TEMPLATES
from kvkeye.train.tokenizer import SPECIAL_TOKENS, build_tokenizer
from kvkeye.train.words import WORDS

TOKENIZER = build_tokenizer()


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_round_trip(text: str) -> None:
    if any(name in text for name, _ in SPECIAL_TOKENS):
        return
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_sizes_and_special_tokens() -> None:
    assert TOKENIZER.get_vocab_size() <= 2000
    for name, special in SPECIAL_TOKENS:
        ids = TOKENIZER.encode(name, add_special_tokens=False).ids
        assert len(ids) == 1
        assert (TOKENIZER.decode(ids) == "") == special  # only flagged tokens vanish from decoded text


@pytest.mark.parametrize("word", WORDS[::17])
def test_rendered_words_are_spelled_letter_by_letter(word: str) -> None:
    assert TOKENIZER.encode(word).tokens == list(word)
    assert TOKENIZER.encode(" " + word).tokens == ["Ġ", *word]


def test_template_words_are_whole() -> None:
    for group in TEMPLATES.values():
        for template in group:
            question = template.format(color="red", shape="star", position="top left", thing="red star")
            assert len(TOKENIZER.encode(question).ids) <= 1.5 * len(question.split()) + 2


def test_digits_are_single() -> None:
    assert TOKENIZER.encode("40718").tokens == list("40718")
