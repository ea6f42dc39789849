"""Writes safetensors files that others may read: as any file, by the umask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` to `path`; safetensors alone makes it the owner's to read."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), str(path), metadata=metadata)
    path.chmod(mode)
