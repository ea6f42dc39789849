"""Decoded frames to upright RGB pictures of the wanted part and size, in one pass.

FFmpeg's scaler crops, scales and converts at once: a third of the cost of converting everything
and resizing the crop afterwards, nearer to the exact result (chroma is interpolated once, not
repeated and then interpolated), and a clip takes as much memory as the network's input however
large the video is. Each frame is shrunk with a triangle filter as wide as the ratio asks for.

The pixels come as planes (FFmpeg's format gbrp): that way its vector code writes full-resolution
colours, which for interleaved ones is scalar code at two and a half times the cost of the whole
pass, and normalised planes are what the network wants.

Crops begin and end between whole chroma samples: they are grown to even rows and columns first.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from av.filter import Graph
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from vimnas_ds.data.sampling import Cut, Window

#: Bilinear, chroma at full resolution, and the same bits on every processor.
FLAGS = "bilinear+accurate_rnd+full_chroma_int+bitexact"


class Converter:
    """Frames to upright RGB planes: uint8 (3, *size), where `size` is the cut's (height, width).

    Args:
        first: a frame; later ones are first brought to its size and format if theirs differ.
        cut: see `decode.read_clip`.
    """

    def __init__(self, first: av.VideoFrame, cut: Callable[[int, int], Cut] | None) -> None:
        self._like = (first.width, first.height, first.format.name)
        self._turn = orientation(first)
        transpose = self._turn[0]
        width, height = self._like[:2][::-1] if transpose else self._like[:2]
        part = Cut(Window(0, 0, height, width), height, width)
        if cut is not None:
            part = cut(width, height)
        self.size = (part.height, part.width)
        self._stored = self.size[::-1] if transpose else self.size
        window = _unturned(part.window, width, height, self._turn)
        self._graph = _build(first, _grown(window, *self._like[:2]), *self._stored)

    def __call__(self, frame: av.VideoFrame, out: NDArray[np.uint8]) -> None:
        """Writes the frame into `out`, (3, *size)."""
        width, height, name = self._like
        if (frame.width, frame.height, frame.format.name) != self._like:  # changed on the way
            frame = VideoReformatter().reformat(frame, width, height, name, threads=1)
        self._graph.vpush(frame)
        rows, columns = self._stored
        transpose, flip_rows, flip_columns = self._turn
        for color, plane in zip("GBR", self._graph.vpull().planes, strict=True):
            lines = np.frombuffer(memoryview(plane), np.uint8)[: rows * plane.line_size]
            picture = lines.reshape(rows, -1)[:, :columns]
            if transpose:
                picture = picture.T
            if flip_rows:
                picture = picture[::-1]
            out["RGB".index(color)] = picture[:, ::-1] if flip_columns else picture


def _build(first: av.VideoFrame, window: Window, height: int, width: int) -> Graph:
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=first.width,
        height=first.height,
        format=first.format,
        time_base=first.time_base or Fraction(1, 1000),
    )
    w = window
    parts = [
        source,
        graph.add("crop", f"w={w.width}:h={w.height}:x={w.left}:y={w.top}:exact=1"),
        graph.add("scale", f"w={width}:h={height}:flags={FLAGS}"),
        graph.add("format", "pix_fmts=gbrp"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*parts).configure()
    return graph


def _grown(window: Window, width: int, height: int) -> Window:
    """To even borders, inside of a picture of this size."""
    top, left = window.top & ~1, window.left & ~1
    bottom = min(window.top + window.height + 1 & ~1, height)
    right = min(window.left + window.width + 1 & ~1, width)
    return Window(top, left, bottom - top, right - left)


def _unturned(window: Window, width: int, height: int, turn: tuple[bool, bool, bool]) -> Window:
    """Where a window of the upright picture, of this size, lies in the stored one."""
    transpose, flip_rows, flip_columns = turn
    top, left, h, w = window.top, window.left, window.height, window.width
    if flip_columns:
        left = width - left - w
    if flip_rows:
        top = height - top - h
    return Window(left, top, w, h) if transpose else Window(top, left, h, w)


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, flip rows, flip columns) that make the frame upright, from its display matrix.

    The matrix maps stored to shown coordinates, x' = a x + c y, y' = b x + d y. Quarter turns and
    mirrors are applied; any other matrix is ignored.
    """
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if a == d == 0 and b and c:
        return True, b < 0, c < 0
    if b == c == 0 and a and d:
        return False, d < 0, a < 0
    return False, False, False
