"""Four disjoint lists per dataset: train, alpha, select (both held out of training) and test.

Inside each class the official training files are ranked by the SHA-1 of their path. The first
ranks become `alpha`, the last ones `select`, what lies between is trained on:

    rank   0 ... a-1 | a ... n-b-1 | n-b ... n-1        a + b = held-out share of n
           alpha       train         select

A file's place thus depends on nothing but its rank in its class: a file added later moves at most
one neighbour over each border and never swaps a file between `alpha` and `select`.

Kinetics-400 and -600 share videos. A video with a YouTube id is ranked by it, and `drop_overlap`
keeps every id out of what is trained on wherever it is held out or tested on, in any dataset: an id
stays in the most protected split it is in (test, select, alpha, train). A validation list protects
all its ids, also of files that are missing or unusable.

An id comes from the annotations, from a file named ID_START_END, or from one named ID alone. The
last says little by itself: a name of eleven characters may be a counter. An id's 64 bits leave four
to its last character, which is one of sixteen, and so few of any other scheme's names can be ids.
Names are therefore believed to be bare ids only in a video dataset nine tenths of whose training
files are named by ids of either form; SSV2's numbers, too short, never are.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from vimnas_ds.data.bad import BadAnnotations
from vimnas_ds.data.catalog import Catalog, Sample
from vimnas_ds.data.listing import LOSSLESS

YOUTUBE_FILE = re.compile(r"(?P<id>.{11})_\d+_\d+")
YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{10}[AEIMQUYcgkosw048]")
#: Share of the training files that must be named by ids before bare ids are believed.
NAMED_BY_ID = 0.9


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

    def rank(sample: Sample) -> bytes:
        known = youtube_id(sample.path, catalog.video_ids)
        return hashlib.sha1((known or sample.path).encode(*LOSSLESS)).digest()

    classes: dict[int, list[Sample]] = defaultdict(list)
    for sample in catalog.train:
        classes[sample.label].append(sample)
    train, alpha, select = [], [], []
    for label, members in classes.items():
        members.sort(key=rank)
        first, last = _shares(len(members), held_out, catalog.class_names[label])
        alpha += members[:first]
        train += members[first : len(members) - last]
        select += members[len(members) - last :]
    train.sort(key=rank)
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
    odd_goes_to_alpha = hashlib.sha1(class_name.encode(*LOSSLESS)).digest()[0] % 2
    first = (total + odd_goes_to_alpha) // 2
    return first, total - first


#: from the most protected split to the least
_PROTECTION = ("test", "select", "alpha", "train")
Splits = dict[str, list[Sample]]


def drop_overlap(
    splits: Mapping[str, Splits], catalogs: Mapping[str, Catalog] | None = None
) -> tuple[dict[str, Splits], dict[str, int]]:
    """Removes videos that a more protected split has too, of the same or another dataset.

    Args:
        splits: of every dataset, by name.
        catalogs: their catalogs, for the ids that file names do not say and for the validation
            lists' other ids.

    Returns:
        The splits without them (test splits are never changed), and how many were dropped per
        dataset.
    """
    cleaned: dict[str, Splits] = {name: {} for name in splits}
    dropped = dict.fromkeys(splits, 0)
    ids = {name: catalog.video_ids for name, catalog in (catalogs or {}).items()}
    protected = set().union(*(validation_ids(c) for c in (catalogs or {}).values()))
    for split in _PROTECTION:
        found: set[str] = set()
        for name, parts in splits.items():
            known = {s: youtube_id(s.path, ids.get(name, {})) for s in parts[split]}
            kept = [s for s in parts[split] if known[s] not in protected or split == "test"]
            dropped[name] += len(parts[split]) - len(kept)
            cleaned[name][split] = kept
            found.update(i for s in kept if (i := known[s]) is not None)
        protected |= found
    return cleaned, dropped


def validation_ids(catalog: Catalog) -> set[str]:
    """Every YouTube id of the official validation list, whether its file is there or not."""
    listed = catalog.test + catalog.absent_test
    return {i for s in listed if (i := youtube_id(s.path, catalog.video_ids)) is not None}


def with_bare_ids(catalog: Catalog) -> Catalog:
    """A video dataset's catalog with the ids of files named ID.mp4, where they are believed."""

    def bare(samples: Iterable[Sample]) -> dict[str, str]:
        names = ((s.path, _stem(s.path)) for s in samples)
        return {path: stem for path, stem in names if YOUTUBE_ID.fullmatch(stem)}

    training = catalog.train + catalog.absent_train
    found = bare(training)
    named = len(found) + sum(YOUTUBE_FILE.fullmatch(_stem(s.path)) is not None for s in training)
    if named < NAMED_BY_ID * len(training):
        return catalog
    found |= bare(catalog.test + catalog.absent_test)
    return replace(catalog, video_ids=found | dict(catalog.video_ids))


def youtube_id(path: str, known: Mapping[str, str]) -> str | None:
    """A video's id: one that is known, or from a file named like Kinetics, ID_START_END.mp4."""
    if path in known:
        return known[path]
    match = YOUTUBE_FILE.fullmatch(_stem(path))
    return match["id"] if match else None


def _stem(path: str) -> str:
    return path.rpartition("/")[2].rpartition(".")[0]
