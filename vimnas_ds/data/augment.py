"""RandAugment inside DALI with every choice made outside of it.

DALI's own `rand_augment` draws operations and signs with its own generators, which cannot be
resumed at a given sample. Here the same suite and the same dispatch get the operation's number, the
magnitude bin and the sign of each sample as inputs (`sampling.SampleDraw`). A clip is one sample,
so all of its frames are treated alike.

    level 0..10 (timm's scale)  ->  bin = round(3 * level) of 31  ->  DALI's magnitude range
"""

from __future__ import annotations

import nvidia.dali.fn as fn
from nvidia.dali.auto_aug.augmentations import sharpness_kernel
from nvidia.dali.auto_aug.core import augmentation, select, signed_bin
from nvidia.dali.auto_aug.rand_augment import get_rand_augment_suite
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import do_not_convert

from vimnas_ds.data.sampling import NUM_BINS, NUM_OPS

#: What rotations, shears and translations uncover.
FILL = 128


@augmentation(
    mag_range=(0, 0.9), randomly_negate=True, mag_to_param=sharpness_kernel, param_device="auto"
)
def sharpness(data: DataNode, kernel: DataNode) -> DataNode:
    return fn.filter(data, kernel)


@augmentation
def equalize(data: DataNode, _: None) -> DataNode:
    return fn.equalize(data)


#: The operations by number: DALI's suite, two of them rewritten because it builds them from
#: operators whose names are deprecated (a warning each time, whatever the filters say).
_CURRENT = {"sharpness": sharpness, "equalize": equalize}
SUITE = [_CURRENT.get(op.name, op) for op in get_rand_augment_suite(use_shape=True)]
assert len(SUITE) == NUM_OPS
# AutoGraph is needed for the branches between operations only. Let into them, it interprets the
# tables of magnitudes step by step and building the graph takes seconds.
_BRANCHES = [do_not_convert(op) for op in SUITE]


def apply_operations(
    data: DataNode, ops: DataNode, bins: DataNode, signs: DataNode, count: int, size: int
) -> DataNode:
    """Applies `count` operations in a row; call it under `enable_conditionals`.

    Args:
        data: uint8 HWC images or FHWC clips of size x size pixels, on CPU or GPU.
        ops, bins, signs: int32 (count,) per sample, on the CPU: operation 0..13, bin 0..30, and 1
            for the negated magnitude.
    """
    for i in range(count):
        data = select(
            _BRANCHES,
            ops[i],
            data=data,
            magnitude_bin=signed_bin(bins[i], random_sign=signs[i]),
            num_magnitude_bins=NUM_BINS,
            shape=(size, size),
            fill_value=FILL,
            interp_type=None,
        )
    return data
