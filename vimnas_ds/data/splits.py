"""Four disjoint lists per dataset: train, alpha, select (both held out of training) and test.

Inside each class the official training files are ranked by the SHA-1 of their path. The first
ranks become `alpha`, the last ones `select`, what lies between is trained on:

    rank   0 ... a-1 | a ... n-b-1 | n-b ... n-1        a + b = held-out share of n
           alpha       train         select

A file's place thus depends on nothing but its rank in its class: a file added later moves at most
one neighbour over each border and never swaps a file between `alpha` and `select`.

Kinetics-400 and -600 share videos. A file named like Kinetics is ranked by its YouTube id, and
`drop_overlap` keeps every id out of what is trained on wherever it is held out or tested on, in any
dataset: an id stays in the most protected split it is in (test, select, alpha, train).
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping

from vimnas_ds.data.bad import BadAnnotations
from vimnas_ds.data.catalog import Catalog, Sample

YOUTUBE_FILE = re.compile(r"(?P<id>.{11})_\d+_\d+")


def split_catalog(catalog: Catalog, held_out: float) -> dict[str, list[Sample]]:
    """The lists "train", "alpha", "select" and "test", each sorted by path.

    Args:
        held_out: share of the training files of every class that is not trained on, in (0, 0.5);
            half of it goes to `alpha`, half to `select`. Each of them gets at least one file.

    Raises:
        BadAnnotations: fewer than three training files.
    """
    if len(catalog.train) < 3:
        raise BadAnnotations(
            f"{catalog.name}: {len(catalog.train)} training files; at least 3 are needed to hold "
            "out one for alpha and one for select"
        )
    classes: dict[int, list[Sample]] = defaultdict(list)
    for sample in catalog.train:
        classes[sample.label].append(sample)
    train, alpha, select = [], [], []
    for label, members in classes.items():
        members.sort(key=_rank)
        first, last = _shares(len(members), held_out, catalog.class_names[label])
        alpha += members[:first]
        train += members[first : len(members) - last]
        select += members[len(members) - last :]
    train.sort(key=_rank)
    if not alpha:
        alpha.append(train.pop(0))
    if not select:
        select.append(train.pop())
    return {
        "train": sorted(train),
        "alpha": sorted(alpha),
        "select": sorted(select),
        "test": list(catalog.test),
    }


def _shares(count: int, held_out: float, class_name: str) -> tuple[int, int]:
    """How many files of a class of `count` go to alpha and to select."""
    total = min(int(count * held_out + 0.5), count - 1)
    odd_goes_to_alpha = hashlib.sha1(class_name.encode()).digest()[0] % 2
    first = (total + odd_goes_to_alpha) // 2
    return first, total - first


def _rank(sample: Sample) -> bytes:
    return hashlib.sha1((_youtube_id(sample) or sample.path).encode()).digest()


#: from the most protected split to the least
_PROTECTION = ("test", "select", "alpha", "train")
Splits = dict[str, list[Sample]]


def drop_overlap(splits: Mapping[str, Splits]) -> tuple[dict[str, Splits], dict[str, int]]:
    """Removes videos that a more protected split has too, of the same or another dataset.

    Returns:
        The splits without them (test splits are never changed), and how many were dropped per
        dataset.
    """
    cleaned: dict[str, Splits] = {name: {} for name in splits}
    dropped = dict.fromkeys(splits, 0)
    protected: set[str] = set()
    for split in _PROTECTION:
        found: set[str] = set()
        for name, parts in splits.items():
            kept = [s for s in parts[split] if _youtube_id(s) not in protected or split == "test"]
            dropped[name] += len(parts[split]) - len(kept)
            cleaned[name][split] = kept
            found.update(i for s in kept if (i := _youtube_id(s)) is not None)
        protected |= found
    return cleaned, dropped


def _youtube_id(sample: Sample) -> str | None:
    """The video's id if the file is named like Kinetics: ID_START_END.mp4."""
    stem = sample.path.rpartition("/")[2].rpartition(".")[0]
    match = YOUTUBE_FILE.fullmatch(stem)
    return match["id"] if match else None
