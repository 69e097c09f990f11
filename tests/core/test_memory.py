"""Peak memory of the mixture density, forward and backward, beyond inputs, outputs and gradients."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support.internals import COMPOSITE_CHUNK

from core.test_processes import run

LIMIT = 200e6  # bytes, the contract's figure for M = 4096, K = 100,000, D = 64


@pytest.fixture(autouse=True)
def large_blocks_go_back_when_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc otherwise raises this threshold as it goes, keeps what is freed below it, and in some runs finds no use for
    it: the same call then peaks at once or at twice as much.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**17))


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
    """Five of its chunks at most; M x K x D numbers would be 64 of them."""
    assert added("composite", 1024, 8192, 16) < 5 * 4 * COMPOSITE_CHUNK


STEP = """
    import sys, torch, fastvae
    from torch import nn

    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU())
            self.head = nn.Linear(300, 80)

        def forward(self, x):
            return self.head(self.body(x)).chunk(2, -1)

    K, chunk_size = map(int, sys.argv[1:])
    encoder = Encoder()
    prior = fastvae.VampPrior(encoder, torch.rand(K, 784), chunk_size=chunk_size)
    decoder = nn.Sequential(nn.Linear(40, 300), nn.ReLU(), nn.Linear(300, 784))
    vae = fastvae.VAE(encoder, decoder, prior)
    optimizer = torch.optim.Adam(vae.parameters(), fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        vae(torch.rand(100, 784).round()).loss.backward()
        optimizer.step()
    assert prior.pseudo_inputs.grad is not None
    print(peak())
"""


def test_training_with_many_encoded_pseudo_inputs() -> None:
    """Steps with K = 50,000 under 2 GB: the pseudo-inputs, their gradient and Adam's moments are 0.63 GB of it."""
    if sys.platform != "linux":
        pytest.skip("reads the peak from /proc")
    assert int(run(STEP, "50000", "1000")) < 2e9


def test_memory_beyond_the_pseudo_inputs_is_flat() -> None:
    """From K = 4,000 to 12,000 the peak grows by six tensors of the pseudo-inputs' size at most: the parameter, its
    gradient, Adam's two, and two in passing.  Kept activations would be nearly two more.
    """
    if sys.platform != "linux":
        pytest.skip("reads the peak from /proc")
    few, many = (int(run(STEP, str(K), "500")) for K in (4_000, 12_000))
    assert many - few < 6.5 * 8_000 * 784 * 4


SAMPLES = """
    import sys, torch
    from fastvae.distributions import MixtureOfDiagNormals

    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    by_rows = int(sys.argv[4])

    def job(M, K, D):
        logits = torch.randn(M, K) if by_rows else torch.randn(K)
        given = [p.requires_grad_() for p in (torch.randn(K, D), 0.5 + torch.rand(K, D), logits)]
        q = MixtureOfDiagNormals(*given)
        z = q.rsample() if by_rows else q.rsample((M,))
        (z.square().sum() + q.log_prob(z).sum()).backward()
        assert z.shape == (M, D) and all(bool(p.grad.isfinite().all()) for p in given)

    job(3, 4, 5)  # threads and libraries are there before the count begins
    before = peak()
    job(*map(int, sys.argv[1:4]))
    print(peak() - before)
"""


@pytest.mark.parametrize(
    ("few", "many", "K", "D", "by_rows", "share"),
    [(500, 2000, 10_000, 2, 0, 0.25), (32, 128, 4000, 32, 1, 0.6)],
    ids=["one mixture", "weights by rows"],
)
def test_samples_of_a_mixture_with_gradients(few: int, many: int, K: int, D: int, by_rows: int, share: float) -> None:
    """From few samples to many, memory grows by less than that share of [M, K] numbers, 60 MB.  Where the weights
    themselves are [M, K], of [M, K, D] numbers, 49 MB.
    """
    if sys.platform != "linux":
        pytest.skip("reads the peak from /proc")
    peaks = [int(run(SAMPLES, str(M), str(K), str(D), str(by_rows))) for M in (few, many)]
    assert peaks[1] - peaks[0] < share * 4 * (many - few) * K * (D if by_rows else 1)


EM = """
    import torch, fastvae

    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    fastvae.fit_mixture(torch.randn(99, 8), 2, max_iter=1)  # threads and libraries are there before the count begins
    z = torch.randn(300_000, 8)
    before = peak()
    fit = fastvae.fit_mixture(z, 400, mu=z[:400], logvar=torch.zeros(()), log_weights=torch.zeros(400), max_iter=2)
    values, _ = fastvae.mixture_responsibilities(z, fit.mu, fit.logvar, fit.log_weights, top_k=2)
    assert fit.n_iter == 2 and len(values) == len(z)
    print(peak() - before)
"""


@pytest.mark.usefixtures("compiled")
def test_em_and_responsibilities() -> None:
    """A table of rows and components would be 480 MB."""
    if sys.platform != "linux":
        pytest.skip("reads the peak from /proc")
    assert int(run(EM)) < 150e6


STREAMED = """
    import sys, threading, time
    import numpy as np, torch
    from fastvae.streaming import StreamedScores

    def own():  # what the process holds itself, without the pages of mapped files
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    score, memory, K = bool(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    M, D = 400_000, 16
    for name, rows in (("z", M), ("mu", K)):
        np.lib.format.open_memmap(f"{name}.npy", "w+", np.float32, (rows, D)).flush()
    z, mu = (np.load(f"{name}.npy", mmap_mode="r") for name in ("z", "mu"))
    list(StreamedScores(z[:64], mu[:64], torch.zeros(()), score=score))
    before, most = own(), [0]
    def watch():
        while most:
            most[0] = max(most[0], own())
            time.sleep(0.001)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    for part in StreamedScores(z, mu, mu, score=score, memory=memory):
        if part.start > 0:  # two blocks of rows
            break
    print(most[0] - before)
"""


# The components do not fit, and fit; and they are few, so that the memory is for rows and what is kept of them.
@pytest.mark.parametrize(
    ("score", "memory", "K", "more"), [(0, 2**23, 20_000, 6e6), (1, 2**24, 20_000, 6e6), (1, 2**26, 20, 0)]
)
def test_streaming_holds_what_it_is_allowed(
    score: int, memory: int, K: int, more: float, tmp_path: Path, monkeypatch: Any
) -> None:
    """The inputs are more than 25 MB; with a small memory, what libraries allocate on the way counts."""
    monkeypatch.chdir(tmp_path)
    assert int(run(STREAMED, str(score), str(memory), str(K))) < memory + more
