"""What a pick is put beside: corners, argmax alpha, other selectors, random ones of its size.

A nested space without a resource term leans to its largest member, so a pick says little by itself
(METHOD.md section 4). Its `k` random controls have its number of parameters within a few percent.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vimnas_ds.arch_file import read_arch
from vimnas_ds.config import ConfigError
from vimnas_ds.model.alphas import Alphas
from vimnas_ds.search.constraints import Constraints, Range
from vimnas_ds.search.evolve import Evolution, EvolutionOptions, sample_distinct
from vimnas_ds.search.perturb import PerturbationSearch
from vimnas_ds.search.run import SearchRun
from vimnas_ds.search.scoring import ArchScorer, Evaluations
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of

Role = Literal["pick", "control", "random"]
#: how far, in percent, random ones may be from a pick's parameters: the first that has enough
WITHIN = (2, 5, 10, 20, 40)


@dataclass(frozen=True)
class Entry:
    """A sub-network of a comparison; `like`: the pick whose size a random one has."""

    name: str
    role: Role
    arch: Arch
    like: str | None = None


def find_picks(run: SearchRun, named: Sequence[str]) -> dict[str, Arch]:
    """What the run's searches picked from its checkpoint (RUN/*/result.json), and NAME=FILE.

    Raises ConfigError for a file that cannot be used, or when there is nothing.
    """
    found: dict[str, Arch] = {}
    stale = []
    for file in sorted(run.files.root.glob("*/result.json")):
        result = _read(file)
        if result.get("selector") is None or "arch" not in result:
            continue
        if Path(str(result.get("checkpoint"))).name != run.checkpoint.name:
            stale.append(f"{file} is of {result.get('checkpoint')}")
            continue
        found[file.parent.name] = read_arch(file, run.net.space)
    for text in named:
        name, equals, path = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--pick takes NAME=FILE, got {text!r}")
        found[name] = read_arch(Path(path), run.net.space)
    if not found:
        notes = f" ({'; '.join(stale)})" if stale else ""
        raise ConfigError(
            f"{run.files.root} has no pick of {run.checkpoint.name}{notes}: run perturb_select.py "
            "or evolve.py first, or name one with --pick NAME=FILE"
        )
    return found


def _read(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    return content if isinstance(content, dict) else {}


def corners(run: SearchRun) -> list[Entry]:
    """Largest, smallest, and the highest alpha of every decision."""
    space = run.net.space
    alphas = Alphas(space, 0.0, torch.Generator())
    alphas.load_state_dict(run.alphas)
    return [
        Entry("largest", "control", space.largest()),
        Entry("smallest", "control", space.smallest()),
        Entry("argmax alpha", "control", alphas.argmax()),
    ]


def fixed_perturbation(evaluations: Evaluations, progress: Callable[[], None]) -> Entry:
    """Perturbation with uniform probabilities: DARTS-PT found it as good as learned ones."""
    search = PerturbationSearch(evaluations, alphas=None)
    for _ in search.decide_all(progress):
        pass
    return Entry("fixed alpha + perturbation", "control", search.state.arch())


def evolution_of_size(
    evaluations: Evaluations,
    pick: str,
    arch: Arch,
    candidates: int,
    seed: int,
    progress: Callable[[], None],
) -> Entry:
    """Evolution with at most a pick's parameters and so many evaluations, in four generations."""
    run, dataset = evaluations.run, evaluations.datasets[0]
    most = cost_of(run.config, arch, dataset)[0]
    constraints = Constraints([Range("params", dataset, 0, most)], run.config, run.net.space)
    quarter = max(candidates // 4, 2)
    options = EvolutionOptions(quarter, 4, max(quarter // 2, 1), -(-quarter // 2), quarter // 2)
    evolution = Evolution(ArchScorer(evaluations), constraints, options, seed)
    for _ in evolution.generations(progress):
        pass
    return Entry(f"evolution, {pick}'s size", "control", evolution.ranked()[0])


def random_alike(
    run: SearchRun, dataset: str, arch: Arch, count: int, exclude: Collection[Arch], seed: int
) -> tuple[list[Arch], int]:
    """Up to `count` random sub-networks of nearly `arch`'s parameters, and within how many percent.

    Raises ConfigError when there is no other one within the last of `WITHIN`.
    """
    size = cost_of(run.config, arch, dataset)[0]
    rng = random.Random(f"{seed}/controls/{arch.to_json()}")
    found: list[Arch] = []
    for percent in WITHIN:
        low, high = size * (1 - percent / 100), size * (1 + percent / 100)
        alike = Constraints([Range("params", dataset, low, high)], run.config, run.net.space)
        found = sample_distinct(alike, count, {arch, *exclude}, rng)
        if len(found) == count:
            break
    if not found:
        raise ConfigError(f"no other sub-network within {percent} % of {size:,} parameters")
    return found, percent


def architectures(entries: Iterable[Entry]) -> list[Arch]:
    """Each once, in their order."""
    return list(dict.fromkeys(entry.arch for entry in entries))
