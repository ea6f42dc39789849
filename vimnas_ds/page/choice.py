"""Which search's pick a page is about, and why: the best on `select` of those scored alike.

Scores of other weights, samples or objectives do not compare; then the method's own search goes
first, and the others are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vimnas_ds.page.markup import percent
from vimnas_ds.space import Arch

#: of searches whose picks are equally good
ORDER = ("perturbation", "front", "evolution")
#: what a result.json must hold to be shown, and of each of its datasets
NEEDED = ("selector", "arch", "objective", "accuracy", "loss", "datasets")
NUMBERS = ("select_top1", "count", "params")


@dataclass(frozen=True)
class Choice:
    """A search's name, and a sentence's part: why its pick."""

    name: str
    why: str


def unfit(found: Mapping[str, Any]) -> str:
    """Why a result.json cannot be shown; empty where it can."""
    if lacking := [key for key in NEEDED if key not in found]:
        return f"no {', '.join(lacking)}"
    if not isinstance(found["objective"], dict) or "metric" not in found["objective"]:
        return "its objective has no metric"
    if not isinstance(found["datasets"], dict) or not found["datasets"]:
        return "it has no datasets"
    values = [(key, found[key]) for key in ("accuracy", "loss")]
    for name, scores in found["datasets"].items():
        for key in NUMBERS:
            value = scores.get(key) if isinstance(scores, dict) else None
            values.append((f"datasets.{name}.{key}", value))
    for key, value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{key} is no number: {value!r}"
    try:
        if not isinstance(found["arch"], dict):
            return "its arch is no JSON object"
        Arch.from_json(found["arch"])
    except (TypeError, ValueError, OverflowError) as err:
        return f"its arch: {err}"
    return ""


def choose(picks: Mapping[str, Mapping[str, Any]]) -> Choice | None:
    """Of result.json by search, none of them `unfit`; None without any."""
    names = sorted(picks, key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n))
    if not names:
        return None
    first = names[0]
    if len(names) == 1:
        return Choice(first, "the only search so far")
    by_loss = picks[first]["objective"]["metric"] == "loss"
    scores = {
        n: round(-picks[n]["loss"] if by_loss else picks[n]["accuracy"], 9)
        for n in names
        if _terms(picks[n]) == _terms(picks[first])
    }
    best = max(scores, key=lambda n: scores[n])
    why = "no other search was scored alike"
    if len(scores) > 1:
        what = "lowest loss" if by_loss else "highest top-1"
        score = f"{-scores[best]:.4f}" if by_loss else percent(scores[best])
        why = f"the {what} on select ({score}) of {len(scores)} searches"
        if tied := [n for n in scores if n != best and scores[n] == scores[best]]:
            why += f", tied with {' and '.join(tied)}"
    if apart := [n for n in names if n not in scores]:
        why += f"; scored on other weights, samples or datasets, not compared: {', '.join(apart)}"
    return Choice(best, why)


def _terms(pick: Mapping[str, Any]) -> tuple[object, ...]:
    """What has to be equal for two picks' scores to compare."""
    counts = {name: found["count"] for name, found in pick["datasets"].items()}
    weights = pick.get("weights", pick.get("checkpoint"))
    return pick["objective"], counts, weights, pick.get("ema"), pick.get("tune_steps") or 0
