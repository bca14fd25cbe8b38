"""`kvkeye ops` is `python -m kvkeye.ops`."""

from __future__ import annotations

import pytest

from kvkeye import ops
from kvkeye.ops.__main__ import main


@pytest.mark.parametrize("words", [[], ["rms_norm"], ["--markdown"]])
def test_same_as_the_module(call, capsys, words):
    assert main(words) == 0
    expected = capsys.readouterr().out
    done = call("ops", *words)
    assert (done.code, done.out) == (0, expected)


def test_unknown_op(call):
    done = call("ops", "fft")
    assert done.code == 2 and done.out == "" and all(name in done.err for name in ("'fft'", *ops.OPS))
