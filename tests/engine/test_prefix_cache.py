"""Names of blocks: different content never gets the same name, the same content always does."""

from __future__ import annotations

import hashlib
import struct

import hypothesis.strategies as st
from hypothesis import given, settings

from kvkeye.engine.prefix_cache import block_hash, extend_hashes, root_hash
from kvkeye.engine.request import MediaSpan, Request, SamplingParams, Sequence


def sequence(tokens, media=(), salt=b""):
    request = Request("r", list(tokens), SamplingParams(), max_tokens=1, media=tuple(media), salt=salt)
    return Sequence(0, request, 0, list(tokens))


def names(tokens, media=(), salt=b"", block_size=4):
    return extend_hashes(sequence(tokens, media, salt), block_size)


def test_only_full_blocks_have_names_and_they_are_computed_once():
    seq = sequence(range(7))
    first = list(extend_hashes(seq, 4))
    assert len(first) == 1
    seq.tokens.append(7)
    assert extend_hashes(seq, 4)[:1] == first and len(seq.block_hashes) == 2
    assert seq.block_hashes == names(range(8))


def test_a_name_covers_everything_before_it():
    left, right = names([1, 2, 3, 4, 5, 6, 7, 8]), names([9, 2, 3, 4, 5, 6, 7, 8])
    assert left[0] != right[0] and left[1] != right[1]


def test_salt_separates_tenants():
    assert not set(names(range(8), salt=b"a")) & set(names(range(8), salt=b"b"))
    assert root_hash(b"") != root_hash(b"\x00")


def test_media_content_place_and_length_separate_equal_tokens():
    pads = [7] * 8
    variants = [
        [],
        [MediaSpan(0, 8, b"a")],
        [MediaSpan(0, 8, b"b")],
        [MediaSpan(0, 7, b"a")],
        [MediaSpan(1, 7, b"a")],
        [MediaSpan(0, 4, b"a"), MediaSpan(4, 4, b"a")],
        [MediaSpan(0, 4, b"aa"), MediaSpan(4, 4, b"")],
        [MediaSpan(0, 2, b"a"), MediaSpan(2, 2, b"b"), MediaSpan(4, 4, b"c")],
        [MediaSpan(0, 2, b"ab"), MediaSpan(2, 2, b""), MediaSpan(4, 4, b"c")],
    ]
    last = [names(pads, media)[1] for media in variants]
    assert len(set(last)) == len(variants)


def test_media_after_a_block_does_not_change_its_name():
    assert names([7] * 8, [MediaSpan(4, 4, b"a")])[0] == names([7] * 8, [MediaSpan(4, 4, b"b")])[0]


def test_the_byte_stream_is_the_documented_one():
    def frame(tag, payload):
        return tag + struct.pack("<Q", len(payload)) + payload

    root = hashlib.sha256(b"kvkeye.prefix.1" + frame(b"S", b"salt")).digest()
    stream = frame(b"P", root) + frame(b"T", struct.pack("<4q", 1, 2, 3, 4))
    stream += frame(b"M", b"key") + frame(b"O", struct.pack("<qq", 1, 3))
    expected = hashlib.sha256(stream).digest()
    assert names([1, 2, 3, 4], [MediaSpan(1, 3, b"key")], salt=b"salt") == [expected]


contents = st.tuples(
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.binary(max_size=2)), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(contents, contents)
def test_names_are_equal_exactly_when_contents_are(left, right):
    hashes = [
        block_hash(root_hash(b""), tokens, 0, [MediaSpan(*span) for span in media]) for tokens, media in (left, right)
    ]
    assert (hashes[0] == hashes[1]) == (left == right)
