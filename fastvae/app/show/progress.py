"""What is shown on the terminal while a run is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from time import monotonic

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastvae.app.data.dataset import Dataset
from fastvae.app.run.checkpoint import Epoch
from fastvae.app.run.config import TrainConfig, bound_name
from fastvae.app.run.training import Watchers
from fastvae.app.show.width import is_narrow

SECONDS = 60.0  # between lines where output does not go to a terminal
BESIDE = 40  # columns for epoch, bar and time beside the measures


@contextmanager
def training_progress(
    console: Console, config: TrainConfig, dataset: Dataset, first_epoch: int, label: str
) -> Iterator[Watchers]:
    """Show a bar over all batches, with the last epoch's validation bound, the ELBO's two terms, and the time left.

    A narrow terminal gets two short lines in place of the bar. Where output does not go to a terminal there is a
    line after each fifth of the epochs, and at least one in a minute of epochs.
    """
    batches = ceil(len(dataset.train) / config.batch_size)
    wide = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[measures]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    narrow = (TextColumn("{task.description}\n{task.fields[measures]}"), TimeRemainingColumn())
    with _progress(console, wide, narrow) as progress:
        begun = (first_epoch - 1) * batches
        task = progress.add_task(label, total=config.epochs * batches, completed=begun, measures="")
        due = _due()

        def on_batch(epoch: int, index: int) -> None:
            description = f"{label} epoch {epoch}/{config.epochs}"
            progress.update(task, completed=(epoch - 1) * batches + index + 1, description=description)

        def on_epoch(line: Epoch) -> None:
            told = _measures(config, line)
            fits = len(label) + len(told) + BESIDE <= console.width
            progress.update(task, measures=told if fits else _in_short(config, line))
            if not console.is_terminal and (due() or line["epoch"] % max(1, config.epochs // 5) == 0):
                console.print(f"{label} epoch {line['epoch']}/{config.epochs}: {told}", soft_wrap=True)

        yield Watchers(on_batch, on_epoch)


@contextmanager
def counting_progress(
    console: Console, label: str, total: int, unit: str = "images"
) -> Iterator[Callable[[int], None]]:
    """Show a bar over `total` images; gives a function to be told how many have been done.

    Where output does not go to a terminal there is a line each minute.
    """
    wide = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    narrow = (TextColumn("{task.description}\n{task.completed}/{task.total} " + unit), TimeRemainingColumn())
    with _progress(console, wide, narrow) as progress:
        task, due = progress.add_task(label, total=total), _due()

        def on_done(done: int) -> None:
            progress.update(task, completed=done)
            if not console.is_terminal and due():
                console.print(f"{label}: {done:,} of {total:,} {unit}", soft_wrap=True, markup=False, highlight=False)

        yield on_done


def _progress(console: Console, wide: tuple[ProgressColumn, ...], narrow: tuple[ProgressColumn, ...]) -> Progress:
    columns = narrow if is_narrow(console) else wide
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _due() -> Callable[[], bool]:
    """A function that says, once in `SECONDS`, that it is time for a line."""
    last = monotonic()

    def due() -> bool:
        nonlocal last
        if monotonic() - last < SECONDS:
            return False
        last = monotonic()
        return True

    return due


def _measures(config: TrainConfig, line: Epoch) -> str:
    v = line["validation"]
    elbo = f"ELBO {v['elbo']:.2f} = reconstruction {v['reconstruction']:.2f} - KL {v['kl']:.2f}"
    return elbo if config.bound == "elbo" else f"{bound_name(config)} {v['bound']:.2f}, {elbo}"


def _in_short(config: TrainConfig, line: Epoch) -> str:
    v = line["validation"]
    return f"{config.bound.upper()} {v['bound']:.2f}, KL {v['kl']:.2f}"
