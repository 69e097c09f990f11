"""Which backend `impl=None` takes: from the backends' own records, as the registry goes through them."""

from __future__ import annotations

import torch

from fastvae.backends import BACKENDS, PRECISIONS
from fastvae.benchmarks import formatting

from .registry import Results, table

DEVICES = {"CPU": "cpu", "NVIDIA GPU": "cuda", "any other": "meta"}


@table("choice", "*")
def choice(results: Results) -> str:
    """Devices down; the backends in the order in which they are looked for, with the records this rests on."""
    rows = []
    for name, kind in DEVICES.items():
        able = [backend for backend in BACKENDS.values() if backend.is_default_on(torch.device(kind))]
        measured = dict.fromkeys(record for backend in able for record in backend.measured_in)
        records = [record for record in measured if (results.folder / record).exists()]
        cells = []
        for precision in PRECISIONS:
            first = [backend.impl for backend in able if backend.precision == precision]
            cells.append(", else ".join(f"`{impl}`" for impl in dict.fromkeys([*first, *(b.impl for b in able)])))
        rows.append([name, *cells, ", ".join(f"`{record}`" for record in records) or formatting.NOTHING])
    head = ["tensors on", *(f"precision {precision}" for precision in PRECISIONS), "by the records"]
    return formatting.markdown(head, rows, left=len(head))
