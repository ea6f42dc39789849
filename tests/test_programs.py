"""Heads as programs: the same logits without this package, at any batch size."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from scripts.export import FORMATS, Trained, write_heads
from tests.conftest import SMALL_TUBES, clip_batch, image_batch
from vimnas_ds.export import ExportError
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.programs import CannotExpress, Head, write_onnx, write_torch_export
from vimnas_ds.space import Arch
from vimnas_ds.timm_vit import write_timm
from vimnas_ds.tubes import TokenGeometry, Tube

ARCH = Arch(48, 3, (2, 1, 2), (4, 2, 2))
ALIKE = Arch.uniform(32, 3, 2, 4)  # 2 heads of 16
INPUTS = {"imagenet": image_batch(batch=5), "k400": clip_batch(batch=5)}
FRAMES_OF_TWO = TokenGeometry((Tube((2, 8, 8), (2, 8, 8)),), image_tube=0)
OVERLAPPING = TokenGeometry((Tube((1, 8, 8), (1, 4, 4)),), image_tube=0)

ALONE = """
import sys
sys.modules.update(dict.fromkeys(("vimnas_ds", "deepspeed", "einops", "timm")))
import onnxruntime, torch
program = torch.export.load("torch_export/NAME.pt2").module()
session = onnxruntime.InferenceSession("onnx/NAME.onnx")
pixels = torch.load("NAME.pt", weights_only=True)
found = [[program(x), torch.from_numpy(session.run(None, {"pixels": x.numpy()})[0])]
         for x in (pixels, pixels[:1])]
torch.save([found, session.get_inputs()[0].shape], "NAME.found.pt")
"""


@pytest.mark.parametrize("name", ["imagenet", "k400"])
def test_programs_have_the_supernets_logits_without_this_package(build_supernet, tmp_path, name):
    supernet, x = build_supernet(), INPUTS[name]
    head = Head(supernet.extract(ARCH), name, tuple(x.shape[2:]))
    write_torch_export(head, tmp_path)
    write_onnx(head, tmp_path)
    torch.save(x, tmp_path / f"{name}.pt")
    command = [sys.executable, "-c", ALONE.replace("NAME", name)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, shape = torch.load(tmp_path / f"{name}.found.pt", weights_only=True)
    expected = supernet(x, ARCH, name)
    for logits, wanted in zip(found, (expected, expected[:1]), strict=True):
        for each in logits:
            torch.testing.assert_close(each, wanted, atol=1e-5, rtol=1e-5)
    assert shape == ["batch", *x.shape[1:]]


def test_a_program_holds_the_weights_of_its_own_head_alone(build_supernet, tmp_path):
    net = build_supernet().extract(ARCH)
    sizes = {
        name: sum(p.numel() for p in Head(net, name, tuple(x.shape[2:])).program.parameters())
        for name, x in INPUTS.items()
    }
    whole = sum(p.numel() for p in net.parameters())
    heads = {name: sum(p.numel() for p in net.heads[name].parameters()) for name in INPUTS}
    video_only = sum(p.numel() for i in (0, 1) for p in net.tokens.tubes[i].parameters())
    assert sizes["imagenet"] == whole - heads["k400"] - video_only
    assert sizes["k400"] == whole - heads["imagenet"]
    write_torch_export(Head(net, "k400", (8, 32, 32)), tmp_path)
    members = zipfile.ZipFile(tmp_path / "torch_export/k400.pt2").infolist()
    weights = [m.file_size for m in members if "/weights/" in m.filename]
    assert sum(weights) >= 4 * sizes["k400"]
    assert max(m.file_size for m in members if "sample_inputs" in m.filename) < 10_000


@pytest.mark.parametrize(
    ("options", "geometry"),
    [
        (ModelOptions(qk_norm=True, layer_scale=0.5), SMALL_TUBES),
        (ModelOptions(), FRAMES_OF_TWO),
        (ModelOptions(gelu="erf", class_token=True, packed_qkv_bias=True), SMALL_TUBES),
        (ModelOptions(class_token=True, positions="learned", side=4), SMALL_TUBES),
    ],
)
def test_timms_vision_transformer_has_the_supernets_logits(
    build_supernet, tmp_path, options, geometry
):
    from timm.models.vision_transformer import VisionTransformer

    supernet, x = build_supernet(options, geometry), INPUTS["imagenet"]
    write_timm(Head(supernet.extract(ALIKE), "imagenet", (32, 32)), tmp_path)
    model = VisionTransformer(**json.loads((tmp_path / "timm/imagenet.json").read_text()))
    model.load_state_dict(load_file(str(tmp_path / "timm/imagenet.safetensors")))
    expected = supernet(x, ALIKE, "imagenet")
    torch.testing.assert_close(model.eval()(x), expected, atol=1e-5, rtol=1e-5)


def test_what_timm_cannot_express_is_refused_in_words(build_supernet, tmp_path):
    cases = [
        (replace(ALIKE, num_heads=(2, 1, 2)), "imagenet", SMALL_TUBES, "num_heads is 2, 1, 2"),
        (replace(ALIKE, mlp_ratio=(4, 2, 2)), "imagenet", SMALL_TUBES, "mlp_ratio is 4, 2, 2"),
        (replace(ALIKE, embed_dim=48), "imagenet", SMALL_TUBES, "2 heads of 16 are not 48"),
        (ALIKE, "imagenet", OVERLAPPING, "neither overlap nor leave gaps"),
        (ALIKE, "k400", SMALL_TUBES, "this head takes clips"),
    ]
    for arch, name, geometry, words in cases:
        net = build_supernet(geometry=geometry).extract(arch)
        with pytest.raises(CannotExpress, match=words):
            write_timm(Head(net, name, tuple(INPUTS[name].shape[2:])), tmp_path)
    for options, words in (
        (ModelOptions(relative_positions=2, side=4), "has no relative positions"),
        (ModelOptions(norm_eps=1e-5), "norms have eps 1e-06 .* here it is 1e-05"),
    ):
        with pytest.raises(CannotExpress, match=words):
            write_timm(Head(build_supernet(options).extract(ALIKE), "imagenet", (32, 32)), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def network(build_supernet, tmp_path):
    """What the script opens."""
    steps = {"size": 32, "resize": 37, "frames": None, "fps": None}
    both = {"imagenet": steps, "k400": {**steps, "frames": 8, "fps": 8}}
    return Trained(build_supernet(), both, {n: ["a"] for n in both}, {}, tmp_path)


def test_every_format_that_can_be_written_is_and_the_others_are_explained(network, tmp_path):
    (tmp_path / "out/timm").mkdir(parents=True)
    (tmp_path / "out/timm/imagenet.json").write_text("of an earlier export")
    lines = list(write_heads(network, ARCH, tmp_path / "out", None))
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").glob("*/*")}
    assert written == {f"{k}/{n}" for n in INPUTS for k, n in [
        ("torch_export", f"{n}.pt2"), ("onnx", f"{n}.onnx")]}  # fmt: skip
    assert any("imagenet: no timm: timm's layers are all alike" in line for line in lines)
    with pytest.raises(CannotExpress, match=r"k400: no timm: .* takes clips"):
        list(write_heads(network, ARCH, tmp_path / "out", ["timm"]))


def test_a_program_with_other_logits_is_refused_and_removed(network, tmp_path, monkeypatch):
    def wrong(head, folder):
        run = write_torch_export(head, folder)
        return lambda pixels: run(pixels) + 1e-3

    monkeypatch.setitem(FORMATS, "torch_export", wrong)
    with pytest.raises(ExportError, match=r"they differ by 1\.0e-03"):
        list(write_heads(network, ARCH, tmp_path / "out", ["torch_export"]))
    assert not list((tmp_path / "out" / "torch_export").iterdir())


def test_a_missing_package_is_named_with_the_command(build_supernet, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CannotExpress, match="pip install onnx onnxscript onnxruntime"):
        write_onnx(Head(build_supernet().extract(ARCH), "imagenet", (32, 32)), tmp_path)
