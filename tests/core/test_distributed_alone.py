"""The functions of fastvae.distributed in a group of one process."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from budget import Case, hard_case
from support.patience import PATIENCE
from support.sharded import model, same_bits

import fastvae
import fastvae.distributed


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def arguments(case: Case) -> list[torch.Tensor]:
    assert case.log_weights is not None
    return [v.clone().requires_grad_() for v in (case.z, case.mu, case.logvar, case.log_weights)]


WAYS = [{"rows": "replicated"}, {"rows": "sharded"}, {"rows": "sharded", "exchange": "ring"}]


@pytest.mark.parametrize("way", WAYS, ids=["replicated", "sharded", "ring"])
@pytest.mark.parametrize("impl", ["composite", "cpu", "reference"])
def test_the_same_bits_as_without_a_group(alone: None, impl: str, way: dict[str, str]) -> None:
    if impl == "cpu" and fastvae.info()["extension"] != "built":
        pytest.skip("the extension is not built")
    case = hard_case(9, 20, 3)
    exclude = torch.arange(9) - 1
    results = []
    for module, options in ((fastvae, {}), (fastvae.distributed, way)):
        leaves = arguments(case)
        log_prob = module.mixture_log_prob(*leaves, exclude=exclude, impl=impl, **options)
        both = module.mixture_log_prob_and_score(*leaves, exclude=exclude, impl=impl, **options)
        results.append([log_prob, *both, *torch.autograd.grad(log_prob, leaves, case.grad)])
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_shapes(alone: None, dtype: torch.dtype) -> None:
    """Leading dimensions, strides, half precision, and batches without rows are those of the usual functions."""
    mu, logvar = torch.randn(7, 4, dtype=dtype), torch.zeros((), dtype=dtype)
    for z in (torch.randn(2, 3, 4), torch.randn(4, 5).T, torch.randn(0, 4), torch.randn(4)):
        z = z.to(dtype)
        for way in WAYS:
            got = fastvae.distributed.mixture_log_prob(z, mu, logvar, **way)
            want = fastvae.mixture_log_prob(z, mu, logvar)
            assert got.dtype == want.dtype and got.shape == want.shape
            torch.testing.assert_close(got, want)
            _, score = fastvae.distributed.mixture_log_prob_and_score(z, mu, logvar, **way)
            assert score.shape == z.shape
            sampled, kl = fastvae.distributed.mixture_kl(z, logvar, mu, logvar, num_samples=2, **way)
            assert sampled.dtype == dtype and sampled.shape == (2, *z.shape) and kl.shape == (2, *z.shape[:-1])


def test_rows_of_its_own_draw_the_noise_of_mixture_kl(alone: None) -> None:
    mu, prior = torch.randn(5, 3), torch.randn(8, 3)
    draws = []
    for function, options in ((fastvae.mixture_kl, {}), (fastvae.distributed.mixture_kl, {"rows": "sharded"})):
        torch.manual_seed(3)
        draws.append(function(mu, torch.zeros(3), prior, torch.zeros(()), num_samples=2, **options))
    assert torch.equal(draws[0][0], draws[1][0])
    torch.testing.assert_close(draws[0][1], draws[1][1])


@pytest.mark.parametrize("way", WAYS[1:], ids=["sharded", "ring"])
@pytest.mark.parametrize("impl", ["composite", "reference"])
def test_gradients_have_no_gradients(alone: None, impl: str, way: dict[str, str]) -> None:
    z = torch.randn(3, 2, requires_grad=True)
    log_prob = fastvae.distributed.mixture_log_prob(z, torch.randn(4, 2), torch.zeros(()), impl=impl, **way)
    (dz,) = torch.autograd.grad(log_prob.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        dz.square().sum().backward()


def test_a_compiled_function_makes_the_call_anew(alone: None) -> None:
    """A handshake of the time of tracing must not become part of a graph."""
    mu, logvar = torch.randn(4, 3), torch.zeros(3)

    def shifted(z: torch.Tensor) -> torch.Tensor:
        return fastvae.distributed.mixture_log_prob(2 * z, mu, logvar) + 1

    compiled = torch.compile(shifted, backend="eager")
    for M in (5, 6):
        z = torch.randn(M, 3)
        assert torch.equal(compiled(z), shifted(z))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(shifted, backend="eager", fullgraph=True)(torch.randn(7, 3))


def test_within_a_transform(alone: None) -> None:
    with pytest.raises(NotImplementedError, match="mixture_log_prob cannot be called within a transform"):
        torch.func.vmap(lambda z: fastvae.distributed.mixture_log_prob(z, z, torch.zeros(())))(torch.zeros(2, 3, 4))


def test_without_gradients(alone: None) -> None:
    z, mu, logvar = torch.randn(4, 2), torch.randn(5, 2).requires_grad_(), torch.zeros(2)
    for way in WAYS:
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                log_prob, score = fastvae.distributed.mixture_log_prob_and_score(z, mu, logvar, **way)
            assert not log_prob.requires_grad and not score.requires_grad
        log_prob, score = fastvae.distributed.mixture_log_prob_and_score(z, mu, logvar, **way)
        assert log_prob.requires_grad and not score.requires_grad


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"log_weights": torch.zeros(3)}, r"log_weights must be \[0\] to match mu \[0, 3\], not \[3\]"),
        ({}, "mu must be .K, D. with K >= 1 on one rank at least"),
        ({"mu": torch.zeros(0, 0)}, "mu must be"),
        ({"log_weights": [0.0]}, "log_weights must be a tensor, not list"),
        ({"mu": None}, "mu must be a tensor, not NoneType"),
        ({"exclude": torch.zeros(5)}, "exclude must be an int64 tensor"),
        ({"mu": torch.zeros(4, 3), "precision": "low"}, "precision must be one of"),
    ],
)
def test_bad_input_is_named(alone: None, changed: dict[str, object], message: str) -> None:
    call = {"z": torch.zeros(5, 3), "mu": torch.zeros(0, 3), "logvar": torch.zeros(3)} | changed
    with pytest.raises((TypeError, ValueError), match=message):
        fastvae.distributed.mixture_log_prob(**call)


def test_bad_input_of_the_exemplar_prior_is_named(alone: None) -> None:
    with pytest.raises(ValueError, match="N >= 2 points on all ranks"):
        fastvae.distributed.ShardedExemplarPrior(torch.nn.Identity(), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="data must be floating"):
        fastvae.distributed.ShardedExemplarPrior(torch.nn.Identity(), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeError, match="data must be a tensor"):
        fastvae.distributed.ShardedExemplarPrior(torch.nn.Identity(), [1.0, 2.0])


def test_a_copy_of_the_exemplar_prior_has_its_group(alone: None) -> None:
    """As torch.optim.swa_utils.AveragedModel makes one."""
    group = dist.new_group()
    encoder = torch.nn.Linear(3, 2)
    encoder.register_forward_hook(lambda module, args, output: (output, torch.zeros_like(output)))
    prior = fastvae.distributed.ShardedExemplarPrior(encoder, torch.randn(4, 3), group=group, shared_variance=True)
    copied = copy.deepcopy(prior)
    assert copied.group is group and copied.encoder is not prior.encoder and copied.logvar is not prior.logvar
    z = torch.randn(5, 2)
    assert torch.equal(copied.log_prob(z), prior.log_prob(z))
    with torch.no_grad():
        prior.logvar += 1
    assert not torch.equal(copied.log_prob(z), prior.log_prob(z))


def test_without_a_group() -> None:
    with pytest.raises(RuntimeError, match=r"needs torch.distributed.init_process_group\(\)"):
        fastvae.distributed.mixture_log_prob(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(()))


def test_one_process_pays_nothing() -> None:
    """`import fastvae` does not import the package, and the package no DTensor."""
    script = "import sys, fastvae; print('fastvae.distributed' in sys.modules); import fastvae.distributed; "
    script += "print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert done.stdout.split() == ["False", "False"]


def test_a_training_step_takes_a_wrapped_model(alone: None) -> None:
    """With the options of VAE.forward, and without a CUDA graph, which cannot hold what the wrapper does."""
    weights = []
    for wrap in (lambda vae: vae, torch.nn.parallel.DistributedDataParallel):
        vae = model(lambda encoder: fastvae.VampPrior(encoder, torch.rand(4, 6)))
        step = fastvae.TrainingStep(wrap(vae), torch.optim.SGD(vae.parameters(), 0.1), num_samples=2, bound="iwae")
        torch.manual_seed(1)
        step(torch.linspace(0, 1, 18).reshape(3, 6))
        weights.append(vae.encoder(torch.ones(1, 6))[0].detach())
    assert torch.equal(*weights)
    assert step.why_not_captured is not None and "DistributedDataParallel" in step.why_not_captured
