"""What a user of the benchmarks and the tools can put right."""

from __future__ import annotations


class BenchmarkError(ValueError):
    """An option, an input file or a record is not what it should be; the message says what and how to put it right."""
