"""Selection by perturbation (DARTS-PT on the trained supernet; the supplement's Appendix B).

For each decision in turn: remove each choice still open, renormalise the probabilities over what
remains (nested weights would otherwise only change scale), and evaluate the superposed network on
the `select` splits. The choice whose removal costs the most accuracy is kept and the decision
becomes certain; ties go by loss. Rule "eliminate" instead drops the choice whose removal costs
least, until one is left (Algorithm 1's last line read as backward elimination).
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vimnas_ds.model.alphas import decisions, layer_of
from vimnas_ds.search.prefix import PrefixCache
from vimnas_ds.search.scoring import Candidate, Evaluations, Scored, paired_difference
from vimnas_ds.space import Arch, SearchSpace

Rule = Literal["keep", "eliminate"]
Order = Literal["as_listed", "from_the_input", "random"]


def evaluations_needed(choices: int, rule: Rule) -> int:
    """To make a decision of so many choices."""
    return choices + 1 if rule == "keep" else choices * (choices + 1) // 2


class OpenChoices:
    """Which choices of every decision are still open, and the probabilities over them."""

    def __init__(self, space: SearchSpace, alphas: Mapping[str, Tensor] | None):
        self.space, self.choices = space, decisions(space)
        self.open = {name: list(range(len(c))) for name, c in self.choices.items()}
        self._base = {
            name: torch.zeros(len(c)) if alphas is None else alphas[name].float().cpu()
            for name, c in self.choices.items()
        }

    def probabilities(self, without: tuple[str, int] | None = None) -> dict[str, Tensor]:
        """softmax over the open choices, renormalised, optionally with one more removed."""
        found = {}
        for name, base in self._base.items():
            masked = torch.full_like(base, -torch.inf)
            kept = [i for i in self.open[name] if (name, i) != without]
            if not kept:
                raise ValueError(f"{name}: its last open choice cannot be removed")
            masked[kept] = base[kept]
            found[name] = masked.softmax(0)
        return found

    def decide(self, name: str, choice: int) -> None:
        """Make a decision certain."""
        self.open[name] = [choice]

    def eliminate(self, name: str, choice: int) -> None:
        self.open[name].remove(choice)

    def value(self, name: str) -> float:
        """The choice of a decision that is made."""
        (choice,) = self.open[name]
        return self.choices[name][choice]

    def is_idle(self, name: str) -> bool:
        """Whether the decision is of a layer beyond every depth still open."""
        layer = layer_of(name)
        return layer is not None and layer >= max(self.space.depth[i] for i in self.open["depth"])

    def arch(self) -> Arch:
        """The architecture, once every decision (of the layers it has) is made."""
        depth = int(self.value("depth"))
        return Arch(
            int(self.value("embed_dim")),
            depth,
            tuple(int(self.value(f"num_heads[{i}]")) for i in range(depth)),
            tuple(self.value(f"mlp_ratio[{i}]") for i in range(depth)),
        )

    def restricted_space(self) -> SearchSpace:
        """The space that is left, for tuning between decisions."""
        space = self.space

        def left(name: str, choices: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(choices[i] for i in self.open[name])

        depth = left("depth", space.depth)
        layers = range(max(depth))
        return SearchSpace(
            space.name,
            left("embed_dim", space.embed_dim),
            depth,
            tuple(left(f"num_heads[{i}]", space.num_heads[i]) for i in layers),
            tuple(left(f"mlp_ratio[{i}]", space.mlp_ratio[i]) for i in layers),
            space.head_dim,
        )


class Margin(NamedTuple):
    """A difference of two values, at least 0 on common samples, and its paired standard error."""

    value: float
    se: float

    @property
    def in_noise(self) -> bool:
        """Whether it is not above two of its standard errors (nan is not)."""
        return not self.value > 2 * self.se

    @property
    def certainty(self) -> float:
        """In standard errors; lowest where nothing is known."""
        if self.se == 0:
            return math.inf if self.value > 0 else 0.0
        ratio = self.value / self.se
        return -math.inf if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class Decision:
    """One decision as it was made. `accuracy[c]` and `loss[c]` are those without choice c; `drop`
    is what its removal costs of what is maximised. `rounds`: a margin for each choice of the
    search. Rule "keep" has one, the runner-up's value without it minus the kept one's (the kept
    choice is missed more); rule "eliminate" one for each of its n - 1 eliminations, the value
    without the eliminated choice minus that without the next to go. The reported `margin` is the
    smallest of them relative to its standard error."""

    name: str
    kept: float
    accuracy_before: float
    accuracy: dict[float, float]
    loss: dict[float, float]
    drop: dict[float, float]
    rounds: tuple[Margin, ...]
    tied: bool  #: in some round the values were equal, the other metric decided

    @property
    def margin(self) -> Margin:
        return min(self.rounds, key=lambda m: m.certainty)

    @property
    def in_noise(self) -> bool:
        """Whether the margin of any round is within its noise."""
        return any(m.in_noise for m in self.rounds)

    @property
    def note(self) -> str:
        """Why the margin decides nothing; empty if it does."""
        return "tie" if self.tied else "within noise" if self.in_noise else ""

    def to_json(self) -> dict[str, Any]:
        return {
            "decision": self.name,
            "kept": self.kept,
            "accuracy_before": self.accuracy_before,
            "accuracy_without": {f"{c:g}": a for c, a in self.accuracy.items()},
            "loss_without": {f"{c:g}": v for c, v in self.loss.items()},
            "drop": {f"{c:g}": d for c, d in self.drop.items()},
            "margin": self.margin.value,
            "margin_se": self.margin.se,
            "rounds": [{"margin": m.value, "margin_se": m.se} for m in self.rounds],
            "in_noise": self.in_noise,
            "tied": self.tied,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Decision:
        accuracy, loss, drop = (
            {float(c): v for c, v in found[key].items()}
            for key in ("accuracy_without", "loss_without", "drop")
        )
        kept, before = found["kept"], found["accuracy_before"]
        rounds = tuple(Margin(m["margin"], m["margin_se"]) for m in found["rounds"])
        return cls(found["decision"], kept, before, accuracy, loss, drop, rounds, found["tied"])


@dataclass
class PerturbationSearch:
    """Makes all decisions of a space, one after the other.

    `alphas` None: fixed uniform (DARTS-PT found it as good as learned). `tune`, if given, trains
    the supernet on the space that is left, between decisions; it is told those made so far.
    `prefixes`, if given, keeps what lies before the perturbed layer; the result is the same
    without.
    """

    evaluations: Evaluations
    alphas: Mapping[str, Tensor] | None
    rule: Rule = "keep"
    order: Order = "as_listed"
    seed: int = 0
    tune: Callable[[SearchSpace, Sequence[Decision]], None] | None = None
    prefixes: PrefixCache | None = None
    state: OpenChoices = field(init=False)
    made: list[Decision] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.state = OpenChoices(self.evaluations.run.net.space, self.alphas)

    def go_on_from(self, made: Sequence[Decision]) -> None:
        """Take decisions as made (and the tuning after them as done, and the CSV as restored)."""
        self.evaluations.log.go_on()
        for decision in made:
            choices = self.state.choices[decision.name]
            self.state.decide(decision.name, choices.index(decision.kept))
            self.made.append(decision)

    def ordered(self) -> list[str]:
        """Decision names in the order in which they are made."""
        names = list(self.state.choices)
        if self.order == "from_the_input":  # embed_dim, the layers upwards, depth last
            names.remove("depth")
            names.append("depth")
        elif self.order == "random":
            random.Random(f"{self.seed}/order").shuffle(names)
        return names

    def num_evaluations(self) -> int:
        """How many evaluations the search still needs at most."""
        sizes = [len(c) for c in self.state.open.values()]
        return sum(evaluations_needed(n, self.rule) for n in sizes if n > 1)

    def num_tunings(self) -> int:
        """How many tunings the search still does at most."""
        undecided = sum(len(c) > 1 for c in self.state.open.values())
        return max(undecided - 1, 0) if self.tune is not None else 0

    def decide_all(self, progress: Callable[[], None]) -> Iterator[Decision]:
        """Yield every decision as it is made; `progress` is called after each evaluation."""
        tuned = True  # or nothing is decided yet
        for name in self.ordered():
            if len(self.state.open[name]) > 1 and not self.state.is_idle(name):
                if not tuned and self.tune is not None:
                    self.tune(self.state.restricted_space(), self.made)
                    self.evaluations.forget()
                    if self.prefixes is not None:
                        self.prefixes.clear()
                self.made.append(self._decide(name, progress))
                tuned = False
                yield self.made[-1]

    def _decide(self, name: str, progress: Callable[[], None]) -> Decision:
        state, choices = self.state, self.state.choices[name]
        first: dict[int, Scored] = {}
        rounds, tied = list[Margin](), False
        while len(state.open[name]) > 1:
            options: list[int | None] = [None, *state.open[name]] if not first else []
            options = options or list(state.open[name])
            scored = self._score(name, options, progress)
            if not first:
                before = scored.pop(0)
                first = dict(zip(state.open[name], scored, strict=True))
            # removing the best choice leaves the worst network
            ranked = sorted(zip(state.open[name], scored, strict=True), key=lambda p: p[1].rank_key)
            if self.rule == "keep":
                state.decide(name, ranked[0][0])
                lower, higher = ranked[0][1], ranked[1][1]
            else:
                state.eliminate(name, ranked[-1][0])
                lower, higher = ranked[-2][1], ranked[-1][1]
            rounds.append(Margin(*paired_difference(higher, lower)))
            tied = tied or lower.rank_key[0] == higher.rank_key[0]
        return Decision(
            name,
            state.value(name),
            before.accuracy,
            {choices[i]: s.accuracy for i, s in first.items()},
            {choices[i]: s.loss for i, s in first.items()},
            {choices[i]: before.value - s.value for i, s in first.items()},
            tuple(rounds),
            tied,
        )

    def _score(
        self, name: str, options: Sequence[int | None], progress: Callable[[], None]
    ) -> list[Scored]:
        """Scores without each option (None: with all that is open), shared among the ranks."""
        run = self.evaluations.run
        candidates, before = [], self.state.probabilities()
        for option in options:
            after = before if option is None else self.state.probabilities((name, option))
            gone = "nothing" if option is None else f"{self.state.choices[name][option]:g}"
            if self.prefixes is not None:
                forward = self.prefixes.forward(name, before, after)
            else:
                p = {k: v.to(run.ranks.device) for k, v in after.items()}
                forward = partial(run.net.superposed, probabilities=p)
            candidates.append(Candidate(_key(after), f"without {gone}", forward))
        return self.evaluations.score_all(name, candidates, progress)


def _key(probabilities: Mapping[str, Tensor]) -> str:
    """The superposed network at these probabilities, however they were reached."""
    exact = repr([(name, p.tolist()) for name, p in sorted(probabilities.items())])
    return "superposed " + hashlib.sha256(exact.encode()).hexdigest()
