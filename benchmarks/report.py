"""A record as a Markdown page with plots.

`python -m benchmarks.report FILE` makes them again from a record that is there.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvae.app.data.whole_file import whole_file
from fastvae.app.user_errors import AppError

from . import plots, words
from .ratios import (
    OURS,
    Result,
    best_peer,
    copy_fraction,
    rate_fraction,
    seconds,
    times_faster,
)
from .record import Record, read_record
from .targets import NOT_MEASURED, Target, judge


def write(record: Record, folder: Path) -> list[Path]:
    """Write DEVICE.md and the plots that the record has points for; their paths."""
    stem = record.path.stem
    pictures = plots.draw(record, folder)
    page = folder / f"{stem}.md"
    with whole_file(page) as file:
        file.write(markdown(record, [path.name for path in pictures]).encode())
    return [page, *pictures]


def markdown(record: Record, pictures: list[str]) -> str:
    """The whole page."""
    content = record.content
    machine, code = content["machine"], content["code"]
    commit = f"commit {code['commit'][:12]}" if code["commit"] else f"no checkout, digest {code['digest']}"
    lines = [
        f"# fastvae's benchmark on {content['device']}",
        "",
        f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['vector']}; {', '.join(f'{name} {version}' for name, version in content['versions'].items())}; "
        f"{commit}{', with uncommitted changes' if code['dirty'] else ''}; {content['started']}.",
        "",
        "Times are medians of runs in turn, with their quartiles; x is the time as a multiple of fastvae's. Memory is "
        "the peak beyond what was there before the call. The error is that of log p in nats against float64.",
        "",
        "## Targets",
        "",
        target_table(record.cases),
        "",
    ]
    for key, result in record.cases.items():
        if "series" not in result:
            lines += [f"## {key}", "", *_limits(result), contender_table(result), ""]
    for name in pictures:
        lines += [f"![{name}]({name})", ""]
    return "\n".join(lines)


def target_table(cases: Mapping[str, Result], alone: Mapping[str, Result] | None = None) -> str:
    """Every target, what was measured, and whether it is met; beside it what `alone` shows."""
    rows = []
    for judged, beside in zip(judge(cases), judge(alone or {}), strict=True):
        target = judged.target
        row = [target.work, target.against, _written(target, [target.at_least])]
        row += [_written(target, judged.measured), judged.verdict]
        rows.append(row if alone is None else [*row, _written(target, beside.measured)])
    headings = ["work", "against", "at least", "measured", ""]
    return words.markdown(headings if alone is None else [*headings, "alone"], rows, left=2)


def _written(target: Target, values: Sequence[float | None]) -> str:
    if all(value is None for value in values):
        return words.NOTHING
    return ", ".join(map(words.percent if "fraction" in target.against else words.ratio, values))


def contender_table(result: Result) -> str:
    """Everyone in a case."""
    ours = seconds(result)
    rows = []
    for name, entry in result["contenders"].items():
        if entry["status"] != "measured":
            rows.append([name, entry["status"], "", "", "", entry["why"]])
            continue
        time, errors = entry["seconds"], entry["errors"]
        quartiles = f"{words.duration(time['low'])} ... {words.duration(time['high'])}"
        gradients = [value for name, value in errors.items() if name not in ("log_prob", "log_q", "kl")]
        rows.append(
            [
                name,
                f"{words.duration(time['median'])} ({quartiles}, {time['rounds']} rounds)",
                words.ratio(time["median"] / ours) if ours else words.NOTHING,
                words.size(entry["extra_bytes"]),
                words.error(next(iter(errors.values()), None)),
                words.error(max(gradients)) if gradients else words.NOTHING,
            ]
        )
    return words.markdown(["", "time", "x", "memory", "error", "error of gradients, relative"], rows)


def _limits(result: Result) -> list[str]:
    parts = []
    if (fraction := rate_fraction(result)) is not None:
        parts.append(f"{words.percent(fraction)} of the multiply-add rate probed in the same rounds")
    if (fraction := copy_fraction(result)) is not None:
        parts.append(f"{words.percent(fraction)} of the copy bandwidth probed in the same rounds")
    if (live := result.get("live_pairs")) is not None:
        parts.append(f"{live:.2%} of the pairs have a responsibility above 2^-24 / K")
    return [f"fastvae: {'; '.join(parts)}.", ""] if parts else []


def headline(result: Result) -> str:
    """A case in a line, for the terminal."""
    ours, peer = seconds(result), best_peer(result)
    if ours is None:
        return f"{OURS} was not measured"
    text = f"{OURS} {words.duration(ours)}"
    if peer:
        text += f", {words.ratio(times_faster(result, peer))} as fast as the best peer, {peer}"
    if (fraction := rate_fraction(result)) is not None:
        text += f", {words.percent(fraction)} of the multiply-add rate"
    if (fraction := copy_fraction(result)) is not None:
        text += f", {words.percent(fraction)} of the copy bandwidth"
    return text


def summary(record: Record) -> str:
    """The targets that the record says something about, one a line."""
    lines = [
        f"{judged.verdict:>8}: {judged.target.work}: {', '.join(map(words.ratio, judged.measured))} against "
        f"{judged.target.against}, at least {words.ratio(judged.target.at_least)}"
        for judged in judge(record.cases)
        if judged.verdict != NOT_MEASURED
    ]
    return "\n".join(lines) if lines else "No target of docs/benchmarking.md is among what was measured."


def main(arguments: list[str]) -> Any:
    """Make the page and the plots of each record named."""
    if not arguments:
        return "usage: python -m benchmarks.report FILE..."
    try:
        for name in arguments:
            for path in write(read_record(Path(name)), Path(name).parent):
                print(path)
    except AppError as error:
        return f"error: {error}"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
