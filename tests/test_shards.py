"""Tar shards: the same batches as from the files, written whole or not at all, damage in words."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from scripts import index_data, make_shards, train
from tests.conftest import ROOT, SHARED_DATA
from tests.media import encode, section
from tests.small import small_config
from vimnas_ds.config import DataSection, DatasetSection
from vimnas_ds.data import shard_build, shards
from vimnas_ds.data.bad import BadAnnotations, BadFile, BadVideo, DataMissing
from vimnas_ds.data.blob import Blob, Media
from vimnas_ds.data.decode import read_clip
from vimnas_ds.data.encoded import read_encoded
from vimnas_ds.data.joint import JointData, Loaders, open_datasets
from vimnas_ds.data.shard_build import Written, build_shards
from vimnas_ds.data.shards import open_shards, read_members, write_members
from vimnas_ds.data.view_decode import read_views
from vimnas_ds.data.view_loader import ViewLoader
from vimnas_ds.data.views import ViewPlan

CPU = torch.device("cpu")
RICH = {"randaugment": {"n": 1, "m": 9, "std": 0.5}, "random_erasing": 0.5}
#: File names, without their suffix, that shells, URLs, tars and WebDataset treat in their own ways.
NAMES = [
    "plain", "-dash", "with space", "it's \"quoted\"", "ünïcode 视频", "a:b", "two.dots.in",
    "x" * 130, "#1%20", os.fsdecode(b"caf\xe9"), "back\\xe9slash", "last",
]  # fmt: skip


def make_files(root: Path, kind: str) -> DatasetSection:
    """Two classes, twelve training and four test files of noise, and one unusable file each."""
    rng = np.random.default_rng(0)
    for split, names in (("train", NAMES), ("val", NAMES[:4])):
        for i, name in enumerate(names):
            folder = root / split / ("a", "b b")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
            wide = small.resize((96 + i, 48), Image.Resampling.BICUBIC)
            if kind == "image":
                wide.save(folder / f"{name}.jpg", quality=95)
            else:
                pixels = np.asarray(wide)
                frames = [pixels[:, 2 * t : 2 * t + 64] for t in range(12)]
                encode(folder / "made.mp4", frames, rate=8)
                (folder / "made.mp4").rename(folder / f"{name}.mp4")
        (folder / ("broken.jpg" if kind == "image" else "broken.mp4")).write_text("no picture")
    return section(root, kind, **RICH)


def joint(dataset: DatasetSection, folder: Path, name: str = "toy") -> DataSection:
    return DataSection(datasets={name: dataset}, index_dir=folder / "indexes", held_out=0.2)


def pack(dataset: DatasetSection, folder: Path, out: Path, **options: Any) -> Written:
    """Shards of four or five files each."""
    return build_shards("toy", joint(dataset, folder), out, 25_000, show=False, **options)


def sharded(dataset: DatasetSection, out: Path) -> DatasetSection:
    return dataset.model_copy(update={"root": None, "shards": out})


class Packed:
    """The same dataset as files and as shards."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.out = folder, folder / "shards"
        self.dataset = make_files(folder / "data", kind)
        self.written = pack(self.dataset, folder, self.out)

    def open(self) -> tuple[JointData, JointData]:
        files = open_datasets(joint(self.dataset, self.folder))
        return files, open_datasets(joint(sharded(self.dataset, self.out), self.folder / "none"))


@pytest.fixture(scope="module", params=["image", "video"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return Packed(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def pictures(tmp_path: Path) -> Packed:
    """Ones that a test may damage."""
    return Packed(tmp_path, "image")


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


def content(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.iterdir() if not f.name.startswith("."))
    return {file.name: file.read_bytes() for file in files}


# -- reading ----------------------------------------------------------------------------------


def test_the_data_of_a_run_are_the_same_from_files_and_shards(packed: Packed) -> None:
    files, sharded = packed.open()
    one, other = files.catalogs["toy"], sharded.catalogs["toy"]
    assert replace(other, root=one.root) == one
    assert sharded.splits == files.splits
    assert sharded.fingerprint() == files.fingerprint()
    assert sharded.describe() == files.describe()
    assert len(sharded.unusable["toy"]) == 2
    assert packed.written.left_out == 2
    assert packed.written.shards >= 3


def test_batches_are_bit_equal_from_shards_and_resume_in_the_middle(
    packed: Packed, pool: ThreadPoolExecutor
) -> None:
    plan = ViewPlan(2 if packed.dataset.kind == "video" else 1, 3)
    seen: list[list[tuple[torch.Tensor, Any, tuple[str, ...]]]] = []
    for data in packed.open():
        loaders = Loaders(data, 7, 0, 1, CPU)
        found = [
            loaders.batch("toy", split, 4, number)
            for split in ("train", "alpha")
            for number in range(4)
        ]
        assert not loaders.replaced()["toy"]
        loaders.training("toy", "train", 4).seek(2)  # as a resumed run does
        again = loaders.training("toy", "train", 4).next()
        assert torch.equal(again.x, found[2].x)
        found += [b for split in ("select", "test") for b in loaders.evaluation("toy", split, 3)]
        loaders.close()
        samples = data.splits["toy"]["test"]
        views = ViewLoader("toy", data.section.datasets["toy"], samples, plan, 0, 1, 2, CPU, pool)
        seen.append([(b.x, b.y.tolist(), b.names) for b in found])
        seen[-1] += [(b.x, b.labels, b.names) for b in views]
        views.close()
    assert len(seen[0]) == len(seen[1]) >= 12
    for one, other in zip(*seen, strict=True):
        assert one[1:] == other[1:]
        assert torch.equal(one[0], other[0])


def outcome(read: Any, media: Media) -> Any:
    """What a reader gives, or in which words it refuses."""
    try:
        found = read(media)
    except BadVideo as error:
        return error.reason
    return [
        np.asarray(part).tobytes() for part in ([found] if hasattr(found, "dtype") else found or [])
    ]


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")
def test_awkward_videos_are_read_from_memory_as_from_the_disk() -> None:
    plan = ViewPlan(clips=2)
    readers = [
        partial(read_clip, frames=4, fps=8, start=0.7),
        partial(read_views, times=partial(plan.times, frames=2, fps=8.0)),
        partial(read_encoded, frames=4, fps=8, start=0.7),
    ]
    paths = sorted(p for p in (SHARED_DATA / "awkward").iterdir() if p.is_file())
    paths += sorted((SHARED_DATA / "weizmann").glob("*/*.mp4"))[::20]
    assert len(paths) > 20
    for path in paths:
        blob = Blob(str(path), path.read_bytes())
        for read in readers:
            assert outcome(read, path) == outcome(read, blob), (path, read)


def test_a_kinetics_listing_survives_without_its_annotations(tmp_path: Path) -> None:
    """Missing files, and YouTube ids that no file name tells."""
    root, lines = tmp_path / "data", ["label,youtube_id,time_start,time_end,split"]
    frames = [np.full((16, 16, 3), 20 * t, np.uint8) for t in range(6)]
    for i in range(10):
        split = "train" if i < 7 else "validate"
        lines.append(f"{'ab'[i % 2]},-id{i:08d},1,11,{split}")
        if i not in (2, 8):
            encode(root / "videos" / f"-id{i:08d}.mp4", frames)
    (root / "all.csv").write_text("\n".join(lines) + "\n")
    dataset = section(root, "video", layout="kinetics", annotations="all.csv")
    dataset = dataset.model_copy(update={"test_split": "validate"})
    pack(dataset, tmp_path, tmp_path / "out")
    files = open_datasets(joint(dataset, tmp_path))
    shutil.rmtree(root)
    found = open_datasets(joint(sharded(dataset, tmp_path / "out"), tmp_path))
    one, other = files.catalogs["toy"], found.catalogs["toy"]
    assert other.missing == 2
    assert len(other.video_ids) == 10
    assert replace(other, root=one.root) == one
    assert found.fingerprint() == files.fingerprint()


def test_many_threads_read_from_few_open_shards(
    packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    store = open_shards("toy", shutil.copytree(packed.out, tmp_path / "out"))
    root = packed.dataset.root
    assert root is not None
    paths = [s.path for part in packed.open()[0].splits["toy"].values() for s in part] * 20
    order = np.random.default_rng(0).permutation(len(paths))
    with ThreadPoolExecutor(8) as many:
        found = list(many.map(lambda i: store.file(paths[i]).data, order))
    assert all(data == (root / paths[i]).read_bytes() for i, data in zip(order, found, strict=True))
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum(link.readlink().is_relative_to(tmp_path) for link in links) == 2


# -- damage -----------------------------------------------------------------------------------


def test_a_damaged_file_is_replaced_like_any_bad_file(pictures: Packed) -> None:
    files, sharded = pictures.open()
    assert pictures.dataset.root is not None
    victim = files.splits["toy"]["train"][3].path
    place = next(m for m in members(pictures.out) if m["path"] == os.fsencode(victim))
    tar = pictures.out / f"toy-{place['shard']:06d}.tar"
    with tar.open("r+b") as out:
        out.seek(place["offset"] + place["size"] // 2)
        out.write(b"\0damaged\0")
    (pictures.dataset.root / victim).write_text("no picture any more")
    seen = []
    for data in (files, sharded):
        loaders = Loaders(data, 7, 0, 1, CPU)
        batches = [loaders.batch("toy", "train", 4, number) for number in range(6)]
        assert loaders.replaced()["toy"] >= 2
        seen.append((batches, loaders.substitutions()["toy"], loaders.reasons()["toy"]))
        loaders.close()
    assert [b.names for b in seen[0][0]] == [b.names for b in seen[1][0]]
    assert all(torch.equal(a.x, b.x) for a, b in zip(seen[0][0], seen[1][0], strict=True))
    assert seen[1][1] == {victim: f"damaged in its shard ({tar.name})"}
    assert set(seen[1][2]) == {"damaged in its shard"}
    with pytest.raises(BadFile, match="not in the shards"):
        open_shards("toy", pictures.out).file("train/a/nothing.jpg")


def test_a_shard_that_is_missing_or_cut_is_named_and_written_again(pictures: Packed) -> None:
    whole = content(pictures.out)
    for name, words in (("toy-000001.tar", "No such file"), ("toy-000002.tar", "bytes and was wr")):
        tar = pictures.out / name
        if "No such" in words:
            tar.unlink()
        else:
            os.truncate(tar, 5000)
        shards._opened.cache_clear()
        with pytest.raises(DataMissing, match=f"{name}.*{words}") as caught:
            pictures.open()
        assert "scripts/make_shards.py" in str(caught.value)
        again = pack(pictures.dataset, pictures.folder, pictures.out)
        assert again.kept == again.shards - 1
        assert content(pictures.out) == whole
    assert pack(pictures.dataset, pictures.folder, pictures.out).copied == 0


def members(out: Path) -> list[dict[str, Any]]:
    return read_members(out)[1].to_pylist()


def refusal(found: Packed, **changes: Any) -> str:
    """The words in which a run refuses the shards."""
    dataset = sharded(found.dataset, found.out).model_copy(update=changes)
    with pytest.raises((DataMissing, BadAnnotations)) as caught:
        open_datasets(joint(dataset, found.folder))
    return str(caught.value)


def test_shards_that_do_not_fit_are_refused_in_words(pictures: Packed, tmp_path: Path) -> None:
    assert 'made with kind "image", this run has "video"' in refusal(
        pictures, kind="video", frames=4, fps=8.0
    )
    assert "set vimnas.data.toy.layout" in refusal(pictures, layout="csv", annotations="a.csv")
    assert "vimnas.data.toy.shards" in refusal(pictures, shards=tmp_path / "nowhere")
    assert "num_classes is 1" in refusal(pictures, num_classes=1)
    other = joint(sharded(pictures.dataset, pictures.out), tmp_path, name="k600")
    with pytest.raises(BadAnnotations, match=r"dataset toy; check vimnas\.data\.k600\.shards"):
        open_datasets(other)
    about, table = read_members(pictures.out)
    for column, value in (("shard", 7), ("shard", -1), ("offset", -512), ("size", 2**62)):
        rows = table.to_pylist()
        rows[0][column] = value
        write_members(pictures.out, about, pa.Table.from_pylist(rows, schema=table.schema))
        assert "names places that the shards do not have" in refusal(pictures)
    rows = table.to_pylist()
    rows[0]["label"] = 1 - rows[0]["label"]
    write_members(pictures.out, about, pa.Table.from_pylist(rows, schema=table.schema))
    assert "were not written together" in refusal(pictures)
    (pictures.out / "members.parquet").write_text("no table")
    assert "make the shards anew" in refusal(pictures)
    (pictures.out / "index.parquet").unlink()
    assert "not finished" in refusal(pictures)


# -- writing ----------------------------------------------------------------------------------


def test_the_tars_hold_exactly_the_usable_files(packed: Packed) -> None:
    root, found = packed.dataset.root, {}
    assert root is not None
    for file in sorted(packed.out.glob("*.tar")):
        assert file.stat().st_size <= 25_000
        with tarfile.open(file) as tar:
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None
                found[member.name] = data.read()
    disk = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.*") if p.is_file()}
    assert found == {path: data for path, data in disk.items() if "broken" not in path}
    assert {Path(path).stem for path in found} == set(NAMES)
    assert (packed.out / "index.parquet").read_bytes() == (
        packed.folder / "indexes" / "toy.parquet"
    ).read_bytes()


KILLED = """
import os, signal, sys
from pathlib import Path
from vimnas_ds.config import DataSection
from vimnas_ds.data import shard_build
read, left = shard_build._read, [14]
def dying(*args):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*args)
shard_build._read, shard_build.READERS, shard_build.AHEAD = dying, 1, 1
section = DataSection.model_validate_json(sys.argv[1])
shard_build.build_shards("toy", section, Path(sys.argv[2]), 25_000, show=False)
"""


def kill_after_two_shards(pictures: Packed, killed: Path) -> None:
    data = joint(pictures.dataset, pictures.folder).model_dump_json()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, data, str(killed)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_a_killed_run_is_continued_to_the_same_bytes(pictures: Packed) -> None:
    killed = pictures.folder / "killed"
    kill_after_two_shards(pictures, killed)
    begun = content(killed)
    assert begun.keys() == {"toy-000000.tar", "toy-000001.tar"}
    stamps = {name: (killed / name).stat().st_mtime_ns for name in begun}
    written = pack(pictures.dataset, pictures.folder, killed)
    assert written.kept == 2
    assert written.copied < written.files
    assert {name: (killed / name).stat().st_mtime_ns for name in begun} == stamps
    assert content(killed) == content(pictures.out)
    assert not list(killed.glob(".*partial"))


def test_a_shard_whose_checksums_a_power_cut_took_is_written_again(pictures: Packed) -> None:
    cut = pictures.folder / "cut"
    kill_after_two_shards(pictures, cut)
    first, second = sorted((cut / ".parts").glob("*.crc"))
    first.unlink()
    os.truncate(second, second.stat().st_size - 3)
    assert pack(pictures.dataset, pictures.folder, cut).kept == 0
    assert content(cut) == content(pictures.out)


def test_a_full_disk_is_said_in_words_and_leaves_nothing_half_written(
    pictures: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = pictures.folder / "full", []

    def full(number: int) -> None:
        written.append(number)
        if len(written) == 3:  # the first shard and its checksums are on the disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DataMissing, match=r"No space left .* goes on from here"):
            pack(pictures.dataset, pictures.folder, out)
    assert content(out).keys() == {"toy-000000.tar"}
    assert not list(out.glob(".*partial"))
    with monkeypatch.context() as patched:
        usage = shutil.disk_usage(out)._replace(free=30_000)
        patched.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DataMissing, match=r"still need .* GB free"):
            pack(pictures.dataset, pictures.folder, out)
    assert pack(pictures.dataset, pictures.folder, out).kept == 1
    assert content(out) == content(pictures.out)


def test_only_a_folder_of_its_own_is_written_to(pictures: Packed) -> None:
    dataset, folder, out = pictures.dataset, pictures.folder, pictures.out
    assert dataset.root is not None
    with pytest.raises(DataMissing, match="File exists"):
        pack(dataset, folder, dataset.root / "train/a/plain.jpg")
    with pytest.raises(DataMissing, match=r"holds other files too \(first: train\)"):
        pack(dataset, folder, dataset.root, overwrite=True)
    (dataset.root / "train/a/plain.jpg").unlink()
    index = folder / "indexes" / "toy.parquet"
    assert index_data.main(["--update", str(index)]) == 0
    before = content(out)
    with pytest.raises(DataMissing, match=r"holds shards of other data.*--overwrite"):
        pack(dataset, folder, out)
    assert content(out) == before
    written = pack(dataset, folder, out, overwrite=True)
    assert written.files == pictures.written.files - 1
    assert len(pictures.open()[1].catalogs["toy"].train) == len(NAMES) - 1


def test_a_file_that_changes_while_it_is_copied_is_named(
    pictures: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shard_build.plan_shards

    def grown(*args: Any) -> Any:
        plan = real(*args)
        assert pictures.dataset.root is not None
        with (pictures.dataset.root / plan.shards[1][0].path).open("ab") as file:
            file.write(b"more")
        return plan

    monkeypatch.setattr(shard_build, "plan_shards", grown)
    with pytest.raises(DataMissing, match=r"its size has changed.*index_data\.py --update"):
        pack(pictures.dataset, pictures.folder, pictures.folder / "grown")


# -- scripts ----------------------------------------------------------------------------------


def test_the_scripts_make_shards_and_use_them(
    packed: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config()
    kind = {"image": "imagenet", "video": "k400"}[packed.dataset.kind]
    recipe = config["vimnas"]["data"]["datasets"][kind]
    config["vimnas"]["data"] = {"datasets": {kind: recipe}, "index_dir": str(tmp_path / "indexes")}
    config["vimnas"]["schedule"]["image_epochs"] = 0
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    known, out = ["--deepspeed_config", str(file)], tmp_path / "out"
    root = str(packed.dataset.root)
    assert make_shards.main([*known, "--dataset", kind, "--root", root, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "16 files" in said
    assert "left out: 2 unusable, 0 missing" in said
    setting = said.rpartition("--set ")[2].strip()
    assert setting == f"vimnas.data.{kind}.shards={out}"
    plans = []
    for override in (f"vimnas.data.{kind}.root={root}", setting):
        assert train.main([*known, "--dry_run", "--set", override]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]
    assert "total" in plans[1]
    index = str(tmp_path / "indexes" / f"{kind}.parquet")
    assert make_shards.main(["--index", index, "--out", str(tmp_path / "more")]) == 0
    assert content(tmp_path / "more") == content(out)
    capsys.readouterr()
    assert make_shards.main([*known, "--dataset", "ssv2", "--out", str(out)]) == 2
    assert "--dataset ssv2" in capsys.readouterr().err
    assert make_shards.main(["--index", index, "--out", root]) == 2
    assert capsys.readouterr().err.startswith("cannot make shards: ")


def test_a_share_of_unusable_files_that_training_allows_is_allowed_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 pictures, a tenth of them broken; the index is made and updated from other folders."""
    root = tmp_path / "data"
    for i in range(60):
        folder = root / ("val" if i < 3 else "train") / "a"
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (8, 8), (i, 0, 0))
        picture.save(folder / f"{i}.png")
        if i % 10 == 9:
            (folder / f"{i}.png").write_bytes(b"no picture")
    raw = small_config()
    recipe = raw["vimnas"]["data"]["datasets"]["imagenet"]
    raw["vimnas"]["data"] = {"index_dir": str(tmp_path / "i"), "datasets": {"imagenet": recipe}}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(raw))
    monkeypatch.chdir(tmp_path)
    ask = ["--dataset", "imagenet", "--deepspeed_config", str(config), "--root", "data"]
    assert index_data.main(ask) == 0
    monkeypatch.chdir(tmp_path.parent)
    assert index_data.main(["--update", str(tmp_path / "i" / "imagenet.parquet")]) == 0
    ask = ["--index", str(tmp_path / "i" / "imagenet.parquet"), "--out", str(tmp_path / "out")]
    assert make_shards.main(ask) == 2
    assert "max_bad_share" in capsys.readouterr().err
    assert make_shards.main([*ask, "--max_bad_share", "0.2"]) == 0
    ask = ["--dataset", "imagenet", "--deepspeed_config", str(config), "--root", str(root)]
    ask += ["--out", str(tmp_path / "other"), "--set", "vimnas.data.max_bad_share=0.2"]
    assert make_shards.main(ask) == 0
    capsys.readouterr()
    assert index_data.main(["--update", str(tmp_path / "out" / "index.parquet")]) == 2
    assert "make_shards.py --overwrite" in capsys.readouterr().err
