"""Runs that go on in another way than they began, for real, on one rank."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def cases(root: Path) -> dict[str, Any]:
    command = [sys.executable, "tests/launched/resume_cases.py", str(root)]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = [line.partition(" {") for line in done.stdout.splitlines() if "RESULT " in line]
    return {name.split(" ", 1)[1]: json.loads("{" + values) for name, _, values in lines}


def test_a_run_from_another_runs_checkpoint_has_one_of_its_own_at_once(cases, root):
    """Killed in its first step it goes on from there, and ends as the other one does."""
    assert cases["guest"]["saved"] == ["step00000004"]
    last = cases["whole"]["saved"][0]
    assert cases["guest again"]["saved"][0] == last
    a, b = (
        load_file(root / run / "checkpoints" / last / "supernet.safetensors")
        for run in ("whole", "guest")
    )
    assert all((a[name] == b[name]).all() for name in a)


def test_the_status_of_a_killed_run_tells_the_step_of_its_latest_checkpoint(cases):
    """Killed before steps 6 and 10, with a checkpoint every four."""
    assert cases["guard"]["found"][:2] == [["running", 4], ["running", 8]]


def test_what_a_run_goes_on_with_that_it_had_not_before_is_told_by_key(cases):
    log = cases["changed"]["log"]
    told = re.findall(r"  changed: (\S+) was (\S+), now (\S+)", log)
    expected = [
        ("vimnas.schedule.lr", "0.001", "0.002"),
        ("vimnas.alpha.every", "1", "2"),
        ("vimnas.data.k400.fps", "8.0", "4.0"),
        ("vimnas.data.k400.mixup", "0.0", "0.2"),
    ]
    assert sorted(told) == sorted(expected)  # once: what was saved since is as it is now
    assert log.count("resumed from") == 2


def test_a_run_does_not_go_on_with_inputs_of_another_shape(cases):
    refused = cases["refused"]
    assert "data.imagenet.size was 32, now 40" in refused["data.imagenet.size=40"]
    assert "data.k400.frames was 8, now 4" in refused["data.k400.frames=4"]


def test_the_guards_learning_rate_is_kept_while_it_is_off_and_that_is_said(cases):
    found = cases["guard"]
    assert "changed: vimnas.guard.enabled was True, now False" in found["log"]
    assert "the learning rate is the schedule's, no more 0.25 of it" in found["log"]
    rates = [round(rate, 6) for rate in found["rates"].values()]
    assert rates == [1] * 3 + [0.25] + [1] * 4 + [0.25] * (len(rates) - 8)
    assert len(rates) == 18


def test_a_run_that_the_guard_gave_up_goes_on_when_a_person_has_changed_it(cases):
    """The latest checkpoint is the good one, though later ones were saved; as it is the run comes
    to the same, and at another rate it has all its rewinds again."""
    found = cases["given up"]
    first, again, last = found["ends"]
    assert "after 1 rewinds near there" in first
    assert "step00000008, from before it, is the latest checkpoint again" in first
    assert again == first
    assert last == "done"
    assert found["left"][0][0] == found["left"][1][0] == "step00000008"
    events = [(e["step"], e["to"], e["lr_factor"]) for e in found["history"]]
    assert events == [(8, 6, 1), (10, 8, 1)]
    assert found["left"][2][0] == "step00000018"
    assert found["finite"]
