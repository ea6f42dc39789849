"""The page of a run says what is in its files, to any browser, and does nothing else."""

from __future__ import annotations

import functools
import html
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.browser import ask, dump, photograph
from tests.conftest import ROOT
from tests.small import small_config
from vimnas_ds.config import ConfigError, parse_config
from vimnas_ds.page import record, training
from vimnas_ds.page.charts import Dot, Line, dot_chart, line_chart, tick_text
from vimnas_ds.page.choice import Choice, choose
from vimnas_ds.page.clips import Clip, contact_sheets, without_clips
from vimnas_ds.page.document import build_page
from vimnas_ds.page.record import read_record, thinned
from vimnas_ds.report.board import Board
from vimnas_ds.search.comparison import Measured, comparison_object
from vimnas_ds.search.controls import Entry
from vimnas_ds.search.perturb import Decision, Margin
from vimnas_ds.space import SPACES, Arch
from vimnas_ds.train.run_files import config_object

HOSTILE = (
    "</td></script><script>document.title='owned'</script><img src=x onerror=\"owned()\">&amp;"
)
NOW = datetime(2026, 5, 6, 7, 8, tzinfo=UTC)
SPACE = SPACES["nano"]
PICK, OTHER = Arch(48, 3, (2, 2, 1), (4, 2, 4)), Arch(32, 2, (1, 2), (2, 4))
NAMES = ("imagenet", "k400")


def write(file: Path, found: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))


def begin(root: Path) -> Path:
    """What is there when the first step begins."""
    config = parse_config(small_config(root))
    write(root / "config.json", config_object(config))
    write(root / "labels.json", {name: [HOSTILE, "b", "c", "d"] for name in NAMES})
    write(root / "environment.json", {"ranks": 2, "device": "CPU", "torch": "9.9"})
    return root


def train(root: Path, steps: int) -> Path:
    """And after so many of 100 steps."""
    begin(root)
    stamp = "2026-05-06T07:08:09+00:00"
    lines = [f"{stamp}  step {steps}/100  e0 joint  k400  loss 2.0"]
    lines += [f"{stamp}  k400: a{HOSTILE}.mp4 is unusable and replaced (rank 0): cut"]
    (root / "train.log").write_text("\n".join([*lines, lines[0]]) + "\n")
    board = Board(root / "tensorboard", 0)
    for step in range(0, steps, 10):
        for name in NAMES:
            board.train_loss(step, name, 2.0 - step / 100, 0.25)
            board.evaluation(step, name, "largest", 1.0, 0.4375, 0.8)
        board.train_step(step, 1e-3, 10.0, 0.1, 3)
        choices = {"embed_dim": SPACE.embed_dim, "depth": SPACE.depth}
        choices |= {f"num_heads[{i}]": c for i, c in enumerate(SPACE.num_heads)}
        shares = {k: [(i + 1) / sum(range(len(c) + 1)) for i in range(len(c))]
                  for k, c in choices.items()}  # fmt: skip
        board.alphas(step, {**shares, "num_heads[1]": [0.875, 0.125]}, choices)
    board.close()
    return root


def search(root: Path) -> Path:
    """And with everything that the searches and tests write."""
    train(root, 100)
    corners = {"largest": SPACE.largest(), "smallest": SPACE.smallest()}
    picks = {
        k: {"top1": t, "top5": 0.9, "loss": 1.5, "count": 16, "params": 277_032, "gflops": 0.01,
            "arch": json.loads(corners[k].to_json())}
        for k, t in (("largest", 0.43751), ("smallest", 0.31249))
    }  # fmt: skip
    datasets = {name: {"chance": 0.25, "picks": picks} for name in NAMES}
    faults = {"skipped_steps": 7, "samples_replaced": {"k400": 5}}
    faults |= {"replaced_by_reason": {"k400": {"truncated": 5}}, "files_left_out": {"k400": 2}}
    write(root / "summary.json", {**faults, "datasets": datasets})
    rounds = (Margin(0.021, 0.004),)
    drops = {32.0: 0.031, 48.0: 0.052, 64.0: -0.01}
    sure = Decision("embed_dim", 48.0, 0.5, drops, drops, drops, rounds, False)
    noisy = Decision("depth", 3.0, 0.5, {2.0: 0.0, 3.0: 0.01}, {}, {2.0: 0.0, 3.0: 0.01},
                     (Margin(0.01, float("nan")),), False)  # fmt: skip
    scores = {"select_top1": 0.59376, "select_loss": 1.2, "count": 32, "params": 186_344}
    result = {
        "selector": "perturbation",
        "arch": json.loads(PICK.to_json()),
        "objective": {"metric": "top1", "weights": dict.fromkeys(NAMES, 0.5)},
        "accuracy": 0.59376,
        "loss": 1.2,
        "datasets": {n: {**scores, "gflops": 0.01} for n in NAMES},
        "decisions": [sure.to_json(), noisy.to_json()],
    }
    write(root / "perturbation" / "result.json", result)
    points = [
        {"arch": json.loads(a.to_json()), "cost": c, "accuracy": t, "accuracy_se": 0.05,
         "loss": 1.0, "costs": {}} for a, c, t in ((OTHER, 95_096.0, 0.40), (PICK, 186_344.0, 0.53))
    ]  # fmt: skip
    cost = {"resource": "params", "dataset": "imagenet"}
    write(root / "front" / "front.json",
          {"cost": cost, "picked": 1, "hypervolume": 0.4, "points": points})  # fmt: skip
    entries = [Entry("perturbation", "pick", PICK, evaluations=25)]
    entries += [Entry("random", "random", OTHER, "perturbation")]
    entries += [Entry("largest", "control", SPACE.largest())]
    entries += [Entry("smallest", "control", SPACE.smallest())]
    table = {e.arch: {n: Measured(0.2 + i / 16, 0.9, 160, 180_000, 0.01) for n in NAMES}
             for i, e in enumerate(entries)}  # fmt: skip
    about = {"split": "test", "checkpoint": "x", "views": {"imagenet": 1, "k400": 12}}
    found = comparison_object(entries, table, dict.fromkeys(NAMES, 0.5), about)
    write(root / "compare" / "compare.json", found)
    per_class = {HOSTILE: {"count": 4, "top1": 0.25, "top5": 1.0}}
    entry = {"top1": 0.375, "top5": 0.9, "mean_class": 0.37, "count": 16, "views": 12, "params": 9,
             "gflops_per_view": 0.01, "per_class": per_class, "confusion": [[0, 1, 3]]}  # fmt: skip
    data = {"classes": [HOSTILE, "b"], "clips": 4, "crops": 3, "samples": 17, "count": 16,
            "skipped": {"x.mp4": "cut"}}  # fmt: skip
    write(root / "evaluation.json", {
        "split": "test", "placement": "even", "datasets": {"k400": data},
        "archs": {"largest": {"arch": {}, "datasets": {"k400": entry}}}})  # fmt: skip
    tau = {"samples": 40, "tau": 0.71, "low": 0.5, "high": 0.9, "low_over_samples": 0.6,
           "high_over_samples": 0.8, "spearman": None, "tau_of_params": 0.3}  # fmt: skip
    arch = json.loads(OTHER.to_json())
    alone = [{"params": p, "inherited/k400": i, "alone/k400": a, "arch": arch}
             for p, i, a in ((9, 0.3, 0.4), (10, 0.5, 0.45))]  # fmt: skip
    write(root / "ranking" / "ranking.json", {
        "verdict": f"tau 0.71: {HOSTILE}", "warnings": [], "agreement": {"k400": tau}, "epochs": 4,
        "archs": alone})  # fmt: skip
    return root


def make(root: Path, clips: str = "") -> str:
    return build_page(read_record(root), clips, NOW)


def sheets() -> str:
    frames = np.random.default_rng(0).integers(0, 256, (96, 396, 3), np.uint8)
    seen = [Clip(f"{HOSTILE}/a.mp4", HOSTILE, p, 0.625, frames) for p in (HOSTILE, "b")]
    return contact_sheets({"k400": seen}, "perturbation", "select")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with everything, and its page."""
    root = search(tmp_path_factory.mktemp("page") / "run")
    page = root.parent / "page.html"
    page.write_text(make(root, sheets()))
    return root, page


class Reader(HTMLParser):
    """The texts of cells with a key, and every element with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.cells: dict[str, str] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._key: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._key = dict(attrs).get("data-cell", self._key)

    def handle_endtag(self, tag: str) -> None:
        self._key = None

    def handle_data(self, data: str) -> None:
        if self._key is not None:
            self.cells[self._key] = self.cells.get(self._key, "") + data


def expected_cells(root: Path) -> Iterator[tuple[str, str]]:
    summary = json.loads((root / "summary.json").read_text())
    for name, entry in summary["datasets"].items():
        for pick, found in entry["picks"].items():
            yield f"test:{name}:{pick}:top1", f"{100 * found['top1']:.1f}%"
            yield f"test:{name}:{pick}:params", f"{found['params']:,}"
    for entry in json.loads((root / "compare" / "compare.json").read_text())["entries"]:
        for name, m in entry["datasets"].items():
            if entry["role"] != "random":
                text = f"{100 * m['top1']:.1f} ± {100 * m['top1_se']:.1f}%"
                yield f"controls:{name}:{entry['name']}:top1", text
    for i, p in enumerate(json.loads((root / "front" / "front.json").read_text())["points"]):
        yield f"front:{i}:top1", f"{100 * p['accuracy']:.1f} ± {100 * p['accuracy_se']:.1f}%"
    yield "select:k400:perturbation:top1", "59.4%"
    yield "margin:embed_dim", "2.10 ± 0.40"
    yield "margin:depth", "1.00 ± nan (within noise)"
    yield "views:k400:largest:top1", "37.5%"
    yield "ranking:k400:tau", "0.71"
    yield "chosen", str(PICK)
    yield "why", "perturbation's pick: the only search so far"


# --- in a real browser ---


def test_a_browser_shows_the_numbers_of_the_files(
    searched: tuple[Path, Path], tmp_path: Path
) -> None:
    root, page = searched
    found = Reader(dump(page, tmp_path))
    for key, text in expected_cells(root):
        assert found.cells[key] == text, key


def test_what_stands_in_files_is_shown_and_never_run(
    searched: tuple[Path, Path], tmp_path: Path
) -> None:
    root, page = searched
    text = dump(page, tmp_path)
    assert f"<title>{root.name}</title>" in text  # HOSTILE would have set another
    elements = Reader(text).elements
    assert sum(tag == "script" for tag, _ in elements) == 1
    assert not [a for _, attrs in elements for a in attrs if a.startswith("on")]
    shown = ask(page, tmp_path, 900, 900, "return doc.body.textContent.split('owned()').length-1")
    assert int(shown) >= 5  # class names, labels, the log, the verdict
    # no request leaves the page
    links = [v for _, attrs in elements for k, v in attrs.items() if k in ("src", "href")]
    assert links
    assert all(link and link.startswith(("#", "data:image/jpeg")) for link in links)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(
    searched: tuple[Path, Path], tmp_path: Path, width: int
) -> None:
    _, page = searched
    script = "return [view.innerWidth,doc.documentElement.scrollWidth,doc.body.scrollWidth].join()"
    inner, document, body = map(int, ask(page, tmp_path, width, 900, script).split(","))
    assert inner == width
    assert max(document, body) <= width
    shot = photograph(page, tmp_path, width, 3000)
    pixels = np.asarray(Image.open(shot).convert("RGB"))[:, :width]
    assert pixels.shape[0] == 3000
    rows = pixels.reshape(3000, -1).std(1) > 1
    assert rows.reshape(10, 300).any(1).all()  # something in every part of it
    colourful = np.ptp(pixels.astype(int), axis=2) > 60
    assert colourful.mean() > 0.002  # lines, bars, pictures


def test_a_point_of_the_front_tells_its_architecture(
    searched: tuple[Path, Path], tmp_path: Path
) -> None:
    _, page = searched
    script = """
        const dots=[...doc.querySelectorAll('#front .dot')],tip=doc.getElementById('tip');
        return dots.map(d=>{d.dispatchEvent(new view.PointerEvent('pointerenter'));
        return view.getComputedStyle(tip).visibility+' '+tip.textContent}).join('|')"""
    texts = ask(page, tmp_path, 900, 900, script).split("|")
    assert texts[0].startswith(f"visible {OTHER}\nparams 95,096\ntop-1 40.0 ± 5.0%")
    assert texts[-1].startswith(f"visible picked: {PICK}\nparams 186,344")


def test_a_curve_is_read_out_under_the_pointer(searched: tuple[Path, Path], tmp_path: Path) -> None:
    _, page = searched
    script = """
        const svg=doc.querySelector('#curves svg[data-lines]'),r=svg.getBoundingClientRect();
        const at={clientX:r.right,clientY:r.top};
        svg.dispatchEvent(new view.PointerEvent('pointermove',at));
        return doc.getElementById('tip').textContent"""
    assert ask(page, tmp_path, 900, 900, script) == "step 90\nimagenet: 1.1\nk400: 1.1"


# --- of whatever a run has left ---


def test_a_run_that_has_only_begun_says_so(tmp_path: Path) -> None:
    text = make(begin(tmp_path / "run"), without_clips("No clips are shown: <no data>"))
    for sentence in (
        "begun, no step logged yet",
        "Nothing is chosen yet",
        "No step has been logged yet",
        "The run holds no numbers of its alphas yet",
        "the test splits are read once, at its end",
        "No clips are shown: &lt;no data&gt;",
    ):
        assert sentence in text, sentence
    for left_out in ("Controls", "Front", "Decisions", "Ranking", "Evaluation", "Picks"):
        assert f">{left_out}<" not in text


def test_a_killed_run_shows_its_curves_and_what_could_not_be_read(tmp_path: Path) -> None:
    root = train(tmp_path / "run", 60)
    (root / "front").mkdir()
    (root / "front" / "front.json").write_text('{"cost": {"resour')
    (root / "ranking").mkdir()
    (root / "ranking" / "ranking.json").write_text('{"verdict": "a later form"}')
    text = make(root)
    assert "the part &#x27;ranking&#x27; is left out, its files have another form" in text
    assert "<b>step 60</b><span>of 100 steps, not finished; last wrote 2026-05-06 07:08<" in text
    assert "<dt>skipped steps (non-finite)</dt><dd>3</dd>" in text
    assert "front.json cannot be read and is left out" in text
    assert "mp4 is unusable and replaced (rank 0): cut" in text
    assert "<b>43.8%</b><span>largest: top-1 on select, latest, mean of datasets<" in text
    curves = [a["data-lines"] for t, a in Reader(text).elements if "data-lines" in a]
    loss = json.loads(curves[0] or "")
    assert [line["name"] for line in loss] == list(NAMES)
    assert [point[1:] for point in loss[0]["points"]] == [
        [step, f"{2.0 - step / 100:.4g}"] for step in range(0, 60, 10)
    ]
    with pytest.raises(ConfigError, match="is no run"):
        read_record(tmp_path)


def test_a_pre_empted_run_says_why_and_how_it_goes_on(tmp_path: Path) -> None:
    root = train(tmp_path / "run", 60)
    stamp, first = "2026-05-06T07:08:09+00:00", "(first: a.mp4: cut)"
    stop = f"rank 0 received SIGTERM: saved and stopped after step 63 {HOSTILE}"
    ends = [stop, "another rank was asked to stop: saved and stopped after step 64",
            "rank 1 died: process 5", "ranks [0, 1] have been in 'data' for 9 s"]  # fmt: skip
    start = "k400: 4 classes; test 24, train 40"
    lines = [f"imagenet: 4 classes; test 9; 3 unusable files left out {first}",
             f"{start}; 12 unusable files left out {first}; 2 videos dropped", *ends,
             "imagenet: 4 classes; test 9",
             f"{start}; 1 listed files are not on disk (first: b); 15 unusable files left out (…)",
             "saved step00000063: 3.4 MB"]  # fmt: skip
    with (root / "train.log").open("a") as log:
        log.writelines(f"{stamp}  {line}\n" for line in lines)
    resume = "deepspeed scripts/train.py --set 'a=<b>' --resume"
    status = {"state": "preempted", "step": 63, "reason": stop, "resume": resume}
    write(root / "status.json", status)
    text = make(root)
    assert "<b>step 63</b><span>of 100 steps, pre-empted; last wrote" in text
    cells = Reader(text).cells
    assert cells["standing"] == f"Pre-empted: {stop}."
    assert cells["resume"] == resume
    faults = part(text, "faults-and-events")
    name = "<dt>unusable files left out at the start</dt>"
    assert f"{name}<dd>k400 15</dd>" in faults
    events = Reader(faults.replace("<li>", '<li data-cell="event">')).cells["event"]
    assert all(line in events for line in [*lines[:2], *ends, lines[7]])
    assert "saved step" not in events

    for state, said in (("failed", f"Failed: {stop}."), ("stopped", f"Stopped by itself: {stop}."),
                        ("running", "Under way, or killed.")):  # fmt: skip
        write(root / "status.json", {**status, "state": state})
        cells = Reader(make(root)).cells
        assert (cells["standing"], cells["resume"]) == (said, resume)
    write(root / "summary.json", {"datasets": {}})
    assert "standing" not in Reader(make(root)).cells


#: (file, where in it, what is written there, what the page says is left out)
SPOILT = [
    ("front/front.json", ["points", 0, "cost"], math.inf, "the part 'front' is left out"),
    ("compare/compare.json", ["entries", 2, "datasets", "k400", "params"], math.inf,
     "the part 'controls' is left out"),
    ("summary.json", ["samples_replaced"], None, "the part 'faults' is left out"),
    ("summary.json", ["skipped_steps"], "3", "the part 'faults' is left out"),
    ("environment.json", [], 3, "environment.json is left out: it holds no JSON object"),
    ("ranking/ranking.json", [], "[" * 100_000, "ranking/ranking.json cannot be read"),
    ("perturbation/result.json", ["datasets", "k400"], {"params": 3, "select_top1": 0.5},
     "perturbation/result.json is left out: datasets.k400.count is no number: None"),
    ("perturbation/result.json", ["objective"], ["top1"], "its objective has no metric"),
    ("perturbation/result.json", ["datasets"], {}, "it has no datasets"),
    ("perturbation/result.json", ["accuracy"], None, "accuracy is no number: None"),
    ("perturbation/result.json", ["arch", "patch"], 16, "an architecture has exactly the keys"),
    ("perturbation/result.json", ["arch", "mlp_ratio", 0], 10**400, "its arch: "),
]  # fmt: skip


@pytest.fixture(scope="module")
def compared(
    searched: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, set[str]]:
    """A run with two searches, and the names of its page's parts."""
    root = Path(shutil.copytree(searched[0], tmp_path_factory.mktemp("page") / "run"))
    write(root / "evolution" / "result.json", result(0.5, SPACE.smallest()))
    return root, parts_of(make(root))


def parts_of(text: str) -> set[str]:
    return set(re.findall('<section id="(.*?)"', text))


@pytest.mark.parametrize(("file", "place", "value", "note"), SPOILT, ids=[s[-1] for s in SPOILT])
def test_whatever_stands_in_a_file_the_rest_of_the_page_comes(
    file: str, place: list[Any], value: Any, note: str, compared: tuple[Path, set[str]],
    tmp_path: Path,
) -> None:  # fmt: skip
    root = Path(shutil.copytree(compared[0], tmp_path / "run"))
    spoil(root / file, place, value)
    text = make(root)
    assert html.escape(note) in part(text, "left-out")
    gone = compared[1] - parts_of(text)
    assert parts_of(text) - compared[1] == {"left-out"}
    of_the_file = {"front.json": {"front"}, "compare.json": {"controls"}, "ranking.json":
                   {"ranking"}, "summary.json": {"faults-and-events"}, "environment.json": set(),
                   "result.json": {"decisions"}}  # fmt: skip
    assert gone == of_the_file[Path(file).name]
    assert "evolution&#x27;s pick" in text or not file.startswith("perturbation")


def spoil(file: Path, place: list[Any], value: Any) -> None:
    """Writes `value` into a JSON file, in place of what stands there; a text in place of all."""
    if not place:
        file.write_text(str(value))
        return
    found = json.loads(file.read_text())
    inner = functools.reduce(lambda held, key: held[key], place[:-1], found)
    inner[place[-1]] = value
    file.write_text(json.dumps(found))


def test_the_configuration_that_cannot_be_shown_is_left_out_too(
    searched: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "config_object", lambda config: {"a": object()})
    text = make(searched[0])
    assert "the part &#x27;configuration&#x27; is left out" in part(text, "left-out")
    assert 'id="faults-and-events"' in text


def test_alphas_of_several_sizes_are_left_out_and_the_others_shown(tmp_path: Path) -> None:
    root = begin(tmp_path / "run")
    board = Board(root / "tensorboard", 0)
    for step, widths in ((0, (32, 48, 64)), (10, (32, 64))):
        choices: dict[str, tuple[int, ...]] = {"embed_dim": widths, "depth": SPACE.depth}
        board.alphas(step, {k: [1 / len(c)] * len(c) for k, c in choices.items()}, choices)
    board.close()
    text = make(root)
    note = "alpha/table/embed_dim is left out: its tables are of several sizes, (1, 2) and (1, 3)"
    assert note in part(text, "left-out")
    assert re.findall("<figcaption>(.*?)</figcaption>", part(text, "alphas")) == ["depth"]


def test_events_that_cannot_be_read_are_left_out(
    searched: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reload(self: object) -> None:
        raise RuntimeError("a damaged record")

    monkeypatch.setattr(record.EventAccumulator, "Reload", reload)
    text = make(searched[0])
    assert "RuntimeError(&#x27;a damaged record&#x27;)" in part(text, "left-out")
    assert 'id="test-scores"' in text


def test_a_pick_that_the_network_cannot_be_costs_the_clips_alone(
    searched: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scripts import report

    def find(*args: Any) -> list[Clip]:
        raise RuntimeError("shapes cannot be multiplied")

    net = SimpleNamespace(space=SPACE)
    run = SimpleNamespace(net=net, datasets=NAMES, close=lambda: closed.append(True))
    closed: list[bool] = []
    monkeypatch.setattr(report, "open_run", lambda *args: run)
    monkeypatch.setattr(report, "find_clips", find)
    root = Path(shutil.copytree(searched[0], tmp_path / "run"))
    assert report.main([str(root)]) == 0
    text = (root / "report.html").read_text()
    assert "No clips are shown: RuntimeError: shapes cannot be multiplied" in text
    other = Arch(192, 2, (3, 3), (4, 4))
    spoil(root / "perturbation" / "result.json", ["arch"], json.loads(other.to_json()))
    assert report.main([str(root)]) == 0
    text = (root / "report.html").read_text()
    assert "No clips are shown: embed_dim 192 is not in space nano: (32, 48, 64)" in text
    assert str(other) in part(text, "picks")
    assert str(other) in part(text, "architecture")
    assert closed == [True, True]


def test_alphas_are_shown_for_every_decision(searched: tuple[Path, Path]) -> None:
    text = searched[1].read_text()
    part = text[text.index('id="alphas"') : text.index('id="decisions"')]
    titles = re.findall("<figcaption>(.*?)</figcaption>", part)
    assert titles == ["embed_dim", "depth", "num_heads, mean over layers",
                      "num_heads[0]", "num_heads[1]", "num_heads[2]"]  # fmt: skip
    charts = [a["data-lines"] for t, a in Reader(part).elements if "data-lines" in a]
    embed = json.loads(charts[0] or "")
    assert [line["name"] for line in embed] == ["32", "48", "64"]
    assert {point[2] for point in embed[2]["points"]} == {"0.5"}
    first, second = (json.loads(charts[3 + layer] or "")[0] for layer in (0, 1))
    assert {point[2] for point in first["points"]} == {"0.3333"}
    assert {point[2] for point in second["points"]} == {"0.875"}


def test_a_layer_is_drawn_with_its_heads_and_its_mlp(searched: tuple[Path, Path]) -> None:
    text = searched[1].read_text()
    drawn = re.search(r'<svg class="chart arch"[^>]*architecture d3 e48.*?</svg>', text, re.DOTALL)
    assert drawn is not None
    assert drawn[0].count('class="block heads"') == sum(PICK.num_heads)
    assert drawn[0].count('class="block mlp"') == PICK.depth
    assert "width 48 of 64" in drawn[0]
    for layer, heads in enumerate(PICK.num_heads):
        ratio, hidden = PICK.mlp_ratio[layer], PICK.hidden_dim(layer)
        assert f"{heads}h  ×{ratio:g}  {hidden}" in drawn[0]


def part(text: str, name: str) -> str:
    """One section of a page."""
    return text[text.index(f'<section id="{name}"') :].partition("</section>")[0]


def test_scores_tell_of_how_many_views_they_are_and_bold_is_a_single_network(
    searched: tuple[Path, Path], tmp_path: Path
) -> None:
    text = searched[1].read_text()
    scores = part(text, "test-scores")
    one = "One centre view of a sample, read at the end of the training"
    assert f"{one} (those of Controls and Evaluation: as many as written there). Bold" in scores
    assert "<th>loss</th>" in scores
    views = "Views of a sample, averaged: 1 for imagenet, 12 for k400."
    assert views in part(text, "controls")
    assert "views of a sample, averaged: 12 for k400 (clips" in part(text, "evaluation")

    root = search(tmp_path / "run")
    summary = json.loads((root / "summary.json").read_text())
    tops = {"imagenet": 0.9, "k400": 0.43751}  # above the best single one; as high
    for name, entry in summary["datasets"].items():  # as the demo writes them
        for pick in entry["picks"].values():
            del pick["loss"]
        entry["picks"]["random"] = {"top1": tops[name], "params": 9.5, "gflops": 0.01, "k": 20}
    write(root / "summary.json", summary)
    scores = part(make(root), "test-scores")
    assert "<th>loss</th>" not in scores
    assert "Taken over from Controls, which says" in scores
    assert scores.count("<th>mean of 20 random ones</th>") == 1
    assert "<th>k400: mean of 20 random ones</th>" in scores
    comparison = json.loads((root / "compare" / "compare.json").read_text())
    del comparison["views"]
    write(root / "compare" / "compare.json", comparison)
    assert "The file does not tell of how many views." in part(make(root), "controls")
    bold = re.findall(r'data-cell="([^"]*)" class="best"', scores)
    assert bold == ["test:imagenet:largest:top1", "test:k400:largest:top1"]


def test_the_chosen_ones_test_score_is_told_first_unless_it_is_an_earlier_picks(
    tmp_path: Path,
) -> None:
    root = search(tmp_path / "run")
    files = [root / name for name in ("compare/compare.json", "perturbation/result.json")]
    compared, result = (json.loads(file.read_text()) for file in files)
    tile = f"<b>{compared['entries'][0]['mean_top1']:.1%}</b><span>its top-1 on test, mean</span>"
    assert tile in make(root)
    entry = compared["entries"][0]
    for other in ({**compared, "split": "select"}, {**compared, "entries": [3]},
                  {**compared, "entries": [{**entry, "mean_top1": "x"}]},
                  {**compared, "entries": [{**entry, "name": "evolution"}]}):  # fmt: skip
        write(files[0], other)
        assert "top-1 on test, mean" not in make(root)
    write(files[0], compared)
    write(files[1], {**result, "arch": json.loads(OTHER.to_json())})
    assert "top-1 on test, mean" not in make(root)


def test_test_scores_have_a_mean_where_all_are_there_and_tell_of_earlier_picks(
    tmp_path: Path,
) -> None:
    root = search(tmp_path / "run")
    (root / "compare" / "compare.json").unlink()  # or made since
    summary = json.loads((root / "summary.json").read_text())
    scores = {"params": 10, "gflops": 0.01, "count": 16}
    for entry in summary["datasets"].values():
        for pick in entry["picks"].values():
            del pick["loss"]
    arch = json.loads(PICK.to_json())
    for entry, top1, mean in zip(summary["datasets"].values(), (0.5, 0.2375), "-x", strict=True):
        entry["picks"] = {**entry["picks"], "perturbation": {**scores, "top1": top1, "arch": arch}}
        write(root / "summary.json", summary)
        text = make(root)
        expected = "36.9%" if mean == "x" else mean
        assert Reader(text).cells["test:mean:perturbation:top1"] == expected
    chance = "<th>chance</th><td>25.0%</td><td>25.0%</td><td>25.0%</td>"
    assert chance in part(text, "test-scores")
    assert "earlier pick" not in part(text, "test-scores")
    file = root / "perturbation" / "result.json"
    write(file, {**json.loads(file.read_text()), "arch": json.loads(OTHER.to_json())})
    earlier = "perturbation is an earlier pick than the one drawn above"
    assert earlier in part(make(root), "test-scores")


def test_a_comparison_of_an_earlier_pick_says_so_and_an_imported_run_has_no_training(
    searched: tuple[Path, Path], tmp_path: Path
) -> None:
    assert 'data-cell="stale"' not in searched[1].read_text()
    root = search(tmp_path / "run")
    file = root / "perturbation" / "result.json"
    found = json.loads(file.read_text())
    write(file, {**found, "arch": json.loads(OTHER.to_json())})
    controls = part(make(root), "controls")
    assert "Here perturbation is an earlier pick than the one drawn above." in controls
    assert f"python scripts/compare.py --checkpoint {root}" in controls
    begun = begin(tmp_path / "imported")
    for name in ("status.json", "train.log", "environment.json"):
        (begun / name).unlink(missing_ok=True)
    text = make(begun)
    assert "weights from elsewhere" in text
    assert "scripts/evaluate.py scores" in part(text, "test-scores")


def test_every_control_has_a_mark_of_its_own_and_the_legend_names_it(
    searched: tuple[Path, Path],
) -> None:
    controls = part(searched[1].read_text(), "controls")
    legend = controls[controls.index('<div class="legend">') :].partition("<table")[0]
    named = re.findall(r'<polygon class="dot (.*?)" points.*?</svg>(.*?)</span>', legend)
    assert named == [("n2 star", "perturbation; small dots: random ones of its size"),
                     ("c7 up", "largest"), ("c7 down", "smallest")]  # fmt: skip
    for mark, name in named:
        at = rf'<polygon class="dot {mark}" points="([^"]*)" data-tip="{name.split(";")[0]}\n'
        drawn = [
            np.array([p.split(",") for p in c.split()], float) for c in re.findall(at, controls)
        ]
        assert len(drawn) == len(NAMES)
        assert {len(c) for c in drawn} == {10 if mark == "n2 star" else 3}
        top = drawn[0][0, 1] < drawn[0][:, 1].mean()  # y points down
        assert top == (mark != "c7 down")


def test_picks_without_test_scores_name_the_command_that_reads_them(
    searched: tuple[Path, Path], tmp_path: Path
) -> None:
    scored = "the samples they were chosen on; their test scores are under Controls."
    assert scored in part(searched[1].read_text(), "picks")
    root = search(tmp_path / "my run")
    command = f"python scripts/compare.py --checkpoint &#x27;{root}&#x27;</p>"
    write(root / "evolution" / "result.json", result(0.5, SPACE.smallest()))  # a later one
    assert f"test scores of evolution: {command}" in part(make(root), "picks")
    (root / "compare" / "compare.json").unlink()
    assert f"test scores of evolution, perturbation: {command}" in part(make(root), "picks")


# --- the pick that the page is about ---


def result(accuracy: float, arch: Arch = OTHER, **other: Any) -> dict[str, Any]:
    scores = {"select_top1": accuracy, "count": 32, "params": 95_096}
    found = {"selector": "x", "weights": "a", "arch": json.loads(arch.to_json()), "loss": 1.0,
             "accuracy": accuracy, "objective": {"metric": "top1", "weights": {"k400": 1.0}},
             "datasets": {"k400": scores}}  # fmt: skip
    return {**found, **other}


def test_the_best_of_the_searches_scored_alike_is_chosen_and_the_page_says_so(
    tmp_path: Path,
) -> None:
    three = {"evolution": result(0.75), "front": result(0.5), "perturbation": result(0.25)}
    best = "the highest top-1 on select (75.0%) of 3 searches"
    assert choose(three) == Choice("evolution", best)
    tied = choose({**three, "perturbation": result(0.75 + 1e-12)})
    assert tied == Choice("perturbation", f"{best}, tied with evolution")
    metric = {"objective": {"metric": "loss", "weights": {"k400": 1.0}}}
    losses = {
        "evolution": result(0.9, loss=1.25, **metric),
        "mine": result(0.1, loss=0.5, **metric),
    }
    assert choose(losses) == Choice("mine", "the lowest loss on select (0.5000) of 2 searches")

    fewer = {"k400": {"select_top1": 0.75, "count": 16, "params": 1}}
    apart = "scored on other weights, samples or datasets, not compared: evolution"
    for other in ({"weights": "b"}, {"datasets": fewer}, {"tune_steps": 5}, metric):
        unlike = {**three, "evolution": result(0.75, **other)}
        why = f"the highest top-1 on select (50.0%) of 2 searches; {apart}"
        assert choose(unlike) == Choice("front", why)
        del unlike["front"]
        assert choose(unlike) == Choice(
            "perturbation", f"no other search was scored alike; {apart}"
        )
    assert choose({}) is None

    root = train(tmp_path / "run", 20)
    for name, found in three.items():
        arch = json.loads((PICK if name == "evolution" else OTHER).to_json())
        write(root / name / "result.json", {**found, "arch": arch})
    write(root / "broken" / "result.json", {"selector": "evolution"})
    text = make(root)
    cells = Reader(text).cells
    assert cells["chosen"] == str(PICK)
    assert cells["why"] == f"evolution's pick: {best}"
    assert re.findall("<figcaption>(.*?)</figcaption>", text)[0] == "evolution, chosen"
    assert "<span>chosen by evolution: parameters</span>" in text
    assert "broken/result.json is left out: no arch, objective" in text


# --- charts ---


def test_ticks_are_written_with_the_digits_that_tell_them_apart() -> None:
    assert [tick_text(v, 0.025, "") for v in (0.475, 0.5)] == ["0.475", "0.500"]
    assert [tick_text(v, 0.025, "%") for v in (0.025, 0.05)] == ["2.5%", "5.0%"]
    assert [tick_text(v, 5e4, "") for v in (0, 5e4, 1e5)] == ["0", "50k", "100k"]
    assert tick_text(2e6, 5e5, "") == "2.0M"


def test_charts_survive_what_runs_write() -> None:
    assert "no points yet" in line_chart([Line("a", [(0, float("nan"))], "c0")], "loss")
    one = line_chart([Line("a", [(5, 0.0)], "c0")], "loss")
    flat = dot_chart([Dot(3.0, 0.5, "a", "c0"), Dot(3.0, 0.5, "b", "c0")], "x", "y")
    assert "nan" not in one + flat
    assert 'class="line c0"' in one


def test_long_curves_are_thinned_to_means_that_end_where_they_end() -> None:
    curve = [(float(i), float(i % 2)) for i in range(10_001)]
    found = thinned(curve, 101)
    assert len(found) == 101
    assert found[-1] == curve[-1]
    assert found[0] == (49.5, 0.5)
    assert thinned(found, 101) is found


# --- of a real run ---


@pytest.mark.slow
def test_the_script_makes_a_page_of_a_real_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    import report

    out = tmp_path / "page.html"
    assert report.main([str(trained), "--out", str(out), "--clips", "16"]) == 0
    assert f"written to {out}: " in capsys.readouterr().out
    found = Reader(dump(out, tmp_path))
    summary = json.loads((trained / "summary.json").read_text())
    for name, entry in summary["datasets"].items():
        for pick, scores in entry["picks"].items():
            assert found.cells[f"test:{name}:{pick}:top1"] == f"{scores['top1']:.1%}"
    text = out.read_text()
    assert "training finished" in text
    pictures = [a for tag, a in found.elements if tag == "img"]
    assert len(pictures) >= 4 * len(summary["datasets"])
    assert "torch" in text[text.index("Environment") :]

    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.json", "labels.json", "summary.json", "train.log"):
        shutil.copy(trained / name, moved / name)
    assert report.main([str(moved)]) == 0
    assert "No clips are shown: no checkpoint at" in (moved / "report.html").read_text()
    assert report.main([str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
