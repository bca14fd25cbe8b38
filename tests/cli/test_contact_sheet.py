"""The contact sheet, read back: every frame in its place and order, facts under it, bounded size, refusals first."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from PIL import Image

from kvkeye.cli.contact_sheet import LINE, MARGIN, TITLE_SIZE, Item, Shot, contact_sheet, items_of, lay_out
from kvkeye.media.limits import MediaLimits
from kvkeye.media.load import load_media
from kvkeye.media.options import MediaOptions
from kvkeye.models.keye import KeyeProcessor
from kvkeye.testing.tiny import write_tiny_checkpoint
from tests.media.movies import greys, write_movie
from tests.samples import clip, photo


def colour(number):
    return ((number * 37) % 200 + 30, (number * 91) % 200 + 30, (number * 53) % 200 + 30)


def shot(number, height=56, width=112, kind="slow", time=None):
    pixels = np.broadcast_to(np.array(colour(number), np.uint8), (height, width, 3))
    return Shot(pixels, kind, 8, number / 2 if time is None else time)


def clip_of(count, name="clip.mp4", **size):
    return Item(name, [shot(number, **size) for number in range(count)])


def centre(sheet, box):
    return sheet.getpixel(((box[0] + box[2]) // 2, (box[1] + box[3]) // 2))


def has_ink(sheet, box):
    return np.asarray(sheet.crop(box)).min() < 140


@pytest.mark.parametrize("count", [1, 2, 7, 30, 121])
def test_frames_stand_in_reading_order(count):
    items = [clip_of(count)]
    sheet, (places, _, size) = contact_sheet(items), lay_out(items)
    assert sheet.size == size and [place.shot for place in places] == list(range(count))
    for number, place in enumerate(places):
        assert centre(sheet, place.box) == colour(number)
        left, _, right, bottom = place.box
        for line in (0, 1):
            assert has_ink(sheet, (left, bottom + 2 + line * LINE, right, bottom + 2 + (line + 1) * LINE))
    for before, after in itertools.pairwise(place.box for place in places):
        assert after[0] >= before[2] or after[1] >= before[3] + 2 * LINE, "two frames overlap"


def test_frames_are_pasted_whole_and_unchanged_where_they_fit():
    pixels = np.random.default_rng(0).integers(0, 256, (84, 140, 3), np.uint8)
    items = [Item("a", [Shot(pixels, "image", 15)])]
    (place,) = lay_out(items)[0]
    assert np.array_equal(np.asarray(contact_sheet(items).crop(place.box)), pixels)


def test_several_items_follow_each_other_under_their_titles():
    items = [clip_of(3, "one.mp4"), Item("two.png", [shot(50, 200, 100, "image")]), clip_of(2, "three.mp4")]
    sheet, (places, titles, size) = contact_sheet(items), lay_out(items)
    assert [(place.item, place.shot) for place in places] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert titles == sorted(titles)
    for item, top in enumerate(titles):
        assert has_ink(sheet, (MARGIN, top, size[0] - MARGIN, top + TITLE_SIZE))
        boxes = [place.box for place in places if place.item == item]
        assert all(box[1] > top + TITLE_SIZE for box in boxes)
        assert all(box[3] < following for box in boxes for following in titles[item + 1 : item + 2])
    assert items[0].title == "one.mp4: 3 frames, 24 tokens" and items[1].title == "two.png: 1 picture, 8 tokens"


@pytest.mark.parametrize(
    ("count", "height", "width"), [(1024, 252, 448), (1, 4004, 2996), (3, 28, 5600), (9, 5600, 28)]
)
def test_any_number_and_shape_gives_a_sheet_of_bounded_size(count, height, width):
    items = [clip_of(count, height=height, width=width)]
    places, _, (sheet_width, sheet_height) = lay_out(items)
    assert sheet_width <= 1600 and sheet_height <= 9000
    for left, top, right, bottom in (place.box for place in places):
        assert 0 < left < right <= sheet_width and 0 < top < bottom < sheet_height


def test_a_long_name_keeps_its_end():
    items = [Item("x" * 500 + ".mp4", [shot(1)])]
    sheet = contact_sheet(items)
    assert sheet.width <= 1600 and not has_ink(sheet, (sheet.width - MARGIN, 0, sheet.width, sheet.height))


@pytest.fixture(scope="module", params=["preview", "1.5"])
def processor(request, tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", request.param)
    built = KeyeProcessor.from_folder(folder, media_workers=0)
    yield built
    built.close()


def _at_size(frame, size):
    """Pictures are resized as they are cut into patches."""
    if size is None:
        return frame
    return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sheet_shows_the_pixels_that_the_model_gets(processor, dtype, monkeypatch):
    """Normalisation is undone to the very levels that the media loader gave, also from bf16."""
    movie, picture = write_movie(greys(30), fps=10), str(photo("coffee.png"))
    monkeypatch.setattr(processor, "pixel_dtype", dtype)
    content = [{"type": "video", "video": movie}, {"type": "image", "image": picture}, {"type": "text", "text": "?"}]
    media = processor.process([{"role": "user", "content": content}]).media
    settings = processor.preprocessor
    items = items_of(["clip", "picture"], media, settings.mean, settings.std, 2)
    sources = (("video", movie), ("image", picture))
    for item, (kind, source) in zip(items, sources):
        loaded = load_media(kind, source, MediaOptions(), settings.media, MediaLimits(), kind)
        frames = [_at_size(frame, loaded.resize_to) for group in loaded.groups for frame in group]
        assert len(frames) == len(item.shots)
        assert all(np.array_equal(shot.pixels, frame) for shot, frame in zip(item.shots, frames))
    assert [sum(shot.num_tokens for shot in item.shots) for item in items] == [item.num_tokens for item in media]
    assert items[1].shots[0].kind == "image" and items[1].shots[0].time is None


def test_kinds_and_times_are_the_processors(processor):
    content = [{"type": "video", "video": str(clip("bikes.mp4")), "fps": 2.0, "video_end": 4.0, "max_pixels": 40_000}]
    prompt = processor.process([{"role": "user", "content": content}])
    (item,) = items_of(["bikes.mp4"], prompt.media, processor.preprocessor.mean, processor.preprocessor.std, 2)
    times = [shot.time for shot in item.shots]
    assert times[0] == 0 and times == sorted(times) and 3 < times[-1] <= 4
    if processor.config.version == "preview":
        assert {shot.kind for shot in item.shots} == {"frame"}
    else:
        assert [shot.kind for shot in item.shots] == [("slow", "fast")[k] for k in prompt.media[0].frame_types]
        assert {shot.kind for shot in item.shots} == {"slow", "fast"}


# The command

GREEDY = ("--temperature", "0", "--max-tokens", "4", "--dtype", "float32")


def test_the_command_writes_the_sheet_and_answers_all_the_same(call, model, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(write_movie(greys(30), fps=10))
    words = ["run", model, "--video", tmp_path / "clip.mp4", "--image", photo("coffee.png"), "What?", *GREEDY]
    plain, shown = call(*words), call(*words, "--show-frames", tmp_path / "out.png")
    assert (shown.code, shown.out) == (0, plain.out)
    assert "clip.mp4: " in shown.err and "coffee.png: 1 picture, " in shown.err and "out.png" in shown.err
    with Image.open(tmp_path / "out.png") as sheet:
        assert f"{sheet.width} x {sheet.height}" in shown.err


@pytest.mark.parametrize(
    ("target", "words"),
    [("missing/out.png", "No such file"), ("folder.png", "directory"), ("out.gif", r"\.png"), ("out", r"\.png")],
)
def test_a_path_that_cannot_be_written_is_refused_before_the_model_is_loaded(call, tmp_path, target, words):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "config.json").write_text("{}")  # a model that could not be loaded
    done = call("run", tmp_path, "--image", photo("coffee.png"), "What?", "--show-frames", tmp_path / target)
    assert done.code == 2 and target in done.err
    assert re.search(words, done.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "folder.png"]


def test_without_media_there_is_nothing_to_show(call, model, tmp_path):
    done = call("run", model, "What?", "--show-frames", tmp_path / "out.png")
    assert done.code == 2 and "--image" in done.err
