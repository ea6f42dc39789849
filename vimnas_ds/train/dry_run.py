"""What a configuration would do, in words and numbers, before anything is started."""

from __future__ import annotations

from typing import NamedTuple

from vimnas_ds.config import ConfigError, RunConfig
from vimnas_ds.cost import Layout, count_macs, count_params
from vimnas_ds.data.bad import DataMissing
from vimnas_ds.data.catalog import scan_dataset
from vimnas_ds.data.joint import open_datasets
from vimnas_ds.report.table import format_table
from vimnas_ds.space import Arch
from vimnas_ds.train.schedule import Schedule


def model_layout(config: RunConfig) -> Layout:
    """The configured model as the cost formulas see it."""
    section = config.vimnas
    model, head_dim = section.model, section.search_space.head_dim
    places = (section.side or 0) ** 2 + model.class_token
    reach = model.relative_positions
    return Layout(
        section.tokens.geometry(),
        head_dim,
        qk_norm=model.qk_norm,
        layer_scale=model.layer_scale is not None,
        class_token=model.class_token,
        learned_positions=places if model.positions == "learned" else 0,
        relative_position_params=0 if reach is None else 4 * (2 * reach + 2) * head_dim,
    )


def cost_of(config: RunConfig, arch: Arch, dataset: str) -> tuple[int, float]:
    """(parameters, GFLOPs per input) of `arch` with the head of `dataset`."""
    data, layout = config.vimnas.data.datasets[dataset], model_layout(config)
    macs = count_macs(arch, data.num_classes, layout, frames=data.frames, size=data.size)
    return count_params(arch, data.num_classes, layout), macs / 1e9


def describe_run(config: RunConfig, world_size: int) -> str:
    """Space, costs, batch arithmetic, schedule, data found and missing."""
    sections = [_space(config), _batches(config, world_size)]
    data = find_data(config)
    sections += ["data\n" + "\n".join(f"  {line}" for line in data.lines)]
    sections += [_schedule(config, data.sizes, data.notes)]
    if data.missing:
        sections += ["\n".join(["it would not start, with data missing:", *data.missing])]
    return "\n\n".join([config.about, *sections])


def _space(config: RunConfig) -> str:
    section = config.vimnas
    space, layout = section.search_space, model_layout(config)
    rows = []
    for name, data in section.data.datasets.items():
        (small, small_flops), (large, large_flops) = (
            cost_of(config, arch, name) for arch in (space.smallest(), space.largest())
        )
        shape = f"{data.frames or 1} x {data.size} x {data.size}"
        costs = [f"{small:,}", f"{small_flops:.3f}", f"{large:,}", f"{large_flops:.3f}"]
        rows.append([name, shape, str(layout.num_tokens(data.frames, data.size)), *costs])
    head = ["dataset", "input", "tokens", "params min", "GFLOPs min", "params max", "GFLOPs max"]
    title = f"space {space.name}: {space.size():,} sub-networks ({space.size():.2e})"
    return f"{title}\n{format_table(head, rows)}"


def _batches(config: RunConfig, world_size: int) -> str:
    lines = [f"global batch {config.global_batch}, no gradient accumulation"]
    for ranks in sorted({world_size, 1, 8, 16, 32, 64}):
        mark = "  <- this launch" if ranks == world_size else ""
        try:
            micro = config.micro_batch(ranks)
            alpha = config.micro_batch(ranks, config.alpha_batch)
            lines.append(f"  {ranks:>3} processes: {micro} samples each, alpha {alpha}{mark}")
        except ConfigError as err:
            lines.append(f"  {ranks:>3} processes: {err}{mark}")
    return "\n".join(lines)


class Found(NamedTuple):
    """What is there in words, training files per dataset, what is missing, and a note where files
    are not counted but taken from `reference_files`."""

    lines: list[str]
    sizes: dict[str, int]
    missing: list[str]
    notes: str


def find_data(config: RunConfig) -> Found:
    """Look for the datasets, without building an index."""
    section = config.vimnas.data
    lines, sizes, missing = list[str](), dict[str, int](), list[str]()
    for name, data in section.datasets.items():
        try:
            catalog = scan_dataset(name, data)
            sizes[name] = round(len(catalog.train) * (1 - section.held_out))
            public = data.reference_files
            tests = f" and {data.reference_test_files:,}" if data.reference_test_files else ""
            reference = f", {public:,}{tests} in the public copy" if public else ""
            lines.append(
                f"{name}: found {len(catalog.train):,} training and {len(catalog.test):,} test "
                f"files, {catalog.missing:,} listed but missing"
                f"{reference}"
            )
        except DataMissing as err:
            missing.append(str(err))
            sizes[name] = round((data.reference_files or 0) * (1 - section.held_out))
    if missing:
        notes = " (missing sets counted at the size of their public copies)"
        return Found([*lines, *(f"missing: {one}" for one in missing)], sizes, missing, notes)
    opened = open_datasets(section, build=False)
    return Found([*opened.describe(), *opened.doubts()], opened.sizes, [], "")


def _schedule(config: RunConfig, sizes: dict[str, int], notes: str) -> str:
    if not all(sizes.values()):
        return "schedule: unknown until the data is there"
    plan = Schedule.build(config, sizes)
    share = {n: s / sum(sizes.values()) for n, s in sizes.items()}
    mixture = ", ".join(f"{n} {s:.1%}" for n, s in share.items())
    joint = plan.epochs - plan.image_epochs
    return (
        f"schedule{notes}\n"
        f"  image phase: {plan.image_epochs} epochs x {plan.image_epoch_steps:,} steps = "
        f"{plan.image_steps:,} steps on {plan.image_dataset}\n"
        f"  joint phase: {joint} epochs x {plan.joint_epoch_steps:,} steps = "
        f"{joint * plan.joint_epoch_steps:,} steps ({mixture})\n"
        f"  total {plan.total_steps:,} steps; learning rate up to {plan.peak_lr:g} over "
        f"{plan.warmup_steps:,} warm-up steps, then cosine to {plan.min_lr:g}\n"
        f"  alpha step every {config.vimnas.alpha.every} steps"
        f"{'' if config.vimnas.alpha.enabled else ' (switched off)'}"
    )
