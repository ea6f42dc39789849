"""The space as data, and its costs against published numbers and built models."""

from __future__ import annotations

import random

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import SMALL_TUBES, clip_batch, image_batch
from vimnas_ds.cost import Layout, count_macs, count_params
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.space import SPACES, Arch, SearchSpace
from vimnas_ds.tubes import TUBELET, TUBEVIT, TokenGeometry, Tube

PATCH16 = TokenGeometry((Tube((1, 16, 16), (1, 16, 16)),), 0)
AUTOFORMER = Layout(PATCH16, learned_positions=197, class_token=True, relative_position_params=7680)
TIMM = Layout(PATCH16, learned_positions=197, class_token=True)
VIDEOMAE = Layout(TUBELET, qkv_bias="qv")
AUTOFORMER_T = Arch(
    192,
    13,
    (3,) * 10 + (4, 3, 3),
    (3.5, 3.5, 3, 3.5, 3, 3, 4, 4, 3.5, 4, 3.5, 4, 3.5),
)
AUTOFORMER_S = Arch(
    384,
    13,
    (6, 6, 5, 7, 5, 5, 5, 6, 6, 7, 7, 6, 7),
    (3, 3.5, 3, 3.5, 4, 4, 4, 4, 4, 4, 4, 3.5, 4),
)
AUTOFORMER_B = Arch(
    576,
    14,
    (9,) * 5 + (10, 9, 9, 10, 9, 10, 9, 9, 10),
    (3.5, 3.5, 4, 3.5, 4, 3.5, 3.5, 3, 4, 4, 3, 4, 3, 3.5),
)


@pytest.mark.parametrize(
    ("arch", "layout", "classes", "frames", "params", "gmacs"),
    [
        (AUTOFORMER_T, AUTOFORMER, 1000, None, 5_867_944, 1.283),
        (AUTOFORMER_S, AUTOFORMER, 1000, None, 22_891_432, 4.774),
        (AUTOFORMER_B, AUTOFORMER, 1000, None, 53_691_688, 11.045),
        (Arch.uniform(192, 12, 3, 4), TIMM, 1000, None, 5_717_416, 1.2537),
        (Arch.uniform(384, 12, 6, 4), TIMM, 1000, None, 22_050_664, 4.5989),
        (Arch.uniform(768, 12, 12, 4), TIMM, 1000, None, 86_567_656, 17.5638),
        (Arch.uniform(1024, 24, 16, 4), TIMM, 1000, None, 304_326_632, 61.5547),
        (Arch.uniform(768, 12, 12, 4), VIDEOMAE, 400, 16, 86_534_800, 180.345),
        (Arch.uniform(1024, 24, 16, 4), VIDEOMAE, 400, 16, 304_270_736, 596.833),
    ],
)
def test_counts_equal_the_published_numbers(arch, layout, classes, frames, params, gmacs):
    assert count_params(arch, classes, layout) == params
    macs = count_macs(arch, classes, layout, frames=frames, size=224) / 1e9
    assert macs == pytest.approx(gmacs, abs=6e-4)


def test_timm_params_equal_a_built_timm_model():
    model = timm.create_model("deit_tiny_patch16_224")
    assert count_params(Arch.uniform(192, 12, 3, 4), 1000, TIMM) == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("geometry", [SMALL_TUBES, TUBELET])
@pytest.mark.parametrize(
    "switches",
    [
        ModelOptions(),
        ModelOptions(qk_norm=True, layer_scale=1e-4),
        ModelOptions(gelu="erf", class_token=True, packed_qkv_bias=True),
    ],
)
def test_counts_equal_built_models_to_the_unit(geometry, switches):
    space = SPACES["nano"]
    net = Supernet(space, geometry, {"imagenet": 7, "k400": 5}, switches).eval()
    layout = Layout(
        geometry,
        head_dim=16,
        qk_norm=switches.qk_norm,
        layer_scale=switches.layer_scale is not None,
        class_token=switches.class_token,
    )
    rng = random.Random(0)
    for arch in [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(3))]:
        sub = net.extract(arch)
        sizes = {n: p.numel() for n, p in sub.named_parameters()}
        for dataset, classes in net.num_classes.items():
            other = sum(v for n, v in sizes.items() if n.startswith("heads.") and dataset not in n)
            assert count_params(arch, classes, layout) == sum(sizes.values()) - other
            x, frames = (image_batch(), None) if dataset == "imagenet" else (clip_batch(), 8)
            math = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU flash kernel
            with FlopCounterMode(display=False) as counter, torch.no_grad(), math:
                sub(x, dataset)
            expected = count_macs(arch, classes, layout, frames=frames, size=32)
            assert counter.get_total_flops() == 2 * x.shape[0] * expected


def test_token_counts_are_the_papers():
    assert [TUBEVIT.num_tokens(f, 224) for f in (None, 32, 64)] == [196, 539, 1176]
    assert [TUBELET.num_tokens(f, 224) for f in (None, 16)] == [196, 1568]


def test_a_tube_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="does not fit an input"):
        TUBEVIT.num_tokens(8, 224)


@pytest.mark.parametrize("name", list(SPACES))
def test_samples_are_members_and_survive_json(name):
    space, rng = SPACES[name], random.Random(3)
    for _ in range(50):
        arch = space.sample(rng)
        assert arch in space
        assert Arch.from_json(arch.to_json()) == arch
        assert hash(Arch.from_json(arch.to_json())) == hash(arch)


def test_sampling_is_uniform_over_every_decision():
    space, rng = SPACES["nano"], random.Random(0)
    draws = [space.sample(rng) for _ in range(4000)]
    for field, choices in (("embed_dim", space.embed_dim), ("depth", space.depth)):
        for choice in choices:
            share = sum(getattr(a, field) == choice for a in draws) / len(draws)
            assert share == pytest.approx(1 / len(choices), abs=0.03)
    assert sum(a.num_heads[0] == 1 for a in draws) / 4000 == pytest.approx(0.5, abs=0.03)


def test_size_counts_every_distinct_member():
    space = SPACES["nano"]
    rng = random.Random(0)
    assert space.size() == 3 * ((2 * 2) ** 2 + (2 * 2) ** 3)
    assert len({space.sample(rng) for _ in range(5000)}) == space.size()


def test_neighbours_are_members_one_decision_away():
    space = SPACES["nano"]
    arch = space.smallest()
    found = list(space.neighbours(arch))
    assert all(n in space and n != arch for n in found)
    assert len(set(found)) == len(found) == 2 + 1 + arch.depth * 2


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        (Arch.uniform(40, 2, 1, 2), r"embed_dim 40 .*\(32, 48, 64\)"),
        (Arch.uniform(32, 2, 3, 2), r"num_heads\[0\] 3"),
        (Arch.uniform(32, 2, 1, 3.5), r"mlp_ratio\[0\] 3.5"),
    ],
)
def test_a_stranger_is_refused_by_field_and_choices(arch, words):
    with pytest.raises(ValueError, match=words):
        SPACES["nano"].validate(arch)


def test_a_single_space_holds_only_its_arch():
    space = SearchSpace.single(AUTOFORMER_T)
    assert space.size() == 1
    assert space.smallest() == space.largest() == AUTOFORMER_T


@pytest.mark.parametrize("text", ["[]", "{", '{"depth": 2}'])
def test_bad_json_is_refused_in_words(text):
    with pytest.raises(ValueError, match="an architecture"):
        Arch.from_json(text)
