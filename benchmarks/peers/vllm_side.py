"""vLLM's side of benchmarks/engine.py, run by vLLM's own Python. Commands and answers are JSON lines.

{"do": "start", "prompts": [[...]], "max_new": n}   computes the prompts -> {"seconds": s}
{"do": "advance", "steps": n}                        n tokens for every prompt -> {"seconds": s}
{"do": "finish"}                                     drops the requests -> {"tokens": [[...]]}
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import sys
import time

# Before vLLM is imported: its logs and those of its libraries go where errors go, the answers own standard output.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm


class Side:
    """One engine and the requests that run in it."""

    def __init__(self, folder: str, eager: bool, max_model_len: int, max_num_seqs: int) -> None:
        self.engine = vllm.LLM(
            model=folder,
            dtype="bfloat16",
            enforce_eager=eager,
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs * max_model_len,
            enable_prefix_caching=False,
        ).llm_engine
        self.tokens: dict[str, list[int]] = {}
        self.count = 0

    def start(self, prompts: list[list[int]], max_new: int) -> dict:
        sampling = vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_new, detokenize=False)
        begin = time.perf_counter()
        for prompt in prompts:
            name = str(self.count)
            self.count += 1
            self.tokens[name] = []
            self.engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        self._until(1)
        return {"seconds": time.perf_counter() - begin}

    def advance(self, steps: int) -> dict:
        target = min(map(len, self.tokens.values())) + steps
        begin = time.perf_counter()
        self._until(target)
        return {"seconds": time.perf_counter() - begin}

    def finish(self) -> dict:
        self.engine.abort_request(list(self.tokens))
        while self.engine.has_unfinished_requests():
            self.engine.step()
        tokens, self.tokens = list(self.tokens.values()), {}
        return {"tokens": tokens}

    def _until(self, count: int) -> None:
        while min(map(len, self.tokens.values())) < count:
            for output in self.engine.step():
                self.tokens[output.request_id] = list(output.outputs[0].token_ids)


def main() -> None:
    folder, mode, max_model_len, max_num_seqs = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    torch.cpu._init_amx()  # its tile kernels die without the system's leave; harmless where there are no tiles
    side = Side(folder, mode == "eager", int(max_model_len), int(max_num_seqs))
    say({"ready": vllm.__version__, "torch": torch.__version__})
    for line in sys.stdin:
        command = json.loads(line)
        say(getattr(side, command.pop("do"))(**command))


def say(answer: dict) -> None:
    ANSWERS.write(json.dumps(answer) + "\n")
    ANSWERS.flush()


if __name__ == "__main__":
    main()
