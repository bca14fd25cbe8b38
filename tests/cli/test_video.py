"""`kvkeye video` on tiny random pipelines saved as folders: clips, interruption and continuation, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
from PIL import Image

from kvkeye.cli.video_models import number, spread
from tests.cli.interrupts import heed_interrupts
from tests.video import tiny

SMALL = ("--height", "16", "--width", "16", "--fps", "8", "--steps", "3")
DEFAULTS = {"num_frames": 9, "height": 16, "width": 16, "fps": 8.0, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def t2v(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("t2v")
    tiny.wan(tiny.unipc(), reads=True).save_pretrained(folder)
    (folder / "video_defaults.json").write_text(json.dumps(DEFAULTS))
    return folder


@pytest.fixture(scope="module")
def i2v(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("i2v")
    pipe = tiny.wan_i2v(tiny.unipc())
    pipe.tokenizer, pipe.text_encoder = tiny.text_encoder()
    pipe.register_modules(tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    pipe.save_pretrained(folder)
    (folder / "video_defaults.json").write_text(json.dumps(DEFAULTS))
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "first.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


def length(path: Path) -> tuple[int, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return sum(1 for _ in container.decode(video=0)), float(stream.average_rate)


@pytest.mark.parametrize(
    "method", ["videomerge", "shifted", "looped", "attention", "direct", "concat", "freenoise", "genl"]
)
def test_text_to_video_with_every_method(call, t2v, tmp_path, method):
    out = tmp_path / "clip.mp4"
    done = call("video", "a red disc moves left", "--pipeline", t2v, "--method", method, "--seconds", 4, "--out", out)
    assert done.code == 0, done.err
    assert done.out == f"{out}\n" and length(out) == (33, 8.0)
    assert "33 frames, 16x16" in done.err and "free on cpu" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


def test_image_to_video_by_chunks_with_a_report(call, i2v, picture, tmp_path):
    out, report = tmp_path / "clip.mp4", tmp_path / "report"
    words = ("video", "a red disc", "--pipeline", i2v, "--image", picture, "--seconds", 3, "--out", out)
    done = call(*words, "--candidates", 3, "--k", 1, "--report", report)
    assert done.code == 0, done.err
    assert length(out)[0] == 25 and "3 chunks of 9 frames, 3 candidates each" in done.err
    facts = json.loads((report / "report.json").read_text())
    assert facts["borders"] == [9, 17] and len(facts["chunks"]) == 3
    assert all(chunk["chosen"] in chunk["seeds"] and len(chunk["scores"]) == 3 for chunk in facts["chunks"])
    assert all(chunk["saved"] == 1 for chunk in facts["chunks"]) and (report / "report.png").stat().st_size > 10_000


def test_image_to_video_by_tiles(call, i2v, picture, tmp_path):
    out = tmp_path / "clip.mp4"
    words = ("video", "a red disc", "--pipeline", i2v, "--image", picture, "--seconds", 3, "--out", out)
    done = call(*words, "--method", "videomerge", "--anchor")
    assert done.code == 0 and length(out)[0] == 25, done.err


def kill_after(state: Path, words: list[object], number_of_signal: int) -> subprocess.Popen[str]:
    """Starts the command in its own process and signals it once `state` has appeared and been replaced."""
    command = [sys.executable, "-m", "kvkeye", *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=heed_interrupts)
    limit = time.monotonic() + 240
    while not state.exists() and time.monotonic() < limit and process.poll() is None:
        time.sleep(0.005)
    first = state.stat().st_mtime_ns
    while state.exists() and state.stat().st_mtime_ns == first and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number_of_signal)
    process.wait(60)
    return process


@pytest.mark.parametrize("kind", ["tiles", "chunks"])
def test_a_killed_run_continues_to_the_bytes_of_an_uninterrupted_one(call, t2v, i2v, picture, tmp_path, kind):
    """A process is killed for real, in the middle of sampling."""
    words = ["video", "a blue square moves right", "--seconds", 4, "--steps", 60, "--seed", 3]
    words += ["--pipeline", t2v] if kind == "tiles" else ["--pipeline", i2v, "--image", picture, "--candidates", 2]
    whole, killed = tmp_path / "whole.mp4", tmp_path / "killed.mp4"
    state = tmp_path / "killed.mp4.work" / ("sampling.safetensors" if kind == "tiles" else "chunk-0001.safetensors")
    process = kill_after(state, [*words, "--out", killed], signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and state.exists() and not killed.exists()
    assert call(*words, "--out", whole).code == 0
    done = call(*words, "--out", killed, "--resume")
    assert done.code == 0, done.err
    assert killed.read_bytes() == whole.read_bytes() and not state.exists()


def test_ctrl_c_keeps_the_state_and_other_settings_do_not_continue_it(call, t2v, tmp_path):
    words = ["video", "a red disc", "--pipeline", t2v, "--seconds", 4, "--steps", 60, "--out", tmp_path / "clip.mp4"]
    state = tmp_path / "clip.mp4.work" / "sampling.safetensors"
    process = kill_after(state, words, signal.SIGINT)
    assert process.returncode == 130 and state.exists()
    assert "--resume continues" in process.stderr.read()
    done = call(*words, "--resume", "--seed", 9)
    assert done.code == 2 and "other settings" in done.err and state.exists()


def test_prompts_per_tile_come_from_a_file(call, t2v, tmp_path):
    lines = tmp_path / "prompts.txt"
    words = ("video", "x", "--pipeline", t2v, "--seconds", 2, "--overlap", 1, "--out", tmp_path / "clip.mp4")
    lines.write_text("a red disc\na blue disc\n")
    done = call(*words, "--prompts", lines)
    assert done.code == 0 and length(tmp_path / "clip.mp4")[0] == 17, done.err
    lines.write_text("a red disc\n")
    done = call(*words, "--prompts", lines)
    assert done.code == 2 and "1 prompts; the clip has 2 tiles" in done.err


BAD = {
    "no folder": (["--pipeline", "{tmp}/gone"], 4, ["model_index.json", "diffusers' layout"]),
    "wrong class": (["--pipeline", "{tmp}/kind"], 2, ["a StableDiffusionPipeline", "WanPipeline"]),
    "wrong method": (["--method", "kstep"], 2, ["a WanPipeline; method kstep needs", "WanImageToVideoPipeline"]),
    "tile": (["--tile", "65"], 2, ["got 65 latent frames", "holds 64"]),
    "overlap": (["--overlap", "3"], 2, ["got 3 of a tile of 3", "Lower overlap"]),
    "too long": (["--method", "direct", "--seconds", "60"], 2, ["clip of 121 latent frames", "holds 64"]),
    "picture for text": (["--image", "{tmp}/bad.png", "--method", "videomerge"], 2, ["takes no picture"]),
    "unreadable picture": (["--pipeline", "{i2v}", "--image", "{tmp}/bad.png"], 2, ["--image", "bad.png"]),
    "missing picture": (["--pipeline", "{i2v}", "--image", "{tmp}/gone.png"], 2, ["no such file"]),
    "no picture": (["--pipeline", "{i2v}", "--method", "videomerge"], 2, ["begins from a picture"]),
    "disk": (["--seconds", "100000000000"], 5, ["are needed for latents and clip", "free in"]),
    "length": (["--seconds", "-1"], 2, ["number above 0"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_any_weight_is_read(call, t2v, i2v, tmp_path, name, monkeypatch):
    monkeypatch.setattr("kvkeye.video.folder.load_pipeline", lambda *given: pytest.fail("weights were read"))
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "kind").mkdir()
    for part in ("", "unet", "vae"):
        (tmp_path / "kind" / part).mkdir(exist_ok=True)
        (tmp_path / "kind" / part / "config.json").write_text("{}")
    (tmp_path / "kind" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": []}')
    words, code, parts = BAD[name]
    words = [word.format(tmp=tmp_path, i2v=i2v) for word in words]
    base = [] if "--pipeline" in words else ["--pipeline", t2v]
    done = call("video", "a red disc", *base, *words, "--out", tmp_path / "clip.mp4")
    assert done.code == code, done.err
    assert all(part in done.err for part in parts) and "Traceback" not in done.err, done.err
    assert not (tmp_path / "clip.mp4").exists()


def test_a_models_answer_becomes_one_prompt_per_tile():
    found = spread("a red disc", "- it rolls left\n\n- a red disc at rest", 3)
    assert found == ("a red disc, it rolls left", "a red disc at rest", "a red disc at rest")
    assert spread("a red disc", "", 2) == ("a red disc", "a red disc")
    assert (number("8"), number("I say 7.5 of 10"), number("none"), number("99")) == (0.8, 0.75, 0.0, 1.0)
