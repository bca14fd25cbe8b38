"""What the library's loggers show in a terminal: warnings, or what KVKEYE_LOG asks for."""

from __future__ import annotations

import logging

from kvkeye import env

_HANDLER = "kvkeye-cli"
# Level of each logger by the value of KVKEYE_LOG.
_LEVELS = {
    "": {"kvkeye": logging.WARNING},
    "ops": {"kvkeye": logging.WARNING, "kvkeye.ops": logging.DEBUG},
    "info": {"kvkeye": logging.INFO},
    "debug": {"kvkeye": logging.DEBUG},
}


def configure(quiet: bool) -> None:
    """Sends the library's log to stderr. `quiet` hides what is only information unless KVKEYE_LOG says otherwise."""
    wanted = env.LOG.get() or ("" if quiet else "info")
    root = logging.getLogger("kvkeye")
    for old in [handler for handler in root.handlers if handler.get_name() == _HANDLER]:
        root.removeHandler(old)
    handler = logging.StreamHandler()
    handler.set_name(_HANDLER)
    layout = "%(message)s" if wanted in ("", "info") else "%(asctime)s %(name)s %(levelname)s %(message)s"
    handler.setFormatter(logging.Formatter(layout))
    root.addHandler(handler)
    for name, level in _LEVELS[wanted].items():
        logging.getLogger(name).setLevel(level)
