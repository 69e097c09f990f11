"""A run's history for TensorBoard, written as training goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastvae.app.run.checkpoint import Epoch
from fastvae.app.run.training import Watchers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@contextmanager
def tensorboard_events(folder: Path, watchers: Watchers, first_epoch: int) -> Iterator[Watchers]:
    """The watchers, and with them one that writes each epoch's line of the history into `folder`, at once.

    Nothing is written before the first epoch is finished.  A run that goes on takes the place of what was written after
    its checkpoint.
    """
    writer: SummaryWriter | None = None

    def on_epoch(line: Epoch) -> None:
        nonlocal writer
        if writer is None:
            writer = _writer(folder, first_epoch)
        for part, measures in (("train", line["train"]), ("validation", line["validation"])):
            for name, value in measures.items():
                writer.add_scalar(f"{part}/{name}", value, line["epoch"])
        writer.add_scalar("beta", line["beta"], line["epoch"])
        writer.add_scalar("seconds", line["seconds"], line["epoch"])
        writer.flush()
        watchers.epoch(line)

    try:
        yield Watchers(watchers.batch, on_epoch)
    finally:
        if writer is not None:
            writer.close()


def _writer(folder: Path, first_epoch: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_epoch)
