"""Runs that go wrong on 2 ranks, through the real launcher: the guard brings them back alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launch import launch
from vimnas_ds.train.state_file import read_state

pytestmark = pytest.mark.endurance


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Path:
    """The demo's images alone, learned quickly, judged every 10 steps, saved every 15."""
    config = json.loads((folder / "config.json").read_text())
    config["bf16"] = {"enabled": False}
    section = config["vimnas"]
    images = section["data"]["datasets"]["imagenet"]
    images.update(mixup=0.0, random_erasing=0.0, randaugment=None, label_smoothing=0.0)
    section["data"]["datasets"] = {"imagenet": {**images, "crop_scale": [0.9, 1.0]}}
    section["model"] = {"drop_path": 0.1}
    section["schedule"] = {"epochs": 30, "warmup": 5, "warmup_unit": "steps", "lr": 0.004}
    section["alpha"] = {"every": 5}
    section["log"] = {"every": 10, "eval_every": 1000, "eval_subnets": 0, "test_at_end": False}
    section["checkpoint"] = {"every": 15, "keep": 2}
    section["guard"] = {"enabled": True, "spike_steps": 5, "margin": 5, "near": 30}
    (folder / "guard.json").write_text(json.dumps(config))
    return folder


def run(folder: Path, case: str) -> dict[str, dict]:
    output = launch("tests/launched/guard_cases.py", str(folder), case)
    lines = [line.split(" ", 2) for line in output.splitlines() if "RESULT " in line]
    return {name: json.loads(values) for _, name, values in lines}


@pytest.fixture(scope="module")
def faults(guarded) -> dict[str, dict]:
    return run(guarded, "faults")


@pytest.fixture(scope="module")
def collapse(guarded) -> dict[str, dict]:
    found = run(guarded, "collapse")
    print(json.dumps(found, indent=2))
    return found


def last(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text()


def test_nan_and_spikes_are_rewound_and_the_rate_falls_when_it_happens_again(faults):
    found = faults["whole"]
    shown = [(e["kind"], e["step"], e["to"], e["lr_factor"]) for e in found["history"]]
    assert shown == [("skipped", 30, 15, 1), ("spike", 80, 60, 1), ("spike", 100, 75, 0.5)]
    assert found["finite"]
    assert 0 < found["skipped"] < 12
    rates = dict.fromkeys(range(120), 0.0) | {step: lr for step, _, lr in found["seen"]}
    peak = 0.004
    for step, lr in rates.items():
        sound = peak * min((step + 1) / 5, 0.5 + 0.5 * math.cos(math.pi * max(step - 5, 0) / 115))
        assert lr == pytest.approx(sound * (1 if step < 75 else 0.5)), step


def test_the_schedule_goes_back_and_the_data_does_not(faults, guarded):
    seen = faults["whole"]["seen"]
    assert [cursor for _, cursor, _ in seen] == list(range(len(seen)))
    assert len(seen) == 120 + (30 - 15) + (80 - 60) + (100 - 75)
    position = json.loads((last(guarded / "whole") / "position.json").read_text())
    assert (position["step"], position["cursor"]) == (120, 180)
    assert position["consumed"] == {"imagenet": 180}
    assert position["alpha_consumed"] == {"imagenet": 36}


def test_every_event_is_in_the_log_and_in_tensorboard_where_no_step_shows_twice(faults, guarded):
    log = (guarded / "whole" / "train.log").read_text()
    assert "guard: step 30: skipped on imagenet since step 27" in log
    assert "guard: step 100: spike on imagenet since step 87" in log
    board = EventAccumulator(str(guarded / "whole" / "tensorboard")).Reload()
    steps = [e.step for e in board.Scalars("train/lr")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 120
    points = [(e.step, e.value) for e in board.Scalars("guard/rewinds")]
    assert points == [(16, 1), (61, 2), (76, 3)]
    (text,) = [e for e in board.Tensors("guard/events/text_summary") if e.step == 76]
    assert text.tensor_proto.string_val[0].count(b"rewound to step") == 3


def test_a_run_that_dies_between_a_rewind_and_the_next_save_comes_to_the_same(faults, guarded):
    found = faults["killed"]
    assert found["seen"][found["again"]][:2] == [75, 110]  # it meets the third event once more
    assert found["history"] == faults["whole"]["history"]
    whole, killed = (last(guarded / name) for name in ("whole", "killed"))
    assert whole.name == killed.name
    for file in ("supernet.safetensors", "state.safetensors", "rank00000-of-00002.safetensors"):
        a, b = load_file(whole / file), load_file(killed / file)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), file
    a, b = (read_state(run / "state.safetensors") for run in (whole, killed))
    assert a["guard"] == b["guard"]
    assert len(a["guard"]["guard"]["imagenet"]["seen"]) == 120
    assert a["position"] == b["position"]


def test_a_rewind_goes_past_a_damaged_checkpoint(faults):
    found = faults["damaged"]
    assert [(e["step"], e["to"]) for e in found["history"]] == [(30, 0)]
    assert found["steps"] == [*range(30), *range(40)]
    assert found["finite"]
    assert set(found["marks"]) <= {int(name[4:]) for name in found["checkpoints"]}


def test_bad_checkpoints_are_given_up_and_good_ones_kept(faults):
    kept = faults["whole"]["checkpoints"]
    assert {"step00000105", "step00000120"} <= set(kept)
    assert len(kept) <= 6


def test_a_learning_rate_that_collapses_the_supernet_is_lowered_without_a_person(collapse):
    chance = math.log(8)
    alone, helped = collapse["unguarded"], collapse["guarded"]
    assert min(alone["losses"][:5]) < 0.9 * chance  # it had learned
    assert min(alone["losses"][-5:]) > chance
    assert sum(alone["top1"][-5:]) / 5 < 0.17
    assert len(helped["history"]) >= 2
    assert {e["kind"] for e in helped["history"]} <= {"collapse", "spike"}
    assert helped["lr"] < 0.1 * alone["lr"]
    assert sum(helped["losses"][-3:]) / 3 < 0.85 * chance
    assert sum(helped["top1"][-3:]) / 3 > 0.25


def test_a_run_that_will_not_stay_sound_stops_with_words(guarded):
    """A rate at which everything overflows: one rewind allowed, then exit code 3."""
    values = ["schedule.lr=1e30", "guard.max_rewinds=1", f"output_dir={guarded / 'hopeless'}"]
    args = [word for value in values for word in ("--set", f"vimnas.{value}")]
    with pytest.raises(AssertionError, match=r"after 1 rewinds near there.*lower vimnas\.schedule"):
        launch("scripts/train.py", "--deepspeed_config", str(guarded / "guard.json"), *args)
