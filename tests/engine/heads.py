"""Draft heads for tests: random weights on the tiny random model, where hardly anything is accepted."""

from __future__ import annotations

import functools

import torch

from kvkeye.engine.draft_head import HeadDrafter
from kvkeye.layers import pack_weights
from kvkeye.models.draft.config import HeadConfig
from kvkeye.models.draft.head import DraftHead
from tests.engine.tiny import engine, model


@functools.cache
def random_head(version="preview", dtype=torch.float32, **sizes):
    config = HeadConfig.for_target(model(version).config.text, "0" * 64, (0, 1, 2), **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        head = DraftHead(config)
        for weight in head.parameters():
            if weight.dim() == 1:
                weight.data += 0.1 * torch.randn_like(weight)
        head.token_ids.copy_(torch.randperm(config.vocab_size)[: config.draft_vocab_size])
    head = head.to(dtype)
    pack_weights(head)
    return head


def drafted(head, version="preview", dtype=torch.float32, width=1, min_score=0.0, speculation=None, **config):
    """An engine whose drafter is `head`."""
    drafter = HeadDrafter(head, model(version, dtype), width, min_score)
    settings = {"num_speculative_tokens": 5, "adaptive": False} | (speculation or {})
    values = {"backends": "cpp", "max_model_len": 640, "speculation": settings} | config
    return engine(version, dtype, drafter, **values)
