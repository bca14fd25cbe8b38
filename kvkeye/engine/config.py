"""The engine's settings, checked when built. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvkeye.errors import ConfigError

SPECULATION_METHODS = ("ngram", "suffix", "draft_model", "eagle3")
_WITH_MODEL = ("draft_model", "eagle3")
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8",)
KV_CACHE_DTYPES = ("auto", "fp8")


@dataclass(frozen=True)
class SpeculationConfig:
    """How tokens are proposed. What is proposed never changes an answer. Names are vLLM's where vLLM has one.

    method                  "ngram": what stood in the request after the same tokens; "suffix": in recent answers too;
                            "draft_model": what a small model says, which does not look at media; "eagle3": what a
                            head says that was trained for this target and sees its features
    model                   folder of the small model, which must have the same tokenizer, or of the head; or the name
                            of one that comes with the package
    num_speculative_tokens  proposals per answer and step at most
    prompt_lookup_min       tokens that must match
    prompt_lookup_max       tokens that are looked up; longer matches are preferred
    tree_width              branches below one token, of a head proposals of one depth; 1 proposes chains
    adaptive                propose fewer, or nothing, where that is faster by the engine's own measurements
    suffix_cached_tokens    tokens of recent answers kept per salt by "suffix"
    """

    method: str = "suffix"
    model: str | None = None
    num_speculative_tokens: int = 16
    prompt_lookup_min: int = 1
    prompt_lookup_max: int = 5
    tree_width: int = 1
    adaptive: bool = True
    suffix_cached_tokens: int = 16384

    def __post_init__(self) -> None:
        if self.method not in SPECULATION_METHODS:
            raise ConfigError(
                f"SpeculationConfig.method: got {self.method!r}; expected one of {', '.join(SPECULATION_METHODS)}."
            )
        if (self.method in _WITH_MODEL) != (self.model is not None):
            raise ConfigError(
                f"SpeculationConfig.model: got {self.model!r} with method {self.method!r}; expected a checkpoint's "
                f"folder with {' and '.join(_WITH_MODEL)}, and None with the others."
            )
        for name, low, high in (
            ("num_speculative_tokens", 1, 63), ("prompt_lookup_min", 1, 32), ("prompt_lookup_max", 1, 32),
            ("tree_width", 1, 63), ("suffix_cached_tokens", 1, 2**40),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"SpeculationConfig.{name}: got {value!r}; expected an integer from {low} to {high}.")
        if self.prompt_lookup_max < self.prompt_lookup_min:
            raise ConfigError(
                f"SpeculationConfig.prompt_lookup_max: got {self.prompt_lookup_max}; expected at least "
                f"prompt_lookup_min, {self.prompt_lookup_min}."
            )
        if not isinstance(self.adaptive, bool):
            raise ConfigError(f"SpeculationConfig.adaptive: got {self.adaptive!r}; expected True or False.")


@dataclass(frozen=True)
class EngineConfig:
    """How one engine runs. None means "chosen from the checkpoint and the machine", and the choice is logged.

    model                   folder of a checkpoint in the Hub's layout
    dtype                   "float32", "bfloat16" or "float16"; None: bf16 on a GPU and on CPUs with AVX512-BF16 or AMX
    quantization            "int8": the language model's matrices as int8 levels, on the CPU; None: as loaded
    device                  "cpu", "cuda", "cuda:1"; None: a GPU if there is one
    kv_cache_dtype          "auto": keys and values as the model computes them; "fp8": as e4m3 with a scale per head and
                            token, nearly twice as many blocks; on the CUDA kernels in bf16, and on the reference
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
    speculation             a SpeculationConfig, a mapping of its fields, or None for plain decoding; "auto": the
                            default fields where proposals cannot change bits, which is on a CPU with C++ kernels
    invariant               an answer's bits do not depend on other requests; a warning says where that cannot hold;
                            None: on a CPU, and on a GPU where speculation is asked for
    enforce_eager           no CUDA graphs: every pass is launched operation by operation
    seed                    of requests that bring none
    check_every_step        verifies the block accounting after every step (slow)
    """

    model: str
    dtype: str | None = None
    quantization: str | None = None
    device: str | None = None
    kv_cache_dtype: str = "auto"
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
    speculation: SpeculationConfig | Mapping[str, Any] | str | None = "auto"
    invariant: bool | None = None
    enforce_eager: bool = False
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
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"EngineConfig.quantization: got {self.quantization!r}; expected {', '.join(QUANTIZATIONS)}, or None."
            )
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ConfigError(
                f"EngineConfig.kv_cache_dtype: got {self.kv_cache_dtype!r}; expected one of "
                f"{', '.join(KV_CACHE_DTYPES)}."
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
        object.__setattr__(self, "speculation", _speculation(self.speculation))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"EngineConfig.seed: got {self.seed!r}; expected an integer.")

    def _check_count(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"EngineConfig.{name}: got {value!r}; expected an integer of at least {low}.")


def _speculation(given: object) -> SpeculationConfig | str | None:
    if isinstance(given, Mapping):
        known = [item.name for item in fields(SpeculationConfig)]
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"EngineConfig.speculation: it has no field {name!r}; expected some of {', '.join(known)}."
                )
        return SpeculationConfig(**given)
    if given is None or isinstance(given, SpeculationConfig) or given == "auto":
        return given
    raise ConfigError(
        f"EngineConfig.speculation: got {given!r}; expected a SpeculationConfig, a mapping of its fields, None or "
        "'auto'."
    )
