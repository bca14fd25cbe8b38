"""From prompt to file: what is on disk when something fails, and that continuing gives the same bytes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest
import torch

from kvkeye.errors import CapacityError, ConfigError
from kvkeye.video import VideoCancelled, VideoMergeConfig
from kvkeye.video.adapters import TimeAxis, cut
from kvkeye.video.job import STATE, VideoJob, run_job
from kvkeye.video.methods import METHODS, merge_config, search_config
from kvkeye.video.state_file import load_state
from tests.video import tiny


def job(tmp_path: Path, name: str = "clip", call: Any = tiny.wan_call, **changes: Any) -> VideoJob:
    arguments = {k: v for k, v in call(33).items() if k not in ("generator", "output_type", "num_frames")}
    settings = {"num_frames": 33, "fps": 8, "merge": VideoMergeConfig(tile=3, overlap=1)} | changes
    return VideoJob(out=tmp_path / f"{name}.mp4", work=tmp_path / f"{name}.work", call=arguments, **settings)


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_defect_8_latents_are_on_disk_before_anything_is_decoded(tmp_path, monkeypatch):
    """The published code saves to a fixed home directory after all denoising, and loses the run when that fails."""
    pipe = tiny.wan()
    whole = job(tmp_path, "whole")
    run_job(pipe, whole)
    own = job(tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(type(pipe.vae.decoder), "forward", lambda *given, **named: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_job(pipe, own)
    state, _ = load_state(own.work / STATE)
    assert state.step == 3 and state.latents.shape == (1, 16, 9, 2, 2) and not own.out.exists()
    outcome = run_job(pipe, own, resume=True)
    assert outcome.facts["forwards"] == 0 and own.out.read_bytes() == whole.out.read_bytes()
    assert not own.work.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux")
@pytest.mark.parametrize("kind", ["tiles", "chunks"])
def test_a_disk_that_fills_while_writing_keeps_the_latents(tmp_path, kind):
    changes: dict[str, Any] = {}
    pipe = tiny.wan()
    if kind == "chunks":
        pipe = tiny.wan_i2v()
        search = search_config("kstep", num_candidates=2, k=1)
        changes = {"merge": None, "search": search, "image": tiny.picture(), "chunk_frames": 9}
    whole, own = job(tmp_path, "whole", **changes), job(tmp_path, **changes)
    run_job(pipe, whole)
    (tmp_path / "clip.mp4.partial").symlink_to("/dev/full")
    with pytest.raises(CapacityError, match="latents are saved"):
        run_job(pipe, own)
    assert list(own.work.glob("*.safetensors")) and not own.out.exists()
    steps: list[Any] = []
    run_job(pipe, own, resume=True, on_step=lambda *seen: steps.append(seen))
    assert not [step for step in steps if step[0] == 0] and own.out.read_bytes() == whole.out.read_bytes()


def test_cancelling_keeps_the_state_and_other_settings_do_not_continue_it(tmp_path):
    pipe, whole, own = tiny.wan(tiny.unipc()), job(tmp_path, "whole"), job(tmp_path)
    run_job(pipe, whole)
    with pytest.raises(VideoCancelled, match="after step 2"):
        run_job(pipe, own, on_step=lambda chunk, what, step: step < 2)
    with pytest.raises(ConfigError, match="other settings"):
        run_job(pipe, replace(own, seed=4), resume=True)
    assert "_kvkeye_videomerge" not in vars(pipe)
    run_job(pipe, own, resume=True)
    assert own.out.read_bytes() == whole.out.read_bytes()
    run_job(pipe, own)  # without resume the folder is begun anew
    assert own.out.read_bytes() == whole.out.read_bytes()


def test_a_pipeline_that_decodes_for_itself(tmp_path):
    """LTX: whole clips; continuing decodes the saved latents."""
    pipe, own = tiny.ltx(), job(tmp_path, call=tiny.ltx_call)
    outcome = run_job(pipe, own)
    assert outcome.num_frames == frames_of(own.out) == 33


def test_a_state_file_of_something_else_is_refused(tmp_path):
    own = job(tmp_path)
    own.work.mkdir()
    (own.work / STATE).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="no saved state"):
        run_job(tiny.wan(), own, resume=True)


def test_defect_12_tiles_are_views_where_they_do_not_wrap():
    x = torch.arange(60.0).view(1, 3, 10, 2)
    inner, wrapped = cut(x, TimeAxis(2), 4, 5), cut(x, TimeAxis(2), 8, 4)
    assert inner.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert torch.equal(wrapped, x[:, :, [8, 9, 0, 1]])
    packed = cut(x.flatten(2, 3), TimeAxis(2, 2), 8, 4)
    assert torch.equal(packed, wrapped.flatten(2, 3))


def test_named_methods_are_what_they_say():
    made = merge_config("videomerge", 16)
    assert (made.tile, made.resolved_overlap(16), made.window, made.schedule) == (16, 12, "sine", "static")
    assert merge_config("genl", 16).overlap == 8 and merge_config("shifted", 16).schedule == "shifted"
    assert merge_config("concat", 16).overlap == 0 and merge_config("direct", 16) is None
    assert merge_config("videomerge", 16, tile=8, overlap=None).resolved_overlap(16) == 6
    assert search_config("chunks").num_candidates == 1 and search_config("kstep", k=None).k == 3
    assert all(method.meaning for method in METHODS.values())
