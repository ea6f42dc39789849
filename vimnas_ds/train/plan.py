"""The batches that a run will ask for, in order: what the data pipeline makes ahead."""

from __future__ import annotations

from collections.abc import Iterator

from vimnas_ds.data.ahead import Wanted
from vimnas_ds.train.schedule import DataCursor, Drawer


def coming_batches(drawer: Drawer, alpha_every: int | None) -> Iterator[Wanted]:
    """From the drawer's present position to the last step; the drawer itself does not move.

    Args:
        alpha_every: steps between alpha batches (see `Trainer.train_step`); None: there are none.
    """
    position = DataCursor.from_state(drawer.position.state_dict())
    ahead = Drawer(drawer.schedule, drawer.space, drawer.is_image, drawer.seed, position)
    while position.step < drawer.schedule.total_steps:
        context = ahead.draw()
        yield Wanted(context.dataset, "train", context.batch_index)
        ahead.advance(context)
        if alpha_every and context.step % alpha_every == 0:
            number = ahead.next_alpha_batch(context.dataset)
            yield Wanted(context.dataset, "alpha", number)
