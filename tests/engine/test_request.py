"""Sampling values: every limit is refused by name, NaN included, before anything runs."""

from __future__ import annotations

import dataclasses
import math

import pytest

from kvkeye.engine.request import MediaSpan, Request, SamplingParams, Sequence, State
from kvkeye.errors import RequestError

BAD = [
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "0.5"),
    ("temperature", True),
    ("temperature", None),
    ("top_p", 0.0),
    ("top_p", math.nan),
    ("top_p", 1.01),
    ("min_p", -0.01),
    ("min_p", math.nan),
    ("top_k", -2),
    ("top_k", 1.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 2.5),
    ("repetition_penalty", math.nan),
    ("presence_penalty", -2.5),
    ("frequency_penalty", math.inf),
    ("n", 0),
    ("n", 9),
    ("n", True),
    ("max_tokens", 0),
    ("max_tokens", 2**31),
    ("max_tokens", 8.0),
    ("seed", 2**63),
    ("seed", 1.0),
    ("logprobs", -1),
    ("logprobs", 21),
    ("stop", ""),
    ("stop", ["a"] * 5),
    ("stop", ["x" * 257]),
    ("stop", [1]),
    ("stop", {"a": 1}),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [0] * 129),
    ("stop_token_ids", "12"),
    ("ignore_eos", 1),
    ("skip_special_tokens", None),
]


@pytest.mark.parametrize("param, value", BAD)
def test_a_bad_value_is_refused_by_name(param, value):
    with pytest.raises(RequestError, match=f"SamplingParams.{param}") as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param


EDGES = [
    {"temperature": 0},
    {"temperature": 2.0},
    {"top_p": 1e-9},
    {"top_k": -1},
    {"min_p": 1.0},
    {"repetition_penalty": 2.0},
    {"presence_penalty": -2.0},
    {"n": 8},
    {"seed": -(2**63)},
    {"logprobs": 0},
    {"logprobs": 20},
    {"stop": "x" * 256},
    {"stop_token_ids": [0] * 128},
]


@pytest.mark.parametrize("values", EDGES)
def test_the_edge_of_each_range_is_allowed(values):
    params = SamplingParams(**values)
    for name, value in values.items():
        expected = {str: lambda v: (v,), list: tuple}.get(type(value), lambda v: v)(value)
        assert getattr(params, name) == (0 if name == "top_k" else expected)  # -1 and 0 both mean off


def test_values_are_normalised_and_frozen():
    params = SamplingParams(top_k=-1, stop="end", temperature=1, stop_token_ids=[3])
    assert (params.top_k, params.stop, params.stop_token_ids) == (0, ("end",), (3,))
    assert isinstance(params.temperature, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = math.nan


def test_many_greedy_answers_are_refused():
    with pytest.raises(RequestError, match="same"):
        SamplingParams(n=2, temperature=0)


def test_token_ids_are_checked_against_the_model():
    SamplingParams(stop_token_ids=[9]).check_vocab(10)
    with pytest.raises(RequestError, match=r"\[0, 10\)"):
        SamplingParams(stop_token_ids=[10]).check_vocab(10)


@pytest.mark.parametrize("spans", [[(0, 0)], [(3, 2), (0, 2)], [(0, 3), (2, 2)], [(6, 3)], [(-1, 2)]])
def test_media_spans_outside_the_prompt_are_refused(spans):
    media = tuple(MediaSpan(start, length, b"k") for start, length in spans)
    with pytest.raises(RequestError, match="media span"):
        Request("r", [1] * 8, SamplingParams(), max_tokens=1, media=media)


def test_media_between_finds_every_overlap():
    media = (MediaSpan(2, 3, b"a"), MediaSpan(5, 1, b"b"), MediaSpan(9, 4, b"c"))
    request = Request("r", [1] * 16, SamplingParams(), max_tokens=1, media=media)
    for start in range(16):
        for end in range(start + 1, 17):
            expected = [span for span in media if span.start < end and span.end > start]
            assert list(request.media_between(start, end)) == expected


def test_a_row_cannot_come_back_from_the_dead():
    request = Request("r", [1], SamplingParams(), max_tokens=1)
    seq = Sequence(0, request, 0, [1])
    seq.move_to(State.FINISHED)
    with pytest.raises(RuntimeError, match="finished to running"):
        seq.move_to(State.RUNNING)
