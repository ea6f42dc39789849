"""AutoFormer's supernets: read from their checkpoints, the same numbers, runs like our own."""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from scripts import export, import_autoformer, predict
from tests.conftest import image_batch
from tests.test_space_cost import AUTOFORMER, AUTOFORMER_B, AUTOFORMER_S, AUTOFORMER_T
from vimnas_ds.autoformer import fill, fitting_space, run_object
from vimnas_ds.config import ConfigError, parse_config
from vimnas_ds.cost import count_params
from vimnas_ds.export import ExportError, load_subnet
from vimnas_ds.model.alphas import one_hot
from vimnas_ds.model.subnet import SubNetwork
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.space import SPACES, Arch, SearchSpace
from vimnas_ds.train.checkpoint import load_checkpoint
from vimnas_ds.train.dry_run import cost_of, model_layout
from vimnas_ds.train.engine import build_supernet, model_options
from vimnas_ds.train.ranks import Ranks
from vimnas_ds.train.run_files import CheckpointError, find_checkpoint
from vimnas_ds.train.warm_start import inherit

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


def supernet_of(weights: dict[str, Tensor], space: SearchSpace) -> Supernet:
    net = build_supernet(parse_config(run_object(weights, space, "imagenet", Path("unused"))))
    fill(net, weights)
    return net.eval()


def test_every_subnetwork_has_the_logits_of_autoformers_own_forward(weights):
    single, x = supernet_of(weights, NANO), image_batch(batch=2).double()
    supernet = copy.deepcopy(single).double()
    doubles = {name: value.double() for name, value in weights.items()}
    for arch in ARCHS:
        expected = restated(doubles, x, arch)
        found = supernet(x, arch, "imagenet")
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)  # GELU's forms: 5e-4
        extracted = supernet.extract(arch).double()(x, "imagenet")
        torch.testing.assert_close(extracted, expected, atol=1e-9, rtol=0)
        soft = single.superposed(x.float(), one_hot(NANO, arch), "imagenet")
        torch.testing.assert_close(soft, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.fixture
def run(weights, tmp_path) -> Path:
    """The folder of an imported run."""
    args = argparse.Namespace(gp=True, change_qkv=True, lr=5e-4)  # as published files hold them
    torch.save({"model": weights, "args": args, "epoch": 3}, tmp_path / "published.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\nf\ng\n")
    options = ["--space", "nano", "--labels", str(tmp_path / "names.txt")]
    out = tmp_path / "imported"
    command = [str(tmp_path / "published.pth"), *options, "--out", str(out)]
    assert import_autoformer.main(command) == 0
    return out


def test_an_imported_checkpoint_is_exported_and_classifies(weights, run, tmp_path, capsys):
    folder = tmp_path / "export"
    trained = export.open_trained(export.parse(["--arch", "x", "--checkpoint", str(run)]), CPU)
    lines = list(export.write_heads(trained, ARCHS[2], folder, None))
    assert [line.split(",")[0] for line in lines] == [
        "imagenet: model.safetensors", "imagenet: torch_export", "imagenet: onnx",
        "imagenet: no timm: timm's VisionTransformer has no relative positions"]  # fmt: skip
    x = image_batch(batch=1)
    program = torch.export.load(folder / "torch_export/imagenet.pt2").module()
    expected = restated(weights, x, ARCHS[2])
    torch.testing.assert_close(program(x), expected, atol=1e-4, rtol=1e-4)
    about = (folder / "arch.json").read_text()
    for text, wrong, words in (
        ('"side": 4', '"side": 1000000', "1000000 patches along a side: 1 to 64 are taken"),
        ('"gelu": "erf"', '"gelu": "relu"', "gelu 'relu' is none of tanh, erf"),
        ('"class_token": true', '"class_token": 2', "class_token 2 is neither true nor false"),
    ):
        (folder / "arch.json").write_text(about.replace(text, wrong))
        with pytest.raises(ExportError, match=words):
            load_subnet(folder)
    (folder / "arch.json").write_text(about)
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    capsys.readouterr()
    assert predict.main([str(folder), str(tmp_path / "red.png"), "--top", "7"]) == 0
    assert sorted(line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]) == [
        *"abcdefg"
    ]
    assert json.loads((folder / "preprocess.json").read_text())["imagenet"]["interpolation"] == (
        "bicubic"
    )


def test_a_subnetwork_trained_on_alone_starts_from_the_imported_weights(run, weights):
    config = json.loads((run / "config.json").read_text())
    config["vimnas"]["arch"] = json.loads(ARCHS[2].to_json())
    net = build_supernet(alone := parse_config(config)).eval()
    inherit(net, run, alone)
    x = image_batch(batch=1)
    expected = restated(weights, x, ARCHS[2])
    found = net(x, ARCHS[2], "imagenet")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    config["vimnas"]["model"]["gelu"] = "tanh"
    with pytest.raises(ConfigError, match=r"of another network: vimnas\.model\.gelu erf, here"):
        inherit(net, run, parse_config(config))


def test_a_folder_that_holds_a_run_is_refused_and_keeps_its_bits(run, tmp_path, capsys):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    find_checkpoint(run)  # its files are what the manifest says
    for _ in range(2):
        command = [str(tmp_path / "published.pth"), "--space", "nano", "--out", str(run)]
        assert import_autoformer.main(command) == 2
        assert "already holds a run" in capsys.readouterr().err
        (run / "config.json").unlink(missing_ok=True)  # the checkpoint alone is one too
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert after == {p: b for p, b in before.items() if p.name != "config.json" or p.parent != run}


def test_an_imported_run_cannot_be_resumed_and_says_what_can(run):
    (checkpoint,) = (run / "checkpoints").glob("step*")
    with pytest.raises(CheckpointError, match=r"was imported.* --inherit starts from"):
        load_checkpoint(checkpoint, None, CPU)


class _Code:
    """What would run at loading."""

    def __reduce__(self):
        return print, ("loaded code ran",)


def test_checkpoints_that_are_not_autoformers_are_refused_in_words(weights, tmp_path, capsys):
    short = {n: t for n, t in weights.items() if not n.startswith("blocks.2")}
    qkv, patch = "blocks.0.attn.qkv.weight", "patch_embed_super.proj.weight"
    no_qkv = {n: t for n, t in weights.items() if n != qkv}
    cases = [
        (_Code(), "holds more than tensors and is refused"),
        ({qkv: torch.zeros(3)}, "is not an AutoFormer supernet"),
        ({"model": weights, "args": argparse.Namespace(gp=False)}, "with gp False: only True is"),
        ({**weights, "blocks.1.fc1.weight": torch.zeros(100, WIDE)}, "does not fit the space nano"),
        (short, "the checkpoint has no tensor 'blocks.2."),
        ({"model": [weights]}, "found no tensors by name"),
        (None, "found no tensors by name"),
        (torch.zeros(3), "found no tensors by name"),
        ({1: torch.zeros(3), 2: torch.zeros(3)}, "expected, found 1, 2"),
        ({**weights, 3: torch.zeros(3)}, "it has no place for 3"),
        ({**weights, "blocks.3.x": torch.zeros(3)}, "it has no place for blocks.3.x"),
        ({**weights, "pos_embed": torch.zeros(1, 12, WIDE)}, "12 positions: not a class token and"),
        ({**weights, "pos_embed": torch.zeros(())}, "pos_embed has the shape (), not 3 axes"),
        ({**weights, "norm.weight": torch.zeros(1)}, "(1,) of it can be used, (64,) are needed"),
        (
            {**weights, "norm.weight": torch.zeros(())},
            "fit the space nano: norm.weight ()",
        ),
        ({**weights, qkv: torch.zeros(())}, f"does not fit the space nano: {qkv} ()"),
        ({**weights, patch: torch.zeros(())}, f"{patch} has the shape (), not 4 axes"),
        (
            {**weights, "head.bias": torch.zeros(7, dtype=torch.int64)},
            "not a plain tensor",
        ),
        ({**weights, "head.bias": torch.zeros(1).expand(10**12)}, "not a plain tensor"),
    ]
    fitted = [  # without --space
        ({patch: weights[patch], "blocks.0.x": torch.zeros(3)}, f"has no tensor '{qkv}'"),
        (no_qkv, f"has no tensor '{qkv}'"),
        ({**weights, qkv: torch.zeros(())}, f"{qkv} has the shape (), not 2 axes"),
        ({**weights, qkv: torch.zeros(9, 3)}, "no known space has 3 layers and 3 channels"),
    ]
    out = str(tmp_path / "out")
    for given, options in ((cases, ["--space", "nano"]), (fitted, [])):
        for content, words in given:
            torch.save(content, tmp_path / "given.pth")
            assert (
                import_autoformer.main([str(tmp_path / "given.pth"), "--out", out, *options]) == 2
            )
            said = capsys.readouterr()
            assert words in said.err
            assert "loaded code ran" not in said.out
    assert import_autoformer.main([str(tmp_path / "gone.pth"), "--out", out]) == 2
    torch.save(weights, tmp_path / "given.pth")
    command = [str(tmp_path / "given.pth"), "--out", out, "--space", "nano", "--dataset", "../x"]
    assert import_autoformer.main(command) == 2
    assert "'../x': letters, digits and _ only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "width"), [("vit_t", 256), ("vit_s", 448), ("vit_b", 640)])
def test_the_space_follows_from_depth_and_heads(name, width):
    layers = range(SPACES[name].max_depth)
    found = {f"blocks.{i}.attn.qkv.weight": torch.empty(3 * width, 1) for i in layers}
    assert fitting_space(found) is SPACES[name]


@pytest.mark.parametrize(
    ("name", "arch", "params", "gmacs"),
    [
        ("vit_t", AUTOFORMER_T, 5_867_944, 1.283),
        ("vit_s", AUTOFORMER_S, 22_891_432, 4.774),
        ("vit_b", AUTOFORMER_B, 53_691_688, 11.045),
    ],
)
def test_the_published_subnetworks_have_the_published_costs(name, arch, params, gmacs):
    """Built, and by the formulas for the configuration that an import writes."""
    shapes = {
        "patch_embed_super.proj.weight": (1, 3, 16, 16),
        "pos_embed": (1, 197, 1),
        "blocks.0.attn.rel_pos_embed_k.embeddings_table_v": (30, 64),
        "head.bias": (1000,),
    }
    published = {key: torch.empty(shape) for key, shape in shapes.items()}
    config = parse_config(run_object(published, SPACES[name], "imagenet", Path("unused")))
    layout = model_layout(config)
    assert layout == AUTOFORMER
    assert count_params(arch, 1000, layout) == params
    assert cost_of(config, arch, "imagenet") == (params, pytest.approx(gmacs, abs=6e-4))
    with torch.device("meta"):
        classes = {"imagenet": 1000}
        net = SubNetwork(arch, 64, layout.tokens, classes, model_options(config), 1)
    assert sum(p.numel() for p in net.parameters()) == params


def test_a_damaged_import_is_refused_in_words(run):
    (checkpoint,) = (run / "checkpoints").glob("step*")
    shutil.copyfile(checkpoint / "alphas.safetensors", checkpoint / "supernet.safetensors")
    with pytest.raises(ConfigError, match=r"supernet.safetensors has .* bytes, .* were written"):
        export.open_trained(export.parse(["--arch", "x", "--checkpoint", str(run)]), CPU)
