"""Listing, splitting, ordering, drawing and decoding: everything before DALI."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests.media import encode, numbered, numbers, section, touch
from vimnas_ds.data import convert, decode, skip
from vimnas_ds.data.bad import BadFile, BadVideo, DataMissing
from vimnas_ds.data.catalog import Catalog, Sample, scan_dataset
from vimnas_ds.data.decode import read_clip
from vimnas_ds.data.encoded import read_encoded
from vimnas_ds.data.images import read_image
from vimnas_ds.data.order import Stream, locate
from vimnas_ds.data.sampling import Cut, Window, draw_sample, frame_times
from vimnas_ds.data.splits import drop_overlap, split_catalog

AWKWARD = Path(__file__).parents[2] / "shared" / "data" / "awkward"

needs_awkward = pytest.mark.skipif(not AWKWARD.is_dir(), reason=f"no files in {AWKWARD}")
UNUSABLE = {
    "derived__text_file_named.mp4",
    "media3__drm_sample_fragmented_clearkey.mp4",
    "media3__hls_multi-segment_init.mp4",
    "media3__sample_audio_only.mp4",
    "media3__vp9_invalid-bitstream.webm",
    "moviepy__zero_bytes_result.webm",
}

CODECS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "h264": ("a.mp4", "libx264", {"bf": "3", "g": "8", "b-adapt": "0"}),
    "vp9": ("a.webm", "libvpx-vp9", {"g": "8"}),
}


# -- catalog ----------------------------------------------------------------------------------


def test_folders_are_listed_sorted_and_other_files_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "train/b/2.jpg", "train/a/1.PNG", "train/a/notes.txt", "val/c/1.jpeg")
    touch(tmp_path, "train/a/.hidden.jpg", "train/b/clip.mp4")
    found = scan_dataset("toy", section(tmp_path))
    assert found.class_names == ("a", "b", "c")
    assert found.train == (Sample("train/a/1.PNG", 0), Sample("train/b/2.jpg", 1))
    assert found.test == (Sample("val/c/1.jpeg", 2),)


def test_csv_files_that_are_missing_are_counted_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "v/1.mp4", "v/2.mp4")
    (tmp_path / "list.csv").write_text(
        "path,class,split\nv/2.mp4,run,train\nv/9.mp4,run,train\nv/1.mp4,jump,val\n"
    )
    found = scan_dataset("toy", section(tmp_path, "video", layout="csv", annotations="list.csv"))
    assert found.class_names == ("jump", "run")
    assert (found.train, found.test) == ((Sample("v/2.mp4", 1),), (Sample("v/1.mp4", 0),))
    assert (found.missing, found.missing_names) == (1, ("v/9.mp4",))


def test_csv_labels_that_are_numbers_keep_their_value(tmp_path: Path) -> None:
    touch(tmp_path, "1.mp4", "2.mp4")
    (tmp_path / "list.csv").write_text("path,label,split\n1.mp4,10,train\n2.mp4,2,val\n")
    changes = {"layout": "csv", "annotations": "list.csv", "num_classes": 11}
    found = scan_dataset("toy", section(tmp_path, "video", **changes))
    assert [s.label for s in found.train + found.test] == [10, 2]
    assert found.class_names[10] == "10"


def test_csv_without_the_columns_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file,kind\n1.mp4,run\n")
    with pytest.raises(ValueError, match="columns path, class"):
        scan_dataset("toy", section(tmp_path, "video", layout="csv", annotations="list.csv"))


def test_ssv2_official_files_give_the_official_numbers(tmp_path: Path) -> None:
    videos = "20bn-something-something-v2"
    touch(tmp_path, f"{videos}/7.webm", f"{videos}/8.webm", f"{videos}/9.webm")
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "labels.json").write_text(json.dumps({"Pulling something": "1", "Bending it": "0"}))
    train = [{"id": "7", "label": "pulling a cup", "template": "Pulling [something]"}]
    train += [{"id": "404", "label": "bending", "template": "Bending [it]"}]
    val = [{"id": "9", "label": "bending", "template": "Bending [it]"}]
    (labels / "train.json").write_text(json.dumps(train))
    (labels / "validation.json").write_text(json.dumps(val))
    found = scan_dataset("ssv2", section(tmp_path, "video", layout="ssv2"))
    assert found.class_names == ("Bending it", "Pulling something")
    assert found.train == (Sample(f"{videos}/7.webm", 1),)
    assert found.test == (Sample(f"{videos}/9.webm", 0),)
    assert found.missing == 1


def test_missing_data_names_the_key_to_set(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg")
    (tmp_path / "val" / "a").mkdir(parents=True)
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataMissing, match=r"vimnas\.data\.toy\.root"):
            scan_dataset("toy", section(root))


def test_more_classes_than_outputs_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{split}/{c}/1.jpg" for split in ("train", "val") for c in "abcd"))
    with pytest.raises(ValueError, match=r"4 classes found, but .*num_classes is 3"):
        scan_dataset("toy", section(tmp_path))


# -- splits -----------------------------------------------------------------------------------


def catalog(train: list[Sample], test: tuple[Sample, ...] = (), name: str = "toy") -> Catalog:
    return Catalog(name, Path("/"), ("a", "b"), tuple(sorted(train)), test)


def members(count: int, label: int = 0, prefix: str = "f") -> list[Sample]:
    return [Sample(f"train/{'ab'[label]}/{prefix}{i}.jpg", label) for i in range(count)]


def test_splits_are_disjoint_complete_and_of_the_asked_size() -> None:
    samples = members(200) + members(100, 1)
    splits = split_catalog(catalog(samples), 0.1)
    assert sorted(splits["train"] + splits["alpha"] + splits["select"]) == sorted(samples)
    for label, expected in ((0, 10), (1, 5)):
        for part in ("alpha", "select"):
            assert sum(s.label == label for s in splits[part]) == expected


def test_who_is_held_out_follows_from_a_hash_of_the_path_and_not_from_its_name() -> None:
    splits = split_catalog(catalog(members(100)), 0.2)
    ranked = sorted(members(100), key=lambda s: hashlib.sha1(s.path.encode()).digest())
    assert splits["alpha"] == sorted(ranked[:10])
    assert splits["select"] == sorted(ranked[-10:])


def test_files_added_later_move_at_most_one_neighbour_over_each_border() -> None:
    before = split_catalog(catalog(members(100) + members(50, 1)), 0.1)
    more = members(100) + members(50, 1) + members(1, prefix="new")
    after = split_catalog(catalog(more), 0.1)
    for part in ("alpha", "select"):
        assert [s for s in before[part] if s.label == 1] == [s for s in after[part] if s.label == 1]
        assert len(set(before[part]) - set(after[part])) <= 1
    assert not set(before["alpha"]) & set(after["select"])
    assert not set(before["select"]) & set(after["alpha"])


def test_small_datasets_still_hold_out_one_of_each() -> None:
    splits = split_catalog(catalog(members(2) + members(1, 1)), 0.01)
    assert [len(splits[part]) for part in ("train", "alpha", "select")] == [1, 1, 1]
    with pytest.raises(ValueError, match="at least 3"):
        split_catalog(catalog(members(2)), 0.1)


def test_a_video_stays_in_its_most_protected_split_of_all_datasets() -> None:
    def name(number: int, start: int = 1) -> str:
        return f"video-{number:05d}_{start:06d}_{start + 9:06d}.mp4"

    k400 = catalog(
        [Sample(f"train/a/{name(i)}", 0) for i in range(40)],
        tuple(Sample(f"val/a/{name(i)}", 0) for i in range(40, 45)),
        name="k400",
    )
    k600 = catalog(  # the same videos cut elsewhere, some of k400's test videos, and its own
        [Sample(f"train/b/{name(i, 200)}", 0) for i in range(100)],
        tuple(Sample(f"val/b/{name(i)}", 0) for i in range(95, 100)),
        name="k600",
    )
    before = {"k400": split_catalog(k400, 0.2), "k600": split_catalog(k600, 0.2)}
    after, dropped = drop_overlap(before)
    ids = {
        part: [{s.path.split("/")[-1][:11] for s in splits[part]} for splits in after.values()]
        for part in ("test", "select", "alpha", "train")
    }
    seen: set[str] = set()
    for part in ("test", "select", "alpha", "train"):
        assert not seen & set().union(*ids[part]), part
        seen |= set().union(*ids[part])
    assert [len(after[n]["test"]) for n in after] == [5, 5]
    assert dropped["k600"] >= 10  # its copies of both test sets at least
    sizes = {n: sum(len(v) for v in parts.values()) for n, parts in before.items()}
    left = {n: sum(len(v) for v in parts.values()) for n, parts in after.items()}
    assert {n: sizes[n] - left[n] for n in sizes} == dropped
    assert all(len(after[n][p]) > 0 for n in after for p in ("train", "alpha", "select"))


# -- order and draws --------------------------------------------------------------------------


def test_every_epoch_is_another_permutation() -> None:
    stream = Stream(3, "toy", "train")
    places = [locate(stream, 10, p) for p in range(20)]
    assert [epoch for epoch, _ in places] == [0] * 10 + [1] * 10
    first, second = [i for _, i in places[:10]], [i for _, i in places[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [i for _, i in (locate(Stream(3, "toy", "alpha"), 10, p) for p in range(10))] != first


def test_order_and_draws_never_change_between_versions_of_the_program() -> None:
    """A resumed run relies on these very numbers."""
    stream = Stream(0, "k400", "train")
    assert [locate(stream, 10, p)[1] for p in range(5)] == [7, 2, 6, 4, 5]
    draw = draw_sample(stream, 1, 2, section(None))
    assert draw.start == pytest.approx(0.9419807816205356, abs=1e-12)


def test_draws_are_pure_and_switches_leave_the_other_ingredients_alone() -> None:
    stream = Stream(1, "toy", "train")
    plain = [draw_sample(stream, 0, i, section(None)) for i in range(50)]
    rich_section = section(None, randaugment={"n": 2}, random_erasing=0.5)
    rich = [draw_sample(stream, 0, i, rich_section) for i in range(50)]
    assert rich == [draw_sample(stream, 0, i, rich_section) for i in range(50)]
    assert [(d.start, d.flip, d.crops) for d in plain] == [(d.start, d.flip, d.crops) for d in rich]
    assert {d.flip for d in plain} == {True, False}
    assert 10 < sum(d.erase.height > 0 for d in rich) < 40
    assert len({d.start for d in plain}) == 50
    assert draw_sample(stream, 1, 0, section(None)) != plain[0]
    assert draw_sample(Stream(2, "toy", "train"), 0, 0, section(None)) != plain[0]


def test_ssv2_and_directional_labels_are_never_flipped() -> None:
    stream = Stream(0, "ssv2", "train")
    for changes in ({"layout": "ssv2"}, {"directional_labels": True}):
        recipe = section(None, "video", **changes)
        assert not any(draw_sample(stream, 0, i, recipe).flip for i in range(64))


def test_magnitudes_follow_m_and_std() -> None:
    stream = Stream(0, "toy", "train")
    fixed = section(None, randaugment={"n": 3, "m": 9})
    assert {b for i in range(20) for b in draw_sample(stream, 0, i, fixed).bins} == {27}
    spread = section(None, randaugment={"n": 1, "m": 9, "std": 0.5})
    bins = [draw_sample(stream, 0, i, spread).bins[0] for i in range(500)]
    assert np.mean(bins) == pytest.approx(27, abs=0.3)
    assert np.std(bins) == pytest.approx(1.5, abs=0.3)


def test_crops_stay_inside_and_have_the_asked_area_and_ratio() -> None:
    stream = Stream(0, "toy", "train")
    recipe = section(None, crop_scale=(0.3, 0.6), crop_ratio=(0.75, 4 / 3))
    for i in range(300):
        w = draw_sample(stream, 0, i, recipe).window(320, 240)
        assert w.top >= 0
        assert w.left >= 0
        assert w.top + w.height <= 240
        assert w.left + w.width <= 320
        assert 0.29 < w.height * w.width / (320 * 240) < 0.61
        assert 0.74 < w.width / w.height < 1.35
    extreme = draw_sample(stream, 0, 0, recipe).window(1000, 2)
    assert extreme == Window(0, 498, 2, 3)  # no try fits: the central fallback
    assert draw_sample(stream, 0, 0, recipe).window(1, 1) == Window(0, 0, 1, 1)


def test_clip_times_start_in_the_slack_and_short_videos_at_zero() -> None:
    np.testing.assert_allclose(frame_times(10, 4, 2, 0.5), [4, 4.5, 5, 5.5])
    np.testing.assert_allclose(frame_times(10, 4, 2, 1.0), [8, 8.5, 9, 9.5])
    np.testing.assert_allclose(frame_times(1, 4, 2, 0.7), [0, 0.5, 1, 1.5])


# -- decoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_clips_are_exact_to_the_frame(tmp_path: Path, codec: str) -> None:
    name, encoder, options = CODECS[codec]
    video = encode(tmp_path / name, numbered(24), encoder, 12, **options)
    assert numbers(read_clip(video, 24, 12, 0.0)) == list(range(24))
    assert numbers(read_clip(video, 6, 12, 0.5)) == [9, 10, 11, 12, 13, 14]  # after a seek
    assert numbers(read_clip(video, 6, 12, 1.0)) == [18, 19, 20, 21, 22, 23]
    assert numbers(read_clip(video, 6, 4, 0.0)) == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("codec", CODECS)
def test_twelve_frames_a_second_sampled_at_24_show_each_twice(tmp_path: Path, codec: str) -> None:
    name, encoder, options = CODECS[codec]
    video = encode(tmp_path / name, numbered(24), encoder, 12, **options)
    assert numbers(read_clip(video, 8, 24, 0.0)) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_short_clips_repeat_their_last_frame(tmp_path: Path) -> None:
    video = encode(tmp_path / "a.mp4", numbered(3))
    for start in (0.0, 0.5, 1.0):
        assert numbers(read_clip(video, 6, 12, start)) == [0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")])
def test_a_variable_frame_rate_is_followed_by_its_timestamps(
    tmp_path: Path, name: str, codec: str
) -> None:
    ticks = [0, 100, 150, 700, 800, 1500]
    video = encode(tmp_path / name, numbered(6), codec, 10, ticks)
    wanted = np.arange(14) / 10
    shown = [max(i for i, tick in enumerate(ticks) if tick / 1000 <= t + 1e-6) for t in wanted]
    assert numbers(read_clip(video, 14, 10, 0.0)) == shown


def test_a_first_timestamp_that_is_not_zero_does_not_shift_the_clip(tmp_path: Path) -> None:
    ticks = [5000 + 100 * i for i in range(10)]
    video = encode(tmp_path / "a.mkv", numbered(10), "libx264", 10, ticks, bf="0")
    assert numbers(read_clip(video, 4, 10, 0.0)) == [0, 1, 2, 3]
    assert numbers(read_clip(video, 4, 10, 1.0)) == [6, 7, 8, 9]


def test_a_seek_that_lands_too_late_is_made_good(tmp_path: Path) -> None:
    video = encode(tmp_path / "a.ts", numbered(30), g="6")  # MPEG-TS is sought by decoding time
    for start, first in ((0.25, 6), (0.5, 13), (1.0, 26)):
        assert numbers(read_clip(video, 4, 12, start)) == [first, first + 1, first + 2, first + 3]


def test_only_the_crop_of_the_upright_picture_is_kept(tmp_path: Path) -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[8:24, 32:48] = color = (230, 120, 30)
    video = encode(tmp_path / "a.mp4", [picture] * 4, crf="1")
    sizes: list[tuple[int, int]] = []

    def cut(width: int, height: int) -> Cut:
        sizes.append((width, height))
        return Cut(Window(10, 34, 8, 12), 8, 12)

    clip = read_clip(video, 2, 12, 0.0, cut)
    assert sizes == [(64, 48)]
    assert clip.shape == (2, 3, 8, 12)
    assert np.abs(clip - np.array(color)[:, None, None]).max() < 8


def test_parts_are_scaled_as_an_exact_resize_would(tmp_path: Path) -> None:
    """Against Pillow's filter of the same shape on the whole frame; grey, for chroma is coarser."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8)).astype(np.uint8))
    picture = np.asarray(small.resize((161, 121), Image.Resampling.BICUBIC).convert("RGB"))
    video = encode(tmp_path / "a.mkv", [picture] * 2, "ffv1", 12)
    whole = Image.fromarray(read_clip(video, 1, 12, 0.0)[0].transpose(1, 2, 0))
    assert whole.size == (161, 121)  # odd borders are kept
    for window, size in (
        (Window(10, 20, 80, 100), (32, 32)),
        (Window(0, 0, 121, 161), (40, 53)),
        (Window(30, 40, 20, 24), (32, 32)),
    ):
        part = Cut(window, *size)
        clip = read_clip(video, 1, 12, 0.0, lambda w, h, part=part: part)[0]
        clip = clip.transpose(1, 2, 0)
        w = window
        box = (w.left, w.top, w.left + w.width, w.top + w.height)
        expected = whole.resize(size[::-1], Image.Resampling.BILINEAR, box=box)
        error = np.abs(clip.astype(int) - np.asarray(expected))
        assert clip.shape[:2] == size
        assert error.mean() < 0.6, window
        assert error.max() < 6, window


@pytest.mark.parametrize("turn", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)])
def test_the_part_of_a_turned_frame_is_that_of_the_upright_picture(
    turn: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    picture = np.asarray(small.resize((64, 48), Image.Resampling.BICUBIC))
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
    monkeypatch.setattr(convert, "orientation", lambda _: tuple(map(bool, turn)))
    upright = converted(convert.Converter(frame, None), frame)
    width, height = upright.shape[:0:-1]
    assert (width, height) == ((48, 64) if turn[0] else (64, 48))
    part = Cut(Window(4, 10, 24, 30), 24, 30)
    sizes = []

    def cut(width: int, height: int) -> Cut:
        sizes.append((width, height))
        return part

    found = converted(convert.Converter(frame, cut), frame)
    assert sizes == [(width, height)]
    np.testing.assert_array_equal(found[:, 2:-2, 2:-2], upright[:, 6:26, 12:38])


def converted(convert_: convert.Converter, frame: av.VideoFrame) -> np.ndarray:
    out = np.empty((3, *convert_.size), np.uint8)
    convert_(frame, out)
    return out


def exhaustive(path: Path, frames: int, fps: float, start: float) -> np.ndarray:
    """The clip by the definition: decode everything, then look up each time."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        shown = [(float(f.pts * stream.time_base), f) for f in container.decode(stream)]
        end = float((stream.start_time + stream.duration) * stream.time_base)
    shown.sort(key=lambda pair: pair[0])
    first = shown[0][0]
    times = first + frame_times(end - first, frames, fps, start) + decode.TOLERANCE
    chosen = [max((i for i, (t, _) in enumerate(shown) if t <= w), default=0) for w in times]
    picture = convert.Converter(shown[0][1], None)
    return np.stack([converted(picture, shown[i][1]) for i in chosen])


@pytest.mark.parametrize("even", [True, False])
def test_clips_equal_exhaustive_decoding_while_unseen_frames_are_passed_over(
    tmp_path: Path, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H.264 with B-frames (as references and not), even and uneven frame times, any rate."""
    rng = np.random.default_rng(5)
    noise = [rng.integers(0, 255, (12, 16, 3)).astype(np.uint8) for _ in range(60)]
    pictures = [np.kron(n, np.ones((4, 4, 1), np.uint8)) for n in noise]
    ticks = [40 * i for i in range(60)] if even else np.cumsum(rng.integers(5, 120, 60)).tolist()
    options = {"bf": "3", "g": "20", "b-adapt": "0", "b-pyramid": "normal", "crf": "30"}
    video = encode(tmp_path / "a.mp4", pictures, "libx264", 25, ticks, **options)
    told: list[int] = []
    confirm = skip.Skipper.confirm

    def spy(self: skip.Skipper, shown: list[float]) -> None:
        told.append(self.skipped)
        confirm(self, shown)

    monkeypatch.setattr(skip.Skipper, "confirm", spy)
    for frames, fps, start in ((8, 5, 0.4), (16, 12.5, 0.0), (8, 12.5, 1.0), (70, 25, 0.3)):
        clip = read_clip(video, frames, fps, start)
        np.testing.assert_array_equal(clip, exhaustive(video, frames, fps, start))
    assert len(told) == 4  # none had to be read again
    assert told[0] > 10
    assert told[3] < 10 or not even


@needs_awkward
def test_passing_over_frames_changes_no_awkward_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def clips() -> dict[tuple[str, float], bytes]:
        return {
            (path.name, start): read_clip(path, 8, 8, start, lambda w, h: part).tobytes()
            for path in sorted(AWKWARD.iterdir())
            if path.suffix == ".mp4" and path.name not in UNUSABLE
            for start in (0.0, 0.4, 1.0)
        }

    part = Cut(Window(0, 0, 1, 1), 16, 16)
    with_skipping = clips()
    monkeypatch.setattr(skip, "CODECS", frozenset())
    assert clips() == with_skipping


def test_a_truncated_video_gives_clips_of_what_is_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 60, (48, 64, 3)).astype(np.uint8) + f // 2 for f in numbered(24)]
    video = encode(tmp_path / "a.mp4", noise, container={"movflags": "faststart"})
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) * 6 // 10])
    clip = read_clip(video, 4, 12, 1.0)  # the header promises that these frames exist
    assert clip.shape == (4, 3, 48, 64)
    assert len({frame.tobytes() for frame in clip}) >= 3  # the very last packet may be damaged


@pytest.mark.parametrize("content", [b"", b"this is not a video", bytes(4000)])
def test_files_that_are_not_videos_are_bad(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(BadVideo, match=r"a\.mp4"):
        read_clip(tmp_path / "a.mp4", 4, 8, 0.5)
    with pytest.raises(BadVideo, match=r"a\.mp4"):
        read_clip(tmp_path / "missing_a.mp4", 4, 8, 0.5)


@needs_awkward
def test_awkward_files_are_usable_or_bad_in_bounded_time() -> None:
    bad = set()
    for path in sorted(AWKWARD.iterdir()):
        for start in (0.0, 0.5, 1.0):
            begin = time.process_time()
            try:
                clip = read_clip(path, 8, 8, start, lambda w, h: Cut(Window(0, 0, h, w), 48, 64))
                assert clip.shape[0] == 8
            except BadVideo:
                bad.add(path.name)
            assert time.process_time() - begin < 5, path.name
    assert bad == UNUSABLE


@needs_awkward
def test_rotated_videos_come_upright() -> None:
    clip = read_clip(AWKWARD / "media3__sample_rotate_and_reflect.mp4", 2, 8, 0.0)
    stored = read_clip(AWKWARD / "media3__sample_fragmented.mp4", 2, 8, 0.0)  # the same, unrotated
    assert clip.shape[2:] == (1080, 720)
    assert np.abs(clip.swapaxes(2, 3).astype(int) - stored).mean() < 3


def test_frame_numbers_for_the_gpu_are_those_that_pyav_shows(tmp_path: Path) -> None:
    for name, codec, options in CODECS.values():
        video = encode(tmp_path / name, numbered(24), codec, 12, **options)
        for frames, fps, start in ((8, 24, 0.0), (6, 12, 0.5), (6, 4, 1.0), (40, 12, 0.3)):
            clip = read_encoded(video, frames, fps, start)
            assert clip is not None
            assert clip.numbers.tolist() == numbers(read_clip(video, frames, fps, start))
            assert (clip.width, clip.height) == (64, 48)


# -- images -----------------------------------------------------------------------------------


def test_broken_images_are_bad_and_sound_ones_give_their_upright_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3)).astype(np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=turned)
    assert read_image(tmp_path / "turned.jpg", verify=True)[1:] == (40, 60)
    picture.save(tmp_path / "good.jpg")
    good = (tmp_path / "good.jpg").read_bytes()
    picture.save(tmp_path / "good.png")
    png = (tmp_path / "good.png").read_bytes()
    for content in (good[: len(good) // 2], b"", b"text", bytes(100), png[: len(png) // 2]):
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(BadFile, match=r"bad\.jpg"):
            read_image(tmp_path / "bad.jpg", verify=True)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tif", "cmyk.jpg", "palette.png"])
def test_unusual_formats_reach_dali_as_bmp(tmp_path: Path, name: str) -> None:
    picture = Image.new("RGB", (20, 10), (200, 30, 40))
    mode = {"cmyk.jpg": "CMYK", "palette.png": "P"}.get(name, "RGB")
    picture.convert(mode).save(tmp_path / name)
    data, width, height = read_image(tmp_path / name, verify=True)
    assert data[:2].tobytes() == b"BM"
    assert (width, height) == (20, 10)
