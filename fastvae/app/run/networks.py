"""The VAEs of the VampPrior paper (Tomczak and Welling 2018): dense, gated, one or two levels of latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvae import VAE, ExemplarPrior, HierarchicalVAE, MixturePrior, StandardNormalPrior, VampPrior
from fastvae._networks import BinaryDecoder, Encoder, decoder_body
from fastvae.app.data.dataset import Dataset
from fastvae.app.data.physical_memory import physical_memory
from fastvae.app.run.config import TrainConfig
from fastvae.app.run.randomness import Stream, reseed
from fastvae.app.user_errors import ConfigError
from fastvae.priors import Prior

EXEMPLAR_CHUNK = 1000  # exemplars encoded at once: with all at once, activations would outgrow everything else


class GrayDecoder(nn.Module):
    """z [..., latent], or z1 and z2, -> mean and logscale [..., pixels] of the discretised logistic p(x|z)."""

    def __init__(self, pixels: int, hidden: int, latent: int, levels: int = 1) -> None:
        super().__init__()
        self.body = decoder_body(hidden, latent, levels)
        self.mean = nn.Linear(hidden, pixels)
        self.logscale = nn.Sequential(nn.Linear(hidden, pixels), nn.Hardtanh(-4.5, 0.0))

    def forward(self, *z: Tensor) -> tuple[Tensor, Tensor]:
        """[..., latent] -> two of [..., pixels]."""
        h = self.body(*z)
        # The middles of the first and of the last of the 256 levels are the extremes a mean can be.
        return torch.sigmoid(self.mean(h)).clamp(1 / 512, 1 - 1 / 512), self.logscale(h)


def build(config: TrainConfig, dataset: Dataset) -> VAE:
    """Make the model that a run starts from; the same config and data give the same weights.

    Raises:
        ConfigError: more pseudo-inputs are to start from training images, or more exemplars to be taken in a step,
            than there are; or training takes more memory than there is.
    """
    _check_memory(config, dataset)
    reseed(config.seed, Stream.INITIALISE)
    sizes = (dataset.num_pixels, config.hidden, config.latent)
    encoder, levels = Encoder(*sizes), 2 if config.model == "hvae" else 1
    decoder = BinaryDecoder(*sizes, levels) if dataset.kind == "binary" else GrayDecoder(*sizes, levels)
    lower: list[nn.Module] = []  # q(z1 | x, z2) and p(z1 | z2)
    if levels == 2:
        lower = [Encoder(*sizes, given=True), Encoder(config.latent, config.hidden, config.latent)]
    for network in (encoder, decoder, *lower):
        network.apply(_he_normal)
    # The prior comes last, so that no initialisation of weights can overwrite where it starts from.
    prior: Prior
    if config.prior == "standard":
        prior = StandardNormalPrior(config.latent)
    elif config.prior == "mixture":
        start = torch.randn(config.components, config.latent)
        prior = MixturePrior(start, learn_weights=config.learn_weights)
    elif config.prior == "exemplar":
        if config.subset is not None and not 2 <= config.subset <= len(dataset.train):
            raise ConfigError(
                f"--subset is {config.subset}; it should be 2 ... {len(dataset.train)}, the training images there are."
            )
        prior = ExemplarPrior(
            encoder,
            dataset.train.x,
            shared_variance=config.shared_variance,
            subset=config.subset,
            chunk_size=config.chunk_size or EXEMPLAR_CHUNK,
            refresh=config.refresh,
            neighbours=config.neighbours,
        )
    else:
        prior = VampPrior(
            encoder,
            _pseudo_inputs(config, dataset),
            learn_weights=config.learn_weights,
            chunk_size=config.chunk_size,
            refresh=config.refresh,
            neighbours=config.neighbours,
        )
    likelihood = "bernoulli" if dataset.kind == "binary" else "discretized_logistic"
    if lower:
        return HierarchicalVAE(encoder, lower[0], lower[1], decoder, prior, likelihood=likelihood)
    return VAE(encoder, decoder, prior, likelihood=likelihood)


def _check_memory(config: TrainConfig, dataset: Dataset) -> None:
    """Refuse what cannot be trained here: a system that runs out of memory often kills a program without a word."""
    pixels, hidden, latent = dataset.num_pixels, config.hidden, config.latent
    weights = hidden * (3 * pixels + 4 * hidden + 4 * latent)  # at least; grey images take a little more
    if config.model == "hvae":
        weights += hidden * (2 * pixels + 8 * hidden + 10 * latent)
    if config.prior in ("mixture", "vamp"):
        weights += config.components * (latent if config.prior == "mixture" else pixels)
    needed = 5 * 4 * weights  # float32 weights, their gradients, Adam's two moments, and the best weights so far
    there = physical_memory()
    if there is not None and needed > there:
        raise ConfigError(
            f"--hidden {hidden}, --latent {latent} and --components {config.components} make {weights:,} weights, for "
            f"which training takes {needed / 2**30:,.0f} GiB of memory; this machine has {there / 2**30:,.0f} GiB. "
            "Take smaller ones."
        )


def _he_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


def _pseudo_inputs(config: TrainConfig, dataset: Dataset) -> Tensor:
    """[K, pixels] in [0, 1]: training images at random, noise around their mean, or all nearly the same."""
    images, count = dataset.train.x, config.components
    if config.pseudo_init == "flat":  # as the code of Tomczak and Welling (2018) starts on MNIST
        return (0.05 + 0.01 * torch.randn(count, dataset.num_pixels)).clamp(0, 1)
    if config.pseudo_init == "noise":
        return (images.mean(0) + 0.1 * torch.randn(count, dataset.num_pixels)).clamp(0, 1)
    if count > len(images):
        raise ConfigError(
            f"--components is {count}, but {dataset.name} has only {len(images)} training images to start "
            "pseudo-inputs from; ask for fewer, or say --pseudo-init noise."
        )
    return images[torch.randperm(len(images))[:count]]
