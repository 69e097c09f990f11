"""Which backend a call takes: by device, by its own arguments, by those of a prior or a model, by use_backend."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import internals
from support.internals import choose
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastvae
from fastvae import VAE, AggregatedPosterior, ExemplarPrior, MixturePrior, StandardNormalPrior, VampPrior, bounds

CUDA = torch.device("cuda")
X = torch.rand(6, 5)
Z, MU, LOGVAR = torch.randn(4, 3), torch.randn(7, 3), torch.zeros(7, 3)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mu, self.logvar = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu(x), self.logvar(x)


# By device.


@pytest.mark.parametrize(
    ("missing", "want"),
    [
        ((), {"highest": "cuda", "high": "cuda-high", "medium": "cuda-medium"}),
        (("cuda",), {"highest": "triton", "high": "triton-high", "medium": "triton-medium"}),
        (("triton",), {"highest": "cuda", "high": "cuda-high", "medium": "cuda-medium"}),
        (("cuda", "triton"), {"highest": "composite", "high": "composite", "medium": "composite"}),
    ],
)
def test_on_a_gpu(missing: tuple[str, ...], want: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda, else triton, else composite, which has the highest precision alone."""
    for impl in ("cuda", "triton"):
        internals.pretend(monkeypatch, impl, "not here" if impl in missing else None)
    assert {precision: choose(None, CUDA, torch.float32, precision) for precision in want} == want
    assert choose(None, CUDA, torch.float64, "high") == want["highest"]  # which has one precision
    assert choose(None, torch.device("meta"), torch.float32, "high") == "composite"


def test_the_setting_of_torch_allows_but_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes how a backend computes, and not which one."""
    for impl in ("cuda", "triton"):
        internals.pretend(monkeypatch, impl, None)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert choose(None, CUDA, torch.float32, None) == "cuda-high"
        assert choose("triton", CUDA, torch.float32, None) == "triton-high"
        internals.pretend(monkeypatch, "cuda", "not here")
        assert choose(None, CUDA, torch.float32, None) == "triton-high"
    finally:
        torch.set_float32_matmul_precision(before)


# Who was asked: every backend notes its name and goes on.


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that run, in turn; "cuda" is one in name alone, and takes tensors on the CPU."""
    return internals.note_backends(monkeypatch)


def by_function(**options: Any) -> None:
    fastvae.mixture_log_prob(Z, MU, LOGVAR, **options)
    fastvae.mixture_log_prob_and_score(Z, MU, LOGVAR, **options)
    fastvae.mixture_kl(Z, Z, MU, LOGVAR, **options)


def by_prior(make: Callable[..., Any]) -> Callable[..., None]:
    def use(**options: Any) -> None:
        prior = make(**options)
        prior.log_prob(Z)
        prior.kl(Z, Z, 2)
        prior.density()(Z)
        prior.marginal_log_prob(Z)
        prior.snapshot().log_prob(Z)
        prior.sample(2)

    return use


def by_aggregated_posterior(**options: Any) -> None:
    posterior = AggregatedPosterior.of(Encoder(), X, **options)
    posterior.log_prob(Z)
    posterior.mutual_information(10)
    posterior.total_correlation(10)
    posterior.sample(2)


def by_vae(**options: Any) -> None:
    encoder = Encoder()
    vae = VAE(encoder, nn.Linear(3, 5), VampPrior(encoder, X), **options)
    vae(X).loss.backward()
    vae(X, kl="sample", gradient="stl").loss.backward()
    vae(X, bound="iwae", num_samples=4, chunk_size=2).loss.backward()  # activations computed again after the block
    vae.elbo(X)
    vae.iwae(X, 2)
    vae.log_likelihood(X, 3)
    vae.sample(2)
    VAE(encoder, nn.Linear(3, 5), StandardNormalPrior(3), **options)(X)


def by_bounds(**options: Any) -> None:
    def log_prior(z: Tensor) -> Tensor:
        return fastvae.mixture_log_prob(z, MU, LOGVAR)

    mu = torch.zeros(2, 3, requires_grad=True)
    for bound, samples in ((bounds.elbo, 3), (bounds.iwae, 4)):
        drawn = bound(lambda z: z.sum(-1), log_prior, mu, mu, samples, chunk_size=2, **options)
        drawn.objective.sum().backward()


ROUTES = {
    "function": by_function,
    "StandardNormalPrior": by_prior(lambda **options: StandardNormalPrior(3, **options)),
    "MixturePrior": by_prior(lambda **options: MixturePrior(MU, **options)),
    "VampPrior": by_prior(lambda **options: VampPrior(Encoder(), X, **options)),
    "ExemplarPrior": by_prior(lambda **options: ExemplarPrior(Encoder(), X, **options).eval()),
    "AggregatedPosterior": by_aggregated_posterior,
    "VAE": by_vae,
    "bounds": by_bounds,
}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_takes_what_it_is_given(route: str, asked: list[str]) -> None:
    ROUTES[route](impl="cuda")
    assert asked and set(asked) == {"cuda"}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_takes_what_the_context_says(route: str, asked: list[str]) -> None:
    with fastvae.use_backend("cuda"):
        ROUTES[route]()
    assert asked and set(asked) == {"cuda"}
    asked.clear()
    ROUTES[route]()
    assert asked and set(asked) == {"cpu"}


@pytest.mark.parametrize("route", [name for name in ROUTES if name != "StandardNormalPrior"])
def test_precision_is_handed_on(route: str, asked: list[str]) -> None:
    """To the mixture; sampling and the KL in closed form have one precision."""
    ROUTES[route](impl="triton", precision="medium")
    assert "triton-medium" in asked and set(asked) <= {"triton-medium", "triton"}
    asked.clear()
    with fastvae.use_backend("triton", precision="medium"):
        ROUTES[route]()
    assert "triton-medium" in asked and set(asked) <= {"triton-medium", "triton"}


def test_the_nearest_choice_wins(asked: list[str]) -> None:
    """A call's, else a prior's, else a model's, else the innermost context's."""
    prior = MixturePrior(MU, impl="triton")
    with fastvae.use_backend("composite"), fastvae.use_backend(dense_backward=True):
        fastvae.gaussian_kl(Z, Z)
        fastvae.gaussian_kl(Z, Z, impl="cuda")
        prior.log_prob(Z)
        VAE(Encoder(), nn.Linear(3, 5), prior, impl="cuda")(X, kl="sample", gradient="stl")
    assert asked == ["composite", "cuda", "triton", "cuda", "triton"]


@pytest.mark.usefixtures("compiled")
def test_dense_backward_on_every_route() -> None:
    """A component that no row uses: its gradient is 0, or not, by whichever way that is asked for."""
    z, mu = torch.zeros(4, 8), torch.cat([torch.zeros(1, 8), torch.full((40, 8), 3.0)])

    def gradient(call: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = mu.clone().requires_grad_()
        (got,) = torch.autograd.grad(call(leaf).sum(), leaf)
        return got[1:].abs().max()

    def by_prior(**options: Any) -> Tensor:
        prior = MixturePrior(mu, **options)
        prior.log_prob(z).sum().backward()
        assert prior.mu.grad is not None
        return prior.mu.grad[1:].abs().max()

    def log_prob(mu: Tensor, **options: Any) -> Tensor:
        return fastvae.mixture_log_prob(z, mu, torch.zeros(()), **options)

    assert gradient(log_prob) == 0 and by_prior() == 0
    assert gradient(lambda mu: log_prob(mu, dense_backward=True)) > 0 and by_prior(dense_backward=True) > 0
    with fastvae.use_backend(dense_backward=True):
        assert gradient(log_prob) > 0 and by_prior() > 0
        assert gradient(lambda mu: log_prob(mu, dense_backward=False)) == 0 and by_prior(dense_backward=False) == 0


# The context itself.


def test_it_ends_with_the_block_whatever_happens(asked: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), fastvae.use_backend("cuda"):
        1 / 0  # noqa: B018
    fastvae.gaussian_kl(Z, Z)

    @fastvae.use_backend("cuda")
    def decorated() -> None:
        fastvae.gaussian_kl(Z, Z)

    decorated()
    decorated()
    assert asked == ["cpu", "cuda", "cuda"]


def test_other_threads_see_it(asked: list[str]) -> None:
    """As they see PyTorch's own settings; backward on a GPU has a thread of its own."""
    with fastvae.use_backend("cuda"):
        thread = threading.Thread(target=fastvae.gaussian_kl, args=(Z, Z))
        thread.start()
        thread.join()
    assert asked == ["cuda"]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiled", "fresh_compiler")
def test_compiled_code_follows_it() -> None:
    """Inside compiled code, and around it: a graph of one backend is not used for another."""

    def score(z: Tensor) -> Tensor:
        return fastvae.mixture_log_prob(z, MU, LOGVAR)

    def inside(z: Tensor) -> Tensor:
        with fastvae.use_backend("composite"):
            return score(z)

    counter = CompileCounterWithBackend("eager")
    around = torch.compile(score, fullgraph=True, backend=counter)

    def operators() -> set[str]:
        return {str(node.target).partition(".")[2].partition(".")[0] for node in counter.graphs[-1].graph.nodes}

    around(Z)
    assert "mixture_log_prob" in operators()
    with fastvae.use_backend("composite"):
        around(Z)
    assert "composite_mixture_log_prob" in operators() and counter.frame_count == 2
    around(Z)
    assert counter.frame_count == 2
    torch.compile(inside, fullgraph=True, backend=counter)(Z)
    assert "composite_mixture_log_prob" in operators()


def test_blocks_of_several_threads_may_overlap(asked: list[str]) -> None:
    """Each takes back what it said itself, so that nothing stays behind in whatever order they end."""
    first, second = fastvae.use_backend("cuda"), fastvae.use_backend("triton")
    for step in (first.__enter__, second.__enter__, lambda: first.__exit__(None, None, None)):
        step()
        fastvae.gaussian_kl(Z, Z)
    second.__exit__(None, None, None)
    fastvae.gaussian_kl(Z, Z)
    assert asked == ["cuda", "triton", "triton", "cpu"]


def test_a_prior_that_initialises_itself_has_no_choice_of_its_own(asked: list[str]) -> None:
    class Own(fastvae.Mixture):
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def components(self) -> tuple[Tensor, Tensor, Tensor]:
            return MU, LOGVAR, torch.full((len(MU),), -1.0)

    with fastvae.use_backend("cuda"):
        Own().kl(Z, Z)
    assert asked == ["cuda"]


def test_wrong_names_are_told_at_once() -> None:
    for use in (fastvae.use_backend, lambda **wrong: MixturePrior(MU, **wrong)):
        with pytest.raises(ValueError, match=r"impl must be one of 'reference', 'cpu'.* not 'gpu'"):
            use(impl="gpu")
        with pytest.raises(ValueError, match=r"precision must be one of 'highest'.* not 'low'"):
            use(precision="low")
        with pytest.raises(TypeError, match=r"dense_backward must be True, False or None, not 1"):
            use(dense_backward=1)
    with pytest.raises(TypeError, match=r"VampPrior\(\) got an unexpected keyword argument 'chunk'"):
        VampPrior(Encoder(), X, chunk=3)  # type: ignore[call-arg]
    encoder = Encoder()
    with pytest.raises(TypeError, match=r"VAE\(\) got an unexpected keyword argument 'backend'"):
        VAE(encoder, nn.Linear(3, 5), StandardNormalPrior(3), backend="cuda")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"elbo\(\) got an unexpected keyword argument 'beta2'"):
        bounds.elbo(lambda z: z.sum(-1), lambda z: z.sum(-1), Z, Z, beta2=1.0)  # type: ignore[call-arg]


def test_a_prior_keeps_it_when_it_is_copied() -> None:
    prior = MixturePrior(MU, impl="composite", precision="high", dense_backward=True)
    for other in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior)), prior.snapshot()):
        assert other.backend_options == {"impl": "composite", "precision": "high", "dense_backward": True}
    assert list(prior.state_dict()) == ["mu", "logvar", "logits"]
