"""A tiny random Keye engine with prompts made of random tokens and random pixels; no files."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvkeye.engine import Engine, EngineConfig, RequestOutput, SamplingParams
from kvkeye.engine.prepare import Prepared
from kvkeye.models.keye.parsing import OutputParser
from kvkeye.models.keye.positions import MediaGrid, mrope_positions
from kvkeye.testing.tiny import TOKEN_IDS, byte_tokenizer, tiny_keye_model

IMAGE, START, END = (TOKEN_IDS[f"<|{name}|>"] for name in ("image_pad", "vision_start", "vision_end"))
EOS = TOKEN_IDS["<|im_end|>"]


@dataclass
class Picture:
    """What the processor would make of a file, from random numbers."""

    pixel_values: Tensor
    grids: list[tuple[int, int, int]]
    key: bytes
    kind: str = "image"
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(t * h * w // 4 for t, h, w in self.grids)


def picture(seed: int, *grids: tuple[int, int, int], kind: str = "image") -> Picture:
    generator = torch.Generator().manual_seed(seed)
    rows = sum(t * h * w for t, h, w in grids)
    key = hashlib.sha256(repr((seed, grids, kind)).encode()).digest()
    return Picture(torch.randn(rows, 588, generator=generator), list(grids), key, kind)


def prompt(seed: int, length: int, *pictures: Picture, is_chat: bool = False) -> Prepared:
    """`length` random text tokens with the pictures after the first third."""
    generator = torch.Generator().manual_seed(1000 + seed)
    text = torch.randint(0, 256, (length,), generator=generator).tolist()
    ids, blocks = text[: length // 3], []
    for item in pictures:
        item.spans = []
        for grid in item.grids:
            block = MediaGrid(item.kind, grid)
            ids.append(START)
            blocks.append((len(ids), block))
            item.spans.append((len(ids), block.num_tokens()))
            ids += [IMAGE] * block.num_tokens() + [END]
    ids += text[length // 3 :]
    positions, delta = mrope_positions(len(ids), blocks)
    return Prepared(ids, positions, delta, list(pictures), is_chat=is_chat)


class Processor:
    """Bytes to tokens and back; messages are joined without a template."""

    def __init__(self) -> None:
        self.generation_defaults = {"temperature": 0.0}
        self.eos_token_ids = (EOS,)
        self.tokenizer = byte_tokenizer()

    def process_text(self, text: str) -> Prepared:
        ids = self.tokenizer.encode(text).ids
        return Prepared(ids, torch.arange(len(ids)).expand(3, -1))

    def process(self, messages: list[dict[str, str]], mode: str | None = None) -> Prepared:
        return self.process_text("".join(message["content"] for message in messages) + (mode or ""))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def close(self) -> None:
        pass


@functools.cache
def model(version: str = "preview", dtype: torch.dtype = torch.float32):
    return tiny_keye_model(version, seed=3, dtype=dtype)


def engine(version: str = "preview", weights: torch.dtype = torch.float32, drafter=None, **config) -> Engine:
    values = {"model": "tiny", "max_model_len": 512, "max_num_seqs": 16, "check_every_step": True} | config
    return Engine(EngineConfig(**values), model(version, weights), Processor(), OutputParser, drafter)


def run(engine: Engine, max_steps: int = 10_000) -> dict[str, RequestOutput]:
    """Steps until nothing is left; the last output of each request."""
    outputs = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return outputs
        outputs.update({output.request_id: output for output in engine.step()})
    raise AssertionError("the engine never ends")


def greedy(max_tokens: int = 8, **values) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **values)
