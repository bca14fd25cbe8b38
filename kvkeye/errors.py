"""Every error that kvkeye raises on purpose.

A message has four parts: where, what was given, what is required, what to do.
Each class is also a builtin `ValueError` or `RuntimeError`, so callers need not import this module.
"""

from __future__ import annotations


class KvkeyeError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(KvkeyeError, ValueError):
    """A configuration, a checkpoint's JSON or a command-line value is unusable."""


class EnvError(KvkeyeError, ValueError):
    """An environment variable is malformed."""


class RequestError(KvkeyeError, ValueError):
    """A request is unusable; `param` names the field. The engine stays usable."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class MediaError(RequestError):
    """A picture or a clip cannot be decoded or is over a limit."""


class CapacityError(KvkeyeError, RuntimeError):
    """Memory, blocks or queue places do not suffice; the message gives the sum."""


class WeightError(KvkeyeError, ValueError):
    """A checkpoint's tensors are missing, extra, misshapen or truncated."""


class UnsupportedError(KvkeyeError, RuntimeError):
    """No implementation accepts this call; the message lists each one's reasons."""
