"""The dataset index: layouts, verdicts, resuming, what is refused and how it is mended."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scripts import index_data
from tests.conftest import ROOT, SHARED_DATA
from tests.media import encode, numbered, numbers, section
from vimnas_ds.config import DataSection, DatasetSection
from vimnas_ds.data import index_file, probe_pool
from vimnas_ds.data.bad import BadAnnotations, BadFile, DataMissing, UnfitIndex
from vimnas_ds.data.catalog import Sample, scan_dataset
from vimnas_ds.data.decode import read_clip
from vimnas_ds.data.encoded import read_encoded, read_indexed
from vimnas_ds.data.imagenet import _synsets
from vimnas_ds.data.index import open_index, video_facts
from vimnas_ds.data.index_build import Built, build_index
from vimnas_ds.data.index_file import Header, Row, read_header, read_rows, write_rows
from vimnas_ds.data.joint import open_datasets
from vimnas_ds.data.layouts import _inside
from vimnas_ds.data.prepare import FilePreparer, View
from vimnas_ds.data.probe import TIMED_OUT, UNREADABLE, UNUSABLE, USABLE, Verdict, probe_file
from vimnas_ds.data.probe_pool import ProbeLimits, probe_files
from vimnas_ds.data.timeline import Timeline
from vimnas_ds.data.view_decode import read_views
from vimnas_ds.data.views import ViewPlan
from vimnas_ds.report.console import Console
from vimnas_ds.search.run import thin_out

AWKWARD = SHARED_DATA / "awkward"
LIMITS = ProbeLimits(workers=2)


def pictures(root: Path, train: int = 4, test: int = 2) -> DatasetSection:
    """Class folders with small sound images, and the section that reads them."""
    for split, count in (("train", train), ("val", test)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8 + i, 6), (i, 0, 0)).save(path)
    return section(root)


def clips(root: Path, train: int = 4, test: int = 1) -> DatasetSection:
    """As `pictures`, with videos."""
    for split, count in (("train", train), ("val", test)):
        for i in range(count):
            encode(root / split / "ab"[i % 2] / f"{i}.mp4", numbered(6), g="3")
    return section(root, "video")


def joint(dataset: DatasetSection, folder: Path, name: str = "toy") -> DataSection:
    return DataSection(datasets={name: dataset}, index_dir=folder / "indexes", held_out=0.25)


def build(dataset: DatasetSection, folder: Path, **options: Any) -> Built:
    file = folder / "indexes" / "toy.parquet"
    file.parent.mkdir(exist_ok=True)
    limits = options.pop("limits", LIMITS)
    return build_index("toy", dataset, file, limits, show=False, **options)


# -- timestamps -------------------------------------------------------------------------------


def test_timestamps_come_back_exactly_and_constant_rates_cost_four_bytes() -> None:
    rng = np.random.default_rng(0)
    wild = np.cumsum(rng.integers(1, 90_000, 500)) - 1234
    line = Timeline.pack(wild.tolist(), int(wild[-1]) + 7, Fraction(1, 90_000))
    assert line.ticks().tolist() == wild.tolist()
    assert line.duration == pytest.approx((wild[-1] + 7 - wild[0]) / 90_000, abs=1e-9)
    steady = Timeline.pack(list(range(0, 300 * 512, 512)), 300 * 512, Fraction(1, 15_360))
    assert len(steady.deltas) == 4
    np.testing.assert_allclose(steady.seconds(), np.arange(300) / 30, atol=1e-12)
    assert steady.duration == pytest.approx(10)
    with pytest.raises(ValueError, match="too far apart"):
        Timeline.pack([0, 2**40], 2**40, Fraction(1, 1000))


@pytest.mark.parametrize(
    ("name", "codec", "ticks"),
    [
        ("a.mp4", "libx264", None),
        ("a.webm", "libvpx-vp9", None),
        ("v.mp4", "libx264", [0, 100, 150, 700, 800, 1500] + [1600 + 90 * i for i in range(18)]),
    ],
)
def test_frame_numbers_from_the_index_are_those_that_pyav_shows(
    tmp_path: Path, name: str, codec: str, ticks: list[int] | None
) -> None:
    video = encode(tmp_path / name, numbered(24), codec, 12, ticks)
    facts = video_facts(probe_file(video, is_image=False))
    assert facts is not None
    for frames, fps, start in ((8, 24, 0.0), (6, 12, 0.5), (6, 4, 1.0), (40, 12, 0.3)):
        clip = read_indexed(video, facts, frames, fps, start)
        scanned = read_encoded(video, frames, fps, start)
        assert clip is not None
        assert scanned is not None
        assert clip.numbers.tolist() == scanned.numbers.tolist()
        assert clip[2:] == scanned[2:] == (64, 48)
        if ticks is None:
            assert clip.numbers.tolist() == numbers(read_clip(video, frames, fps, start))
    video.write_bytes(video.read_bytes() + b"more")  # the index no longer knows this file
    assert read_indexed(video, facts, 8, 24, 0.0) is None


def test_the_gpu_path_feeds_the_same_clip_with_an_index_and_without(tmp_path: Path) -> None:
    dataset = clips(tmp_path / "data")
    samples = open_datasets(joint(dataset, tmp_path), gpu=True).splits["toy"]["train"]
    assert all(s.video is not None for s in samples)
    bare = open_datasets(joint(dataset, tmp_path)).splits["toy"]["train"]
    assert bare == [s._replace(video=None) for s in samples]
    for place in (0.0, 0.4, 1.0):
        with_index, without = (
            FilePreparer("toy", dataset, some, gpu=True).evaluate(0, View(place))
            for some in (samples, bare)
        )
        assert with_index.keys() == without.keys() == {"encoded", "numbers", "place"}
        for key, value in with_index.items():
            np.testing.assert_array_equal(value, without[key])
    (tmp_path / "data" / samples[0].path).unlink()
    with pytest.raises(BadFile, match="No such file"):
        FilePreparer("toy", dataset, samples, gpu=True).evaluate(0, View())


# -- verdicts ---------------------------------------------------------------------------------

BROKEN = "Invalid data found when processing input"
VERDICTS: dict[str, tuple[str, str, tuple[int, int], int | None]] = {
    "-video-with-dash-.mp4": (USABLE, "h264", (1, 1), 5),
    "decord__corrupted.mp4": (USABLE, "h264", (1280, 720), 50),
    "derived__text_file_named.mp4": (BROKEN, "", (0, 0), None),
    "derived__truncated_60pct_faststart_arm_wrestling.mp4": (USABLE, "h264", (340, 256), 168),
    "derived__truncated_half_test.avi": (USABLE, "mpeg4", (320, 240), 78),
    "media3__drm_sample_fragmented_clearkey.mp4": (BROKEN, "", (0, 0), None),
    "media3__hls_multi-segment_init.mp4": ("the video stream is empty", "", (0, 0), None),
    "media3__sample_android_slow_motion.mp4": (USABLE, "h264", (1280, 720), 7),
    "media3__sample_audio_only.mp4": ("no video stream", "", (0, 0), None),
    "media3__sample_fragmented.mp4": (USABLE, "h264", (1080, 720), 30),
    "media3__sample_rotate_and_reflect.mp4": (USABLE, "h264", (720, 1080), 30),
    "media3__vp9_bear-vp9-odd-dimensions.webm": (USABLE, "vp9", (161, 121), 30),
    "media3__vp9_invalid-bitstream.webm": (f"corrupt: {BROKEN}", "", (0, 0), None),
    "media3__vp9_roadtrip-vp92-10bit.webm": (USABLE, "vp9", (426, 240), 77),
    "mmaction2__demo_arm_wrestling.mp4": (USABLE, "h264", (340, 256), 280),
    "mmaction2__test.avi": (USABLE, "mpeg4", (320, 240), 164),
    "moviepy__no_duration.webm": (USABLE, "vp9", (1280, 720), 74),
    "moviepy__video_with_failing_audio.mp4": (USABLE, "h264", (640, 360), 280),
    "moviepy__zero_bytes_result.webm": ("empty file", "", (0, 0), None),
    "mp4parse__tiny_av1.mp4": (USABLE, "av1", (64, 64), 1),
    "torchcodec__av1_video.mkv": (USABLE, "av1", (640, 360), 125),
    "torchcodec__h265_video.mp4": (USABLE, "hevc", (128, 128), 10),
}


@pytest.mark.skipif(not AWKWARD.is_dir(), reason=f"no files in {AWKWARD}")
def test_every_awkward_file_has_its_verdict_and_no_handle_stays_open() -> None:
    names = sorted(VERDICTS)
    assert names == sorted(p.name for p in AWKWARD.iterdir())
    begun = time.monotonic()
    found = dict(probe_files(AWKWARD, names, False, LIMITS))
    assert time.monotonic() - begun < 60
    for name, (state, codec, size, frames) in VERDICTS.items():
        v = found[name]
        known = (v.state if v.state == USABLE else v.reason, v.codec, (v.width, v.height))
        assert known == (state, codec, size), name
        assert (v.timeline.frames if v.timeline else None) == frames, name
    turned = found["media3__sample_rotate_and_reflect.mp4"]
    assert (turned.rotation, turned.mirrored) == (270, True)
    assert found["media3__sample_fragmented.mp4"].duration == pytest.approx(1.001, abs=1e-3)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for name in names:
        probe_file(AWKWARD / name, is_image=False)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_what_is_no_sound_file_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "gone.mp4").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")
    expected = {
        "empty.mp4": (UNUSABLE, "empty file"),
        "text.mp4": (UNUSABLE, BROKEN),
        "text.jpg": (UNUSABLE, "not an image"),
        "gone.mp4": (UNREADABLE, "No such file or directory"),
        "pipe.mp4": (UNUSABLE, "not a regular file"),
    }
    for name, verdict in expected.items():
        found = probe_file(tmp_path / name, is_image=name.endswith("jpg"))
        assert (found.state, found.reason) == verdict, name


def test_a_video_damaged_in_its_middle_is_not_usable(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (48, 64, 3)).astype(np.uint8) for _ in range(60)]
    video = encode(tmp_path / "a.mp4", noise, rate=10, g="10", bf="0")
    assert probe_file(video, is_image=False).state == USABLE
    data = bytearray(video.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    video.write_bytes(bytes(data))
    found = probe_file(video, is_image=False)
    assert (found.state, found.reason) == (
        UNUSABLE,
        "nothing can be decoded in the middle second",
    )


def test_only_thorough_looks_find_an_image_that_breaks_off(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.jpg"
    Image.fromarray(rng.integers(0, 256, (64, 48, 3)).astype(np.uint8)).save(path)
    whole = path.read_bytes()
    assert probe_file(path, is_image=True, thorough=True).state == USABLE
    path.write_bytes(whole[: len(whole) // 2])
    header = probe_file(path, is_image=True)
    assert (header.state, header.width, header.height) == (USABLE, 48, 64)
    assert probe_file(path, is_image=True, thorough=True).state == UNUSABLE


def children() -> list[int]:
    """This process's probing children, by their parent's number in /proc/PID/stat."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z" and b"probe_worker" in command:
            found.append(int(stat.parent.name))
    return found


def test_a_process_that_dies_or_stops_costs_at_most_the_file_it_is_at(tmp_path: Path) -> None:
    names = [f"{i}.mp4" for i in range(20)]
    for name in names:
        encode(tmp_path / name, numbered(4))
    for kill, spoilt in ((signal.SIGKILL, 0), (signal.SIGSTOP, 1)):
        running = probe_files(tmp_path, names, False, ProbeLimits(1, seconds=2))
        found = dict([next(running)])
        (pid,) = children()
        os.kill(pid, kill)
        found |= dict(running)
        assert sorted(found) == sorted(names)
        bad = [v for v in found.values() if v.state != USABLE]
        assert len(bad) == spoilt
        assert all("time limit" in v.reason for v in bad)
        assert not children()


def test_a_file_that_takes_its_process_with_it_twice_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (360, 640, 3)).astype(np.uint8) for _ in range(24)]
    slow = encode(tmp_path / "slow.mp4", noise)
    encode(tmp_path / "fine.mp4", numbered(4))
    found: dict[str, Verdict] = {}
    paths = ["slow.mp4", "fine.mp4"]
    run = threading.Thread(
        target=lambda: found.update(probe_files(tmp_path, paths, False, ProbeLimits(1)))
    )
    run.start()
    killed: set[int] = set()
    while run.is_alive():
        for pid in set(children()) - killed:
            if holds(pid, slow):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
    assert len(killed) == 2
    assert (found["slow.mp4"].state, found["slow.mp4"].reason) == (UNUSABLE, "the decoder crashed")
    assert found["fine.mp4"].state == USABLE


def holds(pid: int, file: Path) -> bool:
    """Whether a process has a file open."""
    try:
        links = [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    return file in links


# -- the file ---------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_also_with_odd_names(tmp_path: Path) -> None:
    line = Timeline.pack([5, 9, 30], 40, Fraction(1, 1000))
    video = Verdict(USABLE, "", 9, 8, "mp4", "h264", "yuv420p", 4, 6, 90, True, line, 0.035)
    names = ["-dash.mp4", 'a b\'s "c", d.mp4', "ü/日本.mp4", os.fsdecode(b"raw\xff.mp4")]
    rows = [Row(name, "train", i, video) for i, name in enumerate(names)]
    rows.append(Row("gone.mp4", "test", 3, Verdict("missing", "not on the disk")))
    header = Header("toy", "/data", {"kind": "video"}, "digest")
    write_rows(tmp_path / "i.parquet", header, rows)
    found = list(read_rows(tmp_path / "i.parquet"))
    assert index_file.read_header(tmp_path / "i.parquet") == header
    assert [r.path for r in found] == [*names[:3], r"raw\xff.mp4", "gone.mp4"]
    assert [r[1:] for r in found] == [r[1:] for r in rows]


def test_timestamps_of_one_index_may_exceed_32_bits_and_older_files_are_read(
    tmp_path: Path,
) -> None:
    file = tmp_path / "i.parquet"
    lines = [Timeline.pack([0, 9, i + 20], i + 40, Fraction(1, 1000)) for i in range(3)]
    row = Verdict(USABLE, "", 9, 8, "mp4", "h264", "yuv420p", 4, 6)
    rows = [
        Row(f"{i}.mp4", "train", 0, replace(row, timeline=line, duration=line.duration))
        for i, line in enumerate(lines)
    ]
    write_rows(file, Header("toy", "/data", {}, "digest"), rows)
    table = pq.read_table(file)
    assert table["deltas"].chunk(0).offsets.type == pa.int64()
    place = table.schema.get_field_index("deltas")
    narrow = table["deltas"].cast(pa.list_(pa.int32()))
    pq.write_table(table.set_column(place, "deltas", narrow), file)
    assert pq.read_table(file)["deltas"].chunk(0).offsets.type == pa.int32()
    assert list(read_rows(file)) == rows


def test_files_with_odd_names_are_indexed_and_trained_on(tmp_path: Path) -> None:
    root, odd = tmp_path / "data", os.fsdecode(b"raw\xff")
    for name in ("-dash", 'a b\'s "c", d', "ü日本", odd):
        encode(root / "train" / odd / f"{name}.mp4", numbered(4))
    encode(root / "val" / odd / "x.mp4", numbered(4))
    data = open_datasets(joint(section(root, "video"), tmp_path), gpu=True)
    assert sum(len(data.splits["toy"][p]) for p in ("train", "alpha", "select")) == 4
    assert all(s.video is not None for part in data.splits["toy"].values() for s in part)
    parts = data.splits["toy"]
    assert len(thin_out(parts["train"] + parts["alpha"] + parts["select"], 3)) == 3
    console = Console(10, 0, tmp_path / "train.log", enabled=True)
    console.say(f"replaced: {odd}.mp4")
    assert r"replaced: raw\udcff.mp4" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_names_like_options_or_addresses_are_read_from_a_relative_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("pipe:0.mp4", "-y.mp4", "http:x.mp4", "file:x.mp4", "a%20b?c#d.mp4")
    samples = [Sample(name, 0) for name in names]
    for sample in samples:
        encode(tmp_path / sample.path, numbered(4))
    files = FilePreparer("toy", section(Path(), "video"), samples, gpu=False)
    for index in range(len(samples)):
        assert numbers(files.evaluate(index, View())["frames"])[0] == 0
        assert read_encoded(Path(samples[index].path), 4, 8.0, 0.0) is not None
        assert probe_file(Path(samples[index].path), is_image=False).state == USABLE


# -- building ---------------------------------------------------------------------------------


def test_only_changed_and_new_files_are_probed_again(tmp_path: Path) -> None:
    dataset = clips(tmp_path / "data")
    first = build(dataset, tmp_path)
    assert (first.probed, first.kept) == (5, 0)
    again = build(dataset, tmp_path)
    assert (again.probed, again.kept, again.rows) == (0, 5, first.rows)
    encode(tmp_path / "data/train/a/0.mp4", numbered(9))
    changed = build(dataset, tmp_path)
    assert (changed.probed, changed.kept) == (1, 4)
    assert [r.path for r, old in zip(changed.rows, first.rows, strict=True) if r != old] == [
        "train/a/0.mp4"
    ]
    encode(tmp_path / "data/train/a/new.mp4", numbered(4))
    assert build(dataset, tmp_path).probed == 1
    assert build(dataset, tmp_path, recheck=True).probed == 6
    assert build(dataset, tmp_path, limit=3).header.limit == 3


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(tmp_path: Path) -> None:
    dataset = clips(tmp_path / "data", train=60)
    whole = build(dataset, tmp_path)
    other = tmp_path / "killed"
    parts = other / "indexes" / "toy.parquet.parts"
    program = (
        "import sys, time; from pathlib import Path; from vimnas_ds.data import index_build as b\n"
        "from vimnas_ds.data.probe_pool import ProbeLimits; from tests.media import section\n"
        "b.PART_FILES = 5; root, file = map(Path, sys.argv[1:]); write = b.write_rows\n"
        "b.write_rows = lambda *part: (write(*part), time.sleep(60))\n"
        "b.build_index('toy', section(root, 'video'), file, ProbeLimits(1), show=False)\n"
    )
    file = other / "indexes" / "toy.parquet"
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "data"), str(file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 60
    while not list(parts.glob("0*.parquet")):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    run.kill()
    run.wait()
    assert not file.exists()
    resumed = build(dataset, other)
    assert resumed.kept >= 5
    assert resumed.probed >= 1
    assert resumed.rows == whole.rows
    assert list(read_rows(file)) == whole.rows
    assert not parts.exists()


def test_two_processes_at_once_build_one_index(tmp_path: Path) -> None:
    clips(tmp_path / "data", train=12)
    program = (
        "import sys; from pathlib import Path; from tests.test_index import joint\n"
        "from tests.media import section; from vimnas_ds.data.joint import open_datasets\n"
        "folder = Path(sys.argv[1])\n"
        "data = open_datasets(joint(section(folder / 'data', 'video'), folder))\n"
        "print(data.fingerprint())\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sum(err.count("building it from 13 files") for _, err in outputs) == 1
    assert outputs[0][0] == outputs[1][0]


# -- training reads it ------------------------------------------------------------------------


def test_a_trial_never_replaces_a_finished_index(tmp_path: Path, capsys: Any) -> None:
    dataset = pictures(tmp_path / "data", train=8)
    (tmp_path / "data/train/a/bad.jpg").write_text("text")
    config = json.loads((ROOT / "ds_configs" / "weizmann_cifar10.json").read_text())
    config["vimnas"]["data"]["datasets"]["cifar10"].update(
        root=str(dataset.root), test_split="val", num_classes=2
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    command = ["--deepspeed_config", str(file), "--dataset", "cifar10", "--workers", "1"]
    command += ["--index_dir", str(tmp_path / "indexes")]
    assert index_data.main(command) == 0
    assert "warning: 1 of 11 files are unusable, more than 5%" in capsys.readouterr().err
    index = tmp_path / "indexes" / "cifar10.parquet"
    whole = index.read_bytes()
    assert index_data.main([*command, "--limit", "3"]) == 2
    assert f"{index} is a finished index" in capsys.readouterr().err
    assert index.read_bytes() == whole


def test_what_is_likely_not_meant_is_said(tmp_path: Path) -> None:
    def doubts(train: int, classes: int) -> list[str]:
        name = f"of{train}_{classes}"
        dataset = pictures(tmp_path / name, train).model_copy(update={"num_classes": classes})
        data = open_datasets(joint(dataset, tmp_path, name))
        assert (len(data.splits[name]["select"]) < 30) == (train < 200)
        return data.doubts()

    assert doubts(240, 2) == []
    (few,) = doubts(40, 2)
    assert "samples: scores on them mean little" in few
    (more,) = doubts(240, 5)
    assert "2 classes found, vimnas.data.of240_5.num_classes is 5: 3 of its head" in more


def test_unusable_files_never_reach_a_split_and_are_counted(tmp_path: Path) -> None:
    dataset = pictures(tmp_path / "data", train=8)
    (tmp_path / "data/train/a/bad.jpg").write_text("text")
    (tmp_path / "data/train/b/empty.jpg").touch()
    data = open_datasets(joint(dataset, tmp_path))
    used = {s.path for part in data.splits["toy"].values() for s in part}
    assert len(used) == 10
    assert data.unusable["toy"] == {
        "train/a/bad.jpg": "not an image",
        "train/b/empty.jpg": "empty file",
    }
    assert "2 unusable files left out (first: train/a/bad.jpg: not an image)" in data.describe()[0]
    (tmp_path / "data/val/a/0.png").write_text("x")
    (tmp_path / "data/val/b/1.png").write_text("x")
    build(dataset, tmp_path)
    with pytest.raises(DataMissing, match=r'no usable file in the split "val".*not an image'):
        open_datasets(joint(dataset, tmp_path))


def test_official_test_files_that_cannot_be_scored_are_known_with_their_reasons(
    tmp_path: Path,
) -> None:
    root = tmp_path / "data"
    pictures(root, test=3)
    (root / "val/b/1.png").write_text("text")
    rows = [f"train/{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]},train" for i in range(5)]
    rows += ["val/a/0.png,a,val", "val/b/1.png,b,val", "val/a/2.png,a,val", "val/a/9.png,a,val"]
    (root / "list.csv").write_text("path,class,split\n" + "".join(f"{row}\n" for row in rows))
    data = open_datasets(joint(section(root, layout="csv", annotations="list.csv"), tmp_path))
    assert data.untested == {
        "toy": {"val/b/1.png": "not an image", "val/a/9.png": "not on the disk"}
    }
    assert len(data.splits["toy"]["test"]) == 2


def test_more_unusable_files_than_allowed_stop_the_run_before_any_work(tmp_path: Path) -> None:
    dataset = pictures(tmp_path / "data", train=45, test=1)
    for name, content in (("bad", "text"), ("worse", "text"), ("empty", "")):
        (tmp_path / f"data/train/a/{name}.jpg").write_text(content)
    data = joint(dataset, tmp_path).model_copy(update={"max_bad_share": 0.05})
    assert len(open_datasets(data).unusable["toy"]) == 3  # of 49 files: too few
    Image.new("RGB", (8, 6)).save(tmp_path / "data/val/a/1.png")
    build(dataset, tmp_path)
    with pytest.raises(DataMissing) as caught:
        open_datasets(data)
    words = str(caught.value)
    assert "toy: 3 of 50 files are unusable" in words
    assert words.index("2 files: not an image") < words.index("1 files: empty file")
    assert "train/a/bad.jpg: not an image" in words
    assert f"--update {tmp_path}/indexes/toy.parquet" in words
    assert "raise vimnas.data.max_bad_share" in words
    open_datasets(data.model_copy(update={"max_bad_share": 0.06}))


def test_annotated_files_that_are_not_there_are_no_bad_files(tmp_path: Path) -> None:
    pictures(tmp_path / "data", train=46, test=4)
    rows = [f"train/{'ab'[i % 2]}/{i}.png,a,train" for i in range(100)]
    rows += [f"val/{'ab'[i % 2]}/{i}.png,a,val" for i in range(100)]
    (tmp_path / "data/list.csv").write_text("path,class,split\n" + "\n".join(rows))
    dataset = section(tmp_path / "data", layout="csv", annotations="list.csv")
    assert build(dataset, tmp_path).unusable() == {}
    assert open_datasets(joint(dataset, tmp_path)).catalogs["toy"].missing == 150


def unfit(dataset: DatasetSection, folder: Path) -> str:
    """The words in which training refuses the index."""
    with pytest.raises(UnfitIndex) as caught:
        open_datasets(joint(dataset, folder))
    return str(caught.value)


def mend(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the command that the words name."""
    command = shlex.split(words.partition("Mend it: ")[2])
    assert command[:2] == ["python", "scripts/index_data.py"]
    assert index_data.main(command[2:]) == 0, capsys.readouterr().err


def test_an_index_that_no_longer_fits_is_refused_and_its_command_mends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "some data"
    dataset = pictures(root)
    open_datasets(joint(dataset, tmp_path))
    new = root / "train/a/new.png"
    Image.new("RGB", (5, 5)).save(new)
    words = unfit(dataset, tmp_path)
    assert "1 file added (first: train/a/new.png)" in words
    mend(words, capsys)
    open_datasets(joint(dataset, tmp_path))
    Image.new("RGB", (50, 50), (1, 2, 3)).save(new)
    words = unfit(dataset, tmp_path)
    assert "1 file changed (first: train/a/new.png)" in words
    mend(words, capsys)
    new.unlink()
    words = unfit(dataset, tmp_path)
    assert "1 file no longer there (first: train/a/new.png)" in words
    mend(words, capsys)
    (root / "train/a/0.png").rename(root / "train/b/0.png")
    assert "1 file added" in unfit(dataset, tmp_path)
    (root / "train/b/0.png").rename(root / "train/a/0.png")
    build(dataset, tmp_path, limit=3)
    words = unfit(dataset, tmp_path)
    assert "a trial of 3 files" in words
    mend(words, capsys)
    elsewhere = root.rename(tmp_path / "it's moved")
    moved = section(elsewhere)
    words = unfit(moved, tmp_path)
    assert f"it was made from {root}, this run reads {elsewhere}" in words
    mend(words, capsys)
    listing = elsewhere / "list.csv"
    listing.write_text(
        "path,class,split\n"
        + "".join(f"train/{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]},train\n" for i in range(4))
        + "val/a/0.png,a,val\n"
    )
    by_list = section(elsewhere, layout="csv", annotations="list.csv")
    words = unfit(by_list, tmp_path)
    assert "its layout is folders, this run's is csv" in words
    mend(words, capsys)
    data = open_datasets(joint(by_list, tmp_path))
    assert len(data.splits["toy"]["test"]) == 1


def test_who_trusts_anothers_check_asks_no_file(tmp_path: Path) -> None:
    dataset = clips(tmp_path / "data", train=6)
    checked = open_datasets(joint(dataset, tmp_path), gpu=True)
    os.utime(tmp_path / "data/train/a/0.mp4", ns=(0, 0))
    trusting = open_datasets(joint(dataset, tmp_path), check=False, gpu=True)
    assert trusting == checked
    assert "1 file changed" in unfit(dataset, tmp_path)


def test_an_index_with_rows_missing_is_refused_in_words(tmp_path: Path) -> None:
    dataset = pictures(tmp_path / "data")
    build(dataset, tmp_path)
    file = tmp_path / "indexes/toy.parquet"
    write_rows(file, index_file.read_header(file), list(read_rows(file))[1:])
    assert "has 5 rows instead of 6; delete it" in unfit(dataset, tmp_path)


def test_other_formats_and_damaged_files_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = pictures(tmp_path / "data")
    open_datasets(joint(dataset, tmp_path))
    monkeypatch.setattr(index_file, "FORMAT", 2)
    assert "is of index format 1, this program reads 2; delete it" in unfit(dataset, tmp_path)
    file = tmp_path / "indexes/toy.parquet"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot read the index" in unfit(dataset, tmp_path)


def test_a_folder_that_cannot_be_written_names_the_key(tmp_path: Path) -> None:
    dataset = pictures(tmp_path / "data")
    (tmp_path / "indexes").write_text("a file in the folder's place")
    with pytest.raises(DataMissing, match=r"vimnas\.data\.index_dir"):
        open_index("toy", scan_dataset("toy", dataset), joint(dataset, tmp_path))


# -- the script -------------------------------------------------------------------------------


def test_the_report_counts_against_the_public_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "k400"
    stem = "abcdefghij{}_000010_000020"
    for i in range(3):
        encode(root / "train" / f"{stem.format(i)}.mp4", numbered(4))
    encode(root / "val" / f"{stem.format(8)}.mp4", numbered(4))
    (root / f"train/{stem.format(3)}.mp4").touch()
    rows = [f'"a, b",abcdefghij{i},10,20,train\n' for i in range(5)]
    rows.append("c,abcdefghij8,10,20,validate\n")
    (root / "k.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "".join(rows))
    config = ["--deepspeed_config", str(ROOT / "ds_configs/vitl.json")]
    options = ["--root", str(root), "--annotations", "k.csv", "--index_dir", str(tmp_path)]
    options += ["--set", "reference_files=6"]
    code = index_data.main(["--dataset", "k400", *config, *options])
    assert code == 0
    out = capsys.readouterr().out
    assert "k.csv is read as layout kinetics" in out
    table = [line.split() for line in out.splitlines()]
    assert ["train", "5", "4", "1", "1", "3", "6", "50.0%"] in table
    assert ["test", "1", "1", "0", "0", "1", "19,796", "0.0%"] in table
    report = json.loads((tmp_path / "k400.report.json").read_text())
    assert report["splits"]["train"]["unusable"]["empty file"]["files"] == 1
    assert report["splits"]["train"]["first_missing"] == [f"{stem.format(4)}.mp4"]
    assert report["codecs"] == {"h264": 4}


def test_the_script_warns_of_what_training_will_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path / "data", train=50)
    config = ["--deepspeed_config", str(ROOT / "ds_configs/vitl.json"), "--dataset", "imagenet"]
    options = ["--root", str(tmp_path / "data"), "--index_dir", str(tmp_path)]
    options += ["--layout", "folders"]
    for i in range(3):
        (tmp_path / f"data/train/a/bad{i}.jpg").touch()
    for arguments in ([*config, *options], ["--update", str(tmp_path / "imagenet.parquet")]):
        assert index_data.main(arguments) == 0
        assert "imagenet: 3 of 55 files are unusable" in capsys.readouterr().err
    (tmp_path / "data/train/a/bad0.jpg").unlink()
    assert index_data.main([*config, *options]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dataset", "nope"], "has imagenet, k400, k600, ssv2"),
        (["--dataset", "k400"], r"set vimnas\.data\.k400\.root"),
        (["--dataset", "k400", "--root", "/nowhere"], "/nowhere is not a folder"),
        (["--dataset", "k400", "--annotations", "none.csv"], "neither a file nor a folder"),
        (["--dataset", "k400", "--layout", "odd"], "Input should be"),
        (["--update", "none.parquet"], "there is no such index"),
        (["--dataset", "k400", "--set", "colour=red"], "KEY=VALUE"),
    ],
)
def test_the_script_ends_with_2_and_words(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ["--deepspeed_config", str(ROOT / "ds_configs/vitl.json")]
    assert index_data.main([*arguments, *config]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cannot index: ")
    assert re.search(words, error), error


def script(root: Path, *more: str) -> int:
    config = ["--deepspeed_config", str(ROOT / "ds_configs/vitl.json"), "--dataset", "k400"]
    options = ["--root", str(root / "data"), "--index_dir", str(root / "indexes"), *more]
    return index_data.main([*config, *options])


@pytest.mark.parametrize(
    ("where", "name", "value", "words"),
    [
        (sys, "executable", "/bin/false", "ended with code 1 before it had started"),
        (sys, "executable", "/nowhere/python", "cannot start a probing process.*/nowhere/python"),
        (probe_pool, "STARTUP", 0.0, "did not start in 0 s.*--workers"),
    ],
)
def test_probing_processes_that_do_not_start_are_said_in_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: Any,
    name: str,
    value: Any,
    words: str,
) -> None:
    clips(tmp_path / "data")
    if name == "STARTUP":
        sleeper = tmp_path / "sleeper"
        sleeper.write_text("#!/bin/sh\nexec sleep 30\n")
        sleeper.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(sleeper))
    monkeypatch.setattr(where, name, value)
    assert script(tmp_path, "--layout", "folders") == 2
    error = capsys.readouterr().err
    assert re.search(f"cannot index: .*{words}", error), error
    assert "cannot write" not in error
    assert not children()


def test_annotations_and_reports_that_the_system_refuses_are_said_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips(tmp_path / "data")
    assert script(tmp_path, "--annotations", "/proc/self/mem") == 2  # even root cannot read it
    assert "cannot index: cannot read /proc/self/mem: Input/output" in capsys.readouterr().err
    (tmp_path / "indexes/k400.report.json").mkdir(parents=True)
    assert script(tmp_path, "--layout", "folders") == 2
    assert re.search(r"cannot index: .*k400\.report\.json", capsys.readouterr().err)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_another_user_may_not_do_is_said_in_words() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dataset = pictures(root / "data")
        (root / "data/list.csv").write_text("path,class,split\n")
        open_datasets(joint(dataset, root))
        root.chmod(0o755)
        for path, mode in (("data/list.csv", 0o600), ("indexes/toy.parquet", 0o600)):
            (root / path).chmod(mode)
        (root / "closed").mkdir(mode=0o700)
        program = (
            "import os, sys; from pathlib import Path; from tests.media import section\n"
            "from tests.test_index import joint, script\n"
            "from vimnas_ds.data.joint import open_datasets; root = Path(sys.argv[1])\n"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "print(script(root, '--annotations', 'list.csv'))\n"
            "print(script(root, '--layout', 'folders', '--set', 'kind=image',\n"
            "      '--set', 'frames=null', '--set', 'fps=null'))\n"
            "for data in (root / 'data', root / 'closed' / 'data'):\n"
            "    try: open_datasets(joint(section(data), root))\n"
            "    except ValueError as error: print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, folder],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    codes, (unread, unlisted) = done.stdout.split()[:2], done.stdout.splitlines()[-2:]
    assert codes == ["2", "2"], done
    assert f"cannot read {root}/data/list.csv: Permission denied" in done.stderr
    assert f"cannot write {root}/indexes/k400.parquet.lock: Permission denied" in done.stderr
    assert f"cannot read the index {root}/indexes/toy.parquet (Permission denied)" in unread
    assert f"toy: cannot list {root}/closed/data: Permission denied" in unlisted


def test_an_empty_dataset_is_said_in_words(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    with pytest.raises(DataMissing, match='no usable file in the split "train"'):
        open_datasets(joint(section(tmp_path), tmp_path))


def test_frames_that_an_edit_list_hides_are_never_counted(tmp_path: Path) -> None:
    whole, cut = encode(tmp_path / "whole.mp4", numbered(30)), tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = round(0.6 / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                target.mux(packet)
    with av.open(str(cut)) as container:
        shown = [f.time for f in container.decode(video=0)]
    verdict = probe_file(cut, False)
    assert verdict.state == USABLE, verdict.reason
    assert verdict.timeline is not None
    assert 15 < len(verdict.timeline.seconds()) == len(shown) < 30
    assert verdict.container.startswith("cut ")
    assert video_facts(verdict) is None
    assert read_encoded(cut, 4, 5.0, 0.5) is None
    plan = ViewPlan(clips=2)
    views = read_views(cut, partial(plan.times, frames=4, fps=5.0))
    seen = numbers(views.frames[views.order[0]])
    assert seen == numbers(read_clip(cut, 4, 5.0, 0.0))
    assert len(set(seen)) == 4


def test_orders_sorted_by_wnid_are_not_taken_for_the_devkits(tmp_path: Path) -> None:
    truth, synsets = tmp_path / "truth.txt", tmp_path / "synset_words.txt"
    truth.write_text("1\n")
    synsets.write_text("n01440764 tench\nn01443537 goldfish\nn01484850 shark\n")
    dataset = section(tmp_path).model_copy(update={"synsets": synsets})
    with pytest.raises(BadAnnotations, match=r"sorted by wnid .* not the devkit's order"):
        _synsets("imagenet", dataset, tmp_path, truth)


def test_listed_paths_have_one_form_and_stay_under_the_root(tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    assert _inside("k400", file, tmp_path, "./a/../v.mp4") == "v.mp4"
    for path in ("../v.mp4", "a/../../v.mp4", "/v.mp4"):
        with pytest.raises(BadAnnotations, match="does not lie under the root"):
            _inside("k400", file, tmp_path, path)


def test_a_file_that_could_not_be_read_is_asked_for_once_it_can_be(tmp_path: Path) -> None:
    dataset = pictures(tmp_path / "data")
    target, link = tmp_path / "late.png", tmp_path / "data" / "train" / "a" / "9.png"
    link.symlink_to(target)
    build(dataset, tmp_path)
    data = joint(dataset, tmp_path)
    catalog = scan_dataset("toy", dataset)
    assert list(open_index("toy", catalog, data).unusable) == ["train/a/9.png"]
    Image.new("RGB", (8, 6)).save(target)
    with pytest.raises(UnfitIndex, match=r"1 file could not be read then and can be now .*9\.png"):
        open_index("toy", catalog, data)


@pytest.mark.parametrize("reason", [TIMED_OUT, "Input/output error"])
def test_a_file_that_could_not_be_probed_to_its_end_does_not_refuse_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    dataset = pictures(tmp_path / "data")
    build(dataset, tmp_path)
    file = tmp_path / "indexes" / "toy.parquet"
    rows = [
        row._replace(verdict=Verdict(UNREADABLE, reason)) if row.path == "train/a/0.png" else row
        for row in read_rows(file)
    ]
    write_rows(file, read_header(file), rows)
    if reason != TIMED_OUT:  # the disk still refuses to give its bytes
        opened = Path.open

        def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
            if path.name == "0.png":
                raise OSError(5, reason)
            return opened(path, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refuse)
    found = open_index("toy", scan_dataset("toy", dataset), joint(dataset, tmp_path))
    assert found.unusable == {"train/a/0.png": reason}
