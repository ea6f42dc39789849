"""What a rewind does on the disk; the runs themselves: tests/test_recovery.py."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.test_checkpoint import fake
from vimnas_ds.checkpoint_names import newest_first
from vimnas_ds.config import GuardSection
from vimnas_ds.manifest import MANIFEST
from vimnas_ds.train.guard import Event, NotSound, Rewinds
from vimnas_ds.train.ranks import ALONE
from vimnas_ds.train.recovery import rewind
from vimnas_ds.train.run_files import RunFiles
from vimnas_ds.train.schedule import DataCursor


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    """At step 60 of a run whose checkpoints 0, 20, 40 are marks, and 55 a save by the clock."""
    files = RunFiles(tmp_path / "run")
    for step in (0, 20, 40, 55):
        fake(files.checkpoints, step)
    rewinds = Rewinds(GuardSection(margin=5, max_rewinds=2), marks=[0, 20, 40])
    return SimpleNamespace(
        files=files,
        ranks=ALONE,
        watch=SimpleNamespace(at=lambda *_: None),
        drawer=SimpleNamespace(position=DataCursor(60)),
        board=SimpleNamespace(guard=lambda *_: None),
        recovery=SimpleNamespace(rewinds=rewinds),
    )


@pytest.mark.parametrize("damaged", [[], [40], [0, 20, 40]])
def test_a_guard_that_gives_up_leaves_the_good_checkpoint_as_the_latest(
    damaged: list[int], trainer: Any
) -> None:
    """Not the one by the clock, saved amid the trouble."""
    rewinds, event = trainer.recovery.rewinds, Event("spike", "k400", 50, "ten losses")
    for _ in range(2):
        rewinds.answer(event, 60)
    for step in damaged:
        (trainer.files.checkpoints / f"step{step:08d}" / MANIFEST).unlink()
    said = "step00000020, from before it, is the latest" if damaged else "step00000040, from before"
    if len(damaged) == 3:
        said = "from before it cannot be used: .*step00000040"
    with pytest.raises(NotSound, match=f"after 2 rewinds .* 2 rewinds again.*{said}"):
        rewind(trainer, trainer.recovery, event)
    left = {0: [40, 20, 0], 1: [20, 0], 3: [55, 40, 20, 0]}[len(damaged)]
    assert names(trainer) == [f"step{step:08d}" for step in left]


def names(trainer: Any) -> list[str]:
    return [path.name for path in newest_first(trainer.files.checkpoints)]


def test_a_rewind_that_cannot_read_its_checkpoint_ends_in_words_and_gives_nothing_up(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, whole = names(trainer), Path.open

    def hiccup(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.parent.name == "step00000040" and path.suffix == ".safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", hiccup)
    event = Event("spike", "k400", 50, "ten losses")
    with pytest.raises(NotSound, match=r"step00000040 cannot be read now: .*Input/output error"):
        rewind(trainer, trainer.recovery, event)
    assert names(trainer) == before
