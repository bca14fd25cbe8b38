"""The packets of a video stream: how many, which frame each becomes, and at which of them decoding may start.

With this a decoder reaches a far frame without decoding what lies before it, and gets the same frame to the bit. Where
packets and frames might not match one to one there is no index, and frames are counted as they come.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

GAP = 8  # packets between two stretches that are decoded rather than jumped over

_H264_IDR = (5,)
_HEVC_IRAP = tuple(range(16, 22))  # BLA, IDR and CRA


@dataclass
class Run:
    """Packets [start, stop) in the order of the file; the wanted frames' packets, and their time stamps in order."""

    start: int
    stop: int
    packets: set[int] = field(default_factory=set)
    wanted: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class PacketIndex:
    """
    pts    int64 [n], time stamps of packets in the order of the file
    order  int64 [n], frame number -> packet
    keys   int64 [k], packets at which a decoder may start; the first is 0
    """

    pts: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]

    def plan(self, indices: Sequence[int]) -> list[Run]:
        """The stretches to decode for non-decreasing frame numbers."""
        runs: list[Run] = []
        for index in indices:
            packet = int(self.order[index])
            start = self._start(packet)
            if not runs or start - runs[-1].stop >= GAP:
                runs.append(Run(start, packet + 1))
            runs[-1].stop = max(runs[-1].stop, packet + 1)
            runs[-1].packets.add(packet)
            runs[-1].wanted.append(int(self.pts[packet]))
        return runs

    def _start(self, packet: int) -> int:
        """The last key packet before `packet` that is also shown before it: one shown later may lack its references."""
        at = int(np.searchsorted(self.keys, packet, "right")) - 1
        while self.pts[self.keys[at]] > self.pts[packet]:
            at -= 1  # ends at packet 0, which is shown first
        return int(self.keys[at])


def read_packets(
    packets: Iterable[Any], codec: str, extradata: bytes, most: int, check_deadline: Callable[[], None]
) -> tuple[int, PacketIndex | None]:
    """The number of packets, at most `most`, and their index where frames can be told from packets."""
    inspect = _inspector(codec, extradata)
    pts, keys, count = array("q"), array("q"), 0
    for packet in packets:
        if packet.size:
            if inspect is not None:
                shown, is_key = inspect(packet)
                if not shown or packet.pts is None or packet.is_discard:
                    inspect = None
                else:
                    pts.append(packet.pts)
                    if is_key:
                        keys.append(count)
            count += 1
        if count >= most:
            break
        if count % 1024 == 0:
            check_deadline()
    if inspect is None or count == 0:
        return count, None
    return count, _build(np.frombuffer(pts, np.int64), np.frombuffer(keys, np.int64))


def _build(pts: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]) -> PacketIndex | None:
    order = np.argsort(pts, kind="stable")
    unique = bool((np.diff(pts[order]) > 0).all())
    if not unique or order[0] != 0 or not len(keys) or keys[0] != 0:
        return None
    return PacketIndex(pts, order, keys)


# What a packet says of itself: (becomes a frame that is shown, decoding may start here).
Inspector = Callable[[Any], tuple[bool, bool]]


def _inspector(codec: str, extradata: bytes) -> Inspector | None:
    """None for codecs and layouts whose packets are not looked into."""
    if codec == "mjpeg":
        return lambda packet: (True, True)
    if codec == "vp8":
        return _vp8
    if codec == "vp9":
        return _vp9
    if codec == "h264" and len(extradata) > 6 and extradata[0] == 1:
        return _nal_inspector((extradata[4] & 3) + 1, lambda byte: byte & 31, _H264_IDR)
    if codec == "hevc" and len(extradata) > 22 and extradata[0] == 1:
        return _nal_inspector((extradata[21] & 3) + 1, lambda byte: byte >> 1 & 63, _HEVC_IRAP)
    return None


def _nal_inspector(width: int, kind_of: Callable[[int], int], starts: tuple[int, ...]) -> Inspector:
    """For packets of NAL units, each after its length in `width` bytes."""

    def inspect(packet: Any) -> tuple[bool, bool]:
        if not packet.is_keyframe:
            return True, False
        data, at = memoryview(packet), 0
        while at + width < len(data):
            if kind_of(data[at + width]) in starts:
                return True, True
            at += width + int.from_bytes(data[at : at + width], "big")
        return True, False

    return inspect


def _vp8(packet: Any) -> tuple[bool, bool]:
    head = memoryview(packet)[0]
    return bool(head & 0x10), not head & 1


def _vp9(packet: Any) -> tuple[bool, bool]:
    """Bits from the top: marker (2), profile (2, low first; 3 has a reserved bit), show existing, not key, show."""
    data = memoryview(packet)
    bits = data[0] << 1 if data[0] & 0x30 == 0x30 else data[0]
    if bits & 8:
        return True, False  # shows a frame decoded before
    several = data[-1] & 0xE0 == 0xC0  # a superframe: hidden frames and one that is shown
    return bool(bits & 2) or several, not bits & 4
