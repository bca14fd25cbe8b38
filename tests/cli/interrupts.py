"""Ctrl-C for commands under test."""

import signal


def heed_interrupts() -> None:
    """Runs in the child: a shell's background jobs ignore SIGINT, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
