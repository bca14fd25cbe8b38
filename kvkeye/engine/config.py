"""The engine's settings, checked when built. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kvkeye.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EngineConfig:
    """How one engine runs. None means "chosen from the checkpoint and the machine", and the choice is logged.

    model                   folder of a checkpoint in the Hub's layout
    dtype                   "float32", "bfloat16" or "float16"; None: bf16 on a GPU and on CPUs with AVX512-BF16 or AMX
    device                  "cpu", "cuda", "cuda:1"; None: a GPU if there is one
    block_size              tokens per KV block
    max_model_len           longest prompt plus answer, in tokens; None: the checkpoint's, at most 32768
    max_num_seqs            answers computed in one step
    max_num_batched_tokens  tokens computed in one step
    max_prefill_chunk       tokens of one prompt computed in one step; None: whatever the step has left
    max_num_encoder_patches patches of media encoded in one step; a picture or joint clip of more is encoded alone
    max_waiting             requests that may wait before a CapacityError; None: no limit
    num_blocks              KV blocks; None: from kv_cache_memory
    kv_cache_memory         bytes; None: what max_num_seqs full contexts need, at most 40 % of the free memory
    encoder_cache_memory    bytes of media embeddings kept for later requests
    media_workers           processes that decode files; 0: this one; None: a core each, at most 4
    num_prepare_threads     threads that decode and resize media for coming requests while steps run
    prepared_media_memory   bytes of pixels of requests before their first step; above it preparation pauses
    enable_prefix_cache     reuse KV blocks of equal beginnings, answers included
    backends                order of op implementations, e.g. "cpp"; "" leaves the default order
    invariant               an answer's bits do not depend on other requests; a warning says where that cannot hold
    seed                    of requests that bring none
    check_every_step        verifies the block accounting after every step (slow)
    """

    model: str
    dtype: str | None = None
    device: str | None = None
    block_size: int = 32
    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    max_prefill_chunk: int | None = None
    max_num_encoder_patches: int = 4096
    max_waiting: int | None = None
    num_blocks: int | None = None
    kv_cache_memory: int | None = None
    encoder_cache_memory: int = 256 << 20
    media_workers: int | None = None
    num_prepare_threads: int = 2
    prepared_media_memory: int = 1 << 30
    enable_prefix_cache: bool = True
    backends: str = ""
    invariant: bool = True
    seed: int = 0
    check_every_step: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, Path)) or not str(self.model):
            raise ConfigError(f"EngineConfig.model: got {self.model!r}; expected a checkpoint's folder.")
        object.__setattr__(self, "model", str(self.model))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(
                f"EngineConfig.dtype: got {self.dtype!r}; expected one of {', '.join(DTYPES)}, or None to choose."
            )
        counts = ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_num_encoder_patches")
        for name in (*counts, "num_prepare_threads"):
            self._check_count(name, low=1)
        for name in ("max_model_len", "max_prefill_chunk", "num_blocks", "kv_cache_memory"):
            if getattr(self, name) is not None:
                self._check_count(name, low=1)
        for name in ("max_waiting", "media_workers"):
            if getattr(self, name) is not None:
                self._check_count(name, low=0)
        self._check_count("encoder_cache_memory", low=0)
        self._check_count("prepared_media_memory", low=0)
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"EngineConfig.block_size: got {self.block_size}; expected a power of two, e.g. 32.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"EngineConfig.seed: got {self.seed!r}; expected an integer.")

    def _check_count(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"EngineConfig.{name}: got {value!r}; expected an integer of at least {low}.")
