"""The tables that commands end with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastvae.app.run.comparison import Row, mean_and_spread

if TYPE_CHECKING:
    from fastvae.app.run.evaluation import Evaluation
    from fastvae.app.run.gap import Gap
    from fastvae.app.run.protocol import Protocol
    from fastvae.app.run.reproduction import Reproduction


def images_in_words(count: int, split: str) -> str:
    """So many images of a set."""
    return f"{count} {split} image{'' if count == 1 else 's'}"


def evaluation_table(result: Evaluation, title: str, z: str = "z") -> Table:
    """What an evaluation measured on its images; "-" where one image does not tell.  z: the latents with the prior."""
    table = Table(title=title)
    table.add_column("nats per image, mean")
    table.add_column(justify="right")
    error = "-" if result.standard_error is None else f"{result.standard_error:.2f}"
    active = "-" if result.active_units is None else str(result.active_units)
    table.add_row(f"log-likelihood ({result.importance_samples} importance samples)", f"{result.log_likelihood:.2f}")
    table.add_row("its standard error over images", error)
    table.add_row("ELBO", f"{result.elbo:.2f}")
    table.add_row("reconstruction term", f"{result.reconstruction:.2f}")
    table.add_row("KL term", f"{result.kl:.2f}")
    table.add_row("active units" if z == "z" else f"active units of {z}", f"{active} of {result.latent}")
    return table


def gap_table(gap: Gap, z: str = "z") -> Table:
    """How far the prior of the latents z is from the aggregated posterior; "+-" is the standard error over draws."""
    table = Table(title=f"prior p({z}) and aggregated posterior q({z}) of {gap['images']} training images")
    table.add_column(f"nats, mean of {gap['draws']} draws +- its standard error")
    table.add_column(justify="right")
    each = gap["dimension_wise_kl"]
    largest = max(range(len(each)), key=lambda d: each[d]["value"])
    rows = {
        f"I(x; {z}), at most log {gap['images']} = {math.log(gap['images']):.2f}": gap["mutual_information"],
        f"KL(q({z}) || p({z})), lost to the prior": gap["marginal_kl"],
        f"total correlation of q({z})": gap["total_correlation"],
        f"largest KL of one dimension, {z}[{largest}]": each[largest],
    }
    for name, measured in rows.items():
        table.add_row(name, f"{measured['value']:.3f} +- {measured['standard_error']:.3f}")
    table.add_row("sum of the dimensions' KL", f"{sum(one['value'] for one in each):.3f}")
    return table


def protocols_table(protocols: Sequence[Protocol], *, narrow: bool) -> Table:
    """What can be reproduced, with the first published figure of each; on a narrow terminal one below the other."""
    table = Table(title="What `fastvae reproduce NAME` trains and measures", box=SIMPLE_HEAD, pad_edge=False)
    if narrow:
        table.add_column("name, what it is, and the published figure in nats")
    else:
        table.add_column("name", no_wrap=True)
        table.add_column("what it is")
        table.add_column("published, nats", justify="right")
    for protocol in protocols:
        figure = f"{protocol.published[0].log_likelihood:.2f}" if protocol.published else "-"
        cells = protocol.name, protocol.title, figure
        table.add_row(*(["\n".join(cells)] if narrow else cells), end_section=narrow)
    return table


def reproduction_table(reproduction: Reproduction) -> Table:
    """A run's test log-likelihood beside the published ones."""
    found = reproduction.evaluation["log_likelihood"]
    error = reproduction.evaluation["standard_error"]
    images = reproduction.evaluation["images"]
    state = f"{reproduction.epochs} epochs, the best of them {reproduction.best_epoch}; {images:,} test images"
    if not reproduction.finished:
        state += "; not finished"
    table = Table(title=reproduction.protocol["title"], box=SIMPLE_HEAD, pad_edge=False, caption=state)
    table.add_column("test log-likelihood, nats per image")
    table.add_column("", justify="right")
    table.add_column("this run is better by", justify="right")
    table.add_row(f"this run, seed {reproduction.seed}", f"{found:.2f} +- {error:.2f}", "")
    for figure in reproduction.protocol["published"]:
        value = figure["log_likelihood"]
        table.add_row(figure["source"], f"{value:.2f}", f"{found - value:+.2f}")
    return table


def comparison_tables(rows: Sequence[Row], title: str, *, narrow: bool) -> list[Table]:
    """What each prior reached, in one table, or on a narrow terminal in one for each prior."""
    headings = ("prior", "log-likelihood", "ELBO", "KL", "active units", "seconds per epoch")
    seeds = len(rows[0].log_likelihood)
    caption = f"+- is the standard deviation over {seeds} seeds" if seeds > 1 else None
    lines = [
        (
            row.prior,
            mean_and_spread(row.log_likelihood),
            mean_and_spread(row.elbo),
            mean_and_spread(row.kl),
            "-" if None in row.active_units else f"{fmean(u for u in row.active_units if u is not None):.1f}",
            f"{fmean(row.seconds_per_epoch):.3f}",
        )
        for row in rows
    ]
    if narrow:
        tables = []
        for line in lines:
            table = Table(*("", ""), show_header=False, box=SIMPLE_HEAD, title=title, caption=caption)
            for heading, value in zip(headings, line, strict=True):
                table.add_row(heading, value)
            tables.append(table)
        return tables
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=caption)
    for heading in headings[:4]:
        table.add_column(heading, justify="left" if heading == "prior" else "right", no_wrap=True)
    for heading in headings[4:]:
        # The headings break over lines, so that all fits 80 columns.
        table.add_column(heading, justify="right", max_width=8)
    for line in lines:
        table.add_row(*line)
    return [table]
