"""Runs the rows in a child process and goes on behind one that ended it.

A kernel that writes outside its buffers breaks every later call of its process, one that waits for ever never returns.
Such a row is a result too, and must not cost the others.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

#: Exit status of a child whose device no longer answers; its row is recorded.
LOST = 5
GRACE = 10.0  # seconds for the row that runs when time is over
POLL = 0.2


def supervise(
    command: Sequence[str], running: Path, bury: Callable[[str], None], seconds: float, row_seconds: float
) -> int | None:
    """The exit status of the child that came to its end; None where time ran out first.

    Args:
        command: starts a child that does what is not done yet; the seconds that are left are added to it.
        running: exists while the child is in a row.
        bury: records the row that `running` names as failed, with this sentence.
        seconds: the child may begin rows for so long, and is stopped GRACE later.
        row_seconds: after so long a row counts as hanging.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        running.unlink(missing_ok=True)
        child = subprocess.Popen([*command, f"{left:.0f}"])
        try:
            why = _watched(child, running, end + GRACE, row_seconds)
        finally:
            child.kill()
            child.wait()
        if why is None:
            running.unlink(missing_ok=True)  # stopped by the clock: no result
            return None
        if not why and (child.returncode >= 0 or not running.exists()):
            if child.returncode == LOST:
                continue
            return child.returncode
        bury(why or f"ended its process, status {child.returncode}")
    return None


def _watched(child: subprocess.Popen[bytes], running: Path, deadline: float, row_seconds: float) -> str | None:
    """An empty sentence once the child has ended, one if its row hangs, None at the deadline."""
    while child.poll() is None:
        time.sleep(POLL)
        if time.monotonic() > deadline:
            return None
        if running.exists() and time.time() - running.stat().st_mtime > row_seconds:
            return f"did not end within {row_seconds:.0f} s"
    return ""
