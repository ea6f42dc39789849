"""The page's parts about the training: how it stands, its curves, its scores, what went wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from vimnas_ds.page.charts import SUBNETS, Line, colour, line_chart, subnet_colour
from vimnas_ds.page.markup import (
    Cell,
    escape,
    figure,
    folded,
    grid,
    items,
    large,
    pairs,
    percent,
    section,
    table,
)
from vimnas_ds.page.record import Curve, Record
from vimnas_ds.space import Arch
from vimnas_ds.train.circumstances import PACKAGES
from vimnas_ds.train.run_files import config_object

#: states of status.json in which a run has ended without being finished
ENDED = {"preempted": "pre-empted", "stopped": "stopped by itself", "failed": "failed"}


def headline(record: Record) -> str:
    """Name, what it is, how far it is, and the numbers that one asks for first."""
    section_ = record.config.vimnas
    space = section_.search_space
    count = f"{space.size():,}" if space.size() < 1e9 else f"{space.size():.3g}"
    size = f"space, {count} sub-networks" if space.size() > 1 else "space, one sub-network"
    tiles = [_state_tile(record), (size, section_.space)]
    for name in SUBNETS[:2] if space.size() > 1 else ("arch",):
        last = [
            c[-1][1] for d in record.datasets if (c := record.curves.get(f"select/{d}/top1/{name}"))
        ]
        if last:
            mean = sum(last) / len(last)
            tiles.append((f"{name}: top-1 on select, latest, mean of datasets", percent(mean)))
    choice = record.choice
    if choice is not None:
        pick = record.picks[choice.name]
        most = max(d["params"] for d in pick["datasets"].values())
        tiles.append((f"chosen by {choice.name}: parameters", large(most)))
        tiles.append(("its top-1 on select, mean", percent(pick["accuracy"])))
        if (test := record.chosen_on_test) is not None:
            tiles.append(("its top-1 on test, mean", percent(test)))
    cells = "".join(f"<div><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in tiles)
    about = record.config.about.partition(" Command:")[0]
    chosen = ""
    if choice is not None:
        arch = Arch.from_json(record.picks[choice.name]["arch"])
        words = f"depth {arch.depth}, width {arch.embed_dim}, per layer heads and MLP ratios"
        why = escape(f"{choice.name}'s pick: {choice.why}")
        chosen = (
            f'<p>Chosen: <b data-cell="chosen" title="{words}">{escape(arch)}</b>, '
            f'<span data-cell="why">{why}</span></p>'
        )
    return (
        f"<h1>{escape(record.name)}</h1>"
        f'<p class="about">{escape(about)}</p>{chosen}<div class="tiles">{cells}</div>'
    )


def _state_tile(record: Record) -> tuple[str, str]:
    """How far it is: (what is said, the number)."""
    if record.summary is not None:
        _, total = record.progress or (0, 0)
        return f"training finished, {total:,} steps", "finished"
    if record.is_imported:
        return "weights from elsewhere, no training of them is here", "imported"
    if record.progress is None:
        return "begun, no step logged yet", "begun"
    done, total = record.progress
    when = record.log[-1].partition("  ")[0][:16].replace("T", " ")
    if record.status is not None:
        done = max(done, record.status["step"])
    return f"of {total:,} steps, {_state(record)}; last wrote {when}", f"step {done:,}"


def _state(record: Record) -> str:
    state = "" if record.status is None else record.status["state"]
    return ENDED.get(state, "not finished")


def standing(record: Record) -> str:
    """Why a run that is not finished stands still, and what continues it."""
    found = record.status
    if found is None or record.summary is not None:
        return ""
    said = f"{_state(record)}: {found['reason']}."
    if found["state"] not in ENDED:
        said = "Under way, or killed."
    command = f'<pre class="wrapped" data-cell="resume">{escape(found["resume"])}</pre>'
    return (
        f'<p data-cell="standing">{escape(said[0].upper() + said[1:])}</p>'
        f"<p>To continue it:</p>{command}"
    )


def curves(record: Record) -> str:
    """Loss, accuracies, learning rate, pace."""
    numbers = {name: i for i, name in enumerate(record.datasets)}

    def per_dataset(prefix: str) -> list[Line]:
        found = record.by_tag(prefix)
        return [Line(n, found[n], colour("c", i)) for n, i in numbers.items() if n in found]

    if not any(tag.startswith("train/") for tag in record.curves):
        return section("Curves", "<p>No step has been logged yet.</p>")
    figures = [figure("Training loss", line_chart(per_dataset("train/loss/"), "loss (nats)"))]
    if lines := per_dataset("train/top1/"):
        chart = line_chart(lines, "top-1", "%", from_zero=True)
        figures.append(figure("Training top-1", chart, "not counted where labels are mixed"))
    if lines := per_dataset("alpha/loss/"):
        figures.append(figure("Loss of the alpha steps", line_chart(lines, "loss (nats)")))
    for title, tag, unit in (
        ("Learning rate", "train/lr", "learning rate"),
        ("Pace", "train/samples_per_s", "samples / s"),
        ("Wait for data", "train/data_time_ms", "ms a step"),
    ):
        if tag in record.curves:
            line = Line(title.lower(), record.curves[tag], "c7")
            figures.append(figure(title, line_chart([line], unit, from_zero=True)))
    selects = []
    for name in record.datasets:
        found = {n: c for n, c in record.by_tag(f"select/{name}/top1/").items() if c}
        if found:
            classes = (record.labels or {}).get(name)
            level = ("chance", 1 / len(classes)) if classes else None
            lines = [Line(n, found[n], subnet_colour(n), n not in SUBNETS) for n in _ordered(found)]
            chart = line_chart(lines, "top-1", "%", True, level)
            selects.append(figure(name, chart))
    body = grid(*figures)
    if selects:
        body += "<h3>Accuracy on select, by sub-network</h3>" + grid(*selects)
    lead = "A point is the mean of the steps since the last one; move over a curve to read it."
    return section("Curves", body, lead)


def _ordered(found: dict[str, Curve]) -> list[str]:
    return [n for n in SUBNETS if n in found] + sorted(n for n in found if n not in SUBNETS)


def alphas(record: Record) -> str:
    """Probabilities of every decision over time."""
    space = record.config.vimnas.search_space
    if space.size() == 1 or not record.config.vimnas.alpha.enabled:
        return ""
    if not record.alphas:
        return section("Alphas", "<p>The run holds no numbers of its alphas yet.</p>")
    means, layers = [], []
    for kind in ("embed_dim", "depth", "num_heads", "mlp_ratio"):
        if kind not in record.alphas:
            continue
        found = record.alphas[kind]
        per_layer = kind in ("num_heads", "mlp_ratio")
        options = getattr(space, kind) if per_layer else (getattr(space, kind),)
        if all(choices == options[0] for choices in options):
            title = f"{kind}, mean over layers" if per_layer else kind
            values = found.values.mean(1)
            means.append(figure(title, _probabilities(found.steps, values, options[0])))
        if per_layer:
            layers += [
                figure(f"{kind}[{i}]", _probabilities(found.steps, found.values[:, i], choices))
                for i, choices in enumerate(options)
            ]
    body = grid(*means) + folded(
        f"Every layer's decisions ({len(layers)})", grid(*layers, kind="small")
    )
    return section("Alphas", body, "The probability of each choice over the steps.")


def _probabilities(steps: Sequence[int], values: object, choices: Sequence[float]) -> str:
    rows = [[float(v) for v in row] for row in values]  # type: ignore[attr-defined]
    lines = [
        Line(
            f"{choice:g}", [(s, row[i]) for s, row in zip(steps, rows, strict=True)], colour("q", i)
        )
        for i, choice in enumerate(choices)
    ]
    return line_chart(lines, "probability", least=0.1, level=("uniform", 1 / len(choices)))


def test_scores(record: Record) -> str:
    """The scores of summary.json."""
    if record.summary is None:
        note = "The run has not finished: the test splits are read once, at its end."
        if record.is_imported:
            note = "No training is here: scripts/evaluate.py scores sub-networks on test splits."
        return section("Test scores", f"<p>{note}</p>")
    datasets = record.summary.get("datasets", {})
    if not datasets:
        note = "The run was told not to read the test splits."
        return section("Test scores", f"<p>{note}</p>")
    at_end = any("loss" in p for entry in datasets.values() for p in entry["picks"].values())
    body = _tops(datasets) + folded("The other figures", _other_scores(datasets, at_end))
    how = "One centre view of a sample, read at the end of the training"
    others = {"Controls": record.comparison, "Evaluation": record.evaluation}
    if not at_end:
        how = "Taken over from Controls, which says of how many views of a sample"
        picks = {n: p for entry in datasets.values() for n, p in entry["picks"].items()}
        earlier = [n for n, p in picks.items() if "arch" in p and record.has_moved_on(n, p["arch"])]
        if earlier:
            how += f"; {' and '.join(earlier)} is an earlier pick than the one drawn above"
    elif told := [name for name, found in others.items() if found]:
        how += f" (those of {' and '.join(told)}: as many as written there)"
    lead = f"Top-1. {how}. Bold: the best single one of its dataset."
    return section("Test scores", body, lead)


def _tops(datasets: Mapping[str, Any]) -> str:
    """Top-1 of sub-networks (rows) on datasets (columns), and by guessing."""
    single = [
        max((p["top1"] for p in entry["picks"].values() if "k" not in p), default=0)
        for entry in datasets.values()
    ]
    names = dict.fromkeys(name for entry in datasets.values() for name in entry["picks"])
    rows: list[list[str | Cell]] = []
    for name in names:
        found = [entry["picks"].get(name) for entry in datasets.values()]
        row: list[str | Cell] = [_pick_label(name, next(p for p in found if p))]
        for dataset, pick, best in zip(datasets, found, single, strict=True):
            if pick is None:
                row.append("-")
                continue
            tone = "best" if pick["top1"] == best and "k" not in pick else ""
            row.append(Cell(percent(pick["top1"]), f"test:{dataset}:{name}:top1", tone))
        mean = "-" if None in found else percent(fmean(p["top1"] for p in found))
        rows.append([*row, Cell(mean, f"test:mean:{name}:top1")])
    chances = [entry["chance"] for entry in datasets.values()]
    rows.append(["chance", *map(percent, chances), percent(fmean(chances))])
    return table(["sub-network", *datasets, "mean"], rows)


def _other_scores(datasets: Mapping[str, Any], with_loss: bool) -> str:
    """A row for each sub-network on each dataset."""
    rows: list[list[str | Cell]] = [
        [
            f"{dataset}: {_pick_label(name, found)}",
            percent(found["top1"]),
            percent(found.get("top5")),
            *([f"{found['loss']:.3f}" if "loss" in found else "-"] if with_loss else []),
            Cell(f"{found['params']:,.0f}", f"test:{dataset}:{name}:params"),
            f"{found['gflops']:.4g}",
            f"{found['count']:,}" if "count" in found else "-",
        ]
        for dataset, entry in datasets.items()
        for name, found in entry["picks"].items()
    ]
    loss = ["loss"] if with_loss else []
    head = ["dataset: sub-network", "top-1", "top-5", *loss, "parameters", "GFLOPs", "samples"]
    note = "<p>GFLOPs: 1e9 multiply-accumulates per input.</p>"
    return table(head, rows) + note


def _pick_label(name: str, found: Mapping[str, Any]) -> str:
    return f"mean of {found['k']} random ones" if "k" in found else name


def faults(record: Record) -> str:
    """What was replaced, left out, skipped in training; the log's lines about it."""
    found = record.summary or {}
    replaced = dict(found.get("samples_replaced", {}))
    for name, curve in record.by_tag("data/replaced/").items():
        if name in record.datasets:
            replaced.setdefault(name, int(curve[-1][1]))
    reasons: Counter[str] = Counter()
    for counts in found.get("replaced_by_reason", {}).values():
        reasons.update(counts)
    skipped = found.get("skipped_steps")
    if skipped is None and "train/skipped_steps" in record.curves:
        skipped = int(record.curves["train/skipped_steps"][-1][1])
    values = [
        ("skipped steps (non-finite)", "-" if skipped is None else f"{skipped:,}"),
        ("samples replaced", _counted(replaced)),
        ("why", ", ".join(f"{r} {n:,}" for r, n in reasons.most_common()) or "-"),
        ("unusable files left out at the start", _counted(record.left_out)),
        ("files left out of the scores", _counted(found.get("files_left_out", {}))),
        ("batches decoded slowly", _counted(found.get("slow_batches", {}))),
    ]
    body = pairs(values)
    body += items(record.events, "log") if record.events else "<p>The log tells of no event.</p>"
    return section("Faults and events", body)


def left_out(record: Record) -> str:
    """The notes: they hold words of files only as text, so that this part always comes."""
    if not record.notes:
        return ""
    lead = "Files of the run that this page could not use, or not in full."
    return section("Left out", items(record.notes), lead)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "none"


def configuration(record: Record) -> str:
    """Main settings, the whole file, and the machine."""
    config = record.config
    v = config.vimnas
    values = [
        ("space", v.space),
        ("global batch", str(config.global_batch)),
        ("epochs", f"{v.schedule.epochs} ({v.image_epochs} on images alone)"),
        ("peak learning rate", f"{v.peak_lr:g}"),
        ("warm-up", f"{v.schedule.warmup:g} {v.schedule.warmup_unit}"),
        ("alpha steps", f"every {v.alpha.every}" if v.alpha.enabled else "off"),
        ("held out", percent(v.data.held_out)),
        ("seed", str(v.seed)),
        ("qk-norm", "on" if v.model.qk_norm else "off"),
        ("LayerScale", f"{v.model.layer_scale:g}" if v.model.layer_scale else "off"),
        ("drop path", f"{v.model.drop_path:g}"),
    ]
    for name, d in v.data.datasets.items():
        size = f"{d.frames} x " if d.frames else ""
        classes = f"{d.num_classes} classes"
        values.append((name, f"{d.kind}, {classes}, {size}{d.size} x {d.size} pixels"))
    body = pairs(values)
    text = json.dumps(config_object(config), indent=2)
    body += folded("config.json", f"<pre>{escape(text)}</pre>")
    body += "<h3>Environment</h3>"
    if record.environment is None:
        return section("Configuration", body + "<p>The run has not written its environment.</p>")
    machine = [
        (k, str(x)) for k, x in record.environment.items() if k not in PACKAGES and x is not None
    ]
    versions = [(k, str(record.environment[k])) for k in PACKAGES if record.environment.get(k)]
    return section("Configuration", body + pairs(machine + versions))
