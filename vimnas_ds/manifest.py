"""What a folder of files must hold, to the bit: MANIFEST names every file with size and SHA-256.

Written last, so a folder without one was never finished. It signs itself too: a manifest with a
wrong byte is damage like any other (no torch).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


class Damaged(ValueError):
    """A folder that does not hold what was written; the message names the file. What a disk cannot
    read at the moment (an OSError other than a missing file) is not known to be damaged."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> FileEntry:
        with file.open("rb") as stream:
            return cls(file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())


@dataclass(frozen=True)
class Manifest:
    """`about` is whatever the writer wants to be known without opening the files."""

    files: dict[str, FileEntry]
    about: dict[str, Any]


def write_manifest(folder: Path, files: Mapping[str, FileEntry], about: Mapping[str, Any]) -> None:
    """The folder's manifest; every file must have been written."""
    body = {
        "format": FORMAT,
        "about": dict(about),
        "files": {name: [e.size, e.sha256] for name, e in sorted(files.items())},
    }
    text = json.dumps({**body, "sha256": _digest(body)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Raises Damaged, in words, where there is none or it is not as it was written, and OSError
    where it cannot be read."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        signed = body.pop("sha256")
        if body["format"] != FORMAT:
            raise Damaged(f"{path} has format {body['format']!r}, this version reads {FORMAT}")
        if signed != _digest(body):
            raise Damaged(f"{path} is not as it was written")
        files = {name: FileEntry(*entry) for name, entry in body["files"].items()}
    except FileNotFoundError as err:
        raise Damaged(f"{path} is missing: the folder was never finished") from err
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        if isinstance(err, Damaged):
            raise
        raise Damaged(f"{path} cannot be read: {err}") from err
    for name in files:
        if Path(name).name != name:
            raise Damaged(f"{path} names {name!r}, which is not a file of its folder")
    return Manifest(files, body["about"])


def verify(folder: Path, names: Iterable[str] | None = None) -> Manifest:
    """The manifest, once the files (all, or `names`) are proved to be what it says.

    Reads them whole. Raises Damaged, naming the file, and OSError where one cannot be read.
    """
    manifest = read_manifest(folder)
    for name in manifest.files if names is None else names:
        path = folder / name
        if name not in manifest.files:
            raise Damaged(f"{folder / MANIFEST} names no {name}")
        try:
            found = FileEntry.of(path)
        except FileNotFoundError as err:
            raise Damaged(f"{path} is missing") from err
        wanted = manifest.files[name]
        if found.size != wanted.size:
            raise Damaged(f"{path} has {found.size:,} bytes, {wanted.size:,} were written")
        if found != wanted:
            raise Damaged(f"{path} is damaged: its SHA-256 is not that of what was written")
    return manifest


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
