"""Tables of the kernels' machine code, and the record of only those numbers that the tables print.

The whole report has some hundred numbers of each kernel and is made when it is needed; what is kept is this record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvae.benchmarks import formatting

from . import limits
from .families.triton_family import FORMS

Entry = Mapping[str, Any]  # what `describe.entry` says of a kernel, or those of its fields that a table prints
MEMORY = ("LDGSTS.128", "LDSM", "LDS.128", "LDG.128", "LDG.64", "LDG.32")
_CANDIDATE = re.compile(r"(\w+), candidate (.*), (\d+) warps, (\d+) stages, (\w+)")


@dataclass(frozen=True)
class MachineCodeTable:
    """A table of one family of kernels.

    Attributes:
        family: the kernels' family, by the name that `--family` has for it.
        shows: whether the table has a kernel.
        fields: what it prints of a kernel.
        markdown: the table, of the kernels that it has.
    """

    family: str
    shows: Callable[[Entry], bool]
    fields: tuple[str, ...]
    markdown: Callable[[Sequence[Entry]], str]

    def __call__(self, kernels: Iterable[Entry]) -> str:
        """The table of a report or of a record."""
        return self.markdown([k for k in kernels if self.shows(k)])


def record(report: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Of a whole report those numbers that the tables of a family print, with the versions of the compilers."""
    kept = []
    for kernel in report["kernels"]:
        if kernel["family"] != family:
            continue
        tables = [table for table in TABLES.values() if table.family == family and table.shows(kernel)]
        if names := {name for table in tables for name in ("kernel", "case", "arch", *table.fields)}:
            kept.append({name: _printed(name, value) for name, value in kernel.items() if name in names})
    return {"versions": report["versions"], "kernels": kept}


def _printed(name: str, value: Any) -> Any:
    """A field without what no table prints of it."""
    if name == "loop" and value:
        return {"instructions": value["instructions"], "kinds": {"FFMA": value["kinds"].get("FFMA", 0)}}
    if name == "memory":
        return {kind: count for kind, count in value.items() if kind in MEMORY}
    return {key: count for key, count in value.items() if count} if name in ("fp32", "fp64") else value


def all_fields(kernels: Iterable[Entry]) -> str:
    """A line for each kernel, of whatever family."""
    rows = [
        [
            k["kernel"],
            k["case"],
            f"sm_{k['arch']}",
            str(k["registers"]),
            str(k["stack"] + k["local"]),
            f"{k['shared'] / 1024:.0f}",
            f"{k['blocks']} x {k['threads']}",
            ", ".join(f"{count} {name}" for name, count in k["matrix"].items()) or formatting.NOTHING,
            _arithmetic(k),
            str(k["exp2"]),
            formatting.percent(k["wide_loads"]),
            _floor(k),
        ]
        for k in kernels
    ]
    headings = ["kernel", "case", "for", "registers", "spilled, bytes", "shared, KiB", "blocks x threads", "matrix"]
    return formatting.markdown([*headings, "FMA / ADD / MUL", "exp2", "16-byte loads", "floor"], rows, left=3)


def _arithmetic(kernel: Entry) -> str:
    """Multiply-adds, additions, products: those of float64 where the kernel has any."""
    single, double = kernel["fp32"], kernel.get("fp64", {})
    if any(double.values()):
        return " / ".join(str(double.get(name, 0)) for name in ("DFMA", "DADD", "DMUL"))
    return " / ".join(str(single.get(name, 0) + 2 * single.get(f"{name}2", 0)) for name in ("FFMA", "FADD", "FMUL"))


def _floor(kernel: Entry) -> str:
    seconds = kernel["floor_seconds"]
    return formatting.NOTHING if seconds is None else f"{formatting.duration(seconds)}, {kernel['bound_by']}"


def cuda_kernels(kernels: Iterable[Entry]) -> str:
    """The CUDA kernels whose work is known, a row for each target."""
    rows = [
        [
            f"`{k['kernel']}`",
            f"sm_{k['arch']}",
            str(k["registers"]),
            str(k["stack"] + k["local"]),
            f"{k['shared'] / 1024:.0f}",
            str(k["blocks"]),
            formatting.percent(k["loop"] and k["loop"]["kinds"].get("FFMA", 0) / k["loop"]["instructions"]),
            str(k["matrix"].get("HMMA", 0)),
            *(str(k["memory"].get(kind, 0)) for kind in MEMORY),
        ]
        for k in kernels
    ]
    headings = ["kernel", "for", "registers", "bytes spilled", "shared, KiB", "blocks at once"]
    return formatting.markdown([*headings, "FFMA in the innermost loop", "HMMA", *MEMORY], rows, left=2)


def cuda_floors(kernels: Iterable[Entry]) -> str:
    """The minimal time of each CUDA kernel on an H200, by each limit that could bind it."""
    named = ("fp16", "fp32", "exp2", "fill", "memory")

    def time(kernel: Entry, limit: str) -> float | None:
        return kernel["work"][limit] / limits.RATES[limit] if limit in kernel["work"] else None

    rows = [[f"`{k['kernel']}`", k["case"], *(formatting.duration(time(k, name)) for name in named)] for k in kernels]
    return formatting.markdown(["kernel", "for", *(limits.NAMES[name] for name in named)], rows, left=2)


def triton_candidates(kernels: Iterable[Entry]) -> str:
    """A row for each tile that is offered beside the table's: registers by architecture, and what is spilled on any."""
    rows: dict[tuple[str, ...], dict[int, Entry]] = {}
    for k in kernels:
        found = _CANDIDATE.fullmatch(k["case"])
        assert found is not None, k["case"]
        form, sizes, warps, stages, call = found.groups()
        rows.setdefault((f"{form}, {call}", sizes, warps, stages), {})[k["arch"]] = k
    arches = tuple(limits.MULTIPROCESSOR)
    order = [f"{form}, {call}" for form in FORMS for call in ("forward", "score", "backward")]
    return formatting.markdown(
        ["call", "rows x components", "warps", "stages", *(f"sm_{arch}" for arch in arches), "spilled, bytes"],
        [
            [
                *names,
                *(str(by_arch[arch]["registers"]) if arch in by_arch else formatting.NOTHING for arch in arches),
                str(sum(k["stack"] + k["local"] for k in by_arch.values())),
            ]
            for names, by_arch in sorted(rows.items(), key=lambda row: order.index(row[0][0]))
        ],
        left=2,
    )


def _main_triton_kernel(kernel: Entry) -> bool:
    """In the general case and by the table's tiles."""
    special = any(word in kernel["case"] for word in ("shared", "candidate", "in float64"))
    return not special and not kernel["kernel"].startswith(("packing", "merge"))


_SPILLED = ("registers", "stack", "local")
_OCCUPANCY = (*_SPILLED, "shared", "blocks")
TABLES: Mapping[str, MachineCodeTable] = {
    "cuda-static": MachineCodeTable(
        "cuda", lambda k: bool(k.get("work")), (*_OCCUPANCY, "loop", "matrix", "memory", "work"), cuda_kernels
    ),
    "cuda-floors": MachineCodeTable("cuda", lambda k: bool(k.get("work")) and k["arch"] == 90, ("work",), cuda_floors),
    "triton-static": MachineCodeTable(
        "triton",
        _main_triton_kernel,
        (*_OCCUPANCY, "threads", "matrix", "fp32", "fp64", "exp2", "wide_loads", "floor_seconds", "bound_by"),
        all_fields,
    ),
    "triton-candidates": MachineCodeTable(
        "triton", lambda k: _CANDIDATE.fullmatch(k["case"]) is not None, _SPILLED, triton_candidates
    ),
}
