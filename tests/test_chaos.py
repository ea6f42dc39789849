"""Killed runs end as if nothing had happened; and the comparison that says so misses nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from vimnas_ds.report.board import Board
from vimnas_ds.report.same_run import differences

ALL_TOLD = {6: ["a.mp4 is cut", "b.mp4 is empty"]}
MOMENT = "exp_avg/blocks.0.fc1.weight@0"


@pytest.mark.endurance
def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """fp32 and bf16, with a moving average, two kills each: in a save and in a step, one rank and
    everything."""
    command = [sys.executable, "scripts/chaos.py", "--kills", "2", "--set", "vimnas.ema={}"]
    command += ["--epochs", "3", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "chaos.json").read_text())
    for dtype in ("fp32", "bf16"):
        lives = report[dtype]["lives"]
        assert len(lives) == 3
        assert {life["victim"] for life in lives} == {"rank", "all", "-"}
        assert report[dtype]["differences"] == report[dtype]["problems"] == []
    assert "save" in {life["moment"] for life in report["fp32"]["lives"]}


def write_run(root: Path) -> Path:
    """What a run of six steps leaves."""
    checkpoint = root / "checkpoints" / "step00000006"
    checkpoint.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    moments = {MOMENT: torch.randn(40, generator=generator)}
    save_file(moments, str(checkpoint / "rank00000-of-00002.safetensors"))
    (root / "checkpoints" / "latest").write_text(checkpoint.name)
    write_points(root, 1, range(1, 7))
    write_lines(root, range(1, 7), rate=50)
    summary = {"tensorboard": str(root), "datasets": {"k400": {"picks": {"largest": 0.5}}}}
    (root / "summary.json").write_text(json.dumps(summary))
    for name in ("config.json", "labels.json"):
        (root / name).write_text("{}")
    return root


def write_points(
    root: Path, first: int, steps: range, rate: float = 50, told: Mapping[int, list[str]] = ALL_TOLD
) -> None:
    board = Board(root / "tensorboard", first)
    for step in steps:
        board.train_loss(step, "k400", 1 / step, None)
        board.train_step(step, 0.1, rate, 0, 0)
    board.sampled_choices(steps[-1], {"depth": {2: 3, 3: 4}})
    for step, lines in told.items():
        board.unusable(step, "k400", lines)
    board.close()


def write_lines(root: Path, steps: range, rate: float, loss: float = 2.0) -> None:
    with (root / "train.log").open("a") as log:
        for step in steps:
            log.write(
                f"2026-01-01T00:00:00+00:00  step {step}/6  e0 joint  k400  d3 e64 h2.0 r3.3  "
                f"loss {loss + step:.3f}  lr 1.0e-3  {rate:.0f} samples/s  data {rate:.0f} ms  "
                f"eta 0:{rate:.0f}  mem {rate / 50:.1f} GiB  [d3 e64 h[2,2,2] r[3,3,4]]\n"
            )


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole/: a run as it was; killed/: one that died after step 5, amid a record, was resumed at 4
    and stopped, with a save, at 5."""
    root = tmp_path_factory.mktemp("runs")
    whole, killed = write_run(root / "whole"), root / "killed"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "tensorboard")
    write_points(killed, 1, range(1, 6), rate=7)
    (file,) = (killed / "tensorboard").iterdir()
    with file.open("ab") as events:
        events.write(file.read_bytes()[:20])
    write_points(killed, 5, range(5, 7), 8, {5: ["a.mp4 is cut"], 6: ["b.mp4 is empty"]})
    write_lines(killed, range(4, 6), rate=9, loss=7)
    write_lines(killed, range(4, 7), rate=8)
    shutil.copytree(
        killed / "checkpoints" / "step00000006", killed / "checkpoints" / "step00000005"
    )
    return root


@pytest.fixture
def runs(templates: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(templates, tmp_path / "runs")
    return tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"


def test_what_was_done_again_is_no_difference(runs: tuple[Path, Path]) -> None:
    assert differences(*runs) == []


def flip_a_bit(run: Path) -> None:
    file = run / "checkpoints" / "step00000006" / "rank00000-of-00002.safetensors"
    tensors = load_file(str(file))
    tensors[MOMENT].view(torch.int32)[17] ^= 1
    save_file(tensors, str(file))


def change_metadata(run: Path) -> None:
    file = run / "checkpoints" / "step00000006" / "rank00000-of-00002.safetensors"
    save_file(load_file(str(file)), str(file), metadata={"state": "{}"})


def lose_a_point(run: Path) -> None:
    shutil.rmtree(run / "tensorboard")
    write_points(run, 1, range(1, 4))
    write_points(run, 5, range(5, 7))


def double_a_point(run: Path) -> None:
    write_points(run, 7, range(6, 7))


def change_a_value(run: Path) -> None:
    board = Board(run / "tensorboard", 6)
    board.train_loss(6, "k400", 1 / 6 + 2e-8, None)
    board.train_step(6, 0.1, 1, 1, 0)
    board.sampled_choices(6, {"depth": {2: 3, 3: 4}})
    board.close()


def change_a_picture(run: Path) -> None:
    board = Board(run / "tensorboard", 6)
    board.train_loss(6, "k400", 1 / 6, None)
    board.train_step(6, 0.1, 1, 1, 0)
    board.sampled_choices(6, {"depth": {2: 4, 3: 3}})
    board.close()


def name_another_best(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step00000006", run / "checkpoints" / "step00000003")
    (run / "checkpoints" / "best").write_text("step00000003")


def lose_a_file(run: Path) -> None:
    (run / "checkpoints" / "step00000006" / "rank00000-of-00002.safetensors").unlink()


def leave_something(run: Path) -> None:
    for one in (run, run.parent / "whole"):
        (one / "checkpoints" / ".tmp-step00000006").mkdir()


def change_the_result(run: Path) -> None:
    file = run / "summary.json"
    file.write_text(file.read_text().replace("0.5", "0.75"))


MISTAKES: list[tuple[Callable[[Path], None], str]] = [
    (flip_a_bit, rf"rank00000.*{MOMENT}: 1 of 40 numbers"),
    (change_metadata, "no tensors differ"),
    (lose_a_point, r"train/loss/k400 has other steps: \[4\]"),
    (double_a_point, r"train/lr has steps \[6\] twice in killed"),
    (double_a_point, "data/unusable/k400/text_summary has other values"),
    (change_a_value, r"train/loss/k400 has other values at steps \[6\]"),
    (change_a_picture, r"sampled/depth has other values at steps \[6\]"),
    (lambda run: write_lines(run, range(3, 4), 8, loss=2.001), "train.log: .*loss 5.000.*loss 5.0"),
    (name_another_best, "checkpoints/step00000003 is only in killed"),
    (lose_a_file, "checkpoints/step00000006/rank0.* is only in whole"),
    (leave_something, "checkpoints/.tmp-step00000006 was left behind in killed"),
    (change_the_result, r"summary.json: datasets.k400.picks.largest is 0.5, but 0.75"),
]


@pytest.mark.parametrize(("mistake", "said"), MISTAKES)
def test_every_difference_is_told(
    runs: tuple[Path, Path], mistake: Callable[[Path], None], said: str
) -> None:
    mistake(runs[1])
    found = "\n".join(differences(*runs))
    assert re.search(said, found), found
