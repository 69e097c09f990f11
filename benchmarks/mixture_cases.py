"""The density of a mixture: forward, forward + backward, and with the gradient in z alone.

    log p(z) = logsumexp_k [ log w_k + sum_d log N(z_d; mu_kd, exp(logvar_kd)) ]

Every contender is verified first, at full size: log p of some rows against float64, and with an upstream gradient
that is 1 for those rows and 0 elsewhere all its gradients too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastvae import reference

from . import inputs as make_inputs
from .case import Case, Contender, Errors, Prepared, WrongResultError
from .inputs import MixtureInputs
from .memory import memory_limit
from .peer import MixtureLogProb, Peer
from .probe import copy_meter, multiply_add_meter

FORWARD, BACKWARD, BACKWARD_Z = "forward", "forward + backward", "forward + backward in z"
WORKS = (FORWARD, BACKWARD, BACKWARD_Z)
FLOPS = 4  # for a row, a component and a dimension: two multiply-adds, of the difference form
_NAMES = ("z", "mu", "logvar", "log_weights")
_REFERENCE_ELEMENTS = 1 << 25  # rows x components x dimensions to verify
_SHARED = "fastvae-shared"  # the contender that is given one variance once
_CHUNK_ELEMENTS = 1 << 24  # of those at a time in float64

Result = tuple[Tensor, tuple[Tensor, ...]]


def mixture_case(
    work: str,
    source: str,
    shape: tuple[int, int, int],
    peers: Iterable[Peer],
    *,
    device: str = "cpu",
    shared: bool = False,
    series: str | None = None,
    too_slow: Callable[[Mapping[str, Any], str], str | None] = lambda earlier, name: None,
) -> Case:
    """One work on one problem.

    Args:
        work: one of WORKS.
        source: "diffuse", "concentrated" or a file, see `inputs`.
        shape: (M, K, D).
        peers: who is to do it.
        shared: one variance for all components; "fastvae" is then given it K times, "fastvae-shared" once.
        series: what the case is a point of, if it is.
        too_slow: (results of the cases before, name) -> why that contender need not run, or None.
    """
    peers = [*peers]
    if shared:
        general = next(peer for peer in peers if peer.name == "fastvae")
        peers = [general, replace(general, name=_SHARED)]
    M, K, D = shape
    facts = {"suite": "mixture", **({"series": series} if series else {}), "work": work}
    facts |= {"inputs": make_inputs.label(source) + (", shared variance" if shared else "")}
    sizes = {"M": M, "K": K, "D": D}

    def prepare(earlier: Mapping[str, Any]) -> Prepared:
        data = make_inputs.make(source, M, K, D)
        if shared:
            data = replace(data, logvar=data.logvar[:1].expand(K, D).contiguous())
        check = Verification(data, work, shared)
        here = data.to(device)
        limit = memory_limit(device)
        contenders, absent = [], {}
        torch.compiler.reset()  # what was compiled for another shape must not be made general for this one
        for peer in peers:
            if why := peer.missing(device):
                absent[peer.name] = ("missing", why)
            elif why := peer.unfit(device, M, K, D, work != FORWARD, limit) or too_slow(earlier, peer.name):
                absent[peer.name] = ("skipped", why)
            else:
                given = replace(here, logvar=here.logvar[0]) if peer.name == _SHARED else here
                contenders.append(_contender(peer, given, work, check))
        return Prepared(contenders, absent, _meters(peers, device), facts=check.facts)

    return Case({**facts, **sizes}, tuple(peer.name for peer in peers), prepare)


def _meters(peers: Sequence[Peer], device: str) -> dict[str, Callable[[], float]]:
    if device != "cpu":
        return {}
    meters = {"multiply_add": multiply_add_meter(), "copy": copy_meter()}
    isas = {peer.environment.get("FASTVAE_CPU_ISA") for peer in peers} - {None}
    meters |= {f"multiply_add_{isa}": multiply_add_meter(str(isa)) for isa in sorted(map(str, isas))}
    return {name: meter for name, meter in meters.items() if meter is not None}


def _contender(peer: Peer, data: MixtureInputs, work: str, check: Verification) -> Contender:
    log_prob: MixtureLogProb = peer.log_prob
    if peer.compiled:
        log_prob = torch.compile(log_prob, dynamic=False)
    M = len(data.z)
    wanted = _differentiated(work)
    tensors = [
        getattr(data, name).clone().requires_grad_(name in wanted) if wanted else getattr(data, name) for name in _NAMES
    ]
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    mean = torch.full((M,), 1 / M, device=data.z.device)

    def run(upstream: Tensor = mean) -> Result:
        with _environment(peer.environment):
            if not leaves:
                with torch.no_grad():
                    return log_prob(*tensors), ()
            value = log_prob(*tensors)
            return value, torch.autograd.grad(value, leaves, upstream)

    return Contender(
        peer.name,
        run,
        lambda result: check(result, peer.allowed_error, peer.normalizes),
        first=lambda: run(check.upstream.to(mean)),
        builds=peer.compiled or peer.needs_compiler,
    )


def _differentiated(work: str) -> tuple[str, ...]:
    return {FORWARD: (), BACKWARD: _NAMES, BACKWARD_Z: ("z",)}[work]


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while; nothing at all where there are none."""
    if not variables:
        yield
        return
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Verification:
    """What the result has to be on some rows, spread evenly over M: log p, and gradients of its sum over them.

    Attributes:
        upstream: [M], 1 for the rows that are verified and 0 for the others.
        facts: how concentrated the inputs are, for the record.
    """

    def __init__(self, data: MixtureInputs, work: str, shared: bool = False) -> None:
        M, (K, D) = len(data.z), data.mu.shape
        count = min(M, 256, max(4, _REFERENCE_ELEMENTS // (K * D)))
        self.rows = torch.linspace(0, M - 1, count).round().long()
        self.upstream = torch.zeros(M).index_fill_(0, self.rows, 1.0)
        self._names = _differentiated(work)
        self._shared = (
            shared  # one logvar, whose gradient is the sum over the components, in whatever shape it was given
        )
        self._weights = torch.softmax(data.log_weights.double(), 0)  # [K]
        exact = [getattr(data, name).double() for name in _NAMES]
        leaves = [exact[_NAMES.index(name)].requires_grad_() for name in self._names]
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        log_prob, live = [], 0
        for rows in self.rows.split(max(1, _CHUNK_ELEMENTS // (K * D))):
            a = reference.component_log_prob(exact[0][rows], *exact[1:])  # [rows, K]
            value = torch.logsumexp(a, -1)
            live += int((a.detach() - value.detach()[:, None] > _negligible(K)).sum())
            if leaves:
                for total, part in zip(gradients, torch.autograd.grad(value.sum(), leaves), strict=True):
                    total += part
            log_prob.append(value.detach())
        self._log_prob = torch.cat(log_prob)  # [rows]
        self._gradients = dict(zip(self._names, gradients, strict=True))
        self.facts = {"live_pairs": live / (count * K), "rows_verified": count}

    def __call__(self, result: Result, allowed: float, normalizes: bool = False) -> Errors:
        """The errors of a result: log p in nats, gradients as fractions of their largest element.

        Raises:
            WrongResultError: one of them is beyond `allowed`, or something is not finite or not of its shape.
        """
        log_prob, gradients = result
        if log_prob.shape != self.upstream.shape:
            raise WrongResultError(f"log p has shape {list(log_prob.shape)}, not {list(self.upstream.shape)}")
        got = log_prob.detach().cpu()[self.rows].double()
        errors = {"log_prob": float((got - self._log_prob).abs().max())}
        # What float32 cannot tell apart is no error, however large log p is.
        room = {"log_prob": allowed + 1e-6 * float(self._log_prob.abs().max())}
        for name, gradient in zip(self._names, gradients, strict=True):
            want = self._gradients[name]
            if normalizes and name == "log_weights":
                want = want - self._weights * want.sum()
            if self._shared and name == "logvar":
                want, gradient = want.sum(0), gradient.detach().reshape(-1, want.shape[1]).sum(0)
            off = float((gradient.detach().cpu().double() - want).abs().max())
            errors[name], room[name] = off / max(float(want.abs().max()), 1e-30), allowed
        for name, error in errors.items():
            if not error <= room[name]:
                what = "log p is off by" if name == "log_prob" else f"the gradient in {name} is off by a fraction of"
                raise WrongResultError(f"{what} {error:.3g}, more than the {room[name]:.3g} that is allowed it")
        return errors


def _negligible(K: int) -> float:
    """log(2^-24 / K): a responsibility below it may be left out, see `fastvae.mixture_log_prob`."""
    return float(torch.tensor(2.0**-24 / K, dtype=torch.float64).log())
