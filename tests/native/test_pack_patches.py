"""pack_patches and resize_image on the CPU: bit by bit against Pillow and PyTorch, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from kvkeye import ops
from kvkeye.media.resize import processor_size
from kvkeye.ops import _library
from tests.native.pack_calls import CLIP, HALF, pictures
from tests.samples import photo

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(_library.native("cpp").path is None, reason=f"no C++ library: {_library.native('cpp').reason}"),
    pytest.mark.skipif(int(PIL.__version__.split(".")[0]) > 12, reason="Pillow 13 orders the two passes otherwise"),
]
sides = st.one_of(st.integers(1, 6), st.integers(1, 90), st.integers(1, 500))


@pytest.fixture(autouse=True)
def only_cpp():
    with ops.use_backends("cpp"):
        yield


def noise(height: int, width: int, seed: int, extreme: bool = False) -> np.ndarray:
    """Random levels; extreme ones drive the sums beyond 0 and 255."""
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(picture > 127, 255, 0).astype(np.uint8) if extreme else picture


def with_pillow(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Horizontally first, also where Pillow itself would begin with the other pass: for very tall pictures."""
    wide = Image.fromarray(picture).resize((columns, picture.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(wide.resize((columns, rows), Image.Resampling.BICUBIC))


def with_torch(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
    resized = interpolate(planes, size=(rows, columns), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def rows_of(picture: np.ndarray, patch: int, mean: list[float], std: list[float], dtype: torch.dtype) -> Tensor:
    """Normalised by PyTorch, cut by numpy."""
    height, width, _ = picture.shape
    cut = picture.reshape(height // patch, patch, width // patch, patch, 3).transpose(0, 2, 4, 1, 3)
    levels = torch.from_numpy(cut.reshape(-1, 3, patch**2).astype(np.float32))
    values = levels.div_(255).sub_(torch.tensor(mean)[:, None]).div_(torch.tensor(std)[:, None])
    return values.flatten(1).to(dtype)


@settings(max_examples=250, deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 99), st.booleans())
def test_bicubic_levels_are_pillows(height, width, rows, columns, seed, extreme):
    picture = noise(height, width, seed, extreme)
    resized = ops.resize_image(torch.from_numpy(picture), rows, columns, False).numpy()
    assert np.array_equal(resized, with_pillow(picture, rows, columns))


@settings(max_examples=250, deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 99), st.booleans())
def test_bilinear_levels_are_torchs(height, width, rows, columns, seed, extreme):
    picture = noise(height, width, seed, extreme)
    resized = ops.resize_image(torch.from_numpy(picture), rows, columns, True).numpy()
    assert np.array_equal(resized, with_torch(picture, rows, columns))


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("size", [(3000, 30, 14, 28), (30, 3000, 28, 14), (4000, 3000, 30, 40), (1, 4000, 7, 3)])
def test_far_smaller(size, bilinear):
    height, width, rows, columns = size
    picture = noise(height, width, 0)
    expected = (with_torch if bilinear else with_pillow)(picture, rows, columns)
    assert np.array_equal(ops.resize_image(torch.from_numpy(picture), rows, columns, bilinear).numpy(), expected)


@settings(max_examples=120, deadline=None)
@given(
    sides, sides, st.integers(1, 12), st.integers(1, 25), st.sampled_from([14, 16, 5, 20, 33]), st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([HALF, CLIP]),
)  # fmt: skip
def test_rows_are_those_of_the_resized_picture(height, width, down, across, patch, bilinear, dtype, values):
    picture = noise(height, width, 1)
    rows, columns = down * patch, across * patch
    same = (height, width) == (rows, columns)
    resized = picture if same else (with_torch if bilinear else with_pillow)(picture, rows, columns)
    packed = ops.pack_patches([torch.from_numpy(picture)], [rows, columns], *values, bilinear, patch, dtype)
    assert torch.equal(packed, rows_of(resized, patch, *values, dtype))


@pytest.mark.parametrize("name", ["astronaut.png", "rocket.jpg", "chelsea.png", "coffee.png", "hubble_deep_field.jpg"])
def test_photographs_at_the_checkpoints_size(name):
    picture = np.asarray(Image.open(photo(name)).convert("RGB"))
    rows, columns = processor_size(*picture.shape[:2], 3136, 1_003_520)
    resized = np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC))
    image = torch.from_numpy(picture.copy())
    packed = ops.pack_patches([image], [rows, columns], *HALF, False, 14, torch.bfloat16)
    assert torch.equal(packed, rows_of(resized, 14, *HALF, torch.bfloat16))


@pytest.mark.parametrize("std", [1e-38, 1e38, 3e-39, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_at_the_edge_of_the_range(std, dtype):
    """Subnormal and huge values are those of the definition, not those of a multiplication or a flushing conversion."""
    picture = noise(28, 28, 2)
    args = [torch.from_numpy(picture)], [28, 28], [0.0, 0.5, 1e-30], [std] * 3, False, 14, dtype
    assert torch.equal(ops.pack_patches(*args), ops.pack_patches.reference(*args))


def many() -> tuple[list[Tensor], list[int]]:
    found = [(torch.from_numpy(picture), rows, columns) for picture, rows, columns in pictures()]
    return [image for image, _, _ in found], [side for _, rows, columns in found for side in (rows, columns)]


def test_a_picture_does_not_depend_on_its_batch():
    images, sizes = many()
    together = ops.pack_patches(images, sizes, *HALF, False, 14, torch.bfloat16)
    alone = [
        ops.pack_patches([image], sizes[2 * i : 2 * i + 2], *HALF, False, 14, torch.bfloat16)
        for i, image in enumerate(images)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_bits_do_not_depend_on_the_number_of_threads():
    images, sizes = many()
    images.append(torch.from_numpy(noise(768, 1365, 3)))
    sizes += [728, 1316]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ops.pack_patches(images, sizes, *CLIP, False, 14, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_instruction_sets_agree_and_stay_inside_the_picture():
    """One digest on all of them; a read outside a picture would end the process."""
    digests = {}
    for isa in ("generic", "avx2", "avx512"):
        environment = os.environ | {"KVKEYE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.native.pack_calls"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        if "does not support it" not in result.stderr:
            assert result.returncode == 0, f"{isa}: {result.stderr[-2000:] or result.returncode}"
            digests[isa] = result.stdout
    assert "generic" in digests and len(set(digests.values())) == 1, digests


def refusals() -> list[tuple[str, tuple[object, ...], str]]:
    image, half = torch.zeros(28, 28, 3, dtype=torch.uint8), [0.5] * 3

    def pack(images, sizes, mean=half, patch=14, dtype=torch.float32):
        return "pack_patches", (images, sizes, mean, half, False, patch, dtype)

    return [
        (*pack([image], []), "1 images and 0 numbers in sizes"),
        (*pack([image], [28, 28, 28, 28]), "1 images and 4 numbers in sizes"),
        (*pack([image.float()], [28, 28]), "image is Float; expected Byte"),
        (*pack([image[0]], [28, 28]), "image has 2 dimensions [28, 3]"),
        (*pack([image[..., :2]], [28, 28]), "an image has shape [28, 28, 2]"),
        (*pack([image[:0]], [28, 28]), "an image has shape [0, 28, 3]"),
        (*pack([image], [28, 15]), "sizes holds (28, 15); expected positive multiples of 14"),
        (*pack([image], [0, 14]), "sizes holds (0, 14)"),
        (*pack([image], [28, 28], patch=0), "patch_size is 0"),
        (*pack([image], [28, 28], mean=[0.5]), "mean and std have 1 and 3 values"),
        (*pack([image], [28, 28], dtype=torch.float16), "the result is Half"),
        ("resize_image", (image, 0, 5, False), "the size is 0 x 5"),
        ("resize_image", (image[:, :0], 5, 5, False), "an image has shape [28, 0, 3]"),
    ]


@pytest.mark.parametrize(("name", "args", "message"), refusals())
def test_refusals(name, args, message):
    with pytest.raises(RuntimeError) as error:
        getattr(torch.ops.kvkeye_cpu, name)(*args)
    assert message in str(error.value)
