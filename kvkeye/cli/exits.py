"""Exit codes, and which error means which. Documented in `kvkeye --help`; scripts rely on them."""

from __future__ import annotations

from kvkeye.errors import (
    CapacityError,
    ConfigError,
    EnvError,
    KvkeyeError,
    RequestError,
    UnsupportedError,
    WeightError,
)

OK = 0
USAGE = 2
ENVIRONMENT = 3
MODEL_FILES = 4
MEMORY = 5
INTERNAL = 70
INTERRUPTED = 130  # as a shell reports SIGINT
BROKEN_PIPE = 141  # as a shell reports SIGPIPE

MEANINGS = {
    OK: "done",
    USAGE: "the command line, a file it names, or a request is unusable",
    ENVIRONMENT: "this installation or an environment variable is unusable",
    MODEL_FILES: "a checkpoint is missing, incomplete or unsupported",
    MEMORY: "memory does not suffice",
    INTERNAL: "a defect of kvkeye",
}

_BY_CLASS: tuple[tuple[type[BaseException], int], ...] = (
    (EnvError, ENVIRONMENT),
    (UnsupportedError, ENVIRONMENT),
    (WeightError, MODEL_FILES),
    (CapacityError, MEMORY),
    (MemoryError, MEMORY),
    (RequestError, USAGE),
    (ConfigError, USAGE),
)


class CommandError(KvkeyeError):
    """Ends a command with a message and this exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ended with this error."""
    if isinstance(error, CommandError):
        return error.code
    for kind, code in _BY_CLASS:
        if isinstance(error, kind):
            return code
    if _is_out_of_memory(error):
        return MEMORY
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("kvkeye"):
        return ENVIRONMENT
    if isinstance(error, OSError) and error.filename is not None:
        return USAGE
    return INTERNAL


def _is_out_of_memory(error: BaseException) -> bool:
    """torch's own errors, recognised without importing torch."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
