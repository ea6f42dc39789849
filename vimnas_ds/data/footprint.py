"""How many bytes a sample takes between its decoding thread and DALI.

    decoded clip    T x 3 x size^2, whatever the video's size (see `decode`)
    encoded clip    the file: what 999 of 1000 files do not exceed; one larger than `LARGEST` is
                    decoded by PyAV instead, also on a GPU
    image           the file, or 3 x width x height for a format that is handed over as BMP: the
                    largest of some files spread over the split

Sizes of videos come from the index; without one, from some files as well. Those files are looked at
by the decoding threads, under their time limit; unusable ones are passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.bad import BadFile
from vimnas_ds.data.blob import Media, length_of
from vimnas_ds.data.encoded import LARGEST
from vimnas_ds.data.images import encoded_bytes
from vimnas_ds.data.listing import Sample
from vimnas_ds.data.store import open_store

#: Files that are looked at.
LOOKS = 64
#: Share of the encoded clips that are no larger than planned.
SHARE = 0.999
#: What an image takes at least.
IMAGE_BYTES = 150_000


def sample_bytes(
    name: str, section: DatasetSection, samples: Sequence[Sample], gpu: bool, pool: Executor
) -> int:
    """Bytes to plan for one sample of a dataset.

    Args:
        samples: its training files.
        gpu: clips go to the GPU's decoder as encoded bytes.
        pool: threads that read files.
    """
    if section.is_image:
        return max([IMAGE_BYTES, *_look(name, section, samples, encoded_bytes, pool)])
    decoded = (section.frames or 1) * 3 * section.size**2
    if not gpu:
        return decoded
    sizes = [sample.video.size for sample in samples if sample.video is not None]
    sizes = sorted(sizes or _look(name, section, samples, length_of, pool))
    usual = sizes[math.ceil(SHARE * len(sizes)) - 1] if sizes else LARGEST
    return max(decoded, min(usual, LARGEST))


def _look(
    name: str,
    section: DatasetSection,
    samples: Sequence[Sample],
    measure: Callable[[Media], int],
    pool: Executor,
) -> list[int]:
    """`measure` of some files, always the same ones."""
    store = open_store(name, section)
    chosen = samples[:: -(-len(samples) // LOOKS)]
    found = []
    for job in [
        pool.submit(lambda path: measure(store.file(path)), sample.path) for sample in chosen
    ]:
        try:
            found.append(job.result())
        except BadFile:  # training meets it, and names it
            continue
    return found
