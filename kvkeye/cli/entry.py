"""From words to a command, and from its errors to one line and an exit code. Imports nothing that is slow."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import kvkeye
from kvkeye import env
from kvkeye.cli import exits, logs
from kvkeye.errors import EnvError, KvkeyeError

COMMANDS = {
    "run": "answer one question about pictures or clips",
    "chat": "talk about pictures and clips in the terminal",
    "demo": "draw fresh scenes and ask the bundled model about them",
    "bench": "measure the time of answers here",
    "estimate": "memory and tokens of a model, before it is loaded",
    "doctor": "check this installation",
    "ops": "which implementation of an op runs here, and why",
    "train": "train a recipe",
    "video": "make a long clip from a short-video model",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. `argv` leaves out the program's name."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        _top_parser().parse_args(words or ["--help"])
        return exits.USAGE  # not reached: the parser exits
    return _run(words[0], words[1:])


def _top_parser() -> argparse.ArgumentParser:
    lines = ["commands (each has --help):", *(f"  {name:<10}{text}" for name, text in COMMANDS.items())]
    lines += ["", "exit codes:", *(f"  {code:<10}{text}" for code, text in exits.MEANINGS.items())]
    lines += ["", "environment variables:", *(f"  {v.name:<17}{v.meaning}" for v in env.ALL)]
    parser = argparse.ArgumentParser(
        prog="kvkeye",
        usage="kvkeye COMMAND ...",
        description="A kernel-optimised inference engine for Keye-VL.",
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvkeye {kvkeye.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    return parser


def _run(name: str, words: list[str]) -> int:
    module = importlib.import_module(f"kvkeye.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"kvkeye {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.configure(parser)
    arguments = parser.parse_intermixed_args(words)
    try:
        with logs.shown("info" if name == "train" else ""):
            code: int = module.run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return exits.INTERRUPTED
    except BrokenPipeError:
        # The reader has gone; a second complaint at the interpreter's exit helps nobody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.BROKEN_PIPE
    except Exception as error:
        return _report(name, error)


def _report(name: str, error: Exception) -> int:
    """One line on stderr, with a traceback where KVKEYE_LOG=debug asks for it."""
    code = exits.exit_code(error)
    if _wants_traceback():
        traceback.print_exception(error)
    message = str(error)
    if not isinstance(error, KvkeyeError):
        message = f"{type(error).__name__}: {message}"
    if code == exits.INTERNAL:
        message += " This is a defect of kvkeye; KVKEYE_LOG=debug shows where it happened."
    elif isinstance(error, ModuleNotFoundError):
        message += ". Packages are missing; `kvkeye doctor` lists them."
    print(f"kvkeye {name}: {message}", file=sys.stderr)
    return code


def _wants_traceback() -> bool:
    try:
        return env.LOG.get() == "debug"
    except EnvError:
        return False
