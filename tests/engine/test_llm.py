"""The API for scripts: order, streams, threads, and staying usable after a mistake."""

from __future__ import annotations

import threading

import pytest

from kvkeye.engine import LLM, SamplingParams
from kvkeye.engine.prepare import Prepared
from kvkeye.errors import KvkeyeError, RequestError
from tests.engine.tiny import engine, greedy, prompt, run


@pytest.fixture
def llm():
    with LLM(engine=engine(max_num_seqs=3)) as served:
        yield served


def chat(text):
    return [{"role": "user", "content": text}]


def test_answers_come_in_the_order_of_the_prompts(llm):
    texts = [f"question {i}" * (1 + i % 3) for i in range(11)]
    outputs = llm.generate(texts, [greedy(3 + i % 4) for i in range(11)])
    for text, output in zip(texts, outputs):
        assert llm.engine.processor.decode(output.prompt_token_ids) == text
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3 + i % 4 for i in range(11)]
    assert llm.stats().num_used_blocks == 0


def test_text_and_its_tokens_give_the_same_answer(llm):
    ids = llm.engine.processor.process_text("hello").token_ids
    (text,), (tokens,) = llm.generate("hello", greedy(5)), llm.generate(ids, greedy(5))
    assert text.outputs[0].token_ids == tokens.outputs[0].token_ids


def test_one_conversation_or_many(llm):
    (one,) = llm.chat(chat("hello"), greedy(4))
    many = llm.chat([chat("hello"), chat("bye")], greedy(4))
    assert many[0].outputs[0].token_ids == one.outputs[0].token_ids and len(many) == 2


def test_a_stream_adds_up_to_the_answer(llm):
    (whole,) = llm.chat(chat("tell me"), greedy(30))
    pieces = list(llm.stream(chat("tell me"), greedy(30)))
    assert "".join(piece.text for piece in pieces) == whole.outputs[0].text
    assert [token for piece in pieces for token in piece.token_ids] == whole.outputs[0].token_ids
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length" and pieces[-1].output.finished


def test_a_stream_of_several_answers_keeps_them_apart(llm):
    values = SamplingParams(n=3, max_tokens=9, seed=4, ignore_eos=True)
    (whole,) = llm.generate("abc", values)
    found = {0: [], 1: [], 2: []}
    for piece in llm.stream("abc", values):
        found[piece.index] += piece.token_ids
    assert [found[i] for i in range(3)] == [each.token_ids for each in whole.outputs]


def test_leaving_a_stream_early_aborts_it(llm):
    stream = llm.stream("hello", greedy(100))
    next(stream)
    assert llm.stats().num_running == 1
    stream.close()
    assert (llm.stats().num_running, llm.stats().num_used_blocks) == (0, 0)


def test_reasoning_is_split_off_in_chat_only():
    served = engine()
    text = "<think>because</think><answer>yes</answer>"
    ids = served.processor.process_text(text).token_ids
    # The engine's own wiring, with the tokens given instead of drawn.
    for is_chat, expected in ((True, ("because", "yes")), (False, ("", text))):
        ready = served.processor.process_text("?")
        served.add("a", Prepared(ready.token_ids, ready.positions, is_chat=is_chat), greedy(len(ids)))
        drawn = iter(ids)
        original = served.runner.run

        def scripted(batch, original=original, drawn=drawn):
            result = original(batch)
            for tokens in result.tokens.values():
                tokens[:] = [next(drawn)]
            return result

        served.runner.run = scripted
        output = run(served)["a"].outputs[0]
        served.runner.run = original
        assert (output.reasoning, output.text) == expected


def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(llm):
    with pytest.raises(RequestError, match="999"):
        llm.generate(["fine", "fine too", [1, 999]], greedy(50))
    assert (llm.stats().num_running, llm.stats().num_waiting, llm.stats().num_used_blocks) == (0, 0, 0)
    assert llm.generate("next", greedy(2))[0].finished


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda llm: llm.chat(["hello"]), "role"),
        (lambda llm: llm.generate(["a", "b"], [greedy(1)]), "1 values for 2 prompts"),
        (lambda llm: llm.generate([None]), "NoneType"),
    ],
)
def test_misuse_is_explained(llm, call, words):
    with pytest.raises(RequestError, match=words):
        call(llm)


def test_nothing_to_do_is_nothing_done(llm):
    assert llm.generate([]) == [] and llm.chat([]) == []


def test_threads_share_batches_and_get_their_own_answers(llm):
    expected = {i: llm.generate(f"thread {i}", greedy(25))[0].outputs[0].token_ids for i in range(6)}
    steps, found, errors = llm.stats().num_steps, {}, []

    def ask(i):
        try:
            if i % 2:
                found[i] = llm.generate(f"thread {i}", greedy(25))[0].outputs[0].token_ids
            else:
                found[i] = [t for piece in llm.stream(f"thread {i}", greedy(25)) for t in piece.token_ids]
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and found == expected
    assert llm.stats().num_steps - steps < 6 * 25, "each request ran alone"


def test_a_closed_llm_says_so():
    llm = LLM(engine=engine())
    llm.close()
    with pytest.raises(KvkeyeError, match="closed"):
        llm.generate("hello")


def test_two_engines_do_not_share_anything():
    with LLM(engine=engine()) as one, LLM(engine=engine()) as two:
        one.generate("hello", greedy(3))
        assert one.stats().num_generated_tokens == 3 and two.stats().num_generated_tokens == 0


def test_long_prompts_are_refused_with_both_numbers(llm):
    with pytest.raises(RequestError, match=r"700 prompt tokens .* holds 512"):
        llm.generate([prompt(1, 700)], greedy(1))
