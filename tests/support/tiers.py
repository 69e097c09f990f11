"""The tiers of the tests: marks of what `make test` leaves out by `--fast`.  All marks are given here.

A test is marked by the name of the backend that it runs on, by its folder, or by its file; never by hand.
"""

from __future__ import annotations

import pytest

from .backend import emulated

MARKS = {
    "triton": "runs Triton's interpreter, where there is no GPU",
    "emulated": "runs kernels for another machine on this one",
    "machine_code": "compiles GPU kernels and looks at their machine code",
    "slow": "builds wheels, or measures the memory of large problems",
}

# Fixtures whose parameter, or else whose entry here, names the backend.
_BACKEND_OF = {
    **dict.fromkeys(("impl", "cpu_impl", "each_impl", "emulated")),
    "triton": "triton",
    "small_triton": "triton-small",
    "emulated_small": "cuda-emulated",
}
_MARK_OF_FOLDER = {"machine_code": "machine_code"}
_MARK_OF_FILE = {"test_static_report": "machine_code", "test_packaging": "slow", "test_memory": "slow"}


def marks_of(item: pytest.Item) -> set[str]:
    """None for a smoke test, which is in every tier."""
    if item.path.stem.endswith("_smoke"):
        return set()
    marks = {_MARK_OF_FOLDER.get(item.path.parent.name), _MARK_OF_FILE.get(item.path.stem)}
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for fixture in set(item.fixturenames) & set(_BACKEND_OF):
        backend = _BACKEND_OF[fixture] or str(parameters.get(fixture, ""))
        if backend.startswith("triton"):
            marks.add("triton")
        if emulated(backend):
            marks.add("emulated")
    return {mark for mark in marks if mark}
