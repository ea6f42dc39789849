"""The picture of a batch holds the pixels that a run trains on, and says what is wrong in words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import view_batch
from tests.media import encode
from tests.small import small_config
from vimnas_ds.config import load_config
from vimnas_ds.data.joint import Loaders, open_datasets
from vimnas_ds.report.pictures import captions, contact_sheet, under_titles
from vimnas_ds.train.objective import Objective


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """Noise in two classes; RandAugment and mixup on the images."""
    rng = np.random.default_rng(0)
    config = small_config(tmp_path / "run")
    data = config["vimnas"]["data"]
    data["index_dir"] = str(tmp_path / "indexes")
    data["held_out"] = 0.25
    for name, section in data["datasets"].items():
        section |= {"root": str(tmp_path / name), "num_classes": 2}
        for split, count in (("train", 12), ("val", 2)):
            for label in ("disc", "ring"):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for i in range(count):
                    noise = rng.integers(0, 256, (10, 48, 64, 3)).astype(np.uint8)
                    if name == "k400":
                        encode(folder / f"{label}{i}.mp4", list(noise), rate=8)
                    else:
                        Image.fromarray(noise[0]).save(folder / f"{label}{i}.png")
    data["datasets"]["imagenet"] |= {"randaugment": {"n": 2}, "mixup": 0.8}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    return file


def test_the_picture_is_the_batch_of_a_run_mixed_and_captioned(config_file: Path) -> None:
    out = config_file.parent / "new" / "batch.png"
    options = ["--deepspeed_config", str(config_file), "--batch", "3", "--out", str(out)]
    assert view_batch.main([*options, "--count", "3"]) == 0
    config = load_config(str(config_file))
    data = open_datasets(config.vimnas.data)
    loaders = Loaders(data, config.vimnas.seed, 0, 2, torch.device("cpu"))  # 4 of 8 samples a rank
    sheets = {}
    for name, section in config.vimnas.data.datasets.items():
        batch = loaders.batch(name, "train", 8, 3)
        x, y = Objective(section).mix(batch.x.clone(), batch.y, 3)
        assert torch.equal(x, batch.x) == (name == "k400")
        shown = captions(y, ["disc", "ring"])
        labels = [f"{a} | {Path(b).name}" for a, b in zip(shown, batch.names, strict=True)]
        side = 224 if section.is_image else 112
        sheets[name] = contact_sheet(x, labels, max_samples=3, min_side=side)
    loaders.close()
    picture = np.asarray(Image.open(out))
    titles = {
        "imagenet: train batch 3, 32 x 32, mixup 0.8": sheets["imagenet"],
        "k400: train batch 3, 32 x 32, 8 frames at 8 fps": sheets["k400"],
    }
    np.testing.assert_array_equal(picture, under_titles(titles))


def test_evaluation_shows_the_split_in_order_and_what_cannot_be_shown_is_said(
    config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def spy(x: torch.Tensor, labels: list[str], **options: int) -> np.ndarray:
        seen.append(labels)
        return contact_sheet(x, labels, **options)

    monkeypatch.setattr(view_batch, "contact_sheet", spy)
    out = config_file.parent / "batch.png"
    options = ["--deepspeed_config", str(config_file), "--out", str(out), "--split", "test"]
    assert view_batch.main([*options, "--dataset", "k400", "--batch", "1", "--count", "3"]) == 0
    assert seen == [["ring | ring1.mp4"]]
    capsys.readouterr()
    for wrong, words in (
        (["--dataset", "k401"], "--dataset k401: .* has imagenet, k400"),
        (["--batch", "9"], "imagenet: --batch 9 begins at sample 72 of test, which has 4"),
        (["--set", "vimnas.data.k400.root=/nowhere"], "k400: .*/nowhere"),
    ):
        assert view_batch.main([*options, *wrong]) == 2
        assert re.search(words, capsys.readouterr().err)
