"""What reaches a terminal: no control characters, reasoning apart from the answer, progress only where it is slow."""

from __future__ import annotations

import io
import time

from kvkeye.cli.terminal import AnswerPrinter, printable, stage


def test_control_characters_are_replaced():
    hostile = "a\x1b[31mb\x9b2Jc\rd\x07\x00é\n\t漢"
    assert printable(hostile) == "a�[31mb�2Jc�d��é\n\t漢"


def test_answer_and_reasoning_go_to_their_own_streams():
    out, aside = io.StringIO(), io.StringIO()
    printer = AnswerPrinter(out, aside)
    for reasoning, text in (("let me", ""), (" see", ""), ("", "It is"), ("", " red.")):
        printer.write(reasoning, text)
    printer.end()
    assert (out.getvalue(), aside.getvalue()) == ("It is red.\n", "let me see\n")


def test_last_line_is_ended_once():
    for text in ("red", "red\n", ""):
        out = io.StringIO()
        printer = AnswerPrinter(out, io.StringIO())
        printer.write("", text)
        printer.end()
        printer.end()
        assert out.getvalue() == (text.rstrip("\n") + "\n" if text else "")


def test_slow_stage_is_reported(capsys):
    with stage("loading", patience=0.01):
        time.sleep(0.1)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("loading ...\nloading: 0.1 s")


def test_quick_stage_is_silent(capsys):
    with stage("loading"):
        pass
    assert capsys.readouterr() == ("", "")


def test_failing_stage_still_ends_its_line(capsys):
    try:
        with stage("loading", patience=0.01):
            time.sleep(0.05)
            raise RuntimeError
    except RuntimeError:
        pass
    assert capsys.readouterr().err.endswith("s   \n")
