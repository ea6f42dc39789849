"""The ranking: which sub-networks, what budget, how two accuracies agree, and a real one."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT
from tests.small import small_config
from vimnas_ds.config import ConfigError, load_config, parse_config
from vimnas_ds.report.pictures import render
from vimnas_ds.report.ranking import ranking_figure
from vimnas_ds.search.alone import TrainingFailed, Trainings, epochs_within, shortened
from vimnas_ds.search.objective import MEAN, parse_objective
from vimnas_ds.search.ranking import agreement, build_ranking, choose_archs
from vimnas_ds.search.scoring import Scored
from vimnas_ds.space import SPACES, Arch
from vimnas_ds.train.dry_run import cost_of
from vimnas_ds.train.evaluate import Outcomes
from vimnas_ds.train.schedule import Schedule

NANO = SPACES["nano"]
CONFIG = parse_config(small_config())
STUB = "import os, sys, time; from pathlib import Path\n"
STUB += "out = Path(next(a for a in sys.argv if 'output_dir' in a).partition('=')[2])\n"
SLEEPER = "(out / 'pid').write_text(str(os.getpid())); time.sleep(99)"


@pytest.mark.parametrize("space", ["nano", "vit_s"])
def test_the_chosen_sub_networks_span_the_space(space):
    space = SPACES[space]
    archs = choose_archs(CONFIG, space, 14, seed=0)
    params = [cost_of(CONFIG, a, "imagenet")[0] for a in archs]
    assert len(set(archs)) == 14
    assert all(a in space for a in archs)
    assert (archs[0], archs[-1]) == (space.smallest(), space.largest())
    assert params == sorted(params)
    gaps = np.diff(params) / (params[-1] - params[0])
    assert gaps.max() < 2.5 / 12  # equal ranges: neighbours are at most two ranges apart
    assert archs == choose_archs(CONFIG, space, 14, seed=0)
    assert archs != choose_archs(CONFIG, space, 14, seed=1)


def test_every_member_can_be_chosen_and_no_more():
    assert set(choose_archs(CONFIG, NANO, NANO.size(), seed=0)) == set(NANO.members())
    with pytest.raises(ConfigError, match=f"--count {NANO.size() + 1}: the space has"):
        choose_archs(CONFIG, NANO, NANO.size() + 1, seed=0)


@pytest.mark.parametrize("explicit", [{}, {"image_epochs": 12}])
def test_a_shorter_budget_keeps_the_schedules_proportions(tmp_path, explicit):
    content = small_config(tmp_path)
    content["vimnas"]["schedule"] = {"epochs": 30, "warmup": 6, **explicit}
    (tmp_path / "config.json").write_text(json.dumps(content))
    sizes = {"imagenet": 80, "k400": 160}
    full = Schedule.build(load_config(tmp_path / "config.json"), sizes)

    def plan(epochs: int) -> Schedule:
        base = load_config(tmp_path / "config.json")
        return Schedule.build(load_config(tmp_path / "config.json", shortened(base, epochs)), sizes)

    assert plan(30) == full
    third = plan(10)
    assert third.total_steps * 3 == pytest.approx(full.total_steps, abs=60)
    assert third.image_steps * 3 == pytest.approx(full.image_steps, abs=20)
    assert third.warmup_steps * 3 == full.warmup_steps
    most = epochs_within(200, lambda e: plan(e).total_steps)
    assert plan(most).total_steps <= 200 < plan(most + 1).total_steps
    with pytest.raises(ConfigError, match="--steps 9: one epoch already takes 30"):
        epochs_within(9, lambda e: plan(e).total_steps)


def hits(correct: list[int], samples: int = 40) -> np.ndarray:
    """Sub-network a is right on the first `correct[a]` samples."""
    return np.array([[float(i < c) for i in range(samples)] for c in correct])


def test_agreement_finds_the_planted_order():
    x, params = list(range(10, 34, 2)), np.arange(12.0)
    same = agreement([hits(x)], [hits([c + 3 for c in x])], params[::-1], seed=0)
    assert (same.tau, same.spearman, same.tau_of_params) == pytest.approx((1, 1, -1))
    assert (same.low, same.high) == pytest.approx((1, 1))
    assert same.verdict().endswith("the supernet ranks sub-networks better than chance")
    opposite = agreement([hits(x)], [hits(x[::-1])], params, seed=0)
    assert opposite.tau == pytest.approx(-1)
    assert "upside down" in opposite.verdict()
    by_size = agreement([hits(x)], [hits([*x[1:], x[0] + 9])], params, seed=0)
    assert by_size.tau == by_size.tau_of_params < 1
    assert (by_size.gain_low, by_size.gain_high) == (0, 0)
    assert "but is not shown to do so better than their parameters" in by_size.verdict()
    swapped = np.array([1, 0, *range(2, 12)])  # the parameters' tau is lower by a hair
    hair = agreement([hits(x)], [hits(x)], swapped.astype(float), seed=0)
    assert hair.tau > hair.tau_of_params
    assert hair.gain_low == 0 < hair.gain_high  # where not both of the pair are drawn: no gain
    assert "but is not shown to do so better" in hair.verdict()
    shuffled = [x[i] for i in (5, 2, 9, 0, 7, 11, 3, 10, 1, 8, 4, 6)]
    noise = agreement([hits(x)], [hits(shuffled)], params, seed=0)
    assert noise.low < 0 < noise.high
    assert "the interval contains 0: do not trust a search" in noise.verdict()
    constant = agreement([hits([7] * 12)], [hits(x)], params, seed=0)
    assert math.isnan(constant.tau)
    assert "no order to compare" in constant.verdict()


def test_samples_decide_how_wide_the_interval_over_samples_is():
    rng = np.random.default_rng(0)
    skill = np.linspace(0.3, 0.7, 12)[:, None]
    widths = []
    for samples in (20, 2000):
        x, y = ((rng.random((12, samples)) < skill).astype(float) for _ in range(2))
        found = agreement([x], [y], skill[:, 0], seed=0)
        widths.append(found.high_over_samples - found.low_over_samples)
    assert widths[1] < widths[0] / 2


def scored(correct: dict[str, list[int]], left_out: str = "", datasets=None) -> Scored:
    """Per dataset, 1 where the sample was right; one sample may be missing."""
    outcomes = {}
    for dataset, top1 in correct.items():
        kept = [(f"{i}.jpg", t) for i, t in enumerate(top1) if f"{dataset}/{i}.jpg" != left_out]
        names, values = zip(*kept, strict=True)
        tensor = torch.tensor(values, dtype=torch.float64)
        outcomes[dataset] = Outcomes(tensor, tensor, tensor, names)
    return Scored(outcomes, parse_objective(datasets, list(outcomes)))


def test_datasets_count_alike_and_only_on_common_samples(tmp_path):
    a = {"imagenet": [1, 0, 0, 0], "k400": [1, 1]}
    b = {"imagenet": [1, 1, 0, 0], "k400": [0, 1]}
    archs = [NANO.smallest(), NANO.largest()]
    found = build_ranking(
        CONFIG, archs, [scored(a), scored(b)], [scored(b), scored(a, "imagenet/0.jpg")], seed=0
    )
    image, video, mean = found.panels
    assert [p.samples for p in found.panels] == [3, 2, 5]
    assert image.inherited.tolist() == pytest.approx([0, 1 / 3])
    assert image.alone.tolist() == pytest.approx([1 / 3, 0])
    assert mean.inherited.tolist() == pytest.approx([1 / 2, (1 / 3 + 1 / 2) / 2])
    assert (image.agreement.tau, video.agreement.tau, mean.agreement.tau) == (-1, -1, -1)
    assert found.overall is mean
    found.write(tmp_path, {"seed": 0})
    written = json.loads((tmp_path / "ranking.json").read_text())
    assert list(written["agreement"]) == ["imagenet", "k400", MEAN]
    assert "k400: 2 samples are too few" in written["warnings"][1]
    assert "train the supernet anew with a larger vimnas.data.held_out" in written["warnings"][1]
    rows = list(csv.DictReader((tmp_path / "ranking.csv").open()))
    assert float(rows[1][f"inherited/{MEAN}"]) == pytest.approx(5 / 12)
    assert Arch.from_json(rows[1]["arch"]) == archs[1]


def test_weights_of_datasets_count_in_the_mean():
    a, b = (scored({"imagenet": [t], "k400": [1 - t]}, "", ["imagenet=3", "k400"]) for t in (0, 1))
    found = build_ranking(CONFIG, [NANO.smallest(), NANO.largest()], [a, b], [a, b], seed=0)
    assert found.overall.name == MEAN
    assert found.overall.inherited.tolist() == [0.25, 0.75]
    assert found.overall.alone.tolist() == [0.25, 0.75]
    assert found.overall.agreement.tau == 1


def test_the_picture_has_a_panel_a_dataset():
    x = np.linspace(0.2, 0.8, 12)
    panels = [(f"set{i}\ntau 1.00 [1.00, 1.00]", x, x) for i in range(4)]
    figure = ranking_figure(panels, np.arange(12) * 1e6, "12 sub-networks")
    drawn = [a for a in figure.axes if a.get_title()]
    assert [a.get_title() for a in drawn] == [name for name, _, _ in panels]
    np.testing.assert_allclose(drawn[3].collections[0].get_offsets(), 100 * np.stack([x, x], 1))
    assert render(figure).std() > 10


def trainings(root: Path, script: str, count: int = 2, **settings) -> Trainings:
    """Of a stub in place of scripts/train.py."""
    root.mkdir(exist_ok=True)
    (root / "train.py").write_text(STUB + script)
    (root / "config.json").write_text(json.dumps(small_config(root)))
    archs = choose_archs(CONFIG, NANO, count, seed=0)
    return Trainings(root / "out", archs, root / "train.py", root / "config.json", [], settings)


def test_a_folder_with_other_settings_is_refused_by_name(tmp_path):
    plan = trainings(tmp_path, "", seed=0)
    plan.begin()
    plan.begin()  # the same: goes on
    with pytest.raises(ConfigError, match=r"seed was 0, now 1; delete it, or .* --out"):
        trainings(tmp_path, "", seed=1).begin()
    longer = Trainings(
        plan.root, plan.archs, plan.script, plan.config, ["vimnas.schedule.epochs=4"], {"seed": 0}
    )
    with pytest.raises(ConfigError, match=r"vimnas\.schedule\.epochs was 3, now 4"):
        longer.begin()


@pytest.mark.slow
def test_a_failed_training_is_named_with_its_last_lines_and_ends_the_others(tmp_path):
    plan = trainings(tmp_path, "if '/01' in str(out): sys.exit('the disk is full')\n" + SLEEPER)
    plan.begin()
    with pytest.raises(TrainingFailed, match=r"(?s)training 01 of d3 .* code 1.*the disk is full"):
        plan.run(steps=1, jobs=2)
    pid = plan.folder(0) / "pid"
    assert not pid.is_file() or not alive(int(pid.read_text()))


@pytest.mark.endurance
def test_no_training_outlives_a_killed_ranking(tmp_path):
    code = (
        "import pathlib, sys; from tests.test_ranking import SLEEPER, trainings\n"
        "plan = trainings(pathlib.Path(sys.argv[1]), SLEEPER); plan.begin(); plan.run(1, 2)"
    )
    ranking = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    files = [tmp_path / "out" / n / "pid" for n in ("00", "01")]
    wait_until(lambda: all(f.is_file() and f.read_text() for f in files))
    pids = [int(f.read_text()) for f in files]
    assert all(map(alive, pids))
    ranking.kill()
    ranking.wait()
    wait_until(lambda: not any(map(alive, pids)))


def alive(pid: int) -> bool:
    """Runs: neither gone nor a zombie that nobody has waited for."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def rank(trained: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "ranking.py"), "--checkpoint", str(trained)]
    return subprocess.run(
        [*command, *args], env=env, capture_output=True, text=True, timeout=500, cwd=ROOT
    )


@pytest.mark.endurance
def test_a_ranking_goes_on_after_a_kill_and_reads_no_test_file(trained, folder):
    out = folder / "ranking"
    few = ["--count", "3", "--epochs", "1", "--out", str(out)]
    refused = rank(trained, *few)
    assert refused.returncode == 2
    assert "at least 12 are needed for a tau; --trial allows fewer" in refused.stderr
    done = rank(trained, *few, "--trial")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "a trial of 3 sub-networks: tau" in done.stdout
    result = json.loads((out / "ranking.json").read_text())
    assert result["trial"]
    assert (result["epochs"], len(result["archs"])) == (1, 3)
    for entry in result["archs"]:
        said = (out / entry["number"] / "train.log").read_text()
        assert json.loads((out / entry["number"] / "summary.json").read_text())["datasets"] == {}
        last = [line for line in said.splitlines() if "select at step" in line][-1]
        for name in ("imagenet", "k400", "k600", "ssv2"):  # training's own last evaluation
            if name in last:
                assert f"{name} arch {entry[f'alone/{name}']:.1%}" in last
    assert Image.open(out / "ranking.png").size[0] > 800
    events = EventAccumulator(str(out), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["inherited_against_alone"]
    assert not list(out.glob("*/checkpoints/latest"))  # no search takes one for the latest run

    kept = {n: (out / n / "console.log").stat().st_mtime_ns for n in ("00", "01", "02")}
    (out / "01" / "result.json").unlink()  # as if it had been cut off
    again = rank(trained, *few, "--trial")
    assert again.returncode == 0, again.stderr[-4000:]
    now = {n: (out / n / "console.log").stat().st_mtime_ns for n in ("00", "01", "02")}
    assert [kept[n] == now[n] for n in ("00", "01", "02")] == [True, False, True]
    assert json.loads((out / "ranking.json").read_text()) == result
    other = rank(trained, *few[:2], "--trial", "--epochs", "2", "--out", str(out))
    assert other.returncode == 2
    assert "vimnas.schedule.epochs was 1, now 2" in other.stderr
