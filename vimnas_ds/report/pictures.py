"""Pictures of what a run does: batches as contact sheets, decisions as bars and heat maps.

A batch is drawn as the network sees it, only with the normalisation undone,

    grey = 255 * (x * std + mean)        (ImageNet's mean and std)

so a wrong crop, colour order, frame order or label shows. Figures are matplotlib `Figure`s drawn
by Agg; no pyplot, which would keep global state and look for a display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Picture = NDArray[np.uint8]  # (H, W, 3)

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
#: Least shorter side of a picture of a sheet, in pixels.
MIN_SIDE = 112
#: Height of the strip above each sample that holds its label, and the gap around tiles, in pixels.
LABEL_HEIGHT = 20
GAP = 4
#: Pictures in one row of a sheet of images.
COLUMNS = 4
#: A heat map of at most this many cells has its numbers written in them.
MAX_WRITTEN_CELLS = 120


def contact_sheet(
    x: Tensor,
    labels: Sequence[str],
    max_samples: int = 8,
    max_frames: int = 8,
    min_side: int = MIN_SIDE,
) -> Picture:
    """The first samples of a normalised batch, each under its label.

    x: (B, 3, H, W) images, `COLUMNS` in a row, or (B, 3, T, H, W) clips, one a row, with at most
    `max_frames` evenly spaced frames (the first and the last among them). Labels too long for
    their sample are cut. Pictures whose shorter side is smaller than `min_side` are enlarged by
    whole factors until it is not. Raises ValueError on other shapes or on a label too few.
    """
    if x.ndim not in (4, 5) or x.shape[1] != 3 or not len(x):
        raise ValueError(f"x must be (B, 3, H, W) or (B, 3, T, H, W), got {tuple(x.shape)}")
    num_samples = min(len(x), max_samples)
    if len(labels) < num_samples:
        raise ValueError(f"{num_samples} samples need that many labels, got {len(labels)}")
    pixels = x[:num_samples].detach().float().cpu()
    if pixels.ndim == 4:
        pixels = pixels.unsqueeze(2)  # (B, 3, 1, H, W)
        num_columns = min(COLUMNS, num_samples)
    else:
        pixels = pixels[:, :, _spread(pixels.shape[2], max_frames)]
        num_columns = 1
    strips = [_strip(_grey_levels(sample), min_side) for sample in pixels]

    height, width = strips[0].shape[:2]
    num_rows = math.ceil(num_samples / num_columns)
    row_height, column_width = LABEL_HEIGHT + height + GAP, width + GAP
    canvas = (num_columns * column_width + GAP, num_rows * row_height + GAP)
    sheet = Image.new("RGB", canvas, "white")
    draw = ImageDraw.Draw(sheet)
    font = _font(13)
    for i, strip in enumerate(strips):
        left = GAP + i % num_columns * column_width
        top = GAP + i // num_columns * row_height
        text = _cut(labels[i], font, width)
        draw.text((left + 1, top + LABEL_HEIGHT / 2), text, "black", font, anchor="lm")
        sheet.paste(Image.fromarray(strip), (left, top + LABEL_HEIGHT))
    return np.asarray(sheet)


def sample_strip(x: Tensor, max_frames: int, min_side: int) -> Picture:
    """One normalised sample, (3, H, W) or (3, T, H, W), as a row of evenly spaced frames, enlarged
    as in `contact_sheet`."""
    pixels = (x if x.ndim == 4 else x.unsqueeze(1)).detach().float().cpu()
    return _strip(_grey_levels(pixels[:, _spread(pixels.shape[1], max_frames)]), min_side)


def captions(y: Tensor, class_names: Sequence[str]) -> list[str]:
    """A label a sample. y: (B,) class numbers, or (B, C) shares of mixed labels, of which the
    largest two are named: "disc 70% ring 30%"."""
    return [_caption(row, class_names) for row in y.detach().float().cpu()]


def _caption(y: Tensor, class_names: Sequence[str]) -> str:
    if y.ndim == 0:
        return class_names[int(y)]
    share, index = y.topk(min(2, len(y)))
    parts = [(class_names[i], s) for i, s in zip(index.tolist(), share.tolist(), strict=True)]
    # Label smoothing gives every class a little: a second name is a mixed sample only above 5 %.
    kept = parts[:1] + [part for part in parts[1:] if part[1] > 0.05]
    return kept[0][0] if len(kept) == 1 else " ".join(f"{name} {s:.0%}" for name, s in kept)


def under_titles(sheets: Mapping[str, Picture]) -> Picture:
    """Pictures below each other, each under its title."""
    margin, font = 2 * LABEL_HEIGHT, _font(15)
    widest = max(font.getlength(title) for title in sheets)
    width = max(math.ceil(widest) + 2 * GAP, *(sheet.shape[1] for sheet in sheets.values()))
    height = sum(margin + sheet.shape[0] for sheet in sheets.values())
    page = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(page), 0
    for title, sheet in sheets.items():
        draw.text((GAP, top + margin / 2), title, "black", font, anchor="lm")
        page.paste(Image.fromarray(sheet), (0, top + margin))
        top += margin + sheet.shape[0]
    return np.asarray(page)


def bars(
    title: str,
    labels: Sequence[str],
    values: Sequence[float],
    value_name: str,
    uniform: float | None = None,
) -> Figure:
    """One bar a choice, its value above it; `uniform` draws a dashed line to compare with."""
    figure = _figure(max(4.0, 1.6 + 0.7 * len(labels)), 3.2)
    axes = figure.add_subplot()
    drawn = axes.bar(range(len(values)), values, width=0.7, color="#4477aa")
    number = "{:.0f}" if all(isinstance(v, int) for v in values) else "{:.3f}"
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the dashed line crosses it
    axes.bar_label(drawn, fmt=number, fontsize=9, padding=3, bbox=paper, zorder=4)
    if uniform is not None:
        axes.axhline(uniform, color="#bb5566", linestyle="--", linewidth=1.2, label="uniform")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylim(0, 1.15 * max([*values, uniform or 0.0, 1e-9]))
    axes.set_xlabel("choice")
    axes.set_ylabel(value_name)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def alpha_heatmap(
    title: str, probabilities: Sequence[Sequence[float]], choices: Sequence[Sequence[float]]
) -> Figure:
    """Layers (across) by choices (up), the probability as colour from 0 to 1.

    One entry a layer in both arguments. Layers may have different choices: the rows are all
    choices of any layer, and what a layer cannot choose stays grey.
    """
    rows = sorted({choice for layer in choices for choice in layer})
    table = np.full((len(rows), len(probabilities)), np.nan)
    for layer, (layer_choices, layer_p) in enumerate(zip(choices, probabilities, strict=True)):
        for choice, p in zip(layer_choices, layer_p, strict=True):
            table[rows.index(choice), layer] = p

    figure = _figure(max(4.0, 2.2 + 0.5 * table.shape[1]), max(2.4, 1.4 + 0.45 * len(rows)))
    axes = figure.add_subplot()
    axes.set_facecolor("#cccccc")
    shown = np.ma.masked_invalid(table)
    image = axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, origin="lower", aspect="auto")
    if table.size <= MAX_WRITTEN_CELLS:
        for (row, layer), p in np.ndenumerate(table):
            if not np.isnan(p):
                color = "white" if p > 0.6 else "black"
                axes.text(layer, row, f"{p:.3f}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(table.shape[1]))
    axes.set_yticks(range(len(rows)), [f"{choice:g}" for choice in rows])
    axes.set_xlabel("layer")
    axes.set_ylabel("choice")
    axes.set_title(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="probability", fraction=0.05, pad=0.02)
    return figure


def render(figure: Figure) -> Picture:
    """The figure's pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    rgba: Picture = np.asarray(canvas.buffer_rgba())
    return rgba[:, :, :3].copy()


def _figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches of 100 pixels."""
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _spread(num_frames: int, most: int) -> list[int]:
    """At most `most` evenly spaced frame numbers, both ends included."""
    count = min(num_frames, most)
    if count == 1:
        return [num_frames // 2]
    return [round(i * (num_frames - 1) / (count - 1)) for i in range(count)]


def _grey_levels(sample: Tensor) -> Picture:
    """Undo the normalisation: (3, T, H, W) floats -> (T, H, W, 3) grey levels."""
    values = sample.permute(1, 2, 3, 0).numpy() * np.array(STD) + np.array(MEAN)
    # Non-finite pixels would be undefined as integers: drawn black.
    finite = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    return np.rint(255 * finite.clip(0, 1)).astype(np.uint8)


def _strip(frames: Picture, min_side: int) -> Picture:
    """(T, H, W, 3) -> one row of enlarged frames with a white gap between them."""
    num_frames, height, width, _ = frames.shape
    factor = math.ceil(min_side / min(height, width))
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = factor * height, factor * width
    strip = np.full((height, num_frames * (width + GAP) - GAP, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        left = i * (width + GAP)
        strip[:, left : left + width] = frame
    return strip


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own copy of DejaVu Sans: the same glyphs on every machine."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """`text`, or as much of it as fits into `width` pixels, with an ellipsis."""
    text = " ".join(text.split())  # one line
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
