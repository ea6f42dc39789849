"""Writes docs/configuration.md from the schema, so that it says what the code checks.

    python scripts/make_docs.py            # writes the page; under a second
    python scripts/make_docs.py --check    # exit code 1 if the committed page differs

Types, defaults, bounds and descriptions are those of `vimnas_ds/config/`; what keys must hold
together is shown by breaking it on `ds_configs/demo.json` and quoting the refusal. A key without a
description, or an example that is not refused, is an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vimnas_ds.config import ConfigError, VimnasSection, load_config
from vimnas_ds.config.deepspeed import DEEPSPEED_KEYS, REFUSED_KEYS, ZERO_KEYS, ZERO_KEYS_REFUSED

Row = tuple[str, ...]
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "configuration.md"
DEMO = ROOT / "ds_configs" / "demo.json"

HEAD = """\
# Configuration

This page is written by `python scripts/make_docs.py` from `vimnas_ds/config/`; a test compares
them.

One JSON file holds DeepSpeed's keys, an `"about"` text and one `"vimnas"` section. Unknown keys are
errors that name the nearest valid one; `true` or `"8"` is not a number. `--set KEY=VALUE` overrides
any key and may be repeated: VALUE is JSON or a bare word, a dataset's name stands for its section
(`vimnas.data.k400.root` for `vimnas.data.datasets.k400.root`). You give the global batch; the micro
batch is derived from the number of processes.

```
python scripts/train.py --deepspeed_config ds_configs/demo.json --dry_run \\
    --set vimnas.schedule.epochs=20 --set vimnas.ema={}
```
"""

DEEPSPEED = {
    "train_batch_size": "Global batch of a step, required; must be shared evenly by the processes",
    "gradient_accumulation_steps": "1 or left out",
    "gradient_clipping": "Required; 0: off (the paper's), else the norm of the sampled blocks",
    "bf16": '`enabled`: true, false or "auto" (true on a GPU); `check_grad_overflow` only true',
    "zero_optimization": "Required, see below",
    "data_types": '`grad_accum_dtype`, only "fp32", which bf16 runs get by themselves',
    "steps_per_print": "Steps between DeepSpeed's own lines; left out: none",
    "wall_clock_breakdown": "Whether DeepSpeed times its parts",
}
ZERO = {
    "stage": "2, required",
    "reduce_bucket_size": "Elements of a gradient bucket, written out (500000000, not 5e8)",
    "allgather_bucket_size": "Elements of an all-gather, written out",
    "overlap_comm": "Reduce during backward",
    "contiguous_gradients": "Copy gradients into one buffer as they come",
    "reduce_scatter": "Reduce-scatter in place of all-reduce",
    "use_multi_rank_bucket_allreduce": "One all-reduce a bucket in place of one a rank",
    "round_robin_gradients": "Only false",
}
#: One override each that breaks what keys must hold together.
BROKEN = (
    "vimnas.model.positions=learned",
    "vimnas.data.k400.fps=null",
    "vimnas.data.imagenet.frames=8",
    "vimnas.data.imagenet.test_clips=2",
    "vimnas.data.imagenet.layout=ssv2",
    "vimnas.data.k400.layout=imagenet",
    "vimnas.data.k400.layout=lists",
    "vimnas.data.k400.synsets=map_clsloc.txt",
    "vimnas.data.imagenet.resize=16",
    "vimnas.data.imagenet.crop_scale=[0.5, 1.5]",
    "vimnas.data.imagenet.crop_ratio=[2, 1]",
    "vimnas.data.k400.size=8",
    'vimnas.tokens={"kind": "tubes", "image_tube": 0}',
    'vimnas.model={"init": "a.safetensors", "inherit": "runs/a"}',
    "vimnas.space=vit_x",
    'vimnas.arch={"embed_dim": 1, "depth": 2, "num_heads": [1, 1], "mlp_ratio": [2, 2]}',
    "vimnas.schedule.image_dataset=k400",
    "vimnas.schedule.image_epochs=1000",
    "vimnas.schedule.min_lr=1",
    'vimnas.schedule={"epochs": 3, "warmup": 4, "warmup_unit": "epochs"}',
    "vimnas.output_dir=.",
    "gradient_accumulation_steps=2",
    "bf16.check_grad_overflow=false",
    "zero_optimization.stage=3",
    "data_types.grad_accum_dtype=bf16",
)


def table(head: tuple[str, ...], rows: list[Row]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in lines)


class Schema:
    """The JSON schema of the `vimnas` section, as tables in words."""

    def __init__(self) -> None:
        self.top = VimnasSection.model_json_schema()
        self.sections: list[tuple[str, dict[str, Any]]] = []  # (path, schema), in order of reading
        self._collect("vimnas", self.top)

    def _collect(self, path: str, section: dict[str, Any]) -> None:
        self.sections.append((path, section))
        for key, field in section["properties"].items():
            self._inner(f"{path}.{key}", field)

    def _inner(self, path: str, field: dict[str, Any]) -> None:
        """The sections within a field: plain, one of several, items of a list, values by name."""
        if "$ref" in field:
            self._collect(path, self.top["$defs"][field["$ref"].rpartition("/")[2]])
        for option in field.get("anyOf", ()):
            self._inner(path, option)
        if isinstance(field.get("items"), dict):
            self._inner(f"{path}[]", field["items"])
        if isinstance(field.get("additionalProperties"), dict):
            self._inner(f"{path}.NAME", field["additionalProperties"])

    def type_of(self, field: dict[str, Any], path: str) -> str:
        if "anyOf" in field:
            return " or ".join(self.type_of(option, path) for option in field["anyOf"])
        if "$ref" in field:
            return f"[section](#{anchor(path)})"
        if "enum" in field:
            return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
        if "prefixItems" in field:
            items = [self.type_of(item, path) for item in field["prefixItems"]]
            return f"list of {len(items)}: {', '.join(dict.fromkeys(items))}"
        if field["type"] == "array":
            return f"list of {self.type_of(field['items'], path + '[]')}"
        if field["type"] == "object":
            return f"by name: {self.type_of(field['additionalProperties'], path + '.NAME')}"
        words = {"integer": "whole number", "boolean": "true or false", "string": "text"}
        kind = "path" if field.get("format") == "path" else words.get(field["type"], field["type"])
        return kind + bounds(field)

    def rows(self, path: str, section: dict[str, Any]) -> list[Row]:
        required = section.get("required", [])
        rows = list[Row]()
        for key, field in section["properties"].items():
            default = field.get("default")
            shown = f"`{json.dumps(default)}`"
            if key in required:
                shown = "required"
            elif isinstance(default, dict):
                shown = "`{}`"
            kind = self.type_of(field, f"{path}.{key}")
            rows.append((f"`{key}`", kind, shown, meaning(field)))
        return rows


def meaning(field: dict[str, Any]) -> str:
    """The description; that of a section stands over its own table."""
    if "description" not in field and "$ref" in field:
        return "see there"
    return " ".join(field["description"].split())


def bounds(field: dict[str, Any]) -> str:
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    found = [f"{text} {field[key]:g}" for key, text in words.items() if key in field]
    return f" ({', '.join(found)})" if found else ""


def anchor(heading: str) -> str:
    """GitHub's: lower case, letters, digits, - and _ stay, spaces become -."""
    kept = (c for c in heading.lower() if c.isalnum() or c in "-_ ")
    return "".join(kept).replace(" ", "-")


def refusals() -> list[Row]:
    rows = list[Row]()
    for override in BROKEN:
        try:
            load_config(DEMO, [override])
        except ConfigError as error:
            rows.append((f"`{override}`", "<br>".join(str(error).splitlines())))
        else:
            raise ValueError(f"{override} is not refused any more: take it out of BROKEN")
    return rows


def build() -> str:
    """The page. Raises ValueError where what is written here does not fit the schema."""
    if set(DEEPSPEED) != DEEPSPEED_KEYS or set(ZERO) != ZERO_KEYS:
        raise ValueError(
            "DEEPSPEED and ZERO must describe exactly the keys that config/deepspeed.py accepts"
        )
    schema, parts = Schema(), [HEAD]
    for path, section in schema.sections:
        parts += [f"## {path}\n", " ".join(section["description"].split()) + "\n"]
        parts.append(
            table(("key", "type", "default", "meaning"), schema.rows(path, section)) + "\n"
        )
    parts += ["## What keys must hold together\n"]
    parts += ["Each line breaks one rule on `ds_configs/demo.json` and is answered like this:\n"]
    parts.append(table(("`--set`", "refusal"), refusals()) + "\n")
    parts += ["## DeepSpeed's keys\n"]
    accepted: list[Row] = [(f"`{key}`", text) for key, text in DEEPSPEED.items()]
    accepted += [(f"`zero_optimization.{key}`", text) for key, text in ZERO.items()]
    parts += ["Accepted:\n", table(("key", "meaning"), accepted) + "\n"]
    refused = list(REFUSED_KEYS.items())
    refused += [(f"zero_optimization.{key}", why) for key, why in ZERO_KEYS_REFUSED.items()]
    rows: list[Row] = [(f"`{key}`", why) for key, why in refused]
    parts += ["Refused:\n", table(("key", "why"), rows) + "\n"]
    parts.append("Every other key is unknown, and an error as well.\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args(argv)
    page = build()
    if not args.check:
        PAGE.write_text(page, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        print(f"{PAGE} is not what the schema gives: run python scripts/make_docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
