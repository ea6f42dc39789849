"""Algorithm 1: the training loop.

One step: draw (dataset, sub-network), forward and backward on that dataset's head, AdamW on the
sampled blocks, then the alpha step on a held-out batch of the same dataset. Around it: log lines,
evaluation on the `select` splits, checkpoints, and at the end the `test` splits, once.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.data.capacity import Capacity
from vimnas_ds.data.joint import JointData, Loaders
from vimnas_ds.model.alphas import decisions
from vimnas_ds.report.board import Board
from vimnas_ds.report.console import Console
from vimnas_ds.space import Arch
from vimnas_ds.train.alpha_step import AlphaLearner
from vimnas_ds.train.best import Best
from vimnas_ds.train.checkpoint import go_back, load_checkpoint, save_checkpoint
from vimnas_ds.train.circumstances import main_settings
from vimnas_ds.train.engine import build_engine, build_supernet, start_weights
from vimnas_ds.train.evaluate import Evaluator, Score
from vimnas_ds.train.faults import FaultReport
from vimnas_ds.train.meters import ChoiceCounts, Interval, Meters
from vimnas_ds.train.plan import coming_batches
from vimnas_ds.train.ranks import Ranks, Wish, check_agreement, run_together
from vimnas_ds.train.run_files import RunFiles, check_same_network, claim_folder
from vimnas_ds.train.schedule import DataCursor, Drawer, Schedule, StepContext
from vimnas_ds.train.step import WeightStepper
from vimnas_ds.train.summary import write_summary


class TooManySkippedSteps(RuntimeError):
    """Non-finite losses or gradients, too many steps in a row."""


class StepSummary(NamedTuple):
    """Seconds waited for data, learning rate, and what ranks want done after the step."""

    waited: float
    lr: float
    wishes: Wish


class Trainer:
    """One run on this rank; `run` trains to the end. `checkpoint`: where to resume from."""

    def __init__(
        self,
        config: RunConfig,
        data: JointData,
        ranks: Ranks,
        checkpoint: Path | None = None,
    ):
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
        space = section.search_space
        self.learner = AlphaLearner(space, section.alpha, section.seed, ranks)
        self.learns_alphas = section.alpha.enabled and space.size() > 1
        self.choices = ChoiceCounts()
        self.meters = Meters(list(section.data.datasets), ranks)
        self.skipped = self.skipped_in_a_row = 0
        self.best = Best()
        self._faults_before: dict[str, Any] | None = None
        position, later = DataCursor(), list[str]()
        if checkpoint is not None:
            position = run_together(lambda: self.restore(checkpoint), ranks)
            if ranks.is_main and checkpoint.parent.resolve() == self.files.checkpoints.resolve():
                later = go_back(checkpoint.parent, checkpoint.name)
        labels = {name: catalog.class_names for name, catalog in data.catalogs.items()}
        claim_folder(self.files, config, labels, ranks, checkpoint is None)  # the run has begun
        is_image = {name: d.is_image for name, d in section.data.datasets.items()}
        self.drawer = Drawer(self.schedule, space, is_image, section.seed, position)
        self.loaders = Loaders(data, section.seed, ranks.rank, ranks.world_size, ranks.device)
        self.stepper = WeightStepper(config, self.engine, self.loaders, ranks)
        self.evaluator = Evaluator(
            self.loaders,
            ranks,
            self.engine.dtype,
            section.log.eval_batch,
            section.data.cache_mb,
        )
        self.board = Board(self.files.tensorboard, position.step + 1, ranks.is_main)
        picks = [k for k in self.subnets() if "fixed" not in k]
        self.board.begin(main_settings(config, ranks), list(section.data.datasets), picks)
        total = self.schedule.total_steps
        self.console = Console(total, position.step, self.files.log, ranks.is_main)
        self.faults = FaultReport(
            self.loaders, self.evaluator, self.console, self.board, self._faults_before
        )
        self._unseen = set(section.data.datasets)  # datasets whose batch is still to be pictured
        self._alpha_losses: dict[str, torch.Tensor] = {}  # the latest of each dataset
        for line in warm_report:
            self.console.say(line)
        self._saved_at = time.monotonic()
        if checkpoint is not None:
            given_up = f"; given up: {', '.join(later)}" if later else ""
            self.console.say(f"resumed from {checkpoint} at step {position.step}{given_up}")

    # -- one step -----------------------------------------------------------------------------

    def train_step(self, context: StepContext) -> StepSummary:
        """Weight step and alpha step."""
        name = context.dataset
        lr = self.schedule.lr(context.step)
        keep = self.ranks.is_main and name in self._unseen
        result = self.stepper.step(context, lr, keep, self._wish())
        if self.stepper.latest is not None:
            self._unseen.discard(name)
            names = self.data.catalogs[name].class_names
            self.board.contact_sheet(context.step + 1, name, *self.stepper.latest, names)
        if self.engine.was_applied:
            self.meters.add(name, result.loss, result.correct, result.count)
        self._guard(context)
        self.drawer.advance(context)
        self.choices.add(context.archs[0])
        waited = result.waited
        if self.learns_alphas and context.step % self.section.alpha.every == 0:
            waited += self._alpha_step(context)
        return StepSummary(waited, lr, Wish(result.wishes))

    def _wish(self) -> Wish:
        """What this rank wants all to do after the coming step."""
        minutes = self.section.checkpoint.minutes
        late = minutes is not None and time.monotonic() - self._saved_at > 60 * minutes
        return Wish.SAVE if late and self.ranks.is_main else Wish(0)

    def _alpha_step(self, context: StepContext) -> float:
        name = context.dataset
        number = self.drawer.next_alpha_batch(name)
        started = time.perf_counter()
        batch = self.loaders.batch(name, "alpha", self.config.alpha_batch, number)
        waited = time.perf_counter() - started
        x = batch.x.to(self.ranks.device, self.engine.dtype)
        y = batch.y.to(self.ranks.device)
        del batch
        self._alpha_losses[name] = self.learner.step(self.engine.net, x, y, name)
        if not self.learner.was_applied:
            self._skip(context, "the alpha step")
        return waited

    def _guard(self, context: StepContext) -> None:
        """Count skipped steps; the engine has seen to it that all ranks skip the same ones."""
        if self.engine.was_applied:
            self.skipped_in_a_row = 0
        else:
            self._skip(context, "the weight step")

    def _skip(self, context: StepContext, what: str) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.console.say(
            f"step {context.step + 1}: {what} was skipped, non-finite gradient on "
            f"{context.dataset} with {context.archs[0]} ({self.skipped_in_a_row} in a row)"
        )
        if self.skipped_in_a_row >= self.section.optimizer.max_skipped:
            raise TooManySkippedSteps(
                f"{self.skipped_in_a_row} steps in a row had non-finite gradients, the last on "
                f"{context.dataset}: lower the learning rate, or switch on qk_norm, layer_scale or "
                "gradient_clipping (vimnas.model, README: stability)"
            )

    # -- the run --------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the last step; returns the summary (also in summary.json)."""
        section, total = self.section, self.schedule.total_steps
        log = section.log
        for line in self.data.describe():
            self.console.say(line)
        self.console.say(
            f"{total} steps, {self.ranks.world_size} ranks x {self.micro_batch} samples, "
            f"{'bf16' if self.engine.dtype == torch.bfloat16 else 'fp32'} on "
            f"{self.ranks.device.type}"
        )
        self.console.say(str(self._read_ahead()))
        interval = Interval(self.config.global_batch)
        while (step := self.drawer.position.step) < total:
            context = self.drawer.draw()
            with interval:
                taken = self.train_step(context)
            interval.waited += taken.waited
            done = step + 1
            if done % log.every == 0 or done == total or interval.is_first:
                self._log(context, taken.lr, interval)
            if done % log.images_every == 0 or done == total:
                self._pictures(done)
            ends = self.schedule.is_epoch_end(step)
            due = Wish.SAVE in taken.wishes
            if done == total or (done % log.eval_every == 0 if log.eval_every else ends):
                due |= self.evaluate(done)
            every = section.checkpoint.every
            if due or done == total or (done % every == 0 if every else ends):
                self.save(done)
        return self.summarise()

    def _read_ahead(self) -> Capacity:
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
        """Every fixed sub-network on the `select` split of every dataset drawn so far; whether
        this is the best step so far (and such are kept)."""
        parts, means = [], {}
        for dataset in self.section.data.datasets:
            if dataset not in self.drawer.position.consumed:
                continue
            scores = self.scores(self.subnets(), dataset, "select")
            for label, s in scores.items():
                self.board.evaluation(done, dataset, label, s.loss, s.top1, s.top5)
            shown = (f"{k} {s.top1:.1%}" for k, s in scores.items() if "fixed" not in k)
            parts.append(f"{dataset} {' '.join(shown)}")
            means[dataset] = statistics.fmean(s.top1 for s in scores.values())
        self.console.say(f"select at step {done}: " + "; ".join(parts))
        return self.best.improves(done, means) and self.section.checkpoint.keep_best

    def summarise(self) -> dict[str, Any]:
        """Scores of largest and smallest on the test splits: read here, once, and nowhere else
        (with vimnas.log.test_at_end false not even here)."""
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
        }
        summary = write_summary(self.config, self.data, self.files, picks, scores, faults)
        for line in summary["table"].splitlines():
            self.console.say(line)
        return summary

    # -- state ----------------------------------------------------------------------------------

    def save(self, done: int) -> Path:
        """A checkpoint after `done` steps, on all ranks. Raises SaveFailed, on all of them."""
        started = time.monotonic()
        self.faults.collect(done)
        self.board.flush()  # a resumed run writes no point of these steps again
        state = {
            "position": self.drawer.position.state_dict(),
            "learner": self.learner.state_dict(),
            "choices": self.choices.state_dict(),
            "skipped": (self.skipped, self.skipped_in_a_row),
            "faults": self.faults.state_dict(),
            "meters": self.meters.state_dict(),
            "best": self.best.state_dict(),
            "identity": self._identity(),
        }
        root, keeping = self.files.checkpoints, self.section.checkpoint
        is_best = keeping.keep_best and self.best.step == done
        path = save_checkpoint(root, done, self.engine, state, self.ranks, keeping.keep, is_best)
        self._saved_at = time.monotonic()
        if self.ranks.is_main:
            size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
            self.console.say(
                f"saved {path.name}: {size:,.1f} MB in {self._saved_at - started:.1f} s"
            )
        return path

    def restore(self, checkpoint: Path) -> DataCursor:
        """Everything as it was at the checkpoint, on this rank; returns the place in the data.

        Raises ConfigError when it is of another run.
        """
        check_same_network(checkpoint, self.config)
        state = load_checkpoint(checkpoint, self.engine, self.ranks)
        for key, value in self._identity().items():
            if state["identity"][key] != value:
                raise ConfigError(
                    f"{checkpoint} is of another run: {key} was {state['identity'][key]!r}, "
                    f"now {value!r}"
                )
        self.learner.load_state_dict(state["learner"])
        self.choices.load_state_dict(state["choices"])
        self.meters.load_state_dict(state["meters"])
        self.best.load_state_dict(state["best"])
        self.skipped, self.skipped_in_a_row = state["skipped"]
        self._faults_before = state["faults"]
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
            "schedule": section.schedule.model_dump(mode="json"),
        }

    def close(self) -> None:
        """Stop threads, flush files."""
        self.loaders.close()
        self.board.close()
        self.console.close()
