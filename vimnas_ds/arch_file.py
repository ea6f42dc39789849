"""Architectures in files: arch.json, or any JSON object with one under "arch"."""

from __future__ import annotations

import json
from pathlib import Path

from vimnas_ds.config import ConfigError
from vimnas_ds.space import Arch


def read_arch(path: Path) -> Arch:
    """The architecture in `path`. Raises ConfigError, naming the file and what is wrong."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as err:
        raise ConfigError(f"cannot read the architecture {path}: {err}") from err
    if isinstance(content, dict) and "arch" in content:
        content = content["arch"]
    try:
        return Arch.from_json(content)
    except (TypeError, ValueError) as err:
        raise ConfigError(f"{path}: {err}") from err
