"""Command-line values that argparse itself refuses, before anything else is done."""

from __future__ import annotations

import argparse
from pathlib import Path


def folder(text: str) -> Path:
    """A folder that is there or can be made."""
    path = Path(text)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: {place} is a file; name a folder")
    return path
