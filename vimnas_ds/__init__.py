"""vimnas_ds: an entangled ViT supernet for images and video, and its best sub-network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vimnas_ds.model.subnet import SubNetwork

__version__ = "0.1.0"


def load_subnet(folder: str | Path) -> SubNetwork:
    """The sub-network exported to `folder`; see `vimnas_ds.export.load_subnet`."""
    from vimnas_ds.export import load_subnet as load  # torch is imported only when needed

    return load(folder)
