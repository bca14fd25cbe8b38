"""A prompt of its own for every tile, encoded by the pipeline itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvkeye.errors import ConfigError
from kvkeye.video.adapters import Adapter, Arguments
from kvkeye.video.config import VideoMergeConfig
from kvkeye.video.tiles import TilePlan


class TilePrompts:
    """Watches the pipeline encode its prompt, encodes the tiles' the same way, and swaps them in per tile.

    The pipeline's prompt is the first tile's. In a forward pass the rows that hold it are known by their values, so
    negative prompts and batched guidance stay as they are.
    """

    def __init__(self, adapter: Adapter, config: VideoMergeConfig) -> None:
        self.adapter, self.config = adapter, config
        self.embeds: list[dict[str, Tensor]] = []

    def encoding(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """`encode_prompt` that also encodes every tile's prompt, with the same settings."""
        signature = inspect.signature(encode)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs).arguments
            prompt = bound.get("prompt")
            if prompt not in (self.config.prompts[0], [self.config.prompts[0]]):
                raise ConfigError(
                    f"VideoMergeConfig.prompts: the pipeline was called with {prompt!r}; the first of the tiles' "
                    f"prompts, {self.config.prompts[0]!r}, is required. Call the pipeline with it."
                )
            alone = {k: v for k, v in bound.items() if not k.startswith("negative")} | {"num_videos_per_prompt": 1}
            if "do_classifier_free_guidance" in signature.parameters:
                alone["do_classifier_free_guidance"] = False
            self.embeds = [self._encoded(encode(**alone | {"prompt": text})) for text in self.config.prompts]
            return encode(*args, **kwargs)

        return encode_prompt

    def _encoded(self, returned: tuple[Any, ...]) -> dict[str, Tensor]:
        return {name: returned[at] for name, at in zip(self.adapter.text, self.adapter.encoded)}

    def per_tile(self, plan: TilePlan, static: TilePlan, arguments: Arguments) -> list[dict[str, Tensor]]:
        """The text arguments of each tile of `plan`; prompts belong to the tiles of `static`.

        Raises ConfigError where there are not as many prompts as static tiles.
        """
        if len(self.embeds) != len(static.starts):
            raise ConfigError(
                f"VideoMergeConfig.prompts: got {len(self.config.prompts)}; this clip of {static.num_frames} latent "
                f"frames has {len(static.starts)} tiles of {static.tile}, and one prompt per tile is required."
            )
        first = self.embeds[0][self.adapter.text[0]]
        given = arguments[self.adapter.text[0]]
        rows = [torch.equal(row, first[0].to(row)) for row in given]
        return [self._swapped(arguments, rows, *self._between(float(centre), static)) for centre in plan.centres()]

    def _between(self, centre: float, static: TilePlan) -> tuple[int, int, float]:
        """The two static tiles around a point in time, and the share of the second."""
        centres = static.centres()
        right = int(torch.searchsorted(centres, centre).clamp(1, len(centres) - 1)) if len(centres) > 1 else 0
        left = max(right - 1, 0)
        gap = float(centres[right] - centres[left]) or 1.0
        share = min(max((centre - float(centres[left])) / gap, 0.0), 1.0)
        if self.config.prompt_blend == "nearest":
            share = float(share > 0.5)
        return left, right, share

    def _swapped(
        self, arguments: Arguments, rows: list[bool], left: int, right: int, share: float
    ) -> dict[str, Tensor]:
        found = {}
        for name in self.adapter.text:
            given = arguments[name]
            a, b = (self.embeds[k][name][0].to(given) for k in (left, right))
            mixed = a if share == 0 else b if share == 1 else torch.lerp(a, b, share)
            if name.endswith("mask") and 0 < share < 1:
                mixed = torch.maximum(a, b)  # a token counts where either prompt has one
            found[name] = torch.stack([mixed if swap else row for row, swap in zip(given, rows)])
        return found
