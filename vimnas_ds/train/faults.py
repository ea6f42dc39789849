"""Broken files met by any rank, brought together: named once, counted per dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vimnas_ds.data.joint import Loaders
from vimnas_ds.report.board import Board
from vimnas_ds.report.console import Console
from vimnas_ds.train.evaluate import Evaluator
from vimnas_ds.train.ranks import gather_objects


class FaultReport:
    """What all ranks met: files replaced in training, left out in evaluation, slow batches.

    Counts go on from `before`, the `state_dict` in the checkpoint that a run is resumed from.
    """

    def __init__(
        self,
        loaders: Loaders,
        evaluator: Evaluator,
        console: Console,
        board: Board,
        before: Mapping[str, Any] | None = None,
    ):
        self._loaders, self._evaluator = loaders, evaluator
        self._console, self._board = console, board
        self._before: Mapping[str, Any] = before or {}
        self._named: set[tuple[str, str]] = set(self._before.get("named", ()))
        #: by dataset, of all ranks: samples replaced so far, and by what was wrong with them;
        #: batches of which DALI refused a file; files that no evaluation counts
        self.replaced: Counter[str]
        self.reasons: dict[str, Counter[str]]
        self.slow_batches: Counter[str]
        self.left_out: dict[str, set[str]]
        self._start()

    def _start(self) -> None:
        """Only what was met before this process."""
        before = self._before
        self.replaced = Counter(before.get("replaced", {}))
        self.slow_batches = Counter(before.get("slow_batches", {}))
        self.left_out = {k: set(v) for k, v in before.get("left_out", {}).items()}
        self.reasons = {k: Counter(v) for k, v in before.get("reasons", {}).items()}

    def state_dict(self) -> dict[str, Any]:
        """The counts of the latest `collect`."""
        return {
            "replaced": dict(self.replaced),
            "slow_batches": dict(self.slow_batches),
            "left_out": {k: sorted(v) for k, v in self.left_out.items()},
            "reasons": {k: dict(v) for k, v in self.reasons.items()},
            "named": sorted(self._named),
        }

    def collect(self, step: int) -> None:
        """Gather from all ranks (collective), and name on rank 0 which files are new."""
        mine = (
            self._loaders.substitutions(),
            self._evaluator.skipped,
            self._loaders.replaced(),
            self._loaders.fallbacks(),
            self._loaders.reasons(),
        )
        self._start()
        new: dict[str, list[str]] = {}
        for rank, (replaced, skipped, counts, slow, reasons) in enumerate(gather_objects(mine)):
            for dataset, files in skipped.items():
                self.left_out.setdefault(dataset, set()).update(files)
            for what, found in (("replaced", replaced), ("left out", skipped)):
                for dataset, files in found.items():
                    for path, reason in files.items():
                        if (dataset, path) not in self._named:
                            self._named.add((dataset, path))
                            line = f"{path} is unusable and {what} (rank {rank}): {reason}"
                            new.setdefault(dataset, []).append(line)
            for totals, part in ((self.replaced, counts), (self.slow_batches, slow)):
                for dataset, count in part.items():
                    totals[dataset] += count
            for dataset, counted in reasons.items():
                self.reasons.setdefault(dataset, Counter()).update(counted)
        for dataset, lines in new.items():
            self._board.unusable(step, dataset, lines)
            for line in lines:
                self._console.say(f"{dataset}: {line}")

    def report(self, step: int) -> None:
        """`collect`, and draw the counts."""
        self.collect(step)
        for dataset, counted in self.reasons.items():
            self._board.fault_reasons(step, dataset, counted)
        for dataset, count in self.replaced.items():
            self._board.faults(step, dataset, count, self.slow_batches[dataset])
