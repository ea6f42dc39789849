"""Whether files can be read: videos of every codec with PyAV, pictures and frames with DALI."""

from __future__ import annotations

import functools
import io
import tempfile
from pathlib import Path
from typing import Any

from vimnas_ds.doctor.finding import SETUP, Finding, has_gpu

#: codec -> (encoders that can make a clip of it, its file's ending, what needs it)
CODECS = {
    "h264": (("libx264", "libopenh264"), "mp4", "Kinetics"),
    "vp9": (("libvpx-vp9",), "webm", "Something-Something-V2"),
    "hevc": (("libx265",), "mp4", ""),
    "av1": (("libsvtav1", "libaom-av1"), "mp4", ""),
    "vp8": (("libvpx",), "webm", ""),
    "mpeg4": (("mpeg4",), "mp4", ""),
}
WHEEL = "pip install --force-reinstall --no-deps av"
FRAMES, SIZE = 6, 64


def codecs() -> list[Finding]:
    """One clip of each codec, encoded here where an encoder is there, then decoded."""
    return [_codec(name, *CODECS[name]) for name in CODECS]


def _codec(name: str, encoders: tuple[str, ...], ending: str, need: str) -> Finding:
    import av

    label, required = f"codec {name}", bool(need)
    try:
        av.Codec(name, "r")
    except ValueError:
        told = f"PyAV's FFmpeg has no decoder{f': {need} is in it' if need else ''}"
        return Finding(label, "missing", told, WHEEL, required)
    able = [encoder for encoder in encoders if encoder in av.codecs_available]
    if not able:
        return Finding(label, "ok", "there is a decoder; not tried, no encoder makes a clip here")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{ending}"
        _encode(path, able[0])
        error = _decoding_error(path)
    if error > 12:
        return Finding(label, "failed", f"decoded frames are off by {error:.0f} of 255", WHEEL)
    return Finding(label, "ok", f"made with {able[0]}, decoded within {error:.1f} of 255")


def _level(number: int) -> int:
    """Grey of frame `number`."""
    return 40 + 30 * number


def _encode(path: Path, encoder: str) -> None:
    import av
    import numpy as np

    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream(encoder, rate=10)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(FRAMES):
            picture = np.full((SIZE, SIZE, 3), _level(number), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())


def _decoding_error(path: Path) -> float:
    from vimnas_ds.data.decode import read_clip

    clip = read_clip(path, FRAMES, 10, 0.0)
    return max(abs(float(clip[i].mean()) - _level(i)) for i in range(FRAMES))


def dali() -> list[Finding]:
    """DALI's decoder of pictures and its graph for frames, on the CPU and, if there is one, GPU."""
    findings = [_dali("cpu")]
    if has_gpu():
        return [*findings, _dali("gpu"), _nvdec()]
    told = "no GPU: PyAV decodes video, the CPU everything else"
    return [*findings, Finding("dali gpu", "skipped", told)]


def _dali(device: str) -> Finding:
    import numpy as np
    from PIL import Image

    from vimnas_ds.config import dataset_section
    from vimnas_ds.data.pipelines import MEAN, STD, Graph, build_eval_pipeline

    values = {"num_classes": 2, "size": 32, "resize": 32, "base_lr": 1.0, "weight_decay": 0}
    image = dataset_section("doctor", {**values, "kind": "image"})
    video = dataset_section("doctor", {**values, "kind": "video", "frames": FRAMES, "fps": 10})
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (90, 90, 90)).save(file, "JPEG", quality=95)
    place = np.full(2, 0.5, np.float32)
    jpeg = np.frombuffer(file.getvalue(), np.uint8)
    frames = np.full((FRAMES, 3, 32, 32), 90, np.uint8)
    kind: Any = device
    number = 0 if device == "gpu" else None
    worst = 0.0
    feeds: list[dict[str, Any]] = [{"encoded": jpeg}, {"frames": frames}]
    sources: list[Any] = ["image", "frames"]
    for section, source, feed in zip((image, video), sources, feeds, strict=True):
        make = functools.partial(build_eval_pipeline, section, source, 1, kind, 1, number)
        graph = Graph(make)
        batch = graph.run([{**feed, "place": place}]).float().cpu()
        graph.close()
        for channel in range(3):
            wanted = (90 - MEAN[channel]) / STD[channel]
            worst = max(worst, float((batch[0, channel] - wanted).abs().max()))
    told = f"a picture decoded, six frames normalised; off by {worst:.3f} at most"
    return Finding(f"dali {device}", "ok" if worst < 0.1 else "failed", told, SETUP)


def _nvdec() -> Finding:
    import numpy as np

    from vimnas_ds.config import dataset_section
    from vimnas_ds.data.encoded import read_encoded
    from vimnas_ds.data.pipelines import MEAN, STD, Graph, build_eval_pipeline

    values = {"num_classes": 2, "size": SIZE, "resize": SIZE, "base_lr": 1.0, "weight_decay": 0}
    video = dataset_section("doctor", {**values, "kind": "video", "frames": FRAMES, "fps": 10})
    with tempfile.TemporaryDirectory() as folder:
        _encode(Path(folder) / "clip.mp4", "libx264")
        clip = read_encoded(Path(folder) / "clip.mp4", FRAMES, 10, 0.0)
    if clip is None:
        return Finding("nvdec", "failed", "the clip made here is not one for the GPU", WHEEL)
    graph = Graph(lambda: build_eval_pipeline(video, "nvdec", 1, "gpu", 1, 0))
    feed: Any = {
        "encoded": clip.data,
        "numbers": clip.numbers,
        "place": np.full(2, 0.5, np.float32),
    }
    batch = graph.run([feed]).float().cpu()
    graph.close()
    levels = [float(batch[0, 0, i].mean()) * STD[0] + MEAN[0] for i in range(FRAMES)]
    error = max(abs(level - _level(i)) for i, level in enumerate(levels))
    told = f"the GPU decoded a clip within {error:.1f} of 255"
    return Finding("nvdec", "ok" if error < 12 else "failed", told, SETUP)
