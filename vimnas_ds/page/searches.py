"""The page's parts about the searches: picks, decisions, front, controls, views, ranking."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping
from typing import Any

from vimnas_ds.page.architecture import draw_architecture
from vimnas_ds.page.charts import Dot, dot_chart, margin_bar, mark_legend, subnet_colour
from vimnas_ds.page.markup import (
    Cell,
    escape,
    figure,
    folded,
    grid,
    items,
    large,
    percent,
    points,
    section,
    table,
)
from vimnas_ds.page.record import Record
from vimnas_ds.report.decisions import UNITS
from vimnas_ds.search.comparison import SizeGap, Verdict
from vimnas_ds.search.perturb import Decision
from vimnas_ds.search.statistics import standard_error
from vimnas_ds.space import Arch
from vimnas_ds.train.dry_run import cost_of

#: shapes of a comparison's controls, in its order; they come round again
CONTROLS = ("up", "down", "square", "diamond", "cross", "plus", "hexagon")
#: a class list's and a pair list's length
LISTED = 6


def architectures(record: Record) -> str:
    """What the searches picked, drawn in the largest."""
    space = record.config.vimnas.search_space
    largest = space.largest()
    choice = record.choice
    if choice is None:
        note = "Nothing is chosen yet: scripts/perturb_select.py or scripts/evolve.py does."
        body = f"<p>{note}</p>" if space.size() > 1 else ""
        return section("Architecture", body + grid(_drawn(record, "largest", largest, largest)))
    names = sorted(record.picks, key=lambda n: n != choice.name)
    titles = [f"{choice.name}, chosen", *names[1:]]
    archs = [Arch.from_json(record.picks[n]["arch"]) for n in names]
    drawn = [_drawn(record, t, a, largest) for t, a in zip(titles, archs, strict=True)]
    drawn.insert(1, _drawn(record, "largest", largest, largest))
    lead = "Layer by layer from the input; outlines: what the largest sub-network has besides."
    return section("Architecture", grid(*drawn), lead)


def _drawn(record: Record, name: str, arch: Arch, largest: Arch) -> str:
    params, gflops = cost_of(record.config, arch, record.datasets[0])
    full = cost_of(record.config, largest, record.datasets[0])[0]
    size = f"{large(params)} parameters ({params / full:.0%} of the largest)"
    note = f"{size}, {gflops:.4g} GFLOPs on {record.datasets[0]}"
    return figure(name, draw_architecture(arch, largest), note)


def decisions(record: Record) -> str:
    """Of the perturbation: what each choice's removal costs, and the margin to the runner-up."""
    found = record.picks.get("perturbation")
    if not found or not found.get("decisions"):
        return ""
    made = [Decision.from_json(d) for d in found["decisions"]]
    unit = UNITS[found["objective"]["metric"]]
    most = max((abs(v) for d in made for v in d.drop.values()), default=0) or 1.0
    known = [(d.margin.value, d.margin.se) for d in made if math.isfinite(d.margin.se)]
    ends = [0.0, *(v + side * se for v, se in known for side in (-2, 2))]
    ends += [d.margin.value for d in made]
    rows = []
    for d in made:
        chips = ""
        for choice, drop in d.drop.items():
            kept = " kept" if choice == d.kept else ""
            side = "var(--warm)" if drop > 0 else "var(--cool)"
            style = f"--side:{side};--strength:{0.06 + 0.4 * abs(drop) / most:.2f}"
            text = f"{choice:g}: {unit.write(drop, '+')}"
            chips += f'<span class="chip{kept}" style="{style}">{text}</span>'
        margin = f"{unit.write(d.margin.value)} ± {unit.write(d.margin.se)}"
        note = f" ({d.note})" if d.note else ""
        bar = margin_bar(d.margin.value, d.margin.se, (min(ends), max(ends)), bool(d.note))
        rows.append(
            f'<div class="decision"><b>{escape(d.name)}</b><div class="chips">{chips}</div>'
            f'<div class="against">{bar}<span data-cell="margin:{escape(d.name)}">'
            f"{escape(margin + note)}</span></div></div>"
        )
    unsure = sum(bool(d.note) for d in made)
    lead = (
        f"Of perturbation. {unit.title.capitalize()} each choice, in the order decided; framed: "
        "kept. Beside it the margin to the runner-up with one and two standard errors; "
        f"{unsure} of {len(made)} within the noise (hollow)."
    )
    return section("Decisions", "".join(rows), lead)


def front(record: Record) -> str:
    """The Pareto front; each point's architecture is its tip."""
    found = record.front
    if not found or not found.get("points"):
        return ""
    resource, dataset = found["cost"]["resource"], found["cost"]["dataset"]
    dots, rows = list[Dot](), list[list[str | Cell]]()
    for i, p in enumerate(found["points"]):
        arch, picked = Arch.from_json(p["arch"]), i == found["picked"]
        cost = f"{p['cost']:,.6g}"
        top1 = points(p["accuracy"], p["accuracy_se"])
        tip = f"{'picked: ' if picked else ''}{arch}\n{resource} {cost}\ntop-1 {top1}"
        dots.append(Dot(p["cost"], p["accuracy"], tip, "n3", p["accuracy_se"]))
        if picked:
            dots.append(Dot(p["cost"], p["accuracy"], tip, "n2", shape="ring"))
        key = f"front:{i}:top1"
        rows.append(
            [
                cost,
                Cell(points(p["accuracy"], p["accuracy_se"]), key),
                f"{p['loss']:.3f}",
                "picked" if picked else "",
                str(arch),
            ]
        )
    steps = [(p["cost"], p["accuracy"]) for p in found["points"]]
    name = f"{resource} ({dataset})"
    chart = dot_chart(dots, name, "mean top-1 on select", steps=steps)
    body = grid(
        figure(f"Accuracy against {resource}", chart, "Bars: one standard error; ring: picked."),
        kind="two",
    )
    body += folded("The front as a table", table([name, "top-1", "loss", "", "sub-network"], rows))
    lead = (
        f"{len(found['points'])} sub-networks that none evaluated beats in both; the best accuracy "
        f"within a budget, averaged over budgets: {percent(found['hypervolume'])}."
    )
    return section("Front", body, lead)


def controls(record: Record) -> str:
    """compare.json: verdicts, and for each dataset a chart and a table."""
    found = record.comparison
    if not found or not found.get("entries"):
        return ""
    entries = found["entries"]
    picks = [e["name"] for e in entries if e["role"] == "pick"]
    body = stale(record)
    body += items([str(_verdict(v)) for v in found["verdicts"] if v["beats"] is not None])
    datasets = list(found["weights"])
    others = [e["name"] for e in entries if e["role"] == "control"]
    shapes = {n: CONTROLS[i % len(CONTROLS)] for i, n in enumerate(others)}
    y_name = f"top-1 on {found['split']}"
    figures = [figure(d, _dots(entries, d, y_name, shapes)) for d in datasets]
    marks = [(f"{n}; small dots: random ones of its size", subnet_colour(n), "star") for n in picks]
    marks += [(n, "c7", shape) for n, shape in shapes.items()]
    body += grid(*figures) + mark_legend(marks)
    rows: list[list[str | Cell]] = []
    for e in entries:
        if e["role"] == "random":
            continue
        rows.append(_row(e["name"], datasets, e))
        alike = [r for r in entries if r["like"] == e["name"]]
        if alike and e["role"] == "pick":
            rows.append(_mean_row(alike, datasets))
    head = ["sub-network", *datasets, "mean", "parameters", "evaluations"]
    lead = (
        f"Top-1 on {found['split']} of picks beside their controls; errors are one standard error."
    )
    views = "The file does not tell of how many views."
    if "views" in found:
        views = f"Views of a sample, averaged: {_listed(found['views'])}."
    return section("Controls", body + table(head, rows), f"{lead} {views}")


def stale(record: Record) -> str:
    """A word where the comparison was made before a search picked anew."""
    if not record.earlier_picks:
        return ""
    names = " and ".join(record.earlier_picks)
    command = f"python scripts/compare.py --checkpoint {shlex.quote(str(record.files.root))}"
    return (
        f'<p data-cell="stale"><b>Here {escape(names)} is an earlier pick than the one drawn '
        f"above.</b> To compare the present one: <code>{escape(command)}</code></p>"
    )


def _listed(views: Mapping[str, int]) -> str:
    return ", ".join(f"{count} for {name}" for name, count in views.items())


def _dots(
    entries: list[dict[str, Any]], dataset: str, y_name: str, shapes: Mapping[str, str]
) -> str:
    dots = []
    for e in sorted(entries, key=lambda e: ("random", "control", "pick").index(e["role"])):
        m = e["datasets"][dataset]
        top1, size = points(m["top1"], m["top1_se"]), f"{m['params']:,} parameters"
        tip = f"{e['name']}\n{Arch.from_json(e['arch'])}\n{size}\ntop-1 {top1}"
        if e["role"] == "random":
            dot = Dot(m["params"], m["top1"], tip, subnet_colour(e["like"]), shape="small")
        elif e["role"] == "pick":
            mine = subnet_colour(e["name"])
            dot = Dot(m["params"], m["top1"], tip, mine, m["top1_se"], "star")
        else:
            dot = Dot(m["params"], m["top1"], tip, "c7", shape=shapes[e["name"]])
        dots.append(dot)
    return dot_chart(dots, "parameters", y_name)


def _verdict(found: Mapping[str, Any]) -> Verdict:
    values = {k: v for k, v in found.items() if k != "beats"}
    return Verdict(**{**values, "size_gap": SizeGap(**found["size_gap"])})


def _row(label: str, datasets: list[str], entry: Mapping[str, Any]) -> list[str | Cell]:
    found = [(d, entry["datasets"][d]) for d in datasets]
    cells = [Cell(points(m["top1"], m["top1_se"]), f"controls:{d}:{label}:top1") for d, m in found]
    mean = Cell(percent(entry["mean_top1"]), f"controls:mean:{label}:top1")
    count = "" if entry["evaluations"] is None else f"{entry['evaluations']:,}"
    return [label, *cells, mean, f"{found[0][1]['params']:,}", count]


def _mean_row(alike: list[dict[str, Any]], datasets: list[str]) -> list[str | Cell]:
    cells: list[str | Cell] = [Cell(f"{len(alike)} random ones of its size, mean", tone="soft")]
    for tops in ([e["datasets"][d]["top1"] for e in alike] for d in datasets):
        cells.append(points(statistics.fmean(tops), standard_error(tops)))
    cells.append(percent(statistics.fmean(e["mean_top1"] for e in alike)))
    params = statistics.fmean(e["datasets"][datasets[0]]["params"] for e in alike)
    return [*cells, f"{params:,.0f}", ""]


def evaluation(record: Record) -> str:
    """evaluation.json: scores of several views, worst classes, most confused pairs."""
    found = record.evaluation
    if not found:
        return ""
    rows: list[list[str | Cell]] = []
    details = []
    for label, arch in found["archs"].items():
        short = label.replace(str(record.files.root), "").strip("/").removesuffix("/arch.json")
        for name, r in arch["datasets"].items():
            key = f"views:{name}:{short}:top1"
            cost = f"{r['gflops_per_view']:.4g} × {r['views']}"
            tops: list[str | Cell] = [
                Cell(percent(r["top1"]), key),
                percent(r["top5"]),
                percent(r["mean_class"]),
            ]
            rows.append([f"{name}: {short}", *tops, f"{r['count']:,}", f"{r['params']:,}", cost])
            details.append(_confusions(f"{name}, {short}", r, found["datasets"][name]["classes"]))
    head = [
        "dataset: sub-network",
        "top-1",
        "top-5",
        "mean of classes",
        "samples",
        "parameters",
        "GFLOPs × views",
    ]
    body = table(head, rows) + folded("Worst classes and most confused pairs", grid(*details))
    left = [
        f"{n}: {len(d['skipped']):,} of {d['samples']:,} files not scored"
        for n, d in found["datasets"].items()
        if d["skipped"]
    ]
    body += items(left) if left else ""
    views = {n: d["clips"] * d["crops"] for n, d in found["datasets"].items()}
    lead = (
        f"On {found['split']}; views of a sample, averaged: {_listed(views)} "
        f"(clips placed {found['placement']})."
    )
    return section("Evaluation", body, lead)


def _confusions(title: str, found: Mapping[str, Any], classes: list[str]) -> str:
    scored = {c: v for c, v in found["per_class"].items() if v["count"]}
    worst = sorted(scored, key=lambda c: scored[c]["top1"])[:LISTED]
    lines = [f"{c}: {percent(scored[c]['top1'])} of {scored[c]['count']:,}" for c in worst]
    wrong = sorted((w for w in found["confusion"] if w[0] != w[1]), key=lambda w: -w[2])[:LISTED]
    taken = [f"{classes[t]} → {classes[p]}: {n:,}" for t, p, n in wrong]
    return figure(title, items(lines) + items(taken))


def ranking(record: Record) -> str:
    """Whether the supernet orders sub-networks as training them alone does."""
    found = record.ranking
    if not found:
        return ""
    body = f'<p><b data-cell="ranking:verdict">{escape(found["verdict"])}</b></p>'
    body += items(found["warnings"]) if found["warnings"] else ""
    rows: list[list[str | Cell]] = []
    for name, a in found["agreement"].items():
        span = f"{_number(a['low'])} to {_number(a['high'])}"
        over = f"{_number(a['low_over_samples'])} to {_number(a['high_over_samples'])}"
        cells: list[str | Cell] = [
            f"{a['samples']:,}",
            Cell(_number(a["tau"]), f"ranking:{name}:tau"),
            span,
            over,
        ]
        rows.append([name, *cells, _number(a["spearman"]), _number(a["tau_of_params"])])
    head = [
        "dataset",
        "samples",
        "tau",
        "95 % over sub-networks",
        "over samples",
        "Spearman",
        "tau of parameters",
    ]
    panel = list(found["agreement"])[-1]
    dots = [
        Dot(
            a[f"inherited/{panel}"],
            a[f"alone/{panel}"],
            f"{Arch.from_json(a['arch'])}\n{a['params']:,} parameters\ninherited "
            f"{percent(a[f'inherited/{panel}'])}, alone {percent(a[f'alone/{panel}'])}",
            "n3",
        )
        for a in found["archs"]
    ]
    chart = dot_chart(dots, f"inherited top-1, {panel}", "trained alone, top-1", "%")
    drawing = grid(figure("Inherited against stand-alone accuracy", chart), kind="two")
    lead = f"{len(found['archs'])} sub-networks trained alone for {found['epochs']} epochs each."
    return section("Ranking", body + table(head, rows) + drawing, lead)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def picks(record: Record) -> str:
    """Each search's pick with its select scores."""
    if not record.picks:
        return ""
    datasets = [
        d for d in record.datasets if any(d in p["datasets"] for p in record.picks.values())
    ]
    rows: list[list[str | Cell]] = []
    for name, found in record.picks.items():
        row: list[str | Cell] = [name]
        for dataset in datasets:
            m = found["datasets"].get(dataset)
            row.append(Cell(percent(m and m["select_top1"]), f"select:{dataset}:{name}:top1"))
        arch = str(Arch.from_json(found["arch"]))
        rows.append([*row, percent(found["accuracy"]), f"{found['loss']:.3f}", arch])
    head = ["search", *datasets, "mean", "loss", "sub-network"]
    compared = (
        record.comparison if record.comparison and record.comparison["split"] == "test" else {}
    )
    tested = [e["arch"] for e in compared.get("entries", []) if e["role"] == "pick"]
    lead = "Top-1 on select, the samples they were chosen on; "
    if untested := [name for name, found in record.picks.items() if found["arch"] not in tested]:
        root = shlex.quote(str(record.files.root))
        lead += (
            f"test scores of {', '.join(untested)}: python scripts/compare.py --checkpoint {root}"
        )
    else:
        lead += "their test scores are under Controls."
    return section("Picks", table(head, rows), lead)
