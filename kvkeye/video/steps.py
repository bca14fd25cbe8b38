"""Starting and stopping inside a pipeline's own denoising loop.

The loop itself is not copied: `scheduler.step` and the denoisers' forward passes are watched on these objects alone.
Steps that a saved state already covers cost nothing, for the denoisers are not run in them, and the solver's history is
put back before the first step that counts.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvkeye.video.overrides import replaced


class StopSampling(Exception):
    """Leaves the pipeline's loop once the wanted step is reached."""


@dataclass(frozen=True)
class SamplingState:
    """A denoising loop after `step` steps: everything that the rest depends on, besides the pipeline's arguments.

    returned   what the scheduler's last step gave: the latents first
    solver     the scheduler's history and counters
    generator  states of the clips' generators, for schedulers that draw noise: uint8 [clips, bytes]
    shape      of the denoiser's output, by rows of its input
    clean      the prediction of the noise-free latents at this step
    """

    step: int
    returned: tuple[Tensor, ...]
    solver: dict[str, Any]
    generator: Tensor | None
    shape: tuple[int, ...]
    clean: Tensor

    @property
    def latents(self) -> Tensor:
        return self.returned[0]

    def row(self, i: int, count: int) -> SamplingState:
        """The state of one clip out of a batch of `count`."""
        if count == 1:
            return self

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim >= 3:
                return value.chunk(count)[i].clone()
            return [pick(item) for item in value] if isinstance(value, list) else value

        returned = tuple(pick(part) for part in self.returned)
        solver = {name: pick(value) for name, value in self.solver.items()}
        shape = (self.shape[0] // count, *self.shape[1:])
        drawn = None if self.generator is None else self.generator[i : i + 1]
        return SamplingState(self.step, returned, solver, drawn, shape, pick(self.clean))


@dataclass
class StepControl:
    """Watches one call of a pipeline.

    start     continue from here;  stop: leave after this many steps
    on_step   called with the state after each step that was computed
    last      changes the latents that the last step gives (colour anchoring)
    """

    denoisers: Sequence[Any]
    scheduler: Any
    generators: Sequence[torch.Generator] = ()
    start: SamplingState | None = None
    stop: int | None = None
    on_step: Callable[[SamplingState, bool], None] | None = None
    last: Callable[[Tensor], Tensor] | None = None
    state: SamplingState | None = None
    num_forwards: int = 0
    step: int = 0
    _shape: tuple[int, ...] = field(default=(), repr=False)

    @contextmanager
    def watching(self) -> Iterator[StepControl]:
        """Within this block the pipeline may be called once."""
        with ExitStack() as stack:
            for module in self.denoisers:
                stack.enter_context(replaced(module, "forward", self._forward(module.forward)))
            stack.enter_context(replaced(self.scheduler, "step", self._step(self.scheduler.step)))
            yield self

    def _skipping(self) -> bool:
        return self.start is not None and self.step < self.start.step

    def _forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._skipping():
                assert self.start is not None
                zeros = torch.zeros(self.start.shape, device=self.start.latents.device)
                return SimpleNamespace(sample=zeros) if kwargs.get("return_dict", True) else (zeros,)
            self.num_forwards += 1
            output = forward(*args, **kwargs)
            self._shape = tuple(output[0].shape)
            return output

        return run

    def _step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        draws = "generator" in inspect.signature(step).parameters

        @functools.wraps(step)
        def run(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            sample = kwargs["sample"] if "sample" in kwargs else [x for x in args if _is_latents(x)][-1]
            if self._skipping():
                return self._skip(sample, kwargs.get("return_dict", True))
            index = self.scheduler.step_index if hasattr(self.scheduler, "step_index") else None
            if draws and self.generators and kwargs.get("generator") is None:
                # Some pipelines leave stochastic schedulers to torch's global generator; a seed gives one clip.
                kwargs["generator"] = self.generators[0] if len(self.generators) == 1 else list(self.generators)
            result = step(model_output, *args, **kwargs)
            returned = result if isinstance(result, tuple) else (result.prev_sample, _clean_of(result))
            self.step += 1
            is_last = self.step == len(self.scheduler.timesteps)
            if self.on_step is not None or self.step == self.stop:
                clean = self._clean(returned, model_output, sample, index)
                kept = tuple(part for part in returned if part is not None)
                drawn = torch.stack([own.get_state() for own in self.generators]) if self.generators else None
                self.state = SamplingState(self.step, kept, solver_state(self.scheduler), drawn, self._shape, clean)
                if self.on_step is not None:
                    self.on_step(self.state, is_last)
            if self.step == self.stop:
                raise StopSampling
            if is_last and self.last is not None:
                changed = self.last(returned[0])
                return (changed, *result[1:]) if isinstance(result, tuple) else SimpleNamespace(prev_sample=changed)
            return result

        return run

    def _skip(self, sample: Tensor, return_dict: bool) -> Any:
        """Passes a covered step; the last of them puts the saved state in place."""
        assert self.start is not None
        self.step += 1
        returned: tuple[Tensor, ...] = (sample, sample)
        if self.step == self.start.step:
            restore_solver(self.scheduler, self.start.solver, sample.device)
            if self.start.generator is not None:
                for own, drawn in zip(self.generators, self.start.generator):
                    own.set_state(drawn.clone())  # torch reads past a view
            returned = tuple(part.to(sample.device) for part in self.start.returned)
            if self.step == len(self.scheduler.timesteps) and self.last is not None:
                returned = (self.last(returned[0]), *returned[1:])
        return SimpleNamespace(prev_sample=returned[0]) if return_dict else returned

    def _clean(self, returned: tuple[Any, ...], velocity: Tensor, sample: Tensor, index: int | None) -> Tensor:
        """The scheduler's own prediction of clean latents, or x - sigma v of flow matching."""
        if len(returned) > 1 and returned[1] is not None:
            clean: Tensor = returned[1]
            return clean
        history = getattr(self.scheduler, "model_outputs", None)
        if history is not None and getattr(self.scheduler, "predict_x0", True):
            newest: Tensor = history[-1]
            return newest
        sigma = self.scheduler.sigmas[self.scheduler.step_index - 1 if index is None else index]
        return sample.float() - float(sigma) * velocity.float()


def _clean_of(result: Any) -> Tensor | None:
    return getattr(result, "pred_original_sample", None)


def _is_latents(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim >= 3


def solver_state(scheduler: Any) -> dict[str, Any]:
    """What a scheduler's `step` has changed and will read again: counters, and latents it remembers."""
    found: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if isinstance(value, list):
            if all(_is_plain(item) or isinstance(item, Tensor) for item in value):
                found[name] = [item.clone() if isinstance(item, Tensor) else item for item in value]
        elif _is_plain(value):
            found[name] = value
        elif _is_latents(value):
            found[name] = value.clone()
    return found


def restore_solver(scheduler: Any, state: dict[str, Any], device: torch.device) -> None:
    """Puts `solver_state` back after the pipeline has called `set_timesteps`."""

    def placed(value: Any) -> Any:
        return value.to(device, copy=True) if isinstance(value, Tensor) else value

    for name, value in state.items():
        setattr(scheduler, name, [placed(item) for item in value] if isinstance(value, list) else placed(value))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
