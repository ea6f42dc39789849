"""Broken files in evaluation: what ends a run, and what the report says of the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from scripts.train import run
from tests.media import section
from vimnas_ds.config import DataSection
from vimnas_ds.data.bad import DataMissing, TooManyBadFiles
from vimnas_ds.data.catalog import Catalog, Sample
from vimnas_ds.data.joint import JointData, Loaders
from vimnas_ds.train import faults
from vimnas_ds.train.evaluate import Evaluator
from vimnas_ds.train.faults import FaultReport
from vimnas_ds.train.ranks import Ranks, StopAsked
from vimnas_ds.train.status import Exit

CPU = torch.device("cpu")


def evaluator(root: Path, max_bad_share: float) -> Evaluator:
    """Of sixty files, every tenth broken."""
    samples = [Sample(f"{i}.png", 0) for i in range(60)]
    for i, sample in enumerate(samples):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / sample.path)
        if i % 10 == 0:
            (root / sample.path).write_bytes(b"no picture any more")
    data = JointData(
        DataSection(datasets={"toy": section(root)}, workers=1, max_bad_share=max_bad_share),
        {"toy": Catalog("toy", root, ("a",), (), ())},
        {"toy": {"select": samples}},
        {"toy": 0},
    )
    return Evaluator(Loaders(data, 0, 0, 1, CPU), Ranks(0, 1, CPU), torch.float32, 20, 0)


def score(one: Evaluator) -> int:
    try:
        found = one.outcomes({"net": lambda x: torch.zeros(len(x), 8)}, "toy", "select")
        return len(found["net"].loss)
    finally:
        one.loaders.close()


def test_an_evaluation_leaves_out_as_many_files_as_allowed_and_no_more(tmp_path: Path) -> None:
    assert score(evaluator(tmp_path, 0.2)) == 54
    with pytest.raises(TooManyBadFiles, match=r"toy: 6 of 60 samples .*max_bad_share"):
        score(evaluator(tmp_path, 0.05))


def test_an_evaluation_is_given_up_between_batches_and_its_split_read_anew(tmp_path: Path) -> None:
    one = evaluator(tmp_path, 0.2)
    one._room = 2**20  # decoded batches are kept, if all of them are there
    answers = iter([False, True])
    one.give_up = lambda: next(answers)
    forwards = {"net": lambda x: torch.zeros(len(x), 8)}
    with pytest.raises(StopAsked):
        one.scores(forwards, "toy", "select")
    one.give_up = lambda: False
    assert one.scores(forwards, "toy", "select")["net"].count == 54
    one.loaders.close()


def test_a_folder_that_is_gone_at_an_evaluation_ends_training_in_words() -> None:
    def train() -> None:
        raise DataMissing("toy: no file of the select split could be read")

    def fail(error: BaseException, code: Exit) -> None:
        raise SystemExit(f"{code:d} {error}")

    trainer: Any = SimpleNamespace(run=train)
    watch: Any = SimpleNamespace(fail=fail)
    with pytest.raises(SystemExit, match="3 toy: no file of the select split could be read"):
        run(trainer, watch)


def test_counts_go_on_where_the_checkpoint_left_them_and_new_files_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faults, "gather_objects", lambda mine: [mine, mine])
    told: list[Any] = []
    board = SimpleNamespace(
        unusable=lambda *values: told.append(values), faults=print, fault_reasons=print
    )
    loaders = SimpleNamespace(
        substitutions=lambda: {"k400": {"a.mp4": "cut"}},
        replaced=lambda: {"k400": 3},
        fallbacks=lambda: {"k400": 1},
        reasons=lambda: {"k400": {"cut": 3}},
    )
    one = SimpleNamespace(skipped={"k400": {"b.mp4": "empty"}})
    console = SimpleNamespace(say=lambda line: None)

    def report(before: dict[str, Any] | None) -> dict[str, Any]:
        parts: Any = (loaders, one, console, board)
        found = FaultReport(*parts, before)
        found.report(7)
        found.report(8)
        return found.state_dict()

    first = report(None)
    assert first == {
        "replaced": {"k400": 6},
        "slow_batches": {"k400": 2},
        "left_out": {"k400": ["b.mp4"]},
        "reasons": {"k400": {"cut": 6}},
        "named": [("k400", "a.mp4"), ("k400", "b.mp4")],
    }
    lines = ["a.mp4 is unusable and replaced (rank 0): cut"]
    lines.append("b.mp4 is unusable and left out (rank 0): empty")
    assert told == [(7, "k400", lines)]
    second = report(first)
    assert second["replaced"] == {"k400": 12}
    assert second["slow_batches"] == {"k400": 4}
    assert second["reasons"] == {"k400": {"cut": 12}}
    assert second["left_out"] == first["left_out"]
    assert len(told) == 1  # the resumed run does not name them again
