"""The searches and what follows them, as commands on a trained run: alone and on two ranks."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vimnas_ds
from tests.conftest import ROOT
from tests.launch import launch
from tests.runs import train
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.loader import EvalLoader
from vimnas_ds.predict import classify, read_input
from vimnas_ds.search.run import open_run
from vimnas_ds.space import Arch
from vimnas_ds.train.ranks import Ranks

pytestmark = pytest.mark.slow
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = Ranks(0, 1, torch.device("cpu"))
SMALL = ["--population", "6", "--generations", "2", "--crossovers", "2", "--mutations", "2"]
BUDGET = ["--params", "180k"]


def run_alone(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / script), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=ROOT)


def search(script: str, trained: Path, out: Path, *args: str, ranks: int = 1) -> dict:
    """Run a search script into `out`; its result.json without the path of the checkpoint."""
    options = ["--checkpoint", str(trained), "--out", str(out), *args]
    if ranks == 1:
        done = run_alone(script, *options)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    else:
        launch(f"scripts/{script}", *options, ranks=ranks)
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def results(trained, folder) -> dict[str, dict]:
    """Both searches on one rank and, from nothing, on two. All data files' access times are set
    back before."""
    data = [p for p in (folder / "data").rglob("*") if p.is_file()]
    for file in data:
        os.utime(file, ns=(1, file.stat().st_mtime_ns))  # an index notices the nanoseconds
    found = {
        "perturb": search("perturb_select.py", trained, folder / "p1"),
        "evolve": search("evolve.py", trained, folder / "e1", *BUDGET, *SMALL),
    }
    found["read"] = {str(f.relative_to(folder / "data")) for f in data if f.stat().st_atime > 2}  # type: ignore[assignment]
    anew = ["--no_cache"]
    found["perturb2"] = search("perturb_select.py", trained, folder / "p2", *anew, ranks=2)
    found["evolve2"] = search("evolve.py", trained, folder / "e2", *anew, *BUDGET, *SMALL, ranks=2)
    return found


def test_two_ranks_and_one_give_the_same_result(results, folder):
    assert results["perturb"] == results["perturb2"]
    assert results["evolve"] == results["evolve2"]
    assert len(results["perturb"]["decisions"]) >= 6
    for one, two in (("p1", "p2"), ("e1", "e2")):
        a, b = ((folder / d / "evaluations.csv").read_text() for d in (one, two))
        assert a == b


def test_a_search_that_was_killed_goes_on_and_ends_the_same(results, trained, folder):
    out, cache = folder / "killed", folder / "killed_cache"
    options = ["--checkpoint", str(trained), "--out", str(out), "--cache", str(cache)]
    command = [sys.executable, str(ROOT / "scripts" / "evolve.py"), *options, *BUDGET, *SMALL]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and not any(
            file.stat().st_size for file in cache.glob("ssv2-*")
        ):
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL
    assert not (out / "result.json").exists()
    kept = sum(f.stat().st_size for f in cache.iterdir())
    assert (
        search("evolve.py", trained, out, "--cache", str(cache), *BUDGET, *SMALL)
        == (results["evolve"])
    )
    assert sum(f.stat().st_size for f in cache.iterdir()) > kept > 0
    first, second = (folder / d / "evaluations.csv" for d in ("e1", "killed"))
    assert first.read_text() == second.read_text()


def test_a_front_against_measured_latency_is_the_same_on_two_ranks(trained, folder):
    """The second search and both its ranks read the table that the first one measured."""
    options = ["--pareto", "latency_ms=k400", "--params", "100k:250k", "--pick", "best", *SMALL]
    options.append("--no_cache")
    one, two = (
        search("evolve.py", trained, folder / f"f{ranks}", *options, ranks=ranks)
        for ranks in (1, 2)
    )
    assert one == two
    written = [(folder / f"f{ranks}" / "front.json").read_text() for ranks in (1, 2)]
    assert written[0] == written[1]
    front = json.loads(written[0])
    points = [(p["cost"], p["accuracy"]) for p in front["points"]]
    assert points == sorted(points)
    assert all(100_000 <= p["costs"]["params"]["imagenet"] <= 250_000 for p in front["points"])
    assert one["arch"] == front["points"][-1]["arch"]
    assert one["costs"]["latency_ms"]["k400"] == points[-1][0]
    assert (folder / "f1" / "front.png").stat().st_size > 5000
    table = json.loads((trained / "latency" / "k400_batch1.json").read_text())
    assert len(table["checks"]) == 4


def test_no_search_reads_a_test_file(results, folder):
    read: set[str] = results["read"]  # type: ignore[assignment]
    test = {f for f in read if "/val/" in f}
    run = open_run(folder / "fp32", CPU)
    test |= {f for f in read if f in {f"ssv2/{s.path}" for s in run.data.catalogs["ssv2"].test}}
    selected = {f"{n}/{s.path}" for n in run.datasets for s in run.data.splits[n]["select"]}
    run.close()
    assert test == set()
    if not selected & read:
        pytest.skip("this file system keeps no access times")
    assert selected <= read


def test_the_evolved_pick_holds_its_budget_and_every_evaluation_is_in_the_csv(results, folder):
    result = results["evolve"]
    assert all(d["params"] <= 180_000 for d in result["datasets"].values())
    rows = list(csv.DictReader((folder / "e1" / "evaluations.csv").open()))
    candidates = [r["candidate"] for r in rows]
    assert len(candidates) == len(set(candidates)) == result["evaluated"]
    best = max(rows, key=lambda r: (float(r["accuracy"]), -float(r["loss"])))
    assert Arch.from_json(best["candidate"]) == Arch.from_json(result["arch"])
    assert float(best["accuracy"]) == pytest.approx(result["accuracy"], abs=1e-6)


def test_an_unreachable_budget_ends_in_words_with_code_2(trained):
    done = run_alone("evolve.py", "--checkpoint", str(trained), "--params", "1k")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "sub-networks of nano have params (imagenet) 88,840 to 277,032" in done.stderr


@pytest.fixture(scope="module")
def exported(results, trained, folder) -> Path:
    done = run_alone(
        "export.py",
        *("--checkpoint", str(trained), "--arch", str(folder / "e1" / "arch.json")),
        *("--out", str(folder / "export")),
    )
    assert done.returncode == 0, done.stderr
    return folder / "export"


def test_the_export_equals_the_supernets_sampled_subnetwork(exported, results, trained):
    run = open_run(trained, CPU)
    net = vimnas_ds.load_subnet(exported)
    arch = Arch.from_json(results["evolve"]["arch"])
    for name, section in run.config.vimnas.data.datasets.items():
        frames = () if section.frames is None else (section.frames,)
        x = torch.randn(3, 3, *frames, section.size, section.size)
        with torch.no_grad():
            torch.testing.assert_close(net(x, name), run.net(x, arch, name), atol=1e-5, rtol=1e-5)
    run.close()


def test_an_export_loads_and_classifies_without_deepspeed_or_dali(exported, folder):
    clip = next((folder / "data" / "k400" / "val").rglob("*.mp4"))
    code = f"""
import sys
import time
from pathlib import Path
for name in ("deepspeed", "nvidia", "nvidia.dali"):
    sys.modules[name] = None
import vimnas_ds
from vimnas_ds.predict import classify
net = vimnas_ds.load_subnet({str(exported)!r})
print(net.arch)
found = classify({str(exported)!r}, {str(clip)!r}, "k400")
import torch
from vimnas_ds.predict import read_input
from vimnas_ds.export import read_json
steps = read_json(Path({str(exported)!r}), "preprocess.json")["k400"]
x = read_input({str(clip)!r}, steps)
with torch.no_grad():
    p = net(x, "k400").softmax(-1)[0]
assert found.probabilities == tuple(p.sort(descending=True).values[:5].tolist())
print("LABEL", found.labels[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (folder / "data" / "k400" / "val").iterdir()}
    assert done.stdout.split("LABEL ")[1].strip() in names


def test_classifying_turns_pictures_upright_as_the_evaluation_does(trained, tmp_path):
    """Pixels of `read_input` against the DALI graph's, on oriented and oblong pictures."""
    run = open_run(trained, CPU)
    recipe = run.config.vimnas.data.datasets["imagenet"]
    y, x = np.mgrid[0:90, 0:61].astype(np.float32)
    smooth = np.stack([2.5 * x, 2.5 * y, 1.2 * (x + y)], -1).clip(0, 255).astype(np.uint8)
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(smooth).save(tmp_path / f"o{orientation}.jpg", quality=95, exif=exif)
    samples = [Sample(p.name, 0) for p in sorted(tmp_path.glob("*.jpg"))]
    section = recipe.model_copy(update={"root": tmp_path})
    loader = EvalLoader("imagenet", section, samples, 0, 1, 4, CPU.device, run.loaders.pool)
    batch = next(iter(loader))
    steps = {"size": 32, "resize": 32, "frames": None, "mean": MEAN, "std": STD}
    for path, expected in zip(batch.names, batch.x, strict=True):
        ours = read_input(tmp_path / path, steps)[0]
        levels = (ours - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
        assert levels.mean() < 3, path
    loader.close()
    run.close()


def test_classifying_sees_the_file_as_the_evaluation_does(exported, results, trained):
    """Own preprocessing (torch) against the DALI graph: videos the same, images nearly."""
    run = open_run(trained, CPU)
    arch = Arch.from_json(results["evolve"]["arch"])
    for name in ("imagenet", "k400", "ssv2"):
        loader = run.loaders.evaluation(name, "test", 4)
        batch = next(iter(loader))
        root, names = run.data.catalogs[name].root, run.data.catalogs[name].class_names
        near = 0.02 if name == "imagenet" else 1e-4
        with torch.no_grad():
            expected = run.net(batch.x, arch, name).softmax(-1)
        for path, row in zip(batch.names, expected, strict=True):
            found = classify(exported, root / path, name, top=8)
            ours = dict(zip(found.labels, found.probabilities, strict=True))
            for label, p in zip(names, row.tolist(), strict=True):
                assert ours[label] == pytest.approx(p, abs=near), (name, path)
        loader.close()
    run.close()


def test_evaluation_reports_views_and_counts_each_sample_once(trained, folder):
    args = ["--checkpoint", str(trained), "--arch", "largest", str(folder / "e1" / "arch.json")]
    views = ["--set", "vimnas.data.k400.test_clips=3", "--set", "vimnas.data.ssv2.test_clips=2"]
    one, two = folder / "one.json", folder / "two.json"
    done = run_alone("evaluate.py", *args, *views, "--out", str(one))
    assert done.returncode == 0, done.stderr
    launch("scripts/evaluate.py", *args, *views, "--out", str(two))
    a, b = json.loads(one.read_text()), json.loads(two.read_text())
    assert a == b
    found = a["archs"]["largest"]["datasets"]
    assert [found[n]["views"] for n in ("imagenet", "k400", "k600", "ssv2")] == [1, 3, 1, 2]
    assert all(d["count"] == 16 for d in found.values())


def test_one_subnetwork_trains_alone_from_inherited_weights(results, trained, folder):
    arch = folder / "e1" / "arch.json"
    alone = ["--arch", str(arch), "--inherit", str(trained), "--set", "vimnas.schedule.epochs=1"]
    train(folder, "subnet", *alone, "--set", "vimnas.schedule.lr=1e-9", ranks=1)
    run, parent = open_run(folder / "subnet", CPU), open_run(trained, CPU)
    chosen = Arch.from_json(json.loads(arch.read_text()))
    assert run.net.space.size() == 1
    assert run.net.space.largest() == chosen
    x = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():  # a learning rate of 1e-9 leaves the inherited network as it was
        torch.testing.assert_close(
            run.net(x, chosen, "k400"), parent.net(x, chosen, "k400"), atol=1e-4, rtol=1e-4
        )
    summary = json.loads((folder / "subnet" / "summary.json").read_text())
    assert list(summary["datasets"]["k400"]["picks"]) == ["arch"]
    run.close()
    parent.close()


def test_tuning_between_decisions_trains_the_supernet_and_still_decides(trained, folder):
    before = load_file(next((trained / "checkpoints").glob("*/supernet.safetensors")))
    result = search(
        "perturb_select.py",
        trained,
        folder / "tuned",
        *("--tune_steps", "2", "--alphas", "fixed", "--datasets", "imagenet"),
        ranks=2,
    )
    assert result["tune_steps"] == 2
    plain = search(
        "perturb_select.py", trained, folder / "plain", "--alphas", "fixed",
        "--datasets", "imagenet",
    )  # fmt: skip
    accuracies = [[d["loss_without"] for d in r["decisions"]] for r in (result, plain)]
    assert accuracies[0][0] == pytest.approx(accuracies[1][0], abs=1e-4)  # before any tuning
    assert accuracies[0][1] != pytest.approx(accuracies[1][1], abs=1e-5)  # after it
    after = load_file(next((trained / "checkpoints").glob("*/supernet.safetensors")))
    assert all(torch.equal(before[n], after[n]) for n in before)  # the checkpoint is untouched


@pytest.mark.endurance
def test_a_killed_tuned_search_goes_on_to_the_same_result(trained, folder):
    """SIGKILL as soon as two decisions are tuned; weights, moments and data are the real ones."""
    options = ["--tune_steps", "2", "--tune_lr", "1e-3", "--datasets", "imagenet"]
    options += ["--samples", "8", "--set", "bf16.enabled=true"]  # masters hold more than weights
    expected = search("perturb_select.py", trained, folder / "whole", *options)
    rows = list(csv.DictReader((folder / "whole" / "evaluations.csv").open()))
    assert rows[-2]["loss"] != rows[-1]["loss"]  # the pick, tuned and as the checkpoint has it
    out = folder / "killed_tuned"
    command = [sys.executable, str(ROOT / "scripts" / "perturb_select.py"), *options]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*command, "--checkpoint", str(trained), "--out", str(out)],
        env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while running.poll() is None and not any(out.glob("decisions/02-*")):
        time.sleep(0.02)
    running.kill()
    assert running.wait() == -9
    assert not (out / "result.json").exists()
    assert search("perturb_select.py", trained, out, *options, "--resume") == expected
    a, b = ((folder / d / "evaluations.csv").read_text() for d in ("whole", "killed_tuned"))
    assert a == b
    assert (out / "drops.png").read_bytes().startswith(b"\x89PNG")
