"""Prompt lookup decoding of transformers, on the language half of a Keye-VL checkpoint."""

from __future__ import annotations

import torch
from safetensors import safe_open
from transformers import Qwen3Config, Qwen3ForCausalLM

from kvkeye.models.keye.config import TextConfig


class PromptLookup:
    """Qwen3ForCausalLM in fp32 with SDPA; counts its forward passes."""

    def __init__(self, folder: str, text: TextConfig, num_tokens: int) -> None:
        config = Qwen3Config(
            vocab_size=text.vocab_size, hidden_size=text.hidden_size, intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers, num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads, head_dim=text.head_dim, rms_norm_eps=text.rms_norm_eps,
            rope_theta=text.rope_theta, max_position_embeddings=text.max_position_embeddings,
            tie_word_embeddings=text.tie_word_embeddings, attention_bias=False, attn_implementation="sdpa",
            eos_token_id=None, bos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        self.model = Qwen3ForCausalLM(config).eval()
        with safe_open(folder + "/model.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith(("model.", "lm_head."))]  # noqa: SIM118
            self.model.load_state_dict({name: file.get_tensor(name).float() for name in names})
        self.num_tokens = num_tokens
        self.num_forwards = 0
        self.model.register_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: object) -> None:
        self.num_forwards += 1

    def generate(self, prompt: list[int], max_new: int) -> tuple[list[int], int]:
        """Tokens, and the forward passes they took."""
        before = self.num_forwards
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            found = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new,
                prompt_lookup_num_tokens=self.num_tokens, eos_token_id=None,
            )  # fmt: skip
        return found[0, len(prompt) :].tolist(), self.num_forwards - before
