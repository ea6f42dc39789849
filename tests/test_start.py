"""Several ranks start together or not at all: one looks at the data, one says why it cannot be."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from scripts import index_data
from tests.conftest import ROOT
from tests.media import encode, numbered
from tests.small import small_config
from vimnas_ds.train.ranks import free_port

pytestmark = pytest.mark.slow
Ended = list[tuple[int, str, str]]


def run(programs: Sequence[Sequence[str]], a_machine_each: bool = False) -> Ended:
    """(exit code, stdout, stderr) of Python programs that are the ranks of one run."""
    port, size = str(free_port()), str(len(programs))
    ranks = []
    for rank, program in enumerate(programs):
        local = {"LOCAL_RANK": "0" if a_machine_each else str(rank)}
        local["LOCAL_WORLD_SIZE"] = "1" if a_machine_each else size
        group = {"RANK": str(rank), "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        common = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, *program],
                cwd=ROOT,
                env={**os.environ, **common, **group, **local, "MASTER_PORT": port},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    return [(rank.returncode, *output) for rank, output in zip(ranks, outputs, strict=True)]


def train(folder: Path, *values: Sequence[str], a_machine_each: bool = False) -> str:
    """What the ranks of a training that cannot start, each with its own `--set`, write on stderr:
    all end with 2."""
    command = ["scripts/train.py", "--deepspeed_config", str(folder / "config.json")]
    sets = [[word for value in own for word in ("--set", value)] for own in values]
    ended = run([[*command, *own] for own in sets], a_machine_each)
    assert [code for code, *_ in ended] == [2] * len(values), ended
    assert not (folder / "run").exists()
    return "".join(errors for *_, errors in ended)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures, clips and config.json."""
    config = small_config(tmp_path / "run")
    data = config["vimnas"]["data"]
    for name in ("imagenet", "k400"):
        data["datasets"][name]["root"] = str(tmp_path / name)
    data["index_dir"] = str(tmp_path / "indexes")
    (tmp_path / "config.json").write_text(json.dumps(config))
    for split in ("train", "val"):
        for i in range(4):
            path = tmp_path / "imagenet" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8 + i, 6)).save(path)
            encode(tmp_path / "k400" / split / "ab"[i % 2] / f"{i}.mp4", numbered(4))
    return tmp_path


def test_what_one_rank_cannot_start_with_ends_all_and_is_said_once(folder: Path) -> None:
    errors = train(folder, [], ["vimnas.data.k400.root=/nowhere"])
    assert errors.count("/nowhere is not a folder; set vimnas.data.k400.root") == 1
    assert "cannot start:\nrank 1: k400: /nowhere" in errors
    errors = train(folder, [], ["vimnas.space=huge"])
    assert errors.count("cannot start:\nrank 1: ") == 1
    errors = train(folder, *[["vimnas.space=huge"]] * 2)
    assert errors.count("cannot start:") == 1
    assert "rank" not in errors.partition("cannot start:")[2].splitlines()[1]


def test_a_builder_that_fails_is_not_followed_by_others(folder: Path) -> None:
    in_the_way = folder / "indexes" / "k400.parquet.parts"
    in_the_way.parent.mkdir()
    in_the_way.write_text("a file in the folder's place")
    errors = train(folder, [], [])
    assert errors.count("k400: no index at") == 1
    assert errors.count(f"cannot write {folder / 'indexes' / 'k400.parquet'}: File exists") == 1


def test_several_machines_are_refused_without_an_index_and_told_what_to_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vimnas"]["data"]["datasets"]["imagenet"]["test_split"] = "test set"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "imagenet" / "val").rename(folder / "imagenet" / "test set")
    errors = train(folder, [], [], a_machine_each=True)
    assert not (folder / "indexes").exists()
    commands = [shlex.split(line) for line in errors.splitlines() if "index_data.py" in line]
    assert len(commands) == 2
    for command in commands:
        assert command[:2] == ["python", "scripts/index_data.py"]
        assert index_data.main(command[2:]) == 0
    assert sorted(p.stem for p in (folder / "indexes").glob("*.parquet")) == ["imagenet", "k400"]
    opened = run([["-c", OPEN, str(folder / "config.json")]] * 2, a_machine_each=True)
    assert [code for code, *_ in opened] == [0, 0], opened
    copy = folder / "imagenet" / "train" / "a" / "0.png"
    os.utime(copy, ns=(0, 0))  # a copy of its own has times of its own
    before = (folder / "indexes" / "imagenet.parquet").read_bytes()
    errors = train(folder, [], [], a_machine_each=True)
    assert "1 file changed (first: train/a/0.png)" in errors
    assert "Machines that have copies of their own" in errors
    assert "set vimnas.data.index_dir to a folder that they do not share" in errors
    assert (folder / "indexes" / "imagenet.parquet").read_bytes() == before


OPEN = """
import sys
from pathlib import Path
from vimnas_ds.config import load_config
from vimnas_ds.data import index
from vimnas_ds.train.open_data import open_data
from vimnas_ds.train.ranks import start_ranks

ask = index.file_stats
index.file_stats = lambda root, paths: print(f"asks for {len(paths)} files") or ask(root, paths)
data = open_data(load_config(sys.argv[1]).vimnas.data, start_ranks(engine=False), Path(sys.argv[1]))
print(data.fingerprint(), data.untested)
"""


def test_one_rank_of_a_machine_builds_and_checks_and_all_see_the_same(folder: Path) -> None:
    (folder / "k400" / "val" / "a" / "0.mp4").write_text("no video")
    first, second, third = run([["-c", OPEN, str(folder / "config.json")]] * 3)
    assert (first[0], second[0], third[0]) == (0, 0, 0), (first, second, third)
    assert first[1].count("asks for 8 files") == 2
    assert first[2].count("building it from 8 files") == 2
    assert "asks" not in second[1] + third[1]
    assert "building" not in second[2] + third[2]
    assert first[1].splitlines()[-1] == second[1].strip() == third[1].strip()
    assert "val/a/0.mp4" in second[1]


WAIT = """
import sys, time
from pathlib import Path
from vimnas_ds.train.ranks import run_together, start_ranks

mine, other = map(Path, sys.argv[2:])
mine.touch()
while not other.exists():  # the timeout is that of their meeting too
    time.sleep(0.01)
ranks = start_ranks(timeout_minutes=0.05, engine=False)
print(run_together(lambda: time.sleep(float(sys.argv[1])) or ranks.rank, ranks))
"""


def test_ranks_wait_for_one_that_takes_longer_than_the_groups_timeout(tmp_path: Path) -> None:
    here = [str(tmp_path / name) for name in "ab"]
    ended = run([["-c", WAIT, "8", *here], ["-c", WAIT, "0", *here[::-1]]])
    assert [(code, out.strip()) for code, out, _ in ended] == [(0, "0"), (0, "1")], ended


END = """
import atexit, threading, time, torch
import torch.distributed as dist
from vimnas_ds.processes import end_process
from vimnas_ds.train.ranks import start_ranks

class Last:  # what Python still has to do once it hands its lock to no other thread
    def __del__(self, sleep=time.sleep):
        sleep(5)

last = Last()
atexit.register(lambda: print("in a group:", dist.is_initialized()))
rank = start_ranks(engine=False).rank
torch.set_num_threads(1)
x = torch.ones(2000, 2000)
threading.Thread(target=lambda: [x @ x for _ in range(1000)], daemon=True).start()
time.sleep(0.1)
dist.barrier()
end_process(rank + 5)
"""


def test_a_process_ends_with_its_own_code_whatever_its_threads_do() -> None:
    ended = run([["-c", END]] * 2)
    found = [(code, out) for code, out, _ in ended]
    assert found == [(5, "in a group: False\n"), (6, "in a group: False\n")], ended


def test_what_cannot_be_written_at_the_end_is_said_and_a_closed_output_is_none() -> None:
    code = "from vimnas_ds.processes import end_process; print('x'); end_process({})"
    expected = [(">&-", 0, 0), (">&-", 3, 3), (">/dev/full", 0, 120), (">/dev/full", 3, 3)]
    for where, given, found in expected:
        command = f'PYTHONUNBUFFERED= {shlex.quote(sys.executable)} -c "{code.format(given)}"'
        done = subprocess.run(
            f"{command} {where}", shell=True, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == found
        assert ("No space left" in done.stderr) == (where == ">/dev/full")
