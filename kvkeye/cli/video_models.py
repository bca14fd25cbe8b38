"""A Keye-VL model that writes prompts for tiles or judges frames, as the callables that `kvkeye.video` takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from kvkeye.cli.bundled import resolve_model

_REFINE = (
    "A video shows: {prompt}\nWrite {count} descriptions of consecutive moments of this one video, one per line, "
    "without numbers. Every line names the same subject with the same appearance, scene and light, and one movement."
)
_JUDGE = (
    "These frames belong to a video that shows: {prompt}\nIs it sharp, natural, and does it move? Answer with one "
    "number from 0 (broken) to 10 (perfect)."
)
_FRAMES = 4


def refine(model: str, prompt: str, count: int) -> tuple[str, ...]:
    """A prompt for each of `count` tiles, the original in front of each; lines that are missing repeat the last."""
    from kvkeye import LLM, SamplingParams

    with LLM(str(resolve_model(model))) as llm:
        asked = [{"role": "user", "content": _REFINE.format(prompt=prompt, count=count)}]
        text = llm.chat(asked, SamplingParams(temperature=0.0, max_tokens=80 * count))[0].outputs[0].text
    return spread(prompt, text, count)


def spread(prompt: str, text: str, count: int) -> tuple[str, ...]:
    """The lines of a model's answer as exactly `count` prompts."""
    lines = [line.strip(" -*\t") for line in text.splitlines() if line.strip(" -*\t")] or [prompt]
    lines += [lines[-1]] * (count - len(lines))
    return tuple(line if prompt in line else f"{prompt}, {line}" for line in lines[:count])


def judge(model: str, prompt: str) -> Callable[[Any], float]:
    """Scores frames [F, 3, H, W] in [0, 1]: 0 to 1, 0 where the model gives no number."""
    from kvkeye import LLM, SamplingParams

    llm = LLM(str(resolve_model(model)))

    def score(frames: Any) -> float:
        import torch

        places = torch.linspace(0, len(frames) - 1, _FRAMES).round().long()
        pictures = (frames[places] * 255).round().byte()
        content = [{"type": "image", "image": picture} for picture in pictures]
        content.append({"type": "text", "text": _JUDGE.format(prompt=prompt)})
        answer = llm.chat([{"role": "user", "content": content}], SamplingParams(temperature=0.0, max_tokens=16))
        return number(answer[0].outputs[0].text)

    return score


def number(text: str) -> float:
    """The first number of an answer, over 10."""
    found = re.search(r"\d+(?:\.\d+)?", text)
    return min(float(found[0]) / 10, 1.0) if found else 0.0
