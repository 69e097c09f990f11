"""A hundred and fifty random calls on every backend; `python tests/fuzz.py` makes as many as one likes."""

from __future__ import annotations

import fuzz
import pytest
from support.backend import device_of, few_shapes

PARTS = 10


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(impl: str, part: int) -> None:
    largest = 2**12 if impl in ("triton", "cuda") else 2**17  # interpreted kernels take a millisecond an operation
    wrong = {}
    count = 40 if impl in ("triton", "cuda") else 150
    if few_shapes(impl) and device_of(impl).type == "cuda":
        count = 12  # each call has kernels of its own to compile
    for seed in range(part, count, PARTS):
        name, failure = fuzz.check(seed, impl, largest)
        if failure is not None:
            wrong[f"{name}, seed {seed}"] = failure
    assert not wrong
