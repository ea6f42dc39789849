"""Scaled dot-product attention through one function, its kernel resolved once for each process.

    auto        flash-attn 2 where it is installed and the inputs are bf16/fp16 on a GPU of compute
                capability 8.0 or more, `scaled_dot_product_attention` otherwise
    sdpa        always `scaled_dot_product_attention`: by itself it picks flash or cuDNN on a GPU,
                its flash kernel on a CPU (fp32 and bf16, with backward, no copy of q, k, v)
    flash_attn  flash-attn 2, an error where it cannot run
    fa3, fa4    PyTorch's own dispatcher with FlashAttention 3 or 4, an error where they cannot run

The environment variable VIMNAS_ATTENTION chooses; it is read at the first call. No flash kernel
takes float32: such inputs, and any on a CPU, go through SDPA whatever was chosen.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

VARIABLE = "VIMNAS_ATTENTION"
CHOICES = ("auto", "sdpa", "flash_attn", "fa3", "fa4")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
_log = logging.getLogger(__name__)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, N, H*K) -> (B, H, N, K)"""
    return rearrange(x, "b n (h k) -> b h n k", k=head_dim)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, K) -> (B, N, H*K)"""
    return rearrange(x, "b h n k -> b n (h k)")


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v: all (B, H, N, K)."""
    return _resolved().function(q, k, v)


def attention_backend() -> str:
    """Which kernel `attention` uses: "sdpa", "flash_attn", "fa3" or "fa4"."""
    return _resolved().name


class _Backend(NamedTuple):
    name: str
    function: Attention


@lru_cache(maxsize=1)
def _resolved() -> _Backend:
    """Raises ValueError for an unknown name, RuntimeError for one that cannot run here."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in CHOICES:
        raise ValueError(f"{VARIABLE} is {wanted!r}; choose one of {', '.join(CHOICES)}")
    if wanted == "auto":
        backend, why = _automatic()
    elif wanted == "sdpa":
        backend, why = _sdpa(), f"{VARIABLE}=sdpa"
    else:
        try:
            backend = _flash_attn() if wanted == "flash_attn" else _registered(wanted)
        except _NotUsable as err:
            raise RuntimeError(f"{VARIABLE}={wanted}: {err}; unset it to use SDPA") from err
        why = f"{VARIABLE}={wanted}"
    _log.info("attention: %s (%s)", backend.name, why)
    return backend


class _NotUsable(Exception):
    """Why a kernel cannot run here, in words."""


def _automatic() -> tuple[_Backend, str]:
    if importlib.util.find_spec("flash_attn") is None:
        return _sdpa(), "flash-attn is not installed"
    try:
        return _flash_attn(), "flash-attn is installed"
    except _NotUsable as err:
        return _sdpa(), str(err)


def _sdpa() -> _Backend:
    return _Backend("sdpa", F.scaled_dot_product_attention)


def _flash_attn() -> _Backend:
    _require_gpu((8, 0))
    try:
        flash_attn_func = importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError, OSError) as err:  # absent, another release, another ABI
        raise _NotUsable(f"flash-attn 2 cannot be imported ({err})") from err

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not _takes_flash(q):
            return F.scaled_dot_product_attention(q, k, v)
        # its layout is (B, N, H, K): views of ours, no copy
        y: Tensor = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return y.transpose(1, 2)

    return _Backend("flash_attn", flash)


def _registered(name: str) -> _Backend:
    """FlashAttention 3 or 4 behind `scaled_dot_product_attention`, for this whole process."""
    from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

    _require_gpu((9, 0))
    try:
        activate_flash_attention_impl(name.upper())
    except Exception as err:  # the registry raises what the package's import or version check does
        raise _NotUsable(f"PyTorch cannot activate it ({err})") from err

    def registered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not _takes_flash(q):
            return F.scaled_dot_product_attention(q, k, v)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # else PyTorch may prefer cuDNN
            return F.scaled_dot_product_attention(q, k, v)

    return _Backend(name, registered)


def _require_gpu(capability: tuple[int, int]) -> None:
    if not torch.cuda.is_available():
        raise _NotUsable("there is no CUDA device")
    if (found := torch.cuda.get_device_capability()) < capability:
        raise _NotUsable(f"it needs compute capability {capability}, this GPU has {found}")


def _takes_flash(q: Tensor) -> bool:
    """Whether the flash kernels take such inputs."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256
