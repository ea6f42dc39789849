"""vimnas_ds: weight-entangled ViT supernets for images and video, trained with DeepSpeed.

The lower bounds are the versions that the test suite has run with, the upper ones the next release
that may break an interface. NVIDIA apex is not on PyPI (the package of that name is another
project); see README, "GPU extras".
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))
from csrc_build import extension

ext_modules, cmdclass = extension()

setup(
    name="vimnas_ds",
    version="0.1.0",
    description="Weight-entangled ViT supernets for joint image-video training and search",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["vimnas_ds", "vimnas_ds.*"]),
    package_data={"vimnas_ds.page": ["*.css", "*.js"]},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    install_requires=[
        "torch>=2.14.1,<2.15",
        "torchvision>=0.29.1,<0.30",
        "deepspeed>=0.19.8,<0.20",
        "timm>=1.0.31,<1.1",
        "nvidia-dali-cuda130>=2.4,<2.5",
        "av>=18.1,<19",
        "einops>=0.8.2,<0.9",
        "tensorboard>=2.21,<3",
        "pydantic>=2.14,<3",
        "safetensors>=0.8,<1",
        "numpy>=2.4.6,<3",
        "pillow>=13,<14",
        "matplotlib>=3.11.2,<4",
        "tqdm>=4.66,<5",
        "pyarrow>=26,<27",
        "psutil>=7.2,<8",
        "onnx>=1.23.2,<2",
        "onnxscript>=0.7.2,<0.8",
        "onnxruntime>=1.32,<2",
    ],
    extras_require={
        "dev": ["pytest>=9.2,<10", "ruff==0.17.6", "mypy==2.4.1"],
        "gpu": ["flash-attn>=2.8,<3"],
    },
)
