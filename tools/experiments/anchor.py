"""Loss, gradients and steps of training beside the VampPrior's published code, from the same weights, images and noise.

    python -m tools.experiments.anchor CHECKOUT [--run DIR] [--out FILE.json]

CHECKOUT is a working copy of github.com/jmtomczak/vae_vampprior.  It is imported as it is, and what it asks of packages
that have changed since is provided here.  All is in float64, on the CPU.  --run also compares the best model of a run
of `fastvae train` or `fastvae reproduce`, on 100 of its test images, which are to be binary.

The steps are Adam's, each with the optimiser of its own code.  The published one adds epsilon before it corrects the
bias of the second moment, PyTorch's after that; here ours is given the epsilon that makes the two alike.
"""

from __future__ import annotations

import argparse
import re
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvae import VAE
from fastvae.app.data.dataset import Dataset, Kind, make_split
from fastvae.app.run.config import TrainConfig, make_config
from fastvae.app.run.networks import build
from fastvae.app.run.optimizer import NormalizedAdam
from fastvae.app.run.trained import load_run
from fastvae.benchmarks import formatting
from fastvae.vae import VAEOutput

from . import command

BATCH, SIDE, STEPS, BETA = 20, 12, 20, 0.3
CLAMP = 1e-5  # the published code keeps the probability of a pixel this far from 0 and 1

# The published code's modules, and ours; parameters within them are named by LAYERS.
MODULES = {
    "vae": {
        "q_z_layers": "encoder.body",
        "q_z_mean": "encoder.mu",
        "q_z_logvar": "encoder.logvar.0",
        "p_x_layers": "decoder.body",
    },
    "hvae": {
        "q_z2_layers": "encoder.body",
        "q_z2_mean": "encoder.mu",
        "q_z2_logvar": "encoder.logvar.0",
        "q_z1_layers_x.0": "lower_encoder.body.first",
        "q_z1_layers_z2.0": "lower_encoder.body.second",
        "q_z1_layers_joint.0": "lower_encoder.body.joined",
        "q_z1_mean": "lower_encoder.mu",
        "q_z1_logvar": "lower_encoder.logvar.0",
        "p_z1_layers": "lower_prior.body",
        "p_z1_mean": "lower_prior.mu",
        "p_z1_logvar": "lower_prior.logvar.0",
        "p_x_layers_z1.0": "decoder.body.first",
        "p_x_layers_z2.0": "decoder.body.second",
        "p_x_layers_joint.0": "decoder.body.joined",
    },
}
OUTPUTS = {
    "binary": {"p_x_mean": "decoder.logits"},
    "gray": {"p_x_mean": "decoder.mean", "p_x_logvar": "decoder.logscale.0"},
}
LAYERS = {r"\.h\.": ".value.", r"\.g\.": ".gate.", r"\.linear\.": "."}
PSEUDO_INPUTS = "means.linear.weight", "prior.pseudo_inputs"  # theirs is [pixels, K], ours [K, pixels]


def our_name(theirs: str, model: str, kind: str) -> str:
    """The name of our parameter that stands for one of theirs."""
    if theirs == PSEUDO_INPUTS[0]:
        return PSEUDO_INPUTS[1]
    modules = MODULES[model] | OUTPUTS[kind]
    start = next(name for name in modules if theirs.startswith(f"{name}."))
    rest = theirs.removeprefix(start)
    for pattern, replacement in LAYERS.items():
        rest = re.sub(pattern, replacement, rest)
    return modules[start] + rest


def make_importable(checkout: Path) -> None:
    """Let `models` and `utils` be those of the published code, for the rest of this process.

    Raises:
        RuntimeError: the folder does not hold that code.
    """
    if not (checkout / "models" / "VAE.py").is_file():
        raise RuntimeError(f"{checkout} is no working copy of jmtomczak/vae_vampprior: it has no models/VAE.py")
    from scipy.special import logsumexp

    misc = types.ModuleType("scipy.misc")
    misc.logsumexp = logsumexp  # type: ignore[attr-defined]  # where it was
    sys.modules["scipy.misc"] = misc
    sys.path[:0] = [str(checkout.absolute()), str(checkout.absolute() / "models")]


def their_model(config: TrainConfig, dataset: Dataset, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The published code's model of these sizes."""
    arguments = argparse.Namespace(
        input_size=[1, *dataset.image_shape],
        input_type=dataset.kind,
        z1_size=config.latent,
        z2_size=config.latent,
        prior="vampprior" if config.prior == "vamp" else "standard",
        number_components=config.components,
        use_training_data_init=False,
        pseudoinputs_mean=0.05,
        pseudoinputs_std=0.01,
        cuda=False,
    )
    module = import_module("models.HVAE_2level" if config.model == "hvae" else "models.VAE")
    made: nn.Module = module.VAE(arguments).to(dtype)
    if config.prior == "vamp":
        made.idle_input = made.idle_input.to(dtype)
    return made


@dataclass(frozen=True)
class Pair:
    """A parameter of theirs and the one of ours that stands for it."""

    theirs: nn.Parameter
    ours: nn.Parameter
    transposed: bool

    def as_theirs(self, value: Tensor) -> Tensor:
        """A value of our parameter as it would be in theirs."""
        return value.T if self.transposed else value

    def gradients(self) -> tuple[Tensor, Tensor]:
        """(ours, theirs), both as theirs."""
        assert self.ours.grad is not None and self.theirs.grad is not None
        return self.as_theirs(self.ours.grad), self.theirs.grad


def pairs(theirs: nn.Module, ours: VAE, config: TrainConfig, dataset: Dataset) -> list[Pair]:
    """All parameters of both, with our values in both.

    Raises:
        RuntimeError: a parameter of either model has none in the other, or one of another shape.
    """
    left, found = dict(ours.named_parameters()), []
    for name, p in theirs.named_parameters():
        q = left.pop(our_name(name, config.model, dataset.kind), None)
        if q is None:
            raise RuntimeError(f"the run's model has nothing that stands for {name} of the published code's")
        found.append(Pair(p, q, name == PSEUDO_INPUTS[0]))
    if left:
        raise RuntimeError(f"the published code's model has no {', '.join(left)}")
    with torch.no_grad():
        for pair in found:
            pair.theirs.copy_(pair.as_theirs(pair.ours))
    return found


def give(theirs: nn.Module, z: Tensor, latent: int) -> None:
    """Make their next pass draw z [B, D], or of two levels z1 and z2 [B, 2 D], whatever mu and logvar are."""
    draws = iter(z.detach().split(latent, -1)[::-1])  # z2 is drawn first

    def draw(mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        return mu + std * ((next(draws) - mu) / std).detach()

    theirs.reparameterize = draw  # type: ignore[assignment]


def losses(
    theirs: nn.Module, ours: VAE, x: Tensor, config: TrainConfig
) -> tuple[tuple[Tensor, Tensor, Tensor], VAEOutput]:
    """Their (loss, reconstruction [B], KL [B]), and our output, with the noise that ours draws."""
    output: VAEOutput = ours(x, beta=BETA, kl="sample")
    give(theirs, output.z[0], config.latent)
    loss, reconstruction, kl = theirs.calculate_loss(x, beta=BETA)  # type: ignore[operator]
    return (loss.mean(), reconstruction, kl), output


def compare(config: TrainConfig, dataset: Dataset, ours: VAE, x: Tensor, steps: int) -> dict[str, Any]:
    """How far the two are apart on images x [B, pixels], and after so many steps on them."""
    ours = ours.double().train()
    theirs = their_model(config, dataset)
    both = pairs(theirs, ours, config, dataset)
    torch.manual_seed(1)
    (loss, reconstruction, kl), output = losses(theirs, ours, x, config)
    loss.backward()
    output.loss.backward()
    found = {
        "model": config.model,
        "prior": config.prior,
        "images": dataset.kind,
        "loss": float(loss),
        "loss_difference": float((output.loss - loss).abs()),
        "reconstruction_difference": float((output.reconstruction - reconstruction).abs().max()),
        "reconstruction_mean_difference": float((output.reconstruction - reconstruction).mean()),
        "kl_difference": float((output.kl - kl).abs().max()),
        "gradient_difference": max(apart(*pair.gradients()) for pair in both),
        "clamped_pixels": clamped(ours, output.z[0], config) if dataset.kind == "binary" else None,
    }
    if not steps:
        return found
    start = [pair.theirs.detach().clone() for pair in both]
    adam = import_module("utils.optimizer").AdamNormGrad
    optimizers = (
        adam(theirs.parameters(), lr=config.learning_rate),
        NormalizedAdam(ours.parameters(), config.learning_rate),
    )
    for step in range(1, 1 + steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        optimizers[1].param_groups[0]["eps"] = 1e-8 / (1 - 0.999**step) ** 0.5
        (loss, *_), output = losses(theirs, ours, x, config)
        loss.backward()
        output.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    moved = [apart(pair.as_theirs(pair.ours) - s, pair.theirs - s) for pair, s in zip(both, start, strict=True)]
    return found | {
        "steps": steps,
        "later_loss": float(loss),
        "later_loss_difference": float((output.loss - loss).abs()),
        "step_difference": max(moved),
    }


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference, over theirs."""
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def clamped(ours: VAE, z: Tensor, config: TrainConfig) -> float:
    """The share of pixels whose probability the published code moves."""
    probability = torch.sigmoid(ours.decoder(*z.split(config.latent, -1)))
    return float(((probability < CLAMP) | (probability > 1 - CLAMP)).double().mean())


def fresh_cases() -> Iterator[tuple[TrainConfig, Dataset]]:
    """Every model, prior and likelihood, on random images."""
    kinds: tuple[Kind, ...] = "binary", "gray"
    random = np.random.default_rng(0)
    for model in ("vae", "hvae"):
        for prior in ("standard", "vamp"):
            for kind in kinds:
                levels = random.integers(0, 256, (BATCH, SIDE * SIDE))
                x = levels < 64 if kind == "binary" else (levels + 0.5) / 256
                config = make_config(
                    {
                        "model": model,
                        "prior": prior,
                        "components": 50,
                        "pseudo_init": "flat",  # at 0 and 1 themselves their clamp has no gradient, and ours has
                        "truncated_logistic": kind == "gray",
                        **{"latent": 40, "hidden": 300, "learning_rate": 5e-4},
                    }
                )
                split = make_split(x)
                yield config, Dataset("random", "here", split, split, split, image_shape=(SIDE, SIDE), kind=kind)


def measure(checkout: Path, run_folder: Path | None) -> dict[str, Any]:
    """Compare all cases, and the run's if there is one."""
    make_importable(checkout)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PyTorch has deprecated since
        cases = [
            compare(config, dataset, build(config, dataset), dataset.train.x.double(), STEPS)
            for config, dataset in fresh_cases()
        ]
        trained = None
        if run_folder is not None:
            run = load_run(run_folder)
            if run.dataset.kind != "binary":
                raise RuntimeError(f"{run_folder}: --run takes a run on binary images, not on {run.dataset.name}")
            of_run = compare(run.config, run.dataset, run.vae, run.dataset.test.x[:100].double(), 0)
            trained = of_run | {"data": run.dataset.name, "epoch": run.checkpoint["best_epoch"]}
    return {"torch": torch.__version__, "batch": BATCH, "beta": BETA, "cases": cases, "trained": trained}


def markdown(content: dict[str, Any]) -> str:
    """The table of the cases with fresh weights, and a sentence about the trained model."""
    header = ["model, prior, images", "loss, nats", "loss", "reconstruction", "KL", "gradients"]
    later = f"loss after {content['cases'][0]['steps']} steps"
    rows = [
        [", ".join(case[name] for name in ("model", "prior", "images")), f"{case['loss']:.2f}"]
        + [f"{case[f'{name}_difference']:.0e}" for name in ("loss", "reconstruction", "kl", "gradient", "later_loss")]
        for case in content["cases"]
    ]
    table, trained = formatting.markdown([*header, later], rows), content["trained"]
    if trained is None:
        return table
    what = f"{trained['data']}, {trained['prior']}, epoch {trained['epoch']}"
    return (
        f"{table}\n\nOf a trained model ({what}) the published code clamps "
        f"{formatting.percent(trained['clamped_pixels'])} of the pixels' probabilities. For that, its reconstruction "
        f"term is {trained['reconstruction_mean_difference']:.3f} nats lower, and its gradients are "
        f"{trained['gradient_difference']:.0e} apart. Its KL is the same to {trained['kl_difference']:.0e} nats."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.experiments.anchor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="a working copy of jmtomczak/vae_vampprior")
    parser.add_argument("--run", type=Path, metavar="DIR", help="compare the best model of this run as well")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there too")
    options = parser.parse_args(arguments)
    return command.keep(lambda: measure(options.checkout, options.run), markdown, options.out)


if __name__ == "__main__":
    sys.exit(main())
