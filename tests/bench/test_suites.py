"""What is run for which options, and the cases of the other suites."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import gaussian, train_step
from benchmarks.case import measure, problems
from benchmarks.growth import EVERYONE, against_k
from benchmarks.mixture import BACKWARD, WORKS, mixture_case
from benchmarks.peers import all_peers
from benchmarks.suites import Plan
from benchmarks.targets import TARGETS
from fastvae.app.user_errors import ConfigError

from .conftest import TINY

SMALL = train_step.Sizes(pixels=30, hidden=10, latent=4, batch=6)


def latents(path: Path, D: int = 3) -> Path:
    rng = np.random.default_rng(0)
    mu, logvar = rng.standard_normal((2, 20, D), np.float32)
    np.savez(path, z=rng.standard_normal((9, D), np.float32), mu=mu, logvar=logvar)
    return path


def test_every_target_is_among_the_cases_of_a_full_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    latents(tmp_path / "mnist_latents.npz")
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path))
    cases = Plan().cases()
    found = {case.key: dict(case.facts) for case in cases}
    assert len(found) == len(cases), "two cases share a key"
    for target in TARGETS:
        for selector in target.cases:
            assert selector.find(found), f"{target.work}: {selector.facts}"


def test_shapes_and_inputs_replace_the_suite() -> None:
    cases = Plan(suites=("mixture",), shapes=((5, 7, 3), (2, 9, 4)), peers=("eager",), isas=("baseline",)).cases()
    assert [case.facts["work"] for case in cases] == [*WORKS, *WORKS]
    assert {(c.facts["M"], c.facts["K"], c.facts["D"]) for c in cases} == {(5, 7, 3), (2, 9, 4)}
    assert all(case.asked == ("fastvae", "eager", "fastvae-baseline") for case in cases)


def test_a_file_gives_its_own_shape(tmp_path: Path) -> None:
    path = latents(tmp_path / "mine.npz")
    cases = Plan(suites=("mixture",), inputs=str(path), peers=("eager",)).cases()
    assert dict(cases[0].facts) | {"work": ""} == {
        "suite": "mixture", "work": "", "inputs": "mine", "M": 9, "K": 20, "D": 3
    }  # fmt: skip
    assert not problems(measure(cases[1], TINY, "cpu", {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suites": ("mixtures",)}, "no suite 'mixtures'"),
        ({"suites": ("gaussian",), "shapes": ((1, 1, 1),)}, "for the suite mixture"),
        ({"isas": ("sse",)}, "--isa sse"),
        ({"peers": ("nobody",)}, "no peer 'nobody'; there are fastvae"),
        ({"suites": ("gaussian",), "peers": ("keops",)}, "none of them takes part"),
        ({"inputs": "absent.npz"}, "no file absent.npz"),
        ({"inputs": "mine.npz", "shapes": ((5, 20, 4),)}, "has D = 3, not 4"),
        ({"inputs": "mine.npz", "shapes": ((10, 20, 3),)}, "9 rows and 20 components, fewer than 10"),
        ({"inputs": "broken.npz"}, "should be an .npz file with z, mu and logvar"),
    ],
)
def test_bad_plans_are_told(options: Mapping, message: str, tmp_path: Path) -> None:
    latents(tmp_path / "mine.npz")
    (tmp_path / "broken.npz").write_text("no archive")
    with pytest.raises(ConfigError, match=message):
        Plan(**options).cases()


def test_a_series_stops_for_who_would_take_too_long() -> None:
    peers = [all_peers()[name] for name in ("fastvae", "eager")]
    _, second, third = against_k(peers, "cpu", (10, 100, 1000), M=4, D=2)
    time = {"status": "measured", "seconds": {"median": 0.6}}
    quick = {"status": "measured", "seconds": {"median": 0.001}}
    first = f"mixture, {EVERYONE}, forward, diffuse, M 4, K 10, D 2"
    found = second.prepare({first: {"K": 10, "contenders": {"eager": time, "fastvae": quick}}})
    assert [c.name for c in found.contenders] == ["fastvae"]
    assert found.absent["eager"][0] == "skipped" and "K = 10" in found.absent["eager"][1]
    # Who has left stays away.
    left = {"K": 100, "contenders": {"eager": {"status": "skipped", "why": "too slow"}, "fastvae": quick}}
    assert third.prepare({second.key: left}).absent == {"eager": ("skipped", "too slow")}


def test_the_gaussian_suite_agrees() -> None:
    for case in gaussian.gaussian_cases([(300, 7)]):
        result = measure(case, TINY, "cpu", {})
        assert not problems(result) and len(result["contenders"]) == 3, case.key
        assert result["bytes_moved"] > 0


def biased(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    z, _ = gaussian.eager_rsample(mu, logvar + 0.2)
    return gaussian.distribution_rsample(mu, logvar)[0] * 0 + z, gaussian.eager_rsample(mu, logvar)[1]


def wrong_density(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    z, log_q = gaussian.eager_rsample(mu, logvar)
    return z, log_q + 0.5 * gaussian.LOG_2PI * mu.shape[1]


def detached_noise_scale(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return gaussian.eager_rsample(mu, logvar.detach() + 0 * logvar)


@pytest.mark.parametrize("sampler", [biased, wrong_density, detached_noise_scale])
def test_a_wrong_sampler_is_caught(sampler: gaussian.Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaussian, "SAMPLERS", {"wrong": sampler})
    cases = list(gaussian.gaussian_cases([(2000, 8)], ["wrong"]))
    assert problems(measure(cases[1], TINY, "cpu", {}))


def test_a_training_step_and_its_parts() -> None:
    (case,) = train_step.train_step_cases([20], sizes=SMALL)
    result = measure(case, TINY, "cpu", {})
    assert not problems(result)
    for name in train_step.NAMES:
        parts = [part for part in result["contenders"] if part.startswith(f"{name}: ")]
        assert len(parts) == 5 and result["contenders"][name]["errors"]["pseudo_inputs"] < 1e-3


def test_the_parts_of_a_step_are_apart() -> None:
    """What samples and takes the density does not encode."""
    for name in train_step.NAMES:
        vae = train_step._model(name, 20, SMALL, "cpu")
        parts = train_step._parts(vae, torch.rand(SMALL.batch, SMALL.pixels).round())
        for part in ("sampling and density", "decoder and likelihood"):
            parts[part]()
            assert all(parameter.grad is None for parameter in vae.encoder.parameters()), f"{name}: {part}"
        parts["encoder of pseudo-inputs"]()
        assert any(parameter.grad is not None for parameter in vae.encoder.parameters())


def test_a_wrong_prior_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(train_step.EagerVampPrior):
        def log_prob(self, z: Tensor) -> Tensor:
            return super().log_prob(z) + torch.log(torch.tensor(2.0))

    monkeypatch.setattr(train_step, "PRIORS", {**train_step.PRIORS, "eager": Wrong})
    (case,) = train_step.train_step_cases([20], ["eager"], sizes=SMALL)
    (found,) = problems(measure(case, TINY, "cpu", {}))
    assert "log_prob is off by 0.693" in found


def test_a_step_is_the_same_problem_every_time() -> None:
    """Both models start from the same weights and pseudo-inputs."""
    ours, eager = (train_step._model(name, 20, SMALL, "cpu") for name in train_step.NAMES)
    for (name, a), (_, b) in zip(ours.named_parameters(), eager.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_shared_variance_has_one_gradient() -> None:
    """The sum over the components, whether it was given once or K times."""
    case = mixture_case(BACKWARD, "diffuse", (9, 20, 3), all_peers().values(), device="cpu", shared=True)
    result = measure(case, TINY, "cpu", {})
    assert set(result["contenders"]) == {"fastvae", "fastvae-shared"}
    assert not problems(result)
