"""Architectures in files: arch.json, or any JSON object with one under "arch"."""

from __future__ import annotations

import json
from pathlib import Path

from vimnas_ds.config import ConfigError
from vimnas_ds.space import Arch, SearchSpace


def read_arch(path: Path, space: SearchSpace | None = None) -> Arch:
    """The architecture in `path`, a member of `space` if that is given.

    Raises ConfigError, naming the file and what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(f"cannot read the architecture {path}: {err}") from err
    if isinstance(content, dict) and "arch" in content:
        content = content["arch"]
    try:
        if not isinstance(content, dict):
            raise ValueError(f"an architecture is a JSON object, got {content!r}")
        arch = Arch.from_json(content)
        if space is not None:
            space.validate(arch)
        return arch
    except (TypeError, ValueError, OverflowError) as err:
        raise ConfigError(f"{path}: {err}") from err


def named_arch(name: str, space: SearchSpace) -> Arch:
    """The `largest` or `smallest` member of `space`, or the one in the file of that name."""
    if name in ("largest", "smallest"):
        return space.largest() if name == "largest" else space.smallest()
    if not Path(name).exists():
        raise ConfigError(f"no architecture {name}: largest, smallest, or the path of an arch.json")
    return read_arch(Path(name), space)
