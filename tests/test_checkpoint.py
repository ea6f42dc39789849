"""Checkpoints: whole or not there, damage is found, any number of ranks goes on from them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scripts import consolidate
from tests.conftest import ROOT
from tests.launch import launch, run_main
from tests.small import small_config
from vimnas_ds import durable
from vimnas_ds.checkpoint_names import BEST, LATEST, newest_first
from vimnas_ds.config import ConfigError, parse_config
from vimnas_ds.durable import publish_folder
from vimnas_ds.manifest import MANIFEST, FileEntry, read_manifest, write_manifest
from vimnas_ds.train import claim
from vimnas_ds.train.best import Best
from vimnas_ds.train.checkpoint import finish_save, go_back, prune
from vimnas_ds.train.claim import choose_start, claim_folder, hold_folder
from vimnas_ds.train.ranks import ALONE
from vimnas_ds.train.run_files import (
    PLAIN_FILES,
    CannotRead,
    CheckpointError,
    RunFiles,
    find_checkpoint,
)
from vimnas_ds.train.state_file import read_state, write_state


def fake(root: Path, step: int) -> Path:
    """A checkpoint with the right files, whatever they hold."""
    hidden = root / f".tmp-step{step:08d}"
    hidden.mkdir(parents=True)
    for name in (*PLAIN_FILES, "state.safetensors", "rank00000-of-00001.safetensors"):
        (hidden / name).write_bytes(f"{name} at {step}".encode())
    files = {p.name: FileEntry.of(p) for p in hidden.iterdir()}
    write_manifest(hidden, files, {"step": step, "world_size": 1})
    publish_folder(hidden, root / f"step{step:08d}")
    (root / "latest").write_text(f"step{step:08d}")
    return root / f"step{step:08d}"


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    files = RunFiles(tmp_path / "run")
    for step in (10, 20, 30):
        fake(files.checkpoints, step)
    files.config.write_text("{}")
    return files


@pytest.mark.parametrize("name", [*PLAIN_FILES, "state.safetensors", MANIFEST])
@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, name, damage, caplog):
    file = run.checkpoints / "step00000030" / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(content[:-3])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert find_checkpoint(run.root).name == "step00000020"
    assert "step00000030" in caplog.text
    assert name in caplog.text
    assert "going back to step00000020" in caplog.text
    if name != WEIGHTS:  # without it the folder is no checkpoint at all
        with pytest.raises(CheckpointError, match=name):
            find_checkpoint(run.checkpoints / "step00000030")
    for step in (10, 20):
        (run.checkpoints / f"step{step:08d}" / name).unlink()
    with pytest.raises(CheckpointError, match=r"no undamaged checkpoint.*30.*20.*10"):
        find_checkpoint(run.root)


WEIGHTS = PLAIN_FILES[0]


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_checkpoint_that_cannot_be_read_now_is_not_given_up(run, name, number, monkeypatch):
    before = sorted(run.root.rglob("*"))
    whole = Path.open

    def hiccup(path: Path, *args: object, **kwargs: object) -> object:
        if path == run.checkpoints / "step00000030" / name:
            raise OSError(number, os.strerror(number), str(path))
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", hiccup)
    said = rf"step00000030 cannot be read now: .*{os.strerror(number)}.*nothing is deleted"
    for path in (run.root, run.checkpoints / "step00000030"):
        with pytest.raises(CannotRead, match=said):
            find_checkpoint(path)
    assert sorted(run.root.rglob("*")) == before
    config = run.root.parent / "config.json"
    config.write_text(json.dumps(small_config(run.root)))
    code, errors = run_main("train", ["--deepspeed_config", str(config), "--resume"])
    assert code == 2
    assert re.search(said, errors)


def test_what_a_tool_does_not_read_may_be_damaged(run):
    (run.checkpoints / "step00000030" / "state.safetensors").unlink()
    assert find_checkpoint(run.root, PLAIN_FILES).name == "step00000030"


def test_the_newest_and_the_best_are_kept(run):
    (run.checkpoints / "best").write_text("step00000010")
    for step in (40, 50):
        fake(run.checkpoints, step)
    (run.checkpoints / ".tmp-step00000060").mkdir()
    (run.checkpoints / ".new-best").write_text("step000")
    prune(run.checkpoints, 2)
    names = {p.name for p in run.checkpoints.iterdir()}
    assert names == {"step00000010", "step00000040", "step00000050", "latest", "best"}
    assert find_checkpoint(run.checkpoints / "best").name == "step00000010"


def test_a_save_that_died_over_its_last_duties_is_finished_by_the_run_that_goes_on(run):
    """It was to name the new best and to delete the oldest, of which it had begun."""
    (run.checkpoints / "best").write_text("step00000010")
    (run.checkpoints / "step00000010" / MANIFEST).unlink()
    finish_save(run.checkpoints, 2, 30)
    names = {p.name for p in run.checkpoints.iterdir()}
    assert names == {"step00000020", "step00000030", "latest", "best"}
    assert find_checkpoint(run.checkpoints / "best").name == "step00000030"
    finish_save(run.checkpoints, 2, 7)  # of a run whose best step was pruned by hand
    assert find_checkpoint(run.checkpoints / "best").name == "step00000030"


def test_going_back_gives_up_what_came_later(run):
    (run.checkpoints / "best").write_text("step00000030")
    assert go_back(run.checkpoints, "step00000010") == ["step00000020", "step00000030"]
    assert find_checkpoint(run.root).name == "step00000010"
    assert not (run.checkpoints / "best").exists()


def test_a_copy_that_somebody_made_beside_the_checkpoints_is_left_alone(run):
    copies = [run.checkpoints / name for name in ("step00000010_good", "step30", "steps")]
    for copy in copies:
        shutil.copytree(run.checkpoints / "step00000010", copy)
    prune(run.checkpoints, 1)
    assert [p.name for p in newest_first(run.checkpoints)] == ["step00000030"]
    shutil.copytree(run.checkpoints / "step00000030", run.checkpoints / "step00000020")
    assert go_back(run.checkpoints, "step00000020") == ["step00000030"]
    assert all((copy / WEIGHTS).is_file() for copy in copies)
    assert find_checkpoint(run.root).name == "step00000020"
    assert find_checkpoint(copies[0]) == copies[0]  # it may be read, by its path
    with pytest.raises(ConfigError, match=r"step00000010_good has not the name of a checkpoint"):
        choose_start(run, str(copies[0]), False)


@pytest.mark.parametrize("content", [b"\xff\xfe step", b"step000\0\0\0", b""])
def test_latest_and_best_of_any_bytes_name_nothing_and_hide_nothing(run, content):
    (run.checkpoints / LATEST).write_bytes(content)
    (run.checkpoints / BEST).write_bytes(content)
    assert find_checkpoint(run.root).name == "step00000030"
    for name in (LATEST, BEST):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            find_checkpoint(run.checkpoints / name)
    finish_save(run.checkpoints, 2, None)
    assert [p.name for p in newest_first(run.checkpoints)] == ["step00000030", "step00000020"]
    assert go_back(run.checkpoints, "step00000020") == ["step00000030"]
    assert find_checkpoint(run.checkpoints / LATEST).name == "step00000020"


def test_the_only_checkpoint_is_found_by_the_next_run_and_left_alone_by_readers(tmp_path):
    """Its replacement died between two renames."""
    run = RunFiles(tmp_path / "run")
    fake(run.checkpoints, 30).rename(run.checkpoints / ".old-step00000030")
    run.config.write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        find_checkpoint(run.root)  # a reader: the replacement may be under way
    assert (run.checkpoints / ".old-step00000030").is_dir()
    assert choose_start(run, "latest", False) == run.checkpoints / "step00000030"
    (run.checkpoints / "step00000030").rename(run.checkpoints / ".old-step00000030")
    with pytest.raises(ConfigError, match="already holds a run"):
        choose_start(run, None, False)


def test_what_cannot_be_tidied_up_ends_nothing(run, monkeypatch, caplog):
    """A file that a reader has open on NFS: its folder cannot be deleted yet."""
    monkeypatch.setattr(durable.shutil, "rmtree", lambda *_, **__: None)
    finish_save(run.checkpoints, 2, None)
    assert [p.name for p in newest_first(run.checkpoints)] == ["step00000030", "step00000020"]
    assert (run.checkpoints / ".gone-step00000010").is_dir()
    monkeypatch.undo()
    finish_save(run.checkpoints, 2, None)
    assert not (run.checkpoints / ".gone-step00000010").exists()
    monkeypatch.setattr(Path, "rename", full)
    finish_save(run.checkpoints, 1, None)
    assert "could not be tidied up: [Errno 28]" in caplog.text
    assert len(newest_first(run.checkpoints)) == 2


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


HOLDER = """
import sys, time
from pathlib import Path
from vimnas_ds.train.claim import hold_folder
from vimnas_ds.train.run_files import RunFiles
hold_folder(RunFiles(Path(sys.argv[1])))
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_do_not_write_one_run(run):
    command = [sys.executable, "-c", HOLDER, str(run.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        run.status.write_text(json.dumps({"pid": holder.pid, "host": "here"}))
        with pytest.raises(ConfigError, match=rf"another process \(.*{holder.pid} on here\)"):
            hold_folder(run, seconds=0)
        holder.kill()
    hold_folder(run, seconds=5)


@pytest.mark.parametrize(
    ("resume", "comes_of_it"),
    [(None, "already holds a run"), ("elsewhere", "a run of its own"), ("auto", None)],
)
def test_what_another_process_saves_before_it_ends_is_seen(
    resume, comes_of_it, tmp_path, monkeypatch
):
    """It holds the folder when this one asks for it, and saves for the first time."""
    run, other = RunFiles(tmp_path / "run"), fake(tmp_path / "other" / "checkpoints", 5)
    run.root.mkdir()
    run.config.write_text("{}")

    def flock(*_: object) -> None:
        if not run.checkpoints.exists():
            fake(run.checkpoints, 1)
            raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(claim.time, "sleep", lambda _: None)
    resume = str(other) if resume == "elsewhere" else resume
    if comes_of_it is None:
        assert choose_start(run, resume, False) == run.checkpoints / "step00000001"
    else:
        with pytest.raises(ConfigError, match=comes_of_it):
            choose_start(run, resume, False)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_another_process_began_meanwhile_is_not_deleted(
    elsewhere, tmp_path, monkeypatch
):
    """There was no folder when the start was chosen; data were opened since."""
    monkeypatch.setattr(claim, "gather_objects", lambda value: [value])
    run = RunFiles(tmp_path / "run")
    start = fake(tmp_path / "other" / "checkpoints", 5) if elsewhere else None
    assert choose_start(run, str(start) if start else None, False) == start
    theirs = fake(run.checkpoints, 1)
    config = parse_config(small_config(run.root))
    with pytest.raises(ConfigError, match="already holds a run"):
        claim_folder(run, config, {}, ALONE, start, False)
    assert find_checkpoint(run.root) == theirs
    monkeypatch.setattr(claim, "_held", {})  # as in a process that asks for the folder now
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    claim_folder(run, config, {}, ALONE, None, True)
    assert not theirs.exists()
    fake(run.checkpoints, 2)
    claim_folder(run, config, {}, ALONE, None, False)  # the folder is held, and was looked at then
    assert not run.checkpoints.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_once_and_written_all_the_same(
    run, number, monkeypatch, caplog
):
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert choose_start(run, "latest", False) == run.checkpoints / "step00000030"
    hold_folder(run)
    assert caplog.text.count("cannot be locked") == 1
    assert f"({os.strerror(number)}): see that only one process writes it" in caplog.text


def test_a_lock_that_fails_otherwise_ends_the_start(run, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", full)
    with pytest.raises(OSError, match="No space left"):
        hold_folder(run)


def test_what_resume_means(run, tmp_path):
    assert choose_start(run, "latest", False) == run.checkpoints / "step00000030"
    assert choose_start(run, "auto", False) == run.checkpoints / "step00000030"
    with pytest.raises(ConfigError, match="already holds a run: --resume continues it"):
        choose_start(run, None, False)
    assert choose_start(run, None, True) is None
    other = fake(tmp_path / "other" / "checkpoints", 5)
    with pytest.raises(ConfigError, match=r"holds a run of its own and cannot continue .*step0*5"):
        choose_start(run, str(other), False)
    for damaged in newest_first(run.checkpoints):
        (damaged / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="no undamaged checkpoint"):  # never from the start
        choose_start(run, "latest", False)
    begun = RunFiles(tmp_path / "begun")
    begun.root.mkdir()
    begun.config.write_text("{}")
    begun.log.write_text("2026-01-01  step 900/1000  e0\n")  # it was killed before its first save
    for resume in ("latest", "auto", None):
        assert choose_start(begun, resume, False) is None
    nothing = RunFiles(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no run to resume: leave --resume out"):
        choose_start(nothing, "latest", False)
    assert choose_start(nothing, "auto", False) is None


@pytest.mark.parametrize("resume", ["latest", "auto", None])
def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(run, resume, tmp_path):
    """The scratch disk is not mounted."""
    copy = fake(tmp_path / "copy" / "checkpoints", 20)
    run.log.write_text("2026-01-01  step 30/90  e0\n2026-01-01  saved step00000030: 2.3 MB\n")
    for name in ("unmounted", "empty"):
        run.checkpoints.rename(tmp_path / name)
        with pytest.raises(ConfigError, match=r"its checkpoints are gone: .*Nothing is deleted"):
            choose_start(run, resume, False)
        run.checkpoints.mkdir()
    assert choose_start(run, str(copy), False) == copy
    assert choose_start(run, None, True) is None


def test_a_run_that_died_before_its_first_save_begins_again_where_it_began(
    run, tmp_path, monkeypatch
):
    """From another run's checkpoint, not from the start."""
    monkeypatch.setattr(claim, "gather_objects", lambda value: [value])
    guest = RunFiles(tmp_path / "guest")
    start = run.checkpoints / "step00000020"
    config = parse_config(small_config(guest.root))
    claim_folder(guest, config, {}, ALONE, start, False)
    assert choose_start(guest, "latest", False) == choose_start(guest, "auto", False) == start
    start.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*step00000020"):
        choose_start(guest, "auto", False)


def test_best_starts_anew_with_other_datasets():
    best = Best()
    assert best.improves(10, {"a": 0.5})
    assert not best.improves(20, {"a": 0.4})
    assert best.improves(30, {"a": 0.4, "b": 0.1})
    assert not best.improves(40, {"a": 0.3, "b": 0.2})  # equal is not better
    again = Best()
    again.load_state_dict(best.state_dict())
    assert (again.step, again.datasets) == (30, ("a", "b"))


def test_state_comes_back_with_its_types(tmp_path):
    value = {"a": [1, (2.5, None)], 3: {"t": torch.arange(4), 0.5: True}, "inf": float("inf")}
    write_state(tmp_path / "x", value)
    found = read_state(tmp_path / "x")
    assert torch.equal(found[3].pop("t"), value[3].pop("t"))
    assert found == value
    assert type(found["a"][1]) is tuple
    with pytest.raises(TypeError, match="b: a set cannot be saved"):
        write_state(tmp_path / "y", {"b": {1}})


def test_a_manifest_stays_in_its_folder(tmp_path):
    write_manifest(tmp_path, {"../elsewhere": FileEntry(1, "")}, {})
    with pytest.raises(ValueError, match=r"'\.\./elsewhere', which is not a file of its folder"):
        read_manifest(tmp_path)


def results(*args: str, ranks: int) -> dict[str, dict]:
    output = launch("tests/launched/checkpoint_cases.py", *args, ranks=ranks)
    lines = [line.split(" ", 2) for line in output.splitlines() if "RESULT " in line]
    return {name: json.loads(values) for _, name, values in lines}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    root = tmp_path_factory.mktemp("checkpoints") / "two"
    return root, results("save", str(root), ranks=2)


@pytest.mark.slow
def test_a_save_that_fails_names_the_rank_and_leaves_what_was_there(saved):
    root, found = saved
    kept = ["best", "latest", "step00000002", "step00000003", "step00000004"]
    assert found["kept"]["names"] == found["failed"]["left"] == kept
    first, second = found["failed"]["full"]
    assert "rank 1: " in first
    assert "too large" in first.lower()
    for text in (first, second):
        assert f"step 99 could not be saved under {root}" in text
        assert "the last good checkpoint: step00000004" in text
    assert all("/sys/vimnas" in text for text in found["failed"]["read_only"])
    assert find_checkpoint(root).name == "step00000004"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_another_number_of_ranks_goes_on_and_nothing_is_lost(saved, ranks, tmp_path):
    root, before = saved
    after = results("reload", str(root), str(tmp_path / "again"), ranks=ranks)
    wholes = []
    for name, folder in (("a", root), ("b", tmp_path / "again")):
        assert consolidate.main([str(folder), "--out", str(tmp_path / name)]) == 0
        files = {p.stem: p for p in (tmp_path / name).glob("*.safetensors")}
        wholes.append({stem: load_file(p) for stem, p in files.items()})
    assert wholes[0].keys() == {"supernet", "optimizer", "counts", "alphas"}
    moved = 0
    for stem, tensors in wholes[0].items():
        assert tensors.keys() == wholes[1][stem].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, wholes[1][stem][name]), (stem, name)
            moved += int((tensor != 0).sum())
    assert moved > 300_000
    assert len(list((tmp_path / "again" / "step00000004").glob("rank*"))) == ranks
    assert after["odd"]["same"]
    assert after["loss"]["value"] == pytest.approx(before["loss"]["value"], rel=1e-5)
    assert consolidate.main([str(tmp_path / "no"), "--out", str(tmp_path / "c")]) == 2
