"""Folders that are there as a whole or not at all, also after a power cut (no torch)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def flush(path: Path) -> None:
    """Until the file, or the list of files in the folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish_folder(hidden: Path, final: Path) -> None:
    """Give the finished folder `hidden` its name, beside it; an older `final` is replaced."""
    for file in hidden.iterdir():
        flush(file)
    replaced = final.with_name(f".old-{final.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    hidden.rename(final)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
