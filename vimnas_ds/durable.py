"""Files and folders that are there as a whole or not at all, also after a power cut (no torch)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

REPLACED = ".old-"  #: prefix of a folder that is being replaced
FRESH = ".new-"  #: prefix of a file that will replace another


def flush(path: Path) -> None:
    """Until the file, or the list of files in the folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace the file by one that holds `text`; a reader sees the old one or the new one."""
    fresh = path.with_name(FRESH + path.name)
    fresh.write_text(text, encoding="utf-8")
    flush(fresh)
    fresh.replace(path)
    flush(path.parent)


def publish_folder(hidden: Path, final: Path) -> None:
    """Give the finished folder `hidden` its name, beside it; an older `final` is replaced."""
    for file in hidden.iterdir():
        flush(file)
    flush(hidden)
    replaced = final.with_name(REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    hidden.rename(final)
    flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(root: Path) -> None:
    """Put back what a process died over while it was replacing it (see `publish_folder`)."""
    for replaced in root.glob(REPLACED + "*"):
        final = root / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(final)
