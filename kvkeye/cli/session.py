"""A loaded model that answers one conversation at a time, with progress on stderr. Shared by run, chat and demo."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvkeye import env
from kvkeye.cli import options
from kvkeye.cli.bundled import model_files
from kvkeye.cli.exits import ENVIRONMENT, INTERNAL, USAGE, CommandError
from kvkeye.cli.terminal import count, stage
from kvkeye.errors import ConfigError

if TYPE_CHECKING:
    from kvkeye.engine import LLM, RequestOutput, SamplingParams
    from kvkeye.engine.outputs import Delta, Stage
    from kvkeye.engine.prepare import Prepared

Message = dict[str, Any]
OnPrepared = Callable[["Session", "Prepared"], None]


def _ignore(delta: Delta) -> None:
    """Shows nothing."""


class Session:
    """One model; `sampling` are the checkpoint's values with the command line's over them."""

    def __init__(self, llm: LLM, sampling: SamplingParams, mode: str | None) -> None:
        self.llm, self.sampling, self.mode = llm, sampling, mode

    def ask(
        self,
        messages: list[Message],
        show: Callable[[Delta], None] = _ignore,
        on_prepared: OnPrepared | None = None,
    ) -> RequestOutput:
        """The answer to a conversation; `show` gets it piece by piece, `on_prepared` what the model will be shown.

        Raises   RequestError, MediaError; CommandError where the engine could not finish
        """
        with stage("pictures and prompt"):
            prepared = self.llm.engine.prepare(messages, self.mode)
        if on_prepared is not None:
            on_prepared(self, prepared)
        output: RequestOutput | None = None
        progress = _Progress(prepared)
        stream: Any = self.llm.stream(prepared, self.sampling, on_stage=progress.enter)
        with closing(stream) as deltas:  # closing it early aborts the request
            with progress:
                first = next(deltas, None)
            for delta in chain([first] if first else [], deltas):
                show(delta)
                output = delta.output
        if output is None or output.outputs[0].finish_reason == "error":
            reason = "no answer" if output is None else output.error
            raise CommandError(f"the engine could not finish this request: {reason}", INTERNAL)
        return output

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float], int]:
        """mean and std of the checkpoint's pixel values, and its merge size."""
        processor: Any = self.llm.engine.processor
        vision = processor.config.vision
        return processor.preprocessor.mean, processor.preprocessor.std, vision.spatial_merge_size


class _Progress(ExitStack):
    """Says which stage an answer is in until its first piece comes."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__()
        num_patches = sum(len(media.pixel_values) for media in prepared.media)
        self._labels = {
            "vision": f"vision of {num_patches} patches",
            "prefill": f"prefill of {count(len(prepared.token_ids), 'token')}",
        }

    def enter(self, name: Stage) -> None:
        self.close()
        if name in self._labels:
            self.enter_context(stage(self._labels[name]))


@contextmanager
def open_session(arguments: argparse.Namespace, model: Path) -> Iterator[Session]:
    """Loads a model. Options that can be refused without it are refused first."""
    from kvkeye.models.keye.config import KeyeConfig

    options.sampling(arguments)
    config = options.engine_config(arguments, model)
    with model_files():
        KeyeConfig.from_folder(model)
    with stage(f"loading {model.name}"):
        from kvkeye import LLM

        _check_backends(config.backends)
        with model_files():
            llm = LLM(**asdict(config))
    with llm:
        yield Session(llm, options.sampling(arguments, llm.engine.default_sampling()), arguments.mode)


def _check_backends(asked: str) -> None:
    """Refuses an order that names something unknown, be it from the command line or from the environment."""
    from kvkeye import ops

    for order, code in ((asked, USAGE), (env.BACKENDS.get(), ENVIRONMENT)):
        try:
            with ops.use_backends(order or "eager"):
                pass
        except ConfigError as error:
            raise CommandError(str(error), code) from error


def statistics(output: RequestOutput) -> dict[str, Any]:
    """The engine's metrics of one request; `prefill_ms` without the part of vision in it."""
    metrics = asdict(output.metrics)
    if metrics["prefill_ms"] is not None:
        metrics["prefill_ms"] = max(0.0, metrics["prefill_ms"] - metrics["vision_ms"])
    return metrics


def statistics_line(output: RequestOutput) -> str:
    """Tokens and times of one answer, in one line, and what proposals were worth where some were accepted."""
    m = statistics(output)
    proposed = m["speculation"]
    saved = "" if not proposed or not proposed["num_accepted_tokens"] else f" | {speculation_text(proposed)}"
    speed = "" if m["tokens_per_s"] is None else f", {m['tokens_per_s']:.1f} tokens/s"
    return (
        f"prompt {m['num_prompt_tokens']} tokens ({m['num_cached_tokens']} cached), answer {m['num_generated_tokens']}"
        f" | media {_ms(m['prepare_ms'])}, vision {_ms(m['vision_ms'])}, prefill {_ms(m['prefill_ms'])}, "
        f"decode {_ms(m['decode_ms'])}{speed}{saved}"
    )


def speculation_text(m: dict[str, Any]) -> str:
    """What proposals were worth, in one line; of `asdict(SpeculationMetrics)`."""
    if not m["num_decode_steps"]:
        return "no decoding steps"
    shares = " ".join(f"{share:.0%}" for share in m["acceptance_by_position"]) or "none"
    return (
        f"{m['tokens_per_step']:.2f} tokens per step, {m['num_accepted_tokens']} of {m['num_draft_tokens']} proposals "
        f"accepted (by position {shares}), about {m['saved_ms']:.0f} ms saved"
    )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"
