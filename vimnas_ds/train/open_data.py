"""A run's data on all its ranks: one process of each machine checks it, the others trust that.

The first process of a machine builds the indexes that are not there and asks for every file's size
and time; the others wait for its verdict, then list the files and read the index themselves. With
several machines nothing is built: one would be done hours before the other.
"""

from __future__ import annotations

import os
from pathlib import Path

from vimnas_ds.config import DataSection
from vimnas_ds.data.bad import UnfitIndex
from vimnas_ds.data.index import check_indexed
from vimnas_ds.data.joint import JointData, open_datasets
from vimnas_ds.processes import spans_machines
from vimnas_ds.train.ranks import Ranks, run_together


def open_data(section: DataSection, ranks: Ranks, config: Path) -> JointData:
    """The data of `config`'s section, on all ranks or on none.

    Raises as `open_datasets`, and DataMissing if several machines lack an index; CannotStart where
    that happened on another rank.
    """
    gpu = ranks.device.type == "cuda"

    def check() -> JointData | None:
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            return None
        if not spans_machines(ranks.world_size):
            return open_datasets(section, gpu=gpu)
        check_indexed(section, config)
        try:
            return open_datasets(section, gpu=gpu)
        except UnfitIndex as error:
            raise UnfitIndex(
                f"{error}\n  Machines that have copies of their own of the data need indexes of "
                "their own: set vimnas.data.index_dir to a folder that they do not share"
            ) from error

    checked = run_together(check, ranks)
    return run_together(lambda: checked or open_datasets(section, check=False, gpu=gpu), ranks)
