"""Files that an export is asked to classify: what cannot be used is said in words."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scripts import predict as script
from tests.conftest import ROOT, SHARED_DATA
from tests.media import encode, numbered
from vimnas_ds import predict
from vimnas_ds.data.bad import BadFile
from vimnas_ds.export import ExportError, export_subnet, load_subnet, read_json
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.subnet import SubNetwork
from vimnas_ds.predict import Classifier, is_picture, read_input
from vimnas_ds.space import Arch
from vimnas_ds.tubes import TokenGeometry, Tube

PICTURE = {"frames": None, "size": 8, "resize": 8, "mean": (0, 0, 0), "std": (1, 1, 1)}
LABELS = {"imagenet": list("abcdefg"), "k400": ["run", "sit", "swim", "walk", "wave"]}
ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys(("deepspeed", "nvidia", "nvidia.dali")))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def supernet(build_supernet):
    return build_supernet()


@pytest.fixture
def exported(supernet, tmp_path: Path) -> Path:
    """An image head and one of clips of 8 frames."""
    steps = {"size": 32, "resize": 40, "frames": None, "fps": None}
    preprocess = {"imagenet": steps, "k400": {**steps, "frames": 8, "fps": 8.0}}
    net = supernet.extract(supernet.space.largest())
    export_subnet(net, tmp_path / "export", LABELS, preprocess, {})
    return tmp_path / "export"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return encode(tmp_path / "clip.mp4", numbered(16, 96, 160), rate=8)


def test_a_file_is_classified_from_the_export_alone(exported, clip, supernet, tmp_path):
    command = [sys.executable, "-c", ALONE, str(ROOT / "scripts/predict.py"), str(exported)]
    command += [str(clip), "--json", "--top", "3", "--strip", str(tmp_path / "new/strip.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["heads"].values()
    x = read_input(clip, read_json(exported, "preprocess.json")["k400"])
    with torch.no_grad():
        expected = supernet(x, supernet.space.largest(), "k400").softmax(-1)[0].topk(3)
    assert [f["label"] for f in found] == [LABELS["k400"][i] for i in expected.indices]
    assert [f["probability"] for f in found] == pytest.approx(expected.values.tolist(), abs=1e-5)
    # frames 4 to 11 of 16, the middle of the video; frame i has the brightness 10 + 7 i
    strip = np.asarray(Image.open(tmp_path / "new/strip.png").convert("L")).astype(float)
    row = strip[-60]
    shown = [row[4 + i * 132 + 64] for i in range(8)]  # 32 pixels four times as large, gaps of 4
    assert shown == pytest.approx([10 + 7 * i for i in range(4, 12)], abs=3)


def test_a_clip_is_scaled_while_it_is_decoded(exported, clip, monkeypatch):
    shapes = []

    def watched(*args):
        pixels = read_clip(*args)
        shapes.append(pixels.shape)
        return pixels

    read_clip = predict.read_clip
    monkeypatch.setattr(predict, "read_clip", watched)
    assert Classifier(exported)(clip, "k400").seen.shape == (1, 3, 8, 32, 32)
    assert shapes == [(8, 3, 40, 67)]  # of 96 x 160


def test_every_head_that_takes_the_file_answers(exported, clip, tmp_path, capsys):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    frames = [Image.new("L", (40, 40), 20 * i) for i in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for file, head in ((clip, "k400"), (tmp_path / "red.png", "imagenet"),
                       (tmp_path / "moving.gif", "k400")):  # fmt: skip
        assert script.main([str(exported), str(file), "--top", "99"]) == 0
        first, *lines = capsys.readouterr().out.splitlines()
        assert first == f"{file.name}, {head}:"
        assert sorted(line.split()[-1] for line in lines) == LABELS[head]
        assert sum(float(line.split()[0][:-1]) for line in lines) == pytest.approx(100, abs=0.5)


def test_what_cannot_be_classified_is_said_in_words(exported, clip, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.jpg")
    whole = (tmp_path / "picture.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "half.mp4").write_bytes(clip.read_bytes()[:500])
    (tmp_path / "notes.txt").write_text("neither")
    cases = [
        ("picture.jpg", "k400", f"a picture: the head k400 of {exported} takes videos only"),
        ("clip.mp4", "imagenet", "not a picture: the head imagenet of"),
        ("clip.mp4", "ssv2", "has no head 'ssv2'; it has imagenet, k400"),
        ("half.jpg", "imagenet", "half.jpg: "),
        ("half.mp4", "k400", "half.mp4: not a picture, and cannot be read as a video: "),
        (
            "notes.txt",
            "k400",
            "notes.txt: not a picture, and cannot be read as a video: Invalid data",
        ),
        ("gone.mp4", "k400", "gone.mp4: No such file"),
        (".", "k400", "Is a directory"),
    ]
    for name, head, words in cases:
        assert script.main([str(exported), str(tmp_path / name), "--dataset", head]) == 2
        said = capsys.readouterr().err
        assert said.startswith("cannot classify: ")
        assert words in said
    assert script.main([str(tmp_path), str(clip)]) == 2
    assert "is not an exported sub-network" in capsys.readouterr().err
    (tmp_path / "checkpoints").mkdir()
    assert script.main([str(tmp_path), str(clip)]) == 2
    assert (
        f"it is a run; python scripts/export.py --checkpoint {tmp_path}" in capsys.readouterr().err
    )


IMAGE, CLIP = ("preprocess.json", "imagenet"), ("preprocess.json", "k400")
ARCH, TUBE = ("arch.json",), ("arch.json", "tubes", 0)
#: (the file and where in it, what is written there, what is said)
SPOILT = [
    ((*IMAGE, "size"), 0, "imagenet.size must be a whole number of at least 1, got 0"),
    ((*IMAGE, "size"), 7, "does not fit an input of (1, 7, 7)"),
    ((*IMAGE, "size"), 10**12, f"size {10**12}, resize 40 and frames None make inputs of more"),
    ((*IMAGE, "resize"), "40", "imagenet.resize must be a whole number of at least 1, got '40'"),
    ((*IMAGE, "mean"), [0.5, 0.5], "imagenet.mean must be three finite numbers, got [0.5, 0.5]"),
    ((*IMAGE, "mean"), None, "imagenet.mean must be three finite numbers, got None"),
    ((*IMAGE, "mean", 1), math.nan, "imagenet.mean must be three finite numbers"),
    ((*IMAGE, "std"), [0, 0, 0], "imagenet.std must be three positive, finite numbers"),
    ((*IMAGE, "std"), [1e-320] * 3, "its probabilities for"),
    ((*CLIP, "frames"), 0, "k400.frames must be a whole number of at least 1, got 0"),
    ((*CLIP, "frames"), True, "k400.frames must be a whole number of at least 1, got True"),
    ((*CLIP, "frames"), 10**9, "make inputs of more"),
    ((*CLIP, "fps"), None, "k400.fps must be a positive number with frames, got None"),
    ((*CLIP, "fps"), 0, "k400.fps must be a positive number with frames, got 0"),
    (CLIP, {"size": 32}, "k400 has no fps, frames, mean, resize, std"),
    (("preprocess.json",), [], "preprocess.json: it says nothing of the head imagenet"),
    (("labels.json", "k400"), list("abcdef"), "k400 has 6 class names, the network 5 classes"),
    (("labels.json", "imagenet"), list("abcdefgh"), "imagenet has 8 class names, the network 7"),
    (("labels.json", "k400"), "a walk", "k400 must be a list of class names"),
    ((*ARCH, "position_dim"), 0, "position_dim must be a whole number of at least 64, got 0"),
    ((*ARCH, "position_dim"), 10**12, "position_dim must be at most 65536, got"),
    ((*ARCH, "position_dim"), 1e30, "position_dim must be a whole number"),
    ((*ARCH, "head_dim"), -16, "head_dim must be a whole number of at least 1, got -16"),
    ((*ARCH, "image_tube"), 0.5, "image_tube must be a whole number of at least 0, got 0.5"),
    ((*TUBE, "stride"), [0, 8, 8], "tubes[0].stride must be a whole number of at least 1, got 0"),
    ((*TUBE, "kernel"), [8], "tubes[0].kernel must be three numbers, got [8]"),
    ((*ARCH, "arch", "mlp_ratio", 1), math.inf, "arch.mlp_ratio[1] must be a positive number"),
    ((*ARCH, "arch", "mlp_ratio", 1), 10**400, "int too large"),
    ((*ARCH, "arch", "num_heads", 0), 0, "arch.num_heads[0] must be a whole number of at least 1"),
    ((*ARCH, "num_classes"), {"../x": 7, "k400": 5}, "'../x' is no name: letters, digits and _"),
    ((*ARCH, "num_classes"), {"/tmp/x": 7, "k400": 5}, "'/tmp/x' is no name"),
    ((*ARCH, "num_classes", "k400"), -5, "num_classes.k400 must be a whole number"),
]


@pytest.mark.parametrize(("place", "value", "said"), SPOILT, ids=[s[-1] for s in SPOILT])
def test_exports_that_are_malformed_are_refused_in_words(
    place, value, said, exported, tmp_path, capsys
):
    file, *keys = place
    found = {"": read_json(exported, file)}
    inner = functools.reduce(lambda held, key: held[key], ["", *keys][:-1], found)
    inner[["", *keys][-1]] = value
    (exported / file).write_text(json.dumps(found[""]))
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.jpg")
    assert script.main([str(exported), str(tmp_path / "picture.jpg"), "--top", "99"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"cannot classify: {exported}")
    assert said in error


def test_inputs_that_the_network_does_not_take_are_refused_when_it_is_opened(
    exported, tmp_path, monkeypatch
):
    options = ModelOptions(positions="learned", relative_positions=2, class_token=True, side=4)
    patches = TokenGeometry((Tube((1, 8, 8), (1, 8, 8)),), 0)
    net = SubNetwork(Arch(16, 1, (2,), (2,)), 8, patches, {"imagenet": 7}, options, 16)
    steps = {"size": 32, "resize": 40, "frames": None, "fps": None}
    labels = {"imagenet": LABELS["imagenet"]}
    for change, said in (({}, ""), ({"size": 40}, "pictures of 4 x 4 patches, not size 40"),
                         ({"frames": 8, "fps": 8.0}, "not size 32 and frames 8")):  # fmt: skip
        export_subnet(net, tmp_path / "theirs", labels, {"imagenet": {**steps, **change}}, {})
        with pytest.raises(ExportError, match=said) if said else contextlib.nullcontext():
            Classifier(tmp_path / "theirs")
    about = read_json(tmp_path / "theirs", "arch.json")
    for key in ("side", "relative_positions"):
        spoilt = {**about, key: 2.5}
        (tmp_path / "theirs" / "arch.json").write_text(json.dumps(spoilt))
        with pytest.raises(ExportError, match=f"{key} must be a whole number"):
            Classifier(tmp_path / "theirs")
    monkeypatch.setattr(predict, "MAX_TOKENS", 15)
    with pytest.raises(ExportError, match="size 32 and frames None make 16 tokens"):
        Classifier(exported)


def test_weights_that_cannot_answer_are_refused_in_words(exported, tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.jpg")
    weights = load_file(exported / "model.safetensors")
    bad = {"not numbers": {**weights, "norm.bias": weights["norm.bias"] * math.nan},
           "cannot classify": {name: w.double() for name, w in weights.items()}}  # fmt: skip
    for said, tensors in bad.items():
        save_file(tensors, exported / "model.safetensors")
        assert script.main([str(exported), str(tmp_path / "picture.jpg")]) == 2
        assert said in capsys.readouterr().err.removeprefix("cannot classify: ")


def test_pictures_are_resized_by_the_filter_that_the_export_names(exported, tmp_path):
    squares = np.random.default_rng(0).integers(0, 2, (15, 20, 3), dtype=np.uint8) * 255
    pixels = squares.repeat(6, 0).repeat(6, 1)  # black and white: the bicubic filter overshoots
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    steps = read_json(exported, "preprocess.json")["imagenet"]
    assert steps["interpolation"] == "bilinear"
    mean, std = (torch.tensor(steps[key]).view(3, 1, 1) for key in ("mean", "std"))
    for name, pillow in (("bilinear", Image.BILINEAR), ("bicubic", Image.BICUBIC)):
        seen = read_input(tmp_path / "noise.png", {**steps, "interpolation": name})[0]
        small = Image.fromarray(pixels).resize((53, 40), pillow)  # Pillow's is antialiased
        wanted = torch.from_numpy(np.array(small)).permute(2, 0, 1)[:, 4:36, 11:43]
        assert ((seen * std + mean) * 255 - wanted).abs().max() < 2
    del steps["interpolation"]  # as exports of an earlier version
    assert read_input(tmp_path / "noise.png", steps).shape == (1, 3, 32, 32)
    with pytest.raises(ExportError, match="interpolation 'nearest' is not bilinear or bicubic"):
        read_input(tmp_path / "noise.png", {**steps, "interpolation": "nearest"})


def test_an_export_of_an_earlier_version_is_what_it_was(exported, supernet):
    about = json.loads((exported / "arch.json").read_text())
    for key in ("gelu", "norm_eps", "class_token", "positions", "relative_positions", "side"):
        del about[key]
    (exported / "arch.json").write_text(json.dumps(about))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = supernet(x, supernet.space.largest(), "imagenet")
        torch.testing.assert_close(load_subnet(exported)(x, "imagenet"), expected)


def test_whoever_may_read_the_folder_may_read_the_weights(exported):
    assert len({file.stat().st_mode for file in exported.iterdir()}) == 1


def test_a_file_that_no_head_takes_names_them_all(supernet, tmp_path, clip, capsys):
    steps = {"size": 32, "resize": 40, "frames": None, "fps": None}
    net = supernet.extract(supernet.space.smallest())
    export_subnet(net, tmp_path / "e", LABELS, {"imagenet": steps, "k400": steps}, {})
    assert script.main([str(tmp_path / "e"), str(clip)]) == 2
    assert "not a picture: the heads imagenet, k400 of" in capsys.readouterr().err


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


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="no real files beside this checkout")
def test_real_files_are_classified_or_refused_in_words(exported):
    classifier = Classifier(exported)
    refused = {}
    files = sorted((SHARED_DATA / "awkward").iterdir())
    files += [next((SHARED_DATA / "weizmann").rglob("*.mp4"))]
    files += [next((SHARED_DATA / "cifar10").rglob("*.jp*g"))]
    for file in files:
        head = "imagenet" if is_picture(file) else "k400"
        try:
            assert sum(classifier(file, head, 7).probabilities) == pytest.approx(1, abs=1e-4)
        except BadFile as err:
            refused[file.name] = err.reason
    assert len(refused) < len(files) / 2
    assert "Invalid data" in refused["derived__text_file_named.mp4"]
    assert "no video stream" in refused["media3__sample_audio_only.mp4"]
