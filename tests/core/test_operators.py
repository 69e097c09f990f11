"""Registration apart from numerics: schemas, fakes, torch.compile, autocast and no_grad."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.backend import device_of
from support.internals import (
    EXPONENT_NAMES,
    NAMES,
    autograd_functions,
    choose,
    exponent_operators,
    exponents_per_row,
    operators_of,
)
from torch import Tensor

import fastvae

Operation = Callable[..., tuple[Tensor, ...]]
# Of z, mu, logvar, log_weights; and of the posterior, mu, logvar, log_weights.
WANTED = (True, True, True, True), (False, True, False, True), (True, False, True, False)
WANTED_OF_KL = (True, True, True, True), (True, False, False, False), (False, True, False, True)


def mixture_arguments(dtype: torch.dtype, M: int, K: int, D: int, shared: bool, optional: bool) -> tuple[Any, ...]:
    log_weights = torch.log_softmax(torch.randn(K, dtype=dtype), 0) if optional else None
    exclude = torch.arange(M) % (K + 1) - 1 if optional else None
    logvar = torch.randn(1 if shared else K, D, dtype=dtype)
    return torch.randn(M, D, dtype=dtype), torch.randn(K, D, dtype=dtype), logvar, log_weights, exclude


def inputs(name: str) -> Iterator[tuple[Any, ...]]:
    """Some arguments for the operator of that name: both dtypes, empty batches, every kind of optional.

    Which gradients are wanted goes around: each choice occurs with each dtype.
    """
    seed = torch.tensor([1234])
    turn = 0
    for dtype in (torch.float32, torch.float64):
        for M, K, D, shared, optional in (
            (5, 9, 3, False, True),
            (1, 1, 1, True, False),
            (0, 4, 2, True, True),
        ):
            turn += 1
            args = mixture_arguments(dtype, M, K, D, shared, optional)
            per_row, per_element = torch.randn(M, dtype=dtype), torch.randn(M, D, dtype=dtype)
            match name:
                case "mixture_log_prob" | "mixture_log_prob_and_score":
                    yield args
                case "mixture_log_prob_backward":
                    wanted = WANTED[turn % 3]
                    yield (per_row, operators_of("composite").mixture_log_prob(*args), *args, True, *wanted)
                case "mixture_log_prob_and_exponents":
                    yield *args, M > 1, exponents_per_row(K)
                case "mixture_log_prob_backward_from_exponents":
                    log_prob, exponents = exponent_operators().mixture_log_prob(*args, True, exponents_per_row(K))
                    for wanted in ((True, True, True, True), (False, True, False, True)):
                        yield per_row, log_prob, exponents, *args, *wanted
                case "gaussian_rsample":
                    yield per_element, per_element, seed, 2
                case "gaussian_rsample_backward":
                    grads = torch.randn(2, M, D, dtype=dtype), torch.randn(2, M, dtype=dtype)
                    yield *grads, per_element, seed, M > 1
                case "gaussian_kl":
                    yield per_element, per_element
                case "gaussian_kl_backward":
                    yield per_row, per_element, per_element
                case "mixture_kl_and_exponents" | "mixture_kl_backward_from_exponents":
                    forward = per_element, 0.1 * per_element, seed, 1, *args[1:]
                    if name == "mixture_kl_and_exponents":
                        yield *forward, M > 1, exponents_per_row(K)
                        continue
                    z, grad_kl, *saved = exponent_operators().mixture_kl(*forward, True, exponents_per_row(K))
                    for wanted in ((True, True, True, True), (False, True, False, True)):
                        grad_z = torch.randn_like(z) if all(wanted) else None
                        yield grad_z, grad_kl, per_element, seed, M > 1, z, *saved, *args[1:], *wanted
                case "mixture_kl" | "mixture_kl_backward":
                    _, *prior, exclude = args
                    of_samples = None if exclude is None else exclude.repeat(2)
                    for score in (False, True):
                        forward = per_element, 0.1 * per_element, seed, 2, *prior, of_samples, score
                        if name == "mixture_kl":
                            yield forward
                            continue
                        z, grad_kl, *saved = operators_of("composite").mixture_kl(*forward)
                        wanted = WANTED_OF_KL[(turn + score) % 3]
                        grad_z = torch.randn_like(z) if all(wanted) else None
                        sampled = per_element, seed, M > 1, z, *saved
                        yield grad_z, grad_kl, *sampled, *prior, of_samples, True, *wanted


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(each_impl: str, name: str) -> None:
    """Schema, aliasing, fakes and dynamic shapes, by PyTorch's own check."""
    for args in inputs(name):
        torch.library.opcheck(getattr(operators_of(each_impl), name), on_device(each_impl, args))


def on_device(impl: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.to(device_of(impl)) if isinstance(a, Tensor) else a for a in args)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", EXPONENT_NAMES)
def test_opcheck_of_what_the_cpu_alone_has(name: str) -> None:
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if "and_exponents" not in name:  # where no tile is, the memory is not written: it is not to be compared
        checks.append("test_aot_dispatch_dynamic")
    for args in inputs(name):
        torch.library.opcheck(getattr(torch.ops.fastvae, name).default, args, test_utils=checks)


def test_both_prefixes_have_the_same_operators() -> None:
    native, plain = operators_of("cpu"), operators_of("composite")
    for name in NAMES:
        of_native, of_plain = getattr(native, name)._schema, getattr(plain, name)._schema
        assert str(of_plain) == str(of_native).replace("fastvae::", "fastvae::composite_")


def mixture(z: Tensor, mu: Tensor, impl: str) -> tuple[Tensor, ...]:
    log_weights = torch.log_softmax(mu.sum(-1), 0)
    return (fastvae.mixture_log_prob(z, mu, 0.1 * mu, log_weights, impl=impl),)


def excluding(z: Tensor, mu: Tensor, impl: str) -> tuple[Tensor, ...]:
    exclude = torch.arange(z.shape[0]) % mu.shape[0]
    return (fastvae.mixture_log_prob(z, mu, torch.zeros(()), exclude=exclude, impl=impl),)


def score(z: Tensor, mu: Tensor, impl: str) -> tuple[Tensor, ...]:
    return fastvae.mixture_log_prob_and_score(z, mu, torch.zeros(3), impl=impl)


def rsample(z: Tensor, mu: Tensor, impl: str) -> tuple[Tensor, ...]:
    return fastvae.gaussian_rsample(z, mu.mean(0), 3, impl=impl)


def sticking(z: Tensor, mu: Tensor, impl: str) -> tuple[Tensor, ...]:
    return fastvae.gaussian_rsample(z, mu.mean(0), path_derivative=True, impl=impl)


def kl(z: Tensor, mu: Tensor, impl: str) -> tuple[Tensor, ...]:
    return (fastvae.gaussian_kl(z, mu.mean(0), impl=impl),)


def sampled_kl(z: Tensor, mu: Tensor, impl: str) -> tuple[Tensor, ...]:
    return fastvae.mixture_kl(z, mu.mean(0), mu, 0.1 * mu, None, 2, impl=impl)


OPERATIONS = [mixture, excluding, score, rsample, sticking, kl, sampled_kl]


def outcome(operation: Operation, z: Tensor, mu: Tensor, impl: str) -> list[Tensor]:
    """Values and gradients, from the same seed each time."""
    z, mu = z.clone().requires_grad_(), mu.clone().requires_grad_()
    torch.manual_seed(3)
    outputs = operation(z, mu, impl)
    differentiable = [o for o in outputs if o.requires_grad]
    torch.manual_seed(4)
    upstream = [torch.randn_like(o) for o in differentiable]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(differentiable, (z, mu), upstream))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_whole_for_every_batch(each_impl: str, operation: Operation) -> None:
    """fullgraph=True: no graph break; one graph for any batch; values and gradients as in eager mode."""
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return aot_eager(graph, example)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    compiled = torch.compile(operation, fullgraph=True, dynamic=True, backend=backend)
    mu = torch.randn(5, 3)
    for M in (4, 7, 12):
        z = torch.randn(M, 3)
        got, want = outcome(compiled, z, mu, each_impl), outcome(operation, z, mu, each_impl)
        assert len(got) == len(want)
        # the same operators on the same bits; what is around them may be fused otherwise
        assert all(torch.allclose(g, w, rtol=1e-5, atol=1e-6) for g, w in zip(got, want, strict=True)), M
    assert graphs == 1


def test_compiles_with_inductor() -> None:
    """The compiler that users have, on the main operation; to it every backend is an opaque call."""
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    impl = choose(None, torch.device("cpu"))
    compiled = torch.compile(mixture, fullgraph=True, dynamic=True)
    mu = torch.randn(5, 3)
    for M in (4, 7):
        z = torch.randn(M, 3)
        for g, w in zip(outcome(compiled, z, mu, impl), outcome(mixture, z, mu, impl), strict=True):
            assert torch.allclose(g, w, rtol=1e-5, atol=1e-6)


def test_compiles_a_vae() -> None:
    """A whole training step, prior and all, in one graph."""
    from models import vae

    torch._dynamo.reset()
    model = vae("vamp")

    def loss(x: Tensor) -> Tensor:
        return model(x).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    model.encoder.rows = model.decoder.rows = []  # type: ignore[assignment]
    x = torch.rand(4, 6)
    results = []
    for step in (loss, compiled):
        model.zero_grad()
        torch.manual_seed(0)
        value = step(x)
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 1 + len(list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*results, strict=True))


def test_autocast_leaves_densities_in_float32(each_impl: str) -> None:
    """bfloat16 products in the networks around it; the density keeps float32, and its bits."""
    z, mu = torch.randn(4, 3), torch.randn(5, 3)
    autocast = partial(torch.autocast, dtype=torch.bfloat16)
    for operation in OPERATIONS:
        want = outcome(operation, z, mu, each_impl)
        with autocast("cpu"), autocast(device_of(each_impl).type):
            got = outcome(operation, z, mu, each_impl)
        assert all(g.dtype == torch.float32 and torch.equal(g, w) for g, w in zip(got, want, strict=True))
    with autocast("cpu"), autocast(device_of(each_impl).type):
        layer = torch.nn.Linear(3, 3)
        encoded = layer(z)
        assert encoded.dtype == torch.bfloat16
        log_prob = fastvae.mixture_log_prob(encoded, mu, torch.zeros(()), impl=each_impl)
        sample, log_q = fastvae.gaussian_rsample(encoded, encoded, impl=each_impl)
        assert log_prob.dtype == log_q.dtype == torch.float32 and sample.dtype == torch.bfloat16
        (log_prob.sum() + log_q.sum()).backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_no_grad(each_impl: str) -> None:
    """Nothing is recorded, and the values are the same."""
    z, mu = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        for operation in OPERATIONS:
            torch.manual_seed(0)
            want = operation(z, mu, each_impl)
            torch.manual_seed(0)
            with mode():
                got = operation(z, mu, each_impl)
            assert not any(g.requires_grad for g in got)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_node_where_nothing_asks_for_a_gradient(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small call would take twice as long; with a gradient to come the Function is called."""

    def apply(*_: Any) -> None:
        raise AssertionError("a Function was applied")

    for function in autograd_functions():
        monkeypatch.setattr(function, "apply", apply)
    z, mu = torch.randn(4, 3), torch.randn(5, 3)
    assert not any(result.requires_grad for result in operation(z, mu, "composite"))
    with pytest.raises(AssertionError, match="applied"):
        operation(z.requires_grad_(), mu, "composite")


def test_meta_tensors_have_shapes() -> None:
    """The fakes serve devices that hold no data."""
    z, mu = torch.empty(4, 2, 3, device="meta"), torch.empty(5, 3, device="meta")
    log_prob, score = fastvae.mixture_log_prob_and_score(z, mu, mu)
    assert log_prob.shape == (4, 2) and score.shape == (4, 2, 3) and score.is_meta
    assert fastvae.gaussian_kl(z, z).shape == (4, 2)
