"""What the library's loggers show in a terminal: warnings, or what KVKEYE_LOG asks for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from kvkeye import env

# Level of each logger by the value of KVKEYE_LOG.
_LEVELS = {
    "": {"kvkeye": logging.WARNING},
    "ops": {"kvkeye": logging.WARNING, "kvkeye.ops": logging.DEBUG},
    "info": {"kvkeye": logging.INFO},
    "debug": {"kvkeye": logging.DEBUG},
}


@contextmanager
def shown(default: str = "") -> Iterator[None]:
    """Within the block the library's log goes to stderr. `default` stands for an unset KVKEYE_LOG. Raises EnvError."""
    wanted = env.LOG.get() or default
    handler = logging.StreamHandler()
    plain = wanted in ("", "info")
    layout = "%(message)s" if plain else "%(asctime)s %(name)s %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(layout))
    before = {name: logging.getLogger(name).level for name in _LEVELS[wanted]}
    logging.getLogger("kvkeye").addHandler(handler)
    for name, level in _LEVELS[wanted].items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        logging.getLogger("kvkeye").removeHandler(handler)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
