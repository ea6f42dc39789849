"""How the C++/CUDA extension `vimnas_ds._C` is built; used by setup.py alone.

With CUDA when a toolkit is found, whether or not there is a GPU; VIMNAS_CPU_ONLY=1 leaves it out.
Default architectures 8.0 and 9.0 (TORCH_CUDA_ARCH_LIST). A failed build is an error.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any


def toolkit() -> Path | None:
    """A directory with bin/nvcc and the runtime's headers (a wrapper in the PATH is not one)."""
    nvcc = shutil.which("nvcc")
    found = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found += [str(Path(nvcc).resolve().parent.parent) if nvcc else None, "/usr/local/cuda"]
    for root in (Path(place) for place in found if place):
        if (root / "bin/nvcc").exists() and (root / "include/cuda_runtime.h").exists():
            return root
    return None


def wheel_folders(kind: str) -> list[Path]:
    """include/ or lib/ of the nvidia wheels that come with torch: cuBLAS is there."""
    spec = importlib.util.find_spec("nvidia")
    bases = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return [folder for base in bases for folder in sorted(base.glob(f"*/{kind}"))]


def extension() -> tuple[list[Any], dict[str, Any]]:
    """(ext_modules, cmdclass) for setup(). Ends the build in words when torch is not there."""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "vimnas_ds is built against the torch it will run with: install torch first, then "
            "`pip install --no-build-isolation .`"
        )
    import torch

    wanted = torch.version.cuda is not None and os.environ.get("VIMNAS_CPU_ONLY") != "1"
    root = toolkit() if wanted else None
    if root:
        os.environ["CUDA_HOME"] = str(root)  # before cpp_extension looks for it
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    flags = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math"]
    # at::parallel_for is a plain loop without it (PyTorch's macOS wheels have none to link with)
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    flags += openmp
    names = ("schemas", "sliced_linear", "gemm", "rows", "gates", "adamw")
    sources = [f"csrc/{name}.cpp" for name in names]
    if root is None:
        built = CppExtension(
            "vimnas_ds._C",
            sources,
            extra_compile_args={"cxx": flags},
            extra_link_args=openmp,
        )
    else:
        headers = [d for d in wheel_folders("include") if (d / "cublasLt.h").exists()][:1]
        libraries = [d for d in wheel_folders("lib") if list(d.glob("libcublasLt.so*"))][:1]
        link = [f"-L{d}" for d in libraries]
        link += [f"-l:{sorted(d.glob('libcublasLt.so*'))[0].name}" for d in libraries] or [
            "-lcublasLt"
        ]
        system = [f"-isystem{d}" for d in headers]
        built = CUDAExtension(
            "vimnas_ds._C",
            [*sources, "csrc/cuda/ops_cuda.cpp", "csrc/cuda/kernels.cu"],
            extra_compile_args={
                "cxx": [*flags, "-DVIMNAS_WITH_CUDA", *system],
                "nvcc": ["-O3", "-std=c++20", "-lineinfo", "--threads=2"],
            },
            extra_link_args=[*link, *openmp],
        )
    return [built], {"build_ext": BuildExtension.with_options(use_ninja=True)}
