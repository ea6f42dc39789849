"""Algorithm 1: the training loop.

One step: draw (dataset, sub-network), forward and backward on that dataset's head, AdamW on the
sampled blocks, then the alpha step on a held-out batch of the same dataset. Around it: log lines,
evaluation on the `select` splits, checkpoints, and at the end the `test` splits, once.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vimnas_ds.checkpoint_names import checkpoint_name
from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.data.capacity import Capacity
from vimnas_ds.data.joint import JointData, Loaders
from vimnas_ds.model.alphas import decisions
from vimnas_ds.report.board import Board
from vimnas_ds.report.console import Console
from vimnas_ds.space import Arch
from vimnas_ds.train.alpha_step import AlphaLearner
from vimnas_ds.train.best import Best
from vimnas_ds.train.checkpoint import (
    finish_save,
    go_back,
    load_checkpoint,
    save_checkpoint,
    seed_generators,
)
from vimnas_ds.train.circumstances import main_settings
from vimnas_ds.train.claim import claim_folder
from vimnas_ds.train.engine import build_engine, build_supernet, start_weights
from vimnas_ds.train.evaluate import Evaluator, Score
from vimnas_ds.train.faults import FaultReport
from vimnas_ds.train.meters import ChoiceCounts, Interval, Meters
from vimnas_ds.train.plan import coming_batches
from vimnas_ds.train.ranks import (
    Ranks,
    StopAsked,
    Wish,
    check_agreement,
    rank_zero_decides,
    run_together,
)
from vimnas_ds.train.recipe import changes, recipe_of
from vimnas_ds.train.recovery import Recovery, Taken, rewind, show
from vimnas_ds.train.run_files import RunFiles, check_same_network
from vimnas_ds.train.schedule import DataCursor, Drawer, Schedule, StepContext
from vimnas_ds.train.status import Exit, Status
from vimnas_ds.train.step import WeightStepper
from vimnas_ds.train.summary import write_summary
from vimnas_ds.train.watch import Watch


class TooManySkippedSteps(RuntimeError):
    """Non-finite losses or gradients, too many steps in a row."""


class StepSummary(NamedTuple):
    """Seconds waited for data, learning rate, and what ranks want done after the step."""

    waited: float
    lr: float
    wishes: Wish


class Preempted(Exception):
    """The run was asked to stop and has saved where it was; the message says why and where."""


class Trainer:
    """One run on this rank; `run` trains to the end. `checkpoint`: where to resume from;
    `overwrite`: an earlier run in its folder may be deleted (both: see `claim.choose_start`)."""

    def __init__(
        self,
        config: RunConfig,
        data: JointData,
        ranks: Ranks,
        checkpoint: Path | None = None,
        watch: Watch | None = None,
        overwrite: bool = False,
    ):
        self.watch = watch or Watch()
        section = config.vimnas
        self.config, self.section, self.data, self.ranks = config, section, data, ranks
        check_agreement(data.fingerprint(), "the lists of data files", ranks)
        self.files = RunFiles(section.output_dir)
        self.schedule = Schedule.build(config, data.sizes)
        self.micro_batch = config.micro_batch(ranks.world_size)
        net = build_supernet(config)
        warm_report = []
        if checkpoint is None:
            warm_report = run_together(lambda: start_weights(net, config), ranks)
        self.engine = build_engine(config, ranks, net)
        if section.ema is not None:
            self.engine.optimizer.start_ema(section.ema.decay)
        space = section.search_space
        self.learner = AlphaLearner(space, section.alpha, section.seed, ranks)
        self.learns_alphas = section.alpha.enabled and space.size() > 1
        self.choices = ChoiceCounts()
        self.meters = Meters(list(section.data.datasets), ranks)
        self.skipped = 0  # weight and alpha steps; in a row, they are counted apart
        self.skipped_in_a_row = self.alphas_skipped_in_a_row = 0
        self.best = Best()
        self.recovery = Recovery(section, data, ranks) if section.guarded else None
        self._saved: int | None = None  # the step whose checkpoint is the latest
        self._is_guest = checkpoint is not None and not self.files.holds(checkpoint)
        self._owes_evaluation = False  # one that was broken off, or is under way
        self._faults_before: dict[str, Any] | None = None
        self._guard_before: dict[str, Any] | None = None  # kept, where it is off now, for later
        self._changed: list[str] = []  # what is not as when the checkpoint was saved, in words
        self._unseen = set(section.data.datasets)  # datasets whose batch is still to be pictured
        self._alpha_losses: dict[str, torch.Tensor] = {}  # of each dataset since the last line
        seed_generators(section.seed, ranks)
        position, later = DataCursor(), list[str]()
        if checkpoint is not None:
            position = run_together(lambda: self.restore(checkpoint), ranks)
            later = run_together(lambda: self._give_up_later(checkpoint), ranks)
            self.forget_missing()
        labels = {name: catalog.class_names for name, catalog in data.catalogs.items()}
        claim_folder(self.files, config, labels, ranks, checkpoint, overwrite)  # it has begun
        is_image = {name: d.is_image for name, d in section.data.datasets.items()}
        sandwich = section.sandwich.random if section.sandwich is not None else None
        self.drawer = Drawer(self.schedule, space, is_image, section.seed, position, sandwich)
        self.loaders = Loaders(data, section.seed, ranks.rank, ranks.world_size, ranks.device)
        self.loaders.give_up = self.watch.stop_asked
        self.stepper = WeightStepper(config, self.engine, self.loaders, ranks)
        self.stepper.at = self.watch.at
        self.evaluator = Evaluator(
            self.loaders,
            ranks,
            self.engine.dtype,
            section.log.eval_batch,
            section.data.cache_mb,
        )
        self.evaluator.give_up = self._ends_evaluation
        self.board, self.console = run_together(self._open_files, ranks)
        self.faults = FaultReport(
            self.loaders, self.evaluator, self.console, self.board, self._faults_before
        )
        self.status = Status(self.files.status, self.watch.launchers.resuming())
        for line in warm_report:
            self.console.say(line)
        self._saved_at = time.monotonic()
        if checkpoint is not None:
            given_up = f"; given up: {', '.join(later)}" if later else ""
            self.console.say(f"resumed from {checkpoint} at step {position.step}{given_up}")
            for line in self._changed:
                self.console.say(f"changed: {line}")

    def _give_up_later(self, checkpoint: Path) -> list[str]:
        """The run goes on from `checkpoint`: names of its later ones, deleted by the main rank."""
        if not self.files.holds(checkpoint) or not self.ranks.is_main:
            return []
        later = go_back(checkpoint.parent, checkpoint.name)
        self.finish_save()
        return later

    def forget_missing(self) -> None:
        """After going back, what is remembered of checkpoints that are not there (collective)."""
        root = self.files.checkpoints
        steps = {self.best.step, *self._spared}

        def present() -> str:
            return json.dumps([s for s in steps if (root / checkpoint_name(s)).is_dir()])

        there = set(json.loads(rank_zero_decides(present, self.ranks, within_timeout=True)))
        if self.section.checkpoint.keep_best and self.best.step not in there:
            self.best = Best()
        if self.recovery is not None:
            rewinds = self.recovery.rewinds
            rewinds.marks = [mark for mark in rewinds.marks if mark in there]

    def _open_files(self) -> tuple[Board, Console]:
        step, is_main = self.drawer.position.step, self.ranks.is_main
        board = Board(self.files.tensorboard, step + 1, is_main)
        picks = [k for k in self.subnets() if "fixed" not in k]
        datasets = list(self.section.data.datasets)
        board.begin(main_settings(self.config, self.ranks), datasets, picks)
        if self._owes_evaluation:
            board.keep(step)
        rewinds = None if self.recovery is None else self.recovery.rewinds
        if rewinds is not None and rewinds.history and rewinds.history[-1]["to"] == step:
            show(rewinds, board, step + 1)  # what was written there is purged
        return board, Console(self.schedule.total_steps, step, self.files.log, is_main)

    # -- one step -----------------------------------------------------------------------------

    def train_step(self, context: StepContext) -> StepSummary:
        """Weight step and alpha step."""
        name = context.dataset
        lr = self.schedule.lr(context.step)
        if self.recovery is not None:
            lr *= self.recovery.rewinds.lr_factor
        keep = self.ranks.is_main and name in self._unseen
        has_alphas = self.learns_alphas and context.step % self.section.alpha.every == 0
        result = self.stepper.step(context, lr, keep, self._wish(), has_alphas)
        if self.stepper.latest is not None:
            self._unseen.discard(name)
            names = self.data.catalogs[name].class_names
            self.board.contact_sheet(context.step + 1, name, *self.stepper.latest, names)
        if self.engine.was_applied:
            self.meters.add(name, result.loss, result.correct, result.count)
        self._guard(context)
        self.drawer.advance(context)
        for arch in context.random_archs:
            self.choices.add(arch)
        waited, alphas = result.waited, None
        if has_alphas:
            waited += self._alpha_step(context)
            alphas = self.learner.was_applied
        if self.recovery is not None:
            self.recovery.add(Taken(context.step, name, self.engine.was_applied, alphas), result)
        return StepSummary(waited, lr, Wish(result.wishes))

    def _wish(self) -> Wish:
        """What this rank wants all to do after the coming step."""
        minutes = self.section.checkpoint.minutes
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        return Wish.SAVE if late and self.ranks.is_main else Wish(0)

    def _alpha_step(self, context: StepContext) -> float:
        name = context.dataset
        self.watch.at("alpha", context.step + 1)
        number = self.drawer.next_alpha_batch(name)
        started = time.perf_counter()
        batch = self.loaders.batch(name, "alpha", self.config.alpha_batch, number)
        waited = time.perf_counter() - started
        x = batch.x.to(self.ranks.device, self.engine.dtype)
        y = batch.y.to(self.ranks.device)
        del batch
        self._alpha_losses[name] = self.learner.step(self.engine.net, x, y, name)
        if self.learner.was_applied:
            self.alphas_skipped_in_a_row = 0
        else:
            self.alphas_skipped_in_a_row += 1
            self._skip(context, "alpha step", self.alphas_skipped_in_a_row)
        return waited

    def _guard(self, context: StepContext) -> None:
        """Count skipped steps; the engine has seen to it that all ranks skip the same ones."""
        if self.engine.was_applied:
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            self._skip(context, "weight step", self.skipped_in_a_row)

    def _skip(self, context: StepContext, what: str, in_a_row: int) -> None:
        self.skipped += 1
        self.console.say(
            f"step {context.step + 1}: the {what} was skipped, non-finite gradient on "
            f"{context.dataset} with {context.archs[0]} ({in_a_row} in a row)"
        )
        # a guarded run rewinds instead (see `recovery`)
        if self.recovery is None and in_a_row >= self.section.optimizer.max_skipped:
            raise TooManySkippedSteps(
                f"{in_a_row} {what}s in a row had non-finite gradients, the last on "
                f"{context.dataset}: lower the learning rate, or switch on qk_norm, layer_scale or "
                "gradient_clipping (vimnas.model, docs/failures.md)"
            )

    # -- the run --------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the summary (also in summary.json).

        Raises Preempted, with a checkpoint of the step reached, when the watch asks for a stop.
        """
        if self.ranks.is_main:
            self.status.write(self.drawer.position.step, "under way")
        self.watch.begin(self.last_words)
        try:
            return self._run()
        except StopAsked as error:
            done = self.drawer.position.step
            if self._saved != done:
                self.save(done)
            raise Preempted(f"{self.watch.reason}: saved and stopped after step {done}") from error

    def _run(self) -> dict[str, Any]:
        section, total = self.section, self.schedule.total_steps
        log = section.log
        for line in (*self.data.describe(), *self.data.doubts()):
            self.console.say(line)
        self.console.say(
            f"{total} steps, {self.ranks.world_size} ranks x {self.micro_batch} samples, "
            f"{'bf16' if self.engine.dtype == torch.bfloat16 else 'fp32'} on "
            f"{self.ranks.device.type}"
        )
        self.watch.at("data", self.drawer.position.step + 1)
        self.console.say(str(self.read_ahead()))
        if self._is_guest:  # killed from now on, it finds one of its own to go on from
            self.save(self.drawer.position.step)
        if self._owes_evaluation:
            self.evaluate(self.drawer.position.step)
            self.save(self.drawer.position.step)
        if self.recovery is not None and not self.recovery.rewinds.marks:
            self.save(self.drawer.position.step)  # so that there is always one to rewind to
        interval = Interval(self.config.global_batch)
        while (step := self.drawer.position.step) < total:
            context = self.drawer.draw()
            with interval:
                taken = self.train_step(context)
            interval.waited += taken.waited
            done = step + 1
            if self.recovery is not None and (done % self.recovery.every == 0 or done == total):
                event = self.recovery.judge()
                if event is not None:
                    rewind(self, self.recovery, event)
                    continue
            if done % log.every == 0 or done in (1, total):  # the same ones, resumed or not
                self._log(context, taken.lr, interval)
            if done % log.images_every == 0 or done == total:
                self._pictures(done)
            ends = self.schedule.is_epoch_end(step)
            due = Wish.SAVE in taken.wishes
            if done == total or (done % log.eval_every == 0 if log.eval_every else ends):
                due |= self.evaluate(done)
            if due or self._saves_at(done):
                self.save(done)
        return self.summarise()

    def _saves_at(self, done: int) -> bool:
        """Whether the configuration has a checkpoint after `done` steps."""
        every, ends = self.section.checkpoint.every, self.schedule.is_epoch_end(done - 1)
        return done == self.schedule.total_steps or (done % every == 0 if every else ends)

    def read_ahead(self) -> Capacity:
        """Have batches made ahead from the present place in the data on."""
        sizes = {"train": self.config.global_batch}
        if self.learns_alphas:
            sizes["alpha"] = self.config.alpha_batch
        every = self.section.alpha.every if self.learns_alphas else None
        return self.loaders.follow(coming_batches(self.drawer, every), sizes)

    def _log(self, context: StepContext, lr: float, interval: Interval) -> None:
        done = context.step + 1
        rate, waited = interval.take()
        means: dict[str, tuple[float, float | None]] = {}
        for name, (loss, top1) in self.meters.take().items():
            data = self.section.data.datasets[name]
            # with mixed labels there is no right answer to count
            means[name] = (loss, None if data.mixup or data.cutmix else top1)
            self.board.train_loss(done, name, *means[name])
        self.board.train_step(done, lr, rate, waited, self.skipped)
        for name, alpha_loss in self._alpha_losses.items():
            self.board.alpha_step(done, name, float(alpha_loss))
        self._alpha_losses.clear()
        shown_loss, shown_top1 = means.get(context.dataset, (float("nan"), None))
        self.console.step_line(
            done,
            context.epoch,
            context.phase,
            context.dataset,
            context.archs[0],
            shown_loss,
            shown_top1,
            lr,
            rate,
            waited,
        )
        self.faults.report(done)

    def _pictures(self, done: int) -> None:
        self._unseen = set(self.section.data.datasets)
        probabilities = {
            name: p.detach().tolist() for name, p in self.learner.alphas.probabilities().items()
        }
        self.board.alphas(done, probabilities, decisions(self.section.search_space))
        self.board.sampled_choices(done, self.choices.state_dict())

    # -- evaluation -----------------------------------------------------------------------------

    def subnets(self) -> dict[str, Arch]:
        """The sub-networks evaluated during training: the corners and some fixed random ones."""
        space, log = self.section.search_space, self.section.log
        fixed = {
            f"fixed{i}": space.sample(random.Random(f"{self.section.seed}/fixed/{i}"))
            for i in range(log.eval_subnets)
        }
        if space.size() == 1:
            return {"arch": space.largest()}
        return {"largest": space.largest(), "smallest": space.smallest(), **fixed}

    def scores(self, archs: Mapping[str, Arch], dataset: str, split: str) -> dict[str, Score]:
        """Sub-networks on one split, in eval mode, in one pass over its samples, on all ranks."""
        net = self.engine.net
        net.eval()
        try:
            forwards = {k: partial(net, arch=a, dataset=dataset) for k, a in archs.items()}
            return self.evaluator.scores(forwards, dataset, split)
        finally:
            net.train()

    def evaluate(self, done: int) -> bool:
        """Every fixed sub-network on the `select` split of every dataset drawn so far; the first of
        them also with the averaged weights, where there are any. Whether this is the best step so
        far (and such are kept)."""
        self.watch.at("evaluate", done)
        self._owes_evaluation = True
        archs, parts = self.subnets(), []
        drawn = [d for d in self.section.data.datasets if d in self.drawer.position.consumed]
        found = {dataset: self.scores(archs, dataset, "select") for dataset in drawn}
        means = {
            d: statistics.fmean(s.top1 for s in scores.values()) for d, scores in found.items()
        }
        if self.section.ema is not None:
            label, arch = next(iter(archs.items()))
            with self.engine.averaged():
                for dataset, scores in found.items():
                    scores |= self.scores({f"{label}_ema": arch}, dataset, "select")
        self._owes_evaluation = False
        for dataset, scores in found.items():
            for label, s in scores.items():
                self.board.evaluation(done, dataset, label, s.loss, s.top1, s.top5)
            shown = (f"{k} {s.top1:.1%}" for k, s in scores.items() if "fixed" not in k)
            parts.append(f"{dataset} {' '.join(shown)}")
        self.console.say(f"select at step {done}: " + "; ".join(parts))
        return self.best.improves(done, means) and self.section.checkpoint.keep_best

    def _ends_evaluation(self) -> bool:
        self.watch.go_on()
        return self.watch.stop_asked()

    def summarise(self) -> dict[str, Any]:
        """Scores of largest and smallest on the test splits: read here, once, and nowhere else
        (with vimnas.log.test_at_end false not even here)."""
        self.watch.at("summary", self.schedule.total_steps)
        picks = {k: a for k, a in self.subnets().items() if "fixed" not in k}
        names = self.section.data.datasets if self.section.log.test_at_end else ()
        scores = {name: self.scores(picks, name, "test") for name in names}
        self.faults.collect(self.schedule.total_steps)
        if not self.ranks.is_main:
            return {}
        top1 = {name: {k: s.top1 for k, s in found.items()} for name, found in scores.items()}
        self.board.end(self.schedule.total_steps + 1, top1)
        faults = {
            "skipped_steps": self.skipped,
            "samples_replaced": self.faults.replaced,
            "replaced_by_reason": {k: dict(v) for k, v in self.faults.reasons.items() if v},
            "slow_batches": self.faults.slow_batches,
            "files_left_out": {k: len(v) for k, v in self.faults.left_out.items() if v},
            "rewinds": [] if self.recovery is None else self.recovery.rewinds.describe(),
        }
        summary = write_summary(self.config, self.data, self.files, picks, scores, faults)
        for line in summary["table"].splitlines():
            self.console.say(line)
        return summary

    # -- state ----------------------------------------------------------------------------------

    def save(self, done: int) -> Path:
        """A checkpoint after `done` steps, on all ranks. Raises SaveFailed, on all of them."""
        started = time.monotonic()
        self.watch.at("save", done)
        self.faults.collect(done)
        root, keeping, guard = self.files.checkpoints, self.section.checkpoint, self.recovery
        if guard is not None and (not guard.rewinds.marks or self._saves_at(done)):
            guard.saved(done, keeping.keep)
        self.board.flush()  # a resumed run writes no point of these steps again
        state = {
            "position": self.drawer.position.state_dict(),
            "learner": self.learner.state_dict(),
            "choices": self.choices.state_dict(),
            "skipped": (self.skipped, self.skipped_in_a_row, self.alphas_skipped_in_a_row),
            "faults": self.faults.state_dict(),
            "meters": self.meters.state_dict(),
            "best": self.best.state_dict(),
            "unseen": sorted(self._unseen),
            "alpha_losses": dict(self._alpha_losses),
            "owes_evaluation": self._owes_evaluation,
            "guard": self._guard_before if guard is None else guard.state_dict(),
            "recipe": recipe_of(self.config),
            "identity": self._identity(),
        }
        is_best = keeping.keep_best and 0 < self.best.step == done  # 0: nothing is scored yet
        path = save_checkpoint(
            root, done, self.engine, state, self.ranks, keeping.keep, is_best, self._spared
        )
        self._saved, self._saved_at = done, time.monotonic()
        if self.ranks.is_main:
            size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
            self.console.say(
                f"saved {path.name}: {size:,.1f} MB in {self._saved_at - started:.1f} s"
            )
            self.status.write(done, "under way")
        return path

    @property
    def _spared(self) -> list[int]:
        """Steps whose checkpoints the guard may need."""
        return [] if self.recovery is None else self.recovery.rewinds.marks

    def finish_save(self) -> None:
        """After going back to a checkpoint, the main rank alone: what its save may have died
        over."""
        keeping = self.section.checkpoint
        best = (self.best.step or None) if keeping.keep_best else None
        finish_save(self.files.checkpoints, keeping.keep, best, self._spared)

    def restore(self, checkpoint: Path) -> DataCursor:
        """Everything as it was at the checkpoint, on this rank; returns the place in the data.

        Raises ConfigError when it is of another run.
        """
        check_same_network(checkpoint, self.config)
        state = load_checkpoint(checkpoint, self.engine, self.ranks)
        if odd := changes(state["identity"], self._identity()):
            raise ConfigError(
                f"{checkpoint} is of another run: {'; '.join(odd)}; to train on from its weights "
                "as another run: --inherit, and another vimnas.output_dir"
            )
        self.learner.load_state_dict(state["learner"])
        self.choices.load_state_dict(state["choices"])
        self.meters.load_state_dict(state["meters"])
        self.best.load_state_dict(state["best"])
        self._unseen = set(state["unseen"])
        self._alpha_losses = state["alpha_losses"]
        self._changed = changes(state.get("recipe", {}), recipe_of(self.config))
        if self.recovery is not None and state["guard"] is not None:
            self.recovery.load_state_dict(state["guard"])
            if self._changed:
                self.recovery.begin_again(state["position"]["step"])
        elif state["guard"] is not None:
            self._guard_before = state["guard"]
            factor = state["guard"]["rewinds"]["lr_factor"]
            if factor != 1:
                self._changed.append(
                    f"without the guard the learning rate is the schedule's, no more {factor:g} of "
                    "it as after its rewinds; vimnas.schedule.lr sets another one"
                )
        self.skipped, self.skipped_in_a_row, self.alphas_skipped_in_a_row = state["skipped"]
        self._faults_before = state["faults"]
        self._owes_evaluation = state["owes_evaluation"]
        self._saved = None
        return DataCursor.from_state(state["position"])

    def _identity(self) -> dict[str, Any]:
        """What must not change under a run for its draws and weights to mean the same."""
        section = self.section
        return {
            "space": section.space,
            "arch": section.arch and section.arch.model_dump(mode="json"),
            "seed": section.seed,
            "global batch": self.config.global_batch,
            "data files": (self.data.sizes, self.data.fingerprint()),
            "tokens": section.tokens.model_dump(mode="json"),
            "qk_norm": section.model.qk_norm,
            "layer_scale": section.model.layer_scale,
            "schedule": section.schedule.model_dump(mode="json", exclude={"lr", "min_lr"}),
            "ema": section.ema is not None,
            "data": {
                name: {"size": data.size, "frames": data.frames}
                for name, data in section.data.datasets.items()
            },
        }

    def last_words(self, text: str, code: Exit) -> None:
        """How the run ends, into its files; the watch's thread calls it when this one is stuck."""
        self.status.write(self.drawer.position.step, text, code)
        self.console.say(text)
        if code in (Exit.RESUMABLE, Exit.FAILED):
            self.console.say(f"continue with: {self.watch.launchers.resuming()}")
        self.board.close()

    def close(self) -> None:
        """Stop threads, flush files."""
        self.loaders.close()
        self.board.close()
        self.console.close()
