"""`python -m kvkeye.ops [OP]`: the support table of this machine, with the reasons."""

import argparse
import sys
from collections.abc import Sequence

from kvkeye.ops import OPS, Op
from kvkeye.ops._policy import NAMES


def _cell(op: Op, implementation: str) -> str:
    if implementation == "eager":
        return "yes"
    found = op.implementations.get(implementation)
    if found is None:
        return "-"
    return "no" if found.absent() else "yes"


def support_rows() -> list[tuple[str, str, str, list[str]]]:
    """(op, family, gradient, a cell per implementation) of every op that is not a backward."""
    backward = {op.backward.name for op in OPS.values() if op.backward is not None}
    return [
        (op.name, op.family, "b" if op.backward else "", [_cell(op, name) for name in NAMES])
        for op in sorted(OPS.values(), key=lambda op: op.family)  # not in the order of imports
        if op.name not in backward
    ]


def markdown() -> str:
    """The claimed cells, whatever this machine has; stands in README.md, where a test compares it."""
    lines = ["| op | family | gradient | " + " | ".join(NAMES) + " |", "|---|---|---|" + "---|" * len(NAMES)]
    for name, family, gradient, _ in support_rows():
        cells = ["yes" if n == "eager" or n in OPS[name].implementations else "" for n in NAMES]
        lines.append(f"| `{name}` | {family} | {'yes' if gradient else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reasons() -> list[str]:
    """Why cells say "no" here, each reason once with the ops it covers."""
    found: dict[str, list[str]] = {}
    for op in OPS.values():
        for name, implementation in op.implementations.items():
            if (reason := implementation.absent()) is not None:
                found.setdefault(f"{name}: {reason}", []).append(op.name)
    return [f"{reason}  [{_shortened(names)}]" for reason, names in found.items()]


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, or one op's contract and choice. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="kvkeye ops", description="which implementation runs where, and why not")
    parser.add_argument("op", nargs="?", help="print this op's contract and the order in force")
    parser.add_argument("--markdown", action="store_true", help="print the claimed cells as a Markdown table")
    options = parser.parse_args(argv)
    if options.markdown:
        print(markdown())
        return 0
    name = options.op
    if name is not None:
        if name not in OPS:
            print(f"kvkeye ops: no op {name!r}; known: {', '.join(OPS)}", file=sys.stderr)
            return 2
        first, passed = OPS[name].first_choice("cuda")
        on_gpu = f"on a GPU: {first}" + "".join(f"\n  not {reason}" for reason in passed)
        print(f"kvkeye::{name}{OPS[name].schema}\n\n{OPS[name].__doc__}\n\n{OPS[name].explain()}\n{on_gpu}")
        return 0
    print(f"{'op':<26}{'family':<13}{'grad':<6}" + "".join(f"{n:<8}" for n in NAMES) + "first on a GPU")
    for op, family, gradient, cells in support_rows():
        first, _ = OPS[op].first_choice("cuda")
        print(f"{op:<26}{family:<13}{gradient:<6}" + "".join(f"{c:<8}" for c in cells) + first)
    for line in reasons():
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
