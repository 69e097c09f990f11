"""What is shown on the terminal while a run is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastvae.app.data.dataset import Dataset
from fastvae.app.run.config import TrainConfig, bound_name
from fastvae.app.run.folder import Epoch
from fastvae.app.run.training import Watchers


@contextmanager
def training_progress(
    console: Console, config: TrainConfig, dataset: Dataset, first_epoch: int, label: str
) -> Iterator[Watchers]:
    """Show a bar over all batches, with the last epoch's validation bound, the ELBO's two terms, and the time left.

    Where output does not go to a terminal there is no bar but a line after each fifth of the epochs.
    """
    batches = ceil(len(dataset.train) / config.batch_size)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[measures]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        begun = (first_epoch - 1) * batches
        task = progress.add_task(label, total=config.epochs * batches, completed=begun, measures="")

        def on_batch(epoch: int, index: int) -> None:
            description = f"{label} epoch {epoch}/{config.epochs}"
            progress.update(task, completed=(epoch - 1) * batches + index + 1, description=description)

        def on_epoch(line: Epoch) -> None:
            v = line["validation"]
            measures = f"ELBO {v['elbo']:.2f} = reconstruction {v['reconstruction']:.2f} - KL {v['kl']:.2f}"
            if config.bound != "elbo":
                measures = f"{bound_name(config)} {v['bound']:.2f}, {measures}"
            progress.update(task, measures=measures)
            if not console.is_terminal and line["epoch"] % max(1, config.epochs // 5) == 0:
                console.print(f"{label} epoch {line['epoch']}/{config.epochs}: {measures}", soft_wrap=True)

        yield Watchers(on_batch, on_epoch)


@contextmanager
def counting_progress(console: Console, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar over `total` images; gives a function to be told how many have been done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def interruptible(console: Console, advice: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C into `advice` on the terminal and exit code 130, as shells have it."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"\nStopped. {advice()}", style="yellow", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(130) from None
