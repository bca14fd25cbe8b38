"""The table of token embeddings, which may serve as the output head too."""

from __future__ import annotations

from torch import Tensor, nn

from kvkeye import ops
from kvkeye.layers.packed import PackableWeight


class Embedding(PackableWeight):
    """Rows of a table. weight [V, H]. head: whether logits() will be asked too; only then it can be packed."""

    def __init__(self, num_embeddings: int, size: int, head: bool = False) -> None:
        super().__init__(num_embeddings, size)
        self.head = head
        self.reset_parameters()

    def reset_parameters(self) -> None:
        assert self.weight is not None
        nn.init.normal_(self.weight, std=0.02)

    def pack(self) -> None:
        """As PackableWeight, but lookups alone want plain rows."""
        if self.head:
            super().pack()

    def quantize(self) -> None:
        """As PackableWeight for the output head; lookups keep the exact rows."""
        weight = self.weight
        if self.head:
            super().quantize()
            self.weight = weight

    def unpack(self) -> None:
        """Back to a plain weight alone."""
        if self.scales is None:
            super().unpack()
        self.packed = self.scales = None

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H]."""
        if self.weight is not None:
            return nn.functional.embedding(token_ids, self.weight)
        assert self.packed is not None
        panel = self.packed.shape[3]
        block, row = token_ids.div(panel, rounding_mode="floor"), token_ids % panel
        # A row's words lie a panel apart.
        words = self.packed[:, 0].permute(0, 2, 1, 3)[block, row]  # [T, words, values]
        return words.flatten(1)[:, : self.inputs].contiguous()

    def logits(self, hidden: Tensor) -> Tensor:
        """The table as output head: [T, H] -> [T, V]."""
        if self.packed is None:
            found: Tensor = ops.packed_linear(hidden, self.plain_weight(), None)
        elif self.scales is not None:
            found = ops.int8_linear(hidden, self.packed, self.scales, None)
        else:
            found = ops.prepacked_linear(hidden, self.packed, None, self.outputs)
        return found

    def extra_repr(self) -> str:
        return f"{self.outputs} x {self.inputs}" + ("" if self.packed is None else ", packed")
