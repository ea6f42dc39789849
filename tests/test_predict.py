"""Files that an export is asked to classify: what cannot be used is a `BadFile`, in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vimnas_ds.data.bad import BadFile
from vimnas_ds.predict import read_input

PICTURE = {"frames": None, "size": 8, "resize": 8, "mean": (0, 0, 0), "std": (1, 1, 1)}


def test_pictures_that_pillow_refuses_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    assert read_input(tmp_path / "large.png", PICTURE).shape == (1, 3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a decompression bomb to Pillow
    for name, words in (("large.png", "decompression bomb"), ("text.png", "not an image"),
                        ("gone.png", "No such file")):  # fmt: skip
        with pytest.raises(BadFile, match=words):
            read_input(tmp_path / name, PICTURE)
