"""AutoFormer's supernets: read from their checkpoints, the same numbers, usable as our own."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from scripts import export, import_autoformer, predict
from tests.conftest import image_batch
from vimnas_ds.autoformer import build, fitting_space
from vimnas_ds.export import ExportError, load_subnet
from vimnas_ds.model.autoformer import AutoFormerNetwork, AutoFormerShape
from vimnas_ds.space import SPACES, Arch
from vimnas_ds.train.ranks import Ranks

NANO = SPACES["nano"]
K = NANO.head_dim
WIDE, PATCH, SIDE, REACH = 72, 8, 4, 2  # allocated width; 4 x 4 patches, distances clamped to 2
ARCHS = [NANO.smallest(), NANO.largest(), Arch(48, 3, (2, 1, 2), (4, 2, 4))]
CPU = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """Random ones under upstream's names, all wider than the largest choice."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDE),
        "pos_embed": (1, SIDE**2 + 1, WIDE),
        "patch_embed_super.proj.weight": (WIDE, 3, PATCH, PATCH),
        "patch_embed_super.proj.bias": (WIDE,),
    }
    linear = {"head": (7, WIDE)}
    norms = ["norm"]
    for at in (f"blocks.{i}" for i in range(3)):
        linear |= {f"{at}.attn.qkv": (3 * WIDE, WIDE), f"{at}.attn.proj": (WIDE, WIDE)}
        linear |= {f"{at}.fc1": (4 * WIDE, WIDE), f"{at}.fc2": (WIDE, 4 * WIDE)}
        norms += [f"{at}.attn_layer_norm", f"{at}.ffn_layer_norm"]
        for table in ("k.embeddings_table_v", "k.embeddings_table_h",
                      "v.embeddings_table_v", "v.embeddings_table_h"):  # fmt: skip
            shapes[f"{at}.attn.rel_pos_embed_{table}"] = (2 * REACH + 2, K)
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (WIDE,), f"{name}.bias": (WIDE,)}
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(s, generator=generator) * 0.2 for n, s in shapes.items()}


def restated(w: dict[str, Tensor], x: Tensor, arch: Arch) -> Tensor:
    """AutoFormer's forward in its own terms, token by token: (B, 3, H, W) -> logits."""
    e = arch.embed_dim

    def linear(name: str, y: Tensor, out: int) -> Tensor:
        return y @ w[f"{name}.weight"][:out, : y.shape[-1]].T + w[f"{name}.bias"][:out]

    def norm(name: str, y: Tensor) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return y * w[f"{name}.weight"][:e] + w[f"{name}.bias"][:e]

    def relative(name: str, query: int, key: int) -> Tensor:
        v = h = 0  # where either is the class token
        if query and key:
            (y1, x1), (y2, x2) = divmod(query - 1, SIDE), divmod(key - 1, SIDE)
            v = max(-REACH, min(REACH, y2 - y1)) + REACH + 1
            h = max(-REACH, min(REACH, x2 - x1)) + REACH + 1
        return w[f"{name}.embeddings_table_v"][v] + w[f"{name}.embeddings_table_h"][h]

    kernel = w["patch_embed_super.proj.weight"].flatten(1)[:e]
    t = F.unfold(x, PATCH, stride=PATCH).mT @ kernel.T + w["patch_embed_super.proj.bias"][:e]
    t = torch.cat([w["cls_token"][..., :e].repeat(len(x), 1, 1), t], 1) + w["pos_embed"][..., :e]
    tokens = range(t.shape[1])
    for i in range(arch.depth):
        at, width = f"blocks.{i}", arch.num_heads[i] * K
        y = norm(f"{at}.attn_layer_norm", t)
        rows = w[f"{at}.attn.qkv.weight"][: 3 * width, :e]
        bias = w[f"{at}.attn.qkv.bias"][: 3 * width]
        q, k, v = (y @ rows[g::3].T + bias.chunk(3)[g] for g in range(3))
        out = torch.zeros_like(q)
        for head in range(arch.num_heads[i]):
            part = slice(head * K, head * K + K)
            for n in tokens:
                r_k = torch.stack([relative(f"{at}.attn.rel_pos_embed_k", n, m) for m in tokens])
                r_v = torch.stack([relative(f"{at}.attn.rel_pos_embed_v", n, m) for m in tokens])
                scores = ((k[..., part] + r_k) * q[:, n, None, part]).sum(-1) / math.sqrt(K)
                p = scores.softmax(-1)[..., None]
                out[:, n, part] = (p * (v[..., part] + r_v)).sum(1)
        t = t + linear(f"{at}.attn.proj", out, e)
        hidden = linear(f"{at}.fc1", norm(f"{at}.ffn_layer_norm", t), arch.hidden_dim(i))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        t = t + linear(f"{at}.fc2", hidden, e)
    return linear("head", norm("norm", t)[:, 1:].mean(1), 7)


def test_every_subnetwork_has_the_logits_of_autoformers_own_forward(weights):
    supernet, x = build(weights, NANO, "imagenet"), image_batch(batch=2)
    doubles = {name: value.double() for name, value in weights.items()}
    exact = replace(supernet, weights=doubles)  # GELU's two forms differ by 5e-4
    for arch in ARCHS:
        expected = restated(doubles, x.double(), arch)
        torch.testing.assert_close(exact(x.double(), arch, "imagenet"), expected)
        found = supernet.extract(arch)(x, "imagenet")
        torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="embed_dim 40 is not in space nano"):
        supernet(x, Arch.uniform(40, 2, 1, 2), "imagenet")


def test_an_imported_checkpoint_is_exported_and_classifies(weights, tmp_path, capsys):
    args = argparse.Namespace(gp=True, change_qkv=True, lr=5e-4)  # as published files hold them
    torch.save({"model": weights, "args": args, "epoch": 3}, tmp_path / "published.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\ng\n")
    out, folder = str(tmp_path / "imported"), tmp_path / "export"
    options = ["--space", "nano", "--labels", str(tmp_path / "names.txt"), "--out", out]
    assert import_autoformer.main([str(tmp_path / "published.pth"), *options]) == 0
    trained = export.open_trained(export.parse(["--arch", "x", "--checkpoint", out]), CPU)
    lines = list(export.write_heads(trained, ARCHS[2], folder, None))
    assert [line.split(",")[0] for line in lines] == [
        "imagenet: model.safetensors", "imagenet: torch_export", "imagenet: onnx",
        "imagenet: no timm: timm's VisionTransformer has no relative positions"]  # fmt: skip
    x = image_batch(batch=1)
    program = torch.export.load(folder / "torch_export/imagenet.pt2").module()
    expected = restated(weights, x, ARCHS[2])
    torch.testing.assert_close(program(x), expected, atol=1e-4, rtol=1e-4)
    about = (folder / "arch.json").read_text()
    (folder / "arch.json").write_text(about.replace('"side": 4', '"side": 1000000'))
    with pytest.raises(ExportError, match="1000000 patches along a side: 1 to 64 are taken"):
        load_subnet(folder)
    (folder / "arch.json").write_text(about)
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    capsys.readouterr()
    assert predict.main([str(folder), str(tmp_path / "red.png"), "--top", "7"]) == 0
    assert sorted(line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]) == [
        *"abcdefg"
    ]


class _Code:
    """What would run at loading."""

    def __reduce__(self):
        return print, ("loaded code ran",)


def test_checkpoints_that_are_not_autoformers_are_refused_in_words(weights, tmp_path, capsys):
    narrow = {**weights, "blocks.1.fc1.weight": torch.zeros(100, WIDE)}
    short = {n: t for n, t in weights.items() if not n.startswith("blocks.2")}
    other = {"model": weights, "args": argparse.Namespace(gp=False)}
    cases = [
        (_Code(), "holds more than tensors and is refused"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(3)}, "is not an AutoFormer supernet"),
        (other, "was trained with gp False: only True is read"),
        (narrow, "does not fit the space nano"),
        (short, "the checkpoint has no tensor 'blocks.2."),
    ]
    for content, words in cases:
        torch.save(content, tmp_path / "given.pth")
        options = ["--space", "nano", "--out", str(tmp_path / "out")]
        assert import_autoformer.main([str(tmp_path / "given.pth"), *options]) == 2
        said = capsys.readouterr()
        assert words in said.err
        assert "loaded code ran" not in said.out
    assert import_autoformer.main([str(tmp_path / "gone.pth"), *options]) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "width"), [("vit_t", 256), ("vit_s", 448), ("vit_b", 640)])
def test_the_space_follows_from_depth_and_heads(name, width):
    layers = range(SPACES[name].max_depth)
    found = {f"blocks.{i}.attn.qkv.weight": torch.empty(3 * width, 1) for i in layers}
    assert fitting_space(found) is SPACES[name]


def test_the_published_subnetworks_have_the_published_parameters():
    ratios_t = (3.5, 3.5, 3, 3.5, 3, 3, 4, 4, 3.5, 4, 3.5, 4, 3.5)
    heads_s = (6, 6, 5, 7, 5, 5, 5, 6, 6, 7, 7, 6, 7)
    ratios_s = (3, 3.5, 3, 3.5, *(4,) * 7, 3.5, 4)
    cases = [
        (Arch(192, 13, (*(3,) * 10, 4, 3, 3), ratios_t), 5_867_944),
        (Arch(384, 13, heads_s, ratios_s), 22_891_432),
    ]
    for arch, params in cases:
        with torch.device("meta"):
            net = AutoFormerNetwork(arch, AutoFormerShape(64, 16, 14, 14), {"imagenet": 1000})
        assert sum(p.numel() for p in net.parameters()) == params


def test_a_damaged_import_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "autoformer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not an imported AutoFormer supernet"):
        export.open_trained(export.parse(["--arch", "x", "--checkpoint", str(tmp_path)]), CPU)
