"""VideoMerge: a hook on the denoiser that runs it tile by tile and averages what comes out, or averages in attention.

The pipeline's own loop, scheduler, guidance, callbacks and offloading stay. One prediction for the whole clip goes to
the scheduler, in fp32, so that multistep solvers keep one state and stochastic ones draw noise once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.hooks.hooks import (
    BaseState,
    CacheContext,
    HookRegistry,
    ModelHook,
    StateManager,
    _set_cache_context,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from kvkeye import ops
from kvkeye.video.adapters import Adapter, TimeAxis, adapter_of, check_clip, check_tile, cut, denoisers
from kvkeye.video.attention import TilePlace, self_attentions, use_kvkeye_attention
from kvkeye.video.config import VideoMergeConfig
from kvkeye.video.long_latents import long_prepare_latents
from kvkeye.video.overrides import replace_method
from kvkeye.video.progress import TileProgress, VideoCancelled
from kvkeye.video.prompts import TilePrompts
from kvkeye.video.tiles import TilePlan, plan_tiles

HOOK = "kvkeye_videomerge"


@dataclass
class Run:
    """What the hooks of one pipeline share."""

    pipe: Any
    adapter: Adapter
    config: VideoMergeConfig
    prompts: TilePrompts | None = None
    undo: list[Callable[[], None]] = field(default_factory=list)
    step: int = -1
    branch: int = 0

    def begin_pass(self, timestep: Tensor) -> int:
        """The denoising step of a forward pass, found by its timestep: a resumed run counts as an uninterrupted one."""
        known = self.pipe.scheduler.timesteps
        step = int((known.to(torch.float64) - timestep.max().to(known.device, torch.float64)).abs().argmin())
        self.branch = self.branch + 1 if step == self.step else 0
        self.step = step
        return step

    def report(self, first_tile: int, num_tiles: int) -> None:
        """Tells the caller of the next tile. Raises VideoCancelled where it or the pipeline wants to stop."""
        if getattr(self.pipe, "_interrupt", False):
            raise VideoCancelled(f"interrupted before tile {first_tile} of step {self.step}.")
        if self.config.on_tile is None:
            return
        num_steps = len(self.pipe.scheduler.timesteps)
        if self.config.on_tile(TileProgress(self.step, num_steps, first_tile, num_tiles, self.branch)) is False:
            raise VideoCancelled(f"cancelled by on_tile before tile {first_tile} of step {self.step}.")


class TileHook(ModelHook):  # type: ignore[misc]
    """Replaces the forward pass of one denoiser."""

    _is_stateful = True  # so that the pipeline's cache context reaches `contexts`

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.contexts = StateManager(BaseState)
        self.signature: inspect.Signature | None = None

    def initialize_hook(self, module: Any) -> Any:
        self.signature = inspect.signature(type(module).forward)
        return module

    def reset_state(self, module: Any) -> Any:
        self.contexts._state_cache.clear()
        self.contexts._context = None
        return module

    def new_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        run, adapter, config = self.run, self.run.adapter, self.run.config
        assert self.signature is not None
        arguments = dict(self.signature.bind(module, *args, **kwargs).arguments)
        arguments.pop("self")
        num_frames = adapter.num_frames(module, arguments)
        tile = config.resolved_tile(adapter.native(module))
        if tile >= num_frames:
            return self.fn_ref.original_forward(*args, **kwargs)
        step = run.begin_pass(arguments["timestep"])
        plan = plan_tiles(num_frames, tile, config.resolved_overlap(tile), config.schedule, step)
        if config.mode == "attention":
            return self._attend(module, plan, *args, **kwargs)
        embeds = None
        if run.prompts is not None:
            embeds = run.prompts.per_tile(plan, plan_tiles(num_frames, tile, plan.overlap), arguments)
        outputs = self._outputs(module, arguments, plan, embeds)
        axis = adapter.axes(module, arguments)["hidden_states"]
        fused = fuse(outputs, plan, plan.weights(config.window), axis)
        return (fused,) if not arguments.get("return_dict", True) else Transformer2DModelOutput(sample=fused)

    def _attend(self, module: Any, plan: TilePlan, *args: Any, **kwargs: Any) -> Any:
        """One pass over the whole clip, with tiles inside self-attention."""
        check_clip(self.run.adapter, module, plan.num_frames)
        self.run.report(0, 1)
        place = TilePlace()
        place.enter(plan, self.run.config.window, next(module.parameters()).device)
        undo = use_kvkeye_attention(module, place)
        try:
            return self.fn_ref.original_forward(*args, **kwargs)
        finally:
            undo()

    def _outputs(
        self, module: Any, arguments: dict[str, Any], plan: TilePlan, embeds: list[dict[str, Tensor]] | None
    ) -> list[Tensor]:
        """What the denoiser gives for each tile, throw-away frames dropped."""
        run, adapter, size = self.run, self.run.adapter, self.run.config.tile_batch
        axes, context = adapter.axes(module, arguments), self.contexts._context
        found: list[Tensor] = []
        for first in range(0, len(plan.starts), size):
            run.report(first, len(plan.starts))
            chosen = range(first, min(first + size, len(plan.starts)))
            tiles = [Tile.of(plan, k, run.config.anchor) for k in chosen]
            parts = [
                self._arguments(module, arguments, axes, tile, embeds[k] if embeds else None)
                for k, tile in zip(chosen, tiles)
            ]
            with _tile_context(module, context, plan.starts[first]):
                output = self.fn_ref.original_forward(**_stacked(parts, adapter.batched) | {"return_dict": False})[0]
            for tile, own in zip(tiles, output.chunk(len(tiles))):
                found.append(cut(own, axes["hidden_states"], tile.skip, plan.tile))
        return found

    def _arguments(
        self,
        module: Any,
        arguments: dict[str, Any],
        axes: dict[str, TimeAxis],
        tile: Tile,
        embeds: dict[str, Tensor] | None,
    ) -> dict[str, Any]:
        """The denoiser's arguments for one tile."""
        adapter = self.run.adapter
        own = arguments | {name: cut(arguments[name], axis, tile.start, tile.length) for name, axis in axes.items()}
        own |= adapter.extras(module, arguments, tile.length)
        if adapter.channels_axis is not None and tile.start and self.run.config.retain_image:
            own["hidden_states"] = _with_condition(
                own["hidden_states"],
                arguments["hidden_states"],
                adapter.channels_axis,
                axes["hidden_states"].axis,
                int(module.config.out_channels),
            )
        return own | (embeds or {})


@dataclass(frozen=True)
class Tile:
    """What the denoiser sees for one tile: `length` frames from `start`, of which the first `skip` are dropped."""

    start: int
    length: int
    skip: int

    @classmethod
    def of(cls, plan: TilePlan, k: int, anchor: bool) -> Tile:
        """Tile k; with `anchor` one frame longer. The clip's own beginning is no cut, so there the frame comes last."""
        start = plan.starts[k]
        if not anchor:
            return cls(start, plan.tile, 0)
        if start == 0 and not plan.looped:
            return cls(0, plan.tile + 1, 0)
        return cls((start - 1) % plan.num_frames, plan.tile + 1, 1)


def fuse(outputs: list[Tensor], plan: TilePlan, weights: Tensor, where: TimeAxis) -> Tensor:
    """The weighted mean of the tiles' predictions, in fp32, whatever the order of the tiles (`ops.blend_tiles`).

    Shapes     outputs J tensors with `plan.tile` frames along the time axis  weights [J, n] fp64, normalised
    Returns    fp32 with `plan.num_frames` frames
    Source     VideoMerge (arXiv 2503.09926), multi-tile latent fusion; MultiDiffusion's closed form
    """
    shape, axis = list(outputs[0].shape), where.axis
    before, device = math.prod(shape[:axis]), outputs[0].device
    stacked = torch.stack([output.reshape(before, plan.tile, 1, -1) for output in outputs])  # [J, A, n, 1, R]
    starts = torch.tensor(plan.starts, dtype=torch.int32, device=device)
    fused = ops.blend_tiles(stacked[None], starts, weights.float().to(device), plan.num_frames, 1.0)
    shape[axis] = plan.num_frames * where.per_frame
    whole: Tensor = fused.view(shape)
    return whole


def apply_videomerge(pipe: Any, config: VideoMergeConfig | None = None) -> Any:
    """Makes a text-to-video pipeline sample clips longer than its tile; call it as before, with more frames.

    Clips that one tile holds come out bit-identical to the plain pipeline's. Applying again replaces the settings;
    `remove_videomerge` leaves no trace.

    Args     pipe a diffusers pipeline of a supported family (`kvkeye.video.adapters`)
    Returns  pipe
    Raises   ConfigError: an unsupported pipeline, a tile beyond the positional table, an overlap not smaller than it
    """
    config = config or VideoMergeConfig()
    adapter = adapter_of(pipe)
    modules = denoisers(pipe, adapter)
    for module in modules:
        tile = config.resolved_tile(adapter.native(module))
        config.resolved_overlap(tile)
        check_tile(adapter, module, tile + config.anchor)
        if config.mode == "attention":
            self_attentions(module)
    remove_videomerge(pipe)
    run = Run(pipe, adapter, config)
    run.undo.append(replace_method(pipe, "prepare_latents", long_prepare_latents(pipe, adapter, config, modules[0])))
    if config.prompts:
        run.prompts = TilePrompts(adapter, config)
        run.undo.append(replace_method(pipe, "encode_prompt", run.prompts.encoding(pipe.encode_prompt)))
    for module in modules:
        run.undo.append(_register(module, TileHook(run)))
    pipe._kvkeye_videomerge = run
    return pipe


def remove_videomerge(pipe: Any) -> Any:
    """Undoes `apply_videomerge`; does nothing on a pipeline without it. Returns the pipeline."""
    run = vars(pipe).get("_kvkeye_videomerge")
    if run is not None:
        for undo in reversed(run.undo):
            undo()
        del pipe._kvkeye_videomerge
    return pipe


def _register(module: Any, hook: TileHook) -> Callable[[], None]:
    """Puts the hook below an offloading hook, whose pipeline takes that off and on after every call."""
    had_registry = hasattr(module, "_diffusers_hook")
    with _below_offload(module):
        had_forward = "forward" in vars(module)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)

    def undo() -> None:
        with _below_offload(module):
            registry = module._diffusers_hook
            registry.remove_hook(HOOK, recurse=False)
            if not had_registry and not registry.hooks:
                del module._diffusers_hook
            if not had_forward and _is_own_forward(module):
                del module.forward

    return undo


def _is_own_forward(module: Any) -> bool:
    return getattr(module.forward, "__func__", None) is type(module).forward


@contextmanager
def _below_offload(module: Any) -> Iterator[None]:
    """Lets `module.forward` be changed underneath accelerate's wrapper, which calls `module._old_forward`."""
    if "_old_forward" not in vars(module):
        yield
        return
    outer = module.forward
    module.forward = module._old_forward
    try:
        yield
    finally:
        module._old_forward = module.forward
        module.forward = outer


@contextmanager
def _tile_context(module: Any, outer: CacheContext | None, start: int) -> Iterator[None]:
    """Gives the caches inside the denoiser a state of their own for the tile that begins at `start`."""
    if outer is not None:
        _set_cache_context(module, replace(outer, name=f"{outer.name}/from{start}"))
    try:
        yield
    finally:
        if outer is not None:
            _set_cache_context(module, outer)


def _stacked(parts: list[dict[str, Any]], batched: tuple[str, ...]) -> dict[str, Any]:
    """Arguments of several tiles as one batch, tile after tile."""
    if len(parts) == 1:
        return parts[0]
    joined = {name: torch.cat([part[name] for part in parts]) for name in batched if parts[0].get(name) is not None}
    return parts[0] | joined


def _with_condition(own: Tensor, whole: Tensor, channels: int, time: int, noise: int) -> Tensor:
    """A tile whose first position carries the guide image's condition, the channels behind the noise, of frame 0."""
    own = own.clone()
    condition = whole.narrow(time, 0, 1).narrow(channels, noise, whole.shape[channels] - noise)
    own.narrow(time, 0, 1).narrow(channels, noise, own.shape[channels] - noise).copy_(condition)
    return own
