"""Which implementation of each op exists here, and why the others do not; with NAME, that op's contract and order."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="?", metavar="NAME", help="an op, e.g. rms_norm")
    parser.add_argument("--markdown", action="store_true", help="the table as in the README")


def run(arguments: argparse.Namespace) -> int:
    from kvkeye.ops.__main__ import main

    return main([*(["--markdown"] if arguments.markdown else []), *([arguments.op] if arguments.op else [])])
