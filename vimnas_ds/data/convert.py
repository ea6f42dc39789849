"""Decoded frames to upright RGB pictures, cheaply.

A scaler is kept per thread: making one for every frame, or letting it start its own threads, costs
several times the conversion of a small frame.
"""

from __future__ import annotations

import threading

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

_local = threading.local()


class Converter:
    """Frames to upright RGB of the first frame's size: uint8 (H, W, 3)."""

    def __init__(self, first: av.VideoFrame) -> None:
        self.width, self.height = first.width, first.height
        self.transpose, self.flip_rows, self.flip_columns = orientation(first)
        if not hasattr(_local, "scaler"):
            _local.scaler = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        rgb = _local.scaler.reformat(
            frame, width=self.width, height=self.height, format="rgb24", threads=1
        )
        picture: NDArray[np.uint8] = rgb.to_ndarray()
        if self.transpose:
            picture = picture.transpose(1, 0, 2)
        if self.flip_rows:
            picture = picture[::-1]
        return picture[:, ::-1] if self.flip_columns else picture


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
