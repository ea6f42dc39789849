"""Files and folders that are there as a whole or not at all, also after a power cut (no torch)."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

REPLACED = ".old-"  #: prefix of a folder that is being replaced
GONE = ".gone-"  #: prefix of one that is being deleted
FRESH = ".new-"  #: prefix of a file that will replace another


#: what a disk says that is full, read-only or gone
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES}
)


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


def discard(folder: Path) -> None:
    """Take the folder's name away at once and delete it; what a file system will not delete yet
    (files that somebody has open on NFS) stays under a hidden name for `sweep`."""
    gone = folder.with_name(GONE + folder.name)
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(root: Path) -> None:
    """Delete what `discard` had to leave."""
    for gone in root.glob(GONE + "*"):
        shutil.rmtree(gone, ignore_errors=True)


def restore_replaced(root: Path) -> None:
    """Put back what a process died over while it was replacing it (see `publish_folder`). For the
    folder's writer alone: to anybody else a replacement may be under way."""
    for replaced in root.glob(REPLACED + "*"):
        final = root / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(final)
