"""The loss of one step: mixup and CutMix per dataset (timm's), soft or smoothed targets; in-place
distillation for the smaller sub-networks of a sandwich.

timm mixes 4-D batches and draws from numpy's global generator. Clips are folded to 4-D, frames
into channels, so that CutMix cuts height and width and a clip is cut alike in all its frames; the
generator is seeded for each (seed, step, rank), so a resumed run mixes alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from vimnas_ds.config import DatasetSection
from vimnas_ds.seeds import derive_seed


class Objective:
    """One dataset's mixing and loss; `mix` then `loss`."""

    def __init__(self, section: DatasetSection):
        self._mixup = None
        self._loss: nn.Module
        if section.mixup > 0 or section.cutmix > 0:
            self._mixup = Mixup(
                mixup_alpha=section.mixup,
                cutmix_alpha=section.cutmix,
                label_smoothing=section.label_smoothing,
                num_classes=section.num_classes,
            )
            self._loss = SoftTargetCrossEntropy()
        elif section.label_smoothing > 0:
            self._loss = LabelSmoothingCrossEntropy(section.label_smoothing)
        else:
            self._loss = nn.CrossEntropyLoss()

    def mix(self, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) or (B, 3, T, H, W), y (B,) -> mixed x (in place), y or (B, classes)."""
        if self._mixup is None:
            return x, y
        np.random.seed(derive_seed("mixup", seed) % 2**32)  # noqa: NPY002 (timm's own generator)
        shape = x.shape
        mixed, targets = self._mixup(x.flatten(1, -3), y)
        return mixed.view(shape), targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over the batch, in float32."""
        return self._loss(logits.float(), targets)

    def sandwich_losses(self, logits: Sequence[Tensor], targets: Tensor, distill: bool) -> Tensor:
        """(S,): the first sub-network's loss on the targets, and of each other one its loss on the
        first's predictions or, without `distill`, on the targets."""
        first, *others = logits
        rest = [distillation_loss(o, first) if distill else self.loss(o, targets) for o in others]
        return torch.stack([self.loss(first, targets), *rest])


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean cross-entropy (B, classes) against the teacher's softmax, in float32 (US-Nets). The
    teacher's logits are constants."""
    return F.cross_entropy(logits.float(), teacher.detach().float().softmax(-1))


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of samples whose highest logit is their label (a 0-d tensor)."""
    return (logits.detach().argmax(-1) == labels).sum()
