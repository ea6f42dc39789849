"""NVIDIA apex, where it is really there: found without importing it.

The package `apex` on PyPI is another project (a Pyramid toolkit). NVIDIA's has the folders
`optimizers`, `normalization` and `multi_tensor_apply`, and its kernels are top-level modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

#: compiled module -> what it serves
EXTENSIONS = {
    "amp_C": "FusedAdam, multi-tensor norm and scale",
    "fused_layer_norm_cuda": "FusedLayerNorm, FusedRMSNorm",
    "fused_dense_cuda": "FusedDense",
    "fused_weight_gradient_mlp_cuda": "weight gradients accumulated in main_grad",
}
_FOLDERS = ("optimizers", "normalization", "multi_tensor_apply")

LayerNorm = Callable[[Tensor, Tensor, Tensor, float], Tensor]
_log = logging.getLogger(__name__)


def nvidia_apex() -> dict[str, str] | None:
    """The compiled parts of NVIDIA apex that are installed: an empty dict for a Python-only
    installation, None where there is no apex or only PyPI's."""
    spec = importlib.util.find_spec("apex")
    places = [Path(p) for p in spec.submodule_search_locations or []] if spec else []
    if not any(all((p / d / "__init__.py").exists() for d in _FOLDERS) for p in places):
        return None
    return {name: use for name, use in EXTENSIONS.items() if importlib.util.find_spec(name)}


@lru_cache(maxsize=1)
def fused_layer_norm() -> LayerNorm:
    """layer_norm(x, weight, bias, eps) over the last axis, resolved once: apex's kernel for CUDA
    tensors of one dtype where NVIDIA apex is compiled, `F.layer_norm` otherwise."""
    if not torch.cuda.is_available() or "fused_layer_norm_cuda" not in (nvidia_apex() or {}):
        return torch_layer_norm
    try:
        affine = importlib.import_module("apex.normalization.fused_layer_norm")
        importlib.import_module("fused_layer_norm_cuda")
        kernel = affine.fused_layer_norm_affine
    except (ImportError, AttributeError, OSError) as err:  # built against another torch
        _log.warning("layer norm: NVIDIA apex is installed but cannot be used (%s)", err)
        return torch_layer_norm
    _log.info("layer norm: NVIDIA apex")

    def apex_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        if not x.is_cuda or x.dtype != weight.dtype:
            return torch_layer_norm(x, weight, bias, eps)
        y: Tensor = kernel(x, weight, bias, tuple(weight.shape), eps)
        return y

    return apex_layer_norm


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PyTorch's own."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
