"""Which operators do the work, and whether they compute what their references do."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vimnas_ds.doctor.finding import Finding, State, has_gpu

BUILD = "pip install --no-build-isolation -e ."
APEX = (
    "pip install -v --no-build-isolation --config-settings '--build-option=--cpp_ext' "
    "--config-settings '--build-option=--cuda_ext' git+https://github.com/NVIDIA/apex"
)


def extension() -> list[Finding]:
    """The compiled operators."""
    if os.environ.get("VIMNAS_REFERENCE") == "1":
        told = "VIMNAS_REFERENCE=1: Python references do the work"
        return [Finding("extension", "slow", told, "unset VIMNAS_REFERENCE")]
    try:
        from vimnas_ds import _C  # type: ignore[attr-defined]
    except ImportError as err:
        told = f"not there, slower Python references do the work: {err}"
        return [Finding("extension", "slow", told, BUILD)]
    if has_gpu() and not _C.with_cuda:
        told = "built for the CPU alone: Python references do the work on the GPU"
        return [Finding("extension", "slow", told, f"CUDA_HOME=/usr/local/cuda {BUILD}")]
    return [Finding("extension", "ok", f"compiled for {'CUDA and CPU' if _C.with_cuda else 'CPU'}")]


def sliced_linear() -> list[Finding]:
    """The sliced linear layer and the MLP, forward and backward."""
    import torch

    from vimnas_ds.ops.sliced_linear import sliced_linear, sliced_linear_ref, sliced_mlp

    x, w, b = torch.randn(12, 20), torch.randn(3, 24, 32), torch.randn(3, 24)
    w2, b2 = torch.randn(1, 20, 24), torch.randn(1, 20)

    def ours(*t: torch.Tensor) -> torch.Tensor:
        y = torch.cat(sliced_linear(t[0], t[1], t[2], 16), -1)
        return torch.cat([y, sliced_mlp(t[0], (t[1][:1], t[2][:1]), (t[3], t[4]), 16, 8)], -1)

    def reference(*t: torch.Tensor) -> torch.Tensor:
        y = torch.cat(sliced_linear_ref(t[0], t[1], t[2], 16), -1)
        (h,) = sliced_linear_ref(t[0], t[1][:1], t[2][:1], 16, gelu=True)
        return torch.cat([y, *sliced_linear_ref(h, t[3], t[4], 8)], -1)

    return [_same("sliced linear", ours, reference, (x, w, b, w2, b2))]


def gates() -> list[Finding]:
    """The alpha step's gates."""
    import torch
    from torch.nn import functional as F

    from vimnas_ds.ops.gates import gated_gelu, gated_norm, weighted_layer_norm

    x, mass = torch.randn(6, 16), torch.rand(16)

    def ours(x: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        one = torch.ones(16, device=x.device)
        return gated_norm(x, mass, one, one, 1e-6) + gated_gelu(x, mass)

    def reference(x: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        one = torch.ones(16, device=x.device)
        return weighted_layer_norm(x, mass, one, one, 1e-6) + F.gelu(x, approximate="tanh") * mass

    return [_same("gates", ours, reference, (x, mass))]


def attention() -> list[Finding]:
    """The attention kernel, and why it is that one."""
    import torch

    from vimnas_ds.model.attention import VARIABLE, attention, attention_backend

    with _said("vimnas_ds.model.attention") as lines:
        try:
            backend = attention_backend()
        except (ValueError, RuntimeError) as err:
            return [Finding("attention", "failed", str(err), f"unset {VARIABLE}")]

    def explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    tensors = [torch.randn(2, 3, 20, 16) for _ in range(3)]
    found = _same("attention", attention, explicit, tensors)
    found = Finding(found.name, found.state, f"{lines[-1]}; {found.detail}")
    if found.state == "ok" and has_gpu() and backend == "sdpa":
        told = f"{found.detail}; SDPA has fused kernels of its own"
        return [Finding("attention", "slow", told, "pip install '.[gpu]'", required=False)]
    return [found]


def layer_norm() -> list[Finding]:
    """apex's kernel on GPUs."""
    from vimnas_ds.ops.apex import fused_layer_norm, nvidia_apex, torch_layer_norm

    parts = nvidia_apex()
    if not has_gpu():
        return [Finding("apex", "skipped", "no GPU: PyTorch's layer norm does the work")]
    if parts is None:
        told = "NVIDIA apex is not installed (PyPI's apex is another project)"
        return [Finding("apex", "missing", told, APEX, required=False)]
    if fused_layer_norm() is torch_layer_norm:
        told = f"installed, but its layer norm cannot be used; compiled parts: {sorted(parts)}"
        return [Finding("apex", "slow", told, APEX, required=False)]
    return [Finding("apex", "ok", f"its layer norm does the work; compiled: {sorted(parts)}")]


def adamw() -> list[Finding]:
    """The update of rectangles of a flat tensor."""
    import numpy as np
    import torch

    from vimnas_ds.ops._extension import usable
    from vimnas_ds.ops.adamw import sliced_adamw_, sliced_adamw_ref_

    rows, rates = np.array([[3, 4, 5, 8], [40, 2, 16, 16]]), np.array([[1e-3, 0.5], [2e-3, 0.9]])
    start = [torch.randn(80) for _ in range(3)] + [torch.rand(80)]
    device = "cuda" if has_gpu() else "cpu"
    if not usable(torch.empty(0, device=device)):
        told = "the Python reference does the work: see extension"
        return [Finding("adamw", "slow", told, BUILD)]
    both = []
    for update in (sliced_adamw_, sliced_adamw_ref_):
        tensors = tuple(t.clone().to(device) for t in start)
        update(tensors, rows, rates, 1e-3, 0.1, (0.9, 0.999), 1e-8)
        both.append(torch.cat(tensors))
    return [_verdict("adamw", float((both[0] - both[1]).abs().max()), 1e-5, device)]


def _same(
    name: str, ours: Callable[..., object], reference: Callable[..., object], tensors: object
) -> Finding:
    """Values and gradients of both in float32, on the GPU if there is one."""
    import torch

    assert isinstance(tensors, list | tuple)
    device, both = "cuda" if has_gpu() else "cpu", []
    for function in (ours, reference):
        inputs = [t.clone().to(device).requires_grad_() for t in tensors]
        y = function(*inputs)
        assert isinstance(y, torch.Tensor)
        y.square().mean().backward()
        both.append([y.detach(), *(t.grad for t in inputs)])
    error = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(*both, strict=True)
        if a is not None and b is not None
    )
    return _verdict(name, error, 1e-2 if device == "cuda" else 1e-4, device)


def _verdict(name: str, error: float, most: float, device: str) -> Finding:
    state: State = "ok" if error <= most else "failed"
    told = f"on {device}: values and gradients differ from the reference by {error:.1e} at most"
    return Finding(name, state, told, "" if state == "ok" else f"{BUILD} --force-reinstall")


@contextmanager
def _said(name: str) -> Iterator[list[str]]:
    """The lines that a logger of this project says meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
