"""Keye-VL: vision tower, projector and language model in one module.

Knows embeddings, grids and contexts; must not know text, files or requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvkeye.layers import Context
from kvkeye.models.keye.config import KeyeConfig
from kvkeye.models.keye.language import LanguageModel
from kvkeye.models.keye.positions import MediaGrid
from kvkeye.models.keye.projector import Projector
from kvkeye.models.keye.vision import PackLayout, VisionTower


class KeyeModel(nn.Module):
    """One checkpoint's computation; all parameters share one dtype.

    A prompt runs as `hidden = model(model.embed(ids, media, rows), positions, context)` and
    `model.logits(hidden[wanted])`, with `media = model.encode_media(pixel_values, grids)`.
    """

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision, joint_frames=config.version == "preview")
        self.projector = Projector(config)
        self.language = LanguageModel(config.text)

    @property
    def dtype(self) -> torch.dtype:
        return self.language.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.language.norm.weight.device

    def encode_media(self, pixel_values: Tensor, items: Sequence[MediaGrid]) -> Tensor:
        """Embeddings of pictures and clips.

        Shapes     pixel_values [N, 588], rows in (channel, row, column) order, patches in raster order, items packed
        Args       pixel_values any floating dtype, normalised;  items in the order of the rows, grids in patches
        Returns    [N / merge^2, hidden] dtype of the model, items packed in the same order
        Errors     ValueError where rows and grids disagree or a grid side is no multiple of the merge size
        """
        expected = (sum(item.num_patches for item in items), self.config.vision.patch_dim)
        if tuple(pixel_values.shape) != expected:
            raise ValueError(
                f"encode_media: pixel_values is {tuple(pixel_values.shape)}; the {len(items)} grids require "
                f"{list(expected)}. Pass the rows of exactly these items."
            )
        if not items:
            return self.language.norm.weight.new_empty(0, self.config.text.hidden_size)
        return self.projector(self.visual(pixel_values, items), items)  # type: ignore[no-any-return]

    def encode_packed(self, pixel_values: Tensor, layout: PackLayout, merge_rows: Tensor) -> Tensor:
        """encode_media of a pack whose grids are in tensors alone: nothing is read from the host's lists.

        pixel_values [N, 588], merge_rows [N] int64 as Projector.merge_rows -> [N / merge^2, hidden].
        """
        return self.projector.gather(self.visual.encode(pixel_values, layout), merge_rows)

    def embed(self, token_ids: Tensor, media_embeds: Tensor | None = None, media_rows: Tensor | None = None) -> Tensor:
        """Embeddings of tokens, those of media in the rows of their pad tokens.

        token_ids [T] int64, media_embeds [n, H], media_rows [n] int64 indices into T -> [T, H].
        """
        embeds: Tensor = self.language.embed_tokens(token_ids)
        if media_embeds is None or media_rows is None:
            return embeds
        return embeds.index_copy(0, media_rows, media_embeds)

    def forward(self, embeds: Tensor, positions: Tensor, context: Context) -> Tensor:
        """embeds [T, H], positions [3, T] int64 -> normalised hidden states [T, H]."""
        return self.language(embeds, positions, context)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, V], in the dtype of the model."""
        return self.language.logits(hidden)
