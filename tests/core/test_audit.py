"""fastvae.audit names each known mistake, alone and together with another one, and finds nothing in what is right."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import fastvae
from core.naive_priors import GROUPS, NAMES, naive
from fastvae.auditing import AuditError
from fastvae.auditing.claim import claim_of
from fastvae.auditing.sampler import audit_sampler

K, D = 6, 4
GROUP_OF = {name: number for number, group in enumerate(GROUPS) for name in group}


def some_components(seed: int = 0, K: int = K, D: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """mu, logvar, weights that do not sum to one; logvar > 0, so that it may be taken for a scale."""
    g = torch.Generator().manual_seed(seed)
    mu = 1.5 * torch.randn(K, D, generator=g)
    return mu, 0.3 + 0.9 * torch.rand(K, D, generator=g), torch.rand(K, generator=g) + 0.2


# What is right ------------------------------------------------------------------------------------------------------


def random_claim(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Components of any size, spread and scale, some without a weight, in float32 or float64."""
    g = torch.Generator().manual_seed(seed)
    K, D = (int(torch.randint(1, high, (), generator=g)) for high in (40, 24))
    spread, level = 10 ** (2 * torch.rand((), generator=g) - 1), 8 * torch.rand((), generator=g) - 5
    mu = spread * torch.randn(K, D, generator=g)
    logvar = level + torch.randn(K, D, generator=g)
    log_weights = torch.log_softmax(2 * torch.randn(K, generator=g), 0)
    if seed % 3 == 0 and K > 2:
        log_weights[1] = -math.inf
        log_weights = torch.log_softmax(log_weights, 0)
    dtype = (torch.float32, torch.float64)[seed % 2]
    return mu.to(dtype), logvar.to(dtype), log_weights.to(dtype)


def right_priors(seed: int) -> list[object]:
    mu, logvar, log_weights = random_claim(seed)
    components = Independent(Normal(mu.requires_grad_(), (0.5 * logvar.requires_grad_()).exp()), 1)
    return [
        MixtureSameFamily(Categorical(logits=log_weights), components, validate_args=bool(seed % 5)),
        fastvae.MixturePrior(mu, logvar, probs=log_weights.exp(), learn_weights=bool(seed % 2)),
    ]


@pytest.mark.parametrize("seed", range(6))
def test_right_priors_have_no_finding(seed: int) -> None:
    for prior in right_priors(seed):
        report = fastvae.audit(prior, seed=seed)
        assert report, str(report)


class Encoder(nn.Module):
    def __init__(self, x_dim: int = 8, z_dim: int = D) -> None:
        super().__init__()
        self.mu, self.logvar = nn.Linear(x_dim, z_dim), nn.Linear(x_dim, z_dim)
        with torch.no_grad():
            self.mu.weight *= 6
            self.logvar.weight *= 3

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mu(x), self.logvar(x) - 1


@pytest.mark.parametrize("kind", ["vamp", "learned-weights", "exemplar", "standard", "aggregated", "one-component"])
def test_the_librarys_priors_have_no_finding(kind: str) -> None:
    encoder, x = Encoder(), torch.rand(30, 8)
    extra = {}
    match kind:
        case "vamp":
            prior = fastvae.VampPrior(encoder, x)
        case "learned-weights":
            prior = fastvae.VampPrior(encoder, x, learn_weights=True)
        case "exemplar":
            prior = fastvae.ExemplarPrior(encoder, x).eval()
        case "standard":
            prior = fastvae.StandardNormalPrior(D)
            extra = dict(mu=torch.zeros(1, D), scale=torch.ones(1, D))
        case "aggregated":
            prior = fastvae.AggregatedPosterior.of(encoder, x)
        case "one-component":
            prior = fastvae.MixturePrior(torch.randn(1, D), torch.randn(1, D))
    report = fastvae.audit(prior, **extra)
    assert report, str(report)
    assert any("KL" in part for part in report.checked) and any("draws" in part for part in report.checked)


@pytest.mark.parametrize(("K", "D"), [(1, 1), (1, 5), (2, 1), (200, 1), (3, 200), (60, 3), (3, 60), (60, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_finding_at_the_edges(K: int, D: int, dtype: torch.dtype) -> None:
    mu, logvar = torch.randn(K, D).to(dtype), (torch.randn(K, D) - 1).to(dtype)
    report = fastvae.audit(lambda z: fastvae.mixture_log_prob(z, mu, logvar), mu, logvar)
    assert report, str(report)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_prior_in_half_precision_is_held_to_its_dtype(dtype: torch.dtype) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        prior = fastvae.MixturePrior(2 * torch.randn(4, 3), torch.randn(4, 3)).to(dtype)
        report = fastvae.audit(prior, seed=seed)
        assert report, str(report)
    mu, logvar, log_weights = prior.components()
    wrong = fastvae.audit(
        lambda z: fastvae.mixture_log_prob(z, mu, logvar, torch.zeros_like(log_weights)), mu, logvar,
        log_weights=log_weights, kl=lambda *q: (lambda z, kl: (z, kl + 2))(*prior.kl(*q)),
    )  # fmt: skip
    assert wrong.names == ["weights-missing", "kl-constant"]


def test_the_sampler_of_what_is_right_is_called_wrong_as_seldom_as_is_said() -> None:
    mu, logvar, weights = some_components()
    claim = claim_of(None, mu, logvar, None, None, weights).detach()
    generator = torch.Generator().manual_seed(0)
    alarms = sum(
        bool(audit_sampler(lambda n: claim.draw(n, generator), claim, 500, 0.2, generator).findings) for _ in range(100)
    )
    assert alarms <= 32  # 20 are expected at most; 33 or more of 100 have a probability of 0.002


# Each mistake of a density ------------------------------------------------------------------------------------------

# A mistake that cannot be there without another one.
IMPLIED = {"sum-over-dimensions-forgotten": {"product-of-mixtures"}}


@pytest.mark.parametrize("name", NAMES)
def test_each_mistake_is_found_and_no_other(name: str) -> None:
    mu, logvar, weights = some_components()
    report = fastvae.audit(naive(mu, logvar, weights, name), mu, logvar, probs=weights)
    assert not report
    assert set(report.names) == {name} | IMPLIED.get(name, set()), str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["product-of-mixtures", "variance-as-scale", "log-2pi-dropped", "underflow"])
def test_mistakes_are_found_at_other_sizes(name: str, dtype: torch.dtype) -> None:
    for seed, (K, D) in enumerate([(2, 2), (50, 10), (300, 3), (10, 150)]):
        mu, logvar, weights = (x.to(dtype) for x in some_components(seed, K, D))
        report = fastvae.audit(naive(mu, logvar, weights, name), mu, logvar, probs=weights)
        assert report.names == [name], str(report)


_SUMS_FORGOTTEN = "sum-over-components-forgotten", "sum-over-dimensions-forgotten"
# Two mistakes of which one hides the other; what is found instead.
NOT_TOLD_APART = {
    # log s is 0, whatever factor it has.
    **{
        ("variance-ignored", name): {"variance-ignored"}
        for name in ("log-determinant-dropped", "log-determinant-doubled", "sign-of-log-determinant")
    },
    # The density does not become small anywhere.
    ("sign-of-square", "floor"): {"sign-of-square", "underflow"},
    ("student-t", "underflow"): {"student-t"},
    ("student-t", "floor"): {"unexplained"},
    # p itself is 0 where log p has underflowed.
    ("underflow", "density-not-log"): {"density-not-log"},
    ("floor", "density-not-log"): {"density-not-log"},
    ("density-not-log", "half-precision"): {"unexplained"},
    # The softmax of these weights is nearer to equal weights than bfloat16 tells.
    ("weights-as-logits", "half-precision"): {"half-precision"},
    # What is wrong is done to each component or dimension, before the audit can put them together.
    **{(name, "density-not-log"): {name} for name in _SUMS_FORGOTTEN},
    **{(name, "trailing-dimension"): {"shape"} for name in _SUMS_FORGOTTEN},
    **{(name, "reduced-over-batch"): {"reduced-over-batch"} for name in _SUMS_FORGOTTEN},
    **{("sum-over-components-forgotten", name): {"sum-over-components-forgotten"}
       for name in ("negated", "bits", "divided-by-dimensions")},
}  # fmt: skip
PAIRS = [pair for pair in itertools.combinations(NAMES, 2) if GROUP_OF[pair[0]] != GROUP_OF[pair[1]]]


def check_pair(pair: tuple[str, str]) -> None:
    mu, logvar, weights = some_components()
    report = fastvae.audit(naive(mu, logvar, weights, *pair), mu, logvar, probs=weights)
    wanted = NOT_TOLD_APART.get(pair, set(pair))
    same = " ".join(finding.words.partition("The same numbers come of:")[2] for finding in report.findings)
    missing = {name for name in wanted - set(report.names) if name not in same}
    assert not missing, f"{pair}: {report}"
    surplus = set(report.names) - wanted - set().union(*(IMPLIED.get(name, set()) for name in pair))
    if pair not in NOT_TOLD_APART and not same:
        assert surplus <= ({"underflow"} if pair == ("sign-of-square", "density-not-log") else set()), (
            f"{pair}: {report}"
        )


@pytest.mark.parametrize("pair", PAIRS[1::24], ids="+".join)  # more of them in test_audit_pairs.py
def test_pairs_of_mistakes_are_found(pair: tuple[str, str]) -> None:
    check_pair(pair)


def test_a_finding_says_how_far_off_it_is() -> None:
    mu, logvar, weights = some_components()
    report = fastvae.audit(naive(mu, logvar, weights, "log-2pi-dropped", "weights-missing"), mu, logvar, probs=weights)
    nats = {finding.name: finding.nats for finding in report.findings}
    assert nats["log-2pi-dropped"] == pytest.approx(D / 2 * math.log(2 * math.pi))
    report = fastvae.audit(lambda z: fastvae.mixture_log_prob(z, mu, logvar) + 1.5, mu, logvar)
    assert report.names == ["constant"] and report.findings[0].nats == pytest.approx(1.5, abs=1e-3)


@pytest.mark.parametrize("off", [0.002, -0.005, 0.02])
def test_a_small_constant_is_not_taken_for_a_large_one_that_another_mistake_leaves(off: float) -> None:
    mu, logvar, _ = some_components()
    report = fastvae.audit(lambda z: fastvae.mixture_log_prob(z, mu, logvar) + off, mu, logvar)
    assert report.names == ["constant"] and report.findings[0].nats == pytest.approx(abs(off), abs=1e-4)


def test_numbers_of_another_density_are_unexplained() -> None:
    mu, logvar, weights = some_components()
    report = fastvae.audit(lambda z: fastvae.mixture_log_prob(z, mu + 0.1 * mu**2, logvar), mu, logvar, probs=weights)
    assert report.names == ["unexplained"]


def test_the_expanded_square_is_found_where_it_loses_digits() -> None:
    g = torch.Generator().manual_seed(0)
    mu, logvar = 2 * torch.randn(8, 10, generator=g), torch.full((8, 10), -8.0)

    def log_prob(z: Tensor) -> Tensor:
        p = torch.exp(-logvar)
        square = z**2 @ p.T - 2 * z @ (mu * p).T + (mu**2 * p).sum(-1)
        return torch.logsumexp(-0.5 * (square + logvar.sum(-1) + 10 * math.log(2 * math.pi)) - math.log(8), -1)

    # Of a point at infinity, the expanded square is inf - inf.
    assert fastvae.audit(log_prob, mu, logvar).names == ["cancellation", "nan-at-infinity"]


def test_slightly_other_components_are_no_rounding() -> None:
    mu, logvar, _ = some_components()
    assert fastvae.audit(lambda z: fastvae.mixture_log_prob(z, mu, logvar + 0.01), mu, logvar).names == ["unexplained"]


def test_functions_that_are_no_density_are_found() -> None:
    mu, logvar, _ = some_components()
    names = {
        "unexplained": lambda z: z.sum(-1) * 0.0,
        "nan": lambda z: z.sum(-1) * torch.nan,
        "underflow": lambda z: torch.full((len(z),), -torch.inf),
    }
    for name, density in names.items():
        assert name in fastvae.audit(density, mu, logvar).names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_changed_input_is_found(dtype: torch.dtype) -> None:
    mu, logvar, _ = (x.to(dtype) for x in some_components())

    def log_prob(z: Tensor) -> Tensor:
        log_p = fastvae.mixture_log_prob(z.clone(), mu, logvar)
        z.mul_(2)
        return log_p

    assert fastvae.audit(log_prob, mu, logvar).names == ["changes-its-input"]


def test_an_error_in_place_of_a_gradient_is_a_finding() -> None:
    mu, logvar, _ = some_components()

    def by_numpy(z: Tensor) -> Tensor:
        return fastvae.mixture_log_prob(torch.from_numpy(z.numpy()), mu, logvar)

    def spoiled(z: Tensor) -> Tensor:  # the product that autograd keeps for backward is changed
        scale = torch.exp(0.0 * z.detach())
        log_p = fastvae.mixture_log_prob(z * scale, mu, logvar)
        scale.mul_(2)
        return log_p

    for density, words in ((by_numpy, "Can't call numpy()"), (spoiled, "inplace operation")):
        report = fastvae.audit(density, mu, logvar)
        assert [words in finding.words for finding in report.findings if finding.name == "gradient-fails"] == [True]


def test_the_audit_runs_in_inference_mode() -> None:
    mu, logvar, _ = some_components()
    with torch.inference_mode():
        assert fastvae.audit(lambda z: fastvae.mixture_log_prob(z, mu, logvar), mu, logvar)


def test_noise_in_the_density_is_found() -> None:
    mu, logvar, _ = some_components()
    dropout = nn.Dropout(0.2)
    report = fastvae.audit(lambda z: fastvae.mixture_log_prob(z, dropout(mu), logvar), mu, logvar)
    assert "nondeterministic" in report.names


def test_dependence_on_the_batch_is_found() -> None:
    mu, logvar, _ = some_components()
    norm = nn.BatchNorm1d(D)
    report = fastvae.audit(lambda z: fastvae.mixture_log_prob(norm(z), mu, logvar), mu, logvar)
    assert "depends-on-the-batch" in report.names


def test_lost_dtype_is_found() -> None:
    mu, logvar, _ = some_components()
    mu, logvar = mu.double(), logvar.double()
    assert fastvae.audit(lambda z: fastvae.mixture_log_prob(z, mu, logvar).float(), mu, logvar).names == ["dtype"]


@pytest.mark.parametrize("detached", ["mu", "logvar"])
def test_detached_components_are_found(detached: str) -> None:
    class Detached(fastvae.MixturePrior):
        def log_prob(self, z: Tensor) -> Tensor:
            mu, logvar, log_weights = self.components()
            return fastvae.mixture_log_prob(
                z, mu.detach() if detached == "mu" else mu, logvar.detach() if detached == "logvar" else logvar,
                log_weights,
            )  # fmt: skip

    mu, logvar, _ = some_components()
    report = fastvae.audit(Detached(mu, logvar))
    assert report.names == ["components-detached"] and report.findings[0].where.endswith(f": {detached}")


def test_a_wrong_gradient_of_the_components_is_found() -> None:
    class Wrong(fastvae.MixturePrior):
        def log_prob(self, z: Tensor) -> Tensor:
            mu, logvar, log_weights = self.components()
            return fastvae.mixture_log_prob(z, 0.5 * (mu + mu.detach()), logvar, log_weights)

    mu, logvar, _ = some_components()
    assert fastvae.audit(Wrong(mu, logvar)).names == ["gradient-of-components-wrong"]


# Samplers -----------------------------------------------------------------------------------------------------------

CLAIM = (
    2 * torch.randn(20, 5, generator=torch.Generator().manual_seed(1)),
    -1 + 0.9 * torch.randn(20, 5, generator=torch.Generator().manual_seed(2)),
    torch.rand(20, generator=torch.Generator().manual_seed(3)) + 0.1,
)


def _pick(n: int, weights: Tensor = CLAIM[2]) -> Tensor:
    return torch.multinomial(weights, n, replacement=True)


PICKS = {
    "right": _pick,
    "first-components-in-order": lambda n: torch.arange(n) % 20,
    "first-of-seven": lambda n: torch.arange(n) % 7,
    "samples-weights-ignored": lambda n: torch.randint(20, (n,)),
    "samples-first-components-only": lambda n: _pick(n, CLAIM[2][:5]),
    "draws-not-independent": lambda n: _pick((n + 9) // 10).repeat_interleave(10)[:n],
}
SPREADS = {
    "right": lambda logvar: (0.5 * logvar).exp(),
    "samples-variance-as-scale": lambda logvar: logvar.exp(),
    "samples-scale-as-variance": lambda logvar: (0.25 * logvar).exp(),
    "samples-tanh-of-log-variance": lambda logvar: (0.5 * logvar.tanh()).exp(),
    "no-noise": torch.zeros_like,
    "samples-unexplained": lambda logvar: 1.3 * (0.5 * logvar).exp(),
}


def draw(n: int, pick: str = "right", spread: str = "right") -> Tensor:
    mu, logvar, _ = CLAIM
    k = PICKS[pick](n)
    return mu[k] + SPREADS[spread](logvar[k]) * torch.randn(n, mu.shape[1])


def sampler_findings(sample) -> list[str]:
    mu, logvar, weights = CLAIM
    return fastvae.audit(naive(mu, logvar, weights), mu, logvar, probs=weights, sample=sample).names


def check_sampler(pick: str, spread: str) -> None:
    wanted = [name for name in (spread, {"first-of-seven": "first-components-in-order"}.get(pick, pick))
              if name != "right"]  # fmt: skip
    if spread == "samples-unexplained":
        wanted = [spread]  # then nobody knows whose draws these are
    found = sampler_findings(lambda n: draw(n, pick, spread))
    if spread == "no-noise" and "first" in pick:  # nothing in them need be random
        found = [name for name in found if name != "repeated-draws"]
    assert found == wanted


@pytest.mark.parametrize("pick", PICKS)
def test_wrong_choices_of_components_are_found(pick: str) -> None:
    check_sampler(pick, "right")


@pytest.mark.parametrize("spread", SPREADS)
def test_wrong_spreads_of_draws_are_found(spread: str) -> None:
    check_sampler("right", spread)


@pytest.mark.parametrize(
    ("sample", "name"),
    [
        (lambda n: torch.stack([draw(n)[:, d] for d in range(5)], 1), "samples-component-for-each-dimension"),
        (lambda n: (torch.manual_seed(3), draw(n))[1], "repeated-draws"),
        (lambda n: draw(1).expand(n, 5), "repeated-draws"),
        (lambda n: draw(n)[None], "samples-shape"),
        (lambda n: draw(n).tolist(), "samples-shape"),
        (lambda n: draw(n) * torch.nan, "samples-not-finite"),
    ],
)
def test_other_mistakes_of_samplers_are_found(sample, name: str) -> None:
    assert sampler_findings(sample) == [name]


# KL terms -----------------------------------------------------------------------------------------------------------

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def kl_term(q_constant=0.0, p_constant=0.0, factor=1.0, offset=0.0, scale=lambda logvar: (0.5 * logvar).exp(),
            keep=False, log_p=None):  # fmt: skip
    """A KL term with mistakes; the constants are those that one side forgets, for each dimension."""
    prior = naive(*CLAIM)

    def kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z = mu + scale(logvar) * torch.randn_like(mu)
        log_q = Normal(mu, (0.5 * logvar).exp()).log_prob(z) + q_constant
        if keep:
            return z, log_q - prior(z)[:, None] / 5
        return z, factor * (log_q.sum(-1) - (log_p or prior)(z) - 5 * p_constant) + offset

    return kl


@pytest.mark.parametrize(
    ("mistakes", "names"),
    [
        ({}, []),
        (dict(q_constant=HALF_LOG_2PI), ["kl-log-2pi-on-one-side"]),
        (dict(p_constant=HALF_LOG_2PI), ["kl-log-2pi-on-one-side"]),
        (dict(q_constant=HALF_LOG_2PI, p_constant=HALF_LOG_2PI), []),
        (dict(factor=-1.0), ["kl-negated"]),
        (dict(offset=2.0), ["kl-constant"]),
        (dict(factor=2.0), ["kl-unexplained"]),
        (dict(scale=torch.exp), ["kl-draws-variance-as-scale"]),
        (dict(scale=torch.zeros_like), ["kl-draws-no-noise"]),
        (dict(keep=True), ["kl-sum-over-dimensions-forgotten"]),
        (dict(log_p=naive(*CLAIM, "product-of-mixtures")), ["kl-log-p-product-of-mixtures"]),
        (dict(log_p=naive(*CLAIM, "product-of-mixtures"), scale=torch.exp),
         ["kl-draws-variance-as-scale", "kl-log-p-product-of-mixtures"]),
    ],
)  # fmt: skip
def test_mistakes_of_kl_terms_are_found(mistakes: dict, names: list[str]) -> None:
    mu, logvar, weights = CLAIM
    report = fastvae.audit(naive(*CLAIM), mu, logvar, probs=weights, kl=kl_term(**mistakes))
    assert report.names == names, str(report)


# Forms found in the wild, restated; tests/core/test_other_libraries.py audits the packages themselves -----------------


def test_tomczaks_tutorial() -> None:
    """The VampPrior of the tutorial "Deep generative modeling": a density for each dimension, log p [M, D]."""
    mu, logvar, _ = CLAIM

    def log_prob(z: Tensor) -> Tensor:
        w = torch.softmax(torch.zeros(20, 1, 1), 0)
        t = (z[None] - mu[:, None]) ** 2 * torch.exp(-logvar[:, None])
        log_normal = -0.5 * (math.log(2 * math.pi) + logvar[:, None] + t)  # [K, M, D]
        return torch.logsumexp(log_normal + w.log(), 0)

    def kl(mu_q: Tensor, logvar_q: Tensor) -> tuple[Tensor, Tensor]:
        q = Normal(mu_q, (0.5 * logvar_q).exp())
        z = q.sample()
        return z, (q.log_prob(z) - log_prob(z)).sum(-1)

    def sample(n: int) -> Tensor:  # scales as exp(logvar), as of the tutorial
        k = torch.multinomial(torch.full((20,), 1 / 20), n, replacement=True)
        return mu[k] + torch.randn(n, 5) * torch.exp(logvar[k])

    report = fastvae.audit(log_prob, mu, logvar, kl=kl, sample=sample)
    assert report.names == [
        "sum-over-dimensions-forgotten", "product-of-mixtures", "samples-variance-as-scale", "kl-log-p-wrong",
    ], str(report)  # fmt: skip


def test_sysvis_vamp_prior() -> None:
    """A scale that goes through sqrt, and logsumexp in each dimension; the KL term is summed at its end."""
    mu, logvar, _ = CLAIM
    scale = (0.5 * logvar).exp()

    def log_prob(z: Tensor) -> Tensor:
        each = Normal(mu[:, None], scale.sqrt()[:, None]).log_prob(z) + math.log(1 / 20)  # [K, M, D]
        return each.logsumexp(0)

    def kl(mu_q: Tensor, logvar_q: Tensor) -> tuple[Tensor, Tensor]:
        q = Normal(mu_q, (0.5 * logvar_q).exp())
        z = q.rsample()
        return z, (q.log_prob(z) - log_prob(z)).sum(-1)

    names = fastvae.audit(log_prob, mu, scale=scale, kl=kl).names
    assert names == [
        "sum-over-dimensions-forgotten", "product-of-mixtures", "scale-as-variance", "kl-log-p-wrong",
    ]  # fmt: skip


@pytest.mark.parametrize("batch", [20, 500, 8])
def test_pythaes_vamp_sampler(batch: int) -> None:
    """Whole batches of the first components, in order, with tanh of the log variances, and a remainder of the same."""
    mu, logvar, _ = CLAIM

    def sample(n: int) -> Tensor:
        size, parts = min(len(mu), batch), []
        for count in [size] * (n // size) + [n % size]:
            std = torch.exp(0.5 * torch.tanh(logvar[:count]))
            parts.append(mu[:count] + std * torch.randn_like(std))
        return torch.cat(parts)

    equal = torch.ones(20)
    report = fastvae.audit(naive(mu, logvar, equal, "log-2pi-dropped"), mu, logvar, sample=sample)
    assert report.names == ["log-2pi-dropped", "samples-tanh-of-log-variance", "first-components-in-order"]


def test_a_mixture_without_independent() -> None:
    """MixtureSameFamily over [D, K] normal components, whose log_prob [M, D] is then summed."""
    mu, logvar, _ = CLAIM
    mixture = MixtureSameFamily(Categorical(logits=torch.ones(5, 20)), Normal(mu.T, (0.5 * logvar).exp().T))
    with pytest.raises(TypeError, match="without Independent it is another density for each dimension"):
        fastvae.audit(mixture)
    assert fastvae.audit(lambda z: mixture.log_prob(z).sum(-1), mu, logvar).names == ["product-of-mixtures"]


def test_a_chain_of_logs() -> None:
    """log p as the sum over the components of log w_k + log N_k, as of a product of independent observations."""
    mu, logvar, weights = CLAIM

    def log_prob(z: Tensor) -> Tensor:
        total = torch.zeros(len(z))
        for m, v, w in zip(mu, logvar, weights / weights.sum(), strict=True):
            total = total + w.log() + Normal(m, (0.5 * v).exp()).log_prob(z).sum(-1)
        return total

    assert fastvae.audit(log_prob, mu, logvar, probs=weights).names == ["sum-of-logs"]


# The report ---------------------------------------------------------------------------------------------------------


def test_the_report_prints_and_raises() -> None:
    mu, logvar, weights = CLAIM
    report = fastvae.audit(naive(mu, logvar, weights, "variance-as-scale"), mu, logvar, probs=weights)
    text = str(report)
    assert "1. variance-as-scale (" in text and "where: " in text and "do: " in text and "Not tested:" in text
    assert max(map(len, text.splitlines()[:-4])) <= 120
    with pytest.raises(AuditError, match="variance-as-scale") as raised:
        report.raise_if_wrong()
    assert raised.value.report is report
    right = fastvae.audit(naive(mu, logvar, weights), mu, logvar, probs=weights)
    assert right and right.raise_if_wrong() is right and "nothing wrong was found" in str(right)


def test_mistakes_that_change_nothing_are_told() -> None:
    mu, logvar, _ = CLAIM
    report = fastvae.audit(naive(mu, 0 * logvar, torch.ones(20)), mu, 0 * logvar)
    (hidden,) = (reason for reason in report.untested if "changes no number" in reason)
    assert "variance-as-scale" in hidden and "weights-ignored" in hidden and "product-of-mixtures" not in hidden


def test_the_audit_leaves_random_numbers_as_they_were() -> None:
    mu, logvar, _ = CLAIM
    state = torch.get_rng_state()
    one, two = (fastvae.audit(fastvae.MixturePrior(mu, logvar), seed=4) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert str(one) == str(two)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (dict(), TypeError, "has no components"),
        (dict(logvar=CLAIM[1]), TypeError, "logvar was given without mu"),
        (dict(mu=CLAIM[0]), TypeError, "give logvar, log sigma.2, or scale"),
        (dict(mu=CLAIM[0], logvar=CLAIM[1], scale=CLAIM[1].exp()), TypeError, "contradict"),
        (dict(mu=CLAIM[0], logvar=CLAIM[1], probs=CLAIM[2], log_weights=CLAIM[2]), TypeError, "contradict"),
        (dict(mu=CLAIM[0], scale=CLAIM[1]), ValueError, "scale must be > 0"),
        (dict(mu=CLAIM[0], logvar=CLAIM[1], probs=-CLAIM[2]), ValueError, "probs must be >= 0"),
        (dict(mu=CLAIM[0], logvar=CLAIM[1], probs=0 * CLAIM[2]), ValueError, "one at least above -inf"),
        (dict(mu=CLAIM[0] * torch.nan, logvar=CLAIM[1]), ValueError, "must be finite"),
        (dict(mu=CLAIM[0][:0], logvar=CLAIM[1][:0]), ValueError, "K >= 1"),
        (dict(mu=CLAIM[0], logvar=CLAIM[1][:, :2]), ValueError, "logvar must be broadcastable"),
        (dict(mu=CLAIM[0].long(), logvar=CLAIM[1]), TypeError, "mu must be a floating tensor"),
        (dict(mu=CLAIM[0].to("meta"), logvar=CLAIM[1]), ValueError, "mu is on the meta device"),
        (dict(mu=CLAIM[0].tolist(), logvar=CLAIM[1]), TypeError, "mu must be a tensor"),
        (dict(mu=CLAIM[0], logvar=CLAIM[1], false_alarm=0.0), ValueError, "false_alarm must be between"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fastvae.audit(naive(*CLAIM), **arguments)


def test_what_is_no_density_is_refused() -> None:
    mu, logvar, _ = CLAIM
    with pytest.raises(TypeError, match="prior must be a function"):
        fastvae.audit(3, mu, logvar)
    with pytest.raises(TypeError, match="not the class MixturePrior itself"):
        fastvae.audit(fastvae.MixturePrior, mu, logvar)
    with pytest.raises(TypeError, match="log_prob must return a floating tensor"):
        fastvae.audit(lambda z: z.sum(-1).tolist(), mu, logvar)
    with pytest.raises(TypeError, match=r"kl.mu, logvar. must return"):
        fastvae.audit(naive(*CLAIM), mu, logvar, kl=lambda mu, logvar: mu)
