"""Evaluations that outlive their process, and what a search maximises."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.test_search import CPU, DATASETS, NANO, PLANTS, PlantedNet, open_planted, worth
from vimnas_ds.config import ConfigError
from vimnas_ds.search.constraints import Constraints
from vimnas_ds.search.evolve import Evolution, EvolutionOptions
from vimnas_ds.search.objective import parse_objective
from vimnas_ds.search.perturb import PerturbationSearch
from vimnas_ds.search.scoring import ArchScorer, Candidate, Evaluations, _dealt


class Killed(BaseException):
    """What ends a process, for the code that it hits."""


def evolve(evaluations: Evaluations, progress=lambda: None):
    scorer = ArchScorer(evaluations)
    options = EvolutionOptions(population=10, generations=3, crossovers=5, mutations=5)
    constraints = Constraints([], evaluations.run.config, NANO)
    history = list(Evolution(scorer, constraints, options, 0).generations(progress))
    return history, scorer.scores


def perturb(evaluations: Evaluations, progress=lambda: None):
    return list(PerturbationSearch(evaluations, None).decide_all(progress))


def result_of(search, evaluations: Evaluations):
    found = search(evaluations)
    if search is evolve:
        history, scores = found
        found = history, {a: (s.accuracy, s.loss) for a, s in scores.items()}
    return found, evaluations.log.path.read_text()


@pytest.mark.parametrize("search", [evolve, perturb])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_search_goes_on_and_ends_the_same(tmp_path, search, torn):
    def opened(name: str, cache: Path | None) -> Evaluations:
        (tmp_path / name).mkdir()
        return open_planted(PlantedNet(planted=PLANTS[2], worth=worth), tmp_path / name, cache)

    whole = opened("whole", None)
    expected = result_of(search, whole)
    cache, done = tmp_path / "cache", []

    def kill() -> None:
        done.append(1)
        if len(done) == 9:
            raise Killed

    with pytest.raises(Killed):
        search(opened("first", cache), kill)
    files = sorted(cache.iterdir())
    assert len(files) == len(DATASETS)
    if torn:  # in the middle of a record of the second dataset
        os.truncate(files[1], files[1].stat().st_size - 7)
    again = opened("second", cache)
    assert result_of(search, again) == expected
    assert 0 < again.run.net.passes < whole.run.net.passes
    last = opened("third", cache)
    assert result_of(search, last) == expected
    assert last.run.net.passes == 0


def test_other_weights_samples_or_recipes_find_nothing(tmp_path):
    def asked(identity: str, samples: int = 400) -> int:
        evaluations = open_planted(PlantedNet(worth=worth), tmp_path)
        run = evaluations.run
        run.identity = lambda dataset: [dataset, identity, samples]
        found = Evaluations(run, evaluations.log, evaluations.objective, tmp_path / "cache")
        ArchScorer(found).score_all("x", [NANO.largest()], lambda: None)
        return run.net.passes

    assert asked("weights 1") > 0
    assert asked("weights 1") == 0
    assert asked("weights 2") > 0
    assert asked("weights 1", samples=300) > 0


def test_an_evaluation_that_lost_a_file_is_not_kept(tmp_path):
    def opened(lose: bool) -> Evaluations:
        evaluations = open_planted(PlantedNet(worth=worth), tmp_path)
        run = evaluations.run
        gone = run.data.splits["k400"]["select"][3].path
        batches = run.evaluator._batches

        def without(dataset: str, split: str):
            for batch in batches(dataset, split):
                lost = gone if lose and dataset == "k400" else ""
                keep = [i for i, n in enumerate(batch.names) if n != lost]
                names = tuple(batch.names[i] for i in keep)
                yield type(batch)(batch.x[keep], batch.y[keep], names)

        run.evaluator._batches = without
        return Evaluations(run, evaluations.log, evaluations.objective, tmp_path / "cache")

    lossy = opened(lose=True)
    (a,) = ArchScorer(lossy).score_all("x", [NANO.largest()], lambda: None)
    assert len(a.outcomes["k400"].loss) == len(a.outcomes["imagenet"].loss) - 1
    assert ArchScorer(lossy).score_all("x", [NANO.largest()], lambda: None)[0].loss == a.loss
    (b,) = ArchScorer(opened(lose=False)).score_all("x", [NANO.largest()], lambda: None)
    assert len(b.outcomes["k400"].loss) == len(b.outcomes["imagenet"].loss)
    again = opened(lose=True)
    (c,) = ArchScorer(again).score_all("x", [NANO.largest()], lambda: None)
    assert again.run.net.passes == 0
    assert (c.accuracy, c.loss) == (b.accuracy, b.loss)


def test_searches_side_by_side_keep_each_others_evaluations(tmp_path):
    archs = list(NANO.members())[:6]
    one, two = (
        ArchScorer(open_planted(PlantedNet(worth=worth), tmp_path, tmp_path / "cache"))
        for _ in range(2)
    )
    for i, arch in enumerate(archs):
        (one, two)[i % 2].score_all("x", [arch], lambda: None)
    last = open_planted(PlantedNet(worth=worth), tmp_path, tmp_path / "cache")
    ArchScorer(last).score_all("x", archs, lambda: None)
    assert last.run.net.passes == 0


def test_a_cache_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="--no_cache"):
        open_planted(PlantedNet(worth=worth), tmp_path, tmp_path / "cache")


def test_the_csv_of_an_earlier_search_lives_until_the_first_row(tmp_path):
    log = open_planted(PlantedNet(worth=worth), tmp_path).log
    log.path.write_text("earlier\n")
    evaluations = open_planted(PlantedNet(worth=worth), tmp_path)
    assert log.path.read_text() == "earlier\n"
    for arch in (NANO.largest(), NANO.smallest()):
        ArchScorer(evaluations).score_all("x", [arch], lambda: None)
    assert log.path.read_text().startswith("what,candidate")
    assert len(log.path.read_text().splitlines()) == 3


def test_weights_and_metric_decide_as_they_say(tmp_path):
    class TwoMinds(PlantedNet):
        """imagenet likes the first depth, k400 the second; the loss likes the second."""

        def superposed(self, x, probabilities, dataset):
            first, second = probabilities["depth"].tolist()
            share = first if dataset == "imagenet" else second
            logits = self._logits(x, 0.3 + 0.4 * share)
            return logits * (0.2 + 0.8 * second)

    def kept(weights: list[str], metric: str) -> float:
        evaluations = open_planted(
            TwoMinds(), tmp_path, objective=parse_objective(weights, DATASETS, metric)
        )
        made = {d.name: d for d in PerturbationSearch(evaluations, None).decide_all(lambda: None)}
        return made["depth"].kept

    assert kept(["imagenet=3", "k400=1"], "top1") == NANO.depth[0]
    assert kept(["imagenet=1", "k400=3"], "top1") == NANO.depth[1]
    equal = parse_objective(["k400", "imagenet=3"], DATASETS, "loss")
    assert dict(equal.weights) == {"k400": 0.25, "imagenet": 0.75}
    evaluations = open_planted(PlantedNet(worth=worth), tmp_path, objective=equal)
    scored = ArchScorer(evaluations).score_all("x", [NANO.largest()], lambda: None)[0]
    assert scored.value == pytest.approx(-scored.loss)
    assert scored.rank_key == (-round(scored.loss, 6), round(scored.accuracy, 9))


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["k700"], "this run has imagenet, k400"),
        (["k400", "k400=2"], "names k400 twice"),
        (["k400=much"], "'much' is not a weight"),
        (["k400=0"], "above 0"),
    ],
)
def test_a_wrong_dataset_or_weight_is_refused_in_words(texts, words):
    with pytest.raises(ConfigError, match=words):
        parse_objective(texts, DATASETS)


def test_candidates_are_dealt_so_that_ranks_have_equal_loads():
    for world in (2, 3, 4):
        chunk = [Candidate(str(i), "", None, cost=1.0 + i * i % 7) for i in range(4 * world)]
        dealt = _dealt(chunk, world)
        assert sorted(dealt) == sorted(chunk)
        loads = [sum(c.cost for c in dealt[r::world]) for r in range(world)]
        assert max(loads) <= 1.15 * min(loads)


def test_what_an_outcome_depends_on_is_in_its_identity(trained):
    from vimnas_ds.search.run import open_run

    def digest(*overrides: str, samples: int | None = None) -> str:
        run = open_run(trained, CPU, overrides, samples)
        try:
            return str(run.identity("k400"))
        finally:
            run.close()

    same = digest()
    assert digest() == same
    assert digest(samples=4) != same
    assert digest("vimnas.log.eval_batch=3") != same
    assert digest("vimnas.data.k400.fps=4") != same
    with pytest.raises(ConfigError, match="train anew with it"):
        digest("vimnas.data.held_out=0.3")
