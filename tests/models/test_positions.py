"""Position ids against the vectors of the reference and against a direct walk over the rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeye.models.keye.positions import MediaGrid, mrope_positions


def preview_prompt(seconds_per_grid):
    """4 text, image 1x6x8, 4 text, image 1x4x10, 3 text, clip 3x4x6, 4 text: 55 tokens."""
    blocks = [
        (4, MediaGrid("image", (1, 6, 8))),
        (20, MediaGrid("image", (1, 4, 10))),
        (33, MediaGrid("video", (3, 4, 6), seconds_per_grid)),
    ]
    return mrope_positions(55, blocks)


@pytest.mark.parametrize(("seconds", "times"), [(0.5, [20, 21, 22]), (0.4, [20, 20, 21])])
def test_preview_vector(seconds, times):
    positions, delta = preview_prompt(seconds)
    t, h, w = positions.tolist()

    def text(first, last):
        return [[p] * 3 for p in range(first, last + 1)]

    columns = [list(c) for c in zip(t, h, w)]
    assert columns[:4] == text(0, 3)
    assert columns[4:16] == [[4, 4 + i, 4 + j] for i in range(3) for j in range(4)]
    assert columns[16:20] == text(8, 11)
    assert columns[20:30] == [[12, 12 + i, 12 + j] for i in range(2) for j in range(5)]
    assert columns[30:33] == text(17, 19)
    assert columns[33:51] == [[f, 20 + i, 20 + j] for f in times for i in range(2) for j in range(3)]
    assert columns[51:] == text(23, 26)
    assert delta == -28


def test_1_5_frames_are_blocks_of_their_own():
    # [3 text][start][frame + 4 number tokens][2x3 pads][frame + 4][2x3 pads][end]
    frame = MediaGrid("video", (1, 4, 6))
    positions, delta = mrope_positions(27, [(9, frame), (20, frame)])
    columns = [list(c) for c in zip(*positions.tolist())]
    assert columns[:9] == [[p] * 3 for p in range(9)]
    assert columns[9:15] == [[9, 9 + i, 9 + j] for i in range(2) for j in range(3)]
    assert columns[15:20] == [[p] * 3 for p in range(12, 17)]
    assert columns[20:26] == [[17, 17 + i, 17 + j] for i in range(2) for j in range(3)]
    assert columns[26] == [20] * 3 and delta == 21 - 27


def test_long_clip_clock_outlives_its_sides():
    positions, delta = mrope_positions(41, [(0, MediaGrid("video", (40, 2, 2), 1.0))])
    assert positions[0].tolist() == [2 * f for f in range(40)] + [79]
    assert delta == 80 - 41


def test_the_clock_truncates_in_single_precision():
    grid = MediaGrid("video", (600, 2, 2), 1 / 29.97)
    positions, _ = mrope_positions(600, [(0, grid)])
    expected = (torch.arange(600) * torch.tensor(1 / 29.97) * 2).long()  # integer tensor times fp32 scalar
    assert torch.equal(positions[0], expected)


def test_text_only_and_empty():
    positions, delta = mrope_positions(5, [])
    assert torch.equal(positions, torch.arange(5).expand(3, 5)) and delta == 0
    positions, delta = mrope_positions(0, [])
    assert positions.shape == (3, 0) and positions.dtype == torch.int64 and delta == 0


@pytest.mark.parametrize("start", [3, 20])
def test_blocks_must_fit(start):
    with pytest.raises(ValueError, match="overlaps"):
        mrope_positions(10, [(0, MediaGrid("image", (1, 4, 4))), (start, MediaGrid("image", (1, 4, 4)))])


def walk(parts):
    """The rules token by token, in plain Python."""
    columns, p = [], 0
    for part in parts:
        if isinstance(part, int):
            columns += [[p + k] * 3 for k in range(part)]
            p += part
            continue
        t, a, b = part.grid_thw[0], part.grid_thw[1] // 2, part.grid_thw[2] // 2
        seconds = part.seconds_per_grid or 0.0
        block = [[p + int(f * seconds * 2), p + i, p + j] for f in range(t) for i in range(a) for j in range(b)]
        columns += block
        p = 1 + max(max(c) for c in block)
    return columns, p


# Seconds with exact products, so that double and single precision truncate alike.
grids = st.builds(
    MediaGrid,
    st.just("video"),
    st.tuples(st.integers(1, 5), st.integers(1, 5).map(lambda n: 2 * n), st.integers(1, 5).map(lambda n: 2 * n)),
    st.sampled_from([None, 0.25, 0.5, 1.0, 1.75]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 7), grids), max_size=8))
def test_any_prompt_matches_the_walk(parts):
    blocks, length = [], 0
    for part in parts:
        if isinstance(part, MediaGrid):
            blocks.append((length, part))
        length += part if isinstance(part, int) else part.num_tokens()
    positions, delta = mrope_positions(length, blocks)
    columns, p_end = walk(parts)
    assert positions.T.tolist() == columns
    assert delta == p_end - length
