"""Which operators do the work, and whether they compute what their references do.

Each is run in float32 and in bfloat16, which a GPU trains in: kernels are chosen by the dtype, and
no flash kernel takes float32. AdamW alone updates float32 whatever the network computes in.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from vimnas_ds.doctor.finding import Finding, has_gpu

if TYPE_CHECKING:  # a check imports torch, so that its absence is a finding
    from torch import Tensor

    from vimnas_ds.ops.apex import LayerNorm

BUILD = "pip install --no-build-isolation -e ."
REBUILD = f"{BUILD} --force-reinstall"
APEX = (
    "pip install -v --no-build-isolation --config-settings '--build-option=--cpp_ext' "
    "--config-settings '--build-option=--cuda_ext' git+https://github.com/NVIDIA/apex"
)
REBUILD_APEX = f"{APEX} --force-reinstall --no-deps, or pip uninstall apex"
#: of a kernel that was resolved and cannot run
MEND_ATTENTION = {
    "sdpa": REBUILD,
    "flash_attn": "pip install --force-reinstall --no-deps --no-build-isolation flash-attn, "
    "or export VIMNAS_ATTENTION=sdpa",
}


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
        one, mass = torch.ones(16, device=x.device), mass.float()  # as it is in training
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

    mend = MEND_ATTENTION.get(backend, f"unset {VARIABLE}")
    tensors = [torch.randn(2, 3, 20, 16) for _ in range(3)]
    found = _same("attention", attention, explicit, tensors, mend)
    why = lines[-1] if lines else f"attention: {backend}"  # it was resolved before
    found = replace(found, detail=f"{why}; {found.detail}")
    if found.state == "ok" and has_gpu() and backend == "sdpa":
        told = f"{found.detail}; SDPA has fused kernels of its own"
        return [Finding("attention", "slow", told, "pip install '.[gpu]'", required=False)]
    return [found]


def apex() -> list[Finding]:
    """NVIDIA apex on GPUs: its layer norm, and FusedAdam where it is compiled."""
    from vimnas_ds.ops.apex import fused_layer_norm, nvidia_apex, torch_layer_norm

    if not has_gpu():
        return [Finding("apex", "skipped", "no GPU: PyTorch's layer norm does the work")]
    parts = nvidia_apex()
    if parts is None:
        told = "NVIDIA apex is not installed (PyPI's apex is another project)"
        return [Finding("apex", "missing", told, APEX, required=False)]
    adam = [_fused_adam()] if "amp_C" in parts else []
    kernel = fused_layer_norm()
    if kernel is torch_layer_norm:
        told = f"installed, but its layer norm cannot be used; compiled parts: {sorted(parts)}"
        return [Finding("apex", "slow", told, APEX, required=False), *adam]
    return [_apex_layer_norm(kernel, sorted(parts)), *adam]


def _apex_layer_norm(kernel: LayerNorm, parts: Sequence[str]) -> Finding:
    import torch

    from vimnas_ds.ops.apex import torch_layer_norm

    def ours(*t: torch.Tensor) -> torch.Tensor:
        return kernel(t[0], t[1], t[2], 1e-6)

    def reference(*t: torch.Tensor) -> torch.Tensor:
        return torch_layer_norm(t[0], t[1], t[2], 1e-6)

    tensors = torch.randn(6, 64), torch.randn(64), torch.randn(64)
    found = _same("apex", ours, reference, tensors, REBUILD_APEX)
    return replace(found, detail=f"its layer norm does the work; {found.detail}; compiled: {parts}")


def _fused_adam() -> Finding:
    """Against torch's AdamW; training does without it."""
    import torch

    start, grad, device = torch.randn(100), torch.randn(100), _device()
    both = []
    try:
        fused = importlib.import_module("apex.optimizers").FusedAdam
        for make in (fused, torch.optim.AdamW):
            weight = torch.nn.Parameter(start.clone().to(device))
            weight.grad = grad.to(device)
            optimizer = make([weight], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
            for _ in range(2):
                optimizer.step()
            both.append(weight.detach())
    except Exception as err:  # whatever a broken build raises
        found = _cannot_run("apex FusedAdam", f"on {device}", err, REBUILD_APEX)
    else:
        error = float((both[0] - both[1]).abs().max())
        told = f"on {device}: two updates differ from torch's AdamW by {error:.1e} at most"
        found = _verdict("apex FusedAdam", error <= 1e-5, told, REBUILD_APEX)
    return replace(found, required=False)


def adamw() -> list[Finding]:
    """The update of rectangles of a flat tensor."""
    import numpy as np
    import torch

    from vimnas_ds.ops._extension import usable
    from vimnas_ds.ops.adamw import sliced_adamw_, sliced_adamw_ref_

    rows, rates = np.array([[3, 4, 5, 8], [40, 2, 16, 16]]), np.array([[1e-3, 0.5], [2e-3, 0.9]])
    start = [torch.randn(80) for _ in range(3)] + [torch.rand(80)]
    device = _device()
    if not usable(torch.empty(0, device=device)):
        told = "the Python reference does the work: see extension"
        return [Finding("adamw", "slow", told, BUILD)]
    both = []
    for update in (sliced_adamw_, sliced_adamw_ref_):
        tensors = tuple(t.clone().to(device) for t in start)
        update(tensors, rows, rates, 1e-3, 0.1, (0.9, 0.999), 1e-8)
        both.append(torch.cat(tensors))
    error = float((both[0] - both[1]).abs().max())
    told = f"on {device} in float32: differs from the reference by {error:.1e} at most"
    return [_verdict("adamw", error <= 1e-5, told, REBUILD)]


def _device() -> str:
    return "cuda" if has_gpu() else "cpu"


def _same(
    name: str,
    ours: Callable[..., object],
    reference: Callable[..., object],
    tensors: Sequence[Tensor],
    mend: str = REBUILD,
) -> Finding:
    """Values and gradients of `ours` in float32 and bfloat16 beside those of the reference, which
    takes the same inputs in float32; on the GPU if there is one."""
    import torch

    device, told = _device(), []
    # float32 products may be TF32's on a GPU
    most = {torch.float32: 1e-2 if device == "cuda" else 1e-4, torch.bfloat16: 2e-2}
    for dtype in most:
        rounded = [t.to(device, dtype) for t in tensors]
        kind = str(dtype).removeprefix("torch.")
        try:
            error = _difference(
                _values_and_gradients(ours, rounded),
                _values_and_gradients(reference, [t.float() for t in rounded]),
            )
        except Exception as err:  # whatever a kernel's package raises
            return _cannot_run(name, f"on {device} in {kind}", err, mend)
        told.append(f"{error:.1e} in {kind}")
        if not error <= most[dtype]:
            break
    text = f"on {device}: values and gradients differ from the reference by {', '.join(told)}"
    return _verdict(name, error <= most[dtype], text, mend)


def _values_and_gradients(
    function: Callable[..., object], tensors: Sequence[Tensor]
) -> list[Tensor | None]:
    import torch

    inputs = [t.clone().requires_grad_() for t in tensors]
    y = function(*inputs)
    assert isinstance(y, torch.Tensor)
    y.float().square().mean().backward()
    return [y.detach(), *(t.grad for t in inputs)]


def _difference(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """The largest, relative to the largest value of each; not a number where one is not, infinite
    where a gradient is lacking."""
    errors = []
    for a, b in zip(found, wanted, strict=True):
        if b is not None:
            errors.append(math.inf if a is None else float((a - b).abs().max() / b.abs().max()))
    return next((e for e in errors if math.isnan(e)), max(errors))


def _cannot_run(name: str, where: str, err: Exception, mend: str) -> Finding:
    return Finding(name, "failed", f"cannot run {where}: {type(err).__name__}: {err}", mend)


def _verdict(name: str, good: bool, told: str, mend: str) -> Finding:
    return Finding(name, "ok", told) if good else Finding(name, "failed", told, mend)


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
