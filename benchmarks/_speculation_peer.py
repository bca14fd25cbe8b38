"""Prompt lookup and assisted generation of transformers, on the language half of a Keye-VL checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from transformers import Qwen3Config, Qwen3ForCausalLM

from kvkeye.models.keye.config import TextConfig


class Qwen3:
    """Qwen3ForCausalLM in fp32 with SDPA, of the first `num_layers` layers; counts its forward passes."""

    def __init__(self, folder: str, text: TextConfig, num_layers: int) -> None:
        config = Qwen3Config(
            vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
            num_hidden_layers=num_layers, num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads, head_dim=text.head_dim, rms_norm_eps=text.rms_norm_eps,
            rope_theta=text.rope_theta, max_position_embeddings=text.max_position_embeddings,
            tie_word_embeddings=text.tie_word_embeddings, attention_bias=False, attn_implementation="sdpa",
            eos_token_id=None, bos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        self.model = Qwen3ForCausalLM(config).eval()
        with safe_open(folder + "/model.safetensors", "pt") as file:
            wanted = self.model.state_dict().keys()
            self.model.load_state_dict({name: file.get_tensor(name).float() for name in wanted})
        self.num_forwards = 0
        self.model.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: object) -> None:
        self.num_forwards += 1

    def lookup(self, prompt: list[int], max_new: int, num_tokens: int) -> tuple[list[int], int]:
        """Tokens, and the forward passes they took, with proposals from the prompt."""
        return self._generate(prompt, max_new, prompt_lookup_num_tokens=num_tokens)

    def assisted(self, prompt: list[int], max_new: int, num_tokens: int, assistant: Qwen3) -> tuple[list[int], int]:
        """The same with proposals of a smaller model, always as many."""
        settings = assistant.model.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = num_tokens, "constant"
        settings.assistant_confidence_threshold = 0.0
        return self._generate(prompt, max_new, assistant_model=assistant.model)

    def _generate(self, prompt: list[int], max_new: int, **how: Any) -> tuple[list[int], int]:
        before = self.num_forwards
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            found = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new,
                eos_token_id=None, **how,
            )  # fmt: skip
        return found[0, len(prompt) :].tolist(), self.num_forwards - before
