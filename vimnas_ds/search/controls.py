"""What a pick is put beside: corners, argmax alpha, other selectors, random ones of its size.

A nested space without a resource term leans to its largest member, so a pick says little by itself
(METHOD.md section 4). Its `k` random controls have its number of parameters within a few percent.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vimnas_ds.arch_file import read_arch
from vimnas_ds.config import ConfigError
from vimnas_ds.model.alphas import Alphas
from vimnas_ds.search.constraints import Constraints, Range
from vimnas_ds.search.evolve import Evolution, EvolutionOptions, sample_distinct
from vimnas_ds.search.objective import Objective
from vimnas_ds.search.perturb import PerturbationSearch, evaluations_needed
from vimnas_ds.search.prefix import PrefixCache
from vimnas_ds.search.run import SearchRun
from vimnas_ds.search.scoring import ArchScorer, Evaluations
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of

Role = Literal["pick", "control", "random"]
#: how far, in percent, random ones may be from a pick's parameters: the first that has enough
WITHIN = (2, 5, 10, 20, 40)


@dataclass(frozen=True)
class Entry:
    """A sub-network of a comparison; `like`: the pick whose size a random one has; `evaluations`:
    that its search took, None where it is not known or there was none."""

    name: str
    role: Role
    arch: Arch
    like: str | None = None
    evaluations: int | None = None


@dataclass(frozen=True)
class Pick:
    """A pick and the `evaluations` its search took (None: not told); `evolved`: within parameters
    alone by the run's own evolution, which is its own control."""

    arch: Arch
    evaluations: int | None
    evolved: bool = False


def find_picks(
    run: SearchRun, named: Sequence[str], objective: Objective
) -> tuple[dict[str, Pick], list[str]]:
    """What the run's searches picked from its checkpoint (RUN/*/result.json), and NAME=FILE; and
    in words, which were left out, being of other weights, and which had another objective.

    Raises ConfigError for a file that cannot be used, or when there is nothing.
    """
    found: dict[str, Pick] = {}
    notes = []
    for file in sorted(run.files.root.glob("*/result.json")):
        result = _read(file)
        if result.get("selector") is None or "arch" not in result:
            continue
        if not _same_weights(run, result):
            notes.append(f"left out: {file} is of other weights ({result.get('checkpoint')})")
            continue
        asked = {"metric": objective.metric, "weights": dict(objective.weights)}
        if result.get("objective", asked) != asked:
            theirs = json.dumps(result["objective"])
            notes.append(f"{file} was chosen by {theirs}, is compared by {objective}")
        ranges = result.get("constraints", [])
        evolved = file.parent.name == result["selector"] == "evolution"
        evolved = evolved and all(str(r).startswith("params ") for r in ranges)
        pick = Pick(read_arch(file, run.net.space), evaluations_of(result), evolved)
        found[file.parent.name] = pick
    for text in named:
        name, equals, path = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--pick takes NAME=FILE, got {text!r}")
        arch = read_arch(Path(path), run.net.space)
        found[name] = Pick(arch, evaluations_of(_read(Path(path))))
    if not found:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise ConfigError(
            f"{run.files.root} has no pick of {run.checkpoint.name}{why}: run perturb_select.py "
            "or evolve.py first, or name one with --pick NAME=FILE"
        )
    return found, notes


def _same_weights(run: SearchRun, result: Mapping[str, Any]) -> bool:
    """By their digest; where the result does not tell it, by the checkpoint's name."""
    if "weights" in result:
        return bool(result["weights"] == run.weights)
    return Path(str(result.get("checkpoint"))).name == run.checkpoint.name


def evaluations_of(result: Mapping[str, Any]) -> int | None:
    """How many a search took, by its result.json; None where that does not tell."""
    if "decisions" not in result:
        return result.get("evaluated")
    sizes = [len(decision["accuracy_without"]) for decision in result["decisions"]]
    return sum(evaluations_needed(n, result.get("rule", "keep")) for n in sizes)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


def fixed_perturbation(
    evaluations: Evaluations, progress: Callable[[], None], prefixes: PrefixCache | None = None
) -> Entry:
    """Perturbation with uniform probabilities: DARTS-PT found it as good as learned ones."""
    search = PerturbationSearch(evaluations, alphas=None, prefixes=prefixes)
    made = list(search.decide_all(progress))
    count = sum(evaluations_needed(len(decision.accuracy), search.rule) for decision in made)
    name = "fixed alpha + perturbation"
    return Entry(name, "control", search.state.arch(), evaluations=count)


def evolution_of_size(
    evaluations: Evaluations,
    pick: str,
    arch: Arch,
    candidates: int,
    seed: int,
    progress: Callable[[], None],
) -> Entry:
    """Evolution with at most a pick's parameters and so many evaluations, in four generations of
    two or more (in fewer where there are too few evaluations)."""
    run, dataset = evaluations.run, evaluations.datasets[0]
    most = cost_of(run.config, arch, dataset)[0]
    constraints = Constraints([Range("params", dataset, 0, most)], run.config, run.net.space)
    generations = max(min(4, candidates // 2), 1)
    size = candidates // generations
    options = EvolutionOptions(size, generations, max(size // 2, 2), -(-size // 2), size // 2)
    evolution = Evolution(ArchScorer(evaluations), constraints, options, seed)
    for _ in evolution.generations(progress):
        pass
    name, ranked = f"evolution, {pick}'s size", evolution.ranked()
    return Entry(name, "control", ranked[0], evaluations=len(ranked))


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
