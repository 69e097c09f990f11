"""Tables of EM beside scikit-learn's, and of the memory it takes."""

from __future__ import annotations

from fastvae.benchmarks import formatting

from .registry import Results, table


@table("em-speed", "em.json")
def em_speed(results: Results) -> str:
    """Seconds of the same iterations, and the errors of the means."""
    found = results.read("em.json")
    rows = [
        [
            f"{row['N']:,} points, K = {row['K']}, D = {row['D']}, {row['dtype']}",
            str(found["threads"]),
            *(f"{row['seconds'][name]['median'] / row['iterations']:.2f} s" for name in ("scikit-learn", "fastvae")),
            formatting.ratio(row["faster"]),
            formatting.ratio(row["faster_by_cpu_time"]),
            *(f"{row['largest_error_of_means'][name]:.0e}" for name in ("scikit-learn", "fastvae")),
        ]
        for row in found["speed"]
    ]
    headings = [
        "an iteration",
        "threads",
        "scikit-learn",
        "fastvae",
        "faster",
        "by CPU time",
        "scikit-learn's error",
        "fastvae's error",
    ]
    return formatting.markdown(headings, rows)


@table("em-memory", "em.json")
def em_memory(results: Results) -> str:
    """The peak beside the rows, and what a table of responsibilities would take."""
    row = results.read("em.json")["memory"]
    sizes = (row["rows_bytes"], row["peak_beyond_rows_bytes"], row["responsibilities_bytes"])
    headings = ["", "the points", "peak beyond them", "a table of points and components would be"]
    work = f"{row['N']:,} points, K = {row['K']:,}, D = {row['D']}, float32"
    return formatting.markdown(headings, [[work, *(f"{size / 1e9:.2f} GB" for size in sizes)]])
