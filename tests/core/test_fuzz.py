"""A hundred and fifty random calls on every backend; `python tests/fuzz.py` makes as many as one likes."""

from __future__ import annotations

import fuzz


def test_random_calls(impl: str) -> None:
    largest = 2**12 if impl in ("triton", "cuda") else 2**17  # interpreted kernels take a millisecond an operation
    wrong = {}
    for seed in range(40 if impl in ("triton", "cuda") else 150):
        name, failure = fuzz.check(seed, impl, largest)
        if failure is not None:
            wrong[f"{name}, seed {seed}"] = failure
    assert not wrong
