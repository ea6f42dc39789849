"""TensorBoard: every tag this project writes, in one place.

The custom scalars (`http://localhost:6006/#custom_scalars`) are the first screen: accuracies and
losses of all datasets side by side, learning rate, pace, how decided the decisions are.

A resumed run repeats the steps after its checkpoint. The writer therefore opens with a mark
"forget everything from step s on" (`purge_step`), and TensorBoard shows each step once. Readers
take event files in the order of their names, which begin with the second of their creation.

Only rank 0 writes: elsewhere the board is disabled and its methods do nothing, so callers need no
`if`. Accuracies are fractions in [0, 1], times are in seconds, probabilities' entropy is in nats.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from vimnas_ds.durable import flush
from vimnas_ds.report import pictures

log = logging.getLogger(__name__)

Choice = int | float
Setting = str | int | float  # TensorBoard shows a truth value as 1 or 0


#: Whose scores stand in the hyperparameters' table.
SPLITS = ("select", "test")


class Board:
    """One run's event files in `log_dir`. `step` is the first step this process may write: what
    an earlier process wrote from there on is purged."""

    def __init__(self, log_dir: Path, step: int, enabled: bool = True) -> None:
        self._log_dir = log_dir
        self._writer: SummaryWriter | None = None
        self._is_begun = any(log_dir.glob("events.out.tfevents.*"))
        self._there: set[tuple[str, int]] = set()  # points that are not to be written again
        if enabled:
            self._open(step)

    def _open(self, step: int) -> None:
        _wait_for_newer_name(self._log_dir)
        self._writer = SummaryWriter(str(self._log_dir), purge_step=step, flush_secs=30)

    def reopen(self, step: int) -> None:
        """Go on from `step`, which was passed before: what was written from there on is purged."""
        if self._writer is not None:
            self.close()
            self._open(step)

    def keep(self, step: int) -> None:
        """An evaluation at `step`, the last one before the first that this process may write, is
        about to be made up for: an earlier process may have written its points and died."""
        if self._writer is None:
            return
        events = EventAccumulator(str(self._log_dir), size_guidance={"scalars": 0}).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("select/")]
        self._there = {(t, e.step) for t in tags for e in events.Scalars(t) if e.step == step}

    def begin(
        self, settings: Mapping[str, Setting], datasets: Sequence[str], subnets: Sequence[str]
    ) -> None:
        """The first screen, and the run as a row of the hyperparameters' table with the top-1 of
        `subnets` on select and test; nothing where an earlier process of the run wrote them."""
        if self._writer is None or self._is_begun:
            return
        metrics = [f"{split}/{d}/top1/{n}" for split in SPLITS for d in datasets for n in subnets]
        experiment, session, _ = hparams(dict(settings), dict.fromkeys(metrics, 0.0))
        for summary in (experiment, session):
            self._summary(summary, 0)
        self._writer.add_custom_scalars(first_screen(datasets, subnets))

    def end(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """The top-1 on the test splits, by dataset and sub-network. `step` lies behind the last
        one, so that a run that is resumed at its end shows them once."""
        if self._writer is None:
            return
        for dataset, by_subnet in scores.items():
            for subnet, top1 in by_subnet.items():
                self._scalar(f"test/{dataset}/top1/{subnet}", top1, step)
        self._summary(hparams({}, {})[2], step)

    def train_loss(self, step: int, dataset: str, loss: float, top1: float | None) -> None:
        """Weight steps on one dataset since the last point; `top1` None where labels are mixed."""
        self._scalar(f"train/loss/{dataset}", loss, step)
        if top1 is not None:
            self._scalar(f"train/top1/{dataset}", top1, step)

    def faults(self, step: int, dataset: str, replaced: int, slow_batches: int) -> None:
        """Broken files replaced, and batches decoded without DALI, so far."""
        self._scalar(f"data/replaced/{dataset}", replaced, step)
        self._scalar(f"data/slow_batches/{dataset}", slow_batches, step)

    def fault_reasons(self, step: int, dataset: str, counts: Mapping[str, int]) -> None:
        """The replaced samples by what was wrong with their files, so far."""
        for reason, count in counts.items():
            self._scalar(f"data/replaced/{dataset}/{reason}", count, step)

    def train_step(
        self, step: int, lr: float, samples_per_s: float, data_time: float, skipped_steps: int
    ) -> None:
        """Weight steps of all datasets since the last point; `data_time` is the wait in s."""
        self._scalar("train/lr", lr, step)
        self._scalar("train/samples_per_s", samples_per_s, step)
        self._scalar("train/data_time_ms", 1000 * data_time, step)
        self._scalar("train/skipped_steps", skipped_steps, step)

    def alpha_step(self, step: int, dataset: str, loss: float) -> None:
        """An update of the architecture parameters."""
        self._scalar(f"alpha/loss/{dataset}", loss, step)

    def evaluation(
        self, step: int, dataset: str, subnet: str, loss: float, top1: float, top5: float
    ) -> None:
        """One sub-network (`subnet`: its short name, such as "largest") on the select split."""
        for name, value in (("loss", loss), ("top1", top1), ("top5", top5)):
            self._scalar(f"select/{dataset}/{name}/{subnet}", value, step)

    def alphas(
        self,
        step: int,
        probabilities: Mapping[str, Sequence[float]],
        choices: Mapping[str, Sequence[Choice]],
    ) -> None:
        """All decisions' probabilities: per kind of decision one picture, one mean entropy, the
        mean of each choice, and all numbers as one tensor (layers, choices), nan where a layer has
        fewer choices.

        Both mappings have the keys "embed_dim", "depth", "num_heads[LAYER]", "mlp_ratio[LAYER]".
        An entropy of 0 is decided, ln(number of choices) undecided. Raises ValueError if the keys
        or the numbers of choices differ.
        """
        if self._writer is None:
            return
        if set(probabilities) != set(choices):
            odd = sorted(set(probabilities) ^ set(choices))
            raise ValueError(f"probabilities and choices need the same keys, not in both: {odd}")
        for kind, keys in _by_kind(probabilities).items():
            p = [[float(value) for value in probabilities[key]] for key in keys]
            options = [choices[key] for key in keys]
            if keys == [kind]:
                labels, uniform = _labels(options[0]), 1 / len(options[0])
                figure = pictures.bars(
                    f"{kind}: probabilities", labels, p[0], "probability", uniform
                )
            else:
                figure = pictures.alpha_heatmap(f"{kind}: probabilities", p, options)
            self._picture(f"alpha/probabilities/{kind}", pictures.render(figure), step)
            rows = [torch.tensor(layer) for layer in p]
            table = torch.nn.utils.rnn.pad_sequence(rows, True, math.nan)
            self._writer.add_tensor(f"alpha/table/{kind}", table, step)
            if all(layer == options[0] for layer in options):
                for choice, share in zip(options[0], table.mean(0).tolist(), strict=True):
                    self._scalar(f"alpha/p/{kind}/{choice:g}", share, step)
            entropy = sum(_entropy(layer) for layer in p) / len(p)
            self._scalar(f"alpha/entropy/{kind}", entropy, step)

    def sampled_choices(self, step: int, counts: Mapping[str, Mapping[Choice, int]]) -> None:
        """How often each choice was sampled: `counts[kind][choice]`, summed over the layers."""
        if self._writer is None:
            return
        for kind, count in counts.items():
            if not count:
                continue
            options = sorted(count)
            values = [count[choice] for choice in options]
            uniform = sum(values) / len(values)
            title = f"{kind}: times sampled"
            figure = pictures.bars(title, _labels(options), values, "count", uniform)
            self._picture(f"sampled/{kind}", pictures.render(figure), step)

    def guard(self, step: int, lines: Sequence[str], rewinds: int, lr_factor: float) -> None:
        """After a rewind, at the first step to be done again: all events so far, since the rewind
        purged what had been written of those that were met after that step."""
        if self._writer is not None:
            self._writer.add_text("guard/events", "".join(f"    {line}\n" for line in lines), step)
        self._scalar("guard/rewinds", rewinds, step)
        self._scalar("guard/lr_factor", lr_factor, step)

    def contact_sheet(
        self, step: int, dataset: str, x: Tensor, y: Tensor, class_names: Sequence[str]
    ) -> None:
        """The first samples of a batch. y: (B,) class numbers, or (B, C) shares of mixed labels."""
        if self._writer is None:
            return
        labels = pictures.captions(y, class_names)
        self._picture(f"batch/{dataset}", pictures.contact_sheet(x, labels), step)

    def unusable(self, step: int, dataset: str, lines: Sequence[str]) -> None:
        """Files found to be broken since the last such list, each with its reason."""
        if self._writer is not None:
            text = "".join(f"    {line}\n" for line in lines)  # Markdown: shown as they are
            readable = text.encode("utf-8", "backslashreplace").decode()
            self._writer.add_text(f"data/unusable/{dataset}", readable, step)

    def flush(self) -> None:
        """Until all points so far are on the disk: before a checkpoint that goes on after them."""
        if self._writer is not None:
            self._writer.flush()
            for file in self._log_dir.glob("events.out.tfevents.*"):
                flush(file)

    def close(self) -> None:
        """Write what is queued and close the file; may be called twice."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _scalar(self, tag: str, value: float, step: int) -> None:
        if self._writer is not None and (tag, step) not in self._there:
            self._writer.add_scalar(tag, value, step)

    def _summary(self, summary: Summary, step: int) -> None:
        assert self._writer is not None
        assert self._writer.file_writer is not None
        self._writer.file_writer.add_summary(summary, step)

    def _picture(self, tag: str, picture: pictures.Picture, step: int) -> None:
        assert self._writer is not None
        self._writer.add_image(tag, picture, step, dataformats="HWC")


def first_screen(
    datasets: Sequence[str], subnets: Sequence[str]
) -> dict[str, dict[str, list[str | list[str]]]]:
    """Category -> chart -> its curves, as custom scalars are laid out: tags are patterns there."""

    def chart(*tags: str) -> list[str | list[str]]:
        return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]

    def of_all(tag: str) -> list[str | list[str]]:
        return chart(*(tag.replace("*", dataset) for dataset in datasets))

    kinds = ("embed_dim", "depth", "num_heads", "mlp_ratio")
    return {
        "accuracy on select": {f"top-1, {n}": of_all(f"select/*/top1/{n}") for n in subnets},
        "training": {
            "loss": of_all("train/loss/*"),
            "top-1": of_all("train/top1/*"),
            "learning rate": chart("train/lr"),
        },
        "pace": {
            "samples per second": chart("train/samples_per_s"),
            "milliseconds waited for data": chart("train/data_time_ms"),
        },
        "decisions": {"entropy (nats)": chart(*(f"alpha/entropy/{kind}" for kind in kinds))},
    }


def _wait_for_newer_name(log_dir: Path) -> None:
    """Sleep, 1 s at most, until a new event file's name sorts after those that are there."""
    stamps = [int(p.name.split(".")[3]) for p in log_dir.glob("events.out.tfevents.*")]
    early = max(stamps, default=0) + 1 - time.time()
    if early > 1:
        log.warning(
            "the clock is %.0f s behind the newest event file in %s: TensorBoard may show the "
            "steps of this resumed run twice",
            early,
            log_dir,
        )
    elif early > 0:
        time.sleep(early)


def _by_kind(keys: Mapping[str, object]) -> dict[str, list[str]]:
    """{"num_heads": ["num_heads[0]", "num_heads[1]"], ...}, layers in numerical order."""
    found: dict[str, list[tuple[int, str]]] = {}
    for key in keys:
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", key)
        if match is None:
            raise ValueError(f'a decision is called "kind" or "kind[layer]", got {key!r}')
        found.setdefault(match[1], []).append((int(match[2] or 0), key))
    return {kind: [key for _, key in sorted(pairs)] for kind, pairs in found.items()}


def _entropy(probabilities: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def _labels(choices: Sequence[Choice]) -> list[str]:
    return [f"{choice:g}" for choice in choices]
