"""Draws, phases, learning rate, mixing: pure functions, checked as such."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.small import small_config
from vimnas_ds.config import DatasetSection, parse_config
from vimnas_ds.space import SPACES, SearchSpace
from vimnas_ds.train.objective import Objective
from vimnas_ds.train.schedule import DataCursor, Drawer, Schedule

SIZES = {"imagenet": 800, "k400": 200}
IS_IMAGE = {"imagenet": True, "k400": False}


def schedule(**changes) -> Schedule:
    raw = small_config()
    raw["vimnas"]["schedule"] = {"epochs": 9, "warmup": 2, **changes}
    return Schedule.build(parse_config(raw), SIZES)


def drawer(cursor: DataCursor | None = None, seed: int = 0, sandwich: int | None = None) -> Drawer:
    return Drawer(schedule(), SPACES["nano"], IS_IMAGE, seed, cursor, sandwich)


def take(source: Drawer, count: int) -> list:
    found = []
    for _ in range(count):
        found.append(source.draw())
        source.advance(found[-1])
    return found


def test_phases_are_a_third_of_images_then_all_sets():
    plan = schedule()
    assert plan.image_steps == 3 * 100
    assert plan.total_steps == 300 + 6 * 125
    assert [plan.phase(s) for s in (0, 299, 300, 1049)] == ["image", "image", "joint", "joint"]
    assert [plan.epoch(s) for s in (0, 99, 100, 299, 300, 424, 425, 1049)] == [
        0, 0, 1, 2, 3, 3, 4, 8,
    ]  # fmt: skip
    assert [s for s in range(1050) if plan.is_epoch_end(s)][:4] == [99, 199, 299, 424]


def test_joint_draws_follow_the_sizes():
    contexts = take(drawer(), 1050)
    assert {c.dataset for c in contexts[:300]} == {"imagenet"}
    joint = [c.dataset for c in contexts[300:]]
    assert joint.count("k400") / len(joint) == pytest.approx(0.2, abs=0.04)
    assert len({c.archs for c in contexts}) > 200  # all but 1 of 240 sub-networks are met
    for name in SIZES:  # batches of each dataset are numbered without gaps
        assert [c.batch_index for c in contexts if c.dataset == name] == list(
            range(sum(c.dataset == name for c in contexts))
        )


def test_draws_depend_on_seed_and_cursor_alone():
    whole = take(drawer(), 400)
    first = drawer()
    take(first, 333)
    resumed = drawer(DataCursor.from_state(first.position.state_dict()))
    assert take(resumed, 67) == whole[333:]
    assert take(drawer(seed=1), 400) != whole
    assert whole[0].fingerprint() != whole[1].fingerprint()


def test_a_sandwich_is_largest_smallest_and_random_ones():
    space, plain = SPACES["nano"], take(drawer(), 400)
    found = take(drawer(sandwich=3), 400)
    for one, several in zip(plain, found, strict=True):
        assert several.archs[:2] == (space.largest(), space.smallest())
        assert len(several.archs) == 5
        assert several.random_archs[0] == one.archs[0] == one.random_archs[0]
        assert (several.dataset, several.batch_index) == (one.dataset, one.batch_index)
    assert len({a for c in found for a in c.random_archs}) > 200
    first = drawer(sandwich=3)
    take(first, 333)
    position = DataCursor.from_state(first.position.state_dict())
    assert take(drawer(position, sandwich=3), 67) == found[333:]
    assert drawer(sandwich=0).draw().random_archs == ()


def test_a_single_sub_network_is_no_sandwich():
    arch = SPACES["nano"].smallest()
    source = drawer(sandwich=3)
    source.space = SearchSpace.single(arch, SPACES["nano"].head_dim)
    assert source.draw().archs == source.draw().random_archs == (arch,)


def test_the_cursor_moves_on_when_the_step_is_repeated():
    """A guard that rewinds the step keeps the cursor: other batches, other draws."""
    source = drawer()
    before = take(source, 310)
    source.position.step = 300
    again = take(source, 10)
    assert [c.step for c in again] == [c.step for c in before[300:]]
    assert [c.cursor for c in again] == list(range(310, 320))
    assert [c.archs for c in again] != [c.archs for c in before[300:]]


def test_learning_rate_warms_up_linearly_then_follows_a_cosine():
    plan = schedule()
    assert plan.warmup_steps == 200
    assert plan.lr(0) == pytest.approx(1e-2 / 200)
    assert plan.lr(99) == pytest.approx(0.5e-2)
    assert plan.lr(199) == plan.lr(200) == pytest.approx(1e-2)
    assert plan.lr(200 + 425) == pytest.approx(0.5e-2)
    assert plan.lr(1050) == pytest.approx(0, abs=1e-12)
    assert schedule(warmup=30, warmup_unit="steps").warmup_steps == 30
    assert schedule(warmup=5).warmup_steps == 3 * 100 + 2 * 125
    assert schedule(min_lr=1e-3).lr(1050) == pytest.approx(1e-3)


VIDEO = DatasetSection(
    kind="video", num_classes=5, frames=4, fps=8, base_lr=1, weight_decay=0, size=16
)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_clip_is_mixed_alike_in_all_its_frames(kind):
    section = VIDEO.model_copy(update={kind: 1.0, "label_smoothing": 0.1})
    clips = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 4, 16, 16).contiguous()
    y = torch.arange(4)
    mixed, targets = Objective(section).mix(clips.clone(), y, seed=5)
    assert mixed.shape == clips.shape
    assert (mixed == mixed[:, :1, :1]).all()  # the same in every frame and channel
    assert (mixed != clips).any()
    own = targets.gather(1, y[:, None])[:, 0]
    share = (mixed == clips).float().mean((1, 2, 3, 4)) if kind == "cutmix" else None
    if share is not None:  # the label's weight is the area kept: height and width were cut
        torch.testing.assert_close(own, share * 0.9 + 0.02, atol=1e-3, rtol=0)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_mixing_is_a_function_of_its_seed():
    objective = Objective(VIDEO.model_copy(update={"mixup": 0.8, "cutmix": 1.0}))
    clips, y = torch.randn(4, 3, 4, 16, 16), torch.arange(4)
    first, again, other = (objective.mix(clips.clone(), y, s) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_losses_are_what_the_recipe_says():
    logits, y = torch.randn(6, 5), torch.randint(0, 5, (6,))
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(1, y[:, None]).mean()
    torch.testing.assert_close(Objective(VIDEO).loss(logits, y), nll)
    smoothed = Objective(VIDEO.model_copy(update={"label_smoothing": 0.3})).loss(logits, y)
    torch.testing.assert_close(smoothed, 0.7 * nll - 0.3 * log_p.mean())


def test_a_sandwich_learns_labels_with_its_largest_and_its_largest_with_the_others():
    logits, y = torch.randn(3, 6, 5, requires_grad=True), torch.randint(0, 5, (6,))
    objective = Objective(VIDEO.model_copy(update={"label_smoothing": 0.3}))
    losses = objective.sandwich_losses(logits, y, distill=True)
    p, log_q = logits[0].softmax(-1), logits[2].log_softmax(-1)
    torch.testing.assert_close(losses[0], objective.loss(logits[0], y))
    torch.testing.assert_close(losses[2], -(p * log_q).sum(-1).mean())
    (gradient,) = torch.autograd.grad(losses[1:].sum(), logits)
    assert (gradient[0] == 0).all()  # nothing pulls the teacher towards its students
    torch.testing.assert_close(gradient[2], (logits[2].softmax(-1) - p) / 6)
    on_labels = objective.sandwich_losses(logits, y, distill=False)
    torch.testing.assert_close(on_labels[1], objective.loss(logits[1], y))


def test_contexts_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        drawer().draw().step = 3
