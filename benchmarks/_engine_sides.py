"""The engines that benchmarks/engine.py compares, behind three calls: start, advance, finish.

`start` computes prompts and gives every one its first token; `advance` gives every one `steps` more; `finish` returns
all tokens and frees what the prompts held. Seconds are measured on the side itself. Greedy, no end token, no prefix
cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from ctypes.util import find_library
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM, StaticCache
from transformers.utils.logging import disable_progress_bar

from kvkeye.engine.config import EngineConfig
from kvkeye.engine.engine import Engine
from kvkeye.engine.request import SamplingParams

PEERS = Path(__file__).resolve().parents[1] / ".peers"
Prompts = list[list[int]]


class Side(Protocol):
    group: str
    setting: str

    def start(self, prompts: Prompts, max_new: int) -> float: ...
    def advance(self, steps: int) -> float: ...
    def finish(self) -> Prompts: ...
    def last_logits(self, prompt: list[int]) -> Tensor | None:
        """[V] fp32 after the prompt; None where the side does not show them."""

    def close(self) -> None: ...


class Kvkeye:
    """Our engine, driven step by step."""

    def __init__(self, folder: Path, max_model_len: int, max_num_seqs: int, quantization: str | None = None) -> None:
        self.group, self.setting = "kvkeye", quantization or "bfloat16"
        config = EngineConfig(
            str(folder),
            dtype="bfloat16",
            quantization=quantization,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs * max_model_len,
            enable_prefix_cache=False,
            speculation=None,  # a token a step on every side; benchmarks/speculation.py compares the rest
        )
        self.engine = Engine.from_config(config)
        self.names = count()
        self.tokens: dict[str, list[int]] = {}

    def start(self, prompts: Prompts, max_new: int) -> float:
        sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_new)
        begin = time.perf_counter()
        for prompt in prompts:
            name = str(next(self.names))
            self.tokens[name] = []
            self.engine.add(name, prompt, sampling)
        self._until(1)
        return time.perf_counter() - begin

    def advance(self, steps: int) -> float:
        target = min(map(len, self.tokens.values())) + steps
        begin = time.perf_counter()
        self._until(target)
        return time.perf_counter() - begin

    def finish(self) -> Prompts:
        for name in self.tokens:
            self.engine.abort(name)
        tokens, self.tokens = list(self.tokens.values()), {}
        return tokens

    def last_logits(self, prompt: list[int]) -> Tensor | None:
        seen: list[Tensor] = []
        self.engine.runner.logits_hook = lambda names, logits: seen.append(logits[0].float().clone())
        self.start([prompt], 1)
        self.engine.runner.logits_hook = None
        self.finish()
        return seen[0]

    def close(self) -> None:
        del self.engine

    def _until(self, length: int) -> None:
        while min(map(len, self.tokens.values())) < length:
            for output in self.engine.step():
                if output.error is not None:
                    raise RuntimeError(f"kvkeye: {output.error}")
                self.tokens[output.request_id] = output.outputs[0].token_ids


class Transformers:
    """Qwen3ForCausalLM with SDPA, its own cache, a loop of one forward per token."""

    group = "transformers"

    def __init__(self, folder: Path, dtype: torch.dtype, static: bool, max_model_len: int) -> None:
        self.setting = f"{str(dtype).removeprefix('torch.')}, {'static' if static else 'dynamic'} cache"
        disable_progress_bar()
        self.model = Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
        self.static, self.max_model_len = static, max_model_len
        self.cache: Any = None
        self.tokens: list[Tensor] = []

    def start(self, prompts: Prompts, max_new: int) -> float:
        begin = time.perf_counter()
        config = self.model.config
        self.cache = (
            StaticCache(config, max_cache_len=self.max_model_len) if self.static else DynamicCache(config=config)
        )
        self.tokens = []
        self._forward(torch.tensor(prompts))
        return time.perf_counter() - begin

    def advance(self, steps: int) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            self._forward(self.tokens[-1])
        return time.perf_counter() - begin

    def finish(self) -> Prompts:
        self.cache = None
        return torch.cat(self.tokens, dim=1).tolist()  # type: ignore[no-any-return]

    def last_logits(self, prompt: list[int]) -> Tensor | None:
        with torch.inference_mode():
            return self.model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].float()  # type: ignore[no-any-return]

    def close(self) -> None:
        del self.model

    @torch.inference_mode()
    def _forward(self, ids: Tensor) -> None:
        logits = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.tokens.append(logits[:, -1].argmax(-1, keepdim=True))


class Vllm:
    """vLLM's CPU build in its own environment and process; see peers/vllm_side.py."""

    def __init__(self, folder: Path, eager: bool, max_model_len: int, max_num_seqs: int) -> None:
        mode = "eager" if eager else "compiled"
        python = PEERS / "vllm" / "bin" / "python"
        if not python.exists():
            raise FileNotFoundError(f"no {PEERS.name}/vllm; run `make peers`")
        script = Path(__file__).with_name("peers") / "vllm_side.py"
        command = [str(python), str(script), str(folder), mode, str(max_model_len), str(max_num_seqs)]
        self.log = Path(folder).parent / f"vllm-{mode}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=self._env()
            )
        self.group, self.setting = f"vLLM {mode}", self._answer()["ready"]

    @staticmethod
    def _env() -> dict[str, str]:
        """What its manual recommends for a CPU: tcmalloc if there is one, Intel's OpenMP, threads bound to cores."""
        threads = torch.get_num_threads()
        openmp = PEERS / "vllm" / "lib" / "libiomp5.so"
        preload = [find_library("tcmalloc_minimal"), str(openmp) if openmp.exists() else None]
        return {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "OMP_NUM_THREADS": str(threads),
            "LD_PRELOAD": ":".join(name for name in preload if name),
        }

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            lines = self.log.read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"vLLM ended with {self.process.wait()} ({' '.join(lines)[:200]}); see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def start(self, prompts: Prompts, max_new: int) -> float:
        return float(self._ask(do="start", prompts=prompts, max_new=max_new)["seconds"])

    def advance(self, steps: int) -> float:
        return float(self._ask(do="advance", steps=steps)["seconds"])

    def finish(self) -> Prompts:
        tokens: Prompts = self._ask(do="finish")["tokens"]
        return tokens

    def last_logits(self, prompt: list[int]) -> Tensor | None:
        return None

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
