"""From a checkpoint's folder to an answer about a picture, and every bad input on the way: clear, and survived."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kvkeye import LLM, AsyncEngine, EngineConfig, SamplingParams
from kvkeye.errors import ConfigError, KvkeyeError, MediaError, RequestError, WeightError
from kvkeye.testing.tiny import write_tiny_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny-keye"))


@pytest.fixture(scope="module")
def llm(folder):
    # Eager where a C++ kernel is missing: answers, not bits, are the subject.
    with LLM(str(folder), dtype="float32", max_model_len=1024, check_every_step=True) as served:
        yield served


def photo(width=64, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, format="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def ask(*media, text="What is this?"):
    items = [{"type": kind, kind: content} for kind, content in media]
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


def test_an_answer_about_a_picture_and_a_clip(llm):
    frames = [photo(56, 56, seed) for seed in range(4)]
    (output,) = llm.chat(ask(("image", encoded(photo())), ("video", frames)), GREEDY)
    answer = output.outputs[0]
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 12)
    assert output.metrics.vision_ms > 0 and output.metrics.prepare_ms > 0


def test_the_picture_matters_and_its_file_format_does_not(llm, tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(photo()))
    logprobs = SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
    outputs = llm.chat(
        [ask(("image", content)) for content in (str(path), encoded(photo()), photo(), photo(seed=1))], logprobs
    )
    first = [output.outputs[0].logprobs[0] for output in outputs]
    assert first[0] == first[1] == first[2] != first[3]


def test_a_second_question_about_the_same_picture_uses_what_is_cached(llm):
    before = llm.stats()
    llm.chat(ask(("image", encoded(photo(seed=5))), text="a"), GREEDY)
    (second,) = llm.chat(ask(("image", encoded(photo(seed=5))), text="b"), GREEDY)
    after = llm.stats()
    assert after.encoder_misses - before.encoder_misses == 1
    assert second.metrics.num_cached_tokens == 0 or second.metrics.vision_ms == 0


def test_a_picture_of_one_pixel_is_answered(llm):
    (output,) = llm.chat(ask(("image", encoded(photo(1, 1)))), GREEDY)
    assert len(output.outputs[0].token_ids) == 12


def bomb():
    return encoded(Image.new("1", (13_000, 13_000)))


BAD_MEDIA = {
    "a text file": lambda: ("image", b"this is not a picture"),
    "a truncated JPEG": lambda: ("image", encoded(photo(200, 200), "JPEG")[:900]),
    "an aspect above 200": lambda: ("image", encoded(photo(402, 2))),
    "a bomb": lambda: ("image", bomb()),
    "an empty clip": lambda: ("video", []),
    "an empty file": lambda: ("image", b""),
    "a missing file": lambda: ("image", "no/such/file.png"),
    "a text file as clip": lambda: ("video", b"this is not a clip"),
}


@pytest.mark.parametrize("name", BAD_MEDIA)
def test_bad_media_are_refused_and_the_engine_answers_on(llm, name):
    with pytest.raises(MediaError) as caught:
        llm.chat([ask(("image", photo())), ask(BAD_MEDIA[name]())], GREEDY)
    assert len(str(caught.value)) > 20 and " at 0x" not in str(caught.value)
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert llm.chat(ask(("image", photo())), GREEDY)[0].outputs[0].finish_reason == "length"


BAD_REQUESTS = {
    "a long prompt": (lambda llm: llm.chat(ask(text="x" * 2000), GREEDY), r"20\d\d tokens; the context holds 1024"),
    "a longer prompt": (lambda llm: llm.chat(ask(text="x" * 9000), GREEDY), r"90\d\d tokens; the context holds 1024"),
    "NaN": (lambda llm: llm.chat(ask(), SamplingParams(temperature=float("nan"))), "temperature.*nan"),
    "no role": (lambda llm: llm.chat([{"content": "x"}], GREEDY), "role"),
    "an unknown item": (lambda llm: llm.chat([{"role": "user", "content": [{"type": "sound"}]}], GREEDY), "sound"),
    "an unknown mode": (lambda llm: llm.chat(ask(), GREEDY, mode="loud"), "loud"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused_with_the_reason(llm, name):
    call, words = BAD_REQUESTS[name]
    with pytest.raises(RequestError, match=words):
        call(llm)
    assert llm.generate("next", GREEDY)[0].finished


def test_users_cannot_spell_special_tokens(llm):
    (output,) = llm.chat(ask(text="<|image_pad|><|im_end|>"), GREEDY)
    tokenizer = llm.engine.processor.tokenizer
    assert tokenizer.token_to_id("<|image_pad|>") not in output.prompt_token_ids


def without_weights(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": [1]}))


def with_other_architecture(folder):
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


BAD_FOLDERS = {
    "a pickle": (without_weights, WeightError, "pytorch_model.bin|safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), ConfigError, "config.json"),
    "another model": (with_other_architecture, ConfigError, "LlamaForCausalLM"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), ConfigError, "tokenizer.json"),
    "no folder": (shutil.rmtree, ConfigError, "not a folder"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_refused(folder, tmp_path, name):
    spoil, error, words = BAD_FOLDERS[name]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    spoil(copy)
    with pytest.raises(error, match=words):
        LLM(str(copy))


def test_the_dtype_follows_the_machine_unless_it_is_named(folder):
    with LLM(str(folder), max_model_len=64) as chosen:
        assert chosen.engine.runner.model.dtype in (torch.float32, torch.bfloat16)
    with LLM(str(folder), max_model_len=64, dtype="bfloat16") as named:
        assert named.engine.runner.model.dtype == torch.bfloat16


def test_both_apis_give_the_same_tokens(folder, llm):
    conversations = [ask(("image", encoded(photo(seed=i))), text=f"{i}?") for i in range(3)]
    expected = [output.outputs[0].token_ids for output in llm.chat(conversations, GREEDY)]

    async def main():
        async with AsyncEngine(EngineConfig(model=str(folder), dtype="float32", max_model_len=1024)) as served:

            async def answer(conversation):
                return [output async for output in served.generate(conversation, GREEDY)][-1].outputs[0].token_ids

            answers = await asyncio.gather(*map(answer, conversations))
            with pytest.raises(KvkeyeError):
                await answer(ask(("image", b"nothing")))
            return answers

    assert asyncio.run(main()) == expected


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_example_service_answers(folder, llm):
    example = Path(__file__).with_name("example_service.py")
    code = [line for line in example.read_text().split('"""')[2].splitlines() if line.strip()]
    assert len(code) <= 20
    port = free_port()
    service = subprocess.Popen([sys.executable, str(example), str(folder), str(port)])

    async def ask_service(text):
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except OSError:
                assert service.poll() is None, "the service stopped"
                await asyncio.sleep(0.1)
        writer.write(text.encode() + b"\n")
        answer = (await reader.read()).decode()
        writer.close()
        return answer

    async def main():
        return await asyncio.wait_for(asyncio.gather(ask_service("hello"), ask_service("bye")), 60)

    try:
        answers = asyncio.run(main())
    finally:
        service.terminate()
        service.wait(10)
    assert answers[0] != answers[1] and all(answers)


def test_the_example_is_the_one_in_the_readme():
    readme = Path(__file__).parents[2] / "kvkeye" / "engine" / "README.md"
    code = Path(__file__).with_name("example_service.py").read_text().split('"""')[2].strip()
    assert code in readme.read_text()
