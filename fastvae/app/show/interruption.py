"""What Ctrl-C says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console


@contextmanager
def interruptible(console: Console, advice: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C into `advice` on the terminal and exit code 130, as shells have it."""
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"\nStopped. {advice()}", style="yellow", soft_wrap=True, markup=False, highlight=False)
        raise typer.Exit(130) from None
