"""The table that `fastvae plan` prints."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastvae.app.planning.cost import LAYOUTS, Rates, Work, cost, efficiency, mesh_of


def plan_table(work: Work, rates: Rates) -> Table:
    """The cost of each layout; on one device they are the same."""
    layouts = LAYOUTS if work.devices > 1 else LAYOUTS[:1]
    columns = [(cost(work, rates, layout), efficiency(work, rates, layout)) for layout in layouts]
    table = Table(box=SIMPLE_HEAD, header_style="bold")
    table.add_column("a device; sharded:" if work.devices > 1 else "")
    for layout in layouts:
        R, C = mesh_of(work, layout)
        heading = f"mesh {R} x {C}" if layout == "mesh" else layout
        table.add_column(heading if work.devices > 1 else "", justify="right")
    table.add_row("rows", *(f"{c.rows:,}" for c, _ in columns))
    table.add_row("components", *(f"{c.components:,}" for c, _ in columns))
    table.add_row("computing", *(duration(c.compute_seconds) for c, _ in columns))
    table.add_row("memory for blocks", *(size(c.memory) for c, _ in columns))
    table.add_row("read from files", *(size(c.bytes_read) for c, _ in columns))
    table.add_row("  at least at", *(f"{size(round(c.bytes_read / c.compute_seconds))}/s" for c, _ in columns))
    if work.devices > 1:
        table.add_row("received", *(size(c.bytes_received) for c, _ in columns))
        unknown = [c.bytes_received > 0 and c.network_seconds is None for c, _ in columns]
        for label, values in (
            ("  which takes", [duration(c.network_seconds or 0.0) for c, _ in columns]),
            ("in all", [duration(c.seconds) for c, _ in columns]),
            ("use of devices", [f"{share:.0%}" for _, share in columns]),
        ):
            table.add_row(label, *("not known" if u else v for u, v in zip(unknown, values, strict=True)))
    return table


def duration(seconds: float) -> str:
    """Two or three digits, in the unit that fits."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * length or (unit == "s" and seconds >= 1):
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 or not seconds else f"{seconds * 1e6:.3g} us"


def size(count: int) -> str:
    """Bytes, with three digits."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:.3g} {unit}"
    return f"{count} B"
