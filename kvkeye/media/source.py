"""Where the bytes of a picture or a clip come from: a path, a `file:` or `data:` URI, bytes; never the network.

Sizes are checked before anything is read or decoded. Knows nothing of formats.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from kvkeye.errors import MediaError
from kvkeye.media.limits import MediaLimits

_BASE64_MARK = ";base64"


def is_data_uri(source: object) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def split_data_uri(uri: str, where: str) -> tuple[str, str]:
    """(media type in lower case, payload). Raises `MediaError` where the URI is not base64."""
    head, comma, payload = uri.partition(",")
    if not comma or not head.lower().endswith(_BASE64_MARK):
        raise MediaError(
            f"{where}: a data: URI that starts {uri[:40]!r}; required is data:<type>;base64,<payload>. "
            "Encode the file with base64."
        )
    return head[5 : -len(_BASE64_MARK)].lower(), payload


def decode_base64(payload: str, max_bytes: int, where: str) -> bytes:
    """Bytes of a base64 text; its length is checked first. Raises `MediaError`."""
    check_size(len(payload) * 3 // 4 - 2, max_bytes, where)
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"{where}: the base64 text is malformed; encode the whole file again.") from None


def check_size(num_bytes: int, max_bytes: int, where: str) -> None:
    if num_bytes > max_bytes:
        raise MediaError(f"{where}: {num_bytes} encoded bytes; at most {max_bytes} are accepted. Send a smaller file.")
    if num_bytes <= 0:
        raise MediaError(f"{where}: the file is empty; send one with content.")


def to_path(source: str | os.PathLike[str], limits: MediaLimits, where: str) -> Path:
    """The local path that a string, a `file:` URI or a path object names. Raises `MediaError`."""
    text = os.fspath(source)
    if "://" in text[:16]:
        parts = urlsplit(text)
        if parts.scheme.lower() != "file" or parts.netloc not in ("", "localhost"):
            raise MediaError(
                f"{where}: the address {text[:60]!r}; addresses on the network are not fetched. "
                "Download the file and give its path or a data: URI."
            )
        text = unquote(parts.path)
    if not limits.may_read_files:
        raise MediaError(f"{where}: a file path; this service reads no local files. Send a data: URI.")
    if "\0" in text:
        raise MediaError(f"{where}: the path holds a NUL character; give a plain path.")
    return Path(text)


def open_file(path: Path, max_bytes: int, where: str) -> BinaryIO:
    """An open regular file of at most `max_bytes`. Raises `MediaError`; FIFOs and devices are refused."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise MediaError(f"{where}: cannot open {str(path)!r}: {error.strerror}. Check the path.") from None
    info = os.fstat(handle)
    if not stat.S_ISREG(info.st_mode):
        os.close(handle)
        raise MediaError(f"{where}: {str(path)!r} is not a regular file; give the path of a picture or a clip.")
    try:
        check_size(info.st_size, max_bytes, f"{where}: {str(path)!r}")
    except MediaError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def open_source(source: object, max_bytes: int, limits: MediaLimits, where: str, accepted: str) -> BinaryIO:
    """An open file of at most `max_bytes` for a path, a URI or a bytes-like object. Raises `MediaError`."""
    if isinstance(source, str) and is_data_uri(source):
        source = decode_base64(split_data_uri(source, where)[1], max_bytes, where)
    if isinstance(source, (bytes, bytearray, memoryview)):
        check_size(memoryview(source).nbytes, max_bytes, where)
        return io.BytesIO(source)  # `bytes` are shared, not copied
    if isinstance(source, (str, os.PathLike)):
        return open_file(to_path(source, limits, where), max_bytes, where)
    raise MediaError(f"{where}: an object of type {type(source).__name__}; accepted are {accepted}.")
