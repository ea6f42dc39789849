"""What README.md and docs/ say exists: scripts, options, keys, links; and their commands run."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import make_docs
from tests.conftest import ROOT
from vimnas_ds.config import DataSection, load_config

PAGES = {path.relative_to(ROOT): path.read_text() for path in (ROOT / "docs").glob("*.md")}
PAGES[Path("README.md")] = (ROOT / "README.md").read_text()
#: What may stand before a script, with the options that the pages give it.
LAUNCHERS = {
    "python": set[str](),
    "deepspeed": {"--num_gpus", "--hostfile"},
    "torchrun": {"--nnodes", "--nproc_per_node"},
}
OTHERS = {"make", "tensorboard", "pip"}


def code_blocks(text: str) -> list[str]:
    """The ``` blocks that hold commands (those of ```text do not), lines joined at backslashes."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\\\n\s*", "", block) for language, block in blocks if language != "text"]


def commands() -> list[tuple[Path, str]]:
    return [
        (page, line)
        for page, text in sorted(PAGES.items())
        for block in code_blocks(text)
        for line in block.splitlines()
        if line.strip()
    ]


class Captured(Exception):
    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def parser_of(script: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The parser that scripts/SCRIPT.py builds, taken at the moment it is to be used."""

    def stop(parser: argparse.ArgumentParser, *_: object) -> argparse.Namespace:
        raise Captured(parser)

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module(script)
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(Captured) as captured:
            module.main([])
    return captured.value.parser


def split(command: str) -> tuple[list[str], str | None, list[str]]:
    """(launcher and its options, script, the script's arguments)."""
    words = shlex.split(command, comments=True)
    at = next((i for i, word in enumerate(words) if word.startswith("scripts/")), None)
    if at is None:
        return words, None, []
    return words[:at], words[at], words[at + 1 :]


def test_every_command_of_the_pages_is_one_that_its_script_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parsers = dict[str, argparse.ArgumentParser]()
    checked = 0
    for page, command in commands():
        launcher, script, arguments = split(command)
        where = f"{page}: {command}"
        if script is None:
            assert launcher[0] in OTHERS or launcher[:2] == ["python", "-c"], where
            if launcher[0] == "make":
                assert f"\n{launcher[1]}:" in (ROOT / "Makefile").read_text(), where
            continue
        assert launcher[0] in LAUNCHERS, where
        options = {word for word in launcher if word.startswith("-")}
        assert options <= LAUNCHERS[launcher[0]], where
        assert (ROOT / script).is_file(), where
        name = Path(script).stem
        if name not in parsers:
            parsers[name] = parser_of(name, monkeypatch)
        try:
            found = parsers[name].parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{where}\n{capsys.readouterr().err}")
        if config := vars(found).get("deepspeed_config"):
            overrides = [] if name == "index_data" else getattr(found, "set", [])
            load_config(ROOT / config, overrides)  # every --set is a key with a fitting value
        checked += 1
    assert checked > 30


def test_every_option_named_with_its_script_in_the_text_exists(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`evolve.py --params --gflops` within a sentence: the words may be placeholders."""
    parsers = dict[str, argparse.ArgumentParser]()
    for page, text in PAGES.items():
        for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            named = re.match(
                r"(?:python |deepspeed )?(?:scripts/)?(\w+)\.py\b(.*)", span, re.DOTALL
            )
            if not named or not (ROOT / f"scripts/{named[1]}.py").is_file():
                assert not (named and span.startswith(("python ", "scripts/"))), f"{page}: {span}"
                continue
            options = re.findall(r"--\w+", named[2])
            if options and named[1] not in parsers:
                parsers[named[1]] = parser_of(named[1], monkeypatch)
            for option in options:
                known = parsers[named[1]]._option_string_actions
                assert option in known, f"{page}: {span}: no {option}"


def test_every_key_named_is_one_of_the_schema() -> None:
    sections = {path: set(schema["properties"]) for path, schema in make_docs.Schema().sections}
    checked = 0
    for page, text in PAGES.items():
        for key in re.findall(r"(?<![\w#.])vimnas((?:\.[A-Za-z0-9_]+(?:\[\])?)+)", text):
            parts = key.split(".")[1:]
            if parts[0] == "data" and len(parts) > 1:
                if parts[1] == "datasets" and len(parts) > 2:
                    parts[2] = "NAME"
                elif parts[1] not in DataSection.model_fields:
                    parts[1:2] = ["datasets", "NAME"]
            path = ".".join(["vimnas", *parts])
            parent, _, last = path.rpartition(".")
            assert path in sections or last in sections.get(parent, ()), f"{page}: vimnas{key}"
            checked += 1
    assert checked > 40


def links(text: str) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            yield target


def test_every_link_leads_somewhere() -> None:
    for page, text in PAGES.items():
        for target in links(text):
            file, _, fragment = target.partition("#")
            to = (ROOT / page.parent / file).resolve() if file else ROOT / page
            assert to.is_file(), f"{page}: {target}"
            if fragment:
                headings = re.findall(r"^#+ (.+)$", to.read_text(), re.MULTILINE)
                assert fragment in {make_docs.anchor(h) for h in headings}, f"{page}: {target}"


def test_the_configuration_page_is_what_the_schema_gives() -> None:
    assert make_docs.main(["--check"]) == 0


def test_the_readme_opens_with_the_two_commands() -> None:
    assert code_blocks(PAGES[Path("README.md")])[0].split("\n")[:2] == ["make demo", "make test"]


#: Commands of the pages that are run, in this order, by their beginnings (the first that fits).
RUN = (
    "scripts/index_data.py --dataset k400",
    "scripts/index_data.py --update",
    "scripts/make_shards.py --index",
    "scripts/view_batch.py",
    "scripts/plan.py",
    "scripts/train.py --deepspeed_config ds_configs/vitl.json --dry_run",
    "scripts/perturb_select.py",
    "scripts/evolve.py --checkpoint runs/demo --params",
    "scripts/evolve.py --checkpoint runs/demo --pareto",
    "scripts/evaluate.py",
    "scripts/export.py --checkpoint runs/demo --arch runs/demo",
    "scripts/predict.py exports/mine",
    "scripts/report.py",
    "scripts/consolidate.py",
    "scripts/doctor.py --only",
)
#: What makes a command small enough for a test.
SMALL = {
    "index_data": "--index_dir indexes",
    "view_batch": "--count 2",
    "perturb_select": "--samples 8",
    "evolve": "--samples 8 --population 4 --generations 2 --top_k 2 --crossovers 1 --mutations 1",
    "evaluate": "--single_view",
    "export": "--formats torch_export",
    "report": "--clips 4",
}
#: What a script leaves behind, under the folder that the commands run in.
LEFT = (
    "indexes/k400.parquet",
    "shards/k400/index.parquet",
    "runs/view_batch.png",
    "runs/demo/perturbation/arch.json",
    "runs/demo/evolution/arch.json",
    "runs/demo/front/front.json",
    "runs/demo/evaluation.json",
    "exports/mine/arch.json",
    "seen.png",
    "runs/demo/report.html",
    "vitl_state/supernet.safetensors",
)
#: One process for all commands: most of a command's time is imports.
RUNNER = """
import importlib, json, sys
for script, arguments in json.loads(sys.argv[1]):
    print("==", script, *arguments, flush=True)
    code = importlib.import_module(script).main(arguments)
    if code:
        sys.exit(f"{script} ended with {code}")
"""


@pytest.mark.slow
def test_the_commands_of_the_pages_do_their_work_one_after_the_other(
    folder: Path, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "runs" / "demo")
    clip = next((folder / "data" / "k400" / "val").rglob("*.mp4"))
    config = json.loads((folder / "config.json").read_text())
    for dataset in config["vimnas"]["data"]["datasets"].values():
        dataset |= {"root": None, "reference_files": 80}  # as in vitl.json
    (tmp_path / "config.json").write_text(json.dumps(config))
    places = {
        "ds_configs/vitl.json": "config.json",
        "/data/": f"{folder / 'data'}/",
        "/shards/": "shards/",
        "clip.mp4": str(clip),
        "runs/vitl": "runs/demo",
    }
    known = [line for _, line in commands()]
    todo = []
    for beginning in RUN:
        command = next(line for line in known if f" {beginning}" in f" {line}")
        _, script, arguments = split(command)
        assert script is not None
        name = Path(script).stem
        arguments = [replace_all(word, places) for word in arguments]
        if name == "index_data" and "--update" not in arguments:
            arguments += ["--deepspeed_config", "config.json"]
        if "--update" not in arguments:
            arguments += shlex.split(SMALL.get(name, ""))
        todo.append((name, arguments))
    paths = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(todo)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert [place for place in LEFT if not (tmp_path / place).exists()] == []


def replace_all(word: str, places: dict[str, str]) -> str:
    for written, here in places.items():
        word = word.replace(written, here)
    return word
