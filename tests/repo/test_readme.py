"""What the README says of the code is printed by the code."""

from __future__ import annotations

import re
from pathlib import Path

from kvkeye import env
from kvkeye.ops.__main__ import markdown

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_support_table_is_the_generated_one() -> None:
    table = README.partition("--markdown -->\n")[2].partition("\n<!-- end")[0]
    assert table == markdown(), "paste the output of: python -m kvkeye.ops --markdown"


def test_environment_table_is_complete() -> None:
    for variable in env.ALL:
        assert f"| `{variable.name}` |" in README and variable.meaning in README
    sources = "".join(p.read_text() for p in (ROOT / "kvkeye").rglob("*.py"))
    names = {name for name in re.findall(r"\bKVKEYE_[A-Z_]+\b", sources) if not name.startswith("KVKEYE_BUILD")}
    assert names <= {v.name for v in env.ALL}, "an environment variable is missing from kvkeye/env.py"


def test_named_paths_exist() -> None:
    for text in ("README.md", "kvkeye/ops/README.md"):
        for path in re.findall(
            r"`((?:tests|benchmarks|kvkeye|csrc|triton_kernels)/[\w./-]+)`", (ROOT / text).read_text()
        ):
            if "<" not in path:
                assert (ROOT / path).exists(), f"{text} names {path}"
