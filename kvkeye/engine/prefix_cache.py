"""Content names of KV blocks: sha256 chains over tokens, the media they stand for and a salt.

Knows how content becomes bytes, and nothing of blocks, pools or scheduling.
Every part is tagged and length-framed, so that two different contents never give the same byte stream
(`int` next to `str`, 30x100 next to 100x30, ["ab"] next to ["a", "b"]).
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from kvkeye.engine.request import MediaSpan, Sequence

KEY_BYTES = 32


def _frame(tag: bytes, payload: bytes) -> bytes:
    return tag + struct.pack("<Q", len(payload)) + payload


def root_hash(salt: bytes) -> bytes:
    """The parent of a first block. Requests with different salts never share a block."""
    return hashlib.sha256(b"kvkeye.prefix.1" + _frame(b"S", salt)).digest()


def block_hash(parent: bytes, tokens: SequenceOf[int], start: int, media: Iterable[MediaSpan]) -> bytes:
    """Name of a full block.

    parent  name of the block before it, [32] bytes
    tokens  the block's tokens; `start` is the position of the first
    media   spans that overlap the block
    """
    parts = [_frame(b"P", parent), _frame(b"T", array("q", tokens).tobytes())]
    for span in media:
        parts.append(_frame(b"M", span.key))
        # Signed place of the span's first token relative to the block, and its full length.
        parts.append(_frame(b"O", struct.pack("<qq", span.start - start, span.length)))
    return hashlib.sha256(b"".join(parts)).digest()


def span_key(media_key: bytes, index: int, positions: bytes) -> bytes:
    """Name of the `index`-th span of some media at the given rotary positions."""
    parts = _frame(b"M", media_key) + _frame(b"I", struct.pack("<q", index)) + _frame(b"R", positions)
    return hashlib.sha256(b"kvkeye.span.1" + parts).digest()


def extend_hashes(seq: Sequence, block_size: int) -> list[bytes]:
    """Names of all full blocks of `seq.tokens`; only the missing ones are computed. Mutates `seq.block_hashes`."""
    hashes = seq.block_hashes
    num_full = len(seq.tokens) // block_size
    if len(hashes) >= num_full:
        return hashes
    parent = hashes[-1] if hashes else root_hash(seq.request.salt)
    for index in range(len(hashes), num_full):
        start = index * block_size
        media = seq.request.media_between(start, start + block_size)
        parent = block_hash(parent, seq.tokens[start : start + block_size], start, media)
        hashes.append(parent)
    return hashes
