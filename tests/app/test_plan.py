"""`fastvae plan` says what the records say, and what is exchanged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import fastvae.distributed
from fastvae.app.options import RECORDED_DEVICES
from fastvae.app.planning.cost import (
    LAYOUTS,
    Work,
    all_rates,
    bytes_received,
    bytes_received_in_ring,
    cost,
    efficiency,
    growth,
    limit,
    mesh_of,
)
from fastvae.app.planning.table import duration, size
from fastvae.distributed.link import Link
from fastvae.streaming import StreamedScores

from .conftest import Cli

WORK = Work(10_000_000, 1_000_000, 16)


def test_the_rates_are_those_that_the_command_knows() -> None:
    rates = all_rates()
    assert tuple(rates) == RECORDED_DEVICES
    for name, each in rates.items():
        assert 0 < each.number < 1e-9 and (each.deviation is not None) == name.startswith("cpu")


def test_one_device_takes_what_the_streaming_reads_and_holds() -> None:
    z, mu = torch.zeros(5000, 8), torch.zeros(3000, 8)
    for memory in (2**17, 2**28):
        parts = StreamedScores(z, mu, mu, torch.zeros(3000), memory=memory)
        found = cost(Work(5000, 3000, 8, memory=memory), all_rates()["cpu"], "rows")
        assert found.bytes_read == parts.bytes_read and found.bytes_received == 0
        assert found.memory == parts.blocks.bytes_held(8) <= 1.01 * memory


@pytest.mark.parametrize("name", RECORDED_DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_devices_take_no_more_of_each(name: str, layout: str) -> None:
    rates = all_rates()[name]
    previous = math.inf
    for devices, found in growth(WORK, rates, layout, 1024):
        assert found.compute_seconds < previous
        previous = found.compute_seconds
        here = replace(WORK, devices=devices)
        R, C = mesh_of(here, layout)
        if layout == "ring":
            assert R == C == devices and found.bytes_received == bytes_received_in_ring(WORK.components, 16, devices)
        else:
            assert devices == R * C and found.rows * found.components * devices >= WORK.rows * WORK.components
            assert found.bytes_received == bytes_received(found.rows, 16, C)
        assert 0 < efficiency(here, rates, layout) <= 1.001
    assert previous < 1.1 * cost(WORK, rates, layout).compute_seconds / 1024 + 1e-9


def test_exchanged_bytes() -> None:
    assert bytes_received(1000, 16, 1) == bytes_received(1000, 16, 1, score=True) == 0
    assert bytes_received(1000, 16, 4) == 3 * 4000
    assert bytes_received(1000, 16, 4, score=True) == 3 * 4000 + 6 * 1000 * 16
    assert bytes_received_in_ring(1000, 16, 1) == 0
    assert bytes_received_in_ring(1001, 16, 4) == 751 * 33 * 4  # of the device that has 250 of its own


def test_a_mesh_has_as_few_columns_as_keep_the_components_in_memory() -> None:
    of_component, memory = 3 * 33 * 4, 2**28  # see fastvae.streaming
    fit = memory // 2 // of_component
    for components, columns in (
        (fit, 1),
        (fit + 1, 2),
        (2 * fit + 1, 3),
        (4 * fit, 4),
        (4 * fit + 1, 6),
        (99 * fit, 12),
    ):
        work = Work(10**9, components, 16, devices=12)
        assert mesh_of(work, "mesh") == (12 // columns, columns)
        found = cost(work, all_rates()["cpu"], "mesh")
        once = 4 * (16 * found.rows + 33 * found.components)
        assert (found.bytes_read == once) == (columns * fit >= components)
    assert mesh_of(Work(10**9, 10**9, 16, devices=7), "mesh") == (1, 7)


def test_a_ring_exchanges_while_it_computes_and_stops_to_scale_where_that_takes_as_long() -> None:
    rates = all_rates()["cpu"]
    fast, slow = (replace(WORK, devices=8, network=rate) for rate in (1e9, 1e5))
    found = cost(fast, rates, "ring")
    assert found.seconds == found.compute_seconds > found.network_seconds
    found = cost(slow, rates, "ring")
    assert found.seconds == found.network_seconds == found.bytes_received / 1e5
    assert cost(slow, rates, "components").seconds > cost(slow, rates, "components").network_seconds
    told = limit(replace(WORK, network=1e9), rates, "ring")
    last = int(told.split("Up to ")[1].split(" ")[0].replace(",", ""))
    # a device computes with a component for as long as it receives one where it has this many rows
    even = 4 * 33 / 1e9 / (rates.pair + 16 * rates.number)
    assert WORK.rows / last / 4 <= even <= WORK.rows / last * 4


def test_components_stop_to_scale_where_the_exchange_takes_as_long() -> None:
    rates = all_rates()["h200"]
    slow = replace(WORK, network=1e9)
    times = {n: c.seconds for n, c in growth(slow, rates, "components", 1024)}
    best = min(times, key=times.__getitem__)
    # T / N + 4 M N / B is least at N = sqrt(T B / 4 M)
    assert best / 2 <= math.sqrt(times[1] * 1e9 / (4 * WORK.rows)) <= 2 * best
    told = limit(slow, rates, "components")
    assert f"is that of {best}" in told and "receives M numbers from every other" in told
    assert "no network: one that gives a device 0.139 GB/s" in limit(replace(WORK, devices=8), rates, "components")
    assert "2,441 devices" in limit(WORK, rates, "rows")
    few = Work(1000, 10_000, 16)
    told = limit(few, all_rates()["cpu"], "rows")
    last = int(told.split("Up to ")[1].split(" ")[0].replace(",", ""))
    assert efficiency(replace(few, devices=last), all_rates()["cpu"], "rows") >= 0.5
    assert efficiency(replace(few, devices=2 * last), all_rates()["cpu"], "rows") < 0.5


def test_the_command(cli: Cli) -> None:
    sizes = ["plan", "--rows", 10_000_000, "--components", 1_000_000, "--dims", 16]
    code, text, error = cli(*sizes, "--devices", 8, "--device", "h200")
    assert code == 0, error
    for told in ("1,250,000", "mesh 2 x 4", "ring", "2.02 s", "280 MB", "60 MB", "116 MB", "not known", "gpu-h200"):
        assert told in text
    code, text, _ = cli(*sizes, "--devices", 8, "--device", "h200", "--network", 10, "--score")
    assert code == 0 and "not known" not in text and "The time of the score is not recorded" in text
    code, text, _ = cli("plan", "--rows", 1, "--components", 1, "--dims", 1)
    assert code == 0 and "received " not in text and "mesh 1" not in text
    assert "A slower core, or one that other programs share, takes longer." in text
    code, text, _ = cli("plan", "--rows", 10, "--components", 1, "--dims", 1, "--devices", 2, "--network", 10)
    assert code == 0 and "There is work for one device alone" in text and "Up to 1 devices" not in text
    for wrong, told in (
        (["--device", "tpu"], "--device is 'tpu'; it can be cpu, cpu-avx2, h100, h200"),
        (["--device", "h200", "--threads", 2], "--threads is for a CPU"),
    ):
        code, _, error = cli(*sizes, *wrong)
        assert code == 1 and told in error
    assert cli(*sizes[:-1], 0)[0] == 2
    for option in ("--rows", "--components", "--dims", "--devices", "--memory"):
        code, text, error = cli(*sizes, option, 10**15)
        assert code == 0, error
        code, _, error = cli(*sizes, option, 10**400)
        assert code == 2 and option in error
    assert cli(*sizes, "--rows", "1e7") == cli(*sizes, "--rows", 10**7)
    for wrong in ("1e400", "1.5", "nan", "many", "-3"):
        code, _, error = cli(*sizes, "--rows", wrong)
        assert code == 2 and "--rows" in error and wrong in error


def test_numbers_in_words() -> None:
    assert [duration(s) for s in (0, 5e-6, 2e-3, 1, 100, 200, 8000, 200_000)] == [
        "0 ms", "5 us", "2 ms", "1 s", "100 s", "3.33 min", "2.22 h", "2.31 days",
    ]  # fmt: skip
    assert [size(n) for n in (0, 1500, 2_000_000, 3 * 10**9, 10**12)] == ["0 B", "1.5 kB", "2 MB", "3 GB", "1 TB"]


def test_ranks_in_one_process_receive_what_is_planned() -> None:
    pytest.importorskip("tools")
    from tools.experiments import scaling

    root = Path(scaling.__file__).parents[2]
    recorded = json.loads((root / "benchmarks" / "results" / "scaling.json").read_text())
    assert [row["ranks"] for row in recorded["rows"]] == [2**n for n in range(11)]
    small = [
        {
            **scaling.simulate(ranks, M=10, K=30, D=3),
            "mesh": scaling.simulate_mesh(ranks, M=10, K=30, D=3),
            "ring": scaling.simulate_ring(ranks, M=10, K=30, D=3),
        }
        for ranks in (1, 4, 32)
    ]
    for found in (*recorded["rows"], *small):
        assert found["received"] == found["planned"]
        assert found["mesh"]["received"] == found["mesh"]["planned"]
        assert math.prod(found["mesh"]["mesh"]) == found["ranks"]
        assert found["ring"]["received"] == found["ring"]["planned"]
        # a part of a sum that does not divide by the ranks is a number longer than another
        assert abs(found["received_with_score"] - found["planned_with_score"]) <= 8 * found["ranks"]
        assert max(found["largest_difference"], found["ring"]["largest_difference"]) < 1e-5
        assert found["largest_difference_of_score"] < 1e-4


class Alike(Link):
    """The link of one of many ranks that all hold the same; it counts the bytes that the rank receives."""

    received: ClassVar[dict[torch.dtype, int]] = {}  # the handshake's are integers

    def _count(self, value: torch.Tensor, times: float) -> None:
        self.received[value.dtype] = (
            self.received.get(value.dtype, 0) + math.ceil(times * value.numel()) * value.itemsize
        )

    def all_gather(self, value: torch.Tensor) -> torch.Tensor:
        self._count(value, self.size - 1)
        return value.detach().expand(self.size, *value.shape)

    def all_reduce(self, value: torch.Tensor) -> torch.Tensor:
        self._count(value, 2 * (self.size - 1) / self.size)
        return value.detach() * self.size

    def start_shift(self, sent: torch.Tensor, received: torch.Tensor) -> list[Any]:
        self._count(received, 1)
        received.copy_(sent)
        return []


@pytest.fixture
def alike(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes this process one of so many ranks."""
    monkeypatch.setattr("fastvae.distributed.link._device_of_handshake", lambda group: torch.device("cpu"))
    monkeypatch.setattr(Alike, "received", {})

    def one_of(ranks: int) -> None:
        monkeypatch.setattr("fastvae.distributed.functional.link_to", lambda what, group: Alike(what, group, 0, ranks))

    return one_of


@pytest.mark.parametrize("ranks", [2, 1024])
@pytest.mark.parametrize("layout", ["components", "components with the score", "ring"])
def test_the_library_as_one_of_many_ranks_receives_what_is_planned(
    alike: Callable[[int], None], layout: str, ranks: int
) -> None:
    """The call itself, where `simulate` follows its steps.  All ranks hold the same, so it knows the result."""
    alike(ranks)
    rng = torch.Generator().manual_seed(0)
    z, mu, logvar = (torch.randn(rows, 3, generator=rng) for rows in (16, 5, 5))
    log_weights = torch.full((5,), -math.log(5.0 * ranks))
    want, want_score = fastvae.mixture_log_prob_and_score(z, mu, logvar)
    if layout == "ring":
        options = {"rows": "sharded", "exchange": "ring"}
        got = fastvae.distributed.mixture_log_prob(z, mu, logvar, log_weights, **options)
        planned = bytes_received_in_ring(5 * ranks, 3, ranks)
    elif layout == "components":
        got = fastvae.distributed.mixture_log_prob(z, mu, logvar, log_weights)
        planned = bytes_received(16, 3, ranks)
    else:
        got, score = fastvae.distributed.mixture_log_prob_and_score(z, mu, logvar, log_weights)
        planned = bytes_received(16, 3, ranks, score=True)
        torch.testing.assert_close(score, want_score, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert Alike.received == {torch.float32: planned, torch.int64: 576 * (ranks - 1)}  # 576 bytes: the guide says so


def test_backward_receives_the_sum_for_z_and_nothing_for_the_components(alike: Callable[[int], None]) -> None:
    alike(8)
    for wanted, numbers in (("mu", 0), ("logvar", 0), ("log_weights", 0), ("z", math.ceil(2 * 7 / 8 * 16 * 3))):
        given = {
            "z": torch.randn(16, 3),
            "mu": torch.randn(5, 3),
            "logvar": torch.zeros(5, 3),
            "log_weights": torch.zeros(5),
        }
        given[wanted].requires_grad_()
        log_prob = fastvae.distributed.mixture_log_prob(**given)
        Alike.received.clear()
        log_prob.sum().backward()
        assert sum(Alike.received.values()) == 4 * numbers and given[wanted].grad is not None


def test_the_plan_is_near_what_jobs_took() -> None:
    """By the record: the middle of the ratios within 10 %, each within 35 %, as the guide says."""
    pytest.importorskip("tools")
    from tools.experiments import plan_check

    root = Path(plan_check.__file__).parents[2]
    recorded = json.loads((root / "benchmarks" / "results" / "plan.json").read_text())
    ratios = sorted(row["taken_by_planned"] for row in recorded["rows"])
    assert len(ratios) == 10 and 1 / 1.1 < ratios[4] < 1.1 and ratios[0] > 1 / 1.35 and ratios[-1] < 1.35


def test_two_processes_took_and_received_what_is_planned() -> None:
    """By the record; the guide says how near."""
    pytest.importorskip("tools")
    from tools.experiments import ranks_check

    root = Path(ranks_check.__file__).parents[2]
    recorded = json.loads((root / "benchmarks" / "results" / "ranks.json").read_text())
    assert {row["layout"] for row in recorded["rows"]} == set(ranks_check.LAYOUTS)
    for row in recorded["rows"]:
        assert row["received"] == row["planned_received"]
        assert 1 / 1.2 < row["taken_by_planned"] < 1.5


def test_the_check_of_the_plan_runs_here() -> None:
    """Small jobs take longer than the plan says, which leaves out what a call costs; none takes much less."""
    pytest.importorskip("tools")
    from tools.experiments import plan_check

    try:
        found = plan_check.measure(((3000, 500, 8),))
    except RuntimeError as error:
        pytest.skip(str(error))
    assert len(found["rows"]) == 2 and all(row["taken_by_planned"] > 0.3 for row in found["rows"])
    assert "3,000 x 500, D = 8" in plan_check.markdown(found)
