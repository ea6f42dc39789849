"""Where a dataset's files are read from: single files under its root, or its shards."""

from __future__ import annotations

from pathlib import Path

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.blob import Media
from vimnas_ds.data.readers import begin_file
from vimnas_ds.data.shards import Shards, open_shards


class Folder:
    """Files under a dataset's root: their readers open them by path."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def file(self, path: str) -> Media:
        """The file of this path relative to the root. Raises BadFile as `begin_file`."""
        return begin_file(self._root / path)


def open_store(name: str, section: DatasetSection) -> Folder | Shards:
    """The files of the dataset `name`.

    Raises:
        ValueError: neither shards nor a root.
        DataMissing, BadAnnotations: as `open_shards`.
    """
    if section.shards is not None:
        return open_shards(name, section.shards)
    if section.root is None:
        raise ValueError(f"{name}: no data folder; set vimnas.data.{name}.root")
    return Folder(section.root)
