"""A file's bytes in memory, for readers that otherwise take a path."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Blob:
    """What a file holds, and its name: for messages, and because FFmpeg looks at the suffix."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        """As `Path.read_bytes`."""
        return self.data

    def stream(self) -> io.BytesIO:
        """The bytes to be read from their start, without a copy."""
        found = io.BytesIO(self.data)
        found.name = self.name
        return found


#: What the readers of images and videos take: a file on the disk, or one that is in memory.
Media = Path | Blob


def length_of(media: Media) -> int:
    """In bytes."""
    return len(media.data) if isinstance(media, Blob) else media.stat().st_size
