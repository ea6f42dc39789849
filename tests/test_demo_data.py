"""The demo's datasets have the real formats, and only the order of frames tells a pair apart."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vimnas_ds.data import demo, demo_scenes
from vimnas_ds.data.demo import DEMO_CLASSES, clip_fps, make_demo_data, render_clip, render_image
from vimnas_ds.data.demo_scenes import VIDEO_DATASETS

main = importlib.import_module("scripts.make_demo_data").main

FloatArray = NDArray[np.floating]
PAIRS = [(dataset, pair) for dataset in VIDEO_DATASETS for pair in range(4)]
NUM_CLIPS = 24  # per pair, for the tests that classify
GRID = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "set"
    make_demo_data(out, train_per_class=2, test_per_class=1, workers=1)
    return out


def files_of(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def read_video(path: Path) -> tuple[str, float, NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        assert stream.average_rate is not None
        return stream.codec_context.name, float(stream.average_rate), frames


# --- content ---


def test_pixels_depend_on_the_seed_the_split_and_the_number_and_on_nothing_else() -> None:
    np.testing.assert_array_equal(render_image(3, 5), render_image(3, 5))
    np.testing.assert_array_equal(render_clip("k600", 2, 4), render_clip("k600", 2, 4))
    first = render_clip("ssv2", 0, 7, "train", seed=1)
    for other in (("test", 7, 1), ("train", 8, 1), ("train", 7, 2)):
        split, number, seed = other
        assert not np.array_equal(first, render_clip("ssv2", 0, number, split, seed=seed)), other


@pytest.mark.parametrize("dataset", VIDEO_DATASETS)
def test_an_odd_class_is_the_even_class_before_it_played_backwards(dataset: str) -> None:
    for pair in range(len(DEMO_CLASSES[dataset]) // 2):
        forward, backward = render_clip(dataset, 2 * pair, 1), render_clip(dataset, 2 * pair + 1, 1)
        assert forward.dtype == np.uint8
        assert forward.shape[1] == 48
        assert forward.shape[3] == 3
        np.testing.assert_array_equal(forward[::-1], backward)
        assert not np.array_equal(forward, backward)


def test_a_second_always_fits_into_a_clip() -> None:
    for dataset in VIDEO_DATASETS:
        for number in range(8):
            assert len(render_clip(dataset, 0, number)) / clip_fps(dataset, number) > 1.75


def test_hard_samples_are_as_frequent_as_the_difficulty_says() -> None:
    for dataset, share in demo.DIFFICULTY.items():
        generators = (np.random.default_rng([9, n]) for n in range(300))
        scenes = [demo_scenes._open_scene(rng, dataset, num_frames=1) for rng in generators]
        assert abs(np.mean([scene.hard for scene in scenes]) - share) < 0.08, dataset


# --- what tells the members of a pair apart ---


def unordered(window: FloatArray) -> FloatArray:
    """Statistics that no shuffling of the frames changes."""
    means, stds = window.mean(axis=(1, 2)), window.std(axis=(1, 2))  # (8, 3)
    rough = _grid(window).reshape(len(window), -1)
    parts = [np.sort(means, axis=0), np.sort(stds, axis=0), rough.mean(axis=0), rough.std(axis=0)]
    return np.concatenate([part.ravel() for part in parts])


def ordered(window: FloatArray) -> FloatArray:
    """How the last third of the frames differs from the first: coarsely, and in edges."""
    first, last = window[:3].mean(axis=0), window[-3:].mean(axis=0)
    change = last - first
    edges = [np.abs(np.diff(picture, axis=0)).mean() for picture in (first, last)]
    fewer = np.array([edges[1] - edges[0]])
    return np.concatenate([_grid(change[None]).ravel(), change.mean(axis=(0, 1)), fewer])


def _grid(window: FloatArray) -> FloatArray:
    """Mean brightness of the cells of the central square: (T, 6, 6)."""
    left = (window.shape[2] - 48) // 2
    square = window[:, :, left : left + 48].mean(axis=-1)
    return square.reshape(-1, GRID, 48 // GRID, GRID, 48 // GRID).mean(axis=(2, 4))


@pytest.fixture(scope="module")
def windows() -> dict[tuple[str, int], list[tuple[FloatArray, FloatArray]]]:
    """For each pair and number, one random second (8 frames) of either member."""
    rng = np.random.default_rng(0)

    def window(clip: NDArray[np.uint8], fps: int) -> FloatArray:
        start = rng.uniform(0, len(clip) / fps - 0.9)
        return clip[((start + np.arange(8) / 8) * fps).astype(int)] / np.float32(255)

    def both(dataset: str, pair: int, number: int) -> tuple[FloatArray, FloatArray]:
        clip, fps = render_clip(dataset, 2 * pair, number), clip_fps(dataset, number)
        return window(clip, fps), window(clip[::-1], fps)

    return {key: [both(*key, number) for number in range(NUM_CLIPS)] for key in PAIRS}


def held_out_accuracy(features: FloatArray, changed: FloatArray | None = None) -> float:
    """Of a ridge regression for the members, over two folds; features (numbers, members, D).

    With `changed`, the regression is fitted to `features` and asked about `changed`.
    """
    asked = features if changed is None else changed
    right: list[float] = []
    for fold in (0, 1):
        train = np.concatenate([features[fold::2, 0], features[fold::2, 1]])
        target = np.repeat([-1.0, 1.0], len(train) // 2)
        center, scale = train.mean(axis=0), train.std(axis=0) + 1e-6
        x = (train - center) / scale
        weights = np.linalg.solve(x.T @ x + 20 * np.eye(x.shape[1]), x.T @ target)
        for member, sign in ((0, -1), (1, 1)):
            scores = ((asked[1 - fold :: 2, member] - center) / scale) @ weights
            right.extend(np.sign(scores) == sign)
    return float(np.mean(right))


def test_without_their_order_frames_say_nothing_and_with_it_they_tell(
    windows: dict[tuple[str, int], list[tuple[FloatArray, FloatArray]]],
) -> None:
    blind, seeing = {}, {}
    for key, clips in windows.items():
        blind[key] = held_out_accuracy(np.array([[unordered(w) for w in pair] for pair in clips]))
        seeing[key] = held_out_accuracy(np.array([[ordered(w) for w in pair] for pair in clips]))
    print({key: (round(blind[key], 2), round(seeing[key], 2)) for key in PAIRS})
    assert 0.43 < np.mean(list(blind.values())) < 0.57
    assert np.mean(list(seeing.values())) > 0.8
    assert min(seeing.values()) > 0.6


def test_a_mirror_keeps_the_kinetics_labels_and_swaps_left_with_right(
    windows: dict[tuple[str, int], list[tuple[FloatArray, FloatArray]]],
) -> None:
    kept = []
    for (dataset, pair), clips in windows.items():
        plain = np.array([[ordered(w) for w in pair] for pair in clips])
        mirrored = np.array([[ordered(w[:, :, ::-1]) for w in pair] for pair in clips])
        accuracy = held_out_accuracy(plain, mirrored)
        name = DEMO_CLASSES[dataset][2 * pair]
        if "left" in name or "clockwise" in name:
            assert accuracy < 0.3, name
        else:
            kept.append(accuracy)
    assert np.mean(kept) > 0.75
    assert min(kept) > 0.55


# --- files ---


def test_the_same_settings_write_the_same_bytes_and_another_seed_writes_others(
    tiny: Path, tmp_path: Path
) -> None:
    make_demo_data(tmp_path / "again", train_per_class=2, test_per_class=1, workers=2)
    expected = files_of(tiny)
    assert files_of(tmp_path / "again") == expected
    make_demo_data(tmp_path / "other", seed=1, train_per_class=1, test_per_class=1, workers=1)
    others = files_of(tmp_path / "other")
    media = [name for name in others if not name.endswith(".json")]
    assert len(media) == 2 * 8 * 4
    assert not [name for name in media if others[name] == expected[name]]


def test_pictures_are_jpeg_files_in_wnid_folders(tiny: Path) -> None:
    for split, per_class in (("train", 2), ("val", 1)):
        folders = sorted((tiny / "imagenet" / split).iterdir())
        assert [folder.name for folder in folders] == list(demo.DEMO_WNIDS)
        for class_id, folder in enumerate(folders):
            paths = sorted(folder.glob("*.JPEG"))
            assert len(paths) == per_class
            with Image.open(paths[0]) as image:
                assert image.format == "JPEG"
                assert image.mode == "RGB"
                read = np.asarray(image, dtype=float)
            drawn = render_image(class_id, 0, "train" if split == "train" else "test")
            assert read.shape == drawn.shape
            assert np.abs(read - drawn).mean() < 25


@pytest.mark.parametrize("dataset", ["k400", "k600"])
def test_kinetics_clips_are_h264_in_class_folders(tiny: Path, dataset: str) -> None:
    for split, name, per_class in (("train", "train", 2), ("val", "test", 1)):
        folders = {folder.name: folder for folder in (tiny / dataset / split).iterdir()}
        assert set(folders) == set(DEMO_CLASSES[dataset])
        for class_id, label in enumerate(DEMO_CLASSES[dataset]):
            paths = sorted(folders[label].glob("*.mp4"))
            assert len(paths) == per_class
            codec, fps, frames = read_video(paths[0])
            assert codec == "h264"
            assert fps == clip_fps(dataset, 0)
            drawn = render_clip(dataset, class_id, 0, name)
            assert frames.shape == drawn.shape
            assert np.abs(frames.astype(float) - drawn).mean() < 25


def ssv2_entries(tiny: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for split, file in (("train", "train.json"), ("test", "validation.json")):
        for entry in json.loads((tiny / "ssv2/labels" / file).read_text()):
            yield split, entry


def test_ssv2_clips_are_vp9_at_12_fps_and_its_lists_resolve(tiny: Path) -> None:
    labels = json.loads((tiny / "ssv2/labels/labels.json").read_text())
    assert sorted(labels.values(), key=int) == [str(i) for i in range(8)]
    folder = tiny / "ssv2/20bn-something-something-v2"
    seen: dict[str, list[str]] = {"train": [], "test": []}
    for split, entry in ssv2_entries(tiny):
        assert set(entry) == {"id", "label", "template", "placeholders"}
        template = str(entry["template"])
        assert template.replace("[something]", "something") in labels
        assert entry["label"] == template.replace("[something]", "a shape").lower()
        class_id = DEMO_CLASSES["ssv2"].index(template)
        number = sum(name == template for name in seen[split])
        seen[split].append(template)
        codec, fps, frames = read_video(folder / f"{entry['id']}.webm")
        assert (codec, fps) == ("vp9", 12)
        drawn = render_clip("ssv2", class_id, number, split)
        assert frames.shape == drawn.shape
        assert np.abs(frames.astype(float) - drawn).mean() < 25
    assert len(seen["train"]) == 16
    assert len(seen["test"]) == 8
    assert len(list(folder.iterdir())) == 24


# --- making it again ---


def test_a_complete_set_is_left_alone(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    argv = ["--out", str(tiny), "--train_per_class", "2", "--test_per_class", "1"]
    assert main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before
    assert "imagenet: 16 train, 8 test" in capsys.readouterr().out


def test_what_is_not_this_set_is_replaced_only_by_force_and_other_files_never(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    argv = ["--out", str(out), "--train_per_class", "1", "--test_per_class", "1", "--workers", "1"]
    assert main(argv) == 0
    whole = files_of(out)
    (out / "ssv2/20bn-something-something-v2/1.webm").unlink()
    assert main(argv) == 2
    assert "pass --force" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0
    assert files_of(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["set"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    argv[1] = str(tmp_path / "mine")
    assert main([*argv, "--force"]) == 2
    assert "something other than demo data" in capsys.readouterr().err
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
