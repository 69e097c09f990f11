"""How wide the terminal is."""

from __future__ import annotations

from rich.console import Console

NARROW = 70  # columns, below which tables and help are laid out one thing below the other


def is_narrow(console: Console) -> bool:
    """Whether the terminal is too narrow for columns of words side by side."""
    return console.width < NARROW
