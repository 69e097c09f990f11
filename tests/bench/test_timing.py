"""Taking turns, memory, and the probe of the machine's limits."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from fastvae.benchmarks import timing
from fastvae.benchmarks.case import Case, Contender, Prepared, measure
from fastvae.benchmarks.probe import copy_meter, multiply_add_meter
from fastvae.benchmarks.timing import Settings, cpu_clock, interleave, spread

from .conftest import TINY


def test_contenders_take_turns_until_each_has_its_rounds() -> None:
    order: list[str] = []
    runs = {"slow": lambda: order.append("slow"), "fast": lambda: order.append("fast")}
    seconds = {"slow": 2.0, "fast": 0.01}

    def clock(run: object, calls: int) -> float:
        before = len(order)
        for _ in range(calls):
            run()  # type: ignore[operator]
        return seconds[order[before]]

    settings = Settings(seconds=1.0, min_rounds=3, max_rounds=6, sample_seconds=0.0)
    samples, rates = interleave(runs, clock, settings, meters={"limit": lambda: 7.0}, already={"slow": [2.0]})
    assert len(samples["slow"]) == 3 and len(samples["fast"]) == 6  # the least, and the most; one was there already
    assert rates == {"limit": [7.0] * 6}
    # While both run neither has two samples of the other's between: slow's runs are spread over the first rounds.
    places = [i for i, name in enumerate(order) if name == "slow"]
    assert any(order[i + 1] == "fast" for i in places[:-1])


def test_the_clock_and_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(5.0, 0.25)  # each look at the time takes so long
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    assert cpu_clock(lambda: (next(now), next(now)), 3) == (6 + 1) * 0.25 / 3
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.5, "high": 2.5, "rounds": 3}
    assert spread([4.0]) == {"median": 4.0, "low": 4.0, "high": 4.0, "rounds": 1}


PEAKS = """
import torch
from fastvae.benchmarks.memory import extra_peak

def run():
    torch.ones(8_000_000)  # 32 MB, gone when the call returns

print(extra_peak(run, "cpu"), extra_peak(lambda: None, "cpu"))
"""


def test_extra_peak_sees_what_is_freed_before_the_end() -> None:
    """In a process of its own: what other threads give back meanwhile would count against the peak."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    with_tensor, without = done.stdout.split()
    if with_tensor == "None":
        pytest.skip("no /proc here")
    assert 30e6 < int(with_tensor) < 40e6 and int(without) < 2e6


def test_the_probe_finds_plausible_limits() -> None:
    single, double = multiply_add_meter(), multiply_add_meter(dtype=torch.float64)
    copy = copy_meter()
    if single is None or double is None or copy is None:
        pytest.skip("no C++ compiler here")

    def best(rate: Callable[[], float]) -> float:
        """Of several: one probe takes microseconds, and much longer where it has to wait for its core."""
        return max(rate() for _ in range(10))

    # A scalar unit makes some 1e9 multiply-adds a second; no core makes 1e13.
    assert 1e9 < best(single) < 1e13 and 1e9 < best(double) < 1e13
    assert 1e8 < best(copy) < 1e13


def test_without_a_compiler_the_limits_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvae.benchmarks import probe

    monkeypatch.setattr(probe.shutil, "which", lambda name: None)
    probe._library.cache_clear()
    assert multiply_add_meter() is None and copy_meter() is None
    probe._library.cache_clear()


def test_a_slow_first_call_counts_as_a_round_unless_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastvae.benchmarks import case

    monkeypatch.setattr(case, "SLOW", 0.01)
    calls: Counter[str] = Counter()

    def contender(name: str, builds: bool) -> Contender:
        def run() -> None:
            calls[name] += 1
            time.sleep(0.02)

        return Contender(name, run, lambda _: {}, builds=builds)

    both = (contender("plain", False), contender("building", True))
    made = Case({"suite": "test"}, ("plain", "building"), lambda _: Prepared(both))
    settings = Settings(seconds=0.0, min_rounds=3, max_rounds=3, sample_seconds=1e-9)
    result = measure(made, settings, "cpu", {})
    assert all(entry["seconds"]["rounds"] == 3 for entry in result["contenders"].values())
    assert calls["plain"] < calls["building"]
    assert TINY.min_rounds == 3
