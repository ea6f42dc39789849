"""What a run left on disk, read for its page: nothing is computed, nothing has to be there.

A run that was killed lacks files, and the last one it wrote may be cut: what cannot be read is
named in `notes` and left out.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from vimnas_ds.config import ConfigError, RunConfig, load_config
from vimnas_ds.page.choice import Choice, choose, unfit
from vimnas_ds.space import Arch
from vimnas_ds.train.run_files import RunFiles

#: of a curve, at most; longer ones are averaged in equal parts
MOST_POINTS = 240
#: everything of these kinds is read, of the pictures only what the reader insists on
GUIDANCE = {"scalars": 0, "tensors": 0, "images": 1, "histograms": 1, "compressedHistograms": 1}
#: lines of train.log that tell of something that went otherwise than planned
EVENTS = re.compile(
    r"is unusable|was skipped|resumed from|^stopped|going back|given up|damaged|rewind|rewound"
    r"|saved and stopped after|^ranks? [\d\[]|unusable files left out"
)
MOST_EVENTS = 40

Curve = list[tuple[float, float]]  # (step, value)


@dataclass
class Table:
    """Probabilities of one kind of decision over time: (steps, layers, choices)."""

    steps: list[int]
    values: NDArray[np.float64]


@dataclass
class Record:
    """A run's folder, in memory. What is not there is None or empty."""

    files: RunFiles
    config: RunConfig
    labels: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    status: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    comparison: dict[str, Any] | None = None
    ranking: dict[str, Any] | None = None
    front: dict[str, Any] | None = None
    #: result.json of each search by its folder's name
    picks: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    alphas: dict[str, Table] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.files.root.resolve().name

    @property
    def datasets(self) -> list[str]:
        return list(self.config.vimnas.data.datasets)

    @property
    def progress(self) -> tuple[int, int] | None:
        """The latest step of the log and the number of all; None before the first."""
        for line in reversed(self.log):
            if found := re.search(r"  step (\d+)/(\d+)", line):
                return int(found[1]), int(found[2])
        return None

    @property
    def left_out(self) -> dict[str, int]:
        """Unusable files that the latest start left out of each dataset, by the log."""
        counts = dict[str, int]()
        for line in self.log:
            if found := re.match(r"(\S+): \d+ classes; (.*)", line.partition("  ")[2]):
                number = re.search(r"; (\d+) unusable files left out", found[2])
                counts[found[1]] = int(number[1]) if number else 0
        return counts

    @property
    def events(self) -> list[str]:
        """The log's lines of faults, the latest of them."""
        lines = [line for line in self.log if EVENTS.search(line.partition("  ")[2])]
        return lines[-MOST_EVENTS:]

    @property
    def choice(self) -> Choice | None:
        """The pick that the page is about."""
        return choose(self.picks)

    @property
    def earlier_picks(self) -> list[str]:
        """Searches that have picked another sub-network since the comparison was made."""
        entries = (self.comparison or {}).get("entries", [])
        compared = {e["name"]: e["arch"] for e in entries if e["role"] == "pick"}
        return [name for name, arch in compared.items() if self.has_moved_on(name, arch)]

    def has_moved_on(self, name: str, arch: Mapping[str, Any]) -> bool:
        """Whether a search's pick is another sub-network than this one."""
        pick = self.picks.get(name)
        return pick is not None and Arch.from_json(pick["arch"]) != Arch.from_json(arch)

    @property
    def chosen_on_test(self) -> float | None:
        """Mean top-1 on test of the pick that the page is about, by the comparison; None where that
        has not scored it, or has another form."""
        if self.choice is None or (self.comparison or {}).get("split") != "test":
            return None
        try:
            for entry in (self.comparison or {})["entries"]:
                if (entry["role"], entry["name"]) == ("pick", self.choice.name):
                    moved_on = self.has_moved_on(self.choice.name, entry["arch"])
                    return None if moved_on else float(entry["mean_top1"])
        except (KeyError, TypeError, ValueError, OverflowError):  # its own part says so
            return None
        return None

    @property
    def is_imported(self) -> bool:
        """Weights without a training of their own (scripts/import_autoformer.py)."""
        return self.status is None and not self.log and self.environment is None

    def by_tag(self, prefix: str) -> dict[str, Curve]:
        """Curves whose tag begins so, by the rest of it."""
        return {t.removeprefix(prefix): c for t, c in self.curves.items() if t.startswith(prefix)}


def read_record(root: Path) -> Record:
    """Everything in a run's folder. Raises ConfigError when there is no run."""
    files = RunFiles(root)
    if not files.config.is_file():
        raise ConfigError(f"{root} is no run: it has no {files.config.name}")
    notes: list[str] = []
    record = Record(
        files,
        load_config(files.config),
        _json(root, files.labels.name, notes),
        _json(root, files.environment.name, notes),
        _json(root, files.summary.name, notes),
        _json(root, files.status.name, notes),
        _json(root, "evaluation.json", notes),
        _json(root, "compare/compare.json", notes),
        _json(root, "ranking/ranking.json", notes),
        _json(root, "front/front.json", notes),
        notes=notes,
    )
    for file in sorted(root.glob("*/result.json")):
        name = f"{file.parent.name}/{file.name}"
        found = _json(root, name, notes)
        if found is None or "selector" not in found:
            continue
        if wrong := unfit(found):
            notes.append(f"{name} is left out: {wrong}")
        else:
            record.picks[file.parent.name] = found
    if files.log.is_file():
        record.log = files.log.read_text(encoding="utf-8", errors="replace").splitlines()
    if files.tensorboard.is_dir():
        try:
            _read_events(record, files.tensorboard)
        except Exception as err:  # its readers raise of damaged files whatever they stumble over
            notes.append(f"{files.tensorboard.name} is left out in part, cannot be read: {err!r}")
    return record


def _json(root: Path, name: str, notes: list[str]) -> dict[str, Any] | None:
    file = root / name
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        notes.append(f"{name} cannot be read and is left out: {err}")
        return None
    if not isinstance(found, dict):
        notes.append(f"{name} is left out: it holds no JSON object")
        return None
    return found


def _read_events(record: Record, folder: Path) -> None:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every resumed run
    events = EventAccumulator(str(folder), size_guidance=GUIDANCE)
    events.Reload()
    tags = events.Tags()
    for tag in tags["scalars"]:
        record.curves[tag] = thinned([(e.step, e.value) for e in events.Scalars(tag)])
    for tag in tags["tensors"]:
        if tag.startswith("alpha/table/"):
            latest = {e.step: e for e in events.Tensors(tag)}  # this reader purges no tensors
            found = [latest[number] for number in sorted(latest)]
            step = -(-len(found) // MOST_POINTS)
            kept = [*found[:-1:step], found[-1]]
            tables = [make_ndarray(e.tensor_proto) for e in kept]
            if len(shapes := {t.shape for t in tables}) > 1:
                told = " and ".join(map(str, sorted(shapes)))
                record.notes.append(f"{tag} is left out: its tables are of several sizes, {told}")
                continue
            values = np.stack(tables).astype(np.float64)
            record.alphas[tag.removeprefix("alpha/table/")] = Table([e.step for e in kept], values)


def thinned(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """Means of equal parts, at most `most` of them; the last point stays."""
    if len(curve) <= most:
        return curve
    edges = np.linspace(0, len(curve) - 1, most).astype(int)
    parts = [np.mean(curve[a:b], axis=0) for a, b in pairwise(edges)]
    return [(float(x), float(y)) for x, y in parts] + [curve[-1]]
