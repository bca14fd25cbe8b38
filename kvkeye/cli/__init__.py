"""The command line, `kvkeye COMMAND ...`. Knows everything below it; nothing imports it.

Answers go to stdout; progress, statistics and errors go to stderr. A command is a module with `configure(parser)` and
`run(arguments) -> exit code`, imported when it is called; what a module needs of torch, it imports in `run`, so that
every `--help` is immediate.
"""

from __future__ import annotations

from kvkeye.cli.entry import main

__all__ = ["main"]
