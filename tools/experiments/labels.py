"""What weights by label, and a row's own group alone, cost beside one call of all rows; on the CPU.

    python -m tools.experiments.labels [--out FILE.json]

Each pair of calls is timed in turn, and the ratio is that of the shortest times: other work on the machine delays both.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae.benchmarks import formatting

from . import command

SIZES = (4096, 10_000, 40, 10), (4096, 10_000, 40, 100), (1000, 500, 40, 10), (100, 500, 40, 10)  # M, K, D, L

Call = Callable[[], Tensor]


def ratio(call: Call, plain: Call, gradients: bool, rounds: int) -> float:
    """How many times as long a call takes as the plain one, with gradients of everything or without any."""

    def seconds(of: Call) -> float:
        started = time.perf_counter()
        with torch.set_grad_enabled(gradients):
            value = of()
        if gradients:
            value.sum().backward()
        return time.perf_counter() - started

    times = [(seconds(call), seconds(plain)) for _ in range(1 + rounds)]
    return min(t for t, _ in times[1:]) / min(t for _, t in times[1:])


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    cases = []
    for M, K, D, L in SIZES:
        torch.manual_seed(0)
        labels, groups = torch.randint(L, (M,)), torch.arange(K) % L
        leaves = torch.randn(M, D), torch.randn(K, D), 0.5 * torch.randn(K, D), torch.randn(L, K).log_softmax(1)
        z, mu, logvar, weights = (leaf.requires_grad_() for leaf in leaves)
        one = weights[0].detach().requires_grad_()

        def plain(z=z, mu=mu, logvar=logvar, one=one) -> Tensor:
            return fastvae.mixture_log_prob(z, mu, logvar, one)

        def by_label(z=z, mu=mu, logvar=logvar, weights=weights, labels=labels) -> Tensor:
            return fastvae.mixture_log_prob(z, mu, logvar, weights, labels=labels)

        def own_group(z=z, mu=mu, logvar=logvar, groups=groups, labels=labels) -> Tensor:
            return fastvae.grouped_mixture_log_prob(z, mu, logvar, groups, labels=labels)

        case: dict[str, Any] = {"rows": M, "components": K, "dimensions": D, "labels": L}
        for name, call in (("by_label", by_label), ("own_group", own_group)):
            rounds = 10 if M * K > 10**6 else 200
            case[name] = [ratio(call, plain, gradients, rounds) for gradients in (False, True)]
        cases.append(case)
    return {"impl": "cpu", "threads": 1, "torch": torch.__version__, "cases": cases}


def markdown(content: dict[str, Any]) -> str:
    header = ["rows", "components", "labels", "by label", "with gradients", "own group", "with gradients"]
    rows = [
        [f"{case['rows']:,}", f"{case['components']:,}", str(case["labels"])]
        + [f"{value:.2f}" for name in ("by_label", "own_group") for value in case[name]]
        for case in content["cases"]
    ]
    return formatting.markdown(header, rows)


if __name__ == "__main__":
    sys.exit(command.run("labels", __doc__, measure, markdown))
