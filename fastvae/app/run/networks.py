"""The VAEs of the VampPrior paper (Tomczak and Welling 2018): dense, gated, one or two levels of latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvae import VAE, ExemplarPrior, HierarchicalVAE, MixturePrior, StandardNormalPrior, VampPrior
from fastvae._networks import BinaryDecoder, Encoder, decoder_body
from fastvae.app.data.dataset import Dataset
from fastvae.app.data.physical_memory import physical_memory
from fastvae.app.run.config import TrainConfig
from fastvae.app.run.randomness import Stream, reseed
from fastvae.app.run.ranks import ALONE, PATIENCE, Ranks
from fastvae.app.user_errors import ConfigError
from fastvae.likelihoods import LEVELS, DiscretizedLogisticLikelihood, Likelihood
from fastvae.priors import Prior

EXEMPLAR_CHUNK = 1000  # exemplars encoded at once: with all at once, activations would outgrow everything else
# Where the code of Tomczak and Welling (2018) starts pseudo-inputs: the mean and the standard deviation of each pixel.
FLAT = {"freyfaces": (0.5, 0.02), "caltech101": (0.5, 0.02)}
FLAT_ELSEWHERE = (0.05, 0.01)  # what it has for MNIST


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


class TruncatedLogistic(DiscretizedLogisticLikelihood):
    """The discretised logistic as the VampPrior paper's code has it: a level's mass, plus 1e-7, without the tails.

    Its 256 probabilities sum to less than one, and no pixel costs more than 16.1 nats; it is here so that figures
    that were measured by it can be compared.

    Source: log_Logistic_256 in the code of Tomczak and Welling, VAE with a VampPrior (AISTATS 2018).
    """

    def log_prob(self, output: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        mean, logscale = output
        self._check_range(x)
        per_scale = torch.exp(-logscale)
        lower = (torch.floor(x * LEVELS) / LEVELS - mean) * per_scale
        return torch.log(torch.sigmoid(lower + per_scale / LEVELS) - torch.sigmoid(lower) + 1e-7)


class GivenLabel(nn.Module):
    """A network whose input, x or z, has the label y behind it: one of `classes` units is 1."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network, self.classes = network, classes

    def forward(self, x: Tensor, y: Tensor) -> Any:
        """x [..., inputs - classes] and y int64 [...] -> what the network gives."""
        return self.network(torch.cat([x, nn.functional.one_hot(y, self.classes).to(x)], -1))


def build(config: TrainConfig, dataset: Dataset, ranks: Ranks = ALONE) -> VAE:
    """Make the model that a run starts from; the same config and data give the same weights, on any number of ranks.

    Raises:
        ConfigError: more pseudo-inputs are to start from training images, or more exemplars to be taken in a step,
            than there are; or training takes more memory than there is; or labels and components do not go together;
            or binary images are to have a likelihood of grey ones.
        DataError: the model is conditional and an image has no label.
    """
    _check_memory(config, dataset)
    reseed(config.seed, Stream.INITIALISE)
    classes = len(dataset.classes) if config.conditional else 0
    labels, probs = _labels_and_weights(config, dataset)
    sizes = (dataset.num_pixels, config.hidden, config.latent)
    levels = 2 if config.model == "hvae" else 1
    encoder: nn.Module = Encoder(dataset.num_pixels + classes, config.hidden, config.latent)
    of_decoder = (dataset.num_pixels, config.hidden, config.latent + classes, levels)
    decoder: nn.Module = BinaryDecoder(*of_decoder) if dataset.kind == "binary" else GrayDecoder(*of_decoder)
    lower: list[nn.Module] = []  # q(z1 | x, z2) and p(z1 | z2)
    if levels == 2:
        lower = [Encoder(*sizes, given=True), Encoder(config.latent, config.hidden, config.latent)]
    for network in (encoder, decoder, *lower):
        network.apply(_he_normal)
    if config.conditional:
        encoder, decoder = GivenLabel(encoder, classes), GivenLabel(decoder, classes)
    # The prior comes last, so that no initialisation of weights can overwrite where it starts from.
    prior: Prior
    if config.prior == "standard":
        prior = StandardNormalPrior(config.latent)
    elif config.prior == "mixture":
        start = torch.randn(config.components, config.latent)
        prior = MixturePrior(start, learn_weights=config.learn_weights, probs=probs, labels=labels)
    elif config.prior == "exemplar":
        if config.subset is not None and not 2 <= config.subset <= len(dataset.train):
            raise ConfigError(
                f"--subset is {config.subset}; it should be 2 ... {len(dataset.train)}, the training images there are."
            )
        prior = _exemplar_prior(config, dataset, encoder, ranks)
    else:
        prior = VampPrior(
            encoder,
            _pseudo_inputs(config, dataset, labels),
            learn_weights=config.learn_weights,
            probs=probs,
            labels=labels,
            chunk_size=config.chunk_size,
            refresh=config.refresh,
            neighbours=config.neighbours,
            backward_components=config.backward_components,
        )
    likelihood = _likelihood(config, dataset)
    if lower:
        return HierarchicalVAE(encoder, lower[0], lower[1], decoder, prior, likelihood=likelihood)
    return VAE(encoder, decoder, prior, likelihood=likelihood)


def _likelihood(config: TrainConfig, dataset: Dataset) -> str | Likelihood:
    if not config.truncated_logistic:
        return "bernoulli" if dataset.kind == "binary" else "discretized_logistic"
    if dataset.kind == "binary":
        raise ConfigError(f"--truncated-logistic is for grey images; those of {dataset.name} are binary.")
    return TruncatedLogistic()


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


def _labels_and_weights(config: TrainConfig, dataset: Dataset) -> tuple[Tensor | None, Tensor | None]:
    """The label of each component, int64 [K], all as often as can be, and the weight of each, [K].

    All components of a label weigh together what its share of the training images is.  (None, None) where components
    have no labels.
    """
    if not config.conditional:
        return None, None
    if config.prior == "exemplar":
        raise ConfigError("--conditional goes with --prior standard, mixture or vamp, not with exemplar.")
    images_of, *_ = (dataset.y(split).bincount() for split in (dataset.train, dataset.validation, dataset.test))
    if config.prior == "standard":
        return None, None
    if config.components < len(images_of):
        raise ConfigError(
            f"--components is {config.components}; a conditional model of {dataset.name} needs {len(images_of)} or "
            "more, one for each label."
        )
    labels = torch.arange(config.components) % len(images_of)
    return labels, (images_of / labels.bincount())[labels]


def _exemplar_prior(config: TrainConfig, dataset: Dataset, encoder: nn.Module, ranks: Ranks) -> Prior:
    """The exemplars of all training images; with several ranks each encodes a share of them.

    Those that a step draws or keeps, by `subset` or `refresh`, are the same on all ranks, and all encode all of them.
    """
    images, chunk_size = dataset.train.x, config.chunk_size or EXEMPLAR_CHUNK
    subset = None if config.subset == len(images) else config.subset  # all of them
    if ranks.size > 1 and subset is None and config.refresh == 1:
        from torch.distributed import new_group

        from fastvae.distributed import ShardedExemplarPrior

        return ShardedExemplarPrior(
            encoder,
            images[ranks.share(len(images))],
            group=new_group(timeout=PATIENCE),  # its own, as gradients are exchanged in the same backward pass
            shared_variance=config.shared_variance,
            chunk_size=chunk_size,
        )
    return ExemplarPrior(
        encoder,
        images,
        shared_variance=config.shared_variance,
        subset=subset,
        chunk_size=chunk_size,
        refresh=config.refresh,
        neighbours=config.neighbours,
        backward_components=config.backward_components,
    )


def _pseudo_inputs(config: TrainConfig, dataset: Dataset, labels: Tensor | None) -> Tensor:
    """[K, pixels] in [0, 1]: training images at random, each of its component's label, noise around their mean, or all
    nearly the same.
    """
    images, count = dataset.train.x, config.components
    if config.pseudo_init == "flat":
        mean, deviation = FLAT.get(dataset.name, FLAT_ELSEWHERE)
        return (mean + deviation * torch.randn(count, dataset.num_pixels)).clamp(0, 1)
    if config.pseudo_init == "noise":
        return (images.mean(0) + 0.1 * torch.randn(count, dataset.num_pixels)).clamp(0, 1)
    if count > len(images):
        raise ConfigError(
            f"--components is {count}, but {dataset.name} has only {len(images)} training images to start "
            "pseudo-inputs from; ask for fewer, or say --pseudo-init noise."
        )
    order = torch.randperm(len(images))
    if labels is None:
        return images[order[:count]]
    start, y = torch.empty(count, dataset.num_pixels), dataset.y(dataset.train)[order]
    for label, wanted in enumerate(labels.bincount().tolist()):
        chosen = order[y == label][:wanted]
        if len(chosen) < wanted:
            raise ConfigError(
                f"--components is {count}, of which {wanted} have the label {dataset.classes[label]}, but only "
                f"{len(chosen)} training images of {dataset.name} have it; ask for fewer, or say --pseudo-init noise."
            )
        start[labels == label] = images[chosen]
    return start
