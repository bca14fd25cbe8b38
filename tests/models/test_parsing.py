"""Reasoning and content of answers, whole and cut anywhere."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvkeye.models.keye.parsing import OutputParser, parse_output

CASES = [
    ("A red bus.", "", "A red bus."),
    ("  two spaces,\nand a tail \n", "", "  two spaces,\nand a tail \n"),
    ("<think>look</think><answer>42</answer>", "look", "42"),
    ("<think>\nlook\n\nagain\n</think>\n<answer>\n42\n</answer>\n", "look\n\nagain", "42"),
    (
        "<analysis>/think fits</analysis><think>2+2</think><answer>\\boxed{4}</answer>",
        "/think fits\n2+2",
        "\\boxed{4}",
    ),
    ("<analysis>/no_think fits</analysis>It is a cat.", "/no_think fits", "It is a cat."),
    ("<analysis>easy</analysis>\n\n<answer>a cat</answer>", "easy", "a cat"),
    ("<think>never closed, a <answer> is only talk", "never closed, a <answer> is only talk", ""),
    ("<think>a</think>b<answer>c", "a", "b\nc"),
    ("<think></think><answer></answer>", "", ""),
    ("x</think>y", "", "x\ny"),
    ("1 < 2 and <b>bold</b> <thinking> </ answer>", "", "1 < 2 and <b>bold</b> <thinking> </ answer>"),
    ("<<think>a</think>", "a", "<"),
    ("<answer>use <think> and </think> here</answer>", "", "use <think> and </think> here"),
    ("<answer>1</answer> then <answer>2</answer>", "", "1\nthen\n2"),
    ("<think>cut <thi", "cut <thi", ""),
    ("<answer>cut</ans", "", "cut</ans"),
    ("", "", ""),
]


@pytest.mark.parametrize(("text", "reasoning", "content"), CASES)
def test_cases_whole_and_by_the_character(text, reasoning, content):
    assert parse_output(text) == (reasoning, content)
    assert in_pieces(text, list(range(1, len(text)))) == (reasoning, content)


def in_pieces(text, cuts, **options):
    parser = OutputParser(**options)
    edges = [0, *sorted(set(cuts)), len(text)]
    parts = [parser.feed(text[a:b]) for a, b in pairwise(edges)]
    parts.append(parser.finish())
    return "".join(r for r, _ in parts), "".join(c for _, c in parts)


def test_opened_by_the_prompt():
    assert parse_output("\nhm\n</think>\n\nyes", starts_within="think") == ("hm", "yes")


def test_raw_keeps_every_character():
    text = "<think>a</think> <answer>b</answer>\n"
    assert parse_output(text, raw=True) == ("", text)


def test_text_is_not_held_back_longer_than_a_tag():
    parser = OutputParser()
    assert parser.feed("Hello <") == ("", "Hello")  # the space may yet stand next to a tag
    assert parser.feed("answe") == ("", "")
    assert parser.feed("d") == ("", " <answed")


pieces = st.sampled_from(
    ["<think>", "</think>", "<analysis>", "</analysis>", "<answer>", "</answer>", "<", ">", "</", "a", "b c", " ", "\n"]
)
texts = st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=14).map("".join)


@settings(max_examples=400, deadline=None)
@given(texts, st.data(), st.sampled_from([None, "think"]))
@example("<think>a</think> \n<answer>", None, None)
def test_any_cutting_gives_the_same(text, data, within):
    if data is None:
        cuts = list(range(len(text)))
    else:
        cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    assert in_pieces(text, cuts, starts_within=within) == parse_output(text, starts_within=within)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_text_without_tags_is_kept_to_the_letter(text):
    if "<" not in text:
        assert parse_output(text) == ("", text)


def by_regular_expression(text):
    """The same rules over the whole text at once: cut at tags, strip sides that touch a tag, join with new lines."""
    parts = re.split(r"(</?(?:analysis|think|answer)>)", text)
    found = {"reasoning": [], "content": []}
    closing, segment, touches = None, "", False
    for part in [*parts, None]:
        is_tag = part is not None and re.fullmatch(r"</?(?:analysis|think|answer)>", part)
        ends = part is None or (is_tag and (closing is None or part == closing))
        if not ends:
            segment += part
            continue
        segment = segment.lstrip() if touches else segment
        segment = segment.rstrip() if part is not None else segment
        if segment:
            found["content" if closing in (None, "</answer>") else "reasoning"].append(segment)
        segment, touches = "", True
        closing = part.replace("<", "</") if part is not None and closing is None and part[1] != "/" else None
    return "\n".join(found["reasoning"]), "\n".join(found["content"])


@settings(max_examples=400, deadline=None)
@given(texts)
def test_the_machine_agrees_with_the_regular_expression(text):
    assert parse_output(text) == by_regular_expression(text)
