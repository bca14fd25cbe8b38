"""Messages between this process and a decoding worker: JSON of bounded length, and open files. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

MAX_BYTES = 1 << 20  # of one message
_HEAD = struct.Struct("<I")


class Lost(Exception):
    """The other side is gone, or does not keep to the form."""


class Wire:
    """One end of a stream socket. A timeout in `receive` leaves it unusable."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, message: dict[str, Any], files: Sequence[int] = ()) -> None:
        """Sends a message and, with it, open files. Raises `Lost`."""
        body = json.dumps(message).encode()
        try:
            if files:
                socket.send_fds(self.socket, [_HEAD.pack(len(body))], files)
                self.socket.sendall(body)
            else:
                self.socket.sendall(_HEAD.pack(len(body)) + body)
        except OSError as error:
            raise Lost(f"cannot send: {error.strerror}") from None

    def receive(self, timeout: float | None = None, max_files: int = 0) -> tuple[dict[str, Any], list[int]]:
        """The next message and the files that came with it. Raises `Lost`, `TimeoutError`."""
        self.socket.settimeout(timeout)
        files: list[int] = []
        try:
            head = b""
            while len(head) < _HEAD.size:
                data, got, _, _ = socket.recv_fds(self.socket, _HEAD.size - len(head), max_files)
                files += got
                if not data:
                    raise Lost("the connection ended")
                head += data
            message = json.loads(self._read(_HEAD.unpack(head)[0]))
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            raise Lost(f"cannot receive: {type(error).__name__}") from None
        if not isinstance(message, dict):
            raise Lost("a message that is no object")
        return message, files

    def _read(self, size: int) -> bytes:
        if size > MAX_BYTES:
            raise Lost(f"a message of {size} bytes")
        parts, left = [], size
        while left:
            part = self.socket.recv(left)
            if not part:
                raise Lost("the connection ended")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        self.socket.close()


def shared_memory(size: int) -> int:
    """A file in memory whose size nobody can change, so that a map of it stays valid. The caller closes it."""
    import fcntl

    handle = os.memfd_create("kvkeye-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(handle, size)
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(handle)
        raise
    return handle
