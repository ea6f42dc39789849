"""The commands of README.md and docs/ do their work, one after the other, as a reader gives them.

Places (/data, a reader's clip) stand for small ones here, and options are added that make a command
small; a command that no test can run is named with the reason.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_docs import commands, split
from vimnas_ds.train.ranks import free_port

#: In the order in which a reader needs them; a script's own commands in the pages' order.
SCRIPTS = (
    "index_data", "make_shards", "view_batch", "plan", "train", "perturb_select", "evolve",
    "compare", "evaluate", "export", "predict", "report", "consolidate", "doctor",
)  # fmt: skip
#: By their beginnings: what takes launchers or minutes, in this order.
LONG = (
    "deepspeed scripts/train.py --deepspeed_config ds_configs/vitl.json --set",
    "deepspeed scripts/train.py --deepspeed_config ds_configs/vitl.json --resume",
    "deepspeed --hostfile",
    "deepspeed scripts/train.py --deepspeed_config ds_configs/demo.json --arch",
    "deepspeed --num_gpus 2 scripts/evolve.py",
    "python scripts/ranking.py",
    "tensorboard",
    "python scripts/bench_step.py",
    "python scripts/bench_loader.py",
)
ELSEWHERE = {
    "make demo": "CI runs it",
    "make test": "CI runs it: this is one of its tests",
    "pip install": "needs the network, a GPU's compiler and an hour",
    "python scripts/bench_all.py --device cuda": "needs a GPU",
    "python scripts/bench_all.py": "a quarter of an hour: benchmarks are not tests",
    "python scripts/chaos.py": "tests/test_chaos.py, with fewer kills",
    "python scripts/soak.py": "tests/test_soak.py, with fewer steps",
    "python scripts/import_autoformer.py": "tests/test_autoformer.py, with a checkpoint of its own",
}
#: What makes a script's command small enough for a test.
SMALL = {
    "index_data": "--index_dir indexes",
    "view_batch": "--count 2",
    "perturb_select": "--samples 8",
    "evolve": "--samples 8 --population 4 --generations 2 --top_k 2 --crossovers 1 --mutations 1",
    "compare": "--samples 8 --k 2 --evaluations 4 --single_view",
    "evaluate": "--single_view",
    "report": "--clips 4",
    "ranking": "--count 2 --trial --epochs 1",
    "train": "--set vimnas.schedule.epochs=1 --set vimnas.schedule.warmup=1",
    "bench_step": "--runs 1 --smallest",
    "bench_loader": "--runs 1",
}
#: What the quick ones leave behind, under the folder that they run in.
LEFT = (
    "indexes/imagenet.parquet",
    "indexes/k400.parquet",
    "indexes/k600.parquet",
    "indexes/ssv2.parquet",
    "indexes/weizmann.parquet",
    "shards/k400/index.parquet",
    "runs/view_batch.png",
    "plan.json",
    "runs/demo/perturbation/arch.json",
    "runs/demo/evolution/arch.json",
    "runs/demo/front/front.json",
    "runs/demo/compare/compare.json",
    "runs/demo/evaluation.json",
    "exports/mine/torch_export/k400.pt2",
    "exports/largest/onnx/k400.onnx",
    "seen.png",
    "runs/demo/report.html",
    "runs/vitl_state/supernet.safetensors",
)
#: One process for all quick commands: most of a command's time is imports.
RUNNER = """
import importlib, json, sys
for script, arguments in json.loads(sys.argv[1]):
    print("==", script, *arguments, flush=True)
    if script == "-c":
        exec(*arguments)
        continue
    code = importlib.import_module(script).main(arguments)
    if code:
        sys.exit(f"{script} ended with {code}")
"""


def is_long(command: str) -> bool:
    return command.startswith(LONG)


def is_elsewhere(command: str) -> bool:
    return command.startswith(tuple(ELSEWHERE))


def the_commands() -> list[str]:
    """Without comments, each once."""
    return list(dict.fromkeys(shlex.join(shlex.split(c, comments=True)) for _, c in commands()))


def quick() -> list[str]:
    found = [c for c in the_commands() if not is_long(c) and not is_elsewhere(c)]

    def place(command: str) -> int:
        _, script, _ = split(command)
        # what names no script loads the export
        return SCRIPTS.index(Path(script).stem) if script else SCRIPTS.index("predict")

    return sorted(found, key=place)


def test_every_command_is_run_or_it_is_said_why_not() -> None:
    found = the_commands()
    for beginning in (*LONG, *ELSEWHERE):
        assert any(c.startswith(beginning) for c in found), f"no page gives {beginning} any more"
    assert len(quick()) + sum(is_long(c) for c in found) >= 40


@pytest.fixture(scope="module")
def reader(folder: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it who has trained the demo: runs/demo, configurations, data in the
    layouts that the pages name."""
    here = tmp_path_factory.mktemp("reader")
    shutil.copytree(trained, here / "runs" / "demo")
    config = json.loads((folder / "config.json").read_text())
    for dataset in config["vimnas"]["data"]["datasets"].values():
        dataset |= {"root": None, "reference_files": 80}  # as in vitl.json
    config["vimnas"]["output_dir"] = "runs/vitl"
    (here / "config.json").write_text(json.dumps(config))
    data = here / "data"
    data.mkdir()
    for name in ("k400", "ssv2"):
        (data / name).symlink_to(folder / "data" / name)
    imagenet(folder / "data" / "imagenet", data / "imagenet")
    kinetics(folder / "data" / "k600", data / "k600")
    weizmann(folder / "data" / "k400", data / "weizmann")
    shutil.copy(next((folder / "data" / "k400" / "val").rglob("*.mp4")), here / "clip.mp4")
    (here / "hostfile").write_text("localhost slots=2\n")
    return here


def imagenet(demo: Path, to: Path) -> None:
    """Class folders for both splits, and the official flat val/ with both of its lists."""
    (to / "val").mkdir(parents=True)
    (to / "train").symlink_to(demo / "train")
    rows, numbers = ["ImageId,PredictionString"], []
    names = sorted(p.name for p in (demo / "val").iterdir())
    for i, file in enumerate(sorted((demo / "val").rglob("*.JPEG")), start=1):
        image, name = f"ILSVRC2012_val_{i:08d}", file.parent.name
        (to / "val" / f"{image}.JPEG").symlink_to(file)
        rows.append(f"{image},{name} 1 2 3 4")
        numbers.append(str(names.index(name) + 1))
    (to / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    (to / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(numbers) + "\n")
    synsets = [f"{name} {i} thing {i}" for i, name in enumerate(names, start=1)]
    (to / "map_clsloc.txt").write_text("\n".join(synsets) + "\n")


def kinetics(demo: Path, to: Path) -> None:
    """The official CSV files, videos in class folders."""
    to.mkdir(parents=True)
    for split_name, csv in (("train", "train.csv"), ("val", "val.csv")):
        (to / split_name).symlink_to(demo / split_name)
        rows = ["label,youtube_id,time_start,time_end,split"]
        for file in sorted((demo / split_name).rglob("*.mp4")):
            video, start, end = file.stem.rsplit("_", 2)
            rows.append(f"{file.parent.name},{video},{int(start)},{int(end)},{split_name}")
        (to / csv).write_text("\n".join(rows) + "\n")


def weizmann(demo: Path, to: Path) -> None:
    """Four classes and a CSV of their files."""
    to.mkdir(parents=True)
    rows = ["path,class,split"]
    for name in sorted(p.name for p in (demo / "train").iterdir())[:4]:
        (to / name).mkdir()
        for split_name in ("train", "val"):
            for file in sorted((demo / split_name / name).iterdir()):
                (to / name / file.name).symlink_to(file)
                rows.append(f"{name}/{file.name},{name},{split_name}")
    (to / "split.csv").write_text("\n".join(rows) + "\n")


def here(command: str, reader: Path, folder: Path) -> tuple[list[str], str, list[str]]:
    """(launcher, script, arguments) of a page's command, with the places that it has here."""
    launcher, script, arguments = split(command)
    if script is None:
        return launcher, "", arguments
    name, added = Path(script).stem, shlex.split(SMALL.get(Path(script).stem, ""))
    places = {
        "ds_configs/vitl.json": "config.json",
        "ds_configs/demo.json": str(folder / "config.json"),
        "ds_configs/weizmann_cifar10.json": str(ROOT / "ds_configs/weizmann_cifar10.json"),
        "/data/": f"{reader / 'data'}/",
        "/shards/": "shards/",
    }
    if name == "plan" or "--dry_run" in arguments:  # these need no data
        places["ds_configs/vitl.json"] = str(ROOT / "ds_configs/vitl.json")
        added = []
    if name == "index_data":
        added += [] if "--deepspeed_config" in arguments else ["--deepspeed_config", "config.json"]
        if "--dataset" in arguments and "--annotations" not in arguments and "imagenet" in command:
            places["/data/imagenet"] = str(folder / "data" / "imagenet")  # class folders
        added = [] if "--update" in arguments else added
    if name == "view_batch":  # it draws k400, the others' plain layouts are to be there
        places |= {f"/data/{d}": str(folder / "data" / d) for d in ("imagenet", "k600")}
    if name == "train" and launcher[0] == "deepspeed":
        places |= {f"/data/{d}": str(folder / "data" / d) for d in ("imagenet", "k600")}
        added += roots(folder) if "--resume" in arguments or "--hostfile" in launcher else []
        added += ["--set", "vimnas.output_dir=runs/hosts"] if "--hostfile" in launcher else []
    if name in ("consolidate", "report"):
        places |= {"runs/vitl": "runs/demo", "runs/vitl_state": "runs/vitl_state"}
    if name == "ranking" and "--from" in arguments:
        added += ["--out", "runs/demo/ranking_inherited"]
    return launcher, name, [replace_all(word, places) for word in arguments] + added


def roots(folder: Path) -> list[str]:
    names = ("imagenet", "k400", "k600", "ssv2")
    pairs = (("--set", f"vimnas.data.{name}.root={folder / 'data' / name}") for name in names)
    return [word for pair in pairs for word in pair]


def replace_all(word: str, places: dict[str, str]) -> str:
    for written in sorted(places, key=len, reverse=True):
        if written in word:
            return word.replace(written, places[written])
    return word


def run(command: Sequence[str], reader: Path, timeout: float) -> None:
    paths = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        command, cwd=reader, env=env, capture_output=True, text=True, timeout=timeout
    )
    said = done.stdout[-4000:] + done.stderr[-4000:]
    assert done.returncode == 0, f"{shlex.join(command)}\n{said}"


@pytest.mark.slow
def test_the_quick_commands_do_their_work_one_after_the_other(folder: Path, reader: Path) -> None:
    todo = []
    for command in quick():
        launcher, name, arguments = here(command, reader, folder)
        todo.append((name, arguments) if name else ("-c", launcher[2:]))
    # the doctor's findings are of a process that nothing ran in before
    together = [one for one in todo if one[0] != "doctor"]
    run([sys.executable, "-c", RUNNER, json.dumps(together)], reader, 500)
    for name, arguments in todo[len(together) :]:
        run([sys.executable, str(ROOT / f"scripts/{name}.py"), *arguments], reader, 100)
    assert [place for place in LEFT if not (reader / place).exists()] == []


@pytest.mark.endurance
def test_the_long_commands_do_their_work_one_after_the_other(folder: Path, reader: Path) -> None:
    """Training, resuming, rankings, benchmarks with one run each, TensorBoard's server."""
    arch = reader / "runs/demo/perturbation/arch.json"
    if not arch.exists():  # the quick ones write it
        arch.parent.mkdir(parents=True)
        space = json.loads((folder / "config.json").read_text())["vimnas"]["space"]
        assert space == "nano"
        arch.write_text('{"embed_dim": 48, "depth": 2, "num_heads": [1, 2], "mlp_ratio": [2, 4]}')
    found = the_commands()
    done = 0
    for beginning in LONG:
        for command in (c for c in found if c.startswith(beginning)):
            launcher, name, arguments = here(command, reader, folder)
            if launcher[0] == "tensorboard":
                see_tensorboard(launcher, reader)
            elif launcher[0] == "python":
                run([sys.executable, str(ROOT / f"scripts/{name}.py"), *arguments], reader, 400)
            else:
                runner = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher[1:]]
                runner += ["--master_port", str(free_port())]
                if "--hostfile" in launcher:  # of this machine alone, which has no ssh
                    runner += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
                run([*runner, str(ROOT / f"scripts/{name}.py"), *arguments], reader, 400)
            done += 1
    assert done == sum(is_long(c) for c in found) >= 10
    for place in ("runs/vitl/summary.json", "runs/hosts/summary.json", "runs/demo_subnet"):
        assert (reader / place).exists(), place
    assert (reader / "runs/demo/ranking/ranking.json").is_file()


def see_tensorboard(command: Sequence[str], reader: Path) -> None:
    """Its server has the run, and the first screen's charts."""
    port = free_port()
    words = [sys.executable, "-m", "tensorboard.main", *command[1:], "--port", str(port)]
    with subprocess.Popen(
        words, cwd=reader, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    address = f"http://127.0.0.1:{port}/data/plugin/custom_scalars/layout"
                    with urllib.request.urlopen(address, timeout=10) as answer:
                        layout = json.load(answer)
                except OSError:
                    assert time.monotonic() < deadline
                    assert server.poll() is None
                    time.sleep(0.5)
                else:
                    if layout:  # the run's files have been read
                        break
                    assert time.monotonic() < deadline
                    time.sleep(0.5)
        finally:
            server.terminate()
    titles = [category["title"] for category in layout["category"]]
    assert "accuracy on select" in titles
