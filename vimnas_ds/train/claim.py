"""When a process may write a run's folder, and which checkpoint it goes on from.

One process at a time holds the folder, by a lock that ends with the process. What decides whether a
run begins or goes on is looked at under that lock; what would be refused in any case is refused
before, so that nothing is waited for or touched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vimnas_ds.checkpoint_names import checkpoint_step, newest_first
from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.durable import restore_replaced, write_text
from vimnas_ds.train.circumstances import environment
from vimnas_ds.train.ranks import Ranks, gather_objects, run_together
from vimnas_ds.train.run_files import RunFiles, config_object, find_checkpoint

log = logging.getLogger(__name__)

FROM = "resumed_from"  #: in environment.json: the checkpoint that the latest start went on from


def choose_start(files: RunFiles, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to start from, None for a fresh run.

    `resume` is None, "latest", "auto" (latest, or a fresh run where there is none) or a path. For
    the run's own process alone: it holds the folder from here on, and puts right what an earlier
    one died over. Raises ConfigError rather than mixing two runs.
    """
    if resume is not None and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other")
    anew = resume is None and not overwrite
    given = None if resume in (None, "latest", "auto") else _given(Path(str(resume)))
    if anew:
        _refuse_another(files)  # what is there already is neither waited for nor touched
    hold_folder(files)  # whoever wrote it may have saved until it ended
    restore_replaced(files.checkpoints)
    if anew:
        _refuse_another(files)
    if resume is None:
        return None
    own = newest_first(files.checkpoints)
    if given is not None and own and not files.holds(given):
        raise ConfigError(
            f"{files.root} holds a run of its own and cannot continue {given}: "
            "--set vimnas.output_dir=... goes elsewhere"
        )
    if given is not None or own:
        return given or find_checkpoint(files.root)
    if files.config.is_file():
        return _begin_again(files)
    if resume == "latest":
        raise ConfigError(
            f"{files.root} holds no run to resume: leave --resume out to begin one, or say "
            "--resume auto, which resumes what is there and else begins"
        )
    return None


def _given(path: Path) -> Path:
    """The checkpoint that `path` means. Raises ConfigError."""
    found = find_checkpoint(path)
    if checkpoint_step(found.name) is None:
        raise ConfigError(
            f"{found} has not the name of a checkpoint, which is step and eight digits: give "
            "the folder back the name of its step to resume from it"
        )
    return found


def _begin_again(files: RunFiles) -> Path | None:
    """What a run starts from that was begun and has no checkpoint. Raises ConfigError if it had."""
    _refuse_lost(files)
    origin = None
    if files.environment.is_file():
        origin = json.loads(files.environment.read_text()).get(FROM)  # an older version has none
    words = f"from {origin} again" if origin else "it starts anew"
    log.warning("%s was begun and has saved nothing yet: %s", files.root, words)
    return find_checkpoint(Path(origin)) if origin else None


def _refuse_lost(files: RunFiles) -> None:
    """Raise ConfigError if the run has saved and its checkpoints are not there: to start anew would
    delete what is left of it."""
    if newest_first(files.checkpoints) or not files.log.is_file():
        return
    with files.log.open("rb") as lines:
        has_saved = any(b"  saved step" in line for line in lines)
    if has_saved:
        raise ConfigError(
            f"{files.root} has saved, as {files.log.name} says, but its checkpoints are gone: "
            f"{files.checkpoints} holds none (is its disk mounted?). Nothing is deleted: put them "
            "back, or --resume PATH goes on from a copy, and --overwrite starts anew"
        )


def _refuse_another(files: RunFiles) -> None:
    """Raise ConfigError if the folder holds a run."""
    _refuse_lost(files)
    if newest_first(files.checkpoints):
        raise ConfigError(
            f"{files.root} already holds a run: --resume continues it, --overwrite starts anew, "
            "--set vimnas.output_dir=... goes elsewhere"
        )


_held: dict[Path, int] = {}  # folders whose lock this process has, with their file descriptors
#: what a file system says that has no locks
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})


def hold_folder(files: RunFiles, seconds: float = 40.0) -> bool:
    """See that no other process writes a run into this folder until this one ends; an earlier one
    that is about to end (see `vimnas.faults.grace_seconds`) gets `seconds` for it. Returns whether
    this is new: False where the folder was held already.

    Raises ConfigError naming the other. Nothing is done where there is no folder yet, and on a file
    system without locks no more than to say so.
    """
    root = files.root.resolve()
    if root in _held or not root.is_dir():
        return False
    handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise ConfigError(
                    f"{files.root} is being written by another process ({_writer_of(files)}): wait "
                    "for its end, or --set vimnas.output_dir=... goes elsewhere"
                ) from None
            time.sleep(0.5)
            continue
        except OSError as err:
            if err.errno not in NO_LOCKS:
                raise
            log.warning(
                "%s cannot be locked (%s): see that only one process writes it",
                files.root,
                err.strerror,
            )
        _held[root] = handle
        return True


def _writer_of(files: RunFiles) -> str:
    try:
        status = json.loads(files.status.read_text())
        return f"last known: process {status['pid']} on {status['host']}"
    except (OSError, ValueError, KeyError):
        return "it has not said which"


def claim_folder(
    files: RunFiles,
    config: RunConfig,
    labels: Mapping[str, Sequence[str]],
    ranks: Ranks,
    start: Path | None,
    overwrite: bool,
) -> None:
    """Begin a run in its folder, or go on with it: clear an earlier one where this one starts anew
    (`start`, see `choose_start`, is None), write config.json, labels.json (class names by dataset)
    and environment.json; on all ranks together.

    Raises ConfigError where another process has begun a run since `choose_start`, unless
    `overwrite`, and when some rank does not see rank 0's files: checkpoints need a file system that
    all nodes share.
    """
    token = json.dumps(config_object(config), indent=2) + "\n"

    def claim() -> None:
        files.root.mkdir(parents=True, exist_ok=True)
        chosen_without = hold_folder(files)  # there was no folder yet
        if chosen_without and not overwrite and not (start and files.holds(start)):
            _refuse_another(files)
        if start is None:
            files.remove()
        for remains in files.root.glob(f"{files.status.name}.*"):
            remains.unlink()  # of a rank that was killed while it wrote its status
        write_text(files.labels, json.dumps(labels, indent=2) + "\n")
        origin = None if start is None else str(start.resolve())
        about = {FROM: origin, **environment(ranks)}
        write_text(files.environment, json.dumps(about, indent=2) + "\n")
        write_text(files.config, token)

    run_together(lambda: claim() if ranks.is_main else None, ranks)
    deadline = time.monotonic() + 20  # network file systems show new files late
    while not (seen := files.config.is_file() and files.config.read_text() == token):
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    blind = [rank for rank, sees in enumerate(gather_objects(seen)) if not sees]
    if blind:
        raise ConfigError(
            f"vimnas.output_dir {files.root}: ranks {blind} do not see rank 0's files there; it "
            "must lie on a file system that all nodes share"
        )
