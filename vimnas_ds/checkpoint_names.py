"""What lies in a run's folder of checkpoints: stepNNNNNNNN/ ..., and the files `latest` and `best`.

Only a folder of exactly that name is one of the run's checkpoints: a copy that somebody made
beside them (step00000010_good) is theirs, and is neither resumed from nor deleted (no torch).
"""

from __future__ import annotations

import re
from pathlib import Path

#: files that name one checkpoint beside them: the last one, and the one with the best scores
LATEST, BEST = "latest", "best"


def checkpoint_name(step: int) -> str:
    return f"step{step:08d}"


def checkpoint_step(name: str) -> int | None:
    """The step of the checkpoint of this name; None: it is no checkpoint's name."""
    match = re.fullmatch("step([0-9]{8,})", name)
    return int(match[1]) if match else None


def named(root: Path, file: str) -> str | None:
    """What `latest` or `best` in `root` says; None: there is none. One that is damaged says
    anything, or nothing: the caller looks whether there is such a checkpoint."""
    if not (root / file).is_file():
        return None
    return (root / file).read_text(encoding="utf-8", errors="replace").strip()


def checkpoints_in(root: Path) -> list[Path]:
    """All checkpoints in a run's folder of them, the oldest first; none where there is no folder.
    Raises OSError where it cannot be read."""
    if not root.is_dir():
        return []
    steps = {path: checkpoint_step(path.name) for path in root.iterdir() if path.is_dir()}
    found = {path: step for path, step in steps.items() if step is not None}
    return sorted(found, key=lambda path: found[path])


def newest_first(root: Path) -> list[Path]:
    """The checkpoints in a run's folder of them, from the one that `latest` names on."""
    found = checkpoints_in(root)
    names = [path.name for path in found]
    if (latest := named(root, LATEST)) in names:  # else it is damaged, and says nothing
        found = found[: names.index(latest) + 1]
    return found[::-1]
