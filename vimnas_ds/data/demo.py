"""Four small generated datasets in the formats of the real ones, so that a demo needs no download.

    imagenet/train|val/<wnid>/*.JPEG                 pictures in class folders
    k400/train|val/<class name>/*.mp4                H.264, 25 or 30 fps, about 2 s
    k600/train|val/<class name>/*.mp4
    ssv2/20bn-something-something-v2/<id>.webm       VP9, 12 fps, about 2.5 s
    ssv2/labels/labels.json, train.json, validation.json
    manifest.json                                    the settings and counts

What the files show is drawn in `demo_scenes.py` as a pure function of the seed and the file's place
in the set, so two runs with the same settings write the same bytes. The set is built beside its
final folder and renamed when complete: a folder with a manifest is a whole set.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vimnas_ds.data.demo_scenes import (
    DEMO_CLASSES,
    DIFFICULTY,
    VIDEO_DATASETS,
    clip_fps,
    render_clip,
    render_image,
)

__all__ = [
    "DEMO_CLASSES",
    "DIFFICULTY",
    "clip_fps",
    "make_demo_data",
    "render_clip",
    "render_image",
]

# The picture classes' folder names. Real WordNet numbers end below n1500 0000.
DEMO_WNIDS = tuple(f"n9000{i:04d}" for i in range(len(DEMO_CLASSES["imagenet"])))

Counts = dict[str, dict[str, int]]

_MANIFEST = "manifest.json"
_FOLDER = {"train": "train", "test": "val"}
_SSV2_VIDEOS = Path("ssv2/20bn-something-something-v2")
_SSV2_LISTS = {"train": "train.json", "test": "validation.json"}
_ENCODERS = {
    # asm=0: x264's AVX-512 code writes other bytes from run to run
    ".mp4": ("libx264", {"preset": "veryfast", "crf": "26", "x264-params": "asm=0"}),
    ".webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"}),
}


@dataclass(frozen=True)
class DemoSettings:
    """What a demo set's bytes depend on; written into its manifest."""

    seed: int
    train_per_class: int
    test_per_class: int
    difficulty: dict[str, float] = field(default_factory=lambda: dict(DIFFICULTY))
    version: int = 1  # of the drawings and encodings: raise it when they change

    def counts(self) -> Counts:
        """Files per dataset and split."""
        per_class = {"train": self.train_per_class, "test": self.test_per_class}
        return {
            dataset: {split: len(names) * n for split, n in per_class.items()}
            for dataset, names in DEMO_CLASSES.items()
        }


@dataclass(frozen=True)
class _Job:
    """One picture, or one pair of clips, to be written."""

    root: Path
    seed: int
    dataset: str
    split: str
    class_id: int  # of a pair of clips: the even one
    number: int


def make_demo_data(
    out: Path,
    seed: int = 0,
    train_per_class: int = 100,
    test_per_class: int = 32,
    workers: int | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Counts:
    """Writes the four datasets under `out`, or returns at once where they already are.

    Args:
        workers: processes; by default one per CPU. 1 works in this process.
        force: make the set anew, also over a demo set with other settings or a damaged one.
        report: is called with each line of progress.

    Returns:
        The number of files: `counts[dataset]["train" or "test"]`.

    Raises:
        ValueError: `out` holds something else, or a set made with other settings (without `force`).
    """
    if train_per_class < 1 or test_per_class < 1:
        raise ValueError(
            "train_per_class and test_per_class must be at least 1, got "
            f"{train_per_class} and {test_per_class}"
        )
    settings = DemoSettings(seed, train_per_class, test_per_class)
    counts = settings.counts()
    if not force and _is_complete(out, settings):
        report(f"{out} already holds this demo data")
        return counts
    _refuse_to_overwrite(out, force)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _write_all(partial, settings, workers or os.cpu_count() or 1, report)
        if force or not _is_complete(out, settings):  # another process may have been faster
            if out.exists():
                shutil.rmtree(out)
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def _write_all(
    root: Path, settings: DemoSettings, workers: int, report: Callable[[str], None]
) -> None:
    for dataset in DEMO_CLASSES:
        _make_folders(root, dataset)
    _write_ssv2_labels(root, settings)
    jobs = list(_plan(root, settings))
    if workers == 1:
        _watch(map(_run, jobs), jobs, report)
    else:
        # Spawned, not forked: the caller may hold threads (torch, DALI) that do not survive a fork.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            _watch(pool.map(_run, jobs, chunksize=16), jobs, report)
    manifest = {"settings": asdict(settings), "counts": settings.counts()}
    _write_json(root / _MANIFEST, manifest)


def _watch(done: Iterator[None], jobs: list[_Job], report: Callable[[str], None]) -> None:
    for finished, (job, _) in enumerate(zip(jobs, done, strict=True), start=1):
        if finished == len(jobs) or finished % 250 == 0:
            report(f"{finished:5d} of {len(jobs)} ({job.dataset}, {job.split})")


def _plan(root: Path, settings: DemoSettings) -> Iterator[_Job]:
    for dataset, names in DEMO_CLASSES.items():
        step = 2 if dataset in VIDEO_DATASETS else 1
        for split, n in (("train", settings.train_per_class), ("test", settings.test_per_class)):
            for number in range(n):
                for class_id in range(0, len(names), step):
                    yield _Job(root, settings.seed, dataset, split, class_id, number)


def _run(job: _Job) -> None:
    place = (job.number, job.split, job.seed)
    if job.dataset == "imagenet":
        image = Image.fromarray(render_image(job.class_id, *place))
        path = _path(job.root, job.dataset, job.split, job.class_id, job.number)
        image.save(path, format="JPEG", quality=92)
        return
    frames = render_clip(job.dataset, job.class_id, *place)
    for class_id, clip in ((job.class_id, frames), (job.class_id + 1, frames[::-1])):
        path = _path(job.root, job.dataset, job.split, class_id, job.number)
        write_video(path, clip, clip_fps(job.dataset, job.number))


def write_video(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    """Encodes uint8 (T, H, W, 3), H and W even, as H.264 (.mp4) or VP9 (.webm)."""
    codec, options = _ENCODERS[path.suffix]
    # bitexact: without it the muxer writes a random identifier into the file.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def _path(root: Path, dataset: str, split: str, class_id: int, number: int) -> Path:
    """Where a file goes, named as in the real dataset."""
    if dataset == "ssv2":
        return root / _SSV2_VIDEOS / f"{_ssv2_id(split, class_id, number)}.webm"
    folder = root / dataset / _FOLDER[split]
    if dataset == "imagenet":
        wnid = DEMO_WNIDS[class_id]
        running = number * len(DEMO_WNIDS) + class_id + 1
        name = f"{wnid}_{number}" if split == "train" else f"ILSVRC2012_val_{running:08d}"
        return folder / wnid / f"{name}.JPEG"
    youtube_id = f"{dataset}{split[1]}{class_id}{number:05d}"  # 11 characters
    return folder / DEMO_CLASSES[dataset][class_id] / f"{youtube_id}_000000_000002.mp4"


def _make_folders(root: Path, dataset: str) -> None:
    for split in _FOLDER:
        for class_id in range(len(DEMO_CLASSES[dataset])):
            path = _path(root, dataset, split, class_id, 0)
            path.parent.mkdir(parents=True, exist_ok=True)


def _ssv2_id(split: str, class_id: int, number: int) -> str:
    start = {"train": 1, "test": 150_001}[split]
    return str(start + number * len(DEMO_CLASSES["ssv2"]) + class_id)


def _write_ssv2_labels(root: Path, settings: DemoSettings) -> None:
    """labels.json numbers the templates without brackets; the lists say which clip shows what."""
    folder = root / "ssv2" / "labels"
    folder.mkdir(parents=True, exist_ok=True)
    templates = DEMO_CLASSES["ssv2"]
    bare = sorted(template.replace("[", "").replace("]", "") for template in templates)
    _write_json(folder / "labels.json", {text: str(i) for i, text in enumerate(bare)})
    for split, n in (("train", settings.train_per_class), ("test", settings.test_per_class)):
        entries = [
            {
                "id": _ssv2_id(split, class_id, number),
                "label": template.replace("[something]", "a shape").lower(),
                "template": template,
                "placeholders": ["a shape"],
            }
            for number in range(n)
            for class_id, template in enumerate(templates)
        ]
        _write_json(folder / _SSV2_LISTS[split], entries)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_manifest(out: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((out / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "settings" in manifest else None


def _is_complete(out: Path, settings: DemoSettings) -> bool:
    manifest = _read_manifest(out)
    if manifest is None or manifest["settings"] != asdict(settings):
        return False
    suffixes = (".JPEG", ".mp4", ".webm")
    present = sum(path.suffix in suffixes for path in out.rglob("*"))
    return present == sum(sum(splits.values()) for splits in settings.counts().values())


def _refuse_to_overwrite(out: Path, force: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    manifest = _read_manifest(out)
    if manifest is None:
        raise ValueError(f"{out} holds something other than demo data; name another folder")
    if not force:
        raise ValueError(
            f"{out} holds demo data that is damaged or was made with other settings "
            f"({manifest['settings']}); pass --force to replace it, or name another folder"
        )
