"""Tiles are data: complete for every GPU that has a file, and chosen by the device alone."""

from __future__ import annotations

import pytest
import torch

from kvkeye.triton_kernels.attention.lanes import _MAX_HEAD_DIM
from kvkeye.triton_kernels.common import tiles

CAPABILITIES = tiles.known_capabilities()
KERNELS = sorted(tiles.table(tiles.DEFAULT_CAPABILITY))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_file_has_every_kernel(capability: int) -> None:
    assert sorted(tiles.table(capability)) == KERNELS


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_head_size_has_a_tile(
    capability: int, kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "capability_of", lambda device: capability)
    names = [set(tiles.tile_for(kernel, torch.empty(0, dtype=dtype), lanes)) for lanes in range(8, _MAX_HEAD_DIM + 1)]
    assert all(found == names[0] >= {"BLOCK_M", "BLOCK_N", "num_warps", "num_stages"} for found in names)


def test_rows_run_from_narrow_to_wide() -> None:
    """The first row that suffices is taken, so a wide one before a narrow one would hide it."""
    for capability in CAPABILITIES:
        for rows in tiles.table(capability).values():
            limits = [(row["bits"], row.get("lanes", _MAX_HEAD_DIM)) for row in rows]
            assert limits == sorted(set(limits))


@pytest.mark.parametrize(("capability", "file"), [(75, 80), (80, 80), (89, 80), (90, 90), (103, 100), (121, 120)])
def test_a_gpu_takes_the_newest_file_that_is_not_newer(capability: int, file: int) -> None:
    assert tiles.table(capability) == tiles.table(file)


def test_a_head_that_is_too_wide_is_named() -> None:
    with pytest.raises(LookupError, match=r"no tile of varlen_attention_fwd for torch\.float32 and 300 lanes"):
        tiles.tile_for("varlen_attention_fwd", torch.empty(0), 300)
