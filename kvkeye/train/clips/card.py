"""The model card of a bundled video pipeline: what it is, how it was made, and its measured scores."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvkeye.train.clips.evaluate import ClipScores, table
from kvkeye.train.clips.motion import DIRECTIONS, SHAPES, SPEEDS
from kvkeye.train.scenes import COLORS

_CARD = """# {name}

A very small Wan pipeline in diffusers' folder layout ({parameters:,} parameters with its VAE and text encoder, fp16)
that draws {what}. It exists so that every command and test of long video runs on something whose right
result is known, without a download. It knows nothing else.

## What it can be asked

`a COLOUR SHAPE moves SPEED DIRECTION`

- colours: {colors}
- shapes: {shapes}
- speeds: {speeds} ({rates} pixels per frame and axis)
- directions: {directions}

The shape wraps around the frame. Clips have {num_frames} frames of {width} x {height} pixels, {fps:g} per second;
{steps} denoising steps, guidance {guidance:g}, captions padded to {length} tokens (`video_defaults.json`). The methods
of `kvkeye video` make longer ones.

## How it was made

`kvkeye train video.toml`, on two CPU cores, from nothing: an `AutoencoderKLWan` (4 times smaller in both sides, 2 times
in time), which saw clips joined of others so that every latent speaks for itself; a transformer ({layers} layers of
width {size}) with its text encoder by flow matching, for which two in five clips came with their first frame. tiny-i2v
is this transformer, tiny-t2v the same without its channels for a guide. Self-attention went through
`ops.tile_attention` and its backward. The transformer's weights are moving averages.

## Scores

{clips} clips at prompts and places that training does not draw. In percent: clips that show the prompt's colour, shape,
speed, direction, all four of them; frames in which a shape is seen (presence) and in which its shape and its colour are
right (identity). Position: root mean square {position}. Velocity:
pixels per frame. Colour: distance of RGB in [0, 1]; drift: its change from the first to the last quarter. The last
row is the limit that the VAE sets.

{table}

`python -m kvkeye.train evaluate FOLDER` prints this table. Captions are padded to {length} tokens; the middle row pads
them to 512, as the pipelines do unless told.

## Limits

One shape on one background, {num_frames} frames.
Every combination of words is in training: the scores say nothing about new ones.
"""


def write_card(folder: Path, scores: dict[str, ClipScores]) -> None:
    """Writes `README.md` and `scores.json` into a pipeline's folder."""
    defaults = json.loads((folder / "video_defaults.json").read_text())
    denoiser = json.loads((folder / "transformer" / "config.json").read_text())
    guided = denoiser["in_channels"] != denoiser["out_channels"]
    what = "a clip that continues a picture of one moving shape" if guided else "a clip of one moving shape"
    own = "distance in pixels of the shape's centre from the known motion's"
    line = "distance in pixels of the shape's centre from the best line at the prompt's velocity"
    card = _CARD.format(
        name=folder.name,
        parameters=_parameters(folder),
        what=what,
        colors=", ".join(COLORS),
        shapes=", ".join(SHAPES),
        speeds=", ".join(SPEEDS),
        rates=" and ".join(f"{rate:g}" for rate in SPEEDS.values()),
        directions=", ".join(DIRECTIONS),
        num_frames=defaults["num_frames"],
        width=defaults["width"],
        height=defaults["height"],
        fps=defaults["fps"],
        steps=defaults["num_inference_steps"],
        guidance=defaults["guidance_scale"],
        length=defaults["max_sequence_length"],
        layers=denoiser["num_layers"],
        size=denoiser["num_attention_heads"] * denoiser["attention_head_dim"],
        clips=scores[folder.name].clips,
        position=own if guided else line,
        table=table(scores),
    )
    (folder / "README.md").write_text(card)
    found: dict[str, Any] = {name: asdict(part) for name, part in scores.items()}
    (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    count = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (a handle, not a dict)
                part = 1
                for size in tensors.get_slice(name).get_shape():
                    part *= size
                count += part
    return count
