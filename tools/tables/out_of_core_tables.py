"""Tables of what is larger than memory: streaming beside the call in memory, a large job, the plan and its check."""

from __future__ import annotations

from fastvae.app.planning.cost import Work, all_rates, cost
from fastvae.benchmarks import formatting

from ..experiments import plan_check, ranks_check, scaling
from .registry import Results, table


@table("out-of-core", "out-of-core.json")
def beside(results: Results) -> str:
    """Streaming from files beside the call in memory."""
    found = results.read("out-of-core.json")["beside"]
    rows = [
        [
            f"{row['memory'] >> 20} MiB",
            f"{row['block_rows']:,} x {row['block_components']:,}",
            f"{row['bytes_read'] / row['input_bytes']:.2f} x",
            f"{row['ratio']:.2f}",
            f"{row['cpu_ratio']:.2f}",
            formatting.error(row["largest_difference"]),
        ]
        for row in found
    ]
    one = found[0]
    job = f"{one['M']:,} x {one['K']:,}, D = {one['D']}"
    headings = [
        f"memory ({job})",
        "blocks",
        "bytes read / files",
        "time",
        "of the processor",
        "largest difference, nats",
    ]
    return formatting.markdown(headings, rows)


@table("out-of-core-large", "out-of-core.json")
def large(results: Results) -> str:
    """The large job: its time, beside what `fastvae plan` says of a core of the CPU's record, and its memory."""
    found = results.read("out-of-core.json")["large"]
    planned = cost(Work(found["M"], found["K"], found["D"]), all_rates()["cpu"], "rows")
    first, second = found["peak_bytes_of_each_half"]
    row = [
        f"{found['M']:,} x {found['K']:,}, D = {found['D']}",
        formatting.size(found["input_bytes"]),
        formatting.size(found["bytes_read"]),
        f"{planned.compute_seconds / 60:.1f} min",
        f"{found['cpu_seconds'] / 60:.0f} min",
        f"{found['seconds'] / 60:.0f} min",
        f"{formatting.size(first)}, {formatting.size(second)}",
    ]
    headings = [
        "job",
        "files",
        "bytes read",
        "planned",
        "processor",
        "by the clock",
        "peak of memory, first and second half",
    ]
    return formatting.markdown(headings, [row])


@table("plan-check", "plan.json")
def checked(results: Results) -> str:
    """What the plan says beside what jobs took."""
    return plan_check.markdown(results.read("plan.json"))


@table("ranks", "ranks.json")
def by_two(results: Results) -> str:
    """What two processes take and receive beside the plan, and beside the kernels alone."""
    return ranks_check.markdown(results.read("ranks.json"))


@table("scaling", "scaling.json")
def exchanged(results: Results) -> str:
    """What ranks in one process exchange."""
    return scaling.markdown(results.read("scaling.json"))
