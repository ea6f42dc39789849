"""Algorithm 1's schedule: which dataset, which sub-network, which batch, which learning rate.

Steps 0 .. image_steps draw the image dataset alone, the rest one dataset each, with probability
proportional to its size. Every draw is a pure function of (seed, cursor), so all ranks, any world
size and a resumed run agree; the cursor counts batches drawn, the step counts updates, and they
part only when a guard skips batches. Nothing here knows torch.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.layout import Activation
from vimnas_ds.space import Arch, SearchSpace


@dataclass(frozen=True)
class StepContext:
    """All that one optimiser step needs to know, the same on every rank."""

    step: int
    cursor: int
    phase: str  #: "image" or "joint"
    epoch: int
    dataset: str
    is_image: bool
    archs: tuple[Arch, ...]  #: one; by the sandwich rule largest, smallest, random ones
    batch_index: int  #: how many batches of this dataset were drawn before

    @property
    def activation(self) -> Activation:
        """What the step touches; everything else stays frozen."""
        return Activation(self.archs, self.dataset, self.is_image)

    @property
    def random_archs(self) -> tuple[Arch, ...]:
        """Those drawn at random: all but a sandwich's two fixed ones."""
        return self.archs[2:] if len(self.archs) > 1 else self.archs

    def fingerprint(self) -> int:
        """63 bits of (step, cursor, dataset, archs, batch), compared across ranks."""
        text = repr((self.step, self.cursor, self.dataset, self.batch_index, self.archs))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Schedule:
    """Phases and learning rate over `total_steps` optimiser steps."""

    batch: int
    sizes: Mapping[str, int]  #: training files per dataset
    image_dataset: str | None
    image_epochs: int
    epochs: int
    peak_lr: float
    min_lr: float
    warmup_steps: int
    image_epoch_steps: int
    joint_epoch_steps: int

    @classmethod
    def build(cls, config: RunConfig, sizes: Mapping[str, int]) -> Schedule:
        """From a configuration and the number of training files of each dataset.

        Raises ConfigError for a warm-up that is longer than the run.
        """
        section, batch = config.vimnas.schedule, config.global_batch
        image = config.vimnas.image_dataset
        image_steps = math.ceil(sizes[image] / batch) if image is not None else 0
        joint_steps = math.ceil(sum(sizes.values()) / batch)
        image_epochs = config.vimnas.image_epochs
        warmup = section.warmup
        if section.warmup_unit == "epochs":
            early = min(warmup, image_epochs)
            warmup = early * image_steps + (warmup - early) * joint_steps
        total = image_epochs * image_steps + (section.epochs - image_epochs) * joint_steps
        if warmup > total:
            raise ConfigError(
                f"vimnas.schedule.warmup {section.warmup:g} {section.warmup_unit} exceeds the "
                f"run's {total:,} steps: the peak would never be reached"
            )
        return cls(
            batch,
            dict(sizes),
            image,
            image_epochs,
            section.epochs,
            config.vimnas.peak_lr,
            section.min_lr,
            round(warmup),
            image_steps,
            joint_steps,
        )

    @property
    def image_steps(self) -> int:
        """Length of the image phase, in steps."""
        return self.image_epochs * self.image_epoch_steps

    @property
    def total_steps(self) -> int:
        return self.image_steps + (self.epochs - self.image_epochs) * self.joint_epoch_steps

    def phase(self, step: int) -> str:
        return "image" if step < self.image_steps else "joint"

    def epoch(self, step: int) -> int:
        """Epoch that `step` belongs to, from 0."""
        if step < self.image_steps:
            return step // self.image_epoch_steps
        return self.image_epochs + (step - self.image_steps) // self.joint_epoch_steps

    def is_epoch_end(self, step: int) -> bool:
        """Whether the step after `step` starts a new epoch (or none follows)."""
        return step + 1 >= self.total_steps or self.epoch(step + 1) != self.epoch(step)

    def lr(self, step: int) -> float:
        """Linear warm-up to the peak, then a half cosine down to min_lr."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        half = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        return self.min_lr + (self.peak_lr - self.min_lr) * half


@dataclass
class DataCursor:
    """Where the run stands in its data; the only state of the draws, saved in checkpoints."""

    step: int = 0
    cursor: int = 0
    consumed: dict[str, int] = field(default_factory=dict)  #: training batches per dataset
    alpha_consumed: dict[str, int] = field(default_factory=dict)  #: alpha batches per dataset

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "cursor": self.cursor,
            "consumed": dict(self.consumed),
            "alpha_consumed": dict(self.alpha_consumed),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DataCursor:
        return cls(
            state["step"], state["cursor"], dict(state["consumed"]), dict(state["alpha_consumed"])
        )


class Drawer:
    """Draws step contexts. `advance` moves the cursor past a drawn batch, applied or not.

    `sandwich`: how many random sub-networks join the space's largest and smallest in every step;
    None: one random sub-network alone. A space of one member is drawn as that member.
    """

    def __init__(
        self,
        schedule: Schedule,
        space: SearchSpace,
        is_image: Mapping[str, bool],
        seed: int,
        cursor: DataCursor | None = None,
        sandwich: int | None = None,
    ):
        self.schedule, self.space, self.seed, self.sandwich = schedule, space, seed, sandwich
        self.is_image = dict(is_image)
        self.position = cursor or DataCursor()

    def draw(self) -> StepContext:
        """The context of the next step; calling it twice gives it twice."""
        now, schedule = self.position, self.schedule
        phase = schedule.phase(now.step)
        if phase == "image":
            assert schedule.image_dataset is not None
            dataset = schedule.image_dataset
        else:
            rng = random.Random(f"{self.seed}/dataset/{now.cursor}")
            names = sorted(schedule.sizes)  # not in the order of the configuration's keys
            dataset = rng.choices(names, [schedule.sizes[n] for n in names])[0]
        return StepContext(
            now.step,
            now.cursor,
            phase,
            schedule.epoch(now.step),
            dataset,
            self.is_image[dataset],
            self._archs(now.cursor),
            now.consumed.get(dataset, 0),
        )

    def _archs(self, cursor: int) -> tuple[Arch, ...]:
        rng, space = random.Random(f"{self.seed}/arch/{cursor}"), self.space
        if self.sandwich is None or space.size() == 1:
            return (space.sample(rng),)
        drawn = (space.sample(rng) for _ in range(self.sandwich))
        return (space.largest(), space.smallest(), *drawn)

    def advance(self, context: StepContext) -> None:
        """Move past `context`'s batch and on to the next step."""
        consumed = self.position.consumed
        consumed[context.dataset] = consumed.get(context.dataset, 0) + 1
        self.position.cursor += 1
        self.position.step += 1

    def next_alpha_batch(self, dataset: str) -> int:
        """Index of the next alpha batch of `dataset`; each call takes one."""
        index = self.position.alpha_consumed.get(dataset, 0)
        self.position.alpha_consumed[dataset] = index + 1
        return index
