"""Peak memory of the mixture density, forward and backward, beyond inputs, outputs and gradients."""

from __future__ import annotations

import sys

import pytest
from test_processes import run

LIMIT = 200e6  # bytes, the contract's figure for M = 4096, K = 100,000, D = 64

SCRIPT = """
    import sys, torch, fastvae

    def peak():  # the most that the process has held, bytes
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    impl, M, K, D = sys.argv[1], *map(int, sys.argv[2:])

    def leaves(M, K):
        shapes = (M, D), (K, D), (K, D), (K,)
        return [torch.randn(shape, requires_grad=True) for shape in shapes]

    def job(args):
        fastvae.mixture_log_prob(*args, impl=impl).sum().backward()

    job(leaves(64, 64))  # threads and libraries are there before the count begins
    args = leaves(M, K)
    own = [torch.zeros_like(a) for a in args] + [torch.zeros(M)]  # as much as gradients and output will take
    before = peak()
    del own
    job(args)
    assert all(a.grad is not None for a in args)
    print(peak() - before)
"""


def added(impl: str, M: int, K: int, D: int) -> int:
    if sys.platform != "linux":
        pytest.skip("reads the peak from /proc")
    return int(run(SCRIPT, impl, str(M), str(K), str(D)))


@pytest.mark.usefixtures("compiled")
def test_compiled_kernels() -> None:
    """An array of M x K numbers would be 1.6 GB, one of M x K x D 105 GB."""
    assert added("cpu", 4096, 100_000, 64) < LIMIT


def test_composite() -> None:
    """The chunks stay what they are; here M x K x D numbers would be 0.5 GB."""
    assert added("composite", 1024, 8192, 16) < LIMIT / 2
