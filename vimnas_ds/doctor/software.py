"""What is installed: Python, packages against the versions that the tests have run with, GPUs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path

from vimnas_ds.doctor.finding import SETUP, Finding, has_gpu

#: distribution -> (module, whether training needs it)
PACKAGES = {
    "torch": ("torch", True),
    "torchvision": ("torchvision", True),
    "deepspeed": ("deepspeed", True),
    "timm": ("timm", True),
    "nvidia-dali-cuda130": ("nvidia.dali", True),
    "av": ("av", True),
    "einops": ("einops", True),
    "tensorboard": ("tensorboard", True),
    "pydantic": ("pydantic", True),
    "safetensors": ("safetensors", True),
    "numpy": ("numpy", True),
    "pillow": ("PIL", True),
    "matplotlib": ("matplotlib", True),
    "tqdm": ("tqdm", True),
    "pyarrow": ("pyarrow", True),
    "flash-attn": ("flash_attn", False),
}
_FIX = {"flash-attn": "pip install '.[gpu]'"}


def python() -> list[Finding]:
    """The interpreter."""
    found = f"{platform.python_version()} ({sys.executable}), {platform.platform()}"
    if sys.version_info[:2] == (3, 11):
        return [Finding("python", "ok", found)]
    return [Finding("python", "failed", f"{found}: 3.11 is needed", f"PYTHON=python3.11 {SETUP}")]


def packages() -> list[Finding]:
    """Each package's version; nothing is imported."""
    wanted = _wanted()
    return [_package(name, *PACKAGES[name], wanted.get(name, "")) for name in PACKAGES]


def _package(name: str, module: str, required: bool, wanted: str) -> Finding:
    try:
        there = importlib.util.find_spec(module) is not None
        version = importlib.metadata.version(name)
    except (ModuleNotFoundError, ValueError):  # a parent package, or the distribution, is not there
        there, version = False, ""
    mend = _FIX.get(name, f"pip install '{name}{wanted}'" if wanted else SETUP)
    if not there:
        return Finding(name, "missing", "not installed", mend, required)
    if wanted and not _fits(version, wanted):
        told = f"{version}: the tests have run with {wanted} only"
        return Finding(name, "failed", told, mend, required)
    return Finding(name, "ok", version)


def _wanted() -> dict[str, str]:
    """Versions that this project asks for; none where it is not installed (a bare checkout)."""
    if importlib.util.find_spec("packaging") is None:
        return {}
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("vimnas_ds") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {r.name: str(r.specifier) for r in map(Requirement, lines)}


def _fits(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def gpu() -> list[Finding]:
    """GPUs, driver, CUDA."""
    import torch

    driver = Path("/proc/driver/nvidia/version")
    told = f"torch is built for CUDA {torch.version.cuda}"
    if not has_gpu():
        if driver.exists():
            why = f"{driver.read_text().splitlines()[0]}, but torch finds no GPU ({told})"
            return [Finding("gpu", "failed", why, "nvidia-smi")]
        return [Finding("gpu", "skipped", f"no NVIDIA driver here: the CPU does the work; {told}")]
    if not torch.cuda.is_bf16_supported():
        why = "no bf16 in hardware: set bf16.enabled to false (float32)"
        return [Finding("gpu", "slow", f"{torch.cuda.get_device_name(0)}: {why}", required=False)]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    version = driver.read_text().splitlines()[0] if driver.exists() else "driver unknown"
    return [Finding("gpu", "ok", f"{len(names)} x {names[0]}; {version}; {told}")]
