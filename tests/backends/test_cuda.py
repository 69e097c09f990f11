"""The CUDA kernels: the host side, races, launches, and what all backends are not tested for.

Their values are tested with every other backend's, where "cuda-emulated" runs their source on the CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import Case, Result, allowance, assert_within, diffuse_case, hard_case, run
from core.test_operators import inputs
from emulation import cuda
from support import internals
from support.internals import Operators
from torch import Tensor

import fastvae

from .test_skipping import concentrated, responsibilities

ROOT = Path(__file__).parents[2]


# The host side.


def test_impl_cuda_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.zeros(2, 3)
    internals.pretend_no_extension(monkeypatch, "the extension was not built")
    for operation, args in (
        (fastvae.mixture_log_prob, (z, z, z)),
        (fastvae.gaussian_rsample, (z, z)),
        (fastvae.gaussian_kl, (z, z)),
    ):
        with pytest.raises(RuntimeError, match=r"impl='cuda'.*not built.*nvcc.*FASTVAE_CUDA=1.*composite"):
            operation(*args, impl="cuda")
    assert "not built" in fastvae.info()["impl='cuda'"]
    internals.pretend(monkeypatch, "cuda", missing=None)
    with pytest.raises(ValueError, match=r"impl='cuda' takes tensors on cuda.* cpu"):
        fastvae.gaussian_kl(z, z, impl="cuda")
    assert internals.choose("cuda", torch.device("cuda")) == "cuda"


def test_a_forked_process_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first call would end in "initialization error"."""
    monkeypatch.setattr("fastvae._torch_compat.forked_from_cuda", lambda: True)
    with pytest.raises(RuntimeError, match=r"impl='cuda' cannot run: this process was forked.*'spawn'"):
        fastvae.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3), impl="cuda")


def test_a_reason_that_passes_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """But that the kernels run is: to ask the driver takes as long as a small kernel."""
    answers = ["out of memory", ""]
    monkeypatch.setattr("fastvae._torch_compat.no_cuda_device", lambda: None)
    monkeypatch.setattr(internals.native, "cuda_not_built", lambda: None)
    monkeypatch.setattr(internals.native, "_usable", set())
    monkeypatch.setattr(torch.ops.fastvae, "cuda_unusable", lambda index: answers.pop(0), raising=False)
    missing, device = internals.native.missing_on_cuda, torch.device("cuda:3")
    assert "do not run on cuda:3 (out of memory)" in str(missing(device))
    assert missing(device) is None and missing(device) is None and not answers


@pytest.mark.usefixtures("compiled")
def test_without_a_gpu_they_say_so() -> None:
    """Built or not, what is missing is named, and so is what to do."""
    if internals.cuda_not_built() is not None or torch.cuda.is_available():
        pytest.skip("the CUDA kernels were not built, or there is a GPU")
    assert torch.ops.fastvae.cuda_unusable(0) != ""  # the runtime's word for it
    with pytest.raises(RuntimeError, match=r"impl='cuda' cannot run: PyTorch finds no CUDA device.*composite"):
        fastvae.gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3), impl="cuda")


@pytest.mark.usefixtures("compiled")
def test_the_kernels_are_built_where_there_is_a_compiler() -> None:
    """And load without a GPU, a driver, or a PyTorch that was built with CUDA."""
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc on the PATH")
    if os.environ.get("FASTVAE_CUDA") == "0":
        pytest.skip("FASTVAE_CUDA=0 built the extension without CUDA")
    assert internals.cuda_not_built() is None
    library = Path(fastvae.__file__).parent / "_C.abi3.so"
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed and "cuda" not in needed


@pytest.mark.parametrize("wanted, told", [("1", "no nvcc"), ("2", "must be 0 or 1")])
def test_asking_for_cuda_in_vain_fails_the_build(wanted: str, told: str, tmp_path: Path) -> None:
    variables = {"FASTVAE_CUDA": wanted, "CUDA_HOME": str(tmp_path), "PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    assert done.returncode != 0 and told in done.stderr


def test_operators_check_what_they_are_given(emulated: Operators) -> None:
    """Past the functional layer: a wrong shape or dtype must not reach a kernel."""
    z, mu, logvar = torch.zeros(5, 3), torch.zeros(4, 3), torch.zeros(4, 3)
    seed = torch.zeros(1, dtype=torch.int64)
    index = torch.zeros(5, dtype=torch.int64)
    for args, told in (
        ((z, mu[:, :2], logvar, None, None), "contiguous"),
        ((z, torch.zeros(4, 2), torch.zeros(4, 2), None, None), "want z"),
        ((z, mu, torch.zeros(3, 3), None, None), "want logvar"),
        ((z, mu, logvar, torch.zeros(3), None), "want log_weights"),
        ((z, mu, logvar, None, index[:4].clone()), "want contiguous int64 exclude"),
        ((z, mu.double(), logvar, None, None), "one dtype"),
        ((z.half(), mu.half(), logvar.half(), None, None), "float32 or float64"),
        ((torch.zeros(3), mu, logvar, None, None), "want z"),
    ):
        with pytest.raises(RuntimeError, match=told):
            emulated.mixture_log_prob(*args)
    with pytest.raises(RuntimeError, match="want grad and log_prob"):
        emulated.mixture_log_prob_backward(z[0], z[0], z, mu, logvar, None, None, True, True, True, True, True)
    with pytest.raises(RuntimeError, match="want mu and logvar"):
        emulated.gaussian_rsample(z, mu, seed, 1)
    with pytest.raises(RuntimeError, match="int64 seed"):
        emulated.gaussian_rsample(z, z, torch.zeros(1), 1)
    with pytest.raises(RuntimeError, match="want grad_z"):
        emulated.gaussian_rsample_backward(torch.zeros(2, 4, 3), torch.zeros(2, 5), z, seed, False)
    for args, told in (
        ((z, z[:4], seed, 1, mu, logvar, None, None), "want mu and logvar"),
        ((z, z, seed, 1, mu[:, :2].clone(), logvar[:, :2].clone(), None, None), "want z"),
        ((z, z, seed, 2, mu, logvar, None, index), "want contiguous int64 exclude"),
        ((z, z, torch.zeros(1), 1, mu, logvar, None, None), "int64 seed"),
    ):
        with pytest.raises(RuntimeError, match=told):
            emulated.mixture_kl(*args, False)
    for grad_z, grad_kl, log_prob, score in (
        (None, z[:4, 0].clone(), z[:, 0].clone(), z),
        (None, z[:, 0].clone(), z[:4, 0].clone(), z),
        (None, z[:, 0].clone(), z[:, 0].clone(), z[:4]),
        (z[:4], z[:, 0].clone(), z[:, 0].clone(), z),
    ):
        with pytest.raises(RuntimeError, match=r"want z and grad_z \[S, M, D\]"):
            emulated.mixture_kl_backward(
                *(grad_z, grad_kl, z, seed, False, z[None], log_prob, score, mu, logvar, None, None),
                *(False, True, True, True, True),
            )


@pytest.mark.parametrize("name", internals.NAMES)
def test_opcheck(emulated: Operators, name: str) -> None:
    """Schema, aliasing and fakes agree with what the host side returns."""
    for args in inputs(name):
        torch.library.opcheck(getattr(emulated, name), args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_cpu_kernels_compute_what_device_math_does(emulated: Operators, dtype: torch.dtype) -> None:
    """Philox and Box-Muller, the density and its online logsumexp, from two sources: only roundings differ."""
    case, seed = hard_case(70, 90, 37, dtype=dtype), torch.tensor([11])
    components = case.mu, case.logvar, case.log_weights, None
    of_cpu, of_header = (
        (*kernels.gaussian_rsample(case.mu, case.logvar, seed, 3), kernels.mixture_log_prob(case.z, *components))
        for kernels in (internals.operators_of("cpu"), emulated)
    )
    rounding, sigma = torch.finfo(dtype).eps, (0.5 * case.logvar).exp()
    noise = 4 * 2.0**-23 * 6  # some roundings of float32, in which all noise is made; below 6 there is all of it
    assert bool(((of_cpu[0] - of_header[0]).abs() <= noise * sigma + rounding * case.mu.abs()).all())
    torch.testing.assert_close(of_cpu[1], of_header[1], rtol=16 * rounding, atol=37 * 6 * noise)
    torch.testing.assert_close(of_cpu[2], of_header[2], rtol=64 * rounding, atol=64 * rounding)


# The kernels, beyond what all backends are tested for.


def everything(ops: Operators, M: int, K: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """What each operator gives for one problem."""
    case = hard_case(M, K, D, dtype=dtype)
    exclude = torch.arange(M) % (K + 1) - 1
    seed = torch.tensor([7])
    results: list[Tensor] = []
    for logvar in (case.logvar, case.logvar[:1].clone()):
        args = (case.z, case.mu, logvar, case.log_weights, exclude)
        log_prob, score = ops.mixture_log_prob_and_score(*args)
        gradients = ops.mixture_log_prob_backward(case.grad, log_prob, *args, False, True, True, True, True)
        results += [log_prob, score, *gradients]
        spread = case.z.clamp(-1, 1)
        together = ops.mixture_kl(case.z, spread, seed, 1, *args[1:], True)
        saved = spread, seed, False, together[0], *together[2:], *args[1:]
        results += [*together, *ops.mixture_kl_backward(None, together[1], *saved, False, True, True, True, True)]
    z, log_q = ops.gaussian_rsample(case.mu, case.logvar, seed, 2)
    results += [z, log_q, *ops.gaussian_rsample_backward(z, log_q, case.logvar, seed, True)]
    kl = ops.gaussian_kl(case.mu, case.logvar)
    return [*results, kl, *ops.gaussian_kl_backward(kl, case.mu, case.logvar)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_no_thread_depends_on_when_another_runs(
    emulated: Operators, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read of shared memory without a barrier after its write would give other bits in another order."""
    results = {}
    for order in ("ascending", "descending", "shuffled"):
        monkeypatch.setenv("FASTVAE_EMULATION_ORDER", order)
        results[order] = everything(emulated, 130, 300, 37, dtype)
    for got in (results["descending"], results["shuffled"]):
        assert all(torch.equal(a, b) for a, b in zip(got, results["ascending"], strict=True))


def launches(operator: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """What an operator gives, and how many kernels it took."""
    before = cuda.launches()
    return operator(*args), cuda.launches() - before


@pytest.mark.parametrize("D", [7, 40])
def test_a_small_problem_takes_one_launch(emulated_small: Operators, D: int) -> None:
    """And its gradients two; where the components share logvar one or two more are for their sum."""
    if torch.cuda.is_available():
        pytest.skip("the emulation counts launches, a GPU does not")
    M, K, seed = 100, 500, torch.tensor([3])
    case = diffuse_case(M, K, D)
    args = case.z, case.mu, case.logvar, None, None
    log_prob, taken = launches(emulated_small.mixture_log_prob, *args)
    assert taken == 1
    _, taken = launches(emulated_small.mixture_log_prob_and_score, *args)
    assert taken == 1
    everything = False, True, True, True, True
    assert launches(emulated_small.mixture_log_prob_backward, case.grad, log_prob, *args, *everything)[1] == 2
    together, taken = launches(emulated_small.mixture_kl, case.z, case.z, seed, 1, *args[1:], True)
    assert taken == 1
    saved = case.z, seed, False, together[0], *together[2:], *args[1:], *everything
    assert launches(emulated_small.mixture_kl_backward, together[0], together[1], *saved)[1] == 2
    shared = case.z, case.mu, case.logvar[:1].clone(), None, None
    assert launches(emulated_small.mixture_log_prob, *shared)[1] == 1
    assert launches(emulated_small.mixture_log_prob_backward, case.grad, log_prob, *shared, *everything)[1] == 3


def test_what_is_small_is_what_the_documentation_says(emulated_small: Operators) -> None:
    """M <= 528, K <= 1024, D <= 512 and K D <= 65,536: at the limits one launch, beyond them more."""
    if torch.cuda.is_available():
        pytest.skip("the emulation counts launches, a GPU does not")
    for M, K, D in ((528, 3, 1), (1, 1024, 2), (2, 2, 512), (1, 1024, 64)):
        assert launches(emulated_small.mixture_log_prob, *arguments(M, K, D))[1] == 1, (M, K, D)
    for M, K, D in ((529, 3, 1), (1, 1025, 2), (2, 2, 513), (1, 1023, 65)):
        assert launches(emulated_small.mixture_log_prob, *arguments(M, K, D))[1] > 1, (M, K, D)


def arguments(M: int, K: int, D: int) -> tuple[Tensor | None, ...]:
    case = hard_case(M, K, D)
    return case.z, case.mu, case.logvar, case.log_weights, None


@pytest.mark.usefixtures("emulated_small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shared", [False, True], ids=["own logvar", "shared logvar"])
def test_small_problems_around_every_edge(dtype: torch.dtype, shared: bool) -> None:
    """A row, or component, a block and several; one turn of a block through the other side, and two; D of one vector
    and not of whole vectors, of one block and more; a component left out for each row."""
    for M, K, D in ((132, 255, 1), (133, 256, 7), (3, 257, 40), (257, 133, 4), (2, 132, 130), (5, 9, 300), (528, 5, 2)):
        case = hard_case(M, K, D, dtype=dtype)
        case = replace(case, exclude=torch.arange(M) % (K + 1) - 1)
        if shared:
            case = replace(case, logvar=case.logvar[0].clone())
        for dense in (False, True):
            assert_within(run(case, "cuda", dense), *allowance(case, dense), f"M={M} K={K} D={D} dense={dense}")


@pytest.mark.usefixtures("emulated_small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_small_and_tiled_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A problem on either side of the limit differs by roundings, and on both it is within its budget."""
    case = diffuse_case(40, 90, 10, dtype=dtype)
    results = []
    for tiles in ("0", "1"):
        monkeypatch.setenv("FASTVAE_TILES", tiles)
        results.append(run(case, "cuda"))
    want, allowed = allowance(case)
    for got in results:
        assert_within(got, want, allowed)
    assert not torch.equal(results[0].log_prob, results[1].log_prob)  # else the variable does nothing


def kl_and_gradients(q: Tensor, prior: Case, S: int, exclude: Tensor | None) -> list[tuple[Tensor, ...]]:
    """z, kl and the gradients of mixture_kl, and of its parts called in turn; q [2, B, D] is mu and three logvar."""
    results = []
    for together in (True, False):
        leaves = [v.clone().requires_grad_() for v in (q[0], q[1] / 3, prior.mu, prior.logvar, prior.log_weights)]
        torch.manual_seed(2)
        if together:
            z, kl = fastvae.mixture_kl(*leaves, S, exclude=exclude, impl="cuda")
        else:
            z, log_q = fastvae.gaussian_rsample(*leaves[:2], S, impl="cuda")
            kl = log_q - fastvae.mixture_log_prob(z, *leaves[2:], exclude=exclude, impl="cuda")
        upstream = torch.linspace(-1, 1, kl.shape[1], dtype=q.dtype, device=q.device)
        loss = (kl.nan_to_num(0, 0, 0) * upstream).sum() + z.square().sum()
        results.append((z, kl, *torch.autograd.grad(loss, leaves)))
    return results


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_drawing_in_the_kernel_is_drawing_before_it(dtype: torch.dtype) -> None:
    """z, kl and all gradients: the bits of sampling and density in turn, for one row a block and for several."""
    for B, S, K, D in ((3, 2, 9, 130), (60, 3, 140, 7), (7, 1, 300, 40), (1, 1, 1, 1)):
        q = torch.stack([diffuse_case(B, 1, D, seed, dtype).z for seed in (0, 1)])
        exclude = torch.arange(S * B).reshape(S, B) % (K + 1) - 1
        results = kl_and_gradients(q, hard_case(1, K, D, dtype=dtype), S, exclude)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (B, S, K, D)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shared", [False, True], ids=["own logvar", "shared logvar"])
def test_many_dimensions_and_splits(dtype: torch.dtype, shared: bool) -> None:
    """Several chunks of dimensions; a split of the components where rows are few, and of the rows the other way."""
    for M, K, D in ((3, 700, 70), (600, 3, 66), (5, 9, 200)):
        case = hard_case(M, K, D, dtype=dtype)
        if shared:
            case = replace(case, logvar=case.logvar[0].clone())
        assert_within(run(case, "cuda", True), *allowance(case, dense_backward=True), f"M={M} K={K} D={D}")


@pytest.mark.usefixtures("emulated")
def test_backward_leaves_out_what_it_may_and_nothing_else() -> None:
    """Exact zeros where no row uses a component, unless dense_backward; the same bits where all is used.

    But for the gradient in z: `dense_backward` computes it in backward, where it otherwise is forward's score.
    """
    case = concentrated()
    used = responsibilities(case.to(torch.float64)).sum(0)
    faint = (used > 1e-30) & (used < 1e-14)
    skipped, dense = run(case, "cuda"), run(case, "cuda", True)
    assert int(faint.sum()) >= 10 and bool((dense.dlog_weights[faint] != 0).all())
    assert bool((skipped.dlog_weights[faint] == 0).all())
    case = diffuse_case(64, 1000, 20)
    skipped, dense = run(case, "cuda"), run(case, "cuda", True)
    assert_within(dense, *allowance(case, dense_backward=True))
    assert all(torch.equal(a, b) for a, b in zip(skipped._replace(dz=dense.dz), dense, strict=True))


def error_at(offset: float) -> Tensor:
    """Of log p, for rows near components that lie `offset` sigmas from the origin."""
    rng = torch.Generator().manual_seed(0)
    mu = torch.randn(40, 10, generator=rng) + offset
    z = mu[:16] + torch.randn(16, 10, generator=rng)
    return fastvae.mixture_log_prob(z, mu, torch.zeros(()), impl="cuda") - fastvae.mixture_log_prob(
        z.double(), mu.double(), torch.zeros((), dtype=torch.float64), impl="reference"
    )


@pytest.mark.usefixtures("emulated")
def test_far_from_the_origin_the_difference_comes_first() -> None:
    """z s - mu s would lose |mu| / sigma roundings: at 1e4 sigmas some 1e-2 nats."""
    for offset in (0.0, 1.0, 10.0, 1e3, 1e4):
        assert float(error_at(offset).abs().max()) < 2e-5, offset


@pytest.mark.parametrize("tiles", ["0", "1"], ids=["small", "tiled"])
def test_a_gpu_gives_what_the_emulation_gives(tiles: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing to look at on a machine with a GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if (why := internals.missing_cuda()) is not None:
        pytest.skip(f"no CUDA kernels: {why}")
    monkeypatch.setenv("FASTVAE_TILES", tiles)
    for dtype in (torch.float32, torch.float64):
        for M, K, D in ((1, 1, 1), (130, 300, 37), (300, 100, 40), (600, 3, 66), (5, 2000, 8)):
            case = hard_case(M, K, D, dtype=dtype)
            want, allowed = allowance(case, dense_backward=True)
            there = {f.name: value.cuda() for f in fields(case) if (value := getattr(case, f.name)) is not None}
            got = run(replace(case, **there), "cuda", True)
            assert_within(Result(*(g.cpu() for g in got)), want, allowed, f"M={M} K={K} D={D}")
            q = torch.randn(2, M, D, dtype=dtype, device="cuda")
            together, apart = kl_and_gradients(q, replace(case, **there), 1, None)
            assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True)), f"M={M} K={K} D={D}"
