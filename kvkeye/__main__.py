"""`python -m kvkeye`: the same as the command `kvkeye`."""

from __future__ import annotations

import sys

from kvkeye.cli import main

if __name__ == "__main__":
    sys.exit(main())
