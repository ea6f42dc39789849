"""The supernet against its reference: stand-alone sub-networks of plain torch layers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.conftest import SMALL_TUBES, clip_batch, image_batch
from vimnas_ds.model.alphas import Alphas, one_hot
from vimnas_ds.model.options import ModelOptions
from vimnas_ds.model.supernet import Supernet
from vimnas_ds.model.tokens import sincos_positions, token_centres
from vimnas_ds.ops.gates import hidden_mass, leading_mass, weighted_layer_norm
from vimnas_ds.ops.sliced_linear import sliced_linear, sliced_linear_ref
from vimnas_ds.space import SPACES, Arch
from vimnas_ds.tubes import TUBELET

SPACE = SPACES["nano"]
INPUTS = (("imagenet", image_batch()), ("k400", clip_batch()))
PLAIN = ModelOptions()
FULL = ModelOptions(qk_norm=True, layer_scale=0.5)
#: AutoFormer's network, and its parts beside ours
PLACES = ModelOptions(
    gelu="erf",
    norm_eps=1e-2,
    class_token=True,
    positions="learned",
    relative_positions=2,
    packed_qkv_bias=True,
    side=4,
)
RELATIVE = replace(FULL, relative_positions=9, side=4, class_token=True)
MIXED = replace(FULL, gelu="erf", class_token=True, packed_qkv_bias=True)


def sampled_archs(count: int):
    rng = random.Random(0)
    return [SPACE.smallest(), SPACE.largest(), *(SPACE.sample(rng) for _ in range(count))]


def inputs_of(options: ModelOptions):
    return INPUTS[:1] if options.has_places else INPUTS


@pytest.mark.parametrize(
    ("options", "geometry"),
    [
        (PLAIN, SMALL_TUBES),
        (PLAIN, TUBELET),
        (FULL, SMALL_TUBES),
        (FULL, TUBELET),
        (PLACES, SMALL_TUBES),
        (RELATIVE, SMALL_TUBES),
        (MIXED, SMALL_TUBES),
    ],
)
def test_sampled_equals_extracted(build_supernet, options, geometry):
    net = build_supernet(options, geometry)
    for arch in sampled_archs(4):
        sub = net.extract(arch)
        for dataset, x in inputs_of(options):
            assert_close(net(x, arch, dataset), sub(x, dataset), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [PLAIN, FULL, PLACES, RELATIVE, MIXED])
def test_superposed_at_one_hot_equals_sampled(build_supernet, options):
    net = build_supernet(options)
    for arch in sampled_archs(4):
        for dataset, x in inputs_of(options):
            soft = net.superposed(x, one_hot(SPACE, arch), dataset)
            assert_close(soft, net(x, arch, dataset), atol=1e-5, rtol=1e-5)


def test_several_at_once_equal_each_alone_and_only_the_first_drops_paths(build_supernet):
    net = build_supernet(ModelOptions(qk_norm=True, layer_scale=0.5, drop_path=0.9))
    archs = [SPACE.largest(), SPACE.smallest(), SPACE.largest()]
    for dataset, x in INPUTS:
        together = net.train()(x, archs, dataset)
        net.eval()
        alone = [net(x, arch, dataset) for arch in archs]
        for found, expected in zip(together[1:], alone[1:], strict=True):
            assert torch.equal(found, expected)
        assert (together[0] - alone[0]).abs().max() > 1e-3


def test_qk_norm_takes_the_scale_out_of_q_and_k(build_supernet):
    """What diverges without it, growing attention logits, has no effect."""
    moved = []
    for switch in (True, False):
        net, x, arch = build_supernet(ModelOptions(qk_norm=switch)), clip_batch(), SPACE.largest()
        before = net(x, arch, "k400")
        with torch.no_grad():
            for block in net.blocks:
                for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
                    parameter[: 2 * len(parameter) // 3] *= 50  # q and k, not v
        moved.append(float((net(x, arch, "k400") - before).detach().abs().max()))
    assert moved[0] < 1e-4
    assert moved[1] > 1e-2


def test_layer_scale_starts_blocks_near_the_identity():
    for start in (1e-4, 1.0):
        torch.manual_seed(0)
        block = Supernet(SPACE, SMALL_TUBES, {"k400": 5}, ModelOptions(layer_scale=start)).blocks[0]
        torch.nn.init.normal_(block.mlp.fc2.weight)
        x = torch.randn(2, 9, 64)
        change = (block(x, 2, 256, 0.0) - x).detach().abs().max()
        assert (change < 1e-2) == (start == 1e-4)
        assert change > 0


def test_activation_checkpointing_changes_no_bit(build_supernet):
    grads = []
    for switch in (False, True):
        net = build_supernet(ModelOptions(drop_path=0.5, activation_checkpointing=switch)).train()
        torch.manual_seed(5)
        net(clip_batch(), SPACE.largest(), "k400").square().sum().backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [FULL, PLACES])
@pytest.mark.parametrize("decision", ["num_heads[1]", "mlp_ratio[1]"])
def test_a_branch_is_linear_in_its_masses(build_supernet, decision, options):
    """At soft alpha the branch's output at p = (t, 1-t) is the t-mixture of its ends: a decision
    that acted twice or three times would make it a higher polynomial."""
    block = build_supernet(options).blocks[1]
    x = torch.randn(2, 17, 64)
    soft, other = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.4, 0.6])
    embed = leading_mass(soft, SPACE.embed_dim, 64)
    if "heads" in decision:  # the attention branch alone: the MLP is not linear in its input
        torch.nn.init.zeros_(block.mlp.fc2.weight)
        torch.nn.init.zeros_(block.mlp.fc2.bias)

    def branch(p: torch.Tensor) -> torch.Tensor:
        heads = leading_mass(p if "heads" in decision else other, (1, 2), 2)
        ratio = p if "ratio" in decision else other
        hidden = hidden_mass(soft, ratio, SPACE.embed_dim, (2, 4), 256)
        return block.forward_superposed(x, embed, heads, hidden)

    ends = [branch(torch.tensor(p)) for p in ([1.0, 0.0], [0.0, 1.0])]
    mixed = branch(torch.tensor([0.3, 0.7]))
    assert_close(mixed, 0.3 * ends[0] + 0.7 * ends[1], atol=1e-5, rtol=1e-5)
    assert (ends[0] - ends[1]).abs().max() > 1e-2


def test_depth_mixes_the_states_after_each_candidate_depth(build_supernet):
    """Final norm after mixing: the pooled features are the norm's of the weighted states."""
    net, x = build_supernet(FULL), clip_batch()
    largest = SPACE.largest()
    p = {**one_hot(SPACE, largest), "depth": torch.tensor([0.3, 0.7])}
    states = []
    hook = net.norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    for depth in SPACE.depth:
        net(x, Arch.uniform(64, depth, 2, 4), "k400")
    hook.remove()
    mixed = 0.3 * states[0] + 0.7 * states[1]
    expected = net.heads["k400"](net.norm(mixed).mean(1), 5)
    assert_close(net.superposed(x, p, "k400"), expected, atol=1e-5, rtol=1e-5)


def test_gates_equal_padded_weight_mixture():
    """The definition, W_mix = sum_k p_k PAD(W[:, :k]), computed as written."""
    p, cuts = torch.tensor([0.2, 0.3, 0.5]), (3, 5, 8)
    weight, x = torch.randn(4, 8), torch.randn(6, 8)
    mixed = sum(p[k] * F.pad(weight[:, :c], (0, 8 - c)) for k, c in enumerate(cuts))
    assert_close((x * leading_mass(p, cuts, 8)) @ weight.t(), x @ mixed.t())


def test_hidden_mass_counts_every_pair_of_embed_and_ratio():
    pe, pr = torch.tensor([0.25, 0.75]), torch.tensor([0.1, 0.9])
    mass = hidden_mass(pe, pr, (2, 3), (2, 3.5), 10)  # widths 4, 7, 6, 10
    for j in range(10):
        expected = sum(
            float(pe[a] * pr[b])
            for a, e in enumerate((2, 3))
            for b, r in enumerate((2, 3.5))
            if int(e * r) > j
        )
        assert float(mass[j]) == pytest.approx(expected)


def test_layer_norm_statistics_are_weighted():
    x = torch.randn(5, 8) * 3 + 1
    mass = torch.tensor([1, 1, 1, 0.6, 0.6, 0.1, 0.1, 0.1])
    weight, bias = torch.randn(8), torch.randn(8)
    mean = (x * mass).sum(-1, keepdim=True) / mass.sum()
    var = ((x - mean) ** 2 * mass).sum(-1, keepdim=True) / mass.sum()
    expected = ((x - mean) / (var + 1e-6).sqrt() * weight + bias) * mass
    assert_close(weighted_layer_norm(x, mass, weight, bias, 1e-6), expected)
    plain = (F.layer_norm(x, (8,), weight, bias, 1e-6)) * mass
    assert (expected - plain).abs().max() > 0.1  # padded statistics would be another result


@pytest.mark.parametrize("options", [FULL, PLACES])
def test_alphas_get_gradients_and_weights_none(build_supernet, options):
    net = build_supernet(options)
    alphas = Alphas(SPACE, 0.1, torch.Generator().manual_seed(0))
    dataset, x = inputs_of(options)[-1]
    loss = net.superposed(x, alphas.probabilities(), dataset).square().mean()
    grads = torch.autograd.grad(loss, list(alphas))
    assert all(g.abs().max() > 0 for g in grads)
    assert all(p.grad is None for p in net.parameters())
    loss = net.superposed(x, alphas.probabilities(), dataset).sum()
    loss.backward()
    assert all(p.grad is None for p in net.parameters())


def test_qkv_rows_and_biases_keep_their_roles(build_supernet):
    """With fewer heads, q, k and v are each their own leading rows: none changes role."""
    attn = build_supernet().blocks[0].attn
    x = torch.randn(2, 3, 32)
    q, k, v = attn.qkv.forward_groups(x, 16)
    for role, y in enumerate((q, k, v)):
        rows = slice(role * 32, role * 32 + 16)
        assert_close(y, F.linear(x, attn.qkv.weight[rows, :32], attn.qkv.bias[rows]))


def test_a_class_token_comes_first_and_has_no_fixed_position(build_supernet):
    plain, net = build_supernet(PLAIN), build_supernet(ModelOptions(class_token=True))
    with torch.no_grad():
        for mine, theirs in zip(net.tokens.tubes, plain.tokens.tubes, strict=True):
            mine.load_state_dict(theirs.state_dict())
    for _, x in INPUTS:
        first, others = net.tokens(x, 48).split([1, plain.tokens(x, 48).shape[1]], 1)
        assert_close(others, plain.tokens(x, 48), atol=0, rtol=0)
        assert_close(first[:, 0], net.tokens.class_token.weight[:, :48].expand(len(x), -1))


def test_positions_of_one_grid_refuse_other_inputs_in_words(build_supernet):
    net = build_supernet(PLACES)
    for each in (net, net.extract(SPACE.largest())):
        arch = (SPACE.largest(),) if each is net else ()
        for x, words in ((torch.randn(1, 3, 40, 32), "not images of 5 x 4 patches"),
                         (clip_batch(), "not clips")):  # fmt: skip
            with pytest.raises(ValueError, match=f"images of 4 x 4 patches, {words}"):
                each(x, *arch, "imagenet")


def test_a_step_moves_what_the_sampled_subnetwork_uses_of_every_table_and_no_more(build_supernet):
    net, arch = build_supernet(PLACES), Arch(32, 2, (1, 2), (2, 4))
    net(image_batch(), arch, "imagenet").square().sum().backward()
    layouts, seen = net.layouts(), set()
    for name, parameter in net.named_parameters():
        extents = layouts[name].extents(arch, SPACE.head_dim)
        if "k400" in name or extents is None or layouts[name].video_only:
            continue
        moved = torch.zeros(layouts[name].shape, dtype=torch.bool)
        moved[tuple(slice(0, e) for e in extents)] = True
        gradient = parameter.grad.view(layouts[name].shape)
        assert not gradient[~moved].any(), name
        assert (gradient[moved] != 0).float().mean() > 0.5, name
        seen |= {name} if not layouts[name].decay else set()
    assert {"tokens.class_token.weight", "tokens.position.weight", "blocks.0.attn.qkv.bias",
            "blocks.1.attn.relative.v_columns.weight"} <= seen  # fmt: skip


def test_positions_of_a_sliced_width_keep_all_three_axes():
    centres = token_centres(SMALL_TUBES, (8, 32, 32), False)
    for width in SPACE.embed_dim:
        position = sincos_positions(centres, SPACE.max_embed_dim)[:, :width]
        for axis in range(3):
            channels = [c for c in range(width) if c % 6 // 2 == axis]
            assert len(channels) >= width // 3 - 1
            same = centres[:, axis] == centres[0, axis]
            assert (position[same][:, channels] == position[0, channels]).all()
            assert (position[~same][:, channels] != position[0, channels]).any(1).all()


def test_an_image_stands_at_time_zero_with_the_fourth_tubes_weight(build_supernet):
    assert (token_centres(SMALL_TUBES, (1, 32, 32), True)[:, 0] == 0).all()
    net = build_supernet()
    net(image_batch(), SPACE.largest(), "imagenet").sum().backward()
    grads = [t.weight.grad is not None for t in net.tokens.tubes]
    assert grads == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("groups", "o", "i"), [(1, 5, 7), (3, 4, 6), (3, 8, 9), (1, 8, 9)])
@pytest.mark.parametrize("gelu", [False, True])
def test_sliced_linear_equals_its_reference(dtype, groups, o, i, gelu):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(groups, 8, 9, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(groups, 8, generator=generator).to(dtype).requires_grad_()
    x = torch.randn(4, 3, 11, generator=generator).to(dtype)[..., :i].requires_grad_()
    upstream = torch.randn(groups, 4, 3, o, generator=generator).to(dtype)
    results = []
    for function in (sliced_linear, sliced_linear_ref):
        y = torch.stack(function(x, weight, bias, o, gelu))
        results.append([y, *torch.autograd.grad(y, (x, weight, bias), upstream)])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, atol=tolerance, rtol=tolerance)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda *a: sliced_linear(*a, o, gelu), (x, weight, bias))


def test_sliced_linear_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"block \(9, 4\) does not fit"):
        sliced_linear(torch.randn(2, 4), torch.randn(1, 8, 4), torch.randn(1, 8), 9)
    with pytest.raises(ValueError, match="one dtype"):
        sliced_linear(torch.randn(2, 4), torch.randn(1, 8, 4).double(), torch.randn(1, 8), 3)
