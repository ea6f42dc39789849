"""When a video's frames are shown, from its packets alone: the file is read and not decoded."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
from av.error import FFmpegError

from vimnas_ds.data.bad import BadVideo
from vimnas_ds.data.blob import Media


class PacketTimes(NamedTuple):
    """Presentation times in ticks of `base` seconds, of the packets that a player shows.

    `ticks` are all of them and `keys` the key frames', both sorted and distinct; `end` is where the
    last frame ends. `hidden`: an edit list hides others, which are decoded and never shown.
    """

    base: Fraction
    ticks: list[int]
    keys: list[int]
    end: int
    hidden: bool

    @property
    def begins(self) -> list[float]:
        """`ticks` in seconds."""
        return [tick * float(self.base) for tick in self.ticks]

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return (self.end - self.ticks[0]) * float(self.base)


def packet_times(container: av.container.InputContainer, path: Media) -> PacketTimes:
    """Reads to the end of the file, or to where it cannot be read, and leaves it there.

    Raises BadVideo if there is no packet to show.
    """
    stream = container.streams.video[0]
    ticks: set[int] = set()
    keys: set[int] = set()
    end, hidden = -(2**63), False
    for packet in until_error(container.demux(stream)):
        stamp = packet.dts if packet.pts is None else packet.pts
        if packet.is_discard:
            hidden = True
        elif stamp is not None and packet.size:
            ticks.add(stamp)
            if packet.is_keyframe:
                keys.add(stamp)
            end = max(end, stamp + (packet.duration or 0))
    if not ticks:
        raise BadVideo(str(path), "the video stream is empty")
    base = stream.time_base or Fraction(1, av.time_base)
    return PacketTimes(base, sorted(ticks), sorted(keys), end, hidden)


def until_error(packets: Iterator[av.Packet]) -> Iterator[av.Packet]:
    """Packets up to the first place where the container cannot be read (a truncated file)."""
    while True:
        try:
            packet = next(packets)
        except (StopIteration, FFmpegError):
            return
        yield packet
