"""What GPUs are sold as: published figures of NVIDIA's data sheets, nothing measured.

Peaks are for bf16 tensor cores without sparsity, links are one direction of NVLink (the sheets give
both directions together). Memory is the number on the sheet, in units of 1e9 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`peak` FLOP/s, `memory` bytes, `bandwidth` bytes/s of that memory, `link` bytes/s a direction
    to the other GPUs of the node."""

    name: str
    peak: float
    memory: float
    bandwidth: float
    link: float
    source: str


GPUS = {
    "a100-40": Gpu("A100 SXM4 40 GB", 312e12, 40e9, 1555e9, 300e9, "A100 data sheet"),
    "a100-80": Gpu("A100 SXM4 80 GB", 312e12, 80e9, 2039e9, 300e9, "A100 data sheet"),
    "h100-80": Gpu("H100 SXM5 80 GB", 989e12, 80e9, 3350e9, 450e9, "H100 data sheet"),
    "h200": Gpu("H200 SXM 141 GB", 989e12, 141e9, 4800e9, 450e9, "H200 data sheet"),
}
