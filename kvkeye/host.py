"""Chooses between the native host structures (`kvkeye._host`) and their pure-Python twin; says which and why."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

logger = logging.getLogger("kvkeye.host")

if TYPE_CHECKING:
    from kvkeye._host_ngram_py import NgramIndex
    from kvkeye._host_py import BlockPool

    IMPLEMENTATION: str
    REASON: str
else:
    try:
        from kvkeye._host import BlockPool, NgramIndex

        IMPLEMENTATION, REASON = "cpp", "kvkeye._host is built for this Python"
    except ImportError as error:
        from kvkeye._host_ngram_py import NgramIndex
        from kvkeye._host_py import BlockPool

        IMPLEMENTATION = "python"
        REASON = f"kvkeye._host cannot be imported ({error}); reinstall with a C++ compiler to build it"
        logger.info("host structures run in Python: %s", REASON)

__all__ = ["IMPLEMENTATION", "REASON", "BlockPool", "NgramIndex"]
