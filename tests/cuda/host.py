"""Libraries of the CUDA sources for the CPU, and tensors between guards.

`csrc/cuda/cuda_on_host.h` runs every CUDA thread as a fiber, warps in a chosen order, with shared
memory full of NaN. Matrices lie between guards of NaN, so that an access out of bounds shows.
"""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
KERNELS = ROOT / "tests" / "cuda" / "kernels_on_host.cpp"
STAND_IN = ROOT / "tests" / "cuda" / "lt_on_host.cpp"
GUARD = 2048  # elements on either side of a guarded tensor


class HostError(Exception):
    """A kernel on the host broke a rule: a barrier, a mask, an alignment."""


def compile_shared(source: Path, target: Path, *flags: str) -> None:
    command = ["g++", "-std=c++20", "-fPIC", "-shared", *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compile_kernels(sources: Path, target: Path, *flags: str) -> None:
    compile_shared(KERNELS, target, f"-I{sources}", "-Wno-unknown-pragmas", *flags)


def as_argument(value: Tensor | int | float | None) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


class Library:
    """Functions of a shared object; a non-zero result raises HostError with its message."""

    def __init__(self, path: Path, error: str):
        self._library = ctypes.CDLL(str(path))
        self._error = getattr(self._library, error)
        self._error.restype = ctypes.c_char_p

    def number(self, name: str, *values: Tensor | int | None) -> int:
        return getattr(self._library, name)(*map(as_argument, values))

    def call(self, name: str, *values: Tensor | int | float | None) -> None:
        if self.number(name, *values):
            raise HostError(self._error().decode())


def guarded(tensor: Tensor, shift: int = 0) -> Tensor:
    """A copy between guards of NaN, 16-byte aligned unless shifted by some elements."""
    memory = torch.full((tensor.numel() + 2 * GUARD + 16,), math.nan, dtype=tensor.dtype)
    start = GUARD
    while (memory.data_ptr() + start * memory.element_size()) % 16:
        start += 1
    start += shift
    inside = memory[start : start + tensor.numel()].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def unwritten(*shape: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
    return guarded(torch.full(shape, math.nan, dtype=dtype), shift)


def assert_guards_hold(*tensors: Tensor) -> None:
    for tensor in tensors:
        before, after = tensor.storage_offset(), tensor.storage_offset() + tensor.numel()
        memory = tensor.new_empty(0).set_(tensor.untyped_storage())
        assert memory[:before].isnan().all(), "something wrote below the tensor"
        assert memory[after:].isnan().all(), "something wrote beyond the tensor"


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    rtol, atol = (2e-5, 2e-5) if dtype is torch.float32 else (1e-2, 1e-2)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


def assert_sums_near(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1).item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5 * scale)


def random(
    *shape: int, dtype: torch.dtype = torch.float32, shift: int = 0, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return guarded(torch.randn(shape, generator=generator).to(dtype), shift)


def masses(count: int) -> Tensor:
    """Falling masses as a superposed width has them, with zeros at the end."""
    return guarded(torch.linspace(1.0, -0.1, count).clamp(min=0.0))


def leaf(tensor: Tensor) -> Tensor:
    return tensor.double().detach().clone().requires_grad_()
