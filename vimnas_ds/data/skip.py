"""Leaving out the decoding of frames that nobody sees and no other frame needs.

An H.264 frame that is marked as no reference (most B-frames) can be left out without any other
frame changing. A packet's frame is shown from its timestamp to the next one; when no wanted time
lies in between, the decoder is told to pass over it if it is no reference. The next timestamp is
known from the packets read ahead; while it is not known the frame is decoded.

That this was exact is checked, not believed: `confirm` compares the frames shown with what the
packets' timestamps say. HEVC's temporal layers let such frames be references after all, and other
decoders ignore the request, so they are not asked.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterator
from itertools import pairwise

import av

#: Packets read ahead: twice as many as a stream may reorder.
LOOKAHEAD = 32
#: What a file's codec must be called.
CODECS = frozenset({"h264"})


class Inexact(Exception):
    """Frames were passed over and the rest is not what the timestamps promise."""


class Skipper:
    """Watches a stream's packets on their way to the decoder.

    Args:
        times: the wanted times in seconds of stream time, ascending.
    """

    def __init__(self, stream: av.VideoStream, times: list[float]) -> None:
        self._context, self._times = stream.codec_context, times
        self._base = float(stream.time_base or 0)
        self._stamps: list[float] = []  # of all packets read so far, ascending
        self.skipped = 0  #: packets that the decoder was told to pass over if it can

    @staticmethod
    def suits(container: av.container.InputContainer, stream: av.VideoStream) -> bool:
        """Whether frames of this file may be passed over."""
        codec = stream.codec_context.codec.canonical_name
        return codec in CODECS and container.format.name != "avi" and bool(stream.time_base)

    def watch(self, packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
        """The packets, the decoder being set for each; reads up to `LOOKAHEAD` ahead."""
        ahead: deque[av.Packet] = deque()
        for packet in packets:
            ahead.append(packet)
            if packet.pts is not None and packet.size:
                insort(self._stamps, packet.pts * self._base)
            if len(ahead) > LOOKAHEAD:
                yield self._set(ahead.popleft())
        while ahead:
            yield self._set(ahead.popleft())

    def _set(self, packet: av.Packet) -> av.Packet:
        unseen = packet.pts is not None and bool(packet.size) and not self._is_shown(packet.pts)
        self._context.skip_frame = "NONREF" if unseen else "DEFAULT"
        self.skipped += unseen
        return packet

    def _is_shown(self, pts: int) -> bool:
        begin = pts * self._base
        place = bisect_right(self._stamps, begin)
        if place == len(self._stamps):
            return True  # the next frame's time is not known yet
        index = bisect_left(self._times, begin)
        if place == 1 and index > 0:
            return True  # the first frame stands for all earlier times
        return index < len(self._times) and self._times[index] < self._stamps[place]

    def gap(self, first: float, last: float, least: float) -> float:
        """The longest time between neighbouring packets from `first` to `last`, `least` or more."""
        found = [s for s in self._stamps if first <= s <= last]
        return max([least, *(later - earlier for earlier, later in pairwise(found))])

    def confirm(self, shown: list[float]) -> None:
        """Raises Inexact unless the frames shown, by their times, are those of the timestamps."""
        if not self.skipped:
            return
        for time, stamp in zip(self._times, shown, strict=True):
            place = max(bisect_right(self._stamps, time), 1)
            if self._stamps[place - 1] != stamp:
                raise Inexact
