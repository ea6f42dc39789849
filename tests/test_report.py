"""What the reports write is read back: events, lines of stdout, pixels of pictures."""

from __future__ import annotations

import io
import math
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

from vimnas_ds.report import pictures
from vimnas_ds.report.board import Board, _by_kind
from vimnas_ds.report.console import Console, StepTimer, format_duration, summarise
from vimnas_ds.report.decisions import DecisionRow, decisions_table, drops_figure
from vimnas_ds.report.search_board import SearchBoard
from vimnas_ds.report.table import format_table
from vimnas_ds.space import SPACES, Arch

ARCH = Arch(64, 3, (2, 2, 2), (4, 4, 2))


def read(log_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(log_dir))
    events.Reload()
    return events


def points(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(tag)]


def normalise(grey: np.ndarray) -> torch.Tensor:
    """(B, ..., 3) grey levels -> (B, 3, ...) as the pipelines give it."""
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    return ((torch.from_numpy(grey).float() / 255 - mean) / std).movedim(-1, 1)


# --- board ---


def test_scalars_are_read_back_under_their_tags(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.train_loss(3, "k400", 1.5, 0.25)
    board.train_step(3, 1e-3, 842.0, 0.003, 2)
    board.train_loss(4, "imagenet", 2.5, None)
    board.train_step(4, 2e-3, 800.0, 0.004, 2)
    board.alpha_step(4, "k400", 1.25)
    board.evaluation(4, "ssv2", "largest", 0.5, 0.75, 0.875)
    board.close()
    board.close()
    events = read(tmp_path)
    expected = {
        "train/loss/k400": [(3, 1.5)],
        "train/top1/k400": [(3, 0.25)],
        "train/loss/imagenet": [(4, 2.5)],
        "train/lr": [(3, 1e-3), (4, 2e-3)],
        "train/samples_per_s": [(3, 842.0), (4, 800.0)],
        "train/data_time_ms": [(3, 3.0), (4, 4.0)],
        "train/skipped_steps": [(3, 2.0), (4, 2.0)],
        "alpha/loss/k400": [(4, 1.25)],
        "select/ssv2/loss/largest": [(4, 0.5)],
        "select/ssv2/top1/largest": [(4, 0.75)],
        "select/ssv2/top5/largest": [(4, 0.875)],
    }
    assert set(events.Tags()["scalars"]) == set(expected)
    for tag, value in expected.items():
        assert points(events, tag) == value, tag


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    first = Board(tmp_path, 0)
    for step in range(11):
        first.alpha_step(step, "k400", 1.0)
    first.unusable(0, "k400", ["a.mp4: cut", os.fsdecode(b"\xff.mp4: empty")])
    first.close()
    resumed = Board(tmp_path, 5)
    for step in range(5, 9):
        resumed.alpha_step(step, "k400", 2.0)
    resumed.unusable(5, "k400", ["b.mp4: cut"])
    resumed.close()
    events = read(tmp_path)
    expected = [(step, 1.0) for step in range(5)] + [(step, 2.0) for step in range(5, 9)]
    assert points(events, "alpha/loss/k400") == expected
    notes = events.Tensors("data/unusable/k400/text_summary")
    assert [(n.step, n.tensor_proto.string_val[0]) for n in notes] == [
        (0, b"    a.mp4: cut\n    \\udcff.mp4: empty\n"),
        (5, b"    b.mp4: cut\n"),
    ]


def test_an_evaluation_that_is_made_up_for_twice_has_its_points_once(tmp_path: Path) -> None:
    """The process that made up for it was killed before its checkpoint was there."""
    for _ in range(2):
        board = Board(tmp_path, 15)
        board.keep(14)
        for dataset in ("imagenet", "k400"):
            board.evaluation(14, dataset, "largest", loss=1.0, top1=0.5, top5=0.9)
        board.evaluation(20, "k400", "largest", loss=1.0, top1=0.5, top5=0.9)
        board.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("select/imagenet/top1/largest")] == [14]
    assert [e.step for e in events.Scalars("select/k400/loss/largest")] == [14, 20]


def test_hyperparameters_and_first_screen_are_there_once_however_often_resumed(
    tmp_path: Path,
) -> None:
    settings = {"peak_lr": 0.5, "qk_norm": "on", "space": "nano"}
    for step, scores in ((0, 0.25), (5, 0.5), (8, 0.75)):  # 8: resumed at its end
        board = Board(tmp_path, step)
        board.begin(settings, ["k400", "k4"], ["largest", "smallest"])
        for point in range(step, 8):
            board.train_loss(point, "k400", 1.0, None)
        board.end(8, {"k400": {"largest": scores}})
        board.close()
    found: dict[str, list[HParamsPluginData]] = {}
    layouts = []
    for file in sorted(tmp_path.iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                data = value.metadata.plugin_data
                if data.plugin_name == "hparams":
                    content = HParamsPluginData.FromString(data.content)
                    found.setdefault(value.tag, []).append(content)
                if data.plugin_name == "custom_scalars":
                    layouts.append(Layout.FromString(value.tensor.string_val[0]))
    experiment, session = "_hparams_/experiment", "_hparams_/session_start_info"
    assert [len(found[tag]) for tag in (experiment, session)] == [1, 1]
    hparams = found[session][0].session_start_info.hparams
    assert hparams["peak_lr"].number_value == 0.5
    assert [hparams[key].string_value for key in ("qk_norm", "space")] == ["on", "nano"]
    metrics = [m.name.tag for m in found[experiment][0].experiment.metric_infos]
    assert metrics == [
        f"{split}/{name}/top1/{subnet}"
        for split in ("select", "test")
        for name in ("k400", "k4")
        for subnet in ("largest", "smallest")
    ]
    (layout,) = layouts
    charts = {c.title: list(c.multiline.tag) for part in layout.category for c in part.chart}
    events = read(tmp_path)
    assert points(events, "test/k400/top1/largest") == [(8, 0.75)]
    assert [step for step, _ in points(events, "train/loss/k400")] == list(range(8))
    assert next(iter(layout.category)).title == "accuracy on select"
    for title, tags in (
        ("top-1, largest", ["select/k400/top1/largest", "select/k4/top1/largest"]),
        ("loss", ["train/loss/k400", "train/loss/k4"]),
        ("learning rate", ["train/lr"]),
        ("samples per second", ["train/samples_per_s"]),
    ):
        assert len(charts[title]) == len(tags)
        for pattern, tag in zip(charts[title], tags, strict=True):
            assert {t for t in ("train/loss/k400", *tags) if re.match(pattern, t)} == {tag}


def test_a_resumed_file_sorts_after_those_already_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A name of this very second that would sort last whatever the process's number.
    taken = tmp_path / f"events.out.tfevents.{int(time.time()):010d}.~.0.0"
    taken.touch()
    board = Board(tmp_path, 5)
    board.close()
    assert max(tmp_path.iterdir()).name != taken.name
    assert not caplog.records

    (tmp_path / f"events.out.tfevents.{int(time.time()) + 1000:010d}.host.0.0").touch()
    Board(tmp_path, 5).close()
    assert "behind the newest event file" in caplog.text


def test_alphas_are_a_picture_and_an_entropy_per_kind(tmp_path: Path) -> None:
    space = SPACES["nano"]
    choices: dict[str, Sequence[float]] = {"embed_dim": space.embed_dim, "depth": space.depth}
    for layer in range(space.max_depth):
        choices[f"num_heads[{layer}]"] = space.num_heads[layer]
        choices[f"mlp_ratio[{layer}]"] = space.mlp_ratio[layer]
    probabilities: dict[str, Sequence[float]] = {
        k: [1 / len(c)] * len(c) for k, c in choices.items()
    }
    probabilities["depth"] = [0.0, 1.0]
    probabilities["num_heads[1]"] = [0.25, 0.75]
    board = Board(tmp_path, 0)
    board.alphas(7, probabilities, choices)
    with pytest.raises(ValueError, match=r"not in both: \['depth'\]"):
        board.alphas(8, probabilities, {k: c for k, c in choices.items() if k != "depth"})
    board.close()
    events = read(tmp_path)
    table = make_ndarray(events.Tensors("alpha/table/num_heads")[0].tensor_proto)
    assert table.tolist() == [[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]
    means = [points(events, f"alpha/p/num_heads/{choice}") for choice in (1, 2)]
    assert means == [[(7, 1.25 / 3)], [(7, 1.75 / 3)]]
    assert points(events, "alpha/p/depth/3") == [(7, 1.0)]
    kinds = {"embed_dim", "depth", "num_heads", "mlp_ratio"}
    assert set(events.Tags()["images"]) == {f"alpha/probabilities/{kind}" for kind in kinds}
    heads = (2 * math.log(2) - 0.25 * math.log(0.25) - 0.75 * math.log(0.75)) / 3
    assert points(events, "alpha/entropy/embed_dim") == [(7, math.log(3))]
    assert points(events, "alpha/entropy/depth") == [(7, 0.0)]
    assert points(events, "alpha/entropy/num_heads") == [(7, heads)]
    assert points(events, "alpha/entropy/mlp_ratio") == [(7, math.log(2))]


def test_layers_are_in_numerical_order() -> None:
    keys = ["num_heads[10]", "depth", "num_heads[2]", "num_heads[0]"]
    assert _by_kind(dict.fromkeys(keys)) == {
        "num_heads": ["num_heads[0]", "num_heads[2]", "num_heads[10]"],
        "depth": ["depth"],
    }
    with pytest.raises(ValueError, match=r"got 'num_heads\[x\]'"):
        _by_kind({"num_heads[x]": None})


def test_pictures_are_read_back_with_their_size(tmp_path: Path) -> None:
    board = Board(tmp_path, 0)
    board.sampled_choices(2, {"embed_dim": {48: 3, 32: 5}, "num_heads": {}})
    board.contact_sheet(2, "imagenet", torch.zeros(5, 3, 56, 56), torch.arange(5), list("abcde"))
    mixed = torch.full((2, 5), 0.02) + torch.eye(2, 5) * 0.9
    board.contact_sheet(2, "k400", torch.zeros(2, 3, 4, 56, 56), mixed, list("abcde"))
    board.close()
    events = read(tmp_path)
    sizes = {tag: events.Images(tag)[0] for tag in events.Tags()["images"]}
    assert set(sizes) == {"sampled/embed_dim", "batch/imagenet", "batch/k400"}
    # Tiles of 2 x 56 pixels: 4 in a row under a label of 20, gaps of 4.
    for tag in ("batch/imagenet", "batch/k400"):
        assert (sizes[tag].width, sizes[tag].height) == (4 * 116 + 4, 2 * 136 + 4)


def test_a_disabled_board_writes_no_file(tmp_path: Path) -> None:
    board = Board(tmp_path / "tb", 0, enabled=False)
    board.begin({"seed": 0}, ["k400"], ["largest"])
    board.end(2, {"k400": {"largest": 0.5}})
    board.train_loss(1, "k400", 1.0, 0.5)
    board.train_step(1, 1e-3, 1.0, 0.0, 0)
    board.alpha_step(1, "k400", 1.0)
    board.evaluation(1, "k400", "largest", 1.0, 0.5, 0.5)
    board.alphas(1, {"depth": [1.0]}, {"depth": [2]})
    board.sampled_choices(1, {"depth": {2: 1}})
    board.contact_sheet(1, "k400", torch.zeros(1, 3, 8, 8), torch.zeros(1), ["a"])
    board.unusable(1, "k400", ["a.mp4: cut"])
    board.close()
    assert not any(tmp_path.iterdir())


# --- pictures ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_sheet_undoes_the_normalisation(dtype: torch.dtype) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (6, 60, 120, 3), np.uint8)
    sheet = pictures.contact_sheet(normalise(grey).to(dtype), ["label"] * 6, max_samples=5)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * (20 + 120 + 4) + 4, 4 * (240 + 4) + 4, 3)
    for i, (top, left) in enumerate([(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]):
        tile = sheet[4 + 144 * top + 20 :, 4 + 244 * left :][:120, :240]
        error = np.abs(tile.astype(int) - grey[i].repeat(2, 0).repeat(2, 1).astype(int))
        assert error.max() <= 1


def test_a_clip_sheet_has_a_row_of_evenly_spaced_frames_each() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (2, 9, 112, 112, 3), np.uint8)
    sheet = pictures.contact_sheet(normalise(grey), ["a", "b"], max_frames=3)
    assert sheet.shape == (2 * (20 + 112 + 4) + 4, 3 * (112 + 4) + 4, 3)
    for row in range(2):
        for column, frame in enumerate((0, 4, 8)):
            tile = sheet[24 + 136 * row :, 4 + 116 * column :][:112, :112]
            assert np.abs(tile.astype(int) - grey[row, frame].astype(int)).max() <= 1


def test_labels_are_drawn_and_cut_to_their_sample() -> None:
    black = torch.zeros(2, 3, 112, 112)
    none, some, long = (
        pictures.contact_sheet(black, [text, ""]) for text in ("", "disc", "a label " * 30)
    )
    strip = np.s_[4:24]
    assert (none[strip] == 255).all()
    assert (some[strip, :116] < 128).any()
    assert (long[strip, :116] < 128).sum() > (some[strip, :116] < 128).sum()
    assert (long[strip, 118:] == 255).all()
    with pytest.raises(ValueError, match="2 samples need that many labels, got 1"):
        pictures.contact_sheet(black, ["a"])
    with pytest.raises(ValueError, match=r"got \(2, 1, 8, 8\)"):
        pictures.contact_sheet(torch.zeros(2, 1, 8, 8), ["a", "b"])


def test_pixels_that_are_not_finite_are_black() -> None:
    x = torch.full((1, 3, 112, 112), math.nan)
    assert (pictures.contact_sheet(x, [""])[24:-4, 4:-4] == 0).all()


def test_a_heat_map_shades_its_cells_and_leaves_out_what_a_layer_cannot_choose() -> None:
    figure = pictures.alpha_heatmap("t", [[0.9, 0.1], [0.2, 0.3, 0.5]], [(2, 4), (2, 3.5, 4)])
    axes = figure.axes[0]
    table = axes.images[0].get_array()
    assert table.filled(-1).tolist() == [[0.9, 0.2], [-1, 0.3], [0.1, 0.5]]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["2", "3.5", "4"]
    assert [t.get_text() for t in axes.texts] == ["0.900", "0.200", "0.300", "0.100", "0.500"]
    many = pictures.alpha_heatmap("t", [[0.5, 0.5]] * 61, [(1, 2)] * 61)
    assert not many.axes[0].texts
    assert pictures.render(figure).shape[2] == 3


def test_bars_name_their_choices_and_values() -> None:
    axes = pictures.bars("t", ["192", "240"], [0.25, 0.75], "probability", 0.5).axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["192", "240"]
    assert [t.get_text() for t in axes.texts] == ["0.250", "0.750"]
    assert axes.get_ylabel() == "probability"
    assert [t.get_text() for t in pictures.bars("t", ["1"], [3], "count").axes[0].texts] == ["3"]


# --- console ---


def say_step(console: Console, step: int, top1: float | None = 0.412) -> None:
    console.step_line(step, 3, "joint", "k400", ARCH, 1.9234, top1, 9.8e-4, 842.3, 0.0031)


def test_a_line_holds_the_numbers_and_the_file_holds_the_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([100.0, 110.0, 115.0])
    log_path = tmp_path / "run" / "train.log"
    console = Console(2000, 80, log_path, enabled=True, clock=lambda: next(times))
    say_step(console, 100)
    say_step(console, 120)
    say_step(console, 130, top1=None)
    console.say("saved\n\ncheckpoint")
    console.close()
    lines = capsys.readouterr().out.splitlines()
    start = "e3 joint  k400  d3 e64 h2.0 r3.3  loss 1.923"
    end = r"lr 9\.8e-4  842 samples/s  data 3 ms  eta %s  mem \d+\.\d GiB"
    assert re.fullmatch(rf"step 100/2000  {start}  top1 41\.2%  {end % '--'}", lines[0])
    assert re.fullmatch(rf"step 120/2000  {start}  top1 41\.2%  {end % '15:40'}", lines[1])
    assert re.fullmatch(rf"step 130/2000  {start}  {end % '15:35'}", lines[2])
    assert lines[3:] == ["saved", "", "checkpoint"]

    Console(2000, 130, log_path, enabled=True).say("resumed")
    stamps, written = zip(
        *(line.partition("  ")[::2] for line in log_path.read_text().splitlines()), strict=True
    )
    exact = f"  [{ARCH}]"  # the file names the sub-network layer by layer
    assert list(written) == [*(line + exact for line in lines[:3]), *lines[3:], "resumed"]
    assert all(datetime.fromisoformat(stamp).tzinfo for stamp in stamps)


def test_a_disabled_console_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(10, 0, tmp_path / "run" / "train.log", enabled=False)
    say_step(console, 1)
    console.say("hello")
    console.close()
    assert capsys.readouterr().out == ""
    assert not any(tmp_path.iterdir())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_follows_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stdout", terminal)
    console = Console(2000, 100, tmp_path / "train.log", enabled=True)
    say_step(console, 120)
    console.say("saved")
    console.close()
    console.close()
    text = terminal.getvalue()
    assert re.search(r"\bstep 120/2000  e3 joint .* GiB\n", text)
    assert re.search(r"\bsaved\n", text)
    assert re.search(r"  6% \|.*\| 120/2000, eta --", text)
    assert "\r" not in (tmp_path / "train.log").read_text()
    assert len((tmp_path / "train.log").read_text().splitlines()) == 2


def test_a_reader_that_is_gone_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr("sys.stdout", os.fdopen(writer, "w"))
    console = Console(100, 0, tmp_path / "log.txt", True)
    console.say("one")
    console.say("two")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["one", "two"]


def test_eta_leaves_out_the_first_interval_and_follows_a_change_of_pace() -> None:
    timer = StepTimer(1000, decay=0.9)
    assert timer.eta(500, 9999.0) is None  # resumed: whatever came before does not count
    assert timer.eta(510, 9999.0 + 20) == pytest.approx(490 * 2.0)
    assert timer.eta(510, 9999.0 + 25) == pytest.approx(490 * 2.0)  # a second line, same step
    kept = 0.9  # one step of 30 s after ten of 2 s
    expected = (kept * (1 - 0.9**10) * 2.0 + (1 - kept) * 30.0) / (1 - 0.9**11)
    assert timer.eta(511, 9999.0 + 50) == pytest.approx(489 * expected)
    for i in range(1, 200):
        eta = timer.eta(511 + i, 9999.0 + 50 + 3 * i)
    assert eta == pytest.approx((1000 - 710) * 3.0, rel=1e-6)
    assert timer.eta(1001, 1e5) == 0.0


def test_eta_does_not_depend_on_how_often_lines_are_written() -> None:
    every, tenth = StepTimer(1000), StepTimer(1000)
    for step in range(101):
        often = every.eta(step, 0.5 * step)
        seldom = tenth.eta(step, 0.5 * step) if step % 10 == 0 else None
    assert often == pytest.approx(450.0)
    assert seldom == pytest.approx(450.0)


def test_durations_are_written_for_people() -> None:
    seconds = (0, 59.7, 161, 3723, 86399.4, 86400, 3 * 86400 + 4 * 3600 + 59)
    assert [format_duration(s) for s in seconds] == (
        ["0:00", "1:00", "2:41", "1:02:03", "23:59:59", "1d 0h", "3d 4h"]
    )


def test_an_architecture_is_summarised_by_its_means() -> None:
    arch = SPACES["vit_b"].sample(random.Random(0))
    text = summarise(arch)
    assert text.startswith(f"d{arch.depth} e{arch.embed_dim} h")
    assert f"h{np.mean(arch.num_heads):.1f} r{np.mean(arch.mlp_ratio):.1f}" in text


def test_a_table_is_aligned_with_its_numbers_to_the_right() -> None:
    table = format_table(
        ["subnet", "top1", "M params", "note"],
        [
            ["largest", "71.25%", "102.5", "3 of 4"],
            ["a", "9.5%", "-", ""],
        ],
    )
    assert table.splitlines() == [
        "subnet     top1  M params  note",
        "-------  ------  --------  ------",
        "largest  71.25%     102.5  3 of 4",
        "a          9.5%         -",
    ]
    assert format_table(["a", "b"], []) == "a  b\n-  -"
    with pytest.raises(ValueError, match="2 columns, this row 1"):
        format_table(["a", "b"], [["1"]])


def test_drops_are_shown_with_their_margins_and_noise_is_called_so():
    rows = [
        DecisionRow("depth", {12: 0.031, 13: -0.004}, 12, 0.035, 0.011, ""),
        DecisionRow("mlp_ratio[0]", {3: 0, 3.5: 0.002, 4: 0.001}, 3.5, 0.001, 0.006, "noise"),
    ]
    heat, margins = drops_figure(rows, "top1").axes
    cells = [t.get_text() for t in heat.texts]
    assert cells == ["12: +3.10", "13: -0.40", "3: +0.00", "3.5: +0.20", "4: +0.10"]
    assert [t.get_text() for t in heat.texts if t.get_weight() == "bold"] == [cells[0], cells[3]]
    assert len(heat.patches) == 2  # frames
    assert [t.get_text() for t in heat.get_yticklabels()] == ["depth", "mlp_ratio[0]"]
    assert [t.get_text() for t in margins.texts] == ["3.50 ± 1.10", "0.10 ± 0.60 *"]
    dots = [line for line in margins.lines if line.get_marker() == "o"]
    assert [d.get_xdata()[0] for d in dots] == pytest.approx([3.5, 0.1])
    assert [d.get_markerfacecolor() == "white" for d in dots] == [False, True]
    spans = [tuple(line.get_xdata()) for line in margins.lines if len(line.get_xdata()) == 2]
    assert spans[:2] == [pytest.approx((1.3, 5.7)), pytest.approx((2.4, 4.6))]
    last = decisions_table(rows, "top1").splitlines()[-1].split("  ")
    assert [c.strip() for c in last if c.strip()] == [
        "mlp_ratio[0]", "3.5", "3: +0.00", "3.5: +0.20", "4: +0.10", "0.10 +- 0.60", "noise"
    ]  # fmt: skip


def test_drops_of_the_loss_are_nats_and_not_points():
    rows = [DecisionRow("depth", {12: 0.0312, 13: -0.004}, 12, 0.0352, math.inf, "within noise")]
    heat, margins = drops_figure(rows, "loss").axes
    assert [t.get_text() for t in heat.texts] == ["12: +0.0312", "13: -0.0040"]
    assert [t.get_text() for t in margins.texts] == ["0.0352 ± inf *"]
    table = decisions_table(rows, "loss")
    for text in (heat.get_title(), table):
        assert "loss (nats) gained without" in text
        assert "top-1" not in text
    assert "12: +0.0312  13: -0.0040" in table
    assert "0.0352 +- inf" in table


def test_a_killed_search_leaves_the_picture_of_every_decision(tmp_path):
    board = SearchBoard(tmp_path)
    for number in range(3):  # small enough to stay in a buffer
        board.figure("drops", Figure(figsize=(1, 1), dpi=10), number)
        assert [e.step for e in read(tmp_path).Images("drops")] == list(range(number + 1))
    board.close()
