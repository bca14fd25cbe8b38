"""The demo's last part: a long clip by each method, from the bundled pipelines, through `kvkeye video`."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvkeye.cli import exits, video


def long_clips(seed: int, seconds: float, folder: Path) -> int:
    """Writes `videomerge.mp4` and `kstep.mp4` into `folder`, a report beside each; returns the exit code."""
    from PIL import Image

    from kvkeye.train.clips.motion import draw

    motion = draw(seed)
    picture = folder / "first.png"
    pixels = (motion.frames(1)[0].permute(1, 2, 0) * 255).round().byte()
    Image.fromarray(pixels.numpy()).save(picture)
    told = {
        "videomerge": ("overlapping tiles, from the sentence alone", "tiny-t2v", []),
        "kstep": ("chunks that continue a picture, the best of 5 noises each", "tiny-i2v", ["--image", str(picture)]),
    }
    for method, (meaning, pipeline, more) in told.items():
        report = folder / method
        print(f'\nlong clip, {method}: {meaning}\n  "{motion.prompt}"', flush=True)
        words = [motion.prompt, "--pipeline", pipeline, "--method", method, "--seconds", str(seconds)]
        words += ["--seed", str(seed), "--out", str(folder / f"{method}.mp4"), "--report", str(report), *more]
        parser = argparse.ArgumentParser(prog="kvkeye video")
        video.configure(parser)
        code = video.run(parser.parse_args(words))
        if code != exits.OK:
            return code
        print(f"{report / 'report.png'}", flush=True)
    return exits.OK
