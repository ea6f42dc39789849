"""The whole run through the launcher, on real files: draws, resume, results."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from tests.runs import RESUME_AT, train
from vimnas_ds.config import load_config
from vimnas_ds.data.joint import open_datasets
from vimnas_ds.train.fragments import rank_file
from vimnas_ds.train.state_file import read_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(folder, trained) -> tuple[Path, Path]:
    """An uninterrupted run, and one resumed from its checkpoint of step 14 in another folder
    (bf16 and kills: tests/test_chaos.py)."""
    tag = f"step{RESUME_AT:08d}"
    resumed = folder / "resumed"
    for part in ("tensorboard", f"checkpoints/{tag}"):
        shutil.copytree(trained / part, resumed / part)
    shutil.copy(trained / "config.json", resumed)
    (resumed / "checkpoints" / "latest").write_text(tag)
    train(folder, resumed.name, "--set", "bf16.enabled=false", "--resume")
    return trained, resumed


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text()


def rates(run: Path) -> list[ScalarEvent]:
    return EventAccumulator(str(run / "tensorboard")).Reload().Scalars("train/lr")


def draws(run: Path) -> list[tuple[str, ...]]:
    """(step, phase, dataset, sub-network) of every log line."""
    pattern = r"step (\d+)/\d+  e\d+ (\w+)  (\w+)  .*\[(d\d e\d+ h\[.*\] r\[.*\])\]"
    return re.findall(pattern, (run / "train.log").read_text())


def test_a_resumed_run_continues_bit_equal(pair):
    """Every file of the last checkpoint: weights, moments, counts, alphas, cursor, RNG."""
    whole, resumed = (last_checkpoint(run) for run in pair)
    assert whole.name == resumed.name > f"step{RESUME_AT:08d}"
    names = sorted(file.name for file in whole.iterdir())
    assert {"supernet.safetensors", "alphas.safetensors", "state.safetensors"} < set(names)
    assert [n for n in names if n.startswith("rank")] == [rank_file(r, 2) for r in range(2)]
    for name in names:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
    state = load_file(whole / rank_file(0, 2))
    assert {"python", "numpy", "torch"} <= {key.split("/")[1] for key in state if key[0] == "/"}
    assert any(
        key.startswith("exp_avg_sq/") and float(t.abs().max()) > 0 for key, t in state.items()
    )


def test_a_resumed_run_writes_each_tensorboard_step_once(pair):
    whole, resumed = (EventAccumulator(str(run / "tensorboard")).Reload() for run in pair)
    for tag in ("train/lr", "train/loss/imagenet", "train/loss/ssv2"):
        a, b = ([(e.step, e.value) for e in board.Scalars(tag)] for board in (whole, resumed))
        assert a == b
    assert [e.step for e in whole.Scalars("train/lr")] == sorted(
        {e.step for e in whole.Scalars("train/lr")}
    )
    tags = whole.Tags()
    assert {f"batch/{n}" for n in ("imagenet", "k400", "k600", "ssv2")} <= set(tags["images"])
    assert {"alpha/probabilities/embed_dim", "sampled/depth"} <= set(tags["images"])
    assert "select/k400/top1/largest" in tags["scalars"]


def test_draws_are_the_same_on_one_rank_and_two(folder, pair):
    if not (folder / "one").exists():
        train(folder, "one", "--set", "vimnas.alpha.enabled=false", ranks=1)
    two = draws(pair[0])
    assert len(two) > 12
    assert draws(folder / "one") == two
    assert {phase for _, phase, *_ in two} == {"image", "joint"}


def test_a_run_goes_on_on_another_number_of_ranks_and_at_another_rate(folder, pair):
    """From the middle: the same draws and update counts to the end, other sums."""
    whole, _ = pair
    tag = f"step{RESUME_AT:08d}"
    other = folder / "other"
    for part in ("tensorboard", f"checkpoints/{tag}"):
        shutil.copytree(whole / part, other / part)
    shutil.copy(whole / "config.json", other)
    (other / "checkpoints" / "latest").write_text(tag)
    args = ["--set", "bf16.enabled=false", "--set", "vimnas.schedule.lr=1e-4", "--resume"]
    train(folder, other.name, *args, ranks=1)
    ends = [last_checkpoint(run) for run in (whole, other)]
    positions = [json.loads((end / "position.json").read_text()) for end in ends]
    assert positions[0] == positions[1]
    counts = [read_state(end / "state.safetensors")["counts"] for end in ends]
    assert all(torch.equal(counts[0][name], counts[1][name]) for name in counts[0])
    assert sum(int(count.sum()) for count in counts[1].values()) > 1000
    assert (ends[1] / rank_file(0, 1)).is_file()
    peak = load_config(whole / "config.json").vimnas.peak_lr
    assert peak > 2e-4
    shares = [
        {rate.step: rate.value / highest for rate in rates(run)}
        for run, highest in ((whole, peak), (other, 1e-4))
    ]
    after = [step for step in shares[0] if step > RESUME_AT]
    assert len(after) > 5
    assert all(shares[1][step] == pytest.approx(shares[0][step], abs=1e-3) for step in after)


def test_the_result_is_a_table_and_the_same_numbers_in_json(pair):
    summary = json.loads((pair[0] / "summary.json").read_text())
    assert set(summary["datasets"]) == {"imagenet", "k400", "k600", "ssv2"}
    for entry in summary["datasets"].values():
        assert entry["chance"] == 1 / 8
        assert entry["picks"]["largest"]["count"] == 16
        assert 0 <= entry["picks"]["smallest"]["top1"] <= 1
        assert entry["picks"]["largest"]["params"] > entry["picks"]["smallest"]["params"]
    log = (pair[0] / "train.log").read_text()
    assert f"{summary['datasets']['k400']['picks']['largest']['params']:,}" in log


def test_a_run_is_never_mixed_with_an_older_one(folder, pair):
    with pytest.raises(AssertionError, match="already holds a run: --resume continues it"):
        train(folder, pair[0].name, ranks=1)
    longer = (
        r"schedule\.epochs was 3, now 4; to train on from its weights as another run: --inherit"
    )
    with pytest.raises(AssertionError, match=longer):
        train(folder, pair[0].name, "--set", "vimnas.schedule.epochs=4", "--resume", ranks=1)


def test_broken_videos_are_replaced_named_and_counted_and_too_many_stop_the_run(folder, tmp_path):
    """Files that break after they were indexed, without a sign: on rank 1 as well as on rank 0, in
    training and in the log, and the run goes on."""
    data = tmp_path / "k400"
    shutil.copytree(folder / "data" / "k400", data)
    clips = sorted((data / "train").rglob("*.mp4"))
    values = ["vimnas.schedule.epochs=2", f"vimnas.data.k400.root={data}"]
    values.append(f"vimnas.data.index_dir={tmp_path / 'indexes'}")
    open_datasets(load_config(folder / "config.json", values).vimnas.data)
    only = [word for value in values for word in ("--set", value)]
    for clip in clips[::20]:
        rot(clip)
    often = ["--set", "vimnas.checkpoint.every=1000", "--set", "vimnas.checkpoint.minutes=0.001"]
    train(folder, "broken", *only, "--set", "vimnas.data.max_bad_share=0.5", *often)
    log = (folder / "broken" / "train.log").read_text()
    assert log.count("saved step") > 5  # by the clock
    named = set(re.findall(r"k400: (\S.*\.mp4) is unusable and (?:replaced|left out)", log))
    broken = {str(c.relative_to(data)) for c in clips[::20]}
    assert named
    assert named <= broken
    summary = json.loads((folder / "broken" / "summary.json").read_text())
    assert summary["samples_replaced"]["k400"] >= 1
    assert summary["samples_replaced"]["imagenet"] == 0
    reasons = summary["replaced_by_reason"]["k400"]
    assert sum(reasons.values()) >= 1
    assert all(f": {reason}" in log for reason in reasons)
    for clip in clips:
        rot(clip)
    with pytest.raises(AssertionError, match=r"rank \d stopped: .*k400"):
        train(folder, "rotten", *only)


def rot(file: Path) -> None:
    """Blanks a file after its first bytes; size and time stay as the index knows them."""
    before, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:200] + bytes(len(content) - 200))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_non_finite_steps_are_skipped_and_stop_the_run_after_the_set_number(folder):
    """A learning rate that makes everything overflow: skipped, counted, stopped with words."""
    args = ["--set", "vimnas.schedule.lr=1e30", "--set", "vimnas.optimizer.max_skipped=3"]
    args += ["--set", "vimnas.alpha.enabled=false"]
    with pytest.raises(AssertionError, match=r"3 weight steps in a row .*lower the learning rate"):
        train(folder, "nan", *args, ranks=1)
    log = (folder / "nan" / "train.log").read_text()
    assert re.findall(r"\((\d) in a row\)", log)[-3:] == ["1", "2", "3"]


def test_alpha_steps_that_stay_non_finite_stop_the_run_though_every_weight_step_is_sound(folder):
    """Alphas that begin as infinities; what was counted goes on in a resumed run."""
    args = ["--set", "vimnas.alpha.init_std=3e38", "--set", "vimnas.optimizer.max_skipped=3"]
    args += ["--set", "vimnas.checkpoint.every=2"]
    for resume, counted in ((), "123"), (("--resume",), "1233"):
        with pytest.raises(AssertionError, match=r"3 alpha steps in a row had non-finite gradient"):
            train(folder, "nan_alphas", *args, *resume, ranks=1)
        log = (folder / "nan_alphas" / "train.log").read_text()
        assert re.findall(r"the alpha step was .* \((\d) in a row\)", log) == [*counted]
        assert "the weight step was skipped" not in log
