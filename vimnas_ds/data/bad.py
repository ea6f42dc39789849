"""What can be wrong with the data, as exceptions whose messages are for the person who owns it.

A broken file is a fact about a dataset, not an accident of the program: readers raise `BadFile`,
loaders substitute or skip the sample and keep count, and only a dataset that is broken in bulk
(`TooManyBadFiles`) or is not there at all (`DataMissing`) ends a run.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

#: The reason of a file that blocks its reader.
TOO_SLOW = "reading took longer than the time limit"


class DataMissing(ValueError):
    """A dataset's folder or one of its splits is not there; the message names the key to set."""


class BadAnnotations(ValueError):
    """Annotations, classes or counts that do not fit the configuration."""


class UnfitIndex(BadAnnotations):
    """A dataset index that cannot be used; the message says why and which command mends it."""


class BadFile(ValueError):
    """One file that cannot be used; `path` and `reason` say which and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class BadVideo(BadFile):
    """A video file of which no clip can be decoded."""


#: Files seen before the share of unusable ones is judged.
MIN_SEEN = 50


def are_too_many(bad: int, seen: int, max_bad_share: float) -> bool:
    """Whether so many of the files seen are unusable that the dataset counts as broken."""
    return seen >= MIN_SEEN and bad > max_bad_share * seen


def kind_of(reason: str) -> str:
    """A reason without what differs from file to file: numbers and what stands in brackets."""
    return re.sub(r"\s*\([^)]*\)|\s*\d+", "", reason).strip() or reason


class TooManyUnusable(DataMissing):
    """A dataset of whose files, by its index, more than `vimnas.data.max_bad_share` are unusable.

    Args:
        name: the dataset.
        unusable: what is wrong with each unusable file, by path.
        seen: its files that are on the disk.
        max_bad_share: the limit.
        index: the index.
    """

    def __init__(
        self, name: str, unusable: Mapping[str, str], seen: int, max_bad_share: float, index: Path
    ) -> None:
        counts = Counter(map(kind_of, unusable.values())).most_common()
        reasons = [f"  {count:,} files: {reason}" for reason, count in counts]
        first = [f"  {path}: {reason}" for path, reason in islice(unusable.items(), 20)]
        mend = shlex.join(["python", "scripts/index_data.py", "--update", str(index)])
        if (index.parent / "members.parquet").exists():
            mend = "scripts/index_data.py, then scripts/make_shards.py --overwrite"
        super().__init__(
            f"{name}: {len(unusable):,} of {seen:,} files are unusable, more than "
            f"vimnas.data.max_bad_share ({max_bad_share:.3g}) allows:\n"
            + "\n".join([*reasons, " the first of them:", *first])
            + f"\n Mend the files and renew the index ({mend}), or raise vimnas.data.max_bad_share "
            "to do without them"
        )


class TooManyBadFiles(ValueError):
    """A dataset with more unusable files than `vimnas.data.max_bad_share` allows.

    Args:
        name: the dataset.
        bad: samples that had to be replaced.
        seen: samples asked for.
        reasons: what is wrong with each unusable file, by path.
        root: the dataset's folder; the message says so if it is not there any more.
    """

    def __init__(
        self, name: str, bad: int, seen: int, reasons: Mapping[str, str], root: Path | None = None
    ) -> None:
        shown = [f"  {path}: {reason}" for path, reason in list(reasons.items())[:20]]
        rest = [f"  and {len(reasons) - 20} more"] if len(reasons) > 20 else []
        gone = root is not None and not root.is_dir()
        super().__init__(
            (f"{name}: the folder {root} is not there any more; " if gone else "")
            + f"{name}: {bad} of {seen} samples could not be read "
            "(the limit is vimnas.data.max_bad_share); the files:\n" + "\n".join(shown + rest)
        )
        self.reasons = dict(reasons)


class BlockedFiles(TooManyBadFiles):
    """So many files have blocked their readers that the disk they lie on must be gone.

    Args:
        paths: the files.
        seconds: `vimnas.data.file_timeout`.
    """

    def __init__(self, paths: Sequence[str], seconds: float) -> None:
        shown = "\n".join(f"  {path}" for path in paths[:20])
        rest = f"\n  and {len(paths) - 20} more" if len(paths) > 20 else ""
        ValueError.__init__(
            self,
            f"reading {len(paths)} files took longer than {seconds:g} s each "
            f"(vimnas.data.file_timeout): is the disk still there? The files:\n{shown}{rest}",
        )
        self.reasons = dict.fromkeys(paths, TOO_SLOW)
