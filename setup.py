"""vimnas_ds: weight-entangled ViT supernets for images and video, trained with DeepSpeed.

The ranges below are the ones the test suite has run with (lower bound: the oldest tried).
NVIDIA apex is not on PyPI (the package of that name is another project); see README, "GPU extras".
"""

from setuptools import find_packages, setup

setup(
    name="vimnas_ds",
    version="0.1.0",
    description="Weight-entangled ViT supernets for joint image-video training and search",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["vimnas_ds", "vimnas_ds.*"]),
    install_requires=[
        "torch>=2.14,<2.15",
        "torchvision>=0.29,<0.30",
        "deepspeed>=0.19.8,<0.20",
        "timm>=1.0.20,<1.1",
        "nvidia-dali-cuda130>=2.4,<2.5",
        "av>=18,<19",
        "einops>=0.8,<0.9",
        "tensorboard>=2.20,<3",
        "pydantic>=2.12,<3",
        "safetensors>=0.6,<1",
        "numpy>=2.2,<3",
        "pillow>=12,<14",
        "matplotlib>=3.10,<4",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "dev": ["pytest>=9,<10", "ruff==0.17.6", "mypy==2.4.1"],
        "gpu": ["flash-attn>=2.8,<3"],
    },
)
