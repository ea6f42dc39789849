"""Batches made ahead: the plan's order, exact resume, bounds, errors, and what is left behind."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from fractions import Fraction
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.media import encode, numbered, section
from tests.small import small_config
from vimnas_ds.config import DataSection, parse_config
from vimnas_ds.data import prepare
from vimnas_ds.data.ahead import Ahead, GivenUp, Wanted
from vimnas_ds.data.bad import BadFile, BlockedFiles, TooManyBadFiles
from vimnas_ds.data.batches import Batch
from vimnas_ds.data.capacity import Capacity, plan_capacity
from vimnas_ds.data.catalog import Catalog, Sample
from vimnas_ds.data.decode import read_clip
from vimnas_ds.data.encoded import LARGEST
from vimnas_ds.data.footprint import sample_bytes
from vimnas_ds.data.images import read_image
from vimnas_ds.data.joint import JointData, Loaders
from vimnas_ds.data.listing import VideoFacts
from vimnas_ds.data.loader import EvalLoader, TrainLoader
from vimnas_ds.data.order import Stream
from vimnas_ds.data.pipelines import Graph
from vimnas_ds.data.prepare import FilePreparer
from vimnas_ds.data.readers import MOST_IN_A_ROW, Readers, begin_reading
from vimnas_ds.data.sampling import Cut, Window, draw_sample
from vimnas_ds.data.timeline import Timeline
from vimnas_ds.processes import available_memory
from vimnas_ds.space import SPACES
from vimnas_ds.train.plan import coming_batches
from vimnas_ds.train.ranks import ALONE, StopAsked
from vimnas_ds.train.schedule import DataCursor, Drawer, Schedule
from vimnas_ds.train.step import WeightStepper

CPU = torch.device("cpu")
RICH = {"randaugment": {"n": 1, "m": 9, "std": 0.5}, "random_erasing": 0.5}
SIZES = {"train": 4, "alpha": 2}


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> JointData:
    """An image and a video dataset of a few real files."""
    root, rng = tmp_path_factory.mktemp("joint"), np.random.default_rng(0)
    pictures, clips = root / "pictures", root / "clips"
    pictures.mkdir()
    for i in range(9):
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
        small.resize((64 + i, 48), Image.Resampling.BICUBIC).save(pictures / f"{i}.jpg")
        wide = np.asarray(small.resize((96, 48), Image.Resampling.BICUBIC))
        encode(clips / f"{i}.mp4", [wide[:, 2 * t : 2 * t + 64] for t in range(12)], rate=8)
    return JointData(
        DataSection(
            datasets={
                "pictures": section(pictures, **RICH),
                "clips": section(clips, "video", **RICH),
            }
        ),
        {n: Catalog(n, root / n, ("a", "b", "c"), (), ()) for n in ("pictures", "clips")},
        {
            name: {
                "train": [Sample(f"{i}.{suffix}", i % 3) for i in range(6)],
                "alpha": [Sample(f"{i}.{suffix}", i % 3) for i in range(6, 9)],
            }
            for name, suffix in (("pictures", "jpg"), ("clips", "mp4"))
        },
        {"pictures": 0, "clips": 0},
    )


def drawer(cursor: DataCursor | None = None) -> Drawer:
    raw = small_config()
    raw["vimnas"]["schedule"] = {"epochs": 6, "warmup": 0}
    config = parse_config(raw)
    schedule = Schedule.build(config, {"imagenet": 24, "k400": 24})
    return Drawer(schedule, SPACES["nano"], {"imagenet": True, "k400": False}, 3, cursor)


def random_plan(count: int) -> list[Wanted]:
    """Datasets and splits in a random order, each one's batches numbered without gaps."""
    rng, next_number = random.Random(0), dict[tuple[str, str], int]()
    plan = []
    for _ in range(count):
        key = (rng.choice(("pictures", "clips")), rng.choice(("train", "train", "alpha")))
        plan.append(Wanted(*key, next_number.get(key, 0)))
        next_number[key] = plan[-1].number + 1
    return plan


def read(
    joint: JointData, plan: list[Wanted], rank: int = 0, world: int = 1, workers: int = 1
) -> list[Batch]:
    """The plan's batches, made ahead."""
    values = {**joint.section.model_dump(), "workers": workers, "prefetch": 2 + workers}
    data = JointData(DataSection(**values), joint.catalogs, joint.splits, joint.dropped)
    loaders = Loaders(data, 7, rank, world, CPU)
    loaders.follow(plan, SIZES)
    try:
        return [loaders.batch(w.dataset, w.split, SIZES[w.split], w.number) for w in plan]
    finally:
        loaders.close()


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and a.names == b.names


def test_the_plan_is_what_the_run_will_ask_for_from_any_position() -> None:
    run = drawer()
    asked, states = [], []
    while run.position.step < run.schedule.total_steps:
        states.append((len(asked), run.position.state_dict()))
        context = run.draw()
        asked.append(Wanted(context.dataset, "train", context.batch_index))
        run.advance(context)
        if context.step % 2 == 0:
            number = run.next_alpha_batch(context.dataset)
            asked.append(Wanted(context.dataset, "alpha", number))
    assert {w.dataset for w in asked} == {"imagenet", "k400"}
    for first, state in states[::5]:
        resumed = drawer(DataCursor.from_state(state))
        assert list(coming_batches(resumed, 2)) == asked[first:]
        assert resumed.position.state_dict() == state
    trained = [w for w in asked if w.split == "train"]
    assert list(coming_batches(drawer(), None)) == trained


def test_a_resumed_plan_gives_the_same_bits_with_any_workers_on_one_rank_and_two(
    joint: JointData,
) -> None:
    plan = random_plan(14)
    whole = read(joint, plan)
    assert len({(w.dataset, w.split) for w in plan}) == 4
    for first in (1, 6, 13):
        for batch, expected in zip(
            read(joint, plan[first:], workers=3), whole[first:], strict=True
        ):
            assert same(batch, expected)
    pair = [read(joint, plan[3:], rank, 2, workers=2 - rank) for rank in (0, 1)]
    for a, b, expected in zip(*pair, whole[3:], strict=True):
        assert torch.equal(torch.cat([a.x, b.x]), expected.x)
        assert torch.equal(torch.cat([a.y, b.y]), expected.y)
        assert a.names + b.names == expected.names


def test_no_more_is_made_ahead_than_allowed(joint: JointData) -> None:
    plan, begun = random_plan(30), list[Wanted]()

    def watched() -> Iterator[Wanted]:
        for wanted in plan:
            begun.append(wanted)
            yield wanted

    loaders = Loaders(joint, 7, 0, 1, CPU)
    ahead = Ahead(watched(), lambda n, s: loaders.training(n, s, SIZES[s]), decoding=3, ready=2)
    for taken in range(4):
        settled = time.monotonic() + 5
        while (ahead.waiting, len(begun)) != (2, taken + 4) and time.monotonic() < settled:
            time.sleep(0.01)
        time.sleep(0.1)  # would it go on?
        assert ahead.waiting == 2
        assert begun == plan[: taken + 4]  # ready + decoding, less the one it has no room for
        ahead.take(plan[taken])
    ahead.close()
    loaders.close()


def test_nothing_is_built_once_the_plan_is_followed(
    joint: JointData, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, plan = list[Graph](), random_plan(10)
    sound = Graph.build

    def build(self: Graph) -> Any:
        if self._pipeline is None:
            built.append(self)
        return sound(self)

    monkeypatch.setattr(Graph, "build", build)
    loaders = Loaders(joint, 7, 0, 1, CPU)
    loaders.follow(plan, SIZES)
    assert len(built) == 2 * (2 + 1)  # of each split: two for pictures, one for clips
    for wanted in plan:
        loaders.batch(wanted.dataset, wanted.split, SIZES[wanted.split], wanted.number)
    loaders.close()
    assert len(built) == 6


def test_who_is_slower_than_the_loader_does_not_wait(joint: JointData) -> None:
    plan = random_plan(12)
    loaders = Loaders(joint, 7, 0, 1, CPU)
    loaders.follow(plan, SIZES)
    waits = []
    for wanted in plan:
        time.sleep(0.1)  # the network's step: a batch takes a tenth of it
        started = time.perf_counter()
        loaders.batch(wanted.dataset, wanted.split, SIZES[wanted.split], wanted.number)
        waits.append(time.perf_counter() - started)
    loaders.close()
    assert sorted(waits[4:])[4] < 0.003  # the median, once the graphs are built


def test_errors_come_with_their_batch_and_threads_end(
    joint: JointData, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()
    plan = random_plan(8)
    spoiled = next(i for i, w in enumerate(plan) if w[:2] == ("pictures", "alpha"))
    assert spoiled > 0
    sound = FilePreparer.train

    def train(self: FilePreparer, index: int, *rest: Any) -> Any:
        if self.samples[index].path in ("6.jpg", "7.jpg", "8.jpg"):
            raise ZeroDivisionError("no such thing as a bad file")
        return sound(self, index, *rest)

    monkeypatch.setattr(FilePreparer, "train", train)
    loaders = Loaders(joint, 7, 0, 1, CPU)
    loaders.follow(plan, SIZES)
    for wanted in plan[:spoiled]:
        loaders.batch(wanted.dataset, wanted.split, SIZES[wanted.split], wanted.number)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            loaders.batch("pictures", "alpha", 2, plan[spoiled].number)
    loaders.close()
    loaders.close()
    assert threading.active_count() == before
    monkeypatch.undo()
    loaders = Loaders(joint, 7, 0, 1, CPU)
    loaders.follow(plan, SIZES)
    with pytest.raises(ValueError, match="but the plan has"):
        loaders.batch(plan[0].dataset, plan[0].split, 4, 99)
    loaders.close()  # in the middle of its work
    assert threading.active_count() == before


def test_a_plan_is_left_for_another_only_when_its_thread_has_ended(
    joint: JointData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a rewind, with a batch that takes DALI longer than a process that ends waits."""
    at_work, finish, sound = threading.Event(), threading.Event(), TrainLoader.make
    makers: list[threading.Thread] = []

    def make(self: TrainLoader, started: Any) -> Any:
        makers.append(threading.current_thread())
        if not at_work.is_set():
            at_work.set()
            finish.wait(60)
        return sound(self, started)

    monkeypatch.setattr(TrainLoader, "make", make)
    monkeypatch.setattr("vimnas_ds.data.ahead.PATIENCE", 0.1)
    plan = [Wanted("pictures", "train", number) for number in (0, 1)]
    loaders = Loaders(joint, 7, 0, 1, CPU)
    loaders.follow(plan, SIZES)
    at_work.wait(10)
    rewinding = threading.Thread(target=loaders.follow, args=(plan, SIZES), daemon=True)
    rewinding.start()
    rewinding.join(1)
    assert rewinding.is_alive()
    assert len(makers) == 1
    finish.set()
    rewinding.join(10)
    assert not makers[0].is_alive()
    expected = read(joint, plan)
    for wanted, batch in zip(plan, expected, strict=True):
        assert same(loaders.batch("pictures", "train", 4, wanted.number), batch)
    assert len({*makers}) == 3  # the old plan's, the new one's, and that of `read`
    loaders.close()


def test_a_folder_that_vanishes_ends_the_run_in_words(joint: JointData, tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(joint.section.datasets["pictures"].root or "", root)
    samples = joint.splits["pictures"]["train"]
    with ThreadPoolExecutor(1) as pool:
        loader = TrainLoader("toy", section(root), samples, "train", 7, 4, 0, 1, CPU, pool, 1)
        loader.next()
        shutil.rmtree(root)
        with pytest.raises(TooManyBadFiles, match=r"folder .*pictures is not there any more"):
            [loader.next() for _ in range(3)]
    assert loader.reasons == {"No such file or directory": loader.bad_count}


def test_a_file_that_turns_bad_is_replaced_by_the_next_and_counted_by_reason(
    joint: JointData, tmp_path: Path
) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(joint.section.datasets["pictures"].root or "", root)
    samples = joint.splits["pictures"]["train"]

    def loader(pool: ThreadPoolExecutor) -> TrainLoader:
        return TrainLoader(
            "toy", section(root), samples, "train", 7, 4, 0, 1, CPU, pool, 1, max_bad_share=0.9
        )

    with ThreadPoolExecutor(2) as pool:
        steady, whole = loader(pool), loader(pool)
        expected = [name for _ in range(6) for name in whole.next().names]
        first = [name for _ in range(2) for name in steady.next().names]
        assert first == expected[:8]
        steady.seek(0)
        (root / "1.jpg").write_bytes(b"no picture any more")
        (root / "4.jpg").chmod(0) if os.geteuid() else (root / "4.jpg").unlink()
        after = {"1.jpg": "2.jpg", "4.jpg": "5.jpg"}
        names = [name for _ in range(6) for name in steady.next().names]
        assert names == [after.get(name, name) for name in expected]
        counts = {path: expected.count(path) for path in after}
        denied = "Permission denied" if os.geteuid() else "No such file or directory"
        assert steady.reasons == {"not an image": counts["1.jpg"], denied: counts["4.jpg"]}


# -- files that block -------------------------------------------------------------------------


def test_a_batch_that_does_not_come_is_given_up_when_asked_to() -> None:
    def plan() -> Iterator[Wanted]:
        ended.wait()
        yield from ()

    ended, answers = threading.Event(), iter([False, True])
    ahead = Ahead(plan(), lambda name, split: pytest.fail("no loader"), 1, 1)
    with pytest.raises(GivenUp, match="number=3"):
        ahead.take(Wanted("k400", "train", 3), lambda: next(answers))
    ended.set()
    ahead.close()


def test_only_the_batch_that_begins_a_step_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alpha batch belongs to a step that has begun: the run saves after it."""
    asked: dict[str, bool] = {}

    class Taking:
        def take(self, wanted: Wanted, give_up: Any) -> str:
            asked[wanted.split] = give_up()
            return wanted.split

    loaders = Loaders.__new__(Loaders)
    loaders._ahead, loaders.give_up = Taking(), lambda: True
    assert loaders.batch("k400", "train", 8, 0) == "train"
    assert loaders.batch("k400", "alpha", 8, 0) == "alpha"
    assert asked == {"train": True, "alpha": False}


class Blocking:
    """Stands in for a dead disk: reading one of `names` waits until `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.names, self.calls, self.event = names, Counter[str](), threading.Event()
        self._read = prepare.read_image
        monkeypatch.setattr(prepare, "read_image", self)

    def __call__(self, path: Path, *args: Any, **kwargs: Any) -> Any:
        self.calls[path.name] += 1
        if path.name in self.names:
            self.event.wait(60)
        return self._read(path, *args, **kwargs)

    def release(self) -> None:
        self.event.set()


def test_a_step_does_not_begin_before_the_files_of_its_second_batch_are_there(
    joint: JointData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop meanwhile ends it as if it had not been drawn: nothing has changed, nor counts."""
    disk = Blocking(monkeypatch, "6.jpg", "7.jpg", "8.jpg")  # all of the alpha split
    context: Any = SimpleNamespace(
        dataset="pictures", archs=(), batch_index=0, step=0, fingerprint=lambda: 1
    )

    section = SimpleNamespace(data=joint.section, sandwich=None, seed=7)
    config: Any = SimpleNamespace(vimnas=section, global_batch=SIZES["train"])
    engine: Any = None
    begun: list[str] = []
    loaders = Loaders(joint, 7, 0, 1, CPU)
    loaders.follow([Wanted("pictures", "train", 0), Wanted("pictures", "alpha", 0)], SIZES)
    answers = chain([False] * 3, repeat(True))
    loaders.give_up = lambda: next(answers)
    stepper = WeightStepper(config, engine, loaders, ALONE)
    stepper.at = lambda activity, step: begun.append(activity)
    with pytest.raises(StopAsked):
        stepper.step(context, 0.1, two_batches=True)
    assert begun == ["data", "agree"]
    assert next(answers)  # it was asked until it said so
    assert loaders.training("pictures", "train", SIZES["train"]).seen == 0
    disk.release()
    loaders.give_up = lambda: False
    loaders.wait_for_next()
    loaders.batch("pictures", "alpha", SIZES["alpha"], 0)
    loaders.wait_for_next()  # the plan has ended: nothing to wait for
    loaders.close()


def test_a_file_that_blocks_counts_as_bad_and_its_thread_is_replaced(
    joint: JointData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(joint.section.datasets["pictures"].root or "", root)
    samples = joint.splits["pictures"]["train"]

    def batches(pool: Executor) -> tuple[TrainLoader, list[Batch]]:
        loader = TrainLoader("toy", section(root), samples, "train", 7, 4, 0, 1, CPU, pool, 2, 0.9)
        return loader, [loader.next() for _ in range(6)]

    disk = Blocking(monkeypatch, "1.jpg")
    with Readers(1, 0.5) as pool:  # one thread: who is not replaced is missed
        loader, found = batches(pool)
        reason = "reading took longer than the time limit"
        assert loader.substitutions == {"1.jpg": reason}
        assert loader.reasons == {reason: loader.bad_count}
        held_up = EvalLoader("toy", section(root), samples, 0, 1, 4, CPU, pool)
        assert [len(batch.y) for batch in held_up] == [3, 2]
        assert held_up.skipped == {"1.jpg": reason}
        assert disk.calls["1.jpg"] == 1  # for nobody twice
        disk.release()  # too late
        assert same(loader.next(), batches(pool)[0].next())
        assert disk.calls["1.jpg"] == 1
    (root / "1.jpg").write_bytes(b"no picture any more")
    with ThreadPoolExecutor(2) as pool:
        corrupt, expected = batches(pool)
    assert loader.bad_count >= corrupt.bad_count > 0
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


def test_a_disk_that_is_gone_ends_the_run_and_the_shutdown_in_time(
    joint: JointData, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Blocking(monkeypatch, *(f"{i}.jpg" for i in range(9)))

    def loaders(seconds: float) -> Loaders:
        values = {**joint.section.model_dump(), "workers": 2, "file_timeout": seconds}
        return Loaders(
            JointData(DataSection(**values), joint.catalogs, joint.splits, joint.dropped),
            7, 0, 1, CPU,
        )  # fmt: skip

    def closes(one: Loaders) -> bool:
        closing = threading.Thread(target=one.close, daemon=True)
        closing.start()
        closing.join(30)
        return not closing.is_alive()

    short = loaders(0.2)
    short.follow([Wanted("pictures", "train", 0)], SIZES)
    with pytest.raises(BlockedFiles, match=r"vimnas\.data\.file_timeout\)[\s\S]*pictures/\d\.jpg"):
        short.batch("pictures", "train", 4, 0)
    assert closes(short)
    endless = loaders(120)
    endless.follow([Wanted("pictures", "train", 0)], SIZES)
    while sum(disk.calls.values()) < 4:  # both threads are blocked, and `Ahead` waits for them
        time.sleep(0.01)
    assert closes(endless)
    disk.release()


def test_one_sample_whose_substitutes_block_too_shows_that_the_disk_is_gone() -> None:
    event = threading.Event()

    def read() -> None:
        for i in range(16):
            with suppress(BadFile):
                begin_reading(f"{i}.jpg")
                event.wait(60)

    with Readers(8, 0.1) as pool, pytest.raises(BlockedFiles) as stopped:
        pool.submit(read).result()
    assert len(stopped.value.reasons) == MOST_IN_A_ROW
    event.set()


def test_a_process_with_a_blocked_reader_can_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import sys, time; from vimnas_ds.data.readers import Readers; pool = Readers(1, 3600); "
        "job = pool.submit(open, sys.argv[1])\n"
        "while not job.running(): time.sleep(0.01)\n"
        "pool.shutdown(); print(type(job.exception()).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "pipe")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "CancelledError\n"


def test_a_pipe_in_place_of_a_file_is_refused_without_opening_it(
    joint: JointData, tmp_path: Path
) -> None:
    for name, kind in (("pictures", "image"), ("clips", "video")):
        root = tmp_path / name
        shutil.copytree(joint.section.datasets[name].root or "", root)
        samples = joint.splits[name]["train"]
        (root / samples[1].path).unlink()
        os.mkfifo(root / samples[1].path)
        with Readers(1, 2.0) as pool:
            one = EvalLoader("toy", section(root, kind), samples, 0, 1, 6, CPU, pool)
            assert [len(batch.y) for batch in one] == [5]
            assert one.skipped == {samples[1].path: "not a regular file"}
            one.close()


def test_capacity_follows_cores_batch_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(free: int, workers: int, batch: int = 4, prefetch: int = 2) -> Capacity:
        monkeypatch.setattr("vimnas_ds.data.capacity.available_memory", lambda: free)
        data = section(None, "video", frames=16, size=64)
        recipe = DataSection(datasets={"clips": data}, workers=workers, prefetch=prefetch)
        return plan_capacity(recipe, {"clips": clip, "small": 1}, [batch], 1, CPU)

    clip = 16 * 3 * 64 * 64
    assert plan(2**40, 1).decoding == 8
    assert plan(2**40, 1, prefetch=20).decoding == 20
    assert plan(2**40, 16, batch=1).decoding == 17  # sixteen threads for batches of one
    short = plan(4 * 3 * 4 * clip * 5, 16)  # room for three in a quarter of it
    assert (short.decoding, short.ready, short.bytes) == (3, 3, 3 * 4 * clip * 5)
    assert plan(0, 16).decoding == 1
    assert str(short).startswith("data: 16 decoding threads, 3 batches decoded ahead, 3 finished")


def test_a_sample_takes_what_is_handed_over_for_it(tmp_path: Path) -> None:
    recipe, picture = section(tmp_path, "video"), section(tmp_path)
    line = Timeline.pack([0, 1], 2, Fraction(1))
    kib = [*range(1, 2000), 10**6]  # the last one is left to PyAV
    known = [Sample(f"{i}", 0, VideoFacts(8, 8, 1024 * k, line)) for i, k in enumerate(kib)]
    with ThreadPoolExecutor(2) as pool:
        assert sample_bytes("k400", recipe, known, False, pool) == 4 * 3 * 32 * 32
        assert sample_bytes("k400", recipe, known, True, pool) == 1024 * 1998
        assert sample_bytes("k400", recipe, known[-1:], True, pool) == LARGEST
        (tmp_path / "a.mp4").write_bytes(bytes(50_000))
        unknown = [Sample("a.mp4", 0), Sample("absent.mp4", 0)]
        assert sample_bytes("k400", recipe, unknown, True, pool) == 50_000
        noise = np.random.default_rng(0).integers(0, 256, (400, 500, 3)).astype(np.uint8)
        Image.fromarray(noise).convert("CMYK").save(tmp_path / "a.jpg", quality=5)
        Image.fromarray(noise).save(tmp_path / "b.png")
        odd, direct = Sample("a.jpg", 0), Sample("b.png", 0)
        assert (
            sample_bytes("imagenet", picture, [odd, Sample("absent.jpg", 0)], False, pool)
            == 600_000
        )
        assert len(read_image(tmp_path / "a.jpg", True).data) == 600_000 + 54  # BMP's header
        length = (tmp_path / "b.png").stat().st_size
        assert sample_bytes("imagenet", picture, [direct], False, pool) == length > 600_000


def test_a_file_too_large_to_load_is_decoded_here(tmp_path: Path) -> None:
    for name, extra in (("a.webm", 0), ("b.webm", LARGEST)):
        file = encode(tmp_path / name, numbered(8), "libvpx-vp9", rate=8)
        with file.open("r+b") as out:
            out.truncate(file.stat().st_size + extra)  # a hole: takes no place on the disk
    samples = [Sample("a.webm", 0), Sample("b.webm", 0)]
    recipe = section(tmp_path, "video", crop_scale=(1, 1), crop_ratio=(4 / 3, 4 / 3))
    files = FilePreparer("toy", recipe, samples, gpu=True)
    draw = draw_sample(Stream(5, "toy", "train"), 0, 0, recipe)
    small, large = (files.train(i, draw) for i in (0, 1))
    assert "encoded" in small
    assert "encoded" not in large
    np.testing.assert_array_equal(large["frames"], files.train(0, draw, safe=True)["frames"])


def test_free_memory_is_what_the_tightest_control_group_leaves(tmp_path: Path) -> None:
    def write(path: str, text: str | int) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    def group(folder: str, limit: str | int, used: int, cached: int) -> None:
        v1 = "/memory" in folder
        total = "total_" * v1
        for name, text in (
            ("limit_in_bytes" if v1 else "max", limit),
            ("usage_in_bytes" if v1 else "current", used),
            ("stat", f"anon 5\nactive_file 7\n{total}inactive_file {cached}\nslab 9"),
        ):
            write(f"sys/fs/cgroup{folder}/memory.{name}", text)

    assert available_memory(tmp_path) == 2**31
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    1000 kB\nCached: 5 kB")
    assert available_memory(tmp_path) == 1000 * 1024
    write("proc/self/cgroup", "0::/job/step\n1:cpu:/elsewhere")
    assert available_memory(tmp_path) == 1000 * 1024
    group("", 900_000, 500_000, 100_000)  # of a container: its own path is not there
    assert available_memory(tmp_path) == 500_000
    group("/job/step", "max", 300_000, 0)
    group("/job", 600_000, 350_000, 50_000)
    group("/elsewhere", 10, 5, 0)
    assert available_memory(tmp_path) == 300_000
    group("/job/step", 100_000, 120_000, 10_000)
    assert available_memory(tmp_path) == 0
    write("proc/self/cgroup", "4:cpu,memory:/job\n0::/none")
    group("/memory/job", 400_000, 390_000, 30_000)
    assert available_memory(tmp_path) == 40_000
    group("/memory/job", 2**63 - 4096, 390_000, 30_000)
    assert available_memory(tmp_path) == 500_000


# -- what is left behind ----------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_two_thousand_clips_leave_no_file_open_and_no_memory_behind(tmp_path: Path) -> None:
    """Sound ones, rotated by a cut, truncated ones, and files that are none."""
    good = encode(tmp_path / "a.mp4", numbered(12), g="4")
    webm = encode(tmp_path / "a.webm", numbered(6), "libvpx-vp9")
    cut_short = tmp_path / "b.mp4"
    encode(cut_short, numbered(12), container={"movflags": "faststart"})
    cut_short.write_bytes(cut_short.read_bytes()[:-200])
    (tmp_path / "c.mp4").write_bytes(b"no video")
    recipe = section(tmp_path, "video", frames=4, fps=8)
    names = [good.name, webm.name, cut_short.name, "c.mp4", good.name, "absent.mp4"]
    samples = [Sample(name, 0) for name in names]

    def read_some(loader: TrainLoader, count: int) -> None:
        for _ in range(count):
            loader.next()

    with ThreadPoolExecutor(2) as pool:
        loader = TrainLoader("toy", recipe, samples, "train", 1, 4, 0, 1, CPU, pool, 2, 0.9)
        read_some(loader, 125)
        gc.collect()
        handles, memory = len(os.listdir("/proc/self/fd")), resident()  # noqa: PTH208
        read_some(loader, 500)
        for _ in range(200):  # bad files are remembered there: here they are opened each time
            for name in ("c.mp4", "absent.mp4"):
                with pytest.raises(ValueError, match=name):
                    read_clip(
                        tmp_path / name, 4, 8, 0.5, lambda w, h: Cut(Window(0, 0, h, w), 8, 8)
                    )
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= handles  # noqa: PTH208
        assert resident() - memory < 16 * 2**20  # a leaked clip is 12 KiB, a decoder over 100
        assert loader.seen == 2500
        loader.close()


def test_a_queue_that_is_emptied_by_its_readers_meanwhile_is_not_waited_for() -> None:
    class LastJobTaken(SimpleQueue[Any]):
        def empty(self) -> bool:
            return False  # a reader takes the last job right after this answer

    with Readers(1, 60.0) as pool:
        pool._jobs.put(None)  # its reader goes home
        pool._readers[0].join()
        pool._jobs = LastJobTaken()
        job = pool.submit(int)
        ending = threading.Thread(target=pool._end_queued, args=(ValueError("gone"),), daemon=True)
        ending.start()
        ending.join(5)
        assert not ending.is_alive()
        assert isinstance(job.exception(), ValueError)


def test_an_evaluation_decodes_no_more_ahead_than_memory_allows(
    joint: JointData, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**joint.section.model_dump(), "workers": 1, "prefetch": 5}
    data = JointData(DataSection(**values), joint.catalogs, joint.splits, joint.dropped)
    loaders = Loaders(data, 7, 0, 1, CPU)
    one = data.section.datasets["clips"]
    each = 2 * (one.frames or 1) * 3 * one.size**2  # two clips a batch
    for free, expected in ((0, 1), (4 * 3 * each, 3), (2**40, 5)):  # a quarter may be taken
        monkeypatch.setattr("vimnas_ds.data.capacity.available_memory", partial(int, free))
        loader = loaders.evaluation("clips", "alpha", 2)
        assert loader._prefetch == expected
        loader.close()
    loaders.close()
