"""What grows is seen to grow, and what only varies is not; the samples are what a process holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from vimnas_ds.report.endurance import trend

STEPS = list(range(0, 2000, 10))


def values(slope: float, seed: int = 0) -> list[float]:
    """A warm-up of 50, then `slope` per 1000 steps, under noise and spikes of evaluations."""
    noise = np.random.default_rng(seed).normal(0, 2, len(STEPS))
    return [
        500 + 50 * min(step / 400, 1) + slope * step / 1000 + float(n) + 10 * (step % 200 == 0)
        for step, n in zip(STEPS, noise, strict=True)
    ]


def test_a_leak_is_seen_under_noise_and_a_warm_up_is_none() -> None:
    leaking, steady = trend(STEPS, values(20)), trend(STEPS, values(0))
    assert leaking.slopes[1] == pytest.approx(20, abs=2)
    assert leaking.rise == pytest.approx(20, abs=2)
    assert not leaking.is_flat(16)
    assert steady.rise == pytest.approx(0, abs=2)
    assert steady.slopes[0] > 30
    assert steady.is_flat(6)
    assert trend(STEPS, values(-20)).is_flat(0)
    assert (steady.settled, steady.end) == pytest.approx((550, 550), abs=1)


def test_memory_that_is_freed_now_and_then_does_not_hide_a_leak() -> None:
    """It grows by 20 per 1000 steps, and ends just after 40 were freed."""
    sawtooth = [
        v - 40 * (step % 460 > 400 or step > 1840)
        for step, v in zip(STEPS, values(20), strict=True)
    ]
    one = trend(STEPS, sawtooth)
    assert one.rise < 5
    assert not one.is_flat(16)
    with pytest.raises(ValueError, match="second quarter"):
        trend([*range(8), *range(90, 101)], [3] * 19)


def test_a_soak_says_how_small_a_leak_it_sees_and_sees_a_larger_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """16 MiB in 1,000 steps are 16 KiB a step; in ten times the steps, a tenth."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from soak import TOLERANCES, judge, unseen

    def found(times: int, kib: float) -> list[list[Any]]:
        samples = [
            {"rank": rank, "step": times * step}
            | dict.fromkeys(TOLERANCES, 5)
            | {"RSS (MiB)": value + kib * times * step / 1024}
            for step, value in zip([*STEPS, 2000], [*values(0), 0], strict=True)
            for rank in (0, 1)
        ]
        return judge(samples)[1]

    for times, said in ((1, "16.5 KiB"), (10, "1.65 KiB")):  # of 990 and 9,900 steps
        assert unseen(found(times, 0)) == (
            f"a steady leak passes for flat up to: RSS {said} a step, anonymous {said} a step, "
            f"open files {2.02 / times:.3g} in 1000 steps, threads {1.01 / times:.3g} in 1000 "
            f"steps, child processes {0.505 / times:.3g} in 1000 steps, "
            f"/dev/shm {1.03 / times:.3g} KiB a step"
        )
        limit = float(said.split()[0])
        for kib, flat in ((0.7 * limit, True), (1.2 * limit, False)):
            shown = [one for one in found(times, kib) if one[0] == "RSS (MiB)"]
            assert [one[3] for one in shown] == [flat, flat], (times, kib)


def test_too_few_samples_are_no_trend() -> None:
    with pytest.raises(ValueError, match="at least 8 samples"):
        trend([1, 2], [3, 4])
    with pytest.raises(ValueError, match="two steps at least"):
        trend([1, *[9] * 20], [3] * 21)


HOLDS = """
import mmap, os, subprocess, sys, threading, time
files = [open(os.devnull) for _ in range(30)]
shared = open(f"/dev/shm/{sys.argv[1]}", "w+b")
shared.truncate(3 << 20)
mapped = mmap.mmap(shared.fileno(), 0)
held = bytearray(os.urandom(1 << 20) * 64)
for _ in range(5):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
begun = "import time; print('begun', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", begun], stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
sys.stdin.read()
child.kill()
"""


def test_a_sample_is_what_a_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from run_processes import MARK, find_processes
    from soak import sample

    name = uuid.uuid4().hex
    command = [sys.executable, "-c", HOLDS, name, "train.py"]
    environment = {**os.environ, MARK: name, "RANK": "3"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            found = {p.role: p for p in find_processes(name)}
            held = sample(found["rank"])
        finally:
            process.communicate(b"")
            Path(f"/dev/shm/{name}").unlink()
    assert found["rank"].pid == process.pid
    assert found["rank"].rank == 3
    assert found["helper"].pid != process.pid
    assert 64 <= held["PSS (MiB)"] <= held["RSS (MiB)"] < 200
    assert 64 <= held["anonymous (MiB)"] < held["RSS (MiB)"]
    assert 34 <= held["open files"] <= 38
    assert held["threads"] == 6
    assert held["child processes"] == 1
    assert held["/dev/shm (MiB)"] == 3


@pytest.mark.endurance
def test_a_short_soak_is_flat(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/soak.py", "--steps", "96", "--every", "0.3"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "soak.json").read_text())
    assert report["steps"] > 85
    assert {(f["quantity"], f["rank"]) for f in report["figures"]} >= {
        ("RSS (MiB)", 0),
        ("threads", 1),
    }
    assert (tmp_path / "soak.png").stat().st_size > 10_000
