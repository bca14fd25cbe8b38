"""What a model will need, added up by the same rules that the engine and the processor follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvkeye.engine.block_manager import ceil_div
from kvkeye.engine.config import EngineConfig
from kvkeye.engine.machine import available_bytes, default_device
from kvkeye.engine.memory import DEFAULT_MAX_MODEL_LEN, block_bytes, cache_dtype
from kvkeye.errors import ConfigError, RequestError
from kvkeye.media.job import MediaSettings, num_tokens
from kvkeye.media.limits import MediaLimits
from kvkeye.media.options import MediaOptions
from kvkeye.media.resize import client_size, processor_size
from kvkeye.media.sampling import sample_preview, sample_slow_fast
from kvkeye.media.slow_fast import slow_fast_sizes
from kvkeye.models.keye.config import KeyeConfig, TextConfig, VisionConfig
from kvkeye.models.keye.preprocessor import Preprocessor
from kvkeye.models.keye.weights import num_parameters

FILE_FPS = 30.0  # of a clip's file, where only the rate of looking is known
_PIXEL_BYTES = 4  # pixel values are prepared in fp32


@dataclass(frozen=True)
class MediaSize:
    """A picture or clip as the model will see it. `tokens` counts the worst case, `least_tokens` the best."""

    name: str
    frames: int
    size: str
    tokens: int
    least_tokens: int
    patches: int


@dataclass(frozen=True)
class Estimate:
    """Sizes in bytes. `ctx` tokens for each of `seqs` requests."""

    version: str
    dtype: str
    num_parameters: int
    ctx: int
    seqs: int
    media: tuple[MediaSize, ...]
    media_tokens: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    embedding_bytes: int
    vision_bytes: int
    vision_patches: int
    step_bytes: int
    step_tokens: int
    device: str
    free_bytes: int

    @property
    def total_bytes(self) -> int:
        """Encoding and prefill follow each other; the larger one counts."""
        held = self.weight_bytes + self.kv_bytes + self.embedding_bytes
        return held + max(self.vision_bytes, self.step_bytes)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.free_bytes


def estimate(
    folder: Path,
    images: Sequence[tuple[int, int]],
    clips: Sequence[tuple[float, float, int, int]],
    ctx: int | None,
    seqs: int,
    dtype: str | None,
    kv_cache_dtype: str = "auto",
) -> Estimate:
    """Adds up one model.

    Args     images (height, width) each;  clips (seconds, fps, height, width) each;  dtype None: the checkpoint's
    Raises   ConfigError, MediaError
    """
    config = KeyeConfig.from_folder(folder)
    number = _dtype(dtype or config.torch_dtype)
    settings = _settings(folder, config)
    media = (*(image_tokens(*size, settings) for size in images), *(clip_tokens(*clip, settings) for clip in clips))
    engine = EngineConfig(str(folder), kv_cache_dtype=kv_cache_dtype)
    text, tokens = config.text, sum(item.tokens for item in media)
    ctx = ctx or min(text.max_position_embeddings, DEFAULT_MAX_MODEL_LEN)
    if ctx > text.max_position_embeddings:
        raise RequestError(
            f"--ctx {ctx}: the checkpoint's positions end at {text.max_position_embeddings}. Lower it.", param="ctx"
        )
    per_block = block_bytes(text, engine.block_size, cache_dtype(engine, number))
    device = default_device()
    step_tokens = min(engine.max_num_batched_tokens, ctx * seqs)
    patches = pass_patches(media, seqs, engine.max_num_encoder_patches, per_frame=config.version != "preview")
    return Estimate(
        version=config.version,
        dtype=str(number).removeprefix("torch."),
        num_parameters=num_parameters(config),
        ctx=ctx,
        seqs=seqs,
        media=media,
        media_tokens=tokens,
        weight_bytes=num_parameters(config) * number.itemsize,
        kv_bytes_per_token=per_block // engine.block_size,
        kv_bytes=ceil_div(ctx, engine.block_size) * seqs * per_block,
        embedding_bytes=tokens * seqs * text.hidden_size * number.itemsize,
        vision_bytes=vision_bytes(config.vision, patches, number.itemsize),
        vision_patches=patches,
        step_bytes=step_bytes(text, step_tokens, seqs, number.itemsize),
        step_tokens=step_tokens,
        device=str(device),
        free_bytes=available_bytes(device),
    )


def _dtype(name: str) -> torch.dtype:
    number = getattr(torch, name, None)
    if not isinstance(number, torch.dtype):
        raise ConfigError(f"config.json: torch_dtype={name!r} is no number format. Give --dtype.")
    return number


def _settings(folder: Path, config: KeyeConfig) -> MediaSettings:
    """The checkpoint's media rules; the family's where there is only a config.json."""
    if (folder / "preprocessor_config.json").exists():
        return Preprocessor.from_folder(folder, config).media
    return Preprocessor.from_dict({}, config).media


def image_tokens(height: int, width: int, settings: MediaSettings) -> MediaSize:
    """A picture of this size. Raises MediaError where its sides are refused."""
    size = processor_size(height, width, settings.min_pixels, settings.max_pixels)
    return _media_size(f"picture {width}x{height}", 1, size, num_tokens(1, size), num_tokens(1, size))


def clip_tokens(seconds: float, fps: float, height: int, width: int, settings: MediaSettings) -> MediaSize:
    """A clip of this length looked at `fps` times a second.

    Slow and fast frames of version 1.5 depend on the content: the counts are for all slow and for one slow frame.
    """
    name, file_fps = f"clip {seconds:g} s, {width}x{height}", max(FILE_FPS, fps)
    num_frames, most = max(1, round(seconds * file_fps)), MediaLimits().max_frames
    asked, policy = MediaOptions(fps=fps), settings.video
    if settings.version == "preview":
        frames = len(sample_preview(num_frames, file_fps, asked, policy, most, name).indices)
        share = max(min(policy.max_pixels, policy.total_pixels / frames * 2), int(policy.min_pixels * 1.05))
        size = client_size(height, width, policy.min_pixels, share)
        size = processor_size(*size, settings.min_pixels, settings.max_pixels)
        return _media_size(name, frames, size, num_tokens(frames, size), num_tokens(frames, size))
    frames = len(sample_slow_fast(num_frames, file_fps, asked, policy, most, name).indices)
    all_slow, _ = slow_fast_sizes(height, width, frames, 0, policy)
    slow, fast = slow_fast_sizes(height, width, 1, frames - 1, policy)
    least = num_tokens(1, slow) + num_tokens(frames - 1, fast)
    return _media_size(name, frames, all_slow, num_tokens(frames, all_slow), least)


def _media_size(name: str, frames: int, size: tuple[int, int], tokens: int, least: int) -> MediaSize:
    return MediaSize(
        name, frames, f"{size[1]}x{size[0]}", max(tokens, least), min(tokens, least), 4 * max(tokens, least)
    )


def pass_patches(media: Sequence[MediaSize], seqs: int, budget: int, per_frame: bool) -> int:
    """Patches of the encoder's largest pass: as many as the budget packs, or one picture, clip or frame above it."""
    alone = [ceil_div(item.patches, item.frames) if per_frame else item.patches for item in media]
    return max([min(budget, seqs * sum(item.patches for item in media)), *alone])


def vision_bytes(vision: VisionConfig, patches: int, itemsize: int) -> int:
    """Peak of the tower: pixels, angles, and what the wider half of a block holds at one time."""
    d = vision.hidden_size
    attention = 9 * d  # stream, its norm, qkv, rotated q and k, v, output
    feed_forward = 3 * d + 2 * vision.intermediate_size  # stream before and after attention, norm, both sides of GELU
    pixels = vision.patch_dim * _PIXEL_BYTES
    angles = vision.head_dim * 4  # cos and sin, fp32
    return patches * (max(attention, feed_forward) * itemsize + pixels + angles)


def step_bytes(text: TextConfig, tokens: int, rows: int, itemsize: int) -> int:
    """Peak of a forward pass: what the wider half of a layer holds at one time, and the logits of the drawn rows."""
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    stream = 5 * text.hidden_size  # embeddings; residual stream and its addend, before and after
    attention = (q + 2 * kv) + 2 * q  # qkv, rotated q, output
    feed_forward = 3 * text.intermediate_size  # gate and up, their product
    logits = min(rows, tokens) * text.vocab_size * (itemsize + 4)  # sampling works in fp32
    return tokens * (stream + max(attention, feed_forward)) * itemsize + logits
