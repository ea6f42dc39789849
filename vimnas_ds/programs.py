"""One head of a sub-network as a program that runs without this package.

    torch_export/NAME.pt2   torch.export.load(file).module()(pixels) -> logits; torch alone
    onnx/NAME.onnx          input "pixels", output "logits"; onnxruntime and its like

pixels are (B, 3, H, W) or (B, 3, T, H, W) as preprocess.json says, B any number. Each writer loads
its file back and returns it as a function, so that what lies on the disk can be checked.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vimnas_ds.export import ExportError
from vimnas_ds.model.subnet import SubNetwork

#: pixels (B, 3, ...) -> logits (B, classes)
Run = Callable[[Tensor], Tensor]
#: What torch.onnx needs, and what the result is checked with.
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class CannotExpress(ExportError):
    """A format that cannot hold this network, or not here; the message says why."""


@dataclass(frozen=True)
class Head:
    """The head of `dataset`, for inputs (B, 3, *shape)."""

    net: SubNetwork
    dataset: str
    shape: tuple[int, ...]

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """Traced for any batch size."""
        one = self.net.only(self.dataset, self.shape).eval().requires_grad_(False)
        example = torch.zeros(2, 3, *self.shape)
        program = torch.export.export(one, (example,), dynamic_shapes={"pixels": {0: _BATCH}})
        program.example_inputs = None  # two clips would be saved too: 77 MB at 64 x 224 x 224
        return program


_BATCH = torch.export.Dim("batch")


def write_torch_export(head: Head, folder: Path) -> Run:
    """torch_export/NAME.pt2"""
    file = place(folder, "torch_export", f"{head.dataset}.pt2")
    torch.export.save(head.program, file)
    run: Run = torch.export.load(file).module()
    return run


def write_onnx(head: Head, folder: Path) -> Run:
    """onnx/NAME.onnx, weights within. Raises CannotExpress where a package is missing or the
    exporter gives up."""
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotExpress(f"pip install {' '.join(missing)} first")
    import onnxruntime

    file = place(folder, "onnx", f"{head.dataset}.onnx")
    try:
        torch.onnx.export(
            head.program,
            (),
            file,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes={"pixels": {0: _BATCH}},
            external_data=False,
            verbose=False,
        )
    except (torch.onnx.OnnxExporterError, ValueError) as err:
        raise CannotExpress(f"torch.onnx cannot: {err}") from err
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])

    return run


def place(folder: Path, kind: str, name: str) -> Path:
    """The file `folder`/`kind`/`name`; its folder is made."""
    (folder / kind).mkdir(parents=True, exist_ok=True)
    return folder / kind / name
