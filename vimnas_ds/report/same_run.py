"""Whether two runs did the same, to the bit: what they left in their folders, compared.

Two runs of one configuration, however often one of them was killed and resumed, must leave equal
checkpoints (every file of all that both keep), equal points, pictures and texts in TensorBoard (as
it shows them, each step once), equal lines in the log (the last word on each step) and equal
results. Left out is only what measures time, names the run's own folder, or says at which step the
run told of a broken file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from vimnas_ds.checkpoint_names import BEST, LATEST, checkpoints_in, named

#: tags whose values measure time; their steps are compared all the same
TIMED_TAGS = frozenset({"train/samples_per_s", "train/data_time_ms"})
#: lists of broken files, told when the run next saves or logs (a run that is asked to stop saves
#: earlier): what they say in all is compared, not the steps
TOLD_LATER = "data/unusable/"
#: fields of a log line that measure time or memory
TIMED_FIELDS = re.compile(r"  (?:[\d.]+ samples/s|data \d+ ms|eta \S+(?: \d+h)?|mem [\d.]+ GiB)")
#: where a run's own folder stands in its JSON files
OWN_PATHS = {"summary.json": ("tensorboard", "checkpoints"), "config.json": ("vimnas.output_dir",)}

STEP_LINE = re.compile(r"^\S+  (step (\d+)/\d+  .*|select at step (\d+): .*)$")


def differences(a: Path, b: Path) -> list[str]:
    """One line for each difference between the runs in the folders `a` and `b`; empty: the same."""
    return [
        *checkpoint_differences(a / "checkpoints", b / "checkpoints"),
        *board_differences(a / "tensorboard", b / "tensorboard"),
        *log_differences(a / "train.log", b / "train.log"),
        *_json_differences(a, b),
    ]


def checkpoint_differences(a: Path, b: Path) -> Iterator[str]:
    """Of two folders of checkpoints: every file of those that both keep is equal, and both keep the
    latest and the best. (A run that is asked to stop saves where it is, and therefore keeps others
    of the older ones.)"""
    steps = [{p.name for p in checkpoints_in(root)} for root in (a, b)]
    older = (steps[0] ^ steps[1]) - {named(root, n) for root in (a, b) for n in (LATEST, BEST)}
    names = [
        sorted(str(p.relative_to(root)) for p in root.rglob("*") if not older & {*p.parts})
        for root in (a, b)
    ]
    for name in sorted(set(names[0]) ^ set(names[1])):
        yield f"checkpoints/{name} is only in {(a if name in names[0] else b).parent.name}"
    for root, found in zip((a, b), names, strict=True):
        for name in found:
            if name.startswith("."):
                yield f"checkpoints/{name} was left behind in {root.parent.name}"
    for name in sorted(set(names[0]) & set(names[1])):
        files = a / name, b / name
        if files[0].is_file() and files[0].read_bytes() != files[1].read_bytes():
            yield f"checkpoints/{name}: " + ("; ".join(_what_differs(*files)) or "other bytes")


def _what_differs(a: Path, b: Path) -> list[str]:
    """The tensors of two safetensors files that are not bit-equal; nothing of other files."""
    if a.suffix != ".safetensors":
        return []
    found = []
    with safe_open(str(a), framework="pt") as one, safe_open(str(b), framework="pt") as other:
        if one.metadata() != other.metadata():
            found.append("the values that are no tensors differ")
        keys = set(one.keys()), set(other.keys())
        found += [f"{key} is in one only" for key in sorted(keys[0] ^ keys[1])]
        for key in sorted(keys[0] & keys[1]):
            x, y = (file.get_tensor(key).contiguous() for file in (one, other))
            if x.dtype != y.dtype or x.shape != y.shape:
                found.append(f"{key} is {x.dtype} {tuple(x.shape)}, {y.dtype} {tuple(y.shape)}")
                continue
            unequal = x.view(-1).view(torch.uint8) != y.view(-1).view(torch.uint8)
            if count := int(unequal.view(x.numel(), -1).any(1).sum()) if x.numel() else 0:
                found.append(f"{key}: {count} of {x.numel()} numbers")
    return found


def board_differences(a: Path, b: Path) -> Iterator[str]:
    """Of two folders of event files, read as TensorBoard reads them."""
    boards = [_points(folder) for folder in (a, b)]
    for tag in sorted(set(boards[0]) ^ set(boards[1])):
        yield f"tensorboard: {tag} is only in {(a if tag in boards[0] else b).parent.name}"
    for tag in sorted(set(boards[0]) & set(boards[1])):
        ours, theirs = boards[0][tag], boards[1][tag]
        for folder, points in ((a, ours), (b, theirs)):
            steps = [step for step, _ in points]
            if doubled := sorted({s for s in steps if steps.count(s) > 1}):
                yield f"tensorboard: {tag} has steps {doubled} twice in {folder.parent.name}"
        if (steps := [s for s, _ in ours]) != (others := [s for s, _ in theirs]):
            odd = sorted(set(steps) ^ set(others))
            yield f"tensorboard: {tag} has other steps: {odd or 'in another order'}"
        elif tag not in TIMED_TAGS and ours != theirs:
            odd = [s for (s, x), (_, y) in zip(ours, theirs, strict=True) if x != y]
            yield f"tensorboard: {tag} has other values at steps {odd}"


def _points(folder: Path) -> dict[str, list[tuple[int, bytes]]]:
    """tag -> (step, value) in the order in which they were written, as TensorBoard's server has
    them: scalars, pictures and texts are tensors, and what a resumed run purges is gone (the other
    accumulator leaves tensors unpurged)."""
    board = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    found = {}
    for tag in board.Tags()["tensors"]:
        points = [(e.step, e.tensor_proto) for e in board.Tensors(tag)]
        if tag.startswith(TOLD_LATER):
            found[tag] = [(0, b"".join(text for _, p in points for text in p.string_val))]
        else:
            found[tag] = [(step, proto.SerializeToString()) for step, proto in points]
    return found


def log_differences(a: Path, b: Path) -> Iterator[str]:
    """Of two logs: the last line about each step and each evaluation, without times and rates."""
    ours, theirs = _last_words(a), _last_words(b)
    for what in sorted(ours.keys() | theirs.keys()):
        if ours.get(what) != theirs.get(what):
            yield f"train.log: {ours.get(what, 'nothing')!r}, but {theirs.get(what, 'nothing')!r}"


def _last_words(log: Path) -> dict[tuple[str, int], str]:
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        if match := STEP_LINE.match(line):
            kind = "step" if match[2] else "select"
            found[kind, int(match[2] or match[3])] = TIMED_FIELDS.sub("", match[1])
    return found


def _json_differences(a: Path, b: Path) -> Iterator[str]:
    for name in ("summary.json", "config.json", "labels.json"):
        ours, theirs = (dict(_leaves(json.loads((run / name).read_text()))) for run in (a, b))
        for key in sorted(ours.keys() | theirs.keys()):
            if key not in OWN_PATHS.get(name, ()) and ours.get(key) != theirs.get(key):
                yield f"{name}: {key} is {ours.get(key)!r}, but {theirs.get(key)!r}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a JSON value that holds nothing further."""
    if isinstance(value, dict | list) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
