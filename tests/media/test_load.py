"""The entry point: both versions' rules on real clips and pictures, options, limits.

Expected frame types, counts and sizes were obtained by running keye-vl-utils 1.0.0 (Preview) and 1.5.2 (1.5) on the
same clips; `test_reference_package` repeats the comparison where the package can be imported.
"""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from kvkeye.errors import MediaError, RequestError
from kvkeye.media import slow_fast
from kvkeye.media.job import MediaSettings
from kvkeye.media.limits import MediaLimits
from kvkeye.media.load import load_media
from kvkeye.media.options import MediaOptions
from kvkeye.media.patches import patchify
from kvkeye.media.resize import BILINEAR
from kvkeye.media.sampling import VideoPolicy, sample_preview, sample_slow_fast
from kvkeye.media.slow_fast import FrameTyper, Patches, slow_fast_sizes
from tests.media.movies import greys, hide_frames, write_movie
from tests.samples import clip, photo

PREVIEW = MediaSettings("preview", 3136, 1_003_520)
HUB = MediaSettings("preview", 102_400, 1_003_520)
FAST = MediaSettings("1.5", 3136, 1_003_520, video=VideoPolicy.slow_fast())
LIMITS = MediaLimits(max_decode_seconds=600.0)  # the machine may be busy


def load(kind, source, settings=PREVIEW, limits=LIMITS, check_tokens=lambda tokens: None, **options):
    parsed = MediaOptions.parse(kind, options, "item")
    return load_media(kind, source, parsed, settings, limits, "item", check_tokens)


# Pictures


@pytest.mark.parametrize(
    ("settings", "options", "size"),
    [
        (PREVIEW, {}, (504, 504)),
        (PREVIEW, {"max_pixels": 50_176}, (224, 224)),
        (PREVIEW, {"min_pixels": 400_000}, (644, 644)),
        (PREVIEW, {"resized_height": 100, "resized_width": 300}, (112, 308)),
        (HUB, {"resized_height": 100, "resized_width": 100}, (336, 336)),
        (HUB, {"max_pixels": 50_176}, (224, 224)),
    ],
)
def test_picture_sizes(settings, options, size):
    item = load("image", photo("astronaut.png"), settings, **options)
    assert item.sizes == [size] and [g.shape for g in item.groups] == [(1, 512, 512, 3)]
    with Image.open(photo("astronaut.png")) as original:
        assert_packed(item, original.resize(size[::-1], Image.Resampling.BICUBIC))


def assert_packed(item, expected):
    """The patches of a loaded picture are those of `expected`, a PIL image."""
    half = (0.5, 0.5, 0.5)
    rows = patchify(item.groups, 14, half, half, item.sizes)
    assert torch.equal(rows, patchify([np.asarray(expected)[None]], 14, half, half))


def test_the_clients_own_resize_is_an_option():
    twice = MediaSettings("preview", 3136, 1_003_520, client_resize=True)
    big = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8))
    expected = big.resize((1988, 1512), Image.Resampling.BICUBIC).resize((1148, 868), Image.Resampling.BICUBIC)
    assert_packed(load("image", big, twice), expected)
    once = big.resize((1148, 840), Image.Resampling.BICUBIC)
    assert_packed(load("image", big), once)


def test_a_bilinear_checkpoint_resizes_as_pillow():
    bilinear = MediaSettings("preview", 3136, 1_003_520, resample=BILINEAR)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8))
    item = load("image", picture, bilinear)
    expected = picture.resize((196, 140), Image.Resampling.BILINEAR)
    assert item.resize_to is None and np.array_equal(item.groups[0][0], np.asarray(expected))


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("image", {"max_pixels": 2_000_000}, "max_pixels=2000000; at most 1.00352e"),
        (
            "image",
            {"max_pixels": 9000, "min_pixels": 8000, "resized_height": 100, "resized_width": 100},
            "resized_height",
        ),
        ("image", {"min_pixels": 2_000_000}, "min_pixels=2000000"),
        ("video", {"nframes": 1026}, "nframes=1026; at most 1024"),
        ("video", {"max_frames": 800}, "max_frames=800; at most 768"),
        ("video", {"max_pixels": 769 * 784}, "max_pixels"),
        ("video", {"total_pixels": 10**9}, "total_pixels"),
    ],
)
def test_options_only_lower_limits(kind, options, says):
    source = photo("astronaut.png") if kind == "image" else clip("carphone_pristine.mp4")
    with pytest.raises(RequestError, match=says) as raised:
        load(kind, source, **options)
    assert raised.value.param in options


def test_an_option_has_one_name_at_a_time():
    with pytest.raises(RequestError, match=r"'video_start' is given twice under two names"):
        MediaOptions.parse("video", {"start": 1.0, "video_start": 2.0}, "item")


# Preview clips


@pytest.mark.parametrize(
    ("name", "options", "shape", "fps"),
    [
        ("bikes", {}, (20, 280, 644), 2.0),
        ("bigbuckbunny", {}, (10, 560, 1008), 10 / 132 * 25),
        ("bigbuckbunny", {"fps": 3.3}, (16, 560, 1008), 16 / 132 * 25),
        ("carphone_pristine", {"nframes": 7}, (8, 308, 364), 8 / 120 * 30000 / 1001),
        ("bikes", {"video_start": 2.2, "video_end": 5.7}, (6, 280, 644), 6 / 87 * 25),
        ("bikes", {"start": 2.2, "end": 5.7}, (6, 280, 644), 6 / 87 * 25),
        ("bikes", {"total_pixels": 784 * 1200}, (20, 196, 476), 2.0),
        ("bikes", {"min_frames": 31}, (32, 280, 644), 3.2),
        ("bikes", {"max_frames": 9}, (8, 280, 644), 0.8),
        ("bikes", {"resized_height": 300, "resized_width": 500}, (20, 308, 504), 2.0),
    ],
)
def test_preview_clips(name, options, shape, fps):
    item = load("video", clip(f"{name}.mp4"), **options)
    assert [g.shape for g in item.groups] == [(*shape, 3)]
    assert item.seconds_per_grid == pytest.approx(1 / fps, rel=1e-12)
    assert item.timestamps is None and item.frame_types is None


def test_preview_pixels_are_bicubic_of_the_right_frames():
    import av

    item = load("video", clip("bikes.mp4"), nframes=4)
    with av.open(str(clip("bikes.mp4"))) as container:
        every = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    for got, index in zip(item.groups[0], [0, 83, 166, 249]):
        x = torch.from_numpy(every[index]).permute(2, 0, 1)[None].float()
        y = interpolate(x, size=(280, 644), mode="bicubic", antialias=True)[0].round().clamp(0, 255)
        assert np.array_equal(got, y.permute(1, 2, 0).to(torch.uint8).numpy())


def test_preview_small_frames_are_enlarged_again_by_the_picture_rule():
    options = {"nframes": 2, "max_pixels": 100_352}
    once = load("video", clip("bigbuckbunny.mp4"), **options).groups[0]
    twice = load("video", clip("bigbuckbunny.mp4"), HUB, **options).groups[0]
    assert once.shape == (2, 224, 420, 3) and twice.shape == (2, 252, 448, 3)  # 224 x 420 is below 102400
    for a, b in zip(once, twice):
        assert np.array_equal(b, np.asarray(Image.fromarray(a).resize((448, 252), Image.Resampling.BICUBIC)))


def test_preview_lists_are_padded_to_even_and_sized_as_pictures():
    item = load("video", greys(3, 100, 1000), fps=4.0)
    assert item.groups[0].shape == (4, 112, 1008, 3) and item.seconds_per_grid == 0.25
    assert [int(f[0, 0, 0]) for f in item.groups[0]] == [0, 4, 8, 8]
    assert load("video", greys(2)).seconds_per_grid == 0.5
    assert load("video", greys(2), resized_height=60, resized_width=90).groups[0].shape[1:3] == (56, 84)


def test_a_clip_of_one_frame_is_shown_twice():
    item = load("video", write_movie(greys(1)))
    assert item.groups[0].shape[0] == 2 and np.array_equal(item.groups[0][0], item.groups[0][1])
    assert len(load("video", write_movie(greys(1)), FAST).groups) == 1


# 1.5 clips


@pytest.mark.parametrize(
    ("name", "options", "types", "slow", "fast"),
    [
        ("bikes", {}, "01100000001011100110", (280, 644), (140, 336)),
        ("bigbuckbunny", {}, "0111011111", (560, 1008), (308, 532)),
        ("carphone_pristine", {"fps": 5.0}, "01111111111111111111", (196, 224), (196, 224)),
        (
            "bikes",
            {"fps": 8.0},
            "01111111110110101111101001011101100110111011011111011111111101010101110111111011",
            (280, 644),
            (140, 336),
        ),
        (
            "bigbuckbunny",
            {"fps": 10.0, "video_total_pixels": 784 * 2000, "min_frame_similarity": 1.0},
            "01000000001000011011101111111100001011010",
            (140, 252),
            (140, 252),
        ),
        ("bikes", {"max_pixels": 784 * 100, "max_frames": 7}, "0000000", (168, 420), None),
        ("bigbuckbunny", {"min_pixels": 784 * 60, "fps": 4.0}, "011111101111111111111", (560, 1008), (308, 532)),
    ],
)
def test_slow_and_fast_frames(name, options, types, slow, fast):
    item = load("video", clip(f"{name}.mp4"), FAST, **options)
    assert "".join(map(str, item.frame_types)) == types
    assert [g.shape for g in item.groups] == [(1, *(fast if t == "1" else slow), 3) for t in types]
    assert item.seconds_per_grid is None and item.timestamps[0] == 0.0
    assert len(item.timestamps) == len(types) and list(item.timestamps) == sorted(item.timestamps)


def test_timestamps_are_index_over_rate():
    item = load("video", clip("bikes.mp4"), FAST)
    indices = torch.linspace(0, 249, 20).round()
    np.testing.assert_array_equal(np.float32(item.timestamps), (indices.double() * (1 / 25)).float().numpy())


def test_solid_colours_are_typed_as_published():
    """The measure hardly sees hue: blue and red pass for alike, black does not."""
    colours = {"blue": (0, 0, 255), "red": (255, 0, 0), "black": (0, 0, 0)}
    order = ["blue", "blue", "blue", "red", "red", "blue", "black"]
    frames = [np.full((224, 224, 3), colours[name], np.uint8) for name in order]
    assert load("video", frames, FAST).frame_types == (0, 1, 1, 1, 1, 1, 0)
    black = [np.zeros((224, 224, 3), np.uint8)] * 3
    assert load("video", black, FAST).frame_types == (0, 1, 1)


@pytest.mark.parametrize(
    ("slow", "fast", "slow_size", "fast_size", "tokens"),
    [
        (1, 0, (560, 1008), (308, 532), 720),
        (10, 50, (560, 1008), (308, 532), 17_650),
        (120, 0, (476, 868), (252, 448), 63_240),
        (120, 480, (308, 588), (168, 308), 59_400),
        (200, 1000, (196, 336), (140, 252), 61_800),
        (1365, 0, (140, 252), (140, 252), 61_425),
    ],
)
def test_budget_table(slow, fast, slow_size, fast_size, tokens):
    sizes = slow_fast_sizes(1080, 1920, slow, fast, VideoPolicy.slow_fast())
    assert sizes == (slow_size, fast_size)
    assert sum(n * h * w // 784 for n, (h, w) in zip((slow, fast), sizes)) == tokens


def test_lists_in_1_5_have_times_only_with_fps():
    frames = [np.full((720, 1280, 3), 30 * k, np.uint8) for k in range(4)]
    plain = load("video", frames, FAST)
    assert plain.timestamps is None and len(plain.groups) == 4
    assert load("video", frames, FAST, fps=1.0).timestamps == (0.0, 1.0, 2.0, 3.0)
    assert load("video", frames, FAST, fps=1.0, max_frames=2).timestamps == (0.0, 3.0)


def test_large_clips_are_decoded_twice_instead_of_held():
    roomy = load("video", clip("bigbuckbunny.mp4"), FAST)
    tight = load("video", clip("bigbuckbunny.mp4"), FAST, replace(LIMITS, max_decoded_bytes=1 << 20))
    assert roomy.frame_types == tight.frame_types
    assert all(np.array_equal(a, b) for a, b in zip(roomy.groups, tight.groups, strict=True))


def test_first_frame_is_slow_and_state_follows_the_last_slow_frame():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 256, (196, 196, 3), np.uint8) for _ in range(2))
    typer = FrameTyper(196, 196, VideoPolicy.slow_fast(), None)
    kinds = [typer.type(frame) for frame in (a, a, np.zeros_like(a), np.zeros_like(a), a, b)]
    assert kinds[:5] == [0, 1, 0, 1, 0]


def test_nine_similar_patches_of_ten_are_not_enough():
    """0.9 in single precision is below 0.9; the reference calls such a frame slow."""
    frame = np.random.default_rng(0).integers(40, 256, (140, 280, 3), np.uint8)  # 50 patches
    typer = FrameTyper(140, 280, VideoPolicy.slow_fast(), None)
    kinds = []
    for black in (0, 4, 5, 6):
        changed = frame.copy()
        changed[:28, : 28 * black] = 0
        typer.last_slow = None
        typer.type(frame)
        kinds.append(typer.type(changed))
    assert typer.size == (140, 280) and kinds == [1, 1, 0, 0]


def test_a_cosine_within_rounding_of_the_threshold_is_decided_as_published(monkeypatch):
    """The exact cosine decides, but for patches that the reference's fp32 sums may put on either side."""
    levels = torch.randint(0, 256, (2, 10, 2352), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    a, b = (Patches(rows, rows.double().square().sum(1)) for rows in levels)
    exact = (levels[0].double() * levels[1].double()).sum(1) / (a.squares * b.squares).sqrt()
    asked, published = [], slow_fast._published_cosines
    monkeypatch.setattr(slow_fast, "_published_cosines", lambda *args: asked.append(args) or published(*args))
    typer = FrameTyper(280, 28, VideoPolicy.slow_fast(), None)
    for threshold, is_close in ((float(exact[3]), True), (float(exact.max()) + 0.01, False)):
        asked.clear()
        typer.patch_threshold = threshold
        typer.threshold = 1.0
        by_reference = float((published(*levels) > threshold).float().mean()) < 1.0
        assert typer._differs(a, b) == by_reference
        assert bool(asked) == is_close


# Sampling


@pytest.mark.parametrize(
    ("total", "fps", "options", "count"),
    [
        (250, 25.0, {}, 20),
        (24, 24.0, {}, 4),  # never below min_frames
        (3, 30.0, {}, 2),
        (100_000, 25.0, {}, 768),
        (100_000, 25.0, {"nframes": 9}, 8),  # 4.5 pairs round to even
        (50, 25.0, {"fps": 100.0}, 50),
        (51, 25.0, {"fps": 100.0}, 50),
    ],
)
def test_preview_counts(total, fps, options, count):
    got = sample_preview(total, fps, MediaOptions.parse("video", options, "x"), VideoPolicy(), 1024, "x")
    assert len(got.indices) == count and got.indices[0] == 0 and got.indices[-1] == total - 1
    assert got.fps == pytest.approx(count / total * fps)
    assert got.indices == torch.linspace(0, total - 1, count).round().long().tolist()


def test_slow_fast_counts():
    policy = VideoPolicy.slow_fast()

    def count(total, fps, most=5000, **options):
        parsed = MediaOptions.parse("video", options, "x")
        return len(sample_slow_fast(total, fps, parsed, policy, most, "x").indices)

    assert count(250, 25.0) == 20
    assert count(100_000, 25.0) == 1365  # total pixels over least pixels
    assert count(10, 25.0) == 1  # the reference fails below half a second
    assert count(10, 1.0) == 10  # never above the clip's own rate
    assert count(100_000, 25.0, min_pixels=784 * 96) == 682
    assert count(100_000, 25.0, max_frames=100) == 100
    assert count(100_000, 25.0, most=64) == 64


@pytest.mark.parametrize("span", [{"video_start": 8.0, "video_end": 3.0}, {"video_start": 99.0}, {"video_end": 0.0}])
def test_empty_ranges_are_refused(span):
    with pytest.raises(MediaError, match=r"the clip lasts 10\.00 s \(250 frames\)"):
        load("video", clip("bikes.mp4"), **span)


def test_impossible_counts_are_refused():
    with pytest.raises(MediaError, match="300 frames wanted; the clip has 250"):
        load("video", clip("bikes.mp4"), nframes=300)


# Limits and sources


def test_the_servers_frame_limit_lowers_the_rate_and_says_so(caplog):
    item = load("video", clip("bikes.mp4"), limits=replace(LIMITS, max_frames=9))
    assert item.groups[0].shape[0] == 8 and item.seconds_per_grid == pytest.approx(250 / 8 / 25)
    assert "9 of 250 frames" in caplog.text
    assert len(load("video", clip("bikes.mp4"), FAST, replace(LIMITS, max_frames=9)).groups) == 9


def test_memory_is_checked_before_decoding():
    with pytest.raises(MediaError, match="20 frames of 644x280 pixels take 10819200 bytes; at most 1048576"):
        load("video", clip("bikes.mp4"), limits=MediaLimits(max_decoded_bytes=1 << 20))


@pytest.mark.parametrize(("settings", "tokens"), [(PREVIEW, 20 * 230), (FAST, 12 * 230 + 8 * 60)])
def test_tokens_can_be_refused(settings, tokens):
    def refuse(count):
        raise RequestError(f"{count} are too many")

    with pytest.raises(RequestError, match=f"^{tokens} are too many"):
        load("video", clip("bikes.mp4"), settings, check_tokens=refuse)


def test_clip_sources_agree(tmp_path):
    data = write_movie(greys(8))
    path = tmp_path / "a clip.mp4"
    path.write_bytes(data)
    encoded = "data:video/mp4;base64," + base64.b64encode(data).decode()
    expected = load("video", path)
    for source in (str(path), path.as_uri(), data, memoryview(data), encoded):
        assert np.array_equal(load("video", source).groups[0], expected.groups[0])


def test_jpeg_frames_in_one_address():
    """The published client's form: base64 JPEG frames joined by commas."""

    def jpeg(level):
        buffer = io.BytesIO()
        Image.new("RGB", (56, 56), (level,) * 3).save(buffer, "JPEG")
        return base64.b64encode(buffer.getvalue()).decode()

    address = "data:video/jpeg;base64," + ",".join(jpeg(k) for k in (10, 90, 200, 250))
    item = load("video", address, fps=1.0)
    assert [int(f.mean().round()) for f in item.groups[0]] == [10, 90, 200, 250] and item.seconds_per_grid == 1.0
    with pytest.raises(MediaError, match="4 frames; at most 3"):
        load("video", address, limits=MediaLimits(max_frames=3))
    with pytest.raises(MediaError, match="frame 4: 3 bytes"):
        load("video", address + ",AAAA")
    with pytest.raises(MediaError, match="10001 frames; at most 1024"):
        load("video", "data:video/jpeg;base64," + "," * 10_000)


@pytest.mark.parametrize("settings", [PREVIEW, FAST])
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "0 frames"),
        (b"", "empty"),
        (7, "type int"),
        ("data:video/mp4;base64,", "empty|no MP4"),
        ("data:video/mp4;base64,AAAA", "no MP4"),
        ("http://example.com/a.mp4", "not fetched"),
        ("no/such.mp4", "cannot open"),
    ],
)
def test_unusable_clips(settings, source, says):
    with pytest.raises(MediaError, match=says):
        load("video", source, settings)


@pytest.mark.parametrize("settings", [PREVIEW, FAST])
def test_hidden_frames_are_planned_around(settings):
    data = hide_frames(write_movie(greys(30), "libvpx", "webm"), hidden=[4, 5, 11, 12, 13])
    item = load("video", data, settings, fps=25.0)
    frames = [frame for group in item.groups for frame in group]
    assert len(frames) == (24 if settings is PREVIEW else 25)
    levels = [float(f.mean()) for f in frames]
    assert levels[0] < 4 and levels[-1] > 112


# Room in the context


@pytest.mark.parametrize(
    ("room", "shape"),
    [
        (4600, (20, 280, 644)),  # the published rule just fits
        (4000, (20, 252, 588)),  # 200 tokens per frame: sides over 1.054, floored to 28
        (2000, (14, 196, 504)),  # 14 frames of 134 tokens, the least there is
    ],
)
def test_a_preview_clip_is_shrunk_to_the_room(room, shape, caplog):
    plain = MediaOptions()
    item = load_media("video", clip("bikes.mp4"), plain, PREVIEW, LIMITS, "item", room=room)
    frames, height, width, _ = item.groups[0].shape
    assert (frames, height, width) == shape and frames * height * width // 784 <= room
    assert item.seconds_per_grid == pytest.approx(250 / frames / 25)
    assert ("item: 4600 tokens by the checkpoint's rule" in caplog.text) == (room < 4600)


def test_a_1_5_clip_is_shrunk_to_the_room(caplog):
    item = load_media("video", clip("bikes.mp4"), MediaOptions(), FAST, LIMITS, "item", room=1500)
    assert "".join(map(str, item.frame_types)) == "01100000001011100110"
    assert sum(g.shape[1] * g.shape[2] // 784 for g in item.groups) <= 1500
    assert "3240 tokens" in caplog.text


def test_a_request_that_sets_its_cost_is_not_shrunk():
    options = MediaOptions.parse("video", {"fps": 2.0}, "item")
    assert load_media("video", clip("bikes.mp4"), options, PREVIEW, LIMITS, "item", room=10).groups[0].shape[0] == 20
