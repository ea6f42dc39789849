"""Broken files met by any rank, brought together: named once in the log, counted per dataset."""

from __future__ import annotations

from collections import Counter

from vimnas_ds.data.joint import Loaders
from vimnas_ds.report.board import Board
from vimnas_ds.report.console import Console
from vimnas_ds.train.evaluate import Evaluator
from vimnas_ds.train.ranks import gather_objects


class FaultReport:
    """What all ranks met: files replaced in training, left out in evaluation, slow batches."""

    def __init__(self, loaders: Loaders, evaluator: Evaluator, console: Console, board: Board):
        self._loaders, self._evaluator = loaders, evaluator
        self._console, self._board = console, board
        self._named: set[tuple[str, str]] = set()
        self.replaced: dict[str, int] = {}  #: samples replaced so far, by dataset, over all ranks
        self.slow_batches: dict[str, int] = {}  #: batches of which DALI refused a file, likewise
        self.left_out: dict[str, set[str]] = {}  #: files that no evaluation counts, likewise
        self.reasons: dict[str, Counter[str]] = {}  #: the replaced samples by what was wrong

    def collect(self, step: int) -> None:
        """Gather from all ranks (collective), and say on rank 0 what is new."""
        mine = (
            self._loaders.substitutions(),
            self._evaluator.skipped,
            self._loaders.replaced(),
            self._loaders.fallbacks(),
            self._loaders.reasons(),
        )
        self.replaced, self.slow_batches, self.reasons = {}, {}, {}
        for rank, (replaced, skipped, counts, slow, reasons) in enumerate(gather_objects(mine)):
            for dataset, files in skipped.items():
                self.left_out.setdefault(dataset, set()).update(files)
            for what, found in (("replaced", replaced), ("left out", skipped)):
                for dataset, files in found.items():
                    for path, reason in files.items():
                        self._name(rank, what, dataset, path, reason)
            for totals, part in ((self.replaced, counts), (self.slow_batches, slow)):
                for dataset, count in part.items():
                    totals[dataset] = totals.get(dataset, 0) + count
            for dataset, counted in reasons.items():
                self.reasons.setdefault(dataset, Counter()).update(counted)
        for dataset, counted in self.reasons.items():
            self._board.fault_reasons(step, dataset, counted)
        for dataset, count in self.replaced.items():
            self._board.faults(step, dataset, count, self.slow_batches.get(dataset, 0))

    def _name(self, rank: int, what: str, dataset: str, path: str, reason: str) -> None:
        if (dataset, path) not in self._named:
            self._named.add((dataset, path))
            self._console.say(f"{dataset}: {path} is unusable and {what} (rank {rank}): {reason}")
