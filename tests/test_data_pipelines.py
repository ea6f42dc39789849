"""The DALI graphs and the loaders: what reaches the network, and that it can be repeated."""

from __future__ import annotations

import io
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.media import encode, section
from vimnas_ds.config import DatasetSection
from vimnas_ds.data.augment import SUITE
from vimnas_ds.data.bad import TooManyBadFiles
from vimnas_ds.data.batches import Graphs, Ready
from vimnas_ds.data.catalog import Sample
from vimnas_ds.data.image_graph import ImageGraph
from vimnas_ds.data.loader import Batch, EvalLoader, TrainLoader
from vimnas_ds.data.order import Stream, locate
from vimnas_ds.data.pipelines import (
    MEAN,
    STD,
    Graph,
    GraphError,
    build_eval_pipeline,
    build_train_pipeline,
)
from vimnas_ds.data.prepare import FilePreparer, View
from vimnas_ds.data.sampling import NOTHING, NUM_OPS, draw_sample

CPU = torch.device("cpu")
RICH = {"randaugment": {"n": 2, "m": 9, "std": 0.5}, "random_erasing": 0.5}


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(11):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
        small.resize((64 + i, 48), Image.Resampling.BICUBIC).save(root / f"{i:02}.jpg", quality=95)
    return root, [Sample(f"{i:02}.jpg", i % 3) for i in range(11)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Sample]]:
    root, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(1)
    for i in range(7):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
        wide = np.asarray(small.resize((96, 48), Image.Resampling.BICUBIC))
        encode(root / f"{i}.mp4", [wide[:, 2 * t : 2 * t + 64] for t in range(12)], rate=8)
    return root, [Sample(f"{i}.mp4", i % 3) for i in range(7)]


Data = tuple[Path, list[Sample]]


def train_loader(
    recipe: DatasetSection, samples: list[Sample], pool: ThreadPoolExecutor, **changes: Any
) -> TrainLoader:
    values: dict[str, Any] = {"split": "train", "seed": 5, "global_batch": 4}
    values |= {"rank": 0, "world_size": 1, "device": CPU, "pool": pool}
    return TrainLoader("toy", recipe, samples, **(values | changes))


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and a.names == b.names


def planes(clip: np.ndarray) -> np.ndarray:
    """(T, h, w, 3) -> (T, 3, h, w)."""
    return np.ascontiguousarray(clip.transpose(0, 3, 1, 2))


class Frames:
    """The training graph fed with frames; inputs are neutral unless given."""

    def __init__(self, recipe: DatasetSection) -> None:
        self.graph = Graph(lambda: build_train_pipeline(recipe, "frames", 1))
        self.count = recipe.randaugment.n if recipe.randaugment else 0

    def __call__(self, clip: np.ndarray, **inputs: Any) -> np.ndarray:
        """(T, h, w, 3) -> (3, T, size, size)."""
        values = {"flip": 0} | inputs
        if self.count:
            identity = [NUM_OPS - 1] * self.count
            values = {"ops": identity, "bins": [0] * self.count, "signs": [0] * self.count} | values
        feed: dict[str, Any] = {name: np.array(v, np.int32) for name, v in values.items()}
        return self.graph.run([feed | {"frames": planes(clip)}])[0].numpy()


# -- graphs -----------------------------------------------------------------------------------


def test_normalisation_is_imagenets_and_the_layout_is_channels_first() -> None:
    recipe = section(None, "video")
    clip = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    expected = ((clip - np.array(MEAN)) / np.array(STD)).transpose(3, 0, 1, 2)
    graph = Frames(recipe)
    np.testing.assert_allclose(graph(clip), expected, atol=1e-5)
    np.testing.assert_allclose(graph(clip, flip=1), expected[..., ::-1], atol=1e-5)


def test_a_batch_keeps_its_pixels_when_its_graph_runs_again_and_is_gone() -> None:
    graph = Frames(section(None, "video"))
    first = graph(np.full((4, 32, 32, 3), 200, np.uint8))
    before = first.copy()
    for value in range(4):
        graph(np.full((4, 32, 32, 3), value, np.uint8))
    del graph
    np.testing.assert_array_equal(first, before)


def test_a_clip_gets_one_augmentation_for_all_its_frames() -> None:
    graph = Frames(section(None, "video", randaugment={"n": 2}))
    still = np.broadcast_to(
        np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)), (4, 32, 32, 3)
    ).astype(np.uint8)
    for op in range(NUM_OPS):
        out = graph(still, ops=[op, (op + 5) % NUM_OPS], bins=[27, 20], signs=[1, 0])
        assert np.ptp(out, axis=1).max() == 0, SUITE[op].name


def test_the_second_operation_works_on_the_result_of_the_first() -> None:
    graph = Frames(section(None, "video", randaugment={"n": 2}))
    clip = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    names = [op.name for op in SUITE]
    dark, turned, same = names.index("brightness"), names.index("rotate"), names.index("identity")
    both = graph(clip, ops=[dark, turned], bins=[27, 27], signs=[1, 0])
    first = graph(clip, ops=[dark, same], bins=[27, 27], signs=[1, 0])
    second = graph(clip, ops=[same, turned], bins=[27, 27], signs=[1, 0])
    assert not np.array_equal(both, first)
    assert not np.array_equal(both, second)
    assert both[:, :, 16, 16].mean() < second[:, :, 16, 16].mean() - 0.5


def test_each_operation_changes_pixels_and_repeats_exactly() -> None:
    graph = Frames(section(None, "video", randaugment={"n": 1}))
    ramp = np.linspace(40, 200, 32)[None, :, None] + np.linspace(0, 30, 32)[:, None, None]
    clip = np.stack([ramp + np.array([0, 10, 20])] * 4).astype(np.uint8)
    clip[:, 8:16, 8:16] //= 2
    plain, seen = graph(clip), set()
    for op in range(NUM_OPS):
        for sign in (0, 1) if SUITE[op].randomly_negate else (0,):
            chosen = {"ops": [op], "bins": [27], "signs": [sign]}
            out = graph(clip, **chosen)
            assert np.array_equal(out, graph(clip, **chosen))
            assert np.array_equal(out, plain) == (SUITE[op].name == "identity"), SUITE[op].name
            seen.add(out.tobytes())
    assert len(seen) == NUM_OPS + sum(op.randomly_negate for op in SUITE)


def test_translation_moves_by_the_magnitude_in_the_direction_of_the_sign() -> None:
    graph = Frames(section(None, "video", randaugment={"n": 1}, size=56))
    clip = np.zeros((4, 56, 56, 3), np.uint8)
    clip[:, :, 28] = 255
    op = [o.name for o in SUITE].index("translate_x")
    for sign, column in ((0, 28 + 12.5), (1, 28 - 12.5)):  # half of 100/224 of 56 pixels
        out = graph(clip, ops=[op], bins=[15], signs=[sign])[0, 0, 28]
        line = out - out.min()
        line[np.abs(np.arange(56) - column) > 3] = 0
        assert (line * np.arange(56)).sum() / line.sum() == pytest.approx(column, abs=0.6)


def test_erased_pixels_are_zero_after_normalisation(images: Data, pool: ThreadPoolExecutor) -> None:
    root, samples = images
    recipe = section(root, random_erasing=0.9)
    batch = train_loader(recipe, samples, pool, global_batch=8).next()
    stream = Stream(5, "toy", "train")
    drawn = [draw_sample(stream, *locate(stream, 11, p), recipe).erase for p in range(8)]
    assert sum(w != NOTHING for w in drawn) > 4
    for x, w in zip(batch.x, drawn, strict=True):
        zero = (x == 0).all(0)
        assert zero[w.top : w.top + w.height, w.left : w.left + w.width].all()
        assert zero.sum() <= w.height * w.width + 5


def test_images_are_cropped_by_the_drawn_window(images: Data, pool: ThreadPoolExecutor) -> None:
    root, samples = images
    recipe = section(root, directional_labels=True)
    batch = train_loader(recipe, samples, pool).next()
    stream = Stream(5, "toy", "train")
    for p in range(4):
        epoch, index = locate(stream, len(samples), p)
        picture = Image.open(root / samples[index].path)
        w = draw_sample(stream, epoch, index, recipe).window(*picture.size)
        box = (w.left, w.top, w.left + w.width, w.top + w.height)
        resized = picture.resize((32, 32), Image.Resampling.BILINEAR, box=box)
        expected = (np.asarray(resized) - np.array(MEAN)) / np.array(STD)
        error = np.abs(batch.x[p].numpy().transpose(1, 2, 0) - expected)
        assert error.mean() < 0.03
        assert error.max() < 0.4


@pytest.mark.parametrize("changes", [{}, {"randaugment": {"n": 1}}])
def test_the_cpus_image_graph_resizes_the_crop_as_pillow_does(changes: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (90, 120, 3)).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "PNG")
    graph = ImageGraph(section(None, size=40, **changes), 2, 1)
    identity = {"ops": [NUM_OPS - 1], "bins": [0], "signs": [0]} if changes else {}
    feeds = []
    expected = []
    for top, left, height, width, flip in ((10, 30, 70, 60, 0), (3, 5, 20, 30, 1)):
        inputs = {"anchor": [top, left], "extent": [height, width], "flip": flip, **identity}
        feed = {name: np.array(value, np.int32) for name, value in inputs.items()}
        feeds.append({"encoded": np.frombuffer(file.getvalue(), np.uint8), **feed})
        part = picture.crop((left, top, left + width, top + height))
        resized = np.asarray(part.resize((40, 40), Image.Resampling.BILINEAR))
        expected.append(resized[:, ::-1] if flip else resized)
    grey = graph.run(feeds).numpy().transpose(0, 2, 3, 1) * np.array(STD) + np.array(MEAN)
    assert np.abs(grey - np.stack(expected)).max() < 1.01
    graph.close()


def test_evaluation_crops_the_place_asked_for() -> None:
    recipe = section(None, "video", size=32, resize=40)
    across = 3 * np.arange(80)[None, None, :, None]
    clip = np.broadcast_to(across, (4, 40, 80, 3)).astype(np.uint8)
    graph = Graph(lambda: build_eval_pipeline(recipe, "frames", 1))
    for place in (0.0, 0.5, 1.0):
        out = graph.run([{"frames": planes(clip), "place": np.array([0.5, place], np.float32)}])
        assert out.shape == (1, 3, 4, 32, 32)
        left = place * (80 - 32)
        row = out[0, 0, 0, 16].numpy() * STD[0] + MEAN[0]
        np.testing.assert_allclose(row, 3 * (left + np.arange(32)), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "source", "decoders"),
    [
        ("video", "nvdec", ("Video", "Video")),
        ("video", "frames", (None, None)),
        ("image", "image", ("ImageSlice", "Image")),
    ],
)
def test_gpu_graphs_decode_and_augment_on_the_gpu(kind: str, source: Any, decoders: Any) -> None:
    """Built as far as a machine without a driver allows: operators and their devices."""
    recipe = section(None, kind, **RICH)
    builders = (build_train_pipeline, build_eval_pipeline)
    for build, decoder in zip(builders, decoders, strict=True):
        pipeline = build(recipe, source, 4, "gpu", 1, 0)
        pipeline._build_graph()
        placed: dict[str, set[str]] = {}
        for op in pipeline._ops:
            outputs = op.unwrapped_outputs
            for out in _list(outputs):
                placed.setdefault(op.name.strip("_").rsplit("_", 1)[0], set()).add(out.device)
            if any(out.device == "cpu" for out in _list(outputs)):
                assert all(x.device == "cpu" for x in op.inputs), f"{op.name} copies to the host"
        pixels = ["CropMirrorNormalize"] + ["Resize"] * (source != "frames")
        if build is build_train_pipeline:
            pixels += ["Erase", "WarpAffine", "Rotate", "Equalize", "Filter"]
        assert all(placed[name] == {"gpu"} for name in pixels), placed
        found = {
            name: on for name, on in placed.items() if name in ("Video", "Image", "ImageSlice")
        }
        assert found == ({decoder: {"gpu"}} if decoder else {})
        pipeline._device_id = None  # a pipeline for a GPU cannot be serialised without a driver
        assert pipeline.serialize().count(b"\x05mixed") == bool(decoder)


def _list(outputs: Any) -> Any:
    return outputs if isinstance(outputs, list | tuple) else [outputs]


def test_a_clip_that_is_not_for_the_gpus_decoder_leaves_the_rest_of_its_batch_there(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """DALI's CPU decoder, which reads VP9, stands in for the GPU's."""
    rng = np.random.default_rng(2)
    for name, codec in (("0.webm", "libvpx-vp9"), ("1.avi", "mpeg4"), ("2.webm", "libvpx-vp9")):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
        picture = np.asarray(small.resize((64, 48), Image.Resampling.BICUBIC))
        encode(tmp_path / name, [picture] * 8, codec, rate=8)
    samples = [Sample(n, i) for i, n in enumerate(("0.webm", "1.avi", "2.webm"))]
    recipe = section(tmp_path, "video", crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3))
    files = FilePreparer("toy", recipe, samples, gpu=True)
    draws = [draw_sample(Stream(5, "toy", "train"), 0, i, recipe) for i in range(3)]
    ready = [Ready(files.train(i, draws[i]), samples[i], {}) for i in range(3)]
    assert ["encoded" in (one.feed or {}) for one in ready] == [True, False, True]
    again: list[int] = []

    def redo(places: list[int]) -> list[Ready]:
        again.extend(places)
        return [Ready(files.train(i, draws[i], safe=True), samples[i], {}) for i in places]

    graphs = Graphs(recipe, "nvdec", 3, CPU, 1, train=True)
    made = graphs.run(ready, redo)
    assert made.batch is not None
    assert not made.refused
    assert not again
    assert made.batch.names == ("0.webm", "1.avi", "2.webm")
    assert made.batch.y.tolist() == [0, 1, 2]
    safe = graphs.run(redo([0, 1, 2]), redo)
    assert safe.batch is not None
    error = (made.batch.x - safe.batch.x).abs().mean((1, 2, 3, 4))
    assert error[1] == 0  # the same way
    assert (error < 0.05).all()  # both ways show the same part of the same file
    assert (error[[0, 2]] > 0).all()
    broken = Ready({**(ready[2].feed or {}), "encoded": np.zeros(99, np.uint8)}, samples[2], {})
    again.clear()
    mended = graphs.run([*ready[:2], broken], redo)
    assert mended.refused == ("2.webm",)
    assert again == [2]
    assert mended.batch is not None
    assert torch.equal(mended.batch.x[:2], made.batch.x[:2])
    assert torch.equal(mended.batch.x[2], safe.batch.x[2])


# -- training loader --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "video"])
def test_seeking_gives_the_uninterrupted_runs_batches_whatever_the_workers(
    kind: str, images: Data, clips: Data
) -> None:
    root, samples = images if kind == "image" else clips
    recipe = section(root, kind, **RICH)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(3) as three:
        steady = train_loader(recipe, samples, one, prefetch=1)
        batches = [steady.next() for _ in range(5)]
        jumping = train_loader(recipe, samples, three, prefetch=3, threads=2)
        for k in (3, 4, 0, 1, 3):
            jumping.seek(k)
            assert same(jumping.next(), batches[k]), k
            assert jumping.position == k + 1
        steady.close()
        jumping.close()


@pytest.mark.parametrize("kind", ["image", "video"])
def test_two_processes_read_the_global_batch_of_one(
    kind: str, images: Data, clips: Data, pool: ThreadPoolExecutor
) -> None:
    root, samples = images if kind == "image" else clips
    recipe = section(root, kind, **RICH)
    alone = train_loader(recipe, samples, pool)
    pair = [train_loader(recipe, samples, pool, rank=r, world_size=2) for r in (0, 1)]
    for _ in range(4):
        whole, parts = alone.next(), [p.next() for p in pair]
        assert torch.equal(whole.x, torch.cat([p.x for p in parts]))
        assert whole.names == parts[0].names + parts[1].names
        assert torch.equal(whole.y, torch.cat([p.y for p in parts]))


def test_an_epoch_shows_every_file_once_and_labels_are_theirs(
    images: Data, pool: ThreadPoolExecutor
) -> None:
    root, samples = images
    loader = train_loader(section(root), samples, pool, global_batch=1)
    batches = [loader.next() for _ in range(len(samples))]
    labels = {b.names[0]: int(b.y[0]) for b in batches}
    assert labels == {s.path: s.label for s in samples}
    assert batches[0].x.dtype == torch.float32
    assert batches[0].y.dtype == torch.int64


def spoil(root: Path, good: Data, broken: int, suffix: str) -> list[Sample]:
    """A copy of the dataset whose first `broken` files are cut in half."""
    for i, sample in enumerate(good[1]):
        content = (good[0] / sample.path).read_bytes()
        (root / sample.path).write_bytes(content[: len(content) // 2] if i < broken else content)
    return good[1]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_broken_files_are_replaced_named_and_counted(
    kind: str, images: Data, clips: Data, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    samples = spoil(tmp_path, images if kind == "image" else clips, 2, kind)
    broken = {s.path for s in samples[:2]}
    loader = train_loader(section(tmp_path, kind), samples, pool, max_bad_share=0.5)
    count = 3 * len(samples) // 4 + 1
    batches = [loader.next() for _ in range(count)]
    assert all(len(b.y) == 4 for b in batches)
    assert set(loader.substitutions) == broken
    assert loader.seen == 4 * count
    stream = Stream(5, "toy", "train")
    drawn = [samples[locate(stream, len(samples), p)[1]] for p in range(4 * count)]
    assert loader.fallbacks == 0  # they were found before DALI saw them
    assert loader.bad_count == sum(s.path in broken for s in drawn) > 0
    names = [name for b in batches for name in b.names]
    expected = [samples[2].path if s.path in broken else s.path for s in drawn]
    assert names == expected
    again = train_loader(section(tmp_path, kind), samples, pool, max_bad_share=0.5)
    again.seek(count - 1)
    assert same(again.next(), batches[-1])


def test_a_batch_that_is_not_used_does_not_count(
    images: Data, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """Whoever goes on asks for it again: its broken files are not counted twice."""
    samples = spoil(tmp_path, images, 2, "image")
    loader = train_loader(section(tmp_path, "image"), samples, pool, max_bad_share=0.9)

    def counts() -> tuple[int, int, Counter[str], dict[str, str]]:
        return loader.seen, loader.bad_count, loader.reasons.copy(), loader.substitutions.copy()

    states = [counts()]
    for _ in range(8):
        loader.next()
        states.append(counts())
        loader.take_back()
        assert counts() == states[-2]
        loader.seek(loader.position - 1)
        loader.next()
        assert counts() == states[-1]
    assert states[-1][1] > 1


def test_too_many_broken_files_end_the_run_with_their_names(
    images: Data, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    samples = spoil(tmp_path, images, 3, "image")
    loader = train_loader(section(tmp_path), samples, pool, max_bad_share=0.1)
    for _ in range(12):  # 48 samples: too few to judge
        loader.next()
    with pytest.raises(TooManyBadFiles, match=r"toy: .* of 52 samples[\s\S]*00\.jpg: "):
        loader.next()
    samples = spoil(tmp_path, images, 11, "image")
    with pytest.raises(TooManyBadFiles):
        train_loader(section(tmp_path), samples, pool, max_bad_share=0.9).next()


def test_a_batch_that_dali_refuses_is_decoded_without_it(
    images: Data, pool: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = spoil(tmp_path, images, 1, "image")
    lenient = FilePreparer._read

    def unchecked(self: FilePreparer, feed: Any, index: int, *rest: Any) -> tuple[int, int]:
        self._verified[index] = 1  # the truncated file passes for sound
        return lenient(self, feed, index, *rest)

    monkeypatch.setattr(FilePreparer, "_read", unchecked)
    loader = train_loader(section(tmp_path), samples, pool, global_batch=11, max_bad_share=0.5)
    first, second = loader.next(), loader.next()
    assert loader.fallbacks >= 1
    assert list(loader.substitutions) == ["00.jpg"]
    assert len(first.y) == len(second.y) == 11
    assert loader.seen == 22
    assert "00.jpg" not in first.names + second.names


def test_a_file_that_dali_refuses_is_found_and_goes_the_other_way_from_then_on(
    images: Data, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, samples = images
    odd = {(root / name).read_bytes() for name in ("03.jpg", "07.jpg")}
    run, train = ImageGraph.run, FilePreparer.train
    runs: list[int] = []
    again: list[str] = []

    def picky(self: ImageGraph, feeds: Any) -> torch.Tensor:
        runs.append(len(feeds))
        if any(feed["encoded"].tobytes() in odd for feed in feeds):
            raise GraphError("no such codec")
        return run(self, feeds)

    def watched(self: FilePreparer, index: int, draw: Any, safe: bool = False) -> Any:
        again.extend([samples[index].path] * safe)
        return train(self, index, draw, safe)

    plain = train_loader(section(root), samples, pool, global_batch=11, prefetch=0)
    expected = [plain.next() for _ in range(3)]
    monkeypatch.setattr(FilePreparer, "train", watched)
    monkeypatch.setattr(ImageGraph, "run", picky)
    loader = train_loader(section(root), samples, pool, global_batch=11, prefetch=0)
    found = [loader.next() for _ in range(2)]
    assert runs[0] == 11
    assert runs.count(1) <= 2 * 2  # halves, not all eleven
    assert sorted(again) == ["03.jpg", "03.jpg", "07.jpg", "07.jpg"]
    del runs[:]
    found.append(loader.next())
    assert runs == [11]
    assert loader.fallbacks == 1
    assert not loader.substitutions
    for batch, whole in zip(found, expected, strict=True):
        assert batch.names == whole.names
        for name, x, y in zip(batch.names, batch.x, whole.x, strict=True):
            assert torch.equal(x, y) or name in ("03.jpg", "07.jpg")
    resumed = train_loader(section(root), samples, pool, global_batch=11, prefetch=0)
    resumed.seek(2)
    assert same(resumed.next(), found[2])


def test_dead_pipelines_are_replaced(images: Data) -> None:
    root, samples = images
    recipe = section(root)
    good = FilePreparer("toy", recipe, samples, gpu=False).evaluate(0, View())
    graph = Graph(lambda: build_eval_pipeline(recipe, "image", 1))
    before = graph.run([good])
    with pytest.raises(GraphError):
        graph.run([{**good, "encoded": np.zeros(100, np.uint8)}])
    assert torch.equal(graph.run([good]), before)


def test_empty_splits_and_uneven_batches_are_refused(
    images: Data, pool: ThreadPoolExecutor
) -> None:
    root, samples = images
    with pytest.raises(ValueError, match="no samples"):
        train_loader(section(root), [], pool)
    with pytest.raises(ValueError, match="no samples"):
        EvalLoader("toy", section(root), [], 0, 1, 4, CPU, pool)
    with pytest.raises(ValueError, match="cannot share 4"):
        train_loader(section(root), samples, pool, world_size=3)
    with pytest.raises(ValueError, match=r"vimnas\.data\.toy\.root"):
        train_loader(section(None), samples, pool)


def test_closing_twice_is_fine_and_leaves_no_thread(clips: Data) -> None:
    root, samples = clips
    before = threading.active_count()
    with ThreadPoolExecutor(2) as threads:
        loader = train_loader(section(root, "video"), samples, threads)
        first = loader.next()
        loader.close()
        loader.close()
        loader.seek(0)
        assert same(loader.next(), first)  # a closed loader can be used again
        loader.close()
    assert threading.active_count() == before


# -- evaluation loader ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "video"])
def test_two_processes_evaluate_each_sample_exactly_once(
    kind: str, images: Data, clips: Data, pool: ThreadPoolExecutor
) -> None:
    root, samples = images if kind == "image" else clips
    recipe = section(root, kind)
    loaders = [EvalLoader("toy", recipe, samples, r, 2, 4, CPU, pool) for r in (0, 1)]
    for _ in range(2):
        found = [
            (n, int(y)) for one in loaders for b in one for n, y in zip(b.names, b.y, strict=True)
        ]
        assert sorted(found) == [(s.path, s.label) for s in samples]
    assert [len(b.y) for b in loaders[0]] == ([4, 2] if kind == "image" else [4])


def test_evaluation_repeats_itself_and_skips_broken_files(
    clips: Data, pool: ThreadPoolExecutor, tmp_path: Path
) -> None:
    samples = spoil(tmp_path, clips, 1, "video")
    loader = EvalLoader("toy", section(tmp_path, "video"), samples, 0, 1, 3, CPU, pool)
    first, second = list(loader), list(loader)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert [len(b.y) for b in first] == [2, 3, 1]
    assert list(loader.skipped) == ["0.mp4"]
    assert loader.seen == 7


def test_views_move_the_clip_in_time_and_the_crop_along_the_longer_side(
    clips: Data, pool: ThreadPoolExecutor
) -> None:
    root, samples = clips
    recipe = section(root, "video")

    def batch(view: View) -> torch.Tensor:
        return next(iter(EvalLoader("toy", recipe, samples, 0, 1, 7, CPU, pool, view))).x

    centre = batch(View())
    assert torch.equal(centre, batch(View(0.5, 0.5)))
    for other in (View(0.0, 0.5), View(1.0, 0.5), View(0.5, 0.0), View(0.5, 1.0)):
        assert not torch.equal(centre, batch(other))


def test_a_process_without_samples_gets_no_batch(images: Data, pool: ThreadPoolExecutor) -> None:
    root, samples = images
    assert list(EvalLoader("toy", section(root), samples[:1], 1, 2, 4, CPU, pool)) == []
