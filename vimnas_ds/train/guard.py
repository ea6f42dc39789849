"""The collapse guard's judgement: is training still sound, and if not, what is to be done.

Per dataset (`DatasetWatch`), from its steps' losses and accuracies, means over all ranks:

    skipped   `skipped` steps in a row had non-finite gradients (weight and alpha steps apart)
    spike     `spike_steps` losses in a row > b + max(r (c - b), c / 4), and > 2 q - b
    collapse  the median of `collapse_steps` losses >= c - (1 - l) (c - best), or the mean top-1
              <= a + (1 - l) (best - a), where the best over 4 times as many steps had gained
              `collapse_gain` (looked at every `collapse_steps` / 10 steps)

b and q are the median and the upper decile of the 100 losses before, r `spike_rise`, l
`collapse_loss`. c and a are what a network gets that has learned the labels' frequencies p and
nothing else: c = H((1 - s) p + s / K) under label smoothing s (mixup does not change it; ln K where
classes are equally frequent) and a = max p. Sub-networks of very different size are drawn, so one
high loss means nothing: only what a sound run does not do many times in a row counts, and a
dataset that has not learned yet cannot collapse.

Everything here is a function of the numbers that were fed; the state is plain JSON, part of every
checkpoint. Hence a run killed at any moment after an event, before its next checkpoint, repeats
the steps since the checkpoint it resumes from, meets the same event and answers it alike. Nothing
is lost by a kill between the event and that checkpoint, so the answer needs no file of its own.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from vimnas_ds.config import GuardSection

#: losses that a spike is compared with, and how few of them will do
BASELINE, ENOUGH = 100, 30
#: what had been gained is measured over this many times `collapse_steps`
LONG = 4


class Chance(NamedTuple):
    """What a network gets that knows how frequent each class is and nothing else."""

    loss: float
    top1: float


def chance_of(labels: Iterable[int], num_classes: int, smoothing: float) -> Chance:
    """Loss (nats) and top-1 of the best constant answer to training labels."""
    counts = Counter(labels)
    total = counts.total()
    shares = (
        (1 - smoothing) * counts[k] / total + smoothing / num_classes for k in range(num_classes)
    )
    return Chance(-sum(p * math.log(p) for p in shares if p > 0), max(counts.values()) / total)


@dataclass(frozen=True)
class Event:
    """Training is not sound since step `onset` (from 0)."""

    kind: str  #: "skipped", "spike" or "collapse"
    dataset: str
    onset: int
    what: str  #: in words


class Seen(NamedTuple):
    """One applied step of a dataset: means over all ranks."""

    step: int
    loss: float
    top1: float | None  #: None where labels are mixed


class DatasetWatch:
    """One dataset's series and what it says."""

    def __init__(self, name: str, section: GuardSection, chance: Chance):
        self.name, self.section, self.chance = name, section, chance
        length = max(section.spike_steps + BASELINE, LONG * section.collapse_steps)
        self._seen: deque[Seen] = deque(maxlen=length)
        self._skipped: dict[str, list[int]] = {"weights": [], "alphas": []}
        self._count = 0  #: applied steps
        self._since = 0  #: steps before this one are what later ones are compared with, no more
        self._best_loss, self._best_top1 = math.inf, 0.0

    def restart(self, step: int) -> None:
        """After a rewind to `step`, where all was well: only what comes now can be an event."""
        self._since = step
        self._skipped = {part: [] for part in self._skipped}

    def skip(self, part: str, step: int, was_applied: bool) -> Event | None:
        """Whether the step of "weights" or "alphas" was applied."""
        if was_applied:
            self._skipped[part] = []
            return None
        self._skipped[part].append(step)
        if len(self._skipped[part]) < self.section.skipped:
            return None
        count, onset = len(self._skipped[part]), self._skipped[part][0]
        return self._event("skipped", onset, f"{count} steps of the {part} in a row not finite")

    def add(self, seen: Seen) -> Event | None:
        """The next applied step; its loss is finite."""
        self._seen.append(seen)
        self._count += 1
        return self._spike() or self._collapse()

    def first_step(self) -> int | None:
        """The earliest step at which something may have begun that is found from now on."""
        skipped = [steps[0] for steps in self._skipped.values() if steps]
        latest = max(self.section.collapse_steps, self.section.spike_steps)
        return min([*skipped, *(s.step for s in list(self._seen)[-latest:][:1])], default=None)

    def _spike(self) -> Event | None:
        count, chance = self.section.spike_steps, self.chance.loss
        losses = [s.loss for s in list(self._seen)[-count - BASELINE :]]
        before, lowest = losses[:-count], min(losses[-count:])
        if len(before) < ENOUGH or self._seen[-count].step < self._since:
            return None
        if lowest <= min(before) + chance / 4:  # the rule can but say no
            return None
        before.sort()
        usual, high = before[len(before) // 2], before[len(before) * 9 // 10]
        rise = max(self.section.spike_rise * (chance - usual), chance / 4)
        if lowest <= max(usual + rise, 2 * high - usual):
            return None
        words = f"{count} losses in a row of at least {lowest:.3f}, after {usual:.3f}"
        return self._event("spike", self._seen[-count].step, words)

    def _collapse(self) -> Event | None:
        section, (chance, top1_of_chance) = self.section, self.chance
        count, kept = section.collapse_steps, 1 - section.collapse_loss
        if self._count % (count // 10) or len(self._seen) < LONG * count:
            return None
        seen = list(self._seen)[-LONG * count :]
        last, words = seen[-count:], ""
        if last[0].step < self._since:
            return None
        self._best_loss = min(self._best_loss, statistics.median(s.loss for s in seen))
        gained = chance - self._best_loss
        if gained >= section.collapse_gain * chance:
            loss = statistics.median(s.loss for s in last)
            if loss >= chance - kept * gained:
                words = f"loss {loss:.3f} over {count} steps, that of chance is {chance:.3f}"
        rights = [s.top1 for s in seen if s.top1 is not None]
        if len(rights) == len(seen):
            self._best_top1 = max(self._best_top1, statistics.fmean(rights))
            gained = self._best_top1 - top1_of_chance
            top1 = statistics.fmean(rights[-count:])
            if gained >= section.collapse_gain and top1 <= top1_of_chance + kept * gained:
                words = f"top-1 {top1:.1%} over {count} steps, chance is {top1_of_chance:.1%}"
        return self._event("collapse", last[0].step, words) if words else None

    def _event(self, kind: str, onset: int, words: str) -> Event:
        return Event(kind, self.name, onset, words)

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": [list(s) for s in self._seen],
            "count": self._count,
            "since": self._since,
            "skipped": {k: list(v) for k, v in self._skipped.items()},
            "best": None if math.isinf(self._best_loss) else [self._best_loss, self._best_top1],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen.clear()
        self._seen.extend(Seen(*values) for values in state["seen"])
        self._count, self._since = state["count"], state["since"]
        self._skipped = {k: list(v) for k, v in state["skipped"].items()}
        self._best_loss, self._best_top1 = state["best"] or (math.inf, 0.0)


class NotSound(RuntimeError):
    """The guard has rewound as often as it may."""


@dataclass
class Rewinds:
    """What is done about events: where to, at which learning rate, how often. Kept, unlike all
    else, when a run rewinds."""

    section: GuardSection
    lr_factor: float = 1.0  #: on the schedule's learning rate, from now on
    tries: int = 0  #: rewinds at the present place
    history: list[dict[str, Any]] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)  #: steps whose checkpoints are kept for a rewind

    def saved(self, step: int, safe: int, keep: int) -> None:
        """A checkpoint of the schedule was saved after `step` steps. Besides the last `keep` three
        are kept: the newest that will do for whatever is found later (at most `safe` steps, see
        `Guard.safe`), the one before it, and the one that is to replace it."""
        marks = [mark for mark in self.marks if mark < step] + [step]
        good = [mark for mark in marks if mark <= safe]
        coming = marks[len(good) :]
        self.marks = sorted({*(good[-2:] or marks[:1]), *coming[:1], *marks[-keep:]})

    def mark_before(self, event: Event) -> int:
        """The newest mark from well before the trouble began."""
        good = [mark for mark in self.marks if mark <= event.onset - self.section.margin]
        return good[-1] if good else self.marks[0]

    def answer(self, event: Event, step: int) -> int:
        """The mark to rewind to from `step`. Sets the learning rate: as it was on the first try at
        a place, lower on every further one.

        Raises NotSound after `max_rewinds` at one place.
        """
        section = self.section
        near = bool(self.history) and step <= self.history[-1]["step"] + section.near
        self.tries = self.tries + 1 if near else 1
        if self.tries > section.max_rewinds:
            raise NotSound(
                f"{event.what} on {event.dataset} at step {step}, after {section.max_rewinds} "
                f"rewinds near there, the learning rate at {self.lr_factor:g} of the schedule's: "
                "lower vimnas.schedule.lr or the weight decay, or switch on gradient_clipping, and "
                f"--resume: with such a change there are {section.max_rewinds} rewinds again, "
                "without one it comes to the same; qk_norm and layer_scale need a new run "
                "(docs/failures.md)"
            )
        if self.tries > 1:
            self.lr_factor *= section.lr_factor
        to = self.mark_before(event)
        self.marks = [mark for mark in self.marks if mark <= to]
        self.history.append({**asdict(event), "step": step, "to": to, "lr_factor": self.lr_factor})
        return to

    def settle(self, to: int) -> None:
        """It is to be an earlier mark than `answer` said: those between could not be used."""
        self.marks = [mark for mark in self.marks if mark <= to]
        self.history[-1]["to"] = to

    def describe(self) -> list[str]:
        """A line for each event."""
        return [
            f"step {e['step']}: {e['kind']} on {e['dataset']} since step {e['onset'] + 1} "
            f"({e['what']}): rewound to step {e['to']}, learning rate x {e['lr_factor']:g}"
            for e in self.history
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "lr_factor": self.lr_factor,
            "tries": self.tries,
            "history": [dict(e) for e in self.history],
            "marks": list(self.marks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lr_factor, self.tries = state["lr_factor"], state["tries"]
        self.history = [dict(e) for e in state["history"]]
        self.marks = list(state["marks"])


class Guard:
    """All datasets' watches."""

    def __init__(self, section: GuardSection, chances: Mapping[str, Chance]):
        self.section = section
        self._watches = {name: DatasetWatch(name, section, c) for name, c in chances.items()}

    def observe(
        self,
        dataset: str,
        seen: Seen,
        weights_applied: bool = True,
        alphas_applied: bool | None = None,
    ) -> Event | None:
        """One step, in order. `seen` counts where weights were updated and its loss is finite;
        alphas_applied: None on a step without an alpha step."""
        watch, sound = self._watches[dataset], weights_applied and math.isfinite(seen.loss)
        event = watch.skip("weights", seen.step, sound)
        if alphas_applied is not None:
            event = event or watch.skip("alphas", seen.step, alphas_applied)
        if sound:
            event = event or watch.add(seen)
        return event

    def restart(self, step: int) -> None:
        """See `DatasetWatch.restart`."""
        for watch in self._watches.values():
            watch.restart(step)

    def safe(self, step: int) -> int:
        """What is found after `step` steps or later is answered by a checkpoint of this step."""
        found = [w.first_step() for w in self._watches.values()]
        return min([step, *(f for f in found if f is not None)]) - self.section.margin

    def state_dict(self) -> dict[str, Any]:
        return {name: watch.state_dict() for name, watch in self._watches.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, watch in self._watches.items():
            watch.load_state_dict(state[name])
