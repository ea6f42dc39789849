"""Image files as bytes that DALI can certainly decode.

DALI decodes the picture (and only its crop), but a broken file inside DALI kills the whole pipeline
object. So a file's header is read with Pillow every time, its compressed data are walked through
once per file (JPEG at an eighth of the size, about a third of the cost of decoding), and formats
that DALI's CPU and GPU decoders may treat differently are handed over as plain BMP.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vimnas_ds.data.bad import BadFile
from vimnas_ds.data.blob import Blob, Media, length_of

EXIF_ORIENTATION = 0x0112
#: (format, mode) pairs that go to DALI as they are.
DIRECT = frozenset({("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")})


class EncodedImage(NamedTuple):
    """A file's bytes, uint8 (n,), and the upright picture's size in pixels."""

    data: NDArray[np.uint8]
    width: int
    height: int


def read_image(path: Media, verify: bool, transcode: bool = False) -> EncodedImage:
    """Reads one image file without decoding it for use.

    Args:
        verify: walk through all compressed data, as is right the first time a file is used.
        transcode: decode fully and return BMP whatever the format is.

    Raises:
        BadFile: unreadable, not an image, truncated or corrupt.
    """
    with understood(path):
        raw = path.read_bytes()
        with Image.open(io.BytesIO(raw)) as image:
            if transcode or (image.format, image.mode) not in DIRECT:
                return _as_bmp(image)
            turned = image.getexif().get(EXIF_ORIENTATION, 1) >= 5  # quarter turns; DALI applies it
            width, height = image.size[::-1] if turned else image.size
            if verify:
                image.draft(image.mode, (1, 1))
                image.load()
    return EncodedImage(np.frombuffer(raw, np.uint8), width, height)


def encoded_bytes(path: Media) -> int:
    """Length of the data that `read_image` gives without `transcode`; decodes the header only.

    Raises:
        BadFile: unreadable or not an image.
    """
    source = path.stream() if isinstance(path, Blob) else path
    with understood(path), Image.open(source) as image:
        if (image.format, image.mode) in DIRECT:
            return length_of(path)
        return 3 * image.width * image.height


@contextmanager
def understood(path: Media) -> Iterator[None]:
    """Whatever Pillow raises on damaged files becomes `BadFile`."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise BadFile(str(path), "not an image") from error
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        # Pillow's plugins raise all of these on damaged files
        raise BadFile(str(path), getattr(error, "strerror", None) or str(error)) from error


def _as_bmp(image: Image.Image) -> EncodedImage:
    upright = ImageOps.exif_transpose(image).convert("RGB")
    buffer = io.BytesIO()
    upright.save(buffer, "BMP")
    return EncodedImage(np.frombuffer(buffer.getvalue(), np.uint8), *upright.size)
