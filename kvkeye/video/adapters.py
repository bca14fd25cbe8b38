"""What a tile needs to know of each model family: where time lies in the denoiser's arguments, and which of them
ride along. Tiles restart their positions at 0, as in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvkeye.errors import ConfigError

Arguments: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class TimeAxis:
    """The axis of an argument that time runs along, `per_frame` entries to a latent frame."""

    axis: int
    per_frame: int = 1


@dataclass(frozen=True)
class Adapter:
    """One pipeline family.

    axes(module, arguments)   the arguments with a time axis; `hidden_states` and the output share theirs
    num_frames(module, arguments)  latent frames of the clip
    batched          arguments with a batch axis in front
    text             the arguments that hold the prompt, in the order in which `encoded` returns them
    encoded          the positions of these in what the pipeline's `encode_prompt` returns
    native           latent frames of a clip in training
    limit(module)    latent frames that the positional table holds, or None
    multiple(module) latent frames that are embedded together; a tile must be a multiple
    channels_axis    axis of `hidden_states` on which a guide image's condition follows the noise, or None
    frame_first      latents are [B, T, C, h, w] instead of [B, C, T, h, w]
    """

    family: str
    axes: Callable[[Any, Arguments], dict[str, TimeAxis]]
    num_frames: Callable[[Any, Arguments], int]
    batched: tuple[str, ...]
    text: tuple[str, ...]
    encoded: tuple[int, ...]
    native: Callable[[Any], int]
    limit: Callable[[Any], int | None]
    multiple: Callable[[Any], int] = lambda module: 1
    channels_axis: int | None = None
    frame_first: bool = False
    denoisers: tuple[str, ...] = ("transformer",)
    extras: Callable[[Any, Arguments, int], dict[str, Any]] = lambda module, arguments, tile: {}


def _wan_axes(module: Any, arguments: Arguments) -> dict[str, TimeAxis]:
    axes = {"hidden_states": TimeAxis(2)}
    timestep = arguments["timestep"]
    if timestep.ndim == 2:  # Wan 2.2 TI2V: one timestep per token
        axes["timestep"] = TimeAxis(1, timestep.shape[1] // arguments["hidden_states"].shape[2])
    return axes


def _cogvideox_extras(module: Any, arguments: Arguments, tile: int) -> dict[str, Any]:
    """The first rows of the rotary table that the pipeline made for the whole clip."""
    table = arguments.get("image_rotary_emb")
    if table is None:
        return {}
    rows = table[0].shape[0] * tile // arguments["hidden_states"].shape[1]
    return {"image_rotary_emb": tuple(part[:rows] for part in table)}


def _ltx_axes(module: Any, arguments: Arguments) -> dict[str, TimeAxis]:
    if arguments.get("video_coords") is not None:
        raise ConfigError("LTX: video_coords were given; tiles need num_frames, height and width instead.")
    per_frame = arguments["hidden_states"].shape[1] // arguments["num_frames"]
    axes = {"hidden_states": TimeAxis(1, per_frame)}
    if arguments["timestep"].ndim == 2 and arguments["timestep"].shape[1] > 1:  # image to video: one per token
        axes["timestep"] = TimeAxis(1, per_frame)
    return axes


def _frames_at(axis: int) -> Callable[[Any, Arguments], int]:
    return lambda module, arguments: int(arguments["hidden_states"].shape[axis])


def _wan(channels_axis: int | None) -> Adapter:
    return Adapter(
        family="Wan",
        axes=_wan_axes,
        num_frames=_frames_at(2),
        batched=("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image"),
        text=("encoder_hidden_states",),
        encoded=(0,),
        native=lambda module: 21,
        limit=lambda module: int(module.config.rope_max_seq_len) * int(module.config.patch_size[0]),
        channels_axis=channels_axis,
        denoisers=("transformer", "transformer_2"),
    )


def _cogvideox_native(module: Any) -> int:
    return (int(module.config.sample_frames) - 1) // int(module.config.temporal_compression_ratio) + 1


def _cogvideox(channels_axis: int | None) -> Adapter:
    return Adapter(
        family="CogVideoX",
        axes=lambda module, arguments: {"hidden_states": TimeAxis(1)},
        num_frames=_frames_at(1),
        batched=("hidden_states", "timestep", "encoder_hidden_states", "timestep_cond", "ofs"),
        text=("encoder_hidden_states",),
        encoded=(0,),
        native=_cogvideox_native,
        limit=lambda module: _cogvideox_native(module) if module.config.use_learned_positional_embeddings else None,
        multiple=lambda module: int(module.config.patch_size_t or 1),
        channels_axis=channels_axis,
        frame_first=True,
        extras=_cogvideox_extras,
    )


_HUNYUAN = Adapter(
    family="HunyuanVideo",
    axes=lambda module, arguments: {"hidden_states": TimeAxis(2)},
    num_frames=_frames_at(2),
    batched=(
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "pooled_projections",
        "guidance",
    ),
    text=("encoder_hidden_states", "pooled_projections", "encoder_attention_mask"),
    encoded=(0, 1, 2),
    native=lambda module: 33,
    limit=lambda module: None,
)
_LTX = Adapter(
    family="LTX",
    axes=_ltx_axes,
    num_frames=lambda module, arguments: int(arguments["num_frames"]),
    batched=("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"),
    text=("encoder_hidden_states", "encoder_attention_mask"),
    encoded=(0, 1),
    native=lambda module: 21,
    limit=lambda module: None,
    extras=lambda module, arguments, tile: {"num_frames": tile},
)
ADAPTERS = {
    "WanPipeline": _wan(None),
    "WanImageToVideoPipeline": _wan(1),
    "HunyuanVideoPipeline": _HUNYUAN,
    "CogVideoXPipeline": _cogvideox(None),
    "CogVideoXImageToVideoPipeline": _cogvideox(2),
    "LTXPipeline": _LTX,
}


def adapter_of(pipe: Any) -> Adapter:
    """The adapter of a pipeline. Raises ConfigError that lists the supported classes."""
    for kind in type(pipe).__mro__:
        if kind.__name__ in ADAPTERS:
            return ADAPTERS[kind.__name__]
    raise ConfigError(
        f"VideoMerge: got a {type(pipe).__name__}; supported are {', '.join(ADAPTERS)}. Load one of these; image to "
        "video with other models is ChunkRollout's."
    )


def denoisers(pipe: Any, adapter: Adapter) -> list[Any]:
    """The pipeline's denoising modules, high noise first (Wan 2.2 has two)."""
    return [module for name in adapter.denoisers if (module := getattr(pipe, name, None)) is not None]


def check_tile(adapter: Adapter, module: Any, tile: int) -> None:
    """Raises ConfigError where the denoiser cannot run on a tile of this many latent frames."""
    limit, multiple = adapter.limit(module), adapter.multiple(module)
    if limit is not None and tile > limit:
        raise ConfigError(
            f"VideoMergeConfig.tile: got {tile} latent frames; the positional table of this {adapter.family} model "
            f"holds {limit}. Lower tile."
        )
    if tile % multiple:
        raise ConfigError(
            f"VideoMergeConfig.tile: got {tile} latent frames; this {adapter.family} model embeds {multiple} together, "
            f"so a multiple of {multiple} is required, e.g. {tile // multiple * multiple or multiple}."
        )


def check_clip(adapter: Adapter, module: Any, num_frames: int) -> None:
    """Raises ConfigError where one pass over the whole clip would leave the positional table."""
    limit = adapter.limit(module)
    if limit is not None and num_frames > limit:
        raise ConfigError(
            f"{adapter.family}: a clip of {num_frames} latent frames; the positional table of this model holds "
            f"{limit}. Make a shorter clip, or one from tiles in latent mode."
        )


def cut(x: Tensor, where: TimeAxis, start: int, length: int) -> Tensor:
    """The frames [start, start + length) of a tensor, modulo its length; a view where they do not wrap."""
    axis, num = where.axis, x.shape[where.axis]
    first, size = start * where.per_frame % num, length * where.per_frame
    if first + size <= num:
        return x.narrow(axis, first, size)
    return torch.cat([x.narrow(axis, first, num - first), x.narrow(axis, 0, size - (num - first))], axis)
