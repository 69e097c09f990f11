"""The shapes, strides and gradients that the mixture density takes: broadcasting, leading shapes, subsets."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from budget import Case, allowance, assert_within, hard_case, run
from support.backend import device_of, few_shapes, interpreted
from support.internals import operators_of
from torch import Tensor

import fastvae

NAMES = ("z", "mu", "logvar", "log_weights")


def full(case: Case) -> list[Tensor]:
    assert case.log_weights is not None
    return [case.z, case.mu, case.logvar, case.log_weights]


@pytest.mark.parametrize("shape", [(), (8,), (1, 8), (17, 1), (1, 1), (17, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_logvar_broadcasts_and_its_gradient_has_its_shape(
    impl: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    case = hard_case(9, 17, 8, dtype=dtype)
    logvar = torch.randn(shape, dtype=dtype) - 2
    z = case.mu[:9] + 0.3 * torch.randn(9, 8, dtype=dtype)
    case = replace(case, z=z, logvar=logvar)
    assert_within(run(case, impl, dense_backward=True), *allowance(case, dense_backward=True))


def test_one_variance_for_all_in_many_dimensions(impl: str) -> None:
    """A kernel density: one number; and the same number given for each dimension, or nearly."""
    D = 70 if interpreted(impl) else 150
    z, mu = torch.randn(11, D), torch.randn(40, D)
    each = torch.full((D,), -0.5)
    for logvar in (torch.tensor(1.5), each, torch.cat([each[1:], torch.tensor([2.0])])):
        case = Case(z, mu, logvar, None, torch.randn(11))
        assert_within(run(case, impl, dense_backward=True), *allowance(case, dense_backward=True))


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1), (2, 1), (1, 2)], ids=str)
def test_small_logvars_are_not_mistaken_for_shared_ones(impl: str, shape: tuple[int, ...]) -> None:
    """K = 1 or D = 1, where one shape can be read in two ways."""
    for K, D in ((1, 1), (1, 2), (2, 1), (2, 2)):
        try:
            torch.empty(shape).expand(K, D)
        except RuntimeError:
            continue
        case = Case(
            torch.randn(3, D),
            torch.randn(K, D),
            torch.randn(shape),
            torch.randn(K),
            torch.tensor([1.0, -2.0, 0.5]),
        )
        assert_within(run(case, impl, dense_backward=True), *allowance(case, dense_backward=True), f"{K} {D}")


@pytest.mark.parametrize("lead", [(), (1,), (6,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_leading_shapes(impl: str, lead: tuple[int, ...]) -> None:
    """Any batch shape is the flattened batch, reshaped: values, score, exclude and gradients."""
    case = hard_case(max(1, 6), 17, 3)
    n = torch.Size(lead).numel()
    exclude = torch.arange(-1, 5)[:n]
    flat, weight = case.z[:n].clone().requires_grad_(), case.grad[:n]
    shaped = case.z[:n].reshape(*lead, 3).clone().requires_grad_()
    rest = (case.mu, case.logvar, case.log_weights)
    want, want_score = fastvae.mixture_log_prob_and_score(flat, *rest, exclude=exclude, impl=impl)
    got, score = fastvae.mixture_log_prob_and_score(shaped, *rest, exclude=exclude.reshape(lead), impl=impl)
    assert got.shape == lead and score.shape == (*lead, 3)
    assert torch.equal(got.flatten(), want) and torch.equal(score.reshape(n, 3), want_score)
    (dwant,) = torch.autograd.grad(want, flat, weight)
    (dgot,) = torch.autograd.grad(got, shaped, weight.reshape(lead))
    assert torch.equal(dgot.reshape(n, 3), dwant)


def test_an_empty_batch_gives_zero_parameter_gradients(impl: str) -> None:
    case = hard_case(0, 17, 3)
    got = run(case, impl)
    assert got.log_prob.shape == (0,) and got.dz.shape == (0, 3)
    for gradient, leaf in zip(got[2:], full(case)[1:], strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same numbers, laid out otherwise."""
    junk = torch.nan if tensor.is_floating_point() else 10**6
    if how == "transposed":
        return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor
    if how == "sliced":
        wide = tensor.new_full([2 * n + 3 for n in tensor.shape], junk)
        wide[tuple(slice(1, 1 + 2 * n, 2) for n in tensor.shape)] = tensor
        return wide[tuple(slice(1, 1 + 2 * n, 2) for n in tensor.shape)]
    offset = tensor.new_full((tensor.numel() + 1,), junk)  # no longer aligned to more than one element
    offset[1:] = tensor.flatten()
    return offset[1:].view(tensor.shape)


@pytest.mark.parametrize("how", ["transposed", "sliced", "offset"])
def test_strides(impl: str, how: str) -> None:
    """Bits do not depend on the layout, and nothing is read from between the elements."""
    case = hard_case(9, 17, 8)
    case = replace(case, exclude=torch.arange(9))
    other = replace(case, **{name: strided(getattr(case, name), how) for name in (*NAMES, "grad", "exclude")})
    assert how == "offset" or not other.z.is_contiguous()
    want = run(case, impl)
    leaves = [v.detach().requires_grad_() for v in full(other)]  # no clone, which could undo the layout
    log_prob = fastvae.mixture_log_prob(*leaves, exclude=other.exclude, impl=impl)
    for got, expected in zip((log_prob, *torch.autograd.grad(log_prob, leaves, other.grad)), want, strict=True):
        assert torch.equal(got, expected)


def test_expanded_inputs(impl: str) -> None:
    """Stride zero in z, mu and the weights; their gradients add up over what was expanded."""
    row = torch.randn(1, 3, requires_grad=True)
    centre = torch.randn(1, 3, requires_grad=True)
    weight = torch.full((1,), -1.5, requires_grad=True)
    args = (row.expand(9, 3), centre.expand(17, 3), torch.zeros(3), weight.expand(17))
    got = fastvae.mixture_log_prob(*args, impl=impl)
    want = fastvae.mixture_log_prob(*(a.detach().contiguous() for a in args), impl=impl)
    assert torch.equal(got, want)
    got.sum().backward()
    assert row.grad is not None and centre.grad is not None and weight.grad is not None
    # all components are one Gaussian, so dl/dz = mu - z for each of the 9 rows, and the weights' gradient is
    # 1 a row; 9 x 17 responsibilities of 1 / 17 are summed, each of relative error 4u at most
    assert torch.allclose(row.grad, 9 * (centre - row).detach(), rtol=1e-5, atol=0)
    assert torch.allclose(centre.grad, -row.grad, rtol=1e-5, atol=0)
    assert torch.allclose(weight.grad, torch.tensor([9.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("upstream", ["negative", "zero", "expanded", "scalar"])
def test_upstream_gradients(impl: str, upstream: str) -> None:
    case = hard_case(9, 33, 5)
    if upstream in ("negative", "zero"):
        case = replace(case, grad=-case.grad.abs() - 0.1 if upstream == "negative" else torch.zeros(9))
        assert_within(run(case, impl, dense_backward=True), *allowance(case, dense_backward=True))
        return
    want = run(replace(case, grad=torch.full((9,), 3.0)), impl)
    leaves = [v.clone().requires_grad_() for v in full(case)]
    log_prob = fastvae.mixture_log_prob(*leaves, impl=impl)
    if upstream == "scalar":
        grads = torch.autograd.grad(3 * log_prob.sum(), leaves)
    else:
        grads = torch.autograd.grad(log_prob, leaves, torch.tensor(3.0).expand(9))
    assert all(torch.equal(g, w) for g, w in zip(grads, want[1:], strict=True))


@pytest.mark.parametrize("dense", [False, True], ids=["default", "dense"])
def test_only_the_gradients_asked_for(impl: str, dense: bool) -> None:
    """All fifteen subsets: the others stay None, these are what the full backward gives, to rounding."""
    case = hard_case(9, 33, 5)
    want = run(case, impl, dense)
    _, allowed = allowance(case, dense)
    subsets = list(itertools.product((False, True), repeat=4))
    for wanted in subsets[::3] if few_shapes(impl) and dense else subsets:
        leaves = [v.clone().requires_grad_(need) for v, need in zip(full(case), wanted, strict=True)]
        log_prob = fastvae.mixture_log_prob(*leaves, dense_backward=dense, impl=impl)
        assert log_prob.requires_grad == any(wanted)
        if any(wanted):
            log_prob.backward(case.grad)
        for name, leaf, need, w, limit in zip(NAMES, leaves, wanted, want[1:], allowed[1:], strict=True):
            if not need:
                assert leaf.grad is None, f"{name} of {wanted}"
            else:
                assert leaf.grad is not None
                assert bool(((leaf.grad - w).abs() <= limit).all()), f"{name} of {wanted}"


def test_operators_return_empty_for_what_was_not_asked(each_impl: str) -> None:
    """The operator itself does not compute, or allocate, a gradient that nobody wants."""
    case = hard_case(9, 33, 5)
    op = operators_of(each_impl)
    grad, *leaves = (v.to(device_of(each_impl)) for v in (case.grad, *full(case)))
    log_prob = op.mixture_log_prob(*leaves, None)
    for wanted in itertools.product((False, True), repeat=4):
        grads = op.mixture_log_prob_backward(grad, log_prob, *leaves, None, True, *wanted)
        for gradient, leaf, need in zip(grads, leaves, wanted, strict=True):
            assert gradient.numel() == (leaf.numel() if need else 0)


def test_gradcheck(impl: str) -> None:
    """Against finite differences, with a shared logvar, an excluded component and one of weight zero."""
    # each input is moved twice, each time a call: interpreted, of half as many
    M, K, D = (2, 4, 2) if interpreted(impl) else (4, 5, 3)
    mu, z = 0.5 * torch.randn(K, D, dtype=torch.float64), torch.randn(M, D, dtype=torch.float64)
    weights = torch.tensor([-1.0, -2.0, -torch.inf, -0.5, -1.5], dtype=torch.float64)[:K]
    exclude = torch.tensor([-1, 0, 3, -1])[-M:]
    logvars = z.new_full((K, D), 0.3), z.new_tensor([0.1, -0.2, 0.3])[:D], z.new_tensor(0.2)
    for logvar in logvars[:2] if interpreted(impl) else logvars:
        inputs = [v.clone().requires_grad_() for v in (z, mu, logvar)]

        def density(*args: Tensor) -> Tensor:
            return fastvae.mixture_log_prob(*args, weights, exclude=exclude, impl=impl)

        assert torch.autograd.gradcheck(density, inputs)
    finite = torch.tensor([-1.0, -2.0, -3.0, -0.5, -1.5], dtype=torch.float64)[:K].requires_grad_()
    assert torch.autograd.gradcheck(lambda w: fastvae.mixture_log_prob(z, mu, z.new_zeros(()), w, impl=impl), finite)


def test_double_backward_raises(each_impl: str) -> None:
    """A gradient penalty must not be left out of the gradient in silence, whatever else is in the sum."""
    case = hard_case(4, 5, 3)
    z, mu = case.z.clone().requires_grad_(), case.mu.clone().requires_grad_()
    for leaves in ((z,), (z, mu)):
        log_prob = fastvae.mixture_log_prob(z, mu if len(leaves) == 2 else case.mu, case.logvar, impl=each_impl)
        grads = torch.autograd.grad(log_prob.sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once|twice|second"):
            (log_prob.sum() + grads[0].square().sum()).backward()
