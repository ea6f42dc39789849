"""The one reader of torch files (pickles) from others: tensors and named harmless types only."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vimnas_ds.config import ConfigError


def read_torch_file(path: Path, allowed: Sequence[type] = ()) -> Any:
    """What the file holds, on the CPU; `allowed`: types besides tensors and plain values.

    Raises ConfigError in words, also where loading it would run code.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise ConfigError(
            f"{path} holds more than tensors and is refused (loading it would run its code); save "
            "a plain state dict or safetensors"
        ) from err
    except Exception as err:  # torch's unpickler trips over a damaged file in ways of its own
        why = str(err) if isinstance(err, OSError | RuntimeError | ValueError) else repr(err)
        raise ConfigError(f"cannot read {path}: {why}") from err
