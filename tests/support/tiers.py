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
    "slow": "builds wheels, trains, runs notebooks, whole benchmarks, many cases or processes, or measures memory",
}

# A parameter names the backend, or one of these fixtures.
_BACKEND_OF_FIXTURE = {
    **{"triton": "triton", "small_triton": "triton-small"},
    **{"emulated_small": "cuda-emulated", "emulated_tiled": "cuda-emulated-tiled"},
}
_MARK_OF_FOLDER = {"machine_code": "machine_code"}
_MARK_OF_FILE = {
    "test_static_report": "machine_code",
    **dict.fromkeys(("test_ddp", "test_memory", "test_notebooks", "test_packaging"), "slow"),
    **dict.fromkeys(("test_audit_pairs", "test_conditional_digits", "test_distributed"), "slow"),
    **dict.fromkeys(("test_distributed_lightning", "test_gpu_dry_run", "test_score_killed"), "slow"),
    **dict.fromkeys(("test_distributed_accelerate", "test_distributed_guide", "test_train_ranks"), "slow"),
    **dict.fromkeys(("test_studies", "test_whole_runs"), "slow"),
}


def marks_of(item: pytest.Item) -> set[str]:
    """None for a smoke test, which is in every tier."""
    if item.path.stem.endswith("_smoke"):
        return set()
    marks = {_MARK_OF_FOLDER.get(item.path.parent.name), _MARK_OF_FILE.get(item.path.stem)}
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    names = [p.removeprefix("fastvae-") for p in parameters if isinstance(p, str)]  # as benchmarks call them
    names += [_BACKEND_OF_FIXTURE[f] for f in item.fixturenames if f in _BACKEND_OF_FIXTURE]
    if any(name.startswith("triton") for name in names):
        marks.add("triton")
    if any(emulated(name) for name in names):
        marks.add("emulated")
    return {mark for mark in marks if mark}
