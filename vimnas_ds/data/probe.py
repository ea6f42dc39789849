"""One file, one verdict: usable, or the reason why not, and what the index keeps of it.

A video is demuxed once for its timestamps, and its first, a middle and its last second are decoded.
That is what training relies on: a clip may start anywhere. An image's header is read; `thorough`
walks through its compressed data as well.

Reasons are free of names and numbers, so that a report can count them.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from av.error import FFmpegError
from PIL import Image

from vimnas_ds.data.bad import BadFile, BadVideo
from vimnas_ds.data.convert import orientation
from vimnas_ds.data.decode import decoded_frames, open_video
from vimnas_ds.data.images import EXIF_ORIENTATION, read_image
from vimnas_ds.data.packets import PacketTimes, packet_times
from vimnas_ds.data.timeline import Timeline

#: States of an index row. "unreadable" may pass (permissions, a network file system, a time limit):
#: such files are probed again by every run, "unusable" ones only when they change.
USABLE, UNUSABLE, UNREADABLE, MISSING = "usable", "unusable", "unreadable", "missing"
#: The reason of a file that was given up: readable or not, only a new probe can tell.
TIMED_OUT = "probing took longer than the time limit"
#: Parts that are decoded, and the length of each, in seconds.
WINDOW = 1.0
#: Sides above this are refused: one frame would be gigabytes.
MAX_SIDE = 16384


#: before the container's name: an edit list hides frames
CUT = "cut "


@dataclass(frozen=True, slots=True)
class Verdict:
    """What probing one file found.

    Attributes:
        state, reason: see `USABLE` and its neighbours; the reason is empty for usable files.
        size, mtime: of the file, in bytes and nanoseconds; -1 if unknown.
        container, codec, pixels: FFmpeg's (or Pillow's) names; `CUT` before the container's if an
            edit list hides frames.
        width, height: of the upright picture, in pixels.
        rotation, mirrored: clockwise degrees that turn the stored picture upright, after mirroring
            it left to right if `mirrored`.
        timeline: the packets' presentation times; None for images.
        duration: seconds from the first frame to the end of the last.
    """

    state: str
    reason: str = ""
    size: int = -1
    mtime: int = -1
    container: str = ""
    codec: str = ""
    pixels: str = ""
    width: int = 0
    height: int = 0
    rotation: int = 0
    mirrored: bool = False
    timeline: Timeline | None = None
    duration: float = 0.0


def probe_file(path: Path, is_image: bool, thorough: bool = False) -> Verdict:
    """Judges one file; raises nothing that the file can cause."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            return Verdict(UNUSABLE, "not a regular file")
        if status.st_size == 0:
            return Verdict(UNUSABLE, "empty file", 0, status.st_mtime_ns)
        _read_a_byte(path)
    except OSError as error:
        return Verdict(UNREADABLE, error.strerror or type(error).__name__)
    size, mtime = status.st_size, status.st_mtime_ns
    try:
        if is_image:
            return _probe_image(path, thorough, size, mtime)
        return _probe_video(path, size, mtime)
    except BadFile as error:
        reason = error.reason.replace(str(path), "FILE").strip()
        return Verdict(UNUSABLE, reason, size, mtime)
    except MemoryError:
        return Verdict(UNUSABLE, "needs too much memory", size, mtime)


def can_be_read(path: Path) -> bool:
    """Whether a file with the state `UNREADABLE` would now be probed further than that."""
    try:
        regular = path.is_file()  # a pipe would be waited for
        if regular:
            _read_a_byte(path)
    except OSError:
        return False
    return regular


def _read_a_byte(path: Path) -> None:
    with path.open("rb") as file:
        file.read(1)


def _probe_image(path: Path, thorough: bool, size: int, mtime: int) -> Verdict:
    if thorough:
        read_image(path, verify=True)
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
            width, height = image.size[::-1] if turned else image.size
            kind, mode = image.format or "", image.mode
    except Image.UnidentifiedImageError as error:
        raise BadFile(str(path), "not an image") from error
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        # Pillow's plugins raise all of these on damaged files
        raise BadFile(str(path), getattr(error, "strerror", None) or str(error)) from error
    if min(width, height) < 1:
        raise BadFile(str(path), "no pixels")
    return Verdict(
        USABLE, "", size, mtime, kind, kind.lower(), mode, width, height, 90 if turned else 0
    )


def _probe_video(path: Path, size: int, mtime: int) -> Verdict:
    with open_video(path) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        if max(context.width, context.height) > MAX_SIDE:
            raise BadVideo(str(path), "a picture too large to decode")
        times = packet_times(container, path)
        timeline = _packed(times, path)
        container.seek(0, backward=True)
        first = next(decoded_frames(container, stream, path), None)
        if first is None:
            raise BadVideo(str(path), "no frame can be decoded")
        frame = first[0]
        transpose, flip_rows, flip_columns = orientation(frame)
        for where, begin in _windows(timeline):
            _decode_window(path, timeline, where, begin)
        return Verdict(
            USABLE,
            "",
            size,
            mtime,
            CUT * times.hidden + container.format.name,
            context.codec.canonical_name,
            context.pix_fmt or "",
            frame.height if transpose else frame.width,
            frame.width if transpose else frame.height,
            _degrees(transpose, flip_rows, flip_columns),
            (transpose + flip_rows + flip_columns) % 2 == 1,
            timeline,
            timeline.duration,
        )


def _packed(times: PacketTimes, path: Path) -> Timeline:
    try:
        return Timeline.pack(times.ticks, times.end, times.base)
    except ValueError as error:
        raise BadVideo(str(path), str(error)) from error


def _windows(timeline: Timeline) -> Iterator[tuple[str, float]]:
    """(name, begin in seconds of stream time) of the seconds to decode."""
    first = timeline.first * timeline.num / timeline.den
    last = max(first, first + timeline.duration - WINDOW)
    yield "first", first
    if last > first + WINDOW:
        yield "middle", (first + last) / 2
    if last > first:
        yield "last", last


def _decode_window(path: Path, timeline: Timeline, where: str, begin: float) -> None:
    """Decodes one second. Raises BadVideo if nothing of what should be shown there comes out."""
    stamps = timeline.seconds()
    inside = ((stamps >= begin) & (stamps < begin + WINDOW)).any()
    start = begin if inside else float(stamps[stamps <= begin].max(initial=stamps[0]))
    slack = 2 / 1000  # Matroska's rounding, and AVI's decoding times
    for seek in (True, False) if where != "first" else (False,):
        with open_video(path) as container:
            stream = container.streams.video[0]
            if seek:
                ticks = int(start / float(stream.time_base or 1))
                try:
                    container.seek(ticks, stream=stream, backward=True)
                except FFmpegError:
                    continue
            shown = False
            for _, time in decoded_frames(container, stream, path):
                if time >= begin + WINDOW + slack:
                    break
                shown |= time >= start - slack
            if shown:
                return
    raise BadVideo(str(path), f"nothing can be decoded in the {where} second")


def _degrees(transpose: bool, flip_rows: bool, flip_columns: bool) -> int:
    """Clockwise turn after an optional mirror; see `Verdict`."""
    turns = {
        (False, False, False): 0, (False, False, True): 0,
        (False, True, True): 180, (False, True, False): 180,
        (True, False, True): 90, (True, True, True): 90,
        (True, True, False): 270, (True, False, False): 270,
    }  # fmt: skip
    return turns[transpose, flip_rows, flip_columns]
