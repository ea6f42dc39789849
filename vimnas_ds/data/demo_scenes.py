"""Draws the demo's images and clips: light textures, one shape or one slow change, numpy only.

A sample's pixels are a pure function of (seed, dataset, split, class, number). The video classes
come in time-reversed pairs: one generator draws a pair's clip, and the partner plays it backwards:

    clip(2k + 1, number)[t] = clip(2k, number)[T - 1 - t]

So no frame, and no unordered set of frames, gives the label away: what the pictures look like says
which pair it is, and only the order says which member. (A model blind to order ends near one half
of the pair accuracy.) Every clip changes steadily from its first to its last frame, so that any
window shows its direction.

A horizontal flip keeps the label in `imagenet`, `k400` and `k600`; only `ssv2` knows left from
right and clockwise from counterclockwise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# The share of hard samples in each dataset, between 0 and 1: faint colour, strong noise, a small
# shape or little motion. The others are plain and learned in a few hundred steps, so this share is
# what keeps a good small network away from 100 %.
DIFFICULTY: dict[str, float] = {"imagenet": 0.15, "k400": 0.25, "k600": 0.6, "ssv2": 0.15}

# Display names; a class's position is its number here. Video classes 2k and 2k + 1 are a pair.
DEMO_CLASSES: dict[str, tuple[str, ...]] = {
    "imagenet": (
        "disc",
        "square",
        "triangle",
        "cross",
        "ring",
        "horizontal stripes",
        "vertical stripes",
        "checkerboard",
    ),
    "k400": (
        "shape rising",
        "shape falling",
        "shape growing",
        "shape shrinking",
        "dots scattering",
        "dots gathering",
        "light brightening",
        "light dimming",
    ),
    "k600": (
        "tank filling",
        "tank draining",
        "scene zooming in",
        "scene zooming out",
        "doors opening",
        "doors closing",
        "colour warming",
        "colour cooling",
    ),
    "ssv2": (
        "Pushing [something] from left to right",
        "Pushing [something] from right to left",
        "Moving [something] up",
        "Moving [something] down",
        "Moving [something] towards the camera",
        "Moving [something] away from the camera",
        "Turning [something] clockwise",
        "Turning [something] counterclockwise",
    ),
}
VIDEO_DATASETS = ("k400", "k600", "ssv2")
SHAPES = ("disc", "square", "triangle", "cross", "ring")

_SPLITS = ("train", "test")
_HEIGHT = 48
_WIDTHS = (48, 56, 64)  # the story always happens inside the central square
_SECONDS = {"k400": (1.8, 2.3), "k600": (1.8, 2.3), "ssv2": (2.3, 2.8)}


@dataclass
class Scene:
    """A clip being painted. Lengths are in units of the picture's height; (0, 0) is its centre."""

    rng: np.random.Generator
    hard: bool
    progress: Floats  # (T, 1, 1), rises steadily from -0.5 to 0.5
    x: Floats  # (1, 1, W)
    y: Floats  # (1, H, 1), downwards
    canvas: Floats  # (3, T, H, W) in [0, 1]; numpy is quick where the long axes come last

    def contrast(self) -> float:
        """How far a shape's colour lies from what is behind it: small in hard samples."""
        return float(self.rng.uniform(0.12, 0.3) if self.hard else self.rng.uniform(0.4, 0.75))

    def reach(self) -> float:
        """The part of the full change that this clip shows: small in hard clips."""
        return float(self.rng.uniform(0.1, 0.4) if self.hard else self.rng.uniform(0.6, 1))

    def paint(self, mask: Floats, colour: Floats) -> None:
        """Lays `colour` (3, T or 1, 1, 1) over the canvas where `mask` (T or 1, H, W) is 1."""
        self.canvas += mask * (colour - self.canvas)


def clip_fps(dataset: str, number: int) -> int:
    """Frames per second of a demo clip: 12 in SSV2's style, 25 or 30 in Kinetics's."""
    if dataset == "ssv2":
        return 12
    return 30 if number % 4 == 3 else 25


def render_image(
    class_id: int, number: int, split: str = "train", seed: int = 0
) -> NDArray[np.uint8]:
    """One picture of the ImageNet-style set: uint8 (H, W, 3), 48 high and 48 to 64 wide."""
    rng = _generator(seed, "imagenet", split, class_id, number)
    scene = _open_scene(rng, "imagenet", num_frames=1)
    name = DEMO_CLASSES["imagenet"][class_id]
    if name in SHAPES:
        radius = _uniform(rng, 0.12, 0.2) if scene.hard else _uniform(rng, 0.25, 0.38)
        mask = shape_mask(scene, name, *_somewhere(scene, 0.2), radius)
    else:
        mask = _pattern_mask(scene, name)
    scene.paint(mask, _standing_out(scene))
    return _close_scene(scene)[0]


def render_clip(
    dataset: str, class_id: int, number: int, split: str = "train", seed: int = 0
) -> NDArray[np.uint8]:
    """One clip: uint8 (T, H, W, 3) at `clip_fps(dataset, number)`, about two seconds long.

    An odd class is the clip of the even class before it, of the same number, played backwards.
    """
    pair, backwards = divmod(class_id, 2)
    rng = _generator(seed, dataset, split, pair, number)
    seconds = rng.uniform(*_SECONDS[dataset])
    scene = _open_scene(rng, dataset, round(seconds * clip_fps(dataset, number)))
    _STORIES[dataset][pair](scene)
    frames = _close_scene(scene)
    return np.ascontiguousarray(frames[::-1]) if backwards else frames


def _generator(
    seed: int, dataset: str, split: str, content: int, number: int
) -> np.random.Generator:
    place = (list(DEMO_CLASSES).index(dataset), _SPLITS.index(split))
    return np.random.default_rng([seed, *place, content, number])


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def _open_scene(rng: np.random.Generator, dataset: str, num_frames: int) -> Scene:
    """A canvas with its background: a soft gradient under three faint waves."""
    width = int(rng.choice(_WIDTHS))
    time = np.linspace(0, 1, num_frames).reshape(-1, 1, 1)
    ease, phase = _uniform(rng, 0, 0.5), _uniform(rng, 0, 2 * math.pi)
    # Slower here, faster there, never backwards: the slope is 1 + ease * cos(...) > 0.
    bend = np.sin(2 * math.pi * time + phase) - math.sin(phase)
    progress = (time - 0.5 + ease / (2 * math.pi) * bend).astype(np.float32)
    x = ((np.arange(width) + 0.5 - width / 2) / _HEIGHT).astype(np.float32).reshape(1, 1, -1)
    y = ((np.arange(_HEIGHT) + 0.5) / _HEIGHT - 0.5).astype(np.float32).reshape(1, -1, 1)
    base = rng.uniform(0.15, 0.45, (3, 1, 1, 1))
    slope_x, slope_y = rng.uniform(-0.25, 0.25, (2, 3, 1, 1, 1))
    picture = base + x * slope_x + y * slope_y
    for _ in range(3):
        angle, cycles, phase = rng.uniform(0, [2 * math.pi, 4, 2 * math.pi])
        wave = np.sin(2 * math.pi * cycles * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        picture = picture + 0.04 * wave * rng.uniform(-1, 1, (3, 1, 1, 1))
    canvas = np.repeat(picture.astype(np.float32), num_frames, axis=1)
    hard = bool(rng.random() < DIFFICULTY[dataset])
    return Scene(rng, hard, progress, x, y, canvas)


def _close_scene(scene: Scene) -> NDArray[np.uint8]:
    """Adds what distracts, dots that drift any way and noise, and rounds to bytes."""
    rng = scene.rng
    for _ in range(rng.integers(5)):
        (x, y), (drift_x, drift_y) = _somewhere(scene, 0.5), _somewhere(scene, 0.6)
        dot_x, dot_y = x + drift_x * scene.progress, y + drift_y * scene.progress
        mask = shape_mask(scene, "disc", dot_x, dot_y, _uniform(rng, 0.03, 0.06))
        scene.paint(mask, rng.uniform(0, 1, (3, 1, 1, 1)).astype(np.float32))
    strength = rng.uniform(0.08, 0.14) if scene.hard else rng.uniform(0.02, 0.08)
    noise = rng.standard_normal(scene.canvas.shape, dtype=np.float32)
    frames = (255 * np.clip(scene.canvas + strength * noise, 0, 1) + 0.5).astype(np.uint8)
    return np.ascontiguousarray(frames.transpose(1, 2, 3, 0))


def shape_mask(
    scene: Scene,
    shape: str,
    center_x: Floats | float,
    center_y: Floats | float,
    radius: Floats | float,
    angle: Floats | float = 0.0,
) -> Floats:
    """How much of each pixel the shape covers, in [0, 1]: (T or 1, H, W), with soft edges."""
    x, y = scene.x - center_x, scene.y - center_y
    if shape in ("disc", "ring"):
        from_center = np.sqrt(x * x + y * y)
        ring = np.abs(from_center - 0.75 * radius) - 0.25 * radius
        return _soft_edge(ring if shape == "ring" else from_center - radius)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    if shape == "square":
        distance = np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius
    elif shape == "triangle":
        distance = np.maximum(0.87 * np.abs(u) - 0.5 * v, v) - 0.55 * radius
    elif shape == "cross":
        long, thin = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
        distance = np.maximum(long - radius, thin - 0.3 * radius)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return _soft_edge(distance)


def _soft_edge(distance: Floats) -> Floats:
    """1 inside (negative distance), 0 outside, a pixel's width between."""
    return np.clip(0.5 - distance * _HEIGHT, 0, 1)


def _union(masks: list[Floats]) -> Floats:
    return np.maximum.reduce(masks)


def _somewhere(scene: Scene, room: float) -> tuple[float, float]:
    center = scene.rng.uniform(-room, room, 2)
    return float(center[0]), float(center[1])


def _standing_out(scene: Scene) -> Floats:
    """A random colour brighter than the background by up to the scene's contrast per channel.

    Always brighter: were shapes dark or light at random, direction would be the product of two
    signs, which a small network needs far more steps to find.
    """
    behind = scene.canvas.mean(axis=(1, 2, 3), keepdims=True)
    step = scene.contrast() * scene.rng.uniform(0.4, 1, (3, 1, 1, 1))
    return np.clip(behind + step, 0, 1).astype(np.float32)


def _pattern_mask(scene: Scene, name: str) -> Floats:
    """Stripes or a checkerboard over the whole picture, with random period and phase."""
    cycles, phase_x, phase_y = scene.rng.uniform([2, 0, 0], [4.5, 2 * math.pi, 2 * math.pi])
    wave_x = np.sin(2 * math.pi * cycles * scene.x + phase_x) + 0 * scene.y
    wave_y = np.sin(2 * math.pi * cycles * scene.y + phase_y) + 0 * scene.x
    waves = {
        "horizontal stripes": wave_y,
        "vertical stripes": wave_x,
        "checkerboard": wave_x * wave_y,
    }
    return np.clip(0.5 + 2 * waves[name], 0, 1).astype(np.float32)


# The stories: each paints the forward member of a pair.


def _move(scene: Scene, step_x: float, step_y: float) -> None:
    """A shape that travels by (step_x, step_y) from the first frame to the last."""
    rng = scene.rng
    x, y = _somewhere(scene, 0.12)
    mask = shape_mask(
        scene,
        str(rng.choice(SHAPES)),
        x + step_x * scene.progress,
        y + step_y * scene.progress,
        _uniform(rng, 0.1, 0.2),
        _uniform(rng, 0, 2 * math.pi),
    )
    scene.paint(mask, _standing_out(scene))


def _rise(scene: Scene) -> None:
    _move(scene, _uniform(scene.rng, -0.25, 0.25), -0.8 * scene.reach())


def _go_right(scene: Scene) -> None:
    _move(scene, 0.8 * scene.reach(), _uniform(scene.rng, -0.25, 0.25))


def _grow(scene: Scene) -> None:
    """A shape whose radius grows, by up to a factor of six over the whole clip."""
    rng = scene.rng
    radius = _uniform(rng, 0.16, 0.24) * np.exp(1.8 * scene.reach() * scene.progress)
    x, y = _somewhere(scene, 0.12)
    shape, angle = str(rng.choice(SHAPES)), _uniform(rng, 0, 2 * math.pi)
    scene.paint(shape_mask(scene, shape, x, y, radius, angle), _standing_out(scene))


def _scatter(scene: Scene) -> None:
    """Five to seven dots that move away from their common centre."""
    rng = scene.rng
    colour, size = _standing_out(scene), _uniform(rng, 0.05, 0.08)
    spread = 0.27 + 0.4 * scene.reach() * scene.progress
    x, y = _somewhere(scene, 0.1)
    num_dots, turn = int(rng.integers(5, 8)), _uniform(rng, 0, 2 * math.pi)
    masks = []
    for dot in range(num_dots):
        angle = turn + 2 * math.pi * dot / num_dots + _uniform(rng, -0.3, 0.3)
        dot_x, dot_y = x + spread * math.cos(angle), y + spread * math.sin(angle)
        masks.append(shape_mask(scene, "disc", dot_x, dot_y, size))
    scene.paint(_union(masks), colour)


def _brighten(scene: Scene) -> None:
    """A still shape in a room whose light comes up."""
    rng = scene.rng
    x, y = _somewhere(scene, 0.2)
    shape, angle = str(rng.choice(SHAPES)), _uniform(rng, 0, 2 * math.pi)
    mask = shape_mask(scene, shape, x, y, _uniform(rng, 0.15, 0.3), angle)
    scene.paint(mask, _standing_out(scene))
    scene.canvas *= 0.75 + 0.6 * scene.reach() * scene.progress


def _fill(scene: Scene) -> None:
    """A level that rises over the whole width, with a wavy surface."""
    rng = scene.rng
    cycles, phase = _uniform(rng, 0.5, 2), _uniform(rng, 0, 2 * math.pi)
    drift = _uniform(rng, -2, 2) * scene.progress
    wave = 0.04 * np.sin(2 * math.pi * (cycles * scene.x + drift) + phase)
    level = _uniform(rng, -0.1, 0.1) - 0.75 * scene.reach() * scene.progress + wave
    mask = _soft_edge((level - scene.y).astype(np.float32))
    scene.paint(mask, _standing_out(scene))


def _zoom(scene: Scene) -> None:
    """A field of blobs, denser in the middle, seen from ever nearer."""
    rng = scene.rng
    scale = np.exp(1.3 * scene.reach() * scene.progress)
    colour = _standing_out(scene)
    masks = []
    for _ in range(10):
        angle, away = _uniform(rng, 0, 2 * math.pi), _uniform(rng, 0.1, 0.55)
        x, y, radius = away * math.cos(angle), away * math.sin(angle), _uniform(rng, 0.05, 0.1)
        masks.append(shape_mask(scene, "disc", x * scale, y * scale, radius * scale))
    scene.paint(_union(masks), colour)


def _open_doors(scene: Scene) -> None:
    """Two door leaves that slide apart, sideways or up and down, before a bright room."""
    rng = scene.rng
    across = scene.x if rng.random() < 0.5 else scene.y
    gap = 0.25 + 0.45 * scene.reach() * scene.progress
    room = _standing_out(scene)
    slit = np.abs(across - _uniform(rng, -0.08, 0.08))
    scene.paint(_soft_edge(slit - gap), room)


def _warm(scene: Scene) -> None:
    """A still shape whose colour goes from blue to red."""
    rng = scene.rng
    x, y = _somewhere(scene, 0.15)
    shape, angle = str(rng.choice(SHAPES)), _uniform(rng, 0, 2 * math.pi)
    mask = shape_mask(scene, shape, x, y, _uniform(rng, 0.2, 0.35), angle)
    red = 0.5 + 0.8 * scene.reach() * scene.progress
    green = np.full_like(red, rng.uniform(0.2, 0.7))
    colour = np.stack([red, green, 1 - red])  # (3, T, 1, 1)
    scene.paint(mask, np.clip(colour, 0, 1).astype(np.float32))


def _turn(scene: Scene) -> None:
    """A clock's hand with a heavy end that turns clockwise, by up to 160 degrees."""
    rng = scene.rng
    x, y = _somewhere(scene, 0.08)
    angle = _uniform(rng, -0.8, 0.8) - math.pi / 2 + 2.8 * scene.reach() * scene.progress
    colour, length = _standing_out(scene), _uniform(rng, 0.24, 0.34)
    masks = []
    for part in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        hand_x, hand_y = x + part * length * np.cos(angle), y + part * length * np.sin(angle)
        masks.append(shape_mask(scene, "disc", hand_x, hand_y, 0.12 if part == 1 else 0.05))
    scene.paint(_union(masks), colour)


_STORIES: dict[str, tuple[Callable[[Scene], None], ...]] = {
    "k400": (_rise, _grow, _scatter, _brighten),
    "k600": (_fill, _zoom, _open_doors, _warm),
    "ssv2": (_go_right, _rise, _grow, _turn),
}
