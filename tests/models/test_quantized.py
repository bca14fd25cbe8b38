"""A model of int8 weights: what stays exact, state dicts, and the answers of an engine that was asked for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvkeye import LLM, SamplingParams
from kvkeye.errors import ConfigError
from kvkeye.layers import Embedding, Linear, pack_weights, quantize_weights
from kvkeye.testing.tiny import write_tiny_checkpoint


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def test_layers_stand_for_their_levels() -> None:
    """A quantised layer computes as a plain one of the dequantised weight would, up to its rows' own levels."""
    layer, x = Linear(96, 40), torch.randn(7, 96)
    exact = layer(x)
    layer.quantize()
    close = layer(x)
    assert layer.weight is None and layer.packed is not None and layer.packed.dtype == torch.uint8
    assert 0 < (close - exact).abs().max() < 0.05 * exact.abs().max()
    residual = torch.randn(7, 40)
    assert torch.equal(layer.add(x, residual), residual + close)
    state = layer.state_dict()
    assert set(state) == {"weight", "bias"}
    again = Linear(96, 40)
    again.quantize()
    again.load_state_dict(state)
    assert torch.equal(again(x), close)  # levels of levels are the same
    layer.double()
    assert layer.weight is not None and layer.packed is None and layer.scales is None


def test_gate_and_up_of_one_weight() -> None:
    layer, x = Linear(64, 2 * 48, bias=False, parts=2), torch.randn(5, 64)
    exact = layer.silu_mul(x)
    layer.quantize()
    assert (layer.silu_mul(x) - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_tied_table_keeps_its_rows() -> None:
    table, ids, hidden = Embedding(50, 32, head=True), torch.tensor([3, 49, 0]), torch.randn(4, 32)
    rows, logits = table(ids), table.logits(hidden)
    assert quantize_weights(table) == 1 and pack_weights(table) == 0
    assert torch.equal(table(ids), rows)
    assert 0 < (table.logits(hidden) - logits).abs().max() < 0.05 * logits.abs().max()
    table.float()
    assert torch.equal(table.logits(hidden), logits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("int8")
    write_tiny_checkpoint(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_answers_alone_and_in_a_batch_with_the_same_tokens(folder: Path, dtype: str) -> None:
    prompts = [[5, 6, 7], list(range(3, 90)), [11] * 40]
    with LLM(str(folder), dtype=dtype, quantization="int8") as llm:
        together = [answer.outputs[0].token_ids for answer in llm.generate(prompts, GREEDY)]
        alone = [llm.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in prompts]
    assert together == alone


def test_other_names_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization: got 'int4'; expected int8, or None"):
        LLM(str(folder), quantization="int4")
