"""torch.export with a batch that stays dynamic: what was exported runs at another batch size and gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastvae
from fastvae import VAE, MixturePrior, StandardNormalPrior, VampPrior

K, D, PIXELS = 7, 3, 6


class Mixture(nn.Module):
    """An operation on the parameters of a mixture, which want gradients: then autograd's Functions are exported too."""

    def __init__(self, operation: Callable[..., Any]) -> None:
        super().__init__()
        self.operation = operation
        self.mu, self.logvar = nn.Parameter(torch.randn(K, D)), nn.Parameter(torch.randn(K, D))
        self.logits = nn.Parameter(torch.randn(K))

    def forward(self, z: Tensor) -> Any:
        return self.operation(z, self.mu, self.logvar, torch.log_softmax(self.logits, 0))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(PIXELS, 2 * D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.layer(x).chunk(2, -1)
        return mu, logvar


class Loss(nn.Module):
    """A whole VAE: its loss, and the bound of each x."""

    def __init__(self, prior: str, **options: Any) -> None:
        super().__init__()
        encoder = Encoder()
        priors = {
            "standard": lambda: StandardNormalPrior(D),
            "mixture": lambda: MixturePrior(torch.randn(K, D)),
            "vamp": lambda: VampPrior(encoder, torch.rand(K, PIXELS)),
        }
        self.vae = VAE(encoder, nn.Linear(D, PIXELS), priors[prior]())
        self.options = options

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = self.vae(x, **self.options)
        return output.loss, output.bound


OPERATIONS: dict[str, Callable[..., Any]] = {
    "mixture_log_prob": fastvae.mixture_log_prob,
    "one variance": lambda z, mu, logvar, w: fastvae.mixture_log_prob(z, mu, logvar[0], w),
    "exclude": lambda z, mu, logvar, w: fastvae.mixture_log_prob(
        z, mu, logvar, w, exclude=torch.ones_like(z[:, 0]).long()
    ),
    "batch shape": lambda z, mu, logvar, w: fastvae.mixture_log_prob(torch.stack((z, -z)), mu, logvar, w),
    "score": fastvae.mixture_log_prob_and_score,
    "gaussian_rsample": lambda z, mu, logvar, w: fastvae.gaussian_rsample(z, logvar[0], 2),
    "one sample": lambda z, mu, logvar, w: fastvae.gaussian_rsample(z, logvar[0]),
    "gaussian_kl": lambda z, mu, logvar, w: fastvae.gaussian_kl(z, logvar[0]),
    "mixture_kl": lambda z, mu, logvar, w: fastvae.mixture_kl(z, logvar[0], mu, logvar, w, 2),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda operation=operation: Mixture(operation) for name, operation in OPERATIONS.items()},
    **{f"vae {prior}": lambda prior=prior: Loss(prior) for prior in ("standard", "mixture", "vamp")},
    "vae iwae": lambda: Loss("vamp", bound="iwae", num_samples=4),
    "vae stl": lambda: Loss("mixture", gradient="stl", num_samples=2),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch itself
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dimension", ["named", "AUTO"])
@pytest.mark.parametrize("name", MODELS)
def test_the_batch_stays_dynamic(name: str, dimension: str, strict: bool) -> None:
    model = MODELS[name]()
    width = PIXELS if name.startswith("vae") else D
    batch = torch.export.Dim("batch") if dimension == "named" else torch.export.Dim.AUTO
    program = torch.export.export(model, (torch.rand(4, width),), dynamic_shapes=({0: batch},), strict=strict)
    for rows in (9, 2):
        x = torch.rand(rows, width)
        results = []
        for run in (program.module(), model):
            torch.manual_seed(1)
            result = run(x)
            results.append(result if isinstance(result, tuple) else (result,))
        assert len(results[0]) == len(results[1]) > 0
        for got, want in zip(*results, strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want)
