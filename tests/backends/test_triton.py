"""What is Triton's alone: the precisions and their errors, real tiles, skipping, and where it runs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from budget import Case, allowance, assert_within, difference, diffuse_case, hard_case, run
from product_budget import LOWER, design_case, product_band, run_at
from support import internals
from support.backend import device_of, use_backend
from support.internals import NAMES, choose, interpreted, operators_of, triton_module
from support.patience import PATIENCE
from torch import Tensor

import fastvae
from fastvae import reference

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("triton")

CASES = {
    "sigma 0.05, spread 2": design_case(-6, 2),
    "sigma 0.14, spread 1": design_case(-4, 1),
    "sigma 0.37, spread 1": design_case(-2, 1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", LOWER)
def test_lower_precisions_are_within_their_budget(precision: str, name: str) -> None:
    """Value and all gradients, against float64; and the budget is one that the next lower precision breaks."""
    case = CASES[name]
    exact = case.to(torch.float64)
    want, allowed = run(exact, "reference"), product_band(exact, precision)
    assert_within(run_at(case, precision), want, allowed)
    if precision == "high":
        medium = difference(run_at(case, "medium").log_prob, want.log_prob) / allowed.log_prob
        assert float(medium.max()) > 1


def test_highest_is_the_difference_form() -> None:
    case = CASES["sigma 0.05, spread 2"]
    assert_within(run_at(case, "highest"), *allowance(case))


@pytest.mark.parametrize("precision", LOWER)
def test_an_offset_is_taken_away(precision: str) -> None:
    """Rows and components far from zero lose no more: without an origin a thousand times as much would cancel."""
    case = CASES["sigma 0.37, spread 1"]
    far = replace(case, z=case.z + 64, mu=case.mu + 64)  # 64 + x rounds x to 2^-18
    want = run(far.to(torch.float64), "reference").log_prob
    allowed = product_band(far.to(torch.float64), precision).log_prob
    got = fastvae.mixture_log_prob(far.z, far.mu, far.logvar, far.log_weights, precision=precision, impl="triton")
    assert bool((difference(got, want) <= allowed).all())


@pytest.mark.parametrize("precision", LOWER)
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 65, 8), (16, 64, 16), (33, 130, 70)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_lower_precisions_around_tile_edges(precision: str, shape: tuple[int, int, int], shared: bool) -> None:
    M, K, D = shape
    case = replace(diffuse_case(M, K, D), log_weights=torch.log_softmax(torch.randn(K), 0))
    if shared:
        case = replace(case, logvar=case.logvar[:1])
    exact = case.to(torch.float64)
    want, allowed = run(exact, "reference"), product_band(exact, precision)
    if shared:
        allowed = allowed._replace(dlogvar=allowed.dlogvar.sum(0, keepdim=True))
    for dense in (False, True):
        assert_within(run_at(case, precision, dense), want, allowed, f"dense={dense}")


@pytest.mark.parametrize("precision", LOWER)
def test_lower_precisions_at_the_edges_of_the_contract(precision: str) -> None:
    """exclude, absent components that hold NaN, rows without any component, an empty batch."""
    case = CASES["sigma 0.37, spread 1"]
    exclude = torch.arange(40) - 1
    assert case.log_weights is not None
    weights = case.log_weights.clone()
    weights[40:] = -torch.inf
    mu = case.mu.clone()
    mu[40:] = torch.nan
    args = (mu, case.logvar, weights)
    want = run(replace(case, log_weights=weights, exclude=exclude).to(torch.float64), "reference")
    there = replace(case, mu=case.mu[:40], logvar=case.logvar[:40], log_weights=weights[:40])
    allowed = product_band(there.to(torch.float64), precision)
    leaves = [v.clone().requires_grad_() for v in (case.z, *args)]
    log_prob = fastvae.mixture_log_prob(*leaves, exclude=exclude, precision=precision, impl="triton")
    grads = torch.autograd.grad(log_prob, leaves, case.grad)
    assert bool((difference(log_prob.detach(), want.log_prob) <= 2 * allowed.log_prob).all())
    assert all(bool(torch.isfinite(g).all()) for g in grads) and not any(g[40:].any() for g in grads[1:])
    nothing = torch.full((300,), -torch.inf)
    value, score = fastvae.mixture_log_prob_and_score(
        case.z, mu, case.logvar, nothing, precision=precision, impl="triton"
    )
    assert value.tolist() == [-torch.inf] * 40 and not score.any()
    assert fastvae.mixture_log_prob(case.z[:0], *args, precision=precision, impl="triton").shape == (0,)


@pytest.mark.parametrize("precision", ("highest", *LOWER))
def test_the_tiles_that_users_get(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Not the small ones: a shape that is cut by rows, components and dimensions."""
    monkeypatch.undo()
    if interpreted():
        monkeypatch.setenv("FASTVAE_TILES", "1")
    else:
        use_backend("triton", monkeypatch)
    assert not triton_module("small").is_small(130, 150, 67)  # which has no tiles
    case = diffuse_case(130, 150, 67)
    case = replace(case, log_weights=torch.log_softmax(torch.randn(150), 0))
    exact = case.to(torch.float64)
    want = run(exact, "reference")
    allowed = allowance(case)[1] if precision == "highest" else product_band(exact, precision)
    assert_within(run_at(case, precision), want, allowed)


@pytest.mark.parametrize("form", ("highest", *LOWER, "float64"))
def test_every_tile_that_autotuning_offers(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Values and gradients by each, on any generation, within the budget of the table's."""
    tiles, autotune = triton_module("tiles"), triton_module("autotune")
    precision, dtype = (form, torch.float32) if form != "float64" else ("highest", torch.float64)
    M, K, D = 70, 70, 10
    case = diffuse_case(M, K, D, dtype=dtype)
    case = replace(case, log_weights=torch.log_softmax(torch.randn(K, dtype=dtype), 0))
    want, allowed = allowance(case)
    if form in LOWER:
        allowed = product_band(case.to(torch.float64), form)
    kinds = ("forward", "score", "parameters")
    offered = {
        kind: list(dict.fromkeys(
            tile._replace(warps=4, stages=1)  # no matter to an interpreter
            for arch in (80, 90, 100) for tile in tiles.candidates(kind, precision, D, arch, dtype)[1:]
        )) for kind in kinds
    }  # fmt: skip
    for place in range(max(map(len, offered.values()))):
        chosen = {kind: tile[place % len(tile)] for kind, tile in offered.items()}
        used: list[str] = []

        def choose(kind: str, *rest: object, chosen=chosen, used=used):  # type: ignore[no-untyped-def]
            used.append(kind)
            return chosen[kind]

        monkeypatch.setattr(autotune, "choose", choose)
        assert_within(run_at(case, precision), want, allowed, str(chosen))
        log_prob = fastvae.mixture_log_prob(
            case.z, case.mu, case.logvar, case.log_weights, precision=precision, impl="triton"
        )
        assert bool((difference(log_prob, want.log_prob) <= allowed.log_prob).all()), chosen["forward"]
        assert set(used) == set(kinds)


@pytest.mark.parametrize("precision", ("highest", *LOWER))
def test_tiles_are_skipped_and_only_without_dense(precision: str) -> None:
    """Components that no row uses get exact zeros, and none with dense_backward=True."""
    case = design_case(-1.0, 1.5, M=16, K=512, D=10)
    a = reference.component_log_prob(*(v.double() for v in (case.z, case.mu, case.logvar, case.log_weights)))
    used = torch.softmax(a, -1).amax(0)
    faint = (used > 1e-30) & (used < 2.0**-24 / 512 / 100)
    assert int(faint.sum()) >= 10
    case = replace(case, mu=case.mu, grad=case.grad.abs() + 0.1)
    order = torch.argsort(used)  # the faint ones together, so that whole tiles of them are skipped
    case = replace(case, mu=case.mu[order], logvar=case.logvar[order], log_weights=case.log_weights[order])
    skipped, dense = run_at(case, precision), run_at(case, precision, dense=True)
    assert bool((dense.dlog_weights[faint[order]] != 0).all())
    assert bool((skipped.dlog_weights[faint[order]] == 0).any())
    assert torch.equal(skipped.log_prob, dense.log_prob)


@pytest.mark.parametrize("precision", ("highest", *LOWER))
def test_the_score_of_far_rows_leaves_tiles_out(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Rows 100 sigmas from all components, and 60 nats nearer to those of the first tile than to all others.

    Four tiles of components, of which each block of rows needs the first.  There c - a is 3e5, so that a bound on log t
    that grows as c - a does leaves nothing out.  In dimension 0 the first tile's t is 0: its whole score is that of the
    other tiles, and exactly zero where these are left out.
    """
    M, K, D = 64, 256, 64
    mu = torch.zeros(K, D)
    mu[64:] = -60 / (100 * D)
    mu[64:, 0] = 0.5
    z = torch.full((M, D), 100.0)
    z[:, 0] = 0.0
    case = Case(z, mu, torch.zeros(K, D), torch.zeros(K), torch.ones(M))
    form, active = triton_module("difference" if precision == "highest" else "product"), []
    decide = form.is_active_in_score

    def watch(*about: object) -> bool:
        active.append(bool(decide(*about)))
        return active[-1]

    if interpreted():
        monkeypatch.setattr(form, "is_active_in_score", watch)
    got = run_at(case, precision)
    if interpreted():
        assert active == [True, False, False, False] * (M // 16)
    want, allowed = allowance(case)
    assert 0 < float(want.dz[:, 0].abs().max()) < 2.0**-24
    if precision == "highest":
        assert bool((got.dz[:, 0] == 0).all())
        assert bool((run_at(case, precision, dense=True).dz[:, 0] != 0).all())
    else:
        allowed = product_band(case.to(torch.float64), precision)
    want.dz[:, 0] = 0.0
    assert_within(got, want, allowed)


def test_precision_follows_pytorchs_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is torch's; float64 has one precision; other backends have the highest whatever is asked for."""
    case = CASES["sigma 0.37, spread 1"]
    args = (case.z, case.mu, case.logvar, case.log_weights)
    named = {p: fastvae.mixture_log_prob(*args, precision=p, impl="triton") for p in ("highest", *LOWER)}
    assert not torch.equal(named["high"], named["medium"]) and not torch.equal(named["highest"], named["medium"])
    before = torch.get_float32_matmul_precision()
    try:
        for precision, want in named.items():
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(fastvae.mixture_log_prob(*args, impl="triton"), want)
            assert choose("composite", torch.device("cpu"), torch.float32, None) == "composite"
            assert choose("triton", device_of("triton"), torch.float64, None) == "triton"
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_precision_has_the_mixture_operators() -> None:
    for precision in LOWER:
        for name in NAMES:
            high, highest = getattr(operators_of(f"triton-{precision}"), name), getattr(operators_of("triton"), name)
            assert (high is highest) == name.startswith("gaussian")


def python(script: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CALL = "import torch, fastvae\nz = torch.randn(3, 2)\n"


def test_compiled_kernels_refuse_the_cpu() -> None:
    told = python(
        CALL + "try:\n    fastvae.gaussian_kl(z, z, impl='triton')\nexcept RuntimeError as error:\n    print(error)\n"
    )
    assert "TRITON_INTERPRET=1" in told and "impl='composite'" in told


@pytest.mark.parametrize(("capability", "told"), [((7, 5), "8.0 and newer, and cuda:0 has 7.5"), ((8, 0), None)])
def test_old_gpus_are_left_to_composite(
    capability: tuple[int, int], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On them Triton fails with an error of its own compiler."""
    monkeypatch.setattr("fastvae._torch_compat.no_cuda_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    internals.forget_capabilities()
    try:
        why = internals.BACKENDS["triton"].missing(torch.device("cuda:0"))
        assert why is None if told is None else told in str(why)
        internals.pretend(monkeypatch, "cuda", "not here")
        assert choose(None, torch.device("cuda:0")) == ("triton" if told is None else "composite")
    finally:
        internals.forget_capabilities()


def test_without_triton() -> None:
    """Importing and everything else works; the backend says what would make it run."""
    blocked = (
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else real(name, *rest)\n"
    )
    told = python(
        blocked + CALL + "print(fastvae.info()[\"impl='triton'\"])\nprint(fastvae.gaussian_kl(z, z).shape)\n"
        "try:\n    fastvae.gaussian_kl(z, z, impl='triton')\nexcept RuntimeError as error:\n    print(error)\n"
    )
    assert told.count("pip install triton") == 2 and "torch.Size([3])" in told


def test_importing_fastvae_imports_no_triton() -> None:
    assert python("import sys, fastvae\nfastvae.info()\nprint('triton.language' in sys.modules)").strip() == "False"


def test_shifting_rows_does_not_change_bits_between_runs() -> None:
    """The same call twice, and the same rows among others: splits depend on shapes alone."""
    case = hard_case(33, 200, 9)
    assert all(torch.equal(a, b) for a, b in zip(run(case, "triton"), run(case, "triton"), strict=True))


def noise(seed: int, count: int) -> Tensor:
    device = device_of("triton")
    mu = torch.zeros(1, count, device=device)
    z, _ = operators_of("triton").gaussian_rsample(mu, mu, torch.tensor([seed], device=device), 1)
    return z[0, 0].cpu()


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_the_stream_is_the_specifications(seed: int) -> None:
    """Numbers of the same seed, by blocks of four (D a multiple of 4) and one by one."""
    for count in (64, 63):
        want = reference.philox_normal(torch.tensor([seed]), 0, count)
        assert float((noise(seed, count) - want).abs().max()) < 1e-6


def test_no_kernel_assigns_to_nested_targets() -> None:
    """`a, (b, c) = ...` is what Triton 3.6 cannot hash, so a kernel that has it compiles with later ones only."""
    functions = list(kernel_functions())
    assert len(functions) > 20
    for function in functions:
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Tuple):
                assert not any(isinstance(part, ast.Tuple) for part in target.elts), (function.name, node.lineno)


def kernel_functions(*modules: str) -> Iterator[ast.FunctionDef]:
    """What Triton compiles of the kernels' modules: of those named, or of all."""
    folder = Path(triton_module("noise").__file__ or "").parent
    for file in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())) if not modules or file.stem in modules else ():
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list):
                yield node


def is_product(value: ast.expr, products: set[str]) -> bool:
    """Whether it is x y, or the variable or function of that name is.  A program's number makes an index."""
    match value:
        case ast.BinOp(op=ast.Mult()):
            return "program_id" not in ast.unparse(value)
        case ast.UnaryOp(operand=operand):
            return is_product(operand, products)
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            return name in products
    return False


def sums_of_two_products(modules: tuple[str, ...]) -> list[str]:
    """Every x y + z w and x y - z w, with the function it is in."""
    functions = list(kernel_functions(*modules))
    returning = {
        f.name for f in functions for node in ast.walk(f)
        if isinstance(node, ast.Return) and node.value is not None and is_product(node.value, set())
    }  # fmt: skip
    found = []
    for function in functions:
        products = returning | {
            target.id for node in ast.walk(function) if isinstance(node, ast.Assign) and is_product(node.value, set())
            for target in node.targets if isinstance(target, ast.Name)
        }  # fmt: skip
        for node in ast.walk(function):
            match node:
                case ast.BinOp(left, ast.Add() | ast.Sub(), right) if all(
                    is_product(side, products) for side in (left, right)
                ):
                    found.append(f"{function.name}: {ast.unparse(node)}")
    return found


def test_no_sum_of_two_products_is_left_to_the_compiler() -> None:
    """It may fuse either product with the sum, and did so differently in two kernels that are to give the same bits.

    These are `mixture_kl` and its parts; the functions that they share are in these modules.
    """
    assert sums_of_two_products(("arithmetic", "noise", "gaussian", "small")) == []
