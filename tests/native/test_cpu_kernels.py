"""The C++ kernels on every instruction set this machine has, at several thread counts, and their refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvkeye import ops
from kvkeye.ops import _library

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("generic", "avx2", "avx512", "amx")

pytestmark = pytest.mark.skipif(
    _library.native("cpp").path is None, reason=f"no C++ library: {_library.native('cpp').reason}"
)


def run(code: list[str], isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"KVKEYE_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


ASK = [
    "-c",
    "from kvkeye.ops import _library; _library.native('cpp'); import torch; print(torch.ops.kvkeye_cpu.cpu_isa())",
]


@pytest.mark.parametrize("isa", ISAS)
def test_every_kernel_against_float64(isa: str) -> None:
    result = run(["-m", "tests.native.kernel_cases"], isa)
    if "does not support it" in result.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    assert result.stdout.startswith(f"{isa}:")


@pytest.mark.parametrize("isa", ISAS)
def test_tile_attention_by_its_case_table(isa: str) -> None:
    rows = ["tests/ops/test_conformance.py", "-k", "tile_attention and cpp and values"]
    result = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *rows], isa)
    if "does not support it" in result.stdout:
        pytest.skip(f"this CPU has no {isa}")
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:] + result.stderr[-2000:]


@pytest.mark.parametrize("isa", ["AVX2 "])
def test_unknown_instruction_set_is_refused_by_name(isa: str) -> None:
    result = run(ASK, isa)
    assert result.returncode != 0
    assert f"KVKEYE_CPU_ISA='{isa}'" in result.stderr
    assert "generic, avx2, avx512, amx" in result.stderr


def threaded_calls() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(700, 512, generator=generator)
    weight, grad = torch.randn(512, generator=generator), torch.randn(700, 512, generator=generator)
    table = torch.randn(9, 9, 192, generator=generator)
    found = [ops.rms_norm(x, weight, 1e-6), *ops.rms_norm_backward(grad, x, weight, 1e-6)]
    found += ops.layer_norm_backward(grad, x, weight, weight, 1e-6)
    rows = torch.randn(50 * 40, 192, generator=generator)
    found.append(ops.interpolate_position_backward(rows, table, [1, 50, 40]))
    positions = torch.randint(0, 4000, (3, 700), generator=generator)
    head, sections = torch.randn(64, generator=generator), [12, 10, 10]
    grads = x[:, :256].reshape(700, 4, 64), x[:, 256:384].reshape(700, 2, 64)
    found += ops.qk_norm_mrope_backward(*grads, x, head, head, positions, sections, 1e6, 1e-6, 2)
    found.append(ops.silu_mul(x))
    found.append(ops.token_logprobs(x, positions[0] % 512))
    return found + video_calls(generator)


def video_calls(generator: torch.Generator) -> list[torch.Tensor]:
    starts, weights = torch.tensor([0, 4, 2], dtype=torch.int32), torch.rand(3, 4, generator=generator)
    outputs, latent = (
        torch.randn(2, 3, 4, 4, 24, 40, generator=generator),
        torch.randn(4, 8, 24, 40, generator=generator),
    )
    tiles = (outputs, starts, weights, latent, 3.0, -0.1)
    found = [ops.fuse_tiles(*tiles), *ops.fuse_tiles_backward(latent, *tiles)]
    found += ops.score_candidates(outputs[0], outputs[1], 0.5, latent[:, 0], 4)
    found += [ops.spectral_blend(latent, latent.flip(1), 0.25, 0.3, 4)]
    q, k, v = torch.randn(3, 2, 8 * 30 + 9, 3, 64, generator=generator)
    args = (q, k, v, starts, weights, 8, 9, 0.125)
    o, lse = ops.tile_attention(*args)
    return [*found, o, lse, *ops.tile_attention_backward(o, lse, *args, lse)]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        with ops.use_backends("cpp"):
            torch.set_num_threads(1)
            alone = threaded_calls()
            for threads in (2, 3):
                torch.set_num_threads(threads)
                assert all(torch.equal(a, b) for a, b in zip(alone, threaded_calls(), strict=True)), threads
    finally:
        torch.set_num_threads(before)


def test_rows_do_not_depend_on_their_batch() -> None:
    x, weight = torch.randn(33, 130), torch.randn(130)
    with ops.use_backends("cpp"):
        together = ops.rms_norm(x, weight, 1e-6)
        alone = torch.cat([ops.rms_norm(row[None], weight, 1e-6) for row in x])
    assert torch.equal(together, alone)


def cpu(name: str, *args: object) -> object:
    """The kernel itself, without the contract that the op layer checks first."""
    return getattr(torch.ops.kvkeye_cpu, name)(*args)


def refusals() -> list[tuple[str, tuple[object, ...], str]]:
    x, cache = torch.randn(4, 8), torch.zeros(2, 1, 4, 8)
    k, slots = torch.randn(4, 1, 8), torch.tensor([0, 1, 2, 8])
    long = torch.zeros(3, 4, dtype=torch.int64)
    tiles, starts, weights = torch.zeros(1, 2, 3, 4, 2, 2), torch.tensor([0, 1], dtype=torch.int32), torch.ones(2, 4)
    return [
        ("rms_norm", (x, torch.ones(7), 1e-6), "rms_norm: weight has shape [7]; expected [8]"),
        ("rms_norm", (x, torch.ones(8).bfloat16(), 1e-6), "weight is BFloat16; expected Float"),
        ("rms_norm", (x.double(), torch.ones(8).double(), 1e-6), "x is Double; the C++ kernels take"),
        ("rms_norm", (torch.tensor(1.0), torch.ones(1), 1e-6), "x is a scalar"),
        ("silu_mul", (x[:, :7],), "an even size"),
        ("gelu_backward", (x[:2], x, True), "grad has shape [2, 8]; expected that of x, [4, 8]"),
        ("append_kv", (k, k, cache, cache.clone(), slots), "slot_mapping[3] is 8; the cache has 8 slots"),
        ("append_kv", (k, k, cache.transpose(2, 3), cache.transpose(2, 3), slots), "must be contiguous"),
        ("copy_blocks", (cache, cache.clone(), torch.tensor([[0, 2]])), "block_pairs[0] names block 2"),
        ("copy_blocks", (cache, cache.clone(), torch.tensor([[-1, 0]])), "names block -1"),
        ("mrope", (k, long, [2, 1, 2], 1e4), "three counts that sum to half of 8"),
        ("mrope", (k, long, [6, -1, -1], 1e4), "three counts that sum to half of 8"),
        ("mrope", (k, long[:, :3], [2, 1, 1], 1e4), "positions has shape [3, 3]; expected [3, 4]"),
        ("merge_patches", (x, [1, 2, 3], 2), "both sides must be multiples of merge = 2"),
        ("merge_patches", (x, [1, 2, 4], 2), "x has shape [4, 8]; expected [8, 8]"),
        ("interpolate_position", (cache[0, :, :1], [1, 2]), "expected triples"),
        (
            "fuse_tiles",
            (tiles, starts, weights, cache, 1.0, 0.1),
            "latent has shape [2, 1, 4, 8]; expected [3, 1, 2, 2]",
        ),
        ("blend_tiles", (tiles, starts.long(), weights, 5, 1.0), "starts is Long; expected Int"),
        ("blend_tiles", (tiles, starts, weights, 3, 1.0), "tiles of 4 frames are longer than the video of 3"),
        ("tile_attention", (*[cache] * 3, starts, weights, 3, 0, 1.0), "1 tokens less 0 of text are not 3 frames"),
        ("spectral_blend", (torch.ones(2, 3, 67),) * 2 + (0.2, 0.2, 4), "w = 67 has a prime factor above 64"),
        ("score_candidates", (tiles[0][None], tiles[0][None], 0.5, cache[0], 2), "x has 6 dimensions"),
        ("token_logprobs", (x, torch.tensor([0, 1, 2, 8])), "targets[3] is 8; logits has 8 columns"),
        ("token_logprobs", (x, torch.tensor([0, -1, 2, 3])), "targets[1] is -1"),
    ]


@pytest.mark.parametrize(("name", "args", "message"), refusals())
def test_kernels_refuse_by_name_and_value(name: str, args: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError) as refused:
        cpu(name, *args)
    assert message in str(refused.value)


def test_empty_inputs() -> None:
    with ops.use_backends("cpp"):
        assert ops.rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
        grads = ops.rms_norm_backward(torch.empty(0, 8), torch.empty(0, 8), torch.ones(8), 1e-6)
        assert torch.equal(grads[1], torch.zeros(8))
        assert ops.rope_2d(torch.empty(0, 2, 8), torch.empty(0, 4), torch.empty(0, 4)).shape == (0, 2, 8)
        assert ops.token_logprobs(torch.empty(0, 8), torch.empty(0, dtype=torch.int64)).shape == (0,)
        assert ops.silu_mul(torch.empty(3, 0)).shape == (3, 0)


def test_activations_keep_their_digits_in_the_tails() -> None:
    """Relative errors of fp32, where results are far smaller than the largest of their tensor."""
    x = torch.linspace(-5.6, 20, 40001)
    wide = x.double()
    cubic = (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    truths = {
        "erf": wide * torch.special.erfc(-wide / 2**0.5) / 2, "tanh": wide * torch.sigmoid(2 * cubic),
        "silu": wide * torch.sigmoid(wide),
    }  # fmt: skip
    with ops.use_backends("cpp"):
        found = {
            "erf": ops.gelu(x, False), "tanh": ops.gelu(x, True),
            "silu": ops.silu_mul(torch.cat((x, torch.ones_like(x)))),
        }  # fmt: skip
        limits = ops.gelu(torch.tensor([torch.inf, 0.0, -30.0, -torch.inf]), False)
    assert limits[:2].tolist() == [torch.inf, 0.0] and limits[2:].abs().max() < 1e-30
    for name, truth in truths.items():
        error = ((found[name].double() - truth) / truth).abs().nan_to_num()
        assert error.max() < {"erf": 1e-5, "tanh": 1e-5, "silu": 2e-6}[name], name
        assert error[x > -1].max() < 5e-7, name


def test_not_a_number_stays() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0, 3.0]])
    with ops.use_backends("cpp"):
        for dtype in (torch.float32, torch.bfloat16):
            assert ops.rms_norm(x.to(dtype), torch.ones(4, dtype=dtype), 1e-6).isnan().all()
            for tanh in (True, False):
                assert ops.gelu(x.to(dtype), tanh).isnan().tolist() == [[False, True, False, False]]
                grad = ops.gelu_backward(torch.ones_like(x).to(dtype), x.to(dtype), tanh)
                assert grad.isnan().tolist() == [[False, True, False, False]]
            assert ops.token_logprobs(x.to(dtype), torch.tensor([0])).isnan().all()


def test_no_code_is_shared_between_instruction_sets() -> None:
    """A weak function outside the namespaces could be kept in its AVX-512 form and run on a CPU without it."""
    objects = sorted((ROOT / "build" / "native" / "CMakeFiles").glob("kernels_*.dir/**/*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of an editable build, or no nm to read them")
    foreign = []
    for path in objects:
        isa = next(part for part in path.parts if part.startswith("kernels_"))[len("kernels_") : -len(".dir")]
        listing = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True)
        for line in listing.stdout.splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            if kind in "WVu" and f"kvkeye::{isa}::" not in symbol:
                foreign.append(f"{path.name} ({isa}): {symbol}")
    assert not foreign, "\n".join(foreign)
