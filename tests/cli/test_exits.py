"""Every way to fail: one clear line on stderr, nothing on stdout, the documented exit code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from kvkeye import errors
from kvkeye.cli import bundled, exits, ops
from tests.samples import photo


def assert_refused(done, code, *parts):
    assert done.code == code, done.err
    assert done.out == "" and "Traceback" not in done.err
    # Progress of what took longer than a second may come before.
    message = re.search(r"^kvkeye( \w+)?: .*", done.err, re.MULTILINE | re.DOTALL)
    assert message is not None and all(part in message[0] for part in parts), done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.RequestError("x", "y"), 2),
        (errors.MediaError("x"), 2),
        (errors.ConfigError("x"), 2),
        (errors.EnvError("x"), 3),
        (errors.UnsupportedError("x"), 3),
        (ModuleNotFoundError("x", name="torch"), 3),
        (errors.WeightError("x"), 4),
        (errors.CapacityError("x"), 5),
        (MemoryError(), 5),
        (torch.OutOfMemoryError("x"), 5),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 5),
        (FileNotFoundError(2, "x", "file"), 2),
        (ModuleNotFoundError("x", name="kvkeye.cli.gone"), 70),
        (RuntimeError("x"), 70),
        (ValueError("x"), 70),
    ],
)
def test_exit_code_of_errors(error, code):
    assert exits.exit_code(error) == code


def test_memory_that_does_not_exist_is_code_5():
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        assert exits.exit_code(error) == exits.MEMORY
    else:
        pytest.fail("an exbibyte was allocated")


def test_bundled_model_that_is_not_there(call, monkeypatch, tmp_path):
    monkeypatch.setattr(bundled, "ASSETS", tmp_path)
    for command in (["run", "What?"], ["chat"], ["demo"], ["chat", "tiny-keye"]):
        assert_refused(call(*command), 4, "tiny-keye", str(tmp_path), "kvkeye train sft.toml")


def test_unknown_model_folder(call):
    assert_refused(call("run", "no/such/model", "What?"), 4, "'no/such/model'", "not a folder")
    assert_refused(call("estimate", "no/such/model"), 4, "'no/such/model'")


def test_folder_without_a_tokenizer(call, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert_refused(call("run", folder, "What?"), 4, "tokenizer.json")


def test_pickle_checkpoint(call, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert_refused(call("run", folder, "What?"), 4, "safetensors")


def test_context_that_memory_cannot_hold(call, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1 << 32}))
    done = call("run", folder, "What?", "--max-model-len", 1 << 31)
    assert_refused(done, 5, "GiB", "max_model_len")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--image", "gone.png", "What?"], ["'gone.png'", "no such file"]),
        (["--temperature", "nan", "What?"], ["temperature", "nan"]),
        (["--max-tokens", "0", "What?"], ["max_tokens", "0"]),
        (["--backends", "vulkan", "What?"], ["vulkan", "eager"]),
        (["--fps", "2", "What?"], ["--fps 2", "--video"]),
        (["one", "two", "three"], ["QUESTION"]),
    ],
)
def test_unusable_command_lines(call, model, words, parts):
    words = words if len(words) == 3 and words[0] == "one" else [str(model), *words]
    assert_refused(call("run", *words), 2, *parts)


def test_model_without_a_question(call, model):
    assert_refused(call("run", model), 2, "QUESTION")


def test_text_file_as_picture(call, model, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    assert_refused(call("run", model, "--image", path, "What?"), 2, "content[0]")


def test_truncated_picture(call, model, tmp_path):
    path = tmp_path / "half.jpg"
    data = photo("rocket.jpg").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert_refused(call("run", model, "--image", path, "What?"), 2, "truncated or damaged")


def test_prompt_longer_than_the_context_gives_counts(call, model):
    done = call("run", model, "x" * 300, "--max-model-len", "128")
    assert_refused(done, 2, "128")


def test_environment_variables(call, model, monkeypatch):
    monkeypatch.setenv("KVKEYE_BACKENDS", "vulkan")
    assert_refused(call("run", model, "What?"), 3, "vulkan")
    monkeypatch.setenv("KVKEYE_BACKENDS", "")
    monkeypatch.setenv("KVKEYE_LOG", "loud")
    assert_refused(call("run", model, "What?"), 3, "KVKEYE_LOG='loud'")


def test_missing_torch_is_an_environment_error(model):
    code = "import sys; sys.modules['torch'] = None; from kvkeye.cli import main; sys.exit(main(['ops']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3 and "torch" in done.stderr and "kvkeye doctor" in done.stderr
    assert "Traceback" not in done.stderr


def test_defects_show_a_traceback_only_when_asked(call, monkeypatch):
    def fail(arguments):
        raise RuntimeError("boom")

    monkeypatch.setattr(ops, "run", fail)
    assert_refused(call("ops"), 70, "RuntimeError: boom", "KVKEYE_LOG=debug")
    monkeypatch.setenv("KVKEYE_LOG", "debug")
    done = call("ops")
    assert done.code == 70 and "Traceback" in done.err and "boom" in done.err


def test_reader_that_goes_away(model):
    command = [
        sys.executable,
        "-m",
        "kvkeye",
        "run",
        str(model),
        "Tell me.",
        "--max-tokens",
        "64",
        "--temperature",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == exits.BROKEN_PIPE and "Traceback" not in err and "Broken" not in err
