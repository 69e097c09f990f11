"""TrainingStep: the numbers of a loop by hand, captured or not.

Without a GPU a capture is one in name alone (`support/capture.py`); where there is a GPU, the real one runs as well.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import Decoder, Encoder
from support.capture import capture_in_name
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR

import fastvae
from fastvae import VAE, ExemplarPrior, MixturePrior, TrainingStep, VampPrior, _capture

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
DATA = torch.rand(20, 6)
OPTIONS: dict[str, dict[str, Any]] = {
    "elbo": {},
    "several samples": {"num_samples": 3, "kl": "sample"},
    "iwae": {"bound": "iwae", "num_samples": 4},
    "stl": {"gradient": "stl"},
}


class NormalisingEncoder(Encoder):
    """With running means, which a pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.norm(x))


def model(device: str = "cpu", encoder: type[Encoder] = Encoder, **options: Any) -> VAE:
    torch.manual_seed(3)
    network = encoder()
    return VAE(network, Decoder(), VampPrior(network, torch.rand(5, 6), **options)).to(device)


def adam(vae: VAE) -> Adam:
    return Adam(vae.parameters(), lr=1e-2, capturable=next(vae.parameters()).is_cuda)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let every step be captured, if only in name; the shapes that were, in turn."""
    return capture_in_name(monkeypatch)


def by_hand(vae: VAE, optimizer: Any, batches: list[Tensor], betas: list[float], **options: Any) -> list[float]:
    losses = []
    for x, beta in zip(batches, betas, strict=True):
        optimizer.zero_grad()
        output = vae(x, beta=beta, **options)
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    return losses


def compare(device: str, encoder: type[Encoder] = Encoder, capture: bool | None = None, **options: Any) -> None:
    """Two epochs of batches of 8, 8 and 4, with a beta of their own each; losses and weights, to the bit."""
    batches, betas = 2 * list(DATA.to(device).split(8)), [0.1, 0.2, 0.3, 0.99, 0.97, 1.0]
    ours, theirs = model(device, encoder), model(device, encoder)
    theirs_adam = adam(theirs)
    if capture is not False:
        for group in theirs_adam.param_groups:  # a tensor, as a captured step has it
            group["lr"] = torch.tensor(group["lr"], device=device)
    torch.manual_seed(5)
    want = by_hand(theirs, theirs_adam, batches, betas, **options)
    step = TrainingStep(ours, adam(ours), capture=capture, **options)
    torch.manual_seed(5)
    got = [float(step(x, beta=beta).loss) for x, beta in zip(batches, betas, strict=True)]
    assert got == want
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_uncaptured_it_is_the_loop(name: str) -> None:
    compare("cpu", capture=False, **OPTIONS[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPTIONS)
def test_captured_it_is_the_loop(name: str, device: str, captures: list[list[int]]) -> None:
    """Each shape runs once, then is captured: a graph for each."""
    compare(device, **OPTIONS[name])
    assert captures == [[8, 6], [4, 6]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("captures")
def test_what_comes_before_a_capture_leaves_no_trace(device: str) -> None:
    """Its passes would move running means and the random state."""
    compare(device, NormalisingEncoder)


@pytest.mark.parametrize("device", DEVICES)
def test_learning_rates_may_change(device: str, captures: list[list[int]]) -> None:
    """By a scheduler and by hand: a graph would go on with the number that it was captured with."""
    weights = []
    for capture in (False, None):
        vae = model(device)
        optimizer = adam(vae)
        step = TrainingStep(vae, optimizer, capture=capture)
        schedule = StepLR(optimizer, 2, 0.1)
        torch.manual_seed(5)
        for turn in range(6):
            step(DATA[:8].to(device))
            schedule.step()
            if turn == 3:
                optimizer.param_groups[0]["lr"] = 0.25
        weights.append(vae.state_dict())
    assert len(captures) == 1
    for a, b in zip(weights[0].values(), weights[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)


@pytest.mark.parametrize("device", DEVICES)
def test_prepare_and_index(device: str, captures: list[list[int]]) -> None:
    """Rows of a data set on the device, binarised anew in every step, with an exemplar prior that leaves them out."""
    data = DATA.to(device)
    results = []
    for capture in (False, None):
        torch.manual_seed(3)
        encoder = Encoder()
        vae = VAE(encoder, Decoder(), ExemplarPrior(encoder, DATA)).to(device)
        step = TrainingStep(vae, adam(vae), prepare=lambda rows: torch.bernoulli(data[rows]), capture=capture)
        torch.manual_seed(5)
        order = torch.randperm(20, device=device)
        results.append([float(step(rows, index=rows).loss) for rows in order.split(5)])
    assert results[0] == pytest.approx(results[1], rel=1e-6) and len(set(results[0])) == 4
    assert captures == [[5]]


def test_the_output_has_no_graph_and_is_written_anew(captures: list[list[int]]) -> None:
    step = TrainingStep(model(), adam(model()))
    first, *_, one, two = (step(DATA[:8]) for _ in range(4))
    assert all(value is None or not value.requires_grad for value in vars(first).values())
    assert one is two and len(captures) == 1


@pytest.mark.parametrize(
    ("why", "prior", "options"),
    [
        ("chunk_size recomputes", {}, {"chunk_size": 2, "num_samples": 4}),
        ("the prior's chunk_size", {"chunk_size": 2}, {}),
        ("the prior's refresh", {"refresh": 0.5}, {}),
        ("not on a CUDA device", {}, {}),
    ],
)
def test_what_cannot_be_captured_says_so_and_trains(why: str, prior: dict[str, Any], options: dict[str, Any]) -> None:
    vae = model(**prior)
    step = TrainingStep(vae, adam(vae), **options)
    assert step.why_not_captured is not None and why in step.why_not_captured
    before = copy.deepcopy(vae.state_dict())
    for _ in range(3):
        assert bool(step(DATA[:8]).loss.isfinite())
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), vae.state_dict().values(), strict=True))
    with pytest.raises(RuntimeError, match=rf"capture=True, but the step cannot be captured: .*{why}"):
        TrainingStep(vae, adam(vae), capture=True, **options)


def test_the_environment_can_forbid_it(captures: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVAE_CAPTURE", "0")
    step = TrainingStep(model(), adam(model()))
    assert step.why_not_captured == "FASTVAE_CAPTURE=0"
    for _ in range(3):
        step(DATA[:8])
    assert not captures


def test_a_subset_cannot_be_captured() -> None:
    encoder = Encoder()
    vae = VAE(encoder, Decoder(), ExemplarPrior(encoder, DATA, subset=4))
    assert "another subset" in str(TrainingStep(vae, adam(vae)).why_not_captured)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_optimiser_that_cannot_be_captured() -> None:
    vae = model("cuda")
    assert "capturable=True" in str(TrainingStep(vae, Adam(vae.parameters())).why_not_captured)


def test_another_prior_of_ones_own() -> None:
    vae = VAE(Encoder(), Decoder(), MixturePrior(torch.randn(4, 3)))
    step = TrainingStep(vae, adam(vae), capture=False)
    losses = [float(step(DATA).loss) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_what_a_graph_depends_on_makes_a_graph_of_its_own(captures: list[list[int]]) -> None:
    """Whatever changes what a step computes: a graph made before would go on with what was."""
    vae = model()
    optimizer = adam(vae)
    step = TrainingStep(vae, optimizer)

    def captured() -> int:
        before = len(captures)
        for _ in range(3):
            step(DATA[:8])
        return len(captures) - before

    assert captured() == 1 and captured() == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert captured() == 1
    with fastvae.use_backend("composite"):
        assert captured() == 1
    vae.encoder.eval()
    assert captured() == 1
    vae.encoder.train()
    assert captured() == 0
    optimizer.load_state_dict(optimizer.state_dict())
    assert captured() == 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert captured() == 1


@pytest.mark.usefixtures("captures")
def test_a_capture_casts_the_weights_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast keeps weights that it has cast; a graph would read those of its capture forever."""
    kept: list[bool] = []
    real = _capture._captured

    def captured(*arguments: Any) -> Any:
        kept.append(torch.is_autocast_cache_enabled())
        return real(*arguments)

    monkeypatch.setattr(_capture, "_captured", captured)
    step = TrainingStep(model(), adam(model()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            step(DATA[:8])
        assert kept == [False] and torch.is_autocast_cache_enabled()


def test_a_failure_before_a_capture_leaves_no_trace(captures: list[list[int]]) -> None:
    vae = model(encoder=NormalisingEncoder)
    failing = False

    def prepare(x: Tensor) -> Tensor:
        if failing:
            raise ZeroDivisionError
        return x

    step = TrainingStep(vae, adam(vae), prepare=prepare)
    step(DATA[:8])
    before = [value.clone() for value in vae.buffers()]
    failing = True
    with pytest.raises(ZeroDivisionError):
        step(DATA[:8])
    assert all(torch.equal(a, b) for a, b in zip(before, vae.buffers(), strict=True))
    failing = False
    step(DATA[:8])
    assert captures == [[8, 6]]


@pytest.mark.usefixtures("captures")
def test_x_may_come_from_a_graph() -> None:
    step = TrainingStep(model(), adam(model()))
    weight = torch.ones((), requires_grad=True)
    for _ in range(3):
        assert bool(step(DATA[:8] * weight).loss.isfinite())


def test_a_prior_within_a_prior_is_asked_too() -> None:
    class Wrapped(MixturePrior):
        def __init__(self, inner: VampPrior) -> None:
            super().__init__(torch.zeros(1, 3))
            self.inner = inner

    encoder = Encoder()
    vae = VAE(encoder, Decoder(), Wrapped(VampPrior(encoder, torch.rand(5, 6), refresh=0.5)))
    assert "refresh" in str(TrainingStep(vae, adam(vae)).why_not_captured)


def test_an_unknown_argument_is_told_at_once() -> None:
    with pytest.raises(TypeError, match=r"TrainingStep.*unexpected keyword argument 'num_sample'"):
        TrainingStep(model(), adam(model()), num_sample=3)
