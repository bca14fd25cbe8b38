"""What an engine has done since its start. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

from kvkeye.engine.outputs import RequestMetrics, SpeculationMetrics


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, token counts of requests that have ended; sizes as they are now."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int
    num_encoder_steps: int
    num_encoded_patches: int
    encoder_hits: int
    encoder_misses: int
    encoder_bytes: int
    speculation: SpeculationMetrics | None = None


@dataclass
class Counts:
    """What the engine itself counts; tokens are those of requests that have ended."""

    num_requests: int = 0
    num_steps: int = 0
    num_encoder_steps: int = 0
    num_encoded_patches: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0

    def add(self, ended: RequestMetrics) -> None:
        self.num_prompt_tokens += ended.num_prompt_tokens
        self.num_cached_tokens += ended.num_cached_tokens
        self.num_generated_tokens += ended.num_generated_tokens
