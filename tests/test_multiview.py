"""The multi-view test: where it looks, what it decodes, what it counts, what it writes."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, SHARED_DATA
from tests.launch import launch
from tests.launched import multiview_cases as cases
from tests.media import encode, numbered, numbers, section
from vimnas_ds.confusion import Confusion, class_labels
from vimnas_ds.data import view_decode
from vimnas_ds.data.bad import BadVideo
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.decode import read_clip
from vimnas_ds.data.loader import EvalLoader
from vimnas_ds.data.packets import packet_times
from vimnas_ds.data.pipelines import Source
from vimnas_ds.data.prepare import View
from vimnas_ds.data.view_decode import read_encoded_views, read_views
from vimnas_ds.data.view_graph import build_view_pipeline
from vimnas_ds.data.view_loader import ViewLoader
from vimnas_ds.data.views import ViewPlan
from vimnas_ds.report.confusion import confusion_figure, shortened, write_figure
from vimnas_ds.search.cli import NAMED, say_left_out
from vimnas_ds.search.evaluation import describe_skipped, short_names
from vimnas_ds.search.multiview import MultiViewEvaluator
from vimnas_ds.train.ranks import Ranks
from vimnas_ds.train.run_files import CheckpointError

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


# -- where the views lie -----------------------------------------------------------------------


def starts(plan: ViewPlan, duration: float) -> list[float]:
    """Of clips of 4 s."""
    return plan.times(duration, 8, 2.0)[:, 0].tolist()


def test_even_clips_reach_from_the_first_frame_to_the_last():
    assert starts(ViewPlan(4, 3), 10.0) == pytest.approx([0, 2, 4, 6])
    assert starts(ViewPlan(1, 3), 10.0) == [3.0]
    assert starts(ViewPlan(3), 2.0) == [0, 0, 0]  # shorter than a clip
    steps = ViewPlan(2).times(10.0, 8, 2.0)
    np.testing.assert_allclose(np.diff(steps), 0.5)


def test_dense_clips_keep_their_stride_in_the_middle_unless_the_video_is_too_short():
    assert starts(ViewPlan(4, placement="dense", stride=0.5), 10.0) == [2.25, 2.75, 3.25, 3.75]
    assert starts(ViewPlan(3, placement="dense"), 100.0) == [47, 48, 49]  # a quarter of a clip
    assert starts(ViewPlan(1, placement="dense"), 10.0) == [3.0]
    for duration in (1.0, 4.7, 6.0):
        dense, even = ViewPlan(4, placement="dense", stride=5.0), ViewPlan(4)
        assert starts(dense, duration) == pytest.approx(starts(even, duration))


def test_crops_lie_along_the_longer_side():
    plan = ViewPlan(2, 3)
    assert (len(plan), plan.describe()) == (6, "2 x 3 even views")
    assert plan.places(90, 60).tolist() == [[0.5, 0], [0.5, 0.5], [0.5, 1]]
    assert plan.places(60, 90).tolist() == [[0, 0.5], [0.5, 0.5], [1, 0.5]]
    assert ViewPlan().describe() == "1 central view"
    assert ViewPlan().places(60, 90).tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"clips": 0}, "at least one"),
        ({"placement": "random"}, "not 'random'"),
        ({"stride": 1.0}, "for dense views"),
        ({"placement": "dense", "stride": 0.0}, "not positive"),
        ({"placement": "dense", "stride": float("nan")}, "not positive"),
    ],
)
def test_impossible_views_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        ViewPlan(**values)


# -- decoding ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Frame i has the brightness 10 + 7 i."""
    root = tmp_path_factory.mktemp("videos")
    frames = numbered(34)
    irregular = np.cumsum(np.random.default_rng(0).integers(20, 300, 34)).tolist()
    return {
        "mp4": encode(root / "a.mp4", frames, g="5"),
        "webm": encode(root / "a.webm", frames, "libvpx-vp9", g="6", **{"cpu-used": "8"}),
        "irregular": encode(root / "b.mp4", frames, ticks=irregular, g="4", bf="2"),
        "one key frame": encode(root / "c.mp4", frames, g="999"),
        "no index": encode(root / "d.mkv", frames, g="5", container={"live": "1"}),
    }


PLANS = [ViewPlan(4), ViewPlan(3, placement="dense"), ViewPlan(2), ViewPlan(1)]


@pytest.mark.parametrize("name", ["mp4", "webm", "irregular", "one key frame", "no index"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize(("frames", "fps"), [(4, 24.0), (3, 5.0)])
def test_every_clip_shows_what_a_player_shows_at_its_times(videos, name, plan, frames, fps):
    with av.open(str(videos[name])) as container:
        stamps = [float(f.pts * f.time_base) for f in container.decode(video=0)]
    found = read_views(videos[name], partial(plan.times, frames=frames, fps=fps))
    assert found.order.shape == (plan.clips, frames)
    with av.open(str(videos[name])) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        end = max(float((p.pts + (p.duration or 0)) * p.time_base) for p in packets)
    times = stamps[0] + plan.times(end - stamps[0], frames, fps)
    expected = np.searchsorted(stamps, times + 6e-4, side="right") - 1
    seen = np.array(numbers(found.frames))
    assert seen[found.order].tolist() == expected.tolist()
    assert len(set(seen.tolist())) == len(seen)  # each frame once


def test_a_long_gap_is_skipped_by_a_seek_and_one_without_a_key_frame_is_decoded(tmp_path):
    frames = numbered(34) * 3  # 8.5 s
    plan = partial(ViewPlan(2).times, frames=2, fps=12)
    for name, gop, runs in (("a.mp4", "12", 2), ("b.mp4", "999", 1)):
        path = encode(tmp_path / name, frames, g=gop, keyint_min=gop, sc_threshold="0")
        with view_decode.open_video(path) as container:
            packets = packet_times(container, path)
        wanted, _ = view_decode._merged(plan, packets)
        found = view_decode._runs(wanted, packets)
        assert [r.seek is not None for r in found] == [False, True][:runs]
        views = read_views(path, plan)
        assert [numbers(views.frames[o]) for o in views.order] == [[0, 1], [32, 33]]


def test_a_seek_that_lands_too_late_is_noticed(videos):
    with view_decode.open_video(videos["mp4"]) as container:
        wanted = np.array([0.1, 0.2])
        astray = [view_decode._Run(0, 2, seek=2.0)]
        assert view_decode._decode(container, videos["mp4"], wanted, astray) is None


def test_difficult_files_give_the_same_clips_as_in_training_or_are_refused_alike():
    """But for AVI, whose frames' times are guesses, and a truncated file, of which training
    believes the header and a test the packets."""
    folder = SHARED_DATA / "awkward"
    if not folder.is_dir():
        pytest.skip("the difficult real files are not at hand")
    videos = [p for p in folder.iterdir() if p.suffix in (".mp4", ".webm", ".avi", ".mkv")]
    exact, refused = 0, 0
    for path in videos:
        times = partial(ViewPlan(3).times, frames=8, fps=15)
        try:
            clips = [read_clip(path, 8, 15, start) for start in (0, 0.5, 1)]
        except BadVideo:
            with pytest.raises(BadVideo, match=re.escape(path.name)):
                read_views(path, times)
            refused += 1
            continue
        frames, order = read_views(path, times)
        assert frames.shape[1:] == clips[0].shape[1:], path.name
        if path.suffix != ".avi" and "truncated" not in path.name:
            for shown, clip in zip(order, clips, strict=True):
                assert np.array_equal(frames[shown], clip), path.name
            exact += 1
    assert refused >= 5
    assert exact >= 12


def test_the_gpu_gets_the_bytes_and_the_distinct_frames_numbers(videos):
    for name in ("mp4", "webm", "irregular"):
        times = partial(ViewPlan(3, placement="dense").times, frames=6, fps=24)
        encoded, decoded = read_encoded_views(videos[name], times), read_views(videos[name], times)
        assert encoded is not None
        assert encoded.numbers.tolist() == numbers(decoded.frames)
        assert np.array_equal(encoded.order, decoded.order)
        assert encoded.data.tobytes() == videos[name].read_bytes()
        assert (encoded.width, encoded.height) == (64, 48)


# -- batches -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven videos and seven pictures of noise, wide and tall."""
    root, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for i in range(7):
        size = (48, 80) if i % 2 else (90, 50)
        frames = [rng.integers(0, 256, (*size, 3), np.uint8) for _ in range(12)]
        encode(root / f"{i}.mp4", frames, g="4")
        Image.fromarray(frames[0]).save(root / f"{i}.jpg", quality=95)
    return root


@pytest.mark.parametrize(("kind", "suffix"), [("video", "mp4"), ("image", "jpg")])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_all_views_at_once_equal_the_views_one_by_one_bit_for_bit(noise, pool, kind, suffix, batch):
    recipe = section(noise, kind)
    samples = [Sample(f"{i}.{suffix}", i % 3) for i in range(7)]
    plan = ViewPlan(3 if kind == "video" else 1, 3)
    loader = ViewLoader("toy", recipe, samples, plan, 0, 1, batch, CPU, pool)
    batches = list(loader)
    loader.close()
    assert [len(b.names) for b in batches] == {1: [1] * 7, 3: [3, 3, 1], 16: [7]}[batch]
    assert [n for b in batches for n in b.names] == [s.path for s in samples]
    assert [y for b in batches for y in b.labels] == [s.label for s in samples]
    assert loader.seen == 7
    found = torch.cat([b.x for b in batches])
    clips = (0, 0.5, 1) if kind == "video" else (0.5,)
    views = [View(start, crop) for start in clips for crop in (0, 0.5, 1)]
    for i, view in enumerate(views):
        one = EvalLoader("toy", recipe, samples, 0, 1, 4, CPU, pool, view)
        assert torch.equal(torch.cat([b.x for b in one]), found[:, i]), view
        one.close()


def test_a_file_is_opened_once_for_all_its_views(noise, pool, monkeypatch):
    opened: list[str] = []
    real = av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(a[0]) or real(*a, **k))
    samples = [Sample(f"{i}.mp4", 0) for i in range(3)]
    loader = ViewLoader("toy", section(noise, "video"), samples, ViewPlan(4, 3), 0, 1, 2, CPU, pool)
    assert sum(b.x.shape[1] for b in loader) == 24
    loader.close()
    assert sorted(Path(o).name for o in opened) == ["0.mp4", "1.mp4", "2.mp4"]


def test_processes_share_the_files_without_padding_and_name_the_unusable(noise, pool, tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.mp4").symlink_to(noise / f"{i}.mp4")
    (tmp_path / "2.mp4").unlink()
    (tmp_path / "2.mp4").write_bytes(b"no video")
    samples = [Sample(f"{i}.mp4", 0) for i in range(7)]
    names, skipped = [], {}
    for rank in range(3):
        loader = ViewLoader(
            "toy", section(tmp_path, "video"), samples, ViewPlan(2), rank, 3, 2, CPU, pool
        )
        for _ in range(2):  # again, from the start
            mine = [n for b in loader for n in b.names]
        assert loader.seen == (3 if rank == 0 else 2)
        names += mine
        skipped |= loader.skipped
        loader.close()
    assert sorted(names) == [f"{i}.mp4" for i in range(7) if i != 2]
    assert list(skipped) == ["2.mp4"]
    more = ViewLoader("toy", section(noise, "video"), samples[:1], ViewPlan(), 1, 2, 4, CPU, pool)
    assert list(more) == []


def test_a_picture_that_dali_refuses_is_decoded_without_it(noise, pool, tmp_path):
    """A JPEG in CMYK, with a plain one in the same batch."""
    Image.open(noise / "1.jpg").convert("CMYK").save(tmp_path / "0.jpg", quality=95)
    (tmp_path / "1.jpg").symlink_to(noise / "1.jpg")
    samples = [Sample("0.jpg", 0), Sample("1.jpg", 1)]
    loader = ViewLoader("toy", section(tmp_path), samples, ViewPlan(1, 3), 0, 1, 2, CPU, pool)
    (batch,) = loader
    loader.close()
    assert batch.x.shape == (2, 3, 3, 32, 32)
    assert (batch.x[0] - batch.x[1]).abs().mean() < 0.2  # the same picture, coded again


@pytest.mark.parametrize(("kind", "source"), [("video", "nvdec"), ("image", "image")])
def test_gpu_graphs_decode_resize_and_crop_on_the_gpu(kind: str, source: Source):
    """Built as far as a machine without a driver allows: operators and their devices."""
    plan = ViewPlan(4 if kind == "video" else 1, 3)
    pipeline = build_view_pipeline(section(None, kind), plan, source, 2, "gpu", 1, 0)
    pipeline._build_graph()
    placed = Counter(
        (op.name.strip("_").rsplit("_", 1)[0], op.unwrapped_outputs[0].device)
        if isinstance(op.unwrapped_outputs, list | tuple)
        else (op.name.strip("_").rsplit("_", 1)[0], op.unwrapped_outputs.device)
        for op in pipeline._ops
    )
    assert placed["Resize", "gpu"] == 1
    assert placed["CropMirrorNormalize", "gpu"] == len(plan)
    assert placed["Video" if kind == "video" else "Image", "gpu"] == 1
    assert placed["SequenceRearrange", "gpu"] == (4 if kind == "video" else 0)


# -- counting ----------------------------------------------------------------------------------


def test_counts_are_those_of_the_definition():
    rng = np.random.default_rng(3)
    confusion, classes = Confusion.empty(9), 9
    labels = rng.integers(0, classes - 1, 200)  # class 8 has no sample
    rows = rng.random((200, classes))
    for row, label in zip(rows, labels, strict=True):
        confusion.add(torch.from_numpy(row), int(label))
    best = rows.argsort(1)[:, ::-1]
    expected = np.zeros((classes, classes), int)
    np.add.at(expected, (labels, best[:, 0]), 1)
    assert confusion.counts.tolist() == expected.tolist()
    hits = (best[:, :5] == labels[:, None]).any(1)
    assert confusion.top5 == hits.mean()
    assert confusion.top1 == (best[:, 0] == labels).mean()
    assert confusion.top5_hits.tolist() == [int(hits[labels == c].sum()) for c in range(classes)]
    accuracy = [(best[labels == c, 0] == c).mean() for c in range(8)]
    assert confusion.mean_class == pytest.approx(np.mean(accuracy))
    dense = np.zeros_like(expected)
    for true, predicted, count in confusion.triples():
        assert count > 0
        dense[true, predicted] = count
    assert dense.tolist() == expected.tolist()


def test_equal_probabilities_go_by_class_number():
    confusion = Confusion.empty(8)
    confusion.add(torch.full((8,), 0.125), 4)
    confusion.add(torch.full((8,), 0.125), 5)
    assert confusion.counts[:, 0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0]
    assert confusion.top5_hits.tolist() == [0, 0, 0, 0, 1, 0, 0, 0]


def planted(classes: int) -> Confusion:
    """Ten samples a class, all right; but of class 3 all are taken for 1, of class 5 six for 2,
    of class 6 none is there."""
    confusion = Confusion.empty(classes)
    confusion.counts.fill_diagonal_(10)
    confusion.counts[3, 3], confusion.counts[3, 1] = 0, 10
    confusion.counts[5, 5], confusion.counts[5, 2] = 4, 6
    confusion.counts[6, 6] = 0
    confusion.top5_hits.copy_(confusion.correct)
    return confusion


def test_the_most_confused_pairs_and_the_worst_classes_come_first():
    pairs = planted(9).most_confused(5)
    assert [(p.true, p.predicted, p.count, p.share) for p in pairs] == [
        (3, 1, 10, 1.0),
        (5, 2, 6, 0.6),
    ]
    assert planted(9).worst_classes(3) == [3, 5, 0]
    assert 6 not in planted(9).worst_classes(9)
    assert class_labels(["a"], 3) == ["a", "(class 1)", "(class 2)"]


# -- the evaluator: a network whose answers are known --------------------------------------------


def expected(dataset: str, network: int) -> dict:
    """From the planted tables alone, in numpy."""
    logits = cases.table(dataset, network)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    best = p.mean((1, 2)).argsort(-1)[:, ::-1]
    counts = np.zeros((cases.CLASSES, cases.CLASSES), int)
    hits = np.zeros(cases.CLASSES, int)
    for i, sample in enumerate(cases.SPLIT[dataset]):
        if dataset == "k400" and i == cases.BROKEN:
            continue
        counts[sample.label, best[i, 0]] += 1
        hits[sample.label] += sample.label in best[i, :5]
    total = int(counts.sum())
    return {
        "top1": int(counts.trace()) / total,
        "top5": int(hits.sum()) / total,
        "count": total,
        "views": 9 if dataset == "k400" else 1,
        "counts": counts.tolist(),
        "top5_hits": hits.tolist(),
    }


@pytest.fixture(scope="module")
def planted_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("planted")
    cases.make_files(root)
    return root


@pytest.fixture(scope="module")
def alone(planted_files: Path) -> dict:
    return cases.results(planted_files, ALONE)


def check_planted(found: dict, files: int | None) -> None:
    assert len(found) == 2 * 2 * len(cases.BATCHES)
    for key, values in found.items():
        dataset, network, _ = key.split()
        skipped, progress, samples = (values.pop(k) for k in ("skipped", "progress", "samples"))
        assert values == expected(dataset, int(network)), key
        broken = [f"{cases.BROKEN:02}.mp4"] if dataset == "k400" else []
        assert list(skipped) == sorted([*broken, *cases.UNTESTED[dataset]])
        assert cases.UNTESTED[dataset].items() <= skipped.items()
        assert samples == values["count"] + len(skipped)
        assert samples == len(cases.SPLIT[dataset]) + len(cases.UNTESTED[dataset])
        if files is None:
            assert progress == len(cases.SPLIT[dataset])


def test_accuracies_and_confusion_are_the_planted_ones_with_any_batch_size(alone):
    check_planted(json.loads(json.dumps(alone)), None)
    # what is planted tells averaging from voting and from a single view
    for network in (0, 1):
        logits = cases.table("k400", network)
        mean = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean((1, 2)).argmax(-1)
        assert (mean != logits.mean((1, 2)).argmax(-1)).any()
        assert (mean != logits[:, 1, 1].argmax(-1)).any()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2])
def test_ranks_count_every_sample_once_and_agree_with_one_process(planted_files, alone, ranks):
    output = launch("tests/launched/multiview_cases.py", str(planted_files), ranks=ranks)
    line = next(one for one in output.splitlines() if "RESULT " in one)
    found = json.loads(line.split("RESULT ", 1)[1])
    for key, values in json.loads(json.dumps(alone)).items():
        assert {**values, "progress": 0} == {**found[key], "progress": 0}, key
    check_planted(found, ranks)


def test_logits_that_are_not_finite_end_the_test_and_name_the_file(planted_files):
    evaluator = MultiViewEvaluator(cases.build_run(planted_files, ALONE, 4))

    def forward(x: torch.Tensor) -> torch.Tensor:
        return cases.network("imagenet", 0)(x).log()  # of negative numbers

    with pytest.raises(CheckpointError, match=r"bad net: logits of 00\.png are not finite"):
        evaluator.scores({"bad net": forward}, "imagenet", "test", lambda n: None)
    evaluator.close()


# -- pictures ----------------------------------------------------------------------------------


def test_a_small_matrix_shows_shares_of_rows_and_a_class_without_samples_as_such(tmp_path):
    figure = confusion_figure(planted(8), [f"class {i}" for i in range(8)], "toy")
    matrix, bars = figure.axes[:2]
    cells = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in matrix.texts}
    assert cells[3, 1] == "100"
    assert cells[5, 2] == "60"
    assert cells[5, 5] == "40"
    assert len(cells) == 8
    assert matrix.images[0].get_array().mask[6].all()
    assert [t.get_text() for t in bars.texts][5:7] == ["40% of 10", "no samples"]
    assert [round(b.get_width(), 3) for b in bars.patches] == [1, 1, 1, 0, 1, 0.4, 0, 1]
    assert "top-1 77.1%" in figure._suptitle.get_text()
    write_figure(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 600


def test_a_large_head_lists_pairs_and_classes_instead_of_cells(tmp_path):
    names = [f"Pretending to put something number {i} onto something else" for i in range(174)]
    figure = confusion_figure(planted(174), names, "toy")
    pairs, worst, every = figure.axes
    assert not any(axes.images for axes in figure.axes)
    label = f"{shortened(names[3], 52)} → {shortened(names[1], 52)}"
    assert next(t.get_text() for t in pairs.get_yticklabels()) == label
    assert [t.get_text() for t in pairs.texts] == ["10 of 10 (100%)", "6 of 10 (60%)"]
    assert [t.get_text() for t in worst.texts][:3] == ["0% of 10", "40% of 10", "100% of 10"]
    assert "1 without samples" in every.get_title()
    write_figure(figure, tmp_path / "a.png")
    with pytest.raises(ValueError, match="174 classes, 3 names"):
        confusion_figure(planted(174), ["a", "b", "c"], "toy")


def test_long_names_keep_both_ends():
    assert shortened("Putting\n $1", 40) == "Putting \\$1"
    short = shortened("Pretending to put something next to something", 40)
    assert short == "Pretending to put … next to something"
    assert shortened("x" * 99, 20) == "x" * 9 + "…" + "x" * 10


def test_two_architectures_never_share_a_name():
    assert short_names(["largest", "a/evolution/arch.json", "b/evolution/arch.json", "x.json"]) == {
        "largest": "largest",
        "a/evolution/arch.json": "evolution",
        "b/evolution/arch.json": "evolution-2",
        "x.json": "x",
    }


# -- the script --------------------------------------------------------------------------------


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """scripts/evaluate.py in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    main = importlib.import_module("evaluate").main

    def run(*args: str) -> tuple[int, str, str]:
        return (main(list(args)), *capsys.readouterr())

    return run


@pytest.mark.slow
def test_the_script_writes_a_consistent_json_a_csv_and_a_picture_per_dataset(
    evaluate, trained, tmp_path
):
    out = tmp_path / "x" / "found.json"
    chosen = ["--datasets", "k400", "imagenet", "--views", "dense", "--stride", "0.3"]
    views = ["--set", "vimnas.data.k400.test_clips=3", "--set", "vimnas.data.k400.test_crops=3"]
    code, shown, errors = evaluate("--checkpoint", str(trained), *chosen, *views, "--out", str(out))
    assert code == 0, errors
    found = json.loads(out.read_text())
    assert Path(found["checkpoint"]).parent.parent == trained
    assert [found["split"], found["placement"], found["stride"]] == ["test", "dense", 0.3]
    assert list(found["datasets"]) == ["k400", "imagenet"]
    assert list(found["archs"]) == ["largest", "smallest"]
    for arch in found["archs"].values():
        for name, entry in arch["datasets"].items():
            dataset = found["datasets"][name]
            classes = dataset["classes"]
            assert entry["count"] == dataset["count"] == dataset["samples"] == 16
            assert entry["views"] == dataset["clips"] * dataset["crops"]
            assert list(entry["per_class"]) == classes
            right = {classes[t]: n for t, p, n in entry["confusion"] if t == p}
            for label, values in entry["per_class"].items():
                assert values["top1"] * values["count"] == right.get(label, 0)
                assert values["top1"] <= values["top5"]
            assert sum(n for _, _, n in entry["confusion"]) == 16
            assert entry["top1"] == sum(right.values()) / 16
    assert found["datasets"]["k400"]["clips"] == found["datasets"]["k400"]["crops"] == 3
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [(r["sub-network"], r["dataset"]) for r in rows[:2]] == [
        ("largest", "k400"),
        ("largest", "imagenet"),
    ]
    pictures = sorted(p.name for p in out.parent.glob("*.png"))
    assert pictures == [
        f"found-{d}-{a}.png" for d in ("imagenet", "k400") for a in ("largest", "smallest")
    ]
    assert "32/32 [00:" in errors  # samples done, with the time left
    assert "classes' mean" in shown


@pytest.mark.slow
def test_test_files_that_no_loader_sees_are_counted_and_named(evaluate, trained, folder, tmp_path):
    root = tmp_path / "k400"
    shutil.copytree(folder / "data" / "k400", root)
    broken, gone, *rest = sorted((root / "val").rglob("*.mp4"))
    broken.write_bytes(b"")
    rows = [f"{p.relative_to(root)},{p.parent.name},train" for p in (root / "train").rglob("*.mp4")]
    rows += [f"{p.relative_to(root)},{p.parent.name},val" for p in (broken, gone, *rest)]
    (root / "list.csv").write_text("path,class,split\n" + "".join(f"{row}\n" for row in rows))
    gone.unlink()
    values = {"k400.root": root, "k400.layout": "csv", "k400.annotations": "list.csv"}
    values["index_dir"] = tmp_path / "indexes"
    sets = [word for k, v in values.items() for word in ("--set", f"vimnas.data.{k}={v}")]
    out = tmp_path / "found.json"
    chosen = ["--datasets", "k400", "--arch", "smallest", "--out", str(out)]
    code, shown, errors = evaluate("--checkpoint", str(trained), *sets, *chosen)
    assert code == 0, errors
    found = json.loads(out.read_text())["datasets"]["k400"]
    assert found["skipped"] == {
        str(broken.relative_to(root)): "empty file",
        str(gone.relative_to(root)): "not on the disk",
    }
    assert found["samples"] == found["count"] + 2 == 16
    line = "k400: 2 of 16 test files not scored (1 empty file, 1 not on the disk)"
    assert line in shown.splitlines()
    assert f"left out: k400: {gone.relative_to(root)}: not on the disk" in errors


def test_long_lists_of_skipped_files_are_bounded_where_they_are_printed_only(capsys):
    reasons = {f"{i:03}.mp4": "not on the disk" for i in range(123)}
    say_left_out({"k400": reasons, "ssv2": {"1.webm": "empty file"}})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == NAMED + 2
    assert lines[NAMED - 1 :] == [
        f"left out: k400: {NAMED - 1:03}.mp4: not on the disk",
        f"left out: k400: and {123 - NAMED} more",
        "left out: ssv2: 1.webm: empty file",
    ]
    found = {"split": "test", "datasets": {"k400": {"samples": 2000, "skipped": reasons}}}
    assert describe_skipped(found) == [
        "k400: 123 of 2,000 test files not scored (123 not on the disk)"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stride", "1"], "a stride is for dense views"),
        (["--views", "dense", "--stride", "-1"], "--stride must be above 0 seconds, got -1"),
        (["--views", "dense", "--single_view"], "exclude each other"),
        (["--datasets", "k401"], "--datasets k401: this run has"),
        (["--arch", "none.json"], "no architecture none.json"),
        (["--out", "results"], "must end in .json"),
    ],
)
def test_the_script_says_what_is_wrong(evaluate, trained, args, words):
    code, _, errors = evaluate("--checkpoint", str(trained), *args)
    assert code == 2
    assert words in errors
