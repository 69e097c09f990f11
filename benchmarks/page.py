"""A record as a Markdown page: the targets, then everyone in every case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastvae._files import whole_file

from . import formatting
from .cpu_targets import target_table
from .ratios import Result, copy_fraction, rate_fraction, seconds
from .record import Record


def write_page(record: Record, folder: Path, figures: Sequence[Path] = ()) -> Path:
    """Write DEVICE.md into a folder, with the figures that are there; its path."""
    page = folder / f"{record.path.stem}.md"
    with whole_file(page) as file:
        file.write(markdown(record, [figure.name for figure in figures]).encode())
    return page


def markdown(record: Record, figures: Sequence[str] = ()) -> str:
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
    for name in figures:
        lines += [f"![{name}]({name})", ""]
    return "\n".join(lines)


def contender_table(result: Result) -> str:
    """Everyone in a case."""
    ours = seconds(result)
    rows = []
    for name, entry in result["contenders"].items():
        if entry["status"] != "measured":
            rows.append([name, entry["status"], "", "", "", entry["why"]])
            continue
        time, errors = entry["seconds"], entry["errors"]
        quartiles = f"{formatting.duration(time['low'])} ... {formatting.duration(time['high'])}"
        gradients = [value for name, value in errors.items() if name not in ("log_prob", "log_q", "kl")]
        rows.append(
            [
                name,
                f"{formatting.duration(time['median'])} ({quartiles}, {time['rounds']} rounds)",
                formatting.ratio(time["median"] / ours) if ours else formatting.NOTHING,
                formatting.size(entry["extra_bytes"]),
                formatting.error(next(iter(errors.values()), None)),
                formatting.error(max(gradients)) if gradients else formatting.NOTHING,
            ]
        )
    return formatting.markdown(["", "time", "x", "memory", "error", "error of gradients, relative"], rows)


def _limits(result: Result) -> list[str]:
    parts = []
    if (fraction := rate_fraction(result)) is not None:
        parts.append(f"{formatting.percent(fraction)} of the multiply-add rate probed in the same rounds")
    if (fraction := copy_fraction(result)) is not None:
        parts.append(f"{formatting.percent(fraction)} of the copy bandwidth probed in the same rounds")
    if (live := result.get("live_pairs")) is not None:
        parts.append(f"{live:.2%} of the pairs have a responsibility above 2^-24 / K")
    return [f"fastvae: {'; '.join(parts)}.", ""] if parts else []
