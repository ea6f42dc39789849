"""The collapse guard's judgement, on series whose truth is known."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator

import pytest

from tests.small import small_config
from vimnas_ds.config import GuardSection, parse_config
from vimnas_ds.train.guard import Chance, Event, Guard, NotSound, Rewinds, Seen, chance_of

SECTION = GuardSection()
CLASSES = {"imagenet": 1000, "k400": 400, "ssv2": 174, "tiny": 8}
SHARES = {"imagenet": 0.6, "k400": 0.2, "ssv2": 0.12, "tiny": 0.08}
BATCH = 64
Curve = Callable[[random.Random, str, int, float], tuple[float, float | None]]


def chances() -> dict[str, Chance]:
    return {name: Chance(math.log(k), 1 / k) for name, k in CLASSES.items()}


def right(rng: random.Random, p: float) -> float:
    """Accuracy of a batch whose samples are right with probability p."""
    sigma = math.sqrt(max(p * (1 - p), 1e-6) / BATCH)
    return min(max(round(BATCH * rng.gauss(p, sigma)) / BATCH, 0.0), 1.0)


def sound(rng: random.Random, name: str, t: int, size: float) -> tuple[float, float | None]:
    """Decay from chance to a third of it after a warm-up; small sub-networks are far behind."""
    c, learned = math.log(CLASSES[name]), 1 - math.exp(-max(t - 150, 0) / 800)
    gained = 0.65 * learned * (0.45 + 0.55 * size)
    loss = c * (1 - gained) * math.exp(rng.gauss(0, 0.08))
    return loss, right(rng, max(1 / CLASSES[name], gained * 0.8))


def few_small_ones(rng: random.Random, name: str, t: int, size: float):
    """Two kinds of sub-networks: one in eight learns nothing for long."""
    return sound(rng, name, t if size > 0.125 else t // 10, 1.0 if size > 0.125 else 0.0)


def mixed_labels(rng: random.Random, name: str, t: int, size: float):
    """Mixup and smoothing: a high floor, loss that depends on the mixing, no accuracy."""
    loss, _ = sound(rng, name, t, size)
    c = math.log(CLASSES[name])
    mixing = rng.betavariate(0.8, 0.8)
    return 0.25 * c + 0.75 * loss + 0.25 * (c - loss) * min(mixing, 1 - mixing) * 2, None


def hard_batches(rng: random.Random, name: str, t: int, size: float):
    """One batch in twenty is far off, up to five times the loss."""
    loss, top1 = sound(rng, name, t, size)
    return (loss * rng.uniform(1.5, 5), 0.0) if rng.random() < 0.05 else (loss, top1)


def nearly_zero(rng: random.Random, name: str, t: int, size: float):
    """Training data learned by heart: the loss varies by factors."""
    floor = math.log(CLASSES[name]) * max(math.exp(-t / 300), 0.005)
    return floor * math.exp(rng.gauss(0, 0.8)), right(rng, 0.99 if t > 1500 else 0.3)


def untaught(rng: random.Random, name: str, t: int, size: float):
    """Never leaves chance."""
    c = math.log(CLASSES[name])
    return c * (1 + abs(rng.gauss(0, 0.1)) - 0.02), right(rng, 1 / CLASSES[name])


def joined(rng: random.Random, name: str, t: int, size: float):
    """The other datasets come in: the first one loses half of what it had gained and regains it."""
    loss, top1 = sound(rng, name, t, size)
    c = math.log(CLASSES[name])
    lost = 0.4 * math.exp(-(t - 2000) / 600) if t >= 2000 else 0.0
    return loss + lost * (c - loss), None if top1 is None else top1 * (1 - lost)


def swinging(rng: random.Random, name: str, t: int, size: float):
    """Slow waves, as a high learning rate makes them."""
    loss, top1 = sound(rng, name, t, size)
    return loss * (1 + 0.12 * math.sin(t / 40) + 0.08 * math.sin(t / 7)), top1


SOUND = [
    sound,
    few_small_ones,
    mixed_labels,
    hard_batches,
    nearly_zero,
    untaught,
    joined,
    swinging,
]


def series(
    curve: Curve, seed: int, steps: int, image_steps: int = 500
) -> Iterator[tuple[str, Seen]]:
    """Steps of a joint run: images first, then datasets by their shares."""
    rng = random.Random(seed)
    names, shares = list(SHARES), list(SHARES.values())
    for step in range(steps):
        name = "imagenet" if step < image_steps else rng.choices(names, shares)[0]
        loss, top1 = curve(rng, name, step, rng.random())
        yield name, Seen(step, loss, top1)


def first_event(steps: Iterator[tuple[str, Seen]], guard: Guard | None = None) -> Event | None:
    guard = guard or Guard(SECTION, chances())
    return next((e for e in (guard.observe(name, seen) for name, seen in steps) if e), None)


@pytest.mark.parametrize("curve", SOUND)
def test_sound_training_never_trips_the_guard(curve):
    for seed in (100, 101):
        event = first_event(series(curve, seed, 6000))
        assert event is None, event


@pytest.mark.parametrize("curve", [sound, few_small_ones, mixed_labels, hard_batches, swinging])
@pytest.mark.parametrize("name", list(CLASSES))
def test_a_collapse_is_found_within_its_steps_of_that_dataset(curve, name):
    """Flat at chance from step 3000 on, on one dataset; accuracy that of chance."""
    found, since = None, 0
    guard = Guard(SECTION, chances())
    rng = random.Random(7)
    for drawn, seen in series(curve, 1, 20000):
        if drawn == name and seen.step >= 3000:
            c, since = math.log(CLASSES[name]), since + 1
            top1 = None if seen.top1 is None else right(rng, 1 / CLASSES[name])
            seen = Seen(seen.step, c * (1 + rng.gauss(0, 0.01)), top1)
        if found := guard.observe(drawn, seen):
            break
    assert found
    assert found.dataset == name
    assert since <= SECTION.collapse_steps
    assert seen.step >= 3000


def test_a_collapse_is_found_by_accuracy_alone():
    """The supplement's: accuracy falls to 0; the loss is high, but not that of chance."""
    guard, rng = Guard(SECTION, chances()), random.Random(0)
    found = None
    for step in range(600):
        loss, top1 = 0.55 * math.log(8) * (1 + rng.gauss(0, 0.02)), right(rng, 0.7)
        if step >= 400:
            top1 = right(rng, 1 / 8) * (step % 2)
        found = guard.observe("tiny", Seen(step, loss, top1))
        if found:
            break
    assert found
    assert found.kind == "collapse"
    assert "top-1" in found.what
    assert 400 < step < 400 + SECTION.collapse_steps


def test_a_collapse_is_found_by_the_loss_alone():
    """It creeps up to chance, labels are mixed: never a spike."""
    guard, rng, c = Guard(SECTION, chances()), random.Random(0), math.log(8)
    steps = (
        ("tiny", Seen(t, c * min(0.5 + max(t - 300, 0) / 1200, 1.0) * rng.gauss(1, 0.01), None))
        for t in range(1200)
    )
    found = first_event(steps, guard)
    assert found
    assert found.kind == "collapse"
    assert "loss" in found.what
    assert 750 < found.onset < 950


def test_a_small_lasting_rise_is_no_event():
    """As when other datasets come in: ten percent, in a series that hardly varies."""
    guard, c = Guard(SECTION, chances()), math.log(8)
    steps = (("tiny", Seen(t, c * (0.95 if t < 300 else 1.05), None)) for t in range(500))
    assert first_event(steps, guard) is None


@pytest.mark.parametrize("curve", [sound, few_small_ones, mixed_labels, hard_batches, joined])
def test_a_spike_is_found_when_it_lasts_and_only_then(curve):
    def spiked(length: int) -> Event | None:
        count = 0

        def steps() -> Iterator[tuple[str, Seen]]:
            nonlocal count
            for name, seen in series(curve, 2, 4000):
                if name == "k400" and seen.step >= 3500 and count < length:
                    count += 1
                    seen = Seen(seen.step, 1.5 * math.log(400) + 0.1 * count, seen.top1)
                yield name, seen

        return first_event(steps())

    found = spiked(SECTION.spike_steps)
    assert found
    assert (found.kind, found.dataset) == ("spike", "k400")
    assert 3490 <= found.onset < 3600
    assert spiked(SECTION.spike_steps // 2) is None


def test_skipped_steps_count_by_dataset_and_apart_for_weights_and_alphas():
    guard = Guard(SECTION, chances())
    nan = math.nan
    for step in range(0, 8, 2):  # alphas fail on tiny, but every other time; weights never
        assert not guard.observe("tiny", Seen(step, 1.0, None), True, step % 4 == 0)
        assert not guard.observe("k400", Seen(step + 1, 1.0, None), True, None)
    events = [
        guard.observe("tiny", Seen(10, nan, None), False),
        guard.observe("k400", Seen(11, 1.0, None), True),
        guard.observe("tiny", Seen(12, nan, None), True),  # a loss that is not finite counts
        guard.observe("tiny", Seen(13, nan, None), False),
    ]
    assert events[:3] == [None] * 3
    assert events[3]
    assert (events[3].kind, events[3].dataset, events[3].onset) == ("skipped", "tiny", 10)
    guard = Guard(SECTION, chances())
    found = [guard.observe("k400", Seen(s, 1.0, None), True, False) for s in range(3)]
    assert found[:2] == [None, None]
    assert found[2]
    assert "alphas" in found[2].what


def test_chance_is_the_entropy_of_the_labels_and_of_what_smoothing_makes_of_them():
    even = chance_of([0, 1, 2, 3] * 5, 4, 0.0)
    assert even.loss == pytest.approx(math.log(4))
    assert even.top1 == 0.25
    assert chance_of([0, 1, 2, 3] * 5, 4, 0.1).loss == pytest.approx(math.log(4))
    skewed = chance_of([0] * 3 + [1], 2, 0.0)
    assert skewed.loss == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert skewed.top1 == 0.75
    smooth = chance_of([0] * 3 + [1], 2, 0.2)  # 0.7 and 0.3
    assert smooth.loss == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.3))


def test_a_restored_guard_goes_on_alike():
    """Through JSON, at any moment: the same event at the same step."""

    def steps() -> list[tuple[str, Seen]]:
        return [
            (n, s if s.step < 2500 or n != "ssv2" else Seen(s.step, s.loss, 0.0))
            for n, s in series(sound, 3, 3500)
        ]

    def run(cut: int) -> tuple[int, Event]:
        guard = Guard(SECTION, chances())
        for step, (name, seen) in enumerate(steps()):
            if step == cut:
                state = json.loads(json.dumps(guard.state_dict()))
                guard = Guard(SECTION, chances())
                guard.load_state_dict(state)
            if event := guard.observe(name, seen):
                return step, event
        raise AssertionError("nothing was found")

    whole = run(-1)
    assert whole[0] > 2700
    assert run(whole[0] - 1) == run(2501) == run(1) == whole


def test_after_a_rewind_only_new_steps_are_an_event():
    """The state of the checkpoint holds steps that had nearly made an event."""
    guard = Guard(SECTION, chances())
    steps = [("tiny", Seen(step, 0.4 * math.log(8), None)) for step in range(300)]
    steps += [("tiny", Seen(step, 1.2 * math.log(8), None)) for step in range(300, 309)]
    steps += [("tiny", Seen(309, math.nan, None)), ("tiny", Seen(310, math.nan, None))]
    assert first_event(iter(steps), guard) is None
    guard.restart(311)
    for step in range(311, 330):
        event = guard.observe("tiny", Seen(step, 1.2 * math.log(8), None))
        if event:
            break
    assert event
    assert (event.onset, step) == (311, 320)
    guard, found = Guard(SECTION, chances()), None
    for step in range(500):
        if step == 330:
            guard.restart(330)
        found = guard.observe("tiny", Seen(step, 1.0, 0.7 if step < 300 else 0.0))
        if found:
            break
    assert found
    assert found.onset >= 330


def test_the_learning_rate_falls_from_the_second_try_at_a_place_and_tries_are_bounded():
    section = GuardSection(max_rewinds=3, near=500, margin=50)
    rewinds = Rewinds(section)
    for step in range(0, 2001, 100):
        rewinds.saved(step, step - 400, keep=8)

    def event(onset: int) -> Event:
        return Event("spike", "k400", onset, "what")

    assert rewinds.answer(event(1990), 2000) == 1900
    assert rewinds.lr_factor == 1.0
    assert rewinds.answer(event(1949), 1960) == 1800
    assert rewinds.lr_factor == 0.5
    for step in range(1900, 4001, 100):
        rewinds.saved(step, step - 400, keep=3)
    assert rewinds.answer(event(3999), 4000) == 3900  # elsewhere: a new place, the rate stays
    assert (rewinds.lr_factor, rewinds.tries) == (0.5, 1)
    rewinds.answer(event(3990), 3995)
    rewinds.answer(event(3990), 3995)
    assert rewinds.lr_factor == 0.125
    with pytest.raises(NotSound, match=r"k400 at step 3999, after 3 rewinds.*lower vimnas"):
        rewinds.answer(event(3990), 3999)
    again = Rewinds(section)
    again.load_state_dict(json.loads(json.dumps(rewinds.state_dict())))
    assert again == rewinds
    assert len(again.describe()) == 5


def test_a_checkpoint_that_is_good_enough_is_always_kept():
    """Whatever a run meets, the one from before it began is still among the kept ones."""
    guard = Guard(SECTION, chances())
    rewinds = Rewinds(SECTION)
    rewinds.saved(0, guard.safe(0), keep=2)
    longest = 0
    for name, seen in series(sound, 4, 5000):
        guard.observe(name, seen)
        done = seen.step + 1
        if done % 50 == 0:
            rewinds.saved(done, guard.safe(done), keep=2)
            assert len(rewinds.marks) <= 5
            limit = guard.safe(done)
            assert rewinds.marks[0] <= max(limit, 0)
            longest = max(longest, done - limit)
            # not much older than they must be
            assert done - rewinds.marks[0] <= 4 * longest + 100
    assert rewinds.marks[0] > 2000


def test_the_guard_is_on_for_the_large_spaces_unless_told_otherwise():
    def guarded(space: str, **guard: object) -> bool:
        config = small_config()
        config["vimnas"]["space"] = space
        config["vimnas"]["guard"] = guard
        return parse_config(config).vimnas.guarded

    assert [guarded(s) for s in ("nano", "vit_s", "vit_b", "vit_l")] == [False, False, True, True]
    assert guarded("nano", enabled=True)
    assert not guarded("vit_l", enabled=False)
