"""One training step of a VAE with a VampPrior: fastvae, and the same model with eager prior and eager sampling.

The model is that of Tomczak and Welling (2018) at MNIST's sizes.  Where the time goes is measured by running the
parts of a step alone, forward and backward, in turn with the whole steps; their sum is reported beside the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import fastvae
from fastvae._networks import BinaryDecoder, Encoder

from .case import Case, Contender, Errors, Prepared, WrongResultError
from .gaussian_cases import eager_rsample
from .peers import eager

NAMES = ("fastvae", "eager")
ALLOWED = 1e-3  # of the KL, nats; of a gradient, a fraction of its largest element


@dataclass(frozen=True)
class Sizes:
    """Of the model: pixels - hidden - hidden - latent and back, and images in a batch."""

    pixels: int = 784
    hidden: int = 300
    latent: int = 40
    batch: int = 100


MNIST = Sizes()


class EagerVampPrior(fastvae.VampPrior):
    """The VampPrior as it is usually written: `torch.randn`, and an array of M x K x D."""

    def log_prob(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """[..., D] -> [...]."""
        return eager.log_prob(z.flatten(0, -2), *self.components()).reshape(z.shape[:-1])

    def kl(
        self,
        mu: Tensor,
        logvar: Tensor,
        num_samples: int | None = None,
        *,
        index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(z, log q(z | x) - log p(z))."""
        if num_samples is not None:
            mu, logvar = (p.expand(num_samples, *p.shape) for p in (mu, logvar))
        z, log_q = eager_rsample(mu, logvar)
        return z, log_q - self.log_prob(z)


PRIORS: Mapping[str, type[fastvae.VampPrior]] = {"fastvae": fastvae.VampPrior, "eager": EagerVampPrior}


def cases(
    components: Sequence[int], names: Sequence[str] = NAMES, *, device: str = "cpu", sizes: Sizes = MNIST
) -> Iterator[Case]:
    """A step with each number of pseudo-inputs K."""
    for K in components:
        yield _case(K, names, device, sizes)


def _case(K: int, names: Sequence[str], device: str, sizes: Sizes) -> Case:
    facts = {"suite": "train-step", "work": "VampPrior step", "batch": sizes.batch, "K": K, "D": sizes.latent}

    def prepare(earlier: Mapping[str, Any]) -> Prepared:
        models = {name: _model(name, K, sizes, device) for name in names}
        x = torch.rand(sizes.batch, sizes.pixels, generator=torch.Generator().manual_seed(2)).round().to(device)
        verify = _Verification(K, sizes, device)
        contenders = []
        for name, vae in models.items():
            step = _step(vae, x)
            contenders.append(Contender(name, step, partial(verify, name)))
            contenders += [
                Contender(f"{name}: {part}", run, lambda _: {})
                for part, run in _parts(_model(name, K, sizes, device), x).items()
            ]
        return Prepared(contenders)

    return Case(facts, tuple(names), prepare)


def _model(name: str, K: int, sizes: Sizes, device: str) -> fastvae.VAE:
    """The same weights for every name."""
    rng_state = torch.get_rng_state()
    torch.manual_seed(1)
    try:
        encoder = Encoder(sizes.pixels, sizes.hidden, sizes.latent)
        decoder = BinaryDecoder(sizes.pixels, sizes.hidden, sizes.latent)
        prior = PRIORS[name](encoder, torch.rand(K, sizes.pixels))
    finally:
        torch.set_rng_state(rng_state)
    return fastvae.VAE(encoder, decoder, prior).to(device)


def _step(vae: fastvae.VAE, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-5)  # so slow that it stays the same problem

    def step() -> None:
        optimizer.zero_grad()
        vae(x).loss.backward()
        optimizer.step()

    return step


def _parts(vae: fastvae.VAE, x: Tensor) -> dict[str, Callable[[], None]]:
    """The parts of a step by themselves, each with its backward from a gradient of ones."""
    prior = vae.prior
    assert isinstance(prior, fastvae.VampPrior)
    with torch.no_grad():
        mu, logvar = vae.encoder(x)
        components = prior.components()
        z, _ = prior.kl(mu, logvar)
    posterior = [p.clone().requires_grad_() for p in (mu, logvar)]
    fixed = [p.clone().requires_grad_() for p in components[:2]] + [components[2]]
    code = z.clone().requires_grad_()

    class Frozen(type(prior)):  # type: ignore[misc]  # the same prior with components that are there already
        def components(self) -> tuple[Tensor, Tensor, Tensor]:
            return fixed[0], fixed[1], fixed[2]

        def step_components(self, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
            return self.components()

    frozen = Frozen(vae.encoder, prior.pseudo_inputs)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-5)
    spare = [torch.full_like(p, 1e-3) for p in parameters]

    def clear() -> None:
        for tensor in (*parameters, *posterior, *fixed, code):
            tensor.grad = None

    def encode_pseudo_inputs() -> None:
        clear()
        torch.autograd.backward(prior.components()[:2], [torch.ones_like(p) for p in fixed[:2]])

    def encode() -> None:
        clear()
        torch.autograd.backward(vae.encoder(x), [torch.ones_like(mu), torch.ones_like(mu)])

    def sample_and_density() -> None:
        clear()
        drawn, kl = frozen.kl(*posterior)
        torch.autograd.backward((drawn, kl), (torch.ones_like(drawn), torch.ones_like(kl)))

    def decode() -> None:
        clear()
        binary_cross_entropy_with_logits(vae.decoder(code), x, reduction="sum").backward()

    def optimise() -> None:
        for parameter, gradient in zip(parameters, spare, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return {
        "encoder of pseudo-inputs": encode_pseudo_inputs,
        "encoder of images": encode,
        "sampling and density": sample_and_density,
        "decoder and likelihood": decode,
        "optimiser": optimise,
    }


class _Verification:
    """log p(z) at the same z, and its gradients in z and the pseudo-inputs, against float64."""

    def __init__(self, K: int, sizes: Sizes, device: str) -> None:
        self._make = lambda name: _model(name, K, sizes, device)
        self._z = torch.randn(8, sizes.latent, generator=torch.Generator().manual_seed(3)).to(device)
        exact = self._make("fastvae").double()
        self._want = _density(exact, self._z.double(), fastvae.reference.mixture_log_prob)

    def __call__(self, name: str, _: object) -> Errors:
        vae = self._make(name)
        got = _density(vae, self._z, None)
        errors = {"log_prob": float((got[0].double() - self._want[0]).abs().max())}
        for what, a, b in zip(("z", "pseudo_inputs"), got[1:], self._want[1:], strict=True):
            errors[what] = float((a.double() - b).abs().max() / b.abs().max())
        for what, error in errors.items():
            if not error <= ALLOWED:
                raise WrongResultError(f"{what} is off by {error:.3g}, more than the {ALLOWED:.3g} that is allowed it")
        return errors


def _density(vae: fastvae.VAE, z: Tensor, density: Callable[..., Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(z), its gradient in z, in the pseudo-inputs) by a density, or by the prior itself."""
    prior, leaf = vae.prior, z.clone().requires_grad_()
    assert isinstance(prior, fastvae.VampPrior)
    value = prior.log_prob(leaf) if density is None else density(leaf, *prior.components())
    in_z, in_inputs = torch.autograd.grad(value.sum(), (leaf, prior.pseudo_inputs))
    return value.detach(), in_z, in_inputs
