"""A model that is measured again and again: the numbers of a loop by hand, captured or not."""

from __future__ import annotations

import pytest
import torch
from support.capture import capture_in_name
from torch import Tensor

from fastvae import VAE, ExemplarPrior, MixturePrior, StandardNormalPrior, VampPrior
from fastvae._networks import BinaryDecoder, Encoder
from fastvae.app.run.measuring import Meter, measure
from fastvae.priors import Prior

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
PRIORS = ["standard", "mixture", "vamp", "exemplar"]
IMAGES, SAMPLES = 25, 100  # 1000 draws at a time: batches of 10, 10 and 5 images
PIXELS = 16  # so that batches begin on whole cache lines: MKL rounds by alignment


def model(name: str, device: str) -> VAE:
    torch.manual_seed(3)
    encoder, images = Encoder(PIXELS, 8, 2), torch.rand(12, PIXELS)
    priors: dict[str, Prior] = {
        "standard": StandardNormalPrior(2),
        "mixture": MixturePrior(torch.randn(4, 2)),
        "vamp": VampPrior(encoder, images[:5], learn_weights=True, refresh=0.5),
        "exemplar": ExemplarPrior(encoder, images, chunk_size=5),
    }
    return VAE(encoder, BinaryDecoder(PIXELS, 8, 2), priors[name]).to(device)


def images_on(device: str) -> Tensor:
    return torch.rand(IMAGES, PIXELS, generator=torch.Generator().manual_seed(4)).round().to(device)


@torch.no_grad()
def change(vae: VAE) -> None:
    """As a training step would: in place."""
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.ones_like(parameter))


@torch.no_grad()
def by_hand(vae: VAE, x: Tensor, bound: str) -> dict[str, float]:
    vae.eval()
    fixed = VAE(vae.encoder, vae.decoder, vae.prior.snapshot(), vae.likelihood)
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    for batch in x.split(10):
        output = fixed(batch, num_samples=SAMPLES, bound=bound)
        sums += torch.stack((output.bound, output.reconstruction, output.kl)).sum(1, dtype=torch.float64)
    vae.train()
    value, reconstruction, kl = (sums / IMAGES).tolist()
    return {"bound": value, "elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bound", ["elbo", "iwae"])
@pytest.mark.parametrize("prior", PRIORS)
def test_a_model_that_changes(prior: str, bound: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights and the prior's components of each time count, not those of the capture."""
    vae, x = model(prior, device), images_on(device)
    plain, captured = Meter(vae, SAMPLES, bound), Meter(vae, SAMPLES, bound)
    seen = []
    for _ in range(3):
        results = []
        for measured in (lambda: by_hand(vae, x, bound), lambda: plain(x)):
            torch.manual_seed(5)
            results.append(measured())
        with monkeypatch.context() as patch:
            shapes = capture_in_name(patch)
            torch.manual_seed(5)
            results.append(captured(x))
        seen.append((results[0], shapes))
        assert results[1] == results[0] and results[2] == results[0]
        assert vae.training and vae.encoder.training and vae.prior.training
        change(vae)
    assert [shapes for _, shapes in seen] == [[[10, PIXELS]], [[5, PIXELS]], []]
    assert len({result["bound"] for result, _ in seen}) == 3


@pytest.mark.parametrize("prior", PRIORS)
def test_a_graph_finds_the_components_where_they_were(prior: str) -> None:
    vae, x = model(prior, "cpu"), images_on("cpu")
    meter = Meter(vae, SAMPLES)
    meter(x)
    assert meter._fixed is not None
    before = [tensor.data_ptr() for tensor in meter._fixed.state_dict().values()]
    change(vae)
    meter(x)
    assert [tensor.data_ptr() for tensor in meter._fixed.state_dict().values()] == before


def test_noise_is_new_at_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_in_name(monkeypatch)
    meter, x = Meter(model("vamp", "cpu")), images_on("cpu")
    assert len({meter(x)["bound"] for _ in range(5)}) == 5


def test_the_environment_can_forbid_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVAE_CAPTURE", "0")
    shapes = capture_in_name(monkeypatch)
    meter = Meter(model("vamp", "cpu"))
    for _ in range(3):
        meter(images_on("cpu"))
    assert not shapes


def test_once() -> None:
    vae, x = model("mixture", "cpu"), images_on("cpu")
    torch.manual_seed(5)
    once = measure(vae, x, SAMPLES, "iwae")
    torch.manual_seed(5)
    assert once == by_hand(vae, x, "iwae")
