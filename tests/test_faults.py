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
from vimnas_ds.train.evaluate import Evaluator
from vimnas_ds.train.ranks import Ranks

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


def test_a_folder_that_is_gone_at_an_evaluation_ends_training_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scripts.train.dist.destroy_process_group", lambda: None)
    said: list[str] = []

    def train() -> None:
        raise DataMissing("toy: no file of the select split could be read")

    trainer: Any = SimpleNamespace(
        run=train, close=lambda: None, console=SimpleNamespace(say=said.append)
    )
    assert run(trainer, "1") == 3
    assert said == ["stopped: toy: no file of the select split could be read"]
    assert capsys.readouterr().err.startswith("rank 1 stopped: toy: no file of the select")
