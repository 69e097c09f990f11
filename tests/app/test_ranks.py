"""Which process of several this is, and what it has to do."""

from __future__ import annotations

import threading
from datetime import timedelta
from itertools import chain
from typing import Any

import pytest
import torch
from support.patience import PATIENCE

import fastvae
from fastvae._noise import PartOfBatch, rows_of_batch
from fastvae.app.run import ranks
from fastvae.app.run.device import pick_device
from fastvae.app.run.ranks import ALONE, Ranks, _process_group, launched
from fastvae.app.user_errors import ConfigError, RunError

from .conftest import Cli


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_all_rows_in_order_and_nearly_equal(size: int) -> None:
    for count in range(20):
        shares = [list(range(count))[Ranks(rank, size).share(count)] for rank in range(size)]
        assert list(chain(*shares)) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_environment_tells_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    assert launched() == ALONE  # some set the size alone
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launched() == Ranks(rank=3, size=4, on_machine=1)
    for wrong in ("4", "-1", "x", ""):
        monkeypatch.setenv("RANK", wrong)
        with pytest.raises(ConfigError, match=f"RANK is '{wrong}'"):
            launched()


@pytest.mark.parametrize("impl", ["cpu", "composite", "reference"])
@pytest.mark.parametrize("num_samples", [None, 3])
def test_parts_of_a_batch_have_the_noise_of_the_whole(impl: str, num_samples: int | None) -> None:
    """And so the same samples, densities and gradients."""
    mu, logvar = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    means = torch.randn(4, 5, dtype=torch.float64)

    def compute(rows: slice) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        q = mu[rows], logvar[rows]
        z, log_q = fastvae.gaussian_rsample(*q, num_samples, path_derivative=True, impl=impl)
        other_z, kl = fastvae.mixture_kl(*q, means, means.new_zeros(()), None, num_samples, impl=impl)
        grads = torch.autograd.grad(z.square().sum() + log_q.sum() + kl.sum() + other_z.sum(), (mu, logvar))
        return z.mT, log_q, other_z.mT, kl, *grads

    whole, parts = compute(slice(None)), []
    for rank in range(3):
        share = Ranks(rank, 3).share(7)
        with rows_of_batch(PartOfBatch(share.start, share.stop - share.start, 7)):
            parts.append(compute(share))
    for index, expected in enumerate(whole):
        of_parts = [part[index] for part in parts]
        together = sum(of_parts) if index >= 4 else torch.cat(of_parts, -1)
        torch.testing.assert_close(together, expected)
    with pytest.raises(ValueError, match=r"mu must be \[..., 2, D\]"), rows_of_batch(PartOfBatch(0, 2, 7)):
        fastvae.gaussian_rsample(mu, logvar, impl=impl)


class Encoder(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return super().forward(x).chunk(2, -1)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_of_samples_are_drawn_again_for_the_rows_of_the_process(chunk_size: int) -> None:
    """Backward computes them again after `rows_of_batch` has ended, and must meet the noise that forward had."""
    torch.manual_seed(0)
    x = torch.rand(7, 6).round()
    vae = fastvae.VAE(Encoder(6, 6), torch.nn.Linear(3, 6), fastvae.StandardNormalPrior(3))

    def gradients(rows: slice, part: PartOfBatch | None) -> list[torch.Tensor]:
        torch.manual_seed(1)
        with rows_of_batch(part):
            loss = vae(x[rows], bound="iwae", num_samples=4, chunk_size=chunk_size).loss * len(x[rows])
        return list(torch.autograd.grad(loss, list(vae.parameters())))

    whole = gradients(slice(None), None)
    parts = [gradients(slice(*rows), PartOfBatch(rows[0], rows[1] - rows[0], 7)) for rows in ((0, 2), (2, 5), (5, 7))]
    for expected, *of_parts in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(of_parts), expected)


def test_each_rank_takes_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    monkeypatch.setattr("torch.accelerator.set_device_index", taken.append)
    assert pick_device("cpu", Ranks(1, 2, 1)) == "cpu" and not taken
    assert pick_device("meta", Ranks(3, 4, 1)) == "meta" and taken == [1]
    with pytest.raises(ConfigError, match="there are 2 on this machine, too few for a process each"):
        pick_device("meta", Ranks(2, 3, 2))
    with pytest.raises(ConfigError, match="say cuda, of which each process takes its own"):
        pick_device("cuda:0", Ranks(0, 2))


def test_a_step_that_fails_on_one_rank_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ConfigError("no such file")

    failed = [False, False]

    def gather(self: Ranks, value: bool) -> list[bool]:
        return [value if rank == self.rank else other for rank, other in enumerate(failed)]

    monkeypatch.setattr(Ranks, "gather", gather)
    assert Ranks(1, 2).each(lambda: 3) == 3
    for rank in (0, 1):
        with pytest.raises(ConfigError):
            Ranks(rank, 2).each(fail)
    failed = [True, True]
    with pytest.raises(ConfigError):
        Ranks(0, 2).each(fail)
    with pytest.raises(SystemExit):  # the first says why
        Ranks(1, 2).each(fail)
    with pytest.raises(SystemExit):
        Ranks(1, 2).each(lambda: 3)
    with pytest.raises(SystemExit):
        Ranks(1, 2).from_first(fail)  # which is not called here


YEAR = timedelta(days=365)


@pytest.fixture
def environment() -> dict[str, Any]:
    """Of one rank, alone, which may take any port."""
    return {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}


def test_ranks_that_end_together_leave_the_group(monkeypatch: pytest.MonkeyPatch, environment: dict[str, Any]) -> None:
    """Else its threads may still run when Python ends, and abort the process."""
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit), _process_group("cpu", YEAR):
        group = torch.distributed.group.WORLD
        assert group is not None and group._get_backend(torch.device("cpu")).options._timeout == YEAR
        raise SystemExit(1)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("launcher", ["torchrun", "another"])
def test_a_rank_that_never_starts_does_not_hold_up_the_others(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, Any], launcher: str
) -> None:
    """Though their patience is long once they have met."""
    if launcher == "torchrun":  # which keeps the store itself
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**environment, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=2))
    told: list[str] = []

    def meet() -> None:
        with pytest.raises(RunError) as error, _process_group("cpu", YEAR):
            pass
        told.append(str(error.value))

    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert told and "The ranks do not meet: rank 0 waits" in told[0] and "for all 2 (WORLD_SIZE)" in told[0]
    assert not torch.distributed.is_initialized()


def test_other_commands_run_in_one_process(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr("fastvae.app.commands.ranks", Ranks(0, 2))
    for command in ("compare", "info", "reproduce", "sample"):
        code, out, error = cli(command)
        assert code == 1 and not out and f"fastvae {command} runs in one process, not in 2" in error
