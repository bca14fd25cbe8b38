"""Pictures of every mode and origin, and what is refused before its pixels are decoded."""

from __future__ import annotations

import base64
import io
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kvkeye.errors import MediaError
from kvkeye.media.decode import picture
from kvkeye.media.image import load_image
from kvkeye.media.limits import MediaLimits
from tests.media.corpus import animated as frames
from tests.media.corpus import bomb, encode, noise
from tests.samples import photo

LIMITS = MediaLimits()


PIXELS = noise(13, 21, 3)


@pytest.mark.parametrize("kind", ["path", "string", "uri", "bytes", "bytearray", "data", "pil", "numpy", "torch"])
def test_every_origin_gives_the_same_pixels(kind, tmp_path):
    data = encode(Image.fromarray(PIXELS))
    path = tmp_path / "a picture.png"
    path.write_bytes(data)
    source = {
        "path": path,
        "string": str(path),
        "uri": path.as_uri(),
        "bytes": data,
        "bytearray": bytearray(data),
        "data": "data:image/png;base64," + base64.b64encode(data).decode(),
        "pil": Image.fromarray(PIXELS),
        "numpy": PIXELS,
        "torch": torch.from_numpy(PIXELS).permute(2, 0, 1),
    }[kind]
    got = load_image(source, LIMITS)
    assert got.dtype == np.uint8 and got.flags.c_contiguous and np.array_equal(got, PIXELS)


def test_one_channel_and_four_channel_arrays():
    grey = noise(5, 7)
    expected = np.repeat(grey[..., None], 3, axis=2)
    for source in (grey, grey[..., None], torch.from_numpy(grey)[None]):
        assert np.array_equal(load_image(source, LIMITS), expected)
    rgba = noise(5, 7, 4)
    rgba[..., 3] = 255
    assert np.array_equal(load_image(rgba, LIMITS), rgba[..., :3])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_formats(kind):
    with Image.open(photo("astronaut.png")) as original:
        small = original.resize((64, 48))
    got = load_image(encode(small, kind), LIMITS)
    assert abs(got.astype(int) - np.asarray(small)).mean() < 8  # JPEG and WebP lose a little


def test_modes_without_colour():
    grey = noise(6, 8)
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(load_image(encode(Image.fromarray(grey)), LIMITS), as_rgb)
    bits = Image.fromarray(grey).convert("1")
    assert set(np.unique(load_image(encode(bits), LIMITS))) <= {0, 255}
    wide = np.array([[0, 257, 32896, 65535]], np.uint16)
    got = load_image(encode(Image.fromarray(wide)), LIMITS)
    assert got[0, :, 0].tolist() == [0, 1, 128, 255]
    with pytest.raises(MediaError, match="floating-point"):
        load_image(Image.new("F", (4, 4)), LIMITS)


def test_palette_and_cmyk():
    palette = Image.fromarray(PIXELS).quantize(7)
    assert np.array_equal(load_image(encode(palette), LIMITS), np.asarray(palette.convert("RGB")))
    cmyk = Image.fromarray(PIXELS).convert("CMYK")
    data = encode(cmyk, "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as reopened:
        assert reopened.mode == "CMYK"
        assert np.array_equal(load_image(data, LIMITS), np.asarray(reopened.convert("RGB")))


def test_transparency_lies_on_white_unless_asked_otherwise():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]
    source = encode(Image.fromarray(rgba))
    assert load_image(source, LIMITS)[0].tolist() == [[200, 0, 0], [255, 255, 255], [227, 127, 127]]
    assert load_image(source, LIMITS, alpha="drop")[0].tolist() == [[200, 0, 0]] * 3
    la = Image.fromarray(rgba).convert("LA")
    assert load_image(encode(la), LIMITS)[0, 1].tolist() == [255] * 3
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 50, 60, 70])
    palette.putpixel((1, 0), 1)
    assert load_image(encode(palette, transparency=0), LIMITS)[0].tolist() == [[255] * 3, [50, 60, 70]]
    key = encode(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3))
    assert load_image(key, LIMITS)[0].tolist() == [[255] * 3, [4, 5, 6]]


def test_simplejpeg_gives_pillows_pixels(monkeypatch):
    """Sampling of colours, order of scans, sides that are no multiples of anything, quality from worst to best."""
    assert picture.simplejpeg is not None, "install the test extras: pip install -e .[test]"
    with Image.open(photo("rocket.jpg")) as original:
        crops = [original.resize(size) for size in ((1, 1), (17, 90), (301, 199))]
    sources = [
        encode(crop, "JPEG", subsampling=sampling, progressive=progressive, quality=quality)
        for crop in crops
        for sampling in (0, 1, 2)
        for progressive in (False, True)
        for quality in (3, 75, 100)
    ]
    fast = [load_image(source, LIMITS) for source in sources]
    monkeypatch.setattr(picture, "simplejpeg", None)
    assert all(np.array_equal(a, load_image(source, LIMITS)) for a, source in zip(fast, sources, strict=True))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """Each of the eight values names the edges at which the first row and the first column of the data belong."""
    upright = noise(5, 7, 3)
    to_data = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[::-1],  # first row at the right: data turned left
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    }
    data = np.ascontiguousarray(to_data[orientation](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = encode(Image.fromarray(data), exif=exif)
    assert np.array_equal(load_image(source, LIMITS), upright)
    assert np.array_equal(load_image(source, LIMITS, apply_orientation=False), data)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_not_fatal():
    source = encode(Image.fromarray(PIXELS), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(load_image(source, LIMITS), PIXELS)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded():
    data = bomb(13_000, 13_000)
    assert len(data) < 300_000
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_bytes()
    with pytest.raises(MediaError, match="13000x13000 pixels; at most 16384 per side and 64000000"):
        load_image(data, LIMITS)
    assert peak_bytes() - before < 30 << 20  # decoded it would be 169 MB
    with pytest.raises(MediaError, match="more than 64000000 pixels"):
        load_image(bomb(30_000, 7_000), LIMITS)


def peak_bytes():
    """Largest resident size of this process since the peak was last reset."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_peak_shows_what_is_decoded():
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    load_image(bomb(8_000, 4_000), LIMITS)
    assert peak_bytes() - before > 90 << 20


def text_file():
    return b"This is a text file.\n" * 30


def truncated_jpeg():
    data = photo("rocket.jpg").read_bytes()
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (text_file(), "630 bytes that are no readable JPEG, PNG or WebP"),
        (truncated_jpeg(), "truncated or damaged"),
        (encode(Image.new("RGB", (64, 64)))[:-30], "truncated or damaged"),
        (encode(Image.new("L", (2010, 10))), r"aspect ratio of 201\.0"),
        (encode(Image.new("L", (16_400, 100))), "at most 16384 per side"),
        (frames("GIF", 500), "no readable"),
        (frames("PNG", 3), "an animated PNG"),
        (frames("WEBP", 3), "an animated WEBP"),
        (encode(Image.new("RGB", (4, 4)), "TIFF"), "no readable"),
        (b"", "the file is empty"),
        (bytes(21 << 20), "22020096 encoded bytes; at most 20971520"),
        ("data:image/png;base64,AA*A", "base64 text is malformed"),
        ("data:image/png,AAAA", "required is data:<type>;base64"),
        ("data:;base64," + "A" * 80_000_000, "at most 20971520"),
        ("no/such/file.png", "cannot open 'no/such/file.png'"),
        ("https://example.com/a.png", "not fetched"),
        ("ftp://example.com/a.png", "not fetched"),
        ("file://elsewhere/a.png", "not fetched"),
        ("a\0.png", "NUL"),
        ("/dev/zero", "not a regular file"),
        (".", "not a regular file"),
        (7, "type int"),
        (None, "type NoneType"),
        (noise(2, 3, 4, 3), "uint8"),
        (noise(4, 4, 2), "uint8"),
        (noise(4, 4, 3).astype(np.float32), "float32"),
        (torch.zeros(4, 4), "uint8"),
        (torch.zeros(3, 4, 4), "float32"),
        (np.zeros((0, 4, 3), np.uint8), "at least 1"),
        (Image.new("RGB", (0, 5)), "at least 1"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else type(value).__name__,
)
def test_unusable_pictures(source, says):
    with pytest.raises(MediaError, match=says) as raised:
        load_image(source, LIMITS, "messages[0].content[1]")
    message = str(raised.value)
    assert message.startswith("messages[0].content[1]: ")
    assert not re.search(r"\b0x[0-9a-f]{6}", message) and len(message) < 400  # no addresses, no payloads


def test_paths_can_be_switched_off(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.new("RGB", (4, 4))))
    closed = MediaLimits(may_read_files=False)
    for source in (path, str(path), path.as_uri()):
        with pytest.raises(MediaError, match="reads no local files"):
            load_image(source, closed)
    assert load_image(path.read_bytes(), closed).shape == (4, 4, 3)


def test_random_damage_never_escapes():
    """Flipped and cut bytes give a picture or a MediaError, nothing else."""
    rng = np.random.default_rng(5)
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = encode(Image.fromarray(noise(40, 40, 3)), kind)
        for _ in range(60):
            data = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(0, 256)
            with suppress(MediaError):
                assert load_image(bytes(data), LIMITS).shape[2] == 3
