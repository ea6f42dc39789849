"""The controls: who is compared, and what is said of a pick."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest

from tests.test_search import EQUAL, NANO, PLANTS, PlantedNet, open_planted, worth
from vimnas_ds.config import ConfigError
from vimnas_ds.model.alphas import one_hot
from vimnas_ds.report.comparison import comparison_figure
from vimnas_ds.search.comparison import (
    Measured,
    comparison_object,
    judge,
    rows_of,
)
from vimnas_ds.search.controls import (
    Entry,
    Pick,
    corners,
    evolution_of_size,
    find_picks,
    fixed_perturbation,
    random_alike,
)
from vimnas_ds.search.objective import MEAN
from vimnas_ds.train.dry_run import cost_of
from vimnas_ds.train.run_files import RunFiles

WEIGHTS = {"imagenet": 0.25, "k400": 0.75}


def planted_comparison(pick_top1: float, others: list[float], params: int = 1000):
    """A pick of 1000 parameters and controls of `params`, of given accuracy on k400; on imagenet
    all are alike."""
    archs = list(NANO.members())[: len(others) + 1]
    entries = [Entry("mine", "pick", archs[0])]
    entries += [Entry("random", "random", a, "mine") for a in archs[1:]]
    accuracy = dict(zip(archs, [pick_top1, *others], strict=True))
    table = {
        arch: {
            "imagenet": Measured(0.5, 0.9, 100, size, 0.1),
            "k400": Measured(accuracy[arch], 0.9, 400, size, 0.2),
        }
        for arch in archs
        for size in (1000 if arch is archs[0] else params,)
    }
    return entries, table


def test_only_a_pick_better_than_all_of_twenty_beats_them():
    others = [0.50 + i / 1000 for i in range(20)]
    entries, table = planted_comparison(0.52, others)
    best = {v.dataset: v for v in judge(entries, table, WEIGHTS, "test")}
    assert list(best) == [MEAN, "imagenet", "k400"]
    assert best["k400"].p == pytest.approx(1 / 21)
    assert best[MEAN].beats
    assert not best["k400"].beats  # one claim a pick, on the mean
    assert best["k400"].percentile == 100
    assert best["k400"].random_mean == pytest.approx(0.5095)
    assert best["k400"].random_best == pytest.approx(0.519)
    assert best[MEAN].top1 == pytest.approx(0.25 * 0.5 + 0.75 * 0.52)
    assert best["imagenet"].p == 1.0  # all alike: ties count against the pick
    assert str(best[MEAN]).startswith(f"mine beats random sub-networks of its size on {MEAN}: ")
    assert str(best["k400"]).startswith(
        "mine on k400: +1.1 points against the mean of 20 random ones ("
    )
    (alone,) = judge(entries, table, {"k400": 1.0}, "test")  # one dataset: once, with the claim
    assert (alone.dataset, alone.beats) == ("k400", True)
    for verdict in judge(entries, table, WEIGHTS, "select"):
        assert not verdict.beats
        assert str(verdict).endswith("; chosen on these samples: this says nothing")
    entries, table = planted_comparison(0.519, others)  # as good as the best of them
    tied = {v.dataset: v for v in judge(entries, table, WEIGHTS, "test")}
    assert tied[MEAN].p == pytest.approx(2 / 21)
    assert tied[MEAN].percentile == pytest.approx(97.5)
    assert "does NOT beat" in str(tied[MEAN])
    assert "too few" not in str(tied[MEAN])
    few = judge(*planted_comparison(0.9, others[:19]), WEIGHTS, "test")  # at best p = 1 / 20
    assert not any(v.beats for v in few)
    assert "too few of them to tell" in str(few[0])


def test_a_mean_that_differs_in_its_last_bit_is_a_tie_for_p_and_percentile():
    entries, table = planted_comparison(0.5, [0.5 + 1e-12])
    verdict = judge(entries, table, WEIGHTS, "test")[0]
    assert (verdict.p, verdict.percentile) == (1.0, 50.0)


@pytest.mark.parametrize(("params", "side"), [(980, "all smaller"), (1020, "all larger")])
def test_random_ones_on_one_side_of_the_picks_size_are_said_to_be(params, side):
    entries, table = planted_comparison(0.52, [0.5, 0.51], params)
    wanted = f"size within 2.0 %, {(params - 1000) / 10:+.1f} % on average, {side}"
    assert wanted in str(judge(entries, table, WEIGHTS, "test")[0])
    assert wanted in rows_of("k400", entries, table)[1][3]


def test_the_test_is_exact_for_a_pick_that_is_just_another_random_one():
    rng = random.Random(0)
    beaten = 0
    for _ in range(2000):
        drawn = [rng.random() for _ in range(21)]
        beaten += judge(*planted_comparison(drawn[0], drawn[1:]), WEIGHTS, "test")[0].beats
    assert 0.035 < beaten / 2000 < 0.061  # 1 in 21


def test_the_table_the_object_and_the_picture_agree():
    entries, table = planted_comparison(0.52, [0.5, 0.51])
    entries.append(Entry("largest", "control", entries[0].arch))
    lines = rows_of("k400", entries, table)
    assert [line[0].strip() for line in lines] == ["mine", "2 random of its size", "largest"]
    assert lines[0][1] == "52.0% +- 2.5%"
    assert lines[1][1] == "50.5% +- 0.5%"
    assert lines[1][3] == "best 51.0%, pick at 100 %; size within 0.0 %, +0.0 % on average"
    found = comparison_object(entries, table, WEIGHTS, {"split": "test"})
    assert json.loads(json.dumps(found)) == found
    assert [e["role"] for e in found["entries"]] == ["pick", "random", "random", "control"]
    figure = comparison_figure(found, list(WEIGHTS))
    assert [axes.get_title() for axes in figure.axes] == list(WEIGHTS)
    shown = [t.get_text() for t in figure.legends[0].get_texts()]
    assert shown == ["mine", "largest"]


def test_controls_have_the_picks_size_and_budget(tmp_path):
    evaluations = open_planted(PlantedNet(planted=PLANTS[2], worth=worth), tmp_path)
    run = evaluations.run
    pick = PLANTS[2]
    size = cost_of(run.config, pick, "imagenet")[0]
    found, percent = random_alike(run, "imagenet", pick, 10, [NANO.largest()], seed=0)
    assert len(set(found)) == 10
    assert pick not in found
    for arch in found:
        assert abs(cost_of(run.config, arch, "imagenet")[0] / size - 1) <= percent / 100
    assert found == random_alike(run, "imagenet", pick, 10, [NANO.largest()], seed=0)[0]
    assert found != random_alike(run, "imagenet", pick, 10, [NANO.largest()], seed=1)[0]
    evolved = evolution_of_size(evaluations, "mine", pick, 24, 0, lambda: None)
    assert cost_of(run.config, evolved.arch, "imagenet")[0] <= size
    rows = evaluations.log.path.read_text().splitlines()[1:]
    assert 12 <= len(rows) <= 24
    assert evolved.evaluations == len(rows)
    fixed = fixed_perturbation(evaluations, lambda: None)
    assert fixed.arch == pick
    assert fixed.evaluations == len(evaluations.log.path.read_text().splitlines()) - 1 - len(rows)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 9])
def test_a_small_budget_is_kept(tmp_path, most):
    evaluations = open_planted(PlantedNet(worth=worth), tmp_path)
    evolved = evolution_of_size(evaluations, "mine", NANO.largest(), most, 0, lambda: None)
    assert 1 <= evolved.evaluations <= most
    assert len(evaluations.log.path.read_text().splitlines()) - 1 == evolved.evaluations


def test_argmax_alpha_is_a_control():
    planted = PLANTS[2]
    alphas = {name: p * 5 for name, p in one_hot(NANO, planted).items()}
    run = SimpleNamespace(net=SimpleNamespace(space=NANO), alphas=alphas)
    assert [e.name for e in corners(run)] == ["largest", "smallest", "argmax alpha"]
    assert corners(run)[2].arch == planted


def test_picks_are_what_searches_left_of_this_checkpoint(tmp_path):
    def leave(name: str, checkpoint: str, **more: object) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        result = {"selector": name, "checkpoint": checkpoint, "arch": json.loads(arch), **more}
        (tmp_path / name / "result.json").write_text(json.dumps(result))

    arch = PLANTS[2].to_json()
    run = SimpleNamespace(
        files=RunFiles(tmp_path),
        checkpoint=tmp_path / "checkpoints" / "step00000020",
        weights="abc",
        net=SimpleNamespace(space=NANO),
    )
    with pytest.raises(ConfigError, match=r"has no pick of step00000020: run perturb_select\.py"):
        find_picks(run, [], EQUAL)
    leave("evolution", "runs/x/checkpoints/step00000010")
    with pytest.raises(
        ConfigError, match=r"evolution/result.json is of other weights .*step00000010"
    ):
        find_picks(run, [], EQUAL)
    decisions = [{"accuracy_without": {"1": 0.5, "2": 0.4, "3": 0.3}}] * 2
    leave("perturbation", "elsewhere/checkpoints/step00000020", decisions=decisions)
    leave("front", "moved/step00000010", weights="abc", evaluated=70)
    leave("tuned", "x/checkpoints/step00000020", weights="abd")
    (tmp_path / "mine.json").write_text(NANO.smallest().to_json())
    found, notes = find_picks(run, [f"mine={tmp_path / 'mine.json'}"], EQUAL)
    assert found == {
        "front": Pick(PLANTS[2], 70),
        "perturbation": Pick(PLANTS[2], 8),
        "mine": Pick(NANO.smallest(), None),
    }
    assert [note.partition(" is of other weights")[0] for note in notes] == [
        f"left out: {tmp_path / name / 'result.json'}" for name in ("evolution", "tuned")
    ]
    with pytest.raises(ConfigError, match="NAME=FILE"):
        find_picks(run, ["mine"], EQUAL)
    by_loss = {"metric": "loss", "weights": dict(EQUAL.weights)}
    same = {"metric": "top1", "weights": dict(EQUAL.weights)}
    leave("tuned", "x", weights="abc", objective=by_loss, decisions=decisions, rule="eliminate")
    bounded = ["params (k400) in [0, 9]"]
    leave("evolution", "x", weights="abc", objective=same, evaluated=9, constraints=bounded)
    result = tmp_path / "evolution" / "result.json"
    found, (note,) = find_picks(run, [f"evolution_x={result}"], EQUAL)
    assert note.startswith(f"{tmp_path / 'tuned' / 'result.json'} was chosen by ")
    assert found["tuned"].evaluations == 12
    assert [name for name, pick in found.items() if pick.evolved] == ["evolution"]
    assert found["evolution_x"] == Pick(PLANTS[2], 9)
    leave("evolution", "x", weights="abc", constraints=[*bounded, "latency (k400) in [0, 9]"])
    assert not find_picks(run, [], EQUAL)[0]["evolution"].evolved
