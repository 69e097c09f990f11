"""What the ranks of a sharded mixture run, and how a case is cut into theirs and put together again."""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

# Imported when first used, each rank by itself, unless they are here before the ranks are forked.
import torch._dynamo
import torch.distributed as dist
import torch.distributed.tensor
import torch.fx.experimental.symbolic_shapes
from budget import Case, Result
from torch import Tensor

import fastvae.distributed
from fastvae.distributed.link import Link

from .patience import PATIENCE

WORLD = 4

GROUPS: dict[int, Any] = {}  # on a rank: a group of the first ranks, by their number


def group_of(size: int) -> Any:
    if not GROUPS:  # on all ranks at the first call of any
        timeout = datetime.timedelta(seconds=PATIENCE / 2)
        GROUPS.update({n: dist.new_group(list(range(n)), timeout=timeout) for n in range(1, WORLD + 1)})
    return GROUPS[size]


class Sharding(NamedTuple):
    """How a case is spread over the first ranks of the world."""

    components: list[int]  # how many each rank has
    rows: list[int] | None = None  # how many each rank has; None where they are replicated
    impl: str | None = None
    dense: bool = False
    exchange: str = "gather"

    @property
    def arguments(self) -> dict[str, Any]:
        """What a call says of it."""
        rows = "replicated" if self.rows is None else "sharded"
        return {"rows": rows, "exchange": self.exchange, "impl": self.impl, "dense_backward": self.dense}

    def of(self, case: Case, rank: int) -> Case:
        """What a rank has of a case."""
        K = len(case.mu)
        first = sum(self.components[:rank])
        k = slice(first, first + self.components[rank])
        m = slice(None)
        if self.rows is not None:
            start = sum(self.rows[:rank])
            m = slice(start, start + self.rows[rank])
        shared = case.logvar.ndim < 2 or (len(case.logvar) == 1 and K > 1)
        return Case(
            case.z[m],
            case.mu[k],
            case.logvar if shared else case.logvar[k],
            None if case.log_weights is None else case.log_weights[k],
            case.grad[m],
            None if case.exclude is None else case.exclude[m],
        )


def run_on(rank: int, case: Case, sharding: Sharding) -> Result | None:
    """What a rank gets; the first ranks of the world take part."""
    group = group_of(len(sharding.components))
    return None if rank >= len(sharding.components) else run_on_all(rank, case, sharding, group)


def run_on_all(rank: int, case: Case, sharding: Sharding, group: Any = None) -> Result:
    """What a rank of the group gets."""
    own = sharding.of(case, rank)
    leaves = [None if v is None else v.clone().requires_grad_() for v in (own.z, own.mu, own.logvar, own.log_weights)]
    log_prob = fastvae.distributed.mixture_log_prob(
        *leaves,
        exclude=own.exclude,
        group=group,
        **sharding.arguments,
    )
    grads = list(torch.autograd.grad(log_prob, [v for v in leaves if v is not None], own.grad))
    if own.log_weights is None:
        grads.append(own.z.new_empty(0))
    return Result(log_prob.detach(), *grads)


def together(case: Case, sharding: Sharding, parts: list[Result | None]) -> Result:
    """The result of the unsharded call, of what the ranks got."""
    of_ranks = [part for part in parts if part is not None]
    assert len(of_ranks) == len(sharding.components)
    own_logvar = case.logvar.ndim == 2 and case.logvar.shape[0] == len(case.mu)
    log_prob, dz, dmu, dlogvar, dlog_weights = (list(values) for values in zip(*of_ranks, strict=True))
    if sharding.rows is None:  # the same bits on all ranks
        for values in (log_prob, dz, [] if own_logvar else dlogvar):
            assert all(same_bits(value, values[0]) for value in values)
        whole = [log_prob[0], dz[0], torch.cat(dmu), torch.cat(dlogvar) if own_logvar else dlogvar[0]]
    else:
        in_all = torch.cat(dlogvar) if own_logvar else torch.stack(dlogvar).sum(0)
        whole = [torch.cat(log_prob), torch.cat(dz), torch.cat(dmu), in_all]
    return Result(*whole, torch.cat(dlog_weights))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.125), b.nan_to_num(0.125))


def received_on(rank: int, case: Case, sharding: Sharding) -> int:
    """The bytes of floating numbers that reach the rank in a call without gradients."""
    from tools.experiments.ranks_check import received_by

    own = sharding.of(case, rank)
    mixture = own.z, own.mu, own.logvar, own.log_weights
    return received_by(lambda: fastvae.distributed.mixture_log_prob(*mixture, **sharding.arguments))


def some_gradients_on(rank: int, case: Case, sharding: Sharding, wanted: list[str]) -> list[Tensor]:
    """The gradients in some of the arguments, in the order of their names; the others need none."""
    own = sharding.of(case, rank)
    leaves = {"z": own.z, "mu": own.mu, "logvar": own.logvar, "log_weights": own.log_weights}
    leaves = {name: v.clone().requires_grad_(name in wanted) for name, v in leaves.items()}
    log_prob = fastvae.distributed.mixture_log_prob(**leaves, **sharding.arguments)
    return list(torch.autograd.grad(log_prob, [leaves[name] for name in wanted], own.grad))


def score_on(rank: int, case: Case, sharding: Sharding) -> tuple[Tensor, Tensor] | None:
    group = group_of(len(sharding.components))
    if rank >= len(sharding.components):
        return None
    own = sharding.of(case, rank)
    return fastvae.distributed.mixture_log_prob_and_score(
        own.z,
        own.mu,
        own.logvar,
        own.log_weights,
        exclude=own.exclude,
        group=group,
        **sharding.arguments,
    )


def kl_on(rank: int, case: Case, sharding: Sharding, q_logvar: Tensor, samples: int | None) -> list[Tensor] | None:
    """z, kl and the gradients of its sum in the posterior and in the rank's components; z of the case is q's mu."""
    group = group_of(len(sharding.components))
    if rank >= len(sharding.components):
        return None
    own = sharding.of(case, rank)
    leaves = [v.clone().requires_grad_() for v in (own.z, q_logvar, own.mu, own.logvar, own.log_weights)]
    z, kl = fastvae.distributed.mixture_kl(
        *leaves, samples, exclude=own.exclude, group=group, generator=torch.Generator().manual_seed(rank)
    )
    return [z.detach(), kl.detach(), *torch.autograd.grad(kl.sum(), leaves)]


def on_mesh(rank: int, case: Case) -> list[Tensor]:
    """Rows over two ranks, components over two: log p(z), and the gradients in the rank's own rows and components."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "components"))
    row, column = mesh.get_coordinate()
    M, K = len(case.z) // 2, len(case.mu) // 2
    m, k = slice(row * M, (row + 1) * M), slice(column * K, (column + 1) * K)
    leaves = [v.clone().requires_grad_() for v in (case.z[m], case.mu[k], case.logvar[k], case.log_weights[k])]
    log_prob = fastvae.distributed.mixture_log_prob(*leaves, group=mesh.get_group("components"))
    dz, *grads = torch.autograd.grad(log_prob, leaves, case.grad[m])
    for grad in grads:  # what data parallelism does
        dist.all_reduce(grad, group=mesh.get_group("rows"))
    return [log_prob.detach(), dz, *grads]


def with_dtensors(
    rank: int, case: Case, two_dimensional: bool, z_placements: list[str], shared: bool, exchange: str
) -> list[Tensor]:
    """log p(z), the score and all gradients as full tensors."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2) if two_dimensional else (WORLD,))
    of = {"shard": Shard(0), "replicate": Replicate()}
    components = [Replicate(), Shard(0)] if two_dimensional else [Shard(0)]
    points = [of[name] for name in z_placements]
    everywhere = [Replicate()] * mesh.ndim
    placed = [
        distribute_tensor(value, mesh, placements).detach().requires_grad_()
        for value, placements in (
            (case.z, points),
            (case.mu, components),
            (case.logvar, everywhere if shared else components),
            (case.log_weights, components),
        )
    ]
    exclude = distribute_tensor(case.exclude, mesh, points)
    log_prob = fastvae.distributed.mixture_log_prob(*placed, exclude=exclude, exchange=exchange)
    (log_prob * distribute_tensor(case.grad, mesh, points)).sum().backward()
    again, score = fastvae.distributed.mixture_log_prob_and_score(*placed, exclude=exclude, exchange=exchange)
    assert same_bits(again.to_local(), log_prob.to_local())
    assert all(leaf.grad.placements == leaf.placements for leaf in placed)  # as an optimiser takes them
    return [value.detach().full_tensor() for value in (log_prob, score, *(leaf.grad for leaf in placed))]


def wrong_dtensors_told(rank: int, case: Case, size: int) -> list[str]:
    """The error of each call in which the arguments of rank 0 alone are wrong; a rank past `size` takes no part."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    group = group_of(size)
    if rank >= size:
        return []
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    mu, logvar, log_weights = (
        distribute_tensor(value, mesh, [Shard(0)]) for value in (case.mu, case.logvar, case.log_weights)
    )
    right = {"z": case.z, "mu": mu, "logvar": logvar, "log_weights": log_weights}
    everywhere = distribute_tensor(case.log_weights, mesh, [Replicate()])
    errors = []
    for wrong in ({"log_weights": log_weights.to_local()}, {"log_weights": everywhere}, {"group": group}):
        try:
            fastvae.distributed.mixture_log_prob(**right | (wrong if rank == 0 else {}))
            errors.append("no error")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def told(rank: int, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """The error of the rank's own call, one of `calls`; a rank without one takes no part."""
    group = group_of(len(calls))
    if rank >= len(calls):
        return ""
    name, arguments = calls[rank]
    try:
        getattr(fastvae.distributed, name)(**arguments, group=group)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def lose_a_rank(rank: int, case: Case, sharding: Sharding, how: str) -> str:
    """The last rank ends, or answers no more; the error of the others.

    Args:
        how: "killed" or "silent", "before" or "in", "forward" or "backward".  In is with the first messages sent.
    """
    way, when, where = how.split()
    group = dist.new_group(timeout=datetime.timedelta(seconds=10))  # as connecting on a busy machine takes
    dist.barrier()  # all are connected before one is lost
    group.set_timeout(datetime.timedelta(seconds=3))  # of all but the messages of a ring, which keep the first one

    def end(*_: Any) -> None:
        if way == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)  # until the test kills the process

    def come_to(pass_: str) -> None:
        if rank == len(sharding.components) - 1 and pass_ == where:
            if when == "before":
                end()
            Link.finish = end  # type: ignore[method-assign]

    own = sharding.of(case, rank)
    z, mu = own.z.clone().requires_grad_(), own.mu.clone().requires_grad_()
    try:
        come_to("forward")
        loss = fastvae.distributed.mixture_log_prob(z, mu, own.logvar, group=group, **sharding.arguments).sum()
        come_to("backward")
        loss.backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.logvar = torch.nn.Linear(6, 3), torch.nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu(x), self.logvar(x)


def model(make_prior: Any) -> fastvae.VAE:
    torch.manual_seed(0)
    encoder = Encoder()
    return fastvae.VAE(encoder, torch.nn.Linear(3, 6), make_prior(encoder))


def train_exemplars(rank: int, data: Tensor, shares: list[int], batch: list[list[int]]) -> dict[str, Any]:
    """A step of DistributedDataParallel with the exemplars sharded; gradients, the loss, and samples."""
    group = dist.new_group()
    first = sum(shares[:rank])
    vae = model(
        lambda encoder: fastvae.distributed.ShardedExemplarPrior(
            encoder, data[first : first + shares[rank]], group=group, shared_variance=True, chunk_size=4
        )
    )
    ddp = torch.nn.parallel.DistributedDataParallel(vae)
    index = torch.tensor(batch[rank])
    torch.manual_seed(1 + rank)
    loss = ddp(data[index], index=index).loss
    loss.backward()
    with torch.no_grad():
        log_prob = vae.prior.log_prob(torch.zeros(2, 3) + rank)
    return {
        "loss": loss.detach(),
        "log_prob": log_prob,
        "samples": vae.prior.sample(100 * (rank + 1)),
        **{name: p.grad for name, p in vae.named_parameters()},
    }


def wrong_calls_of_exemplars(rank: int) -> list[str]:
    """The errors on all ranks where the last rank's arguments are wrong."""
    prior = model(lambda encoder: fastvae.distributed.ShardedExemplarPrior(encoder, torch.rand(3, 6))).prior
    wrong, z, right = rank == WORLD - 1, torch.zeros(2, 3), torch.tensor([0, 1])
    calls: list[Callable[[], Any]] = [
        lambda: prior.sample(-1 if wrong else 2),
        lambda: prior.sample(2.5 if wrong else 2),
        *(
            lambda index=index: prior.kl(z, z, index=index if wrong else right)
            for index in (torch.tensor([0]), torch.tensor([0, 1, 2]), right.float(), [0, 1])
        ),
    ]
    errors = []
    for call in calls:
        try:
            call()
            errors.append("no error")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors
