"""The compiled operators `torch.ops.vimnas_ds.*`, or word that they are missing.

Without the extension, or with VIMNAS_REFERENCE=1, the Python references beside each operator do
the work: the same results, more slowly. That is said once, in the log.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache

from torch import Tensor

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _load() -> tuple[bool, bool]:
    """(extension imported, it has CUDA kernels)"""
    if os.environ.get("VIMNAS_REFERENCE") == "1":
        logger.info("VIMNAS_REFERENCE=1: Python references instead of the compiled operators")
        return False, False
    try:
        from vimnas_ds import _C  # type: ignore[attr-defined]
    except ImportError as error:
        logger.warning(
            "the compiled operators are not there (%s): slower Python references are used; "
            "`pip install --no-build-isolation -e .` builds them",
            error,
        )
        return False, False
    return True, bool(_C.with_cuda)


def available() -> bool:
    """Whether the compiled operators are used at all."""
    return _load()[0]


def usable(x: Tensor) -> bool:
    """Whether there is a compiled kernel for tensors like `x`."""
    compiled, with_cuda = _load()
    return compiled and (x.device.type in ("cpu", "meta") or (x.is_cuda and with_cuda))
