"""What an index says about a dataset: found, missing and unusable files against the public copy."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from vimnas_ds.config import DatasetSection
from vimnas_ds.data.index_build import Built
from vimnas_ds.data.probe import MISSING, USABLE
from vimnas_ds.report.table import format_table

#: Paths kept in the report for each reason; the index holds all of them.
EXAMPLES = 20


def summarise(built: Built, section: DatasetSection) -> dict[str, Any]:
    """The report as JSON values: per split and reason, and what the usable files are."""
    splits = {}
    public = {"train": section.reference_files, "test": section.reference_test_files}
    for split, reference in public.items():
        rows = [row for row in built.rows if row.split == split]
        bad: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            if row.verdict.state not in (USABLE, MISSING):
                bad[row.verdict.reason].append(row.path)
        missing = [row.path for row in rows if row.verdict.state == MISSING]
        ordered = sorted(bad.items(), key=lambda item: -len(item[1]))
        splits[split] = {
            "listed": len(rows),
            "found": len(rows) - len(missing),
            "missing": len(missing),
            "usable": len(rows) - len(missing) - sum(map(len, bad.values())),
            "public_copy": reference,
            "unusable": {
                reason: {"files": len(paths), "first": paths[:EXAMPLES]}
                for reason, paths in ordered
            },
            "first_missing": missing[:EXAMPLES],
        }
    usable = [row.verdict for row in built.rows if row.verdict.state == USABLE]
    return {
        "dataset": built.header.name,
        "root": built.header.root,
        "layout": section.layout,
        "classes": len(built.catalog.class_names),
        "trial_of": built.header.limit,
        "splits": splits,
        "codecs": dict(Counter(v.codec for v in usable).most_common()),
        "turned_or_mirrored": sum(bool(v.rotation or v.mirrored) for v in usable),
        "hours": round(sum(v.duration for v in usable) / 3600, 3),
        "gigabytes": round(sum(v.size for v in usable) / 1e9, 3),
        "probed": built.probed,
        "kept": built.kept,
        "seconds": round(built.seconds, 2),
    }


def describe(report: dict[str, Any]) -> str:
    """The report for a reader: a table of the splits, then each reason with its first file."""
    head = ["split", "listed", "found", "missing", "unusable", "usable", "public copy", "of it"]
    rows, reasons = [], []
    for split, part in report["splits"].items():
        public = part["public_copy"]
        bad = part["found"] - part["usable"]
        counts = [part["listed"], part["found"], part["missing"], bad, part["usable"]]
        share = [f"{public:,}", f"{part['usable'] / public:.1%}"] if public else ["-", "-"]
        rows.append([split, *(f"{count:,}" for count in counts), *share])
        if part["missing"]:
            reasons.append([split, "missing", str(part["missing"]), part["first_missing"][0]])
        for reason, found in part["unusable"].items():
            reasons.append([split, reason, str(found["files"]), found["first"][0]])
    trial = report["trial_of"]
    note = f" (a trial of {trial} files: not for training)" if trial else ""
    lines = [
        f"{report['dataset']}: {report['root']}, layout {report['layout']}, "
        f"{report['classes']} classes{note}",
        "",
        format_table(head, rows),
        "",
    ]
    if reasons:
        lines += [format_table(["split", "reason", "files", "first"], reasons), ""]
    codecs = ", ".join(f"{codec} {count:,}" for codec, count in report["codecs"].items())
    hours = f", {report['hours']:,} hours" if report["hours"] else ""
    lines.append(
        f"{codecs or 'nothing usable'}{hours}, {report['gigabytes']:,} GB; probed "
        f"{report['probed']:,} files in {report['seconds']:,} s, {report['kept']:,} unchanged"
    )
    return "\n".join(lines)
