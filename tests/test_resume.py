"""Runs that go on in another way than they began, for real, on one rank."""

from __future__ import annotations

import json
import os
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
