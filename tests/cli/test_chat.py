"""`kvkeye chat` with lines piped in: turns, attachments, commands, failures that leave the conversation usable."""

from __future__ import annotations

import io
import json
import select
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from kvkeye import LLM, SamplingParams
from kvkeye.cli.terminal import printable
from tests.cli.interrupts import heed_interrupts
from tests.samples import photo

WORDS = ("--temperature", "0", "--max-tokens", "10", "--dtype", "float32")


@pytest.fixture
def chat(call, model, monkeypatch):
    def run(*lines):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return call("chat", model, *WORDS)

    return run


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "a picture.png"
    with Image.open(photo("coffee.png")) as source:
        source.resize((120, 90)).save(path)
    return path


def saved(path):
    return json.loads(path.read_text())["messages"]


def test_turns_are_those_of_the_engine(chat, model, picture, tmp_path):
    done = chat(f"/image {picture}", "What is it?", "And now?", f"/save {tmp_path / 'chat.json'}", "/quit", "never")
    assert done.code == 0
    with LLM(str(model), dtype="float32") as llm:
        content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What is it?"}]
        messages = [{"role": "user", "content": content}]
        answers = []
        for question in ("And now?", None):
            (output,) = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=10))
            answers.append(output.outputs[0].text)
            messages.append({"role": "assistant", "content": answers[-1]})
            if question is not None:
                messages.append({"role": "user", "content": question})
    assert saved(tmp_path / "chat.json") == messages
    assert done.out == "".join(printable(text) + ("" if text.endswith("\n") else "\n") for text in answers)


def test_second_turn_hits_the_prefix_cache(chat, picture):
    done = chat(f"/image '{picture}'", "What is it?", "Why?", "/stats")
    last = next(line for line in done.err.splitlines() if line.startswith("last answer: "))
    assert "(0 cached)" not in last and "vision 0 ms" in last
    assert "steps " in done.err and "generated_tokens " in done.err


def test_reset_forgets(chat, tmp_path):
    once = chat("What is it?", f"/save {tmp_path / 'once.json'}")
    twice = chat("Something else.", "/reset", "What is it?", f"/save {tmp_path / 'twice.json'}")
    assert once.code == twice.code == 0
    assert saved(tmp_path / "once.json") == saved(tmp_path / "twice.json")
    assert twice.out.endswith(once.out)


def test_failures_leave_the_conversation_as_it_was(chat, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    done = chat(
        "Hello.", "/image gone.png", "/image", "/paint", f"/image {damaged}", "What is it?", "x" * 20_000,
        "/save", f"/save {tmp_path}/no/such/folder", f"/save {tmp_path / 'chat.json'}",
    )  # fmt: skip
    assert done.code == 0
    for part in ("'gone.png'", "/image FILE", "/paint: unknown", "content[0]", "context", "/save FILE", "No such file"):
        assert part in done.err, part
    question, answer = saved(tmp_path / "chat.json")
    assert question["content"] == "Hello." and answer["role"] == "assistant"


def test_help_names_every_command(chat):
    done = chat("/help", "")
    assert all(f"/{name}" in done.err for name in ("image", "video", "reset", "stats", "save", "quit"))
    assert done.out == ""


def test_end_of_input_ends_the_chat(chat):
    assert chat().code == 0


def test_interrupt_stops_the_answer_not_the_chat(model, tmp_path):
    endless = _never_ending(model, tmp_path)
    command = [sys.executable, "-m", "kvkeye", "chat", str(endless), "--max-tokens", "6000", "--seed", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, preexec_fn=heed_interrupts) as process:
        try:
            process.stdin.write(b"Tell me a long story.\n")
            process.stdin.flush()
            assert select.select([process.stdout], [], [], 60)[0], "no answer began"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(f"/save {tmp_path / 'chat.json'}\n/quit\n".encode(), timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err.decode()
    assert "stopped" in err.decode() and "Traceback" not in err.decode()
    question, answer = saved(tmp_path / "chat.json")
    assert (question["role"], answer["role"]) == ("user", "assistant") and 0 < len(answer["content"]) < 6000


def _never_ending(model, tmp_path):
    """A copy of the model whose stop token is one that it cannot spell."""
    folder = shutil.copytree(model, tmp_path / "endless")
    config = json.loads((folder / "config.json").read_text())
    unused = config["vocab_size"] - 1
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": unused}))
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": unused}))
    return folder
