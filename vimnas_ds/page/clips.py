"""Samples that the chosen sub-network gets right and wrong, as pictures with their labels.

The only part of the page that opens the data and the network; where they are not there it says so.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from vimnas_ds.confusion import class_labels
from vimnas_ds.page.markup import escape, percent, section
from vimnas_ds.report.pictures import Picture, sample_strip
from vimnas_ds.search.run import SearchRun
from vimnas_ds.space import Arch

#: of each dataset and kind, at most; frames of a clip; height of a frame in pixels
SHOWN, FRAMES, SIDE = 4, 4, 96


@dataclass(frozen=True)
class Clip:
    """One sample: what it is, what it was taken for and how surely, its frames in a row."""

    file: str
    true: str
    predicted: str
    probability: float
    frames: Picture

    @property
    def is_right(self) -> bool:
        return self.true == self.predicted


@torch.no_grad()
def find_clips(run: SearchRun, arch: Arch, dataset: str, split: str, most: int) -> list[Clip]:
    """Up to `SHOWN` right and as many wrong ones among the first `most` samples of a split.

    Raises as the loaders where the data cannot be read.
    """
    section_ = run.config.vimnas.data.datasets[dataset]
    names = class_labels(run.data.catalogs[dataset].class_names, section_.num_classes)
    found: dict[bool, list[Clip]] = {True: [], False: []}
    if not run.data.splits[dataset][split]:
        return []
    loader = run.loaders.evaluation(dataset, split, 8)
    seen = 0
    try:
        for batch in loader:
            x = batch.x.to(run.ranks.device, run.dtype)
            shares, guesses = run.net(x, arch=arch, dataset=dataset).float().softmax(-1).max(-1)
            for i, (share, guess) in enumerate(zip(shares.tolist(), guesses.tolist(), strict=True)):
                true = int(batch.y[i])
                kind = found[names[guess] == names[true]]
                if len(kind) < SHOWN:
                    frames = sample_strip(batch.x[i], FRAMES, SIDE)
                    kind.append(Clip(batch.names[i], names[true], names[guess], share, frames))
            seen += len(shares)
            if seen >= most or all(len(kind) == SHOWN for kind in found.values()):
                break
    finally:
        loader.close()
    return found[True] + found[False]


def contact_sheets(clips: dict[str, list[Clip]], name: str, split: str) -> str:
    """`clips` by dataset; `name`: of the sub-network that classified them."""
    body = ""
    for dataset, found in clips.items():
        body += f"<h3>{escape(dataset)}</h3>"
        for is_right, title in ((True, "right"), (False, "wrong")):
            chosen = [c for c in found if c.is_right == is_right]
            if chosen:
                body += f'<div class="clips">{"".join(map(_figure, chosen))}</div>'
            else:
                body += f"<p>None of those looked at was {title}.</p>"
    lead = f"Samples of {split} as {name} sees them: the true class, and what it takes them for."
    return section("Clips", body, lead)


def _figure(clip: Clip) -> str:
    mark, tone = ("✓", "good") if clip.is_right else ("✗", "bad")
    taken = "" if clip.is_right else f"{escape(clip.predicted)} "
    picture, stream = Image.fromarray(clip.frames), io.BytesIO()
    if picture.height > 1.5 * SIDE:
        picture = picture.resize((picture.width * SIDE // picture.height, SIDE))
    picture.save(stream, "JPEG", quality=82)
    data = base64.b64encode(stream.getvalue()).decode()
    guess = f'<b class="{tone}">{mark} {taken}{percent(clip.probability)}</b>'
    file = f'alt="{escape(Path(clip.file).name)}" title="{escape(clip.file)}"'
    return (
        f'<figure class="clip" style="width:{picture.width + 16}px">'
        f"<figcaption>{escape(clip.true)}<br>{guess}</figcaption>"
        f'<img {file} src="data:image/jpeg;base64,{data}"></figure>'
    )


def without_clips(reason: str) -> str:
    """The same part where nothing can be shown."""
    return section("Clips", f"<p>{escape(reason)}</p>")
