"""Attention: packed sequences, a paged cache, and the merging of partial results."""

from .merge import (
    merge_attention_states,
    merge_attention_states_backward,
    merge_attention_states_backward_refuses,
    merge_attention_states_refuses,
)
from .paged import paged_attention, paged_attention_refuses
from .varlen import varlen_attention, varlen_attention_refuses
from .varlen_backward import varlen_attention_backward, varlen_attention_backward_refuses

__all__ = [
    "merge_attention_states",
    "merge_attention_states_backward",
    "merge_attention_states_backward_refuses",
    "merge_attention_states_refuses",
    "paged_attention",
    "paged_attention_refuses",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_backward_refuses",
    "varlen_attention_refuses",
]
