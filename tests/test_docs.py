"""What README.md and docs/ say exists: scripts, options, keys, links."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
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
