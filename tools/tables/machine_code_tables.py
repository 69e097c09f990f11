"""Tables of the GPU kernels' machine code, from the records of `python -m tools.static_report --record`."""

from __future__ import annotations

from ..static_report.report_tables import TABLES, MachineCodeTable
from .registry import Results, table


def _register(name: str, shown: MachineCodeTable) -> None:
    source = f"{shown.family}-static.json"

    @table(name, source)
    def make(results: Results) -> str:
        return shown(results.read(source)["kernels"])


for _name, _shown in TABLES.items():
    _register(_name, _shown)
