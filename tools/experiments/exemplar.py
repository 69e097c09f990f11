"""What an exemplar prior is worth by the way in which it is trained, beside a VampPrior: static MNIST, one seed.

    python -m tools.experiments.exemplar RUNS [--only NAME ...] [--as-they-are] [--out FILE.json]

RUNS is a folder with a run of `fastvae train` for each way, of 30 epochs.  Those that are not there, or not at their
end, are trained first; what was stopped goes on.  With --as-they-are none is trained further, and unfinished ones give
curves.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from fastvae import TrainingStep
from fastvae.app.data.dataset import Dataset, Split
from fastvae.app.data.named_sets import load
from fastvae.app.run.checkpoint import Epoch
from fastvae.app.run.config import TrainConfig, continued, make_config, read_config
from fastvae.app.run.evaluation import ACTIVE, BOUND_SAMPLES, log_likelihoods, posterior_means
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.measuring import measure
from fastvae.app.run.randomness import Stream, reseed
from fastvae.app.run.trained import TrainedRun, load_run
from fastvae.app.run.training import Watchers, finished, train
from fastvae.benchmarks import formatting
from fastvae.benchmarks.record import code, machine, versions
from fastvae.contracts import encode
from fastvae.functional import gaussian_rsample
from fastvae.priors import ExemplarPrior

from . import command

SETTINGS: dict[str, Any] = {"data": "static-mnist", "prior": "exemplar", "epochs": 30}  # else the defaults
EVERY, SAMPLES = 20, 1000  # of the test images for the log-likelihood; all else is of all of them
REFERENCE = "vamp"
OWN: dict[str, Any] = {"shared_variance": False}  # each exemplar has the variance that the encoder gives it
SHARED: dict[str, Any] = {"shared_variance": True}
SUBSET: dict[str, Any] = {"subset": 500}
REFRESH: dict[str, Any] = {"refresh": 0.01, "neighbours": 5}
WAYS: dict[str, dict[str, Any]] = {
    REFERENCE: {"prior": "vamp"},
    "subset-500": SUBSET | OWN,
    "subset-500-shared": SUBSET | SHARED,
    "subset-2500-shared": {"subset": 2500} | SHARED,
    "refresh": REFRESH | OWN,
    "refresh-shared": REFRESH | SHARED,
}
OF_GRADIENTS = "subset-500", "subset-500-shared"  # the models whose gradients are looked at
BATCHES, DRAWS, CHUNK = 5, 5, 1000  # of images, and of exemplars for each; exemplars encoded at once
STEPS = 20  # that are timed
SHOWN = 8, 10, 20, 30  # epochs


def settings(name: str) -> TrainConfig:
    """Those of a way's run."""
    return make_config(SETTINGS | WAYS[name])


def trained(name: str, folder: RunFolder, dataset: Dataset) -> None:
    """Train a way's run to its end."""
    config, resume = settings(name), folder.holds_run()
    if resume:
        config = continued(read_config(folder.config), asdict(config))

    def tell(line: Epoch) -> None:
        print(f"{name}: epoch {line['epoch']}, validation bound {line['validation']['bound']:.2f}", file=sys.stderr)

    train(config, dataset, folder.path, resume=resume, watchers=Watchers(epoch=tell))


def curves(run: TrainedRun) -> dict[str, Any]:
    """What the record keeps of a run's history."""
    history = run.checkpoint["history"]
    return {
        "settings": {name: value for name, value in asdict(run.config).items() if name != "data_dir"},
        "epochs": run.checkpoint["epoch"],
        "finished": finished(run.config, run.checkpoint),
        "train_elbo": [round(line["train"]["elbo"], 3) for line in history],
        "validation": {
            name: [round(line["validation"][name], 3) for line in history] for name in ("elbo", "reconstruction", "kl")
        },
    }


@torch.no_grad()
def worth(run: TrainedRun) -> tuple[dict[str, Any], Tensor]:
    """What the record keeps of a finished run's best model, and log p(x) of each image that it is of, float64 [N]."""
    x = run.dataset.test.x
    # The images are in the order of their classes, so that the first ones would tell of one class.
    some = replace(run.dataset, test=Split(x[::EVERY]))
    each = log_likelihoods(replace(run, dataset=some), EvaluationPlan("test", SAMPLES))
    reseed(run.config.seed, Stream.EVALUATE)
    measures = measure(run.vae, x, num_samples=BOUND_SAMPLES)
    _, logvar, _ = run.vae.prior.components()  # type: ignore[operator]
    found = {
        "best_epoch": run.checkpoint["best_epoch"],
        "log_likelihood": float(each.mean()),
        "standard_error": float(each.std()) / len(each) ** 0.5,
        "elbo": measures["elbo"],
        "reconstruction": measures["reconstruction"],
        "kl": measures["kl"],
        "active_units": int((posterior_means(run.vae, x).var(0, correction=0) > ACTIVE).sum()),
        "posterior_variance": float(encode(run.vae.encoder, x)[1].mean().exp()),  # geometric means
        "component_variance": float(logvar.mean().exp()),
    }
    return found, each


def step_seconds(run: TrainedRun) -> float:
    """Seconds of the processor for a step of training: the median of some, which leave the weights as they are."""
    images, times = run.dataset.train.x, []
    step = TrainingStep(run.vae.train(), Adam(run.vae.parameters(), lr=0.0), prepare=lambda rows: images[rows])
    for rows in torch.randint(len(images), (1 + STEPS, run.config.batch_size)):
        started = time.process_time()
        step(rows, index=rows)
        times.append(time.process_time() - started)
    run.vae.eval()
    return median(times[1:])  # the first may encode all exemplars, and does so once in an epoch


def gradients(run: TrainedRun) -> dict[str, Any]:
    """How far the expected gradient of the KL term, in the encoder's weights, is from that with all exemplars encoded.

    `distance` is the norm of the difference over the norm of that gradient.  `arrives` is of the part that comes by way
    of the exemplars: its component along the same part with all encoded, over the norm of that.  Encodings that a step
    keeps from earlier ones are not old here, so that the difference is that of what is encoded alone.
    """
    whole, by_exemplars = _mean_gradients(run, {}, draws=1)
    found = {}
    for name, options in (("refresh", REFRESH), ("subset", SUBSET)):
        other, other_by_exemplars = _mean_gradients(run, options, DRAWS)
        found[name] = {
            "distance": float((other - whole).norm() / whole.norm()),
            "arrives": float(other_by_exemplars @ by_exemplars / by_exemplars.square().sum()),
        }
    return found


def _mean_gradients(run: TrainedRun, options: dict[str, Any], draws: int) -> tuple[Tensor, Tensor]:
    """(of the KL term, of its part by way of the exemplars), means over batches of training images and draws."""
    images, encoder, trained_prior = run.dataset.train.x, run.vae.encoder, run.vae.prior
    assert isinstance(trained_prior, ExemplarPrior)
    parameters = list(encoder.parameters())
    prior = ExemplarPrior(encoder, images, chunk_size=CHUNK, **options).train()
    prior.logvar = trained_prior.logvar
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))

    def gradient(loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    total = torch.zeros(2, sum(parameter.numel() for parameter in parameters))
    for number, index in enumerate(order[: BATCHES * run.config.batch_size].split(run.config.batch_size)):
        for draw in range(draws):
            torch.manual_seed(number)  # the same z, whatever is encoded
            mu, logvar = encode(encoder, images[index])
            z, log_q = gaussian_rsample(mu, logvar)
            torch.manual_seed(BATCHES + number * draws + draw)
            density = prior.density(index, mu)
            total[0] += gradient((log_q - density(z)).mean())
            total[1] += gradient(-density(z.detach()).mean())
    kl_term, by_exemplars = total / (BATCHES * draws)
    return kl_term, by_exemplars


def measured(runs: Path, names: list[str], as_they_are: bool) -> dict[str, Any]:
    """The record."""
    torch.set_num_threads(1)
    dataset, ways, every, of_gradients = load(SETTINGS["data"]), {}, {}, {}
    for name in names:
        folder = RunFolder(runs / name)
        if not as_they_are:
            trained(name, folder, dataset)
        elif not folder.holds_run():
            continue
        run = load_run(folder.path, dataset=dataset)
        ways[name] = curves(run) | {"step_seconds": step_seconds(run)}
        if ways[name]["finished"]:
            found, every[name] = worth(run)
            ways[name] |= found
        if name in OF_GRADIENTS:
            of_gradients[name] = gradients(run)
    for name, values in every.items():
        if name != REFERENCE and REFERENCE in every:
            difference = values - every[REFERENCE]  # of the same images, so that their own spread is not in it
            ways[name]["better_by"] = float(difference.mean())
            ways[name]["better_by_error"] = float(difference.std()) / len(difference) ** 0.5
    return {
        "images": len(dataset.test.x[::EVERY]),
        "importance_samples": SAMPLES,
        "ways": ways,
        "gradients": of_gradients,
        "machine": machine("cpu"),
        "versions": versions(),
        "code": code("cpu"),
    }


def markdown(content: dict[str, Any]) -> str:
    """The ways, with what a step costs, the curve of the bound, and the log-likelihood."""
    rows = []
    for name, found in content["ways"].items():
        elbos, better = found["validation"]["elbo"], found.get("better_by")
        rows.append(
            [
                _words(name, found["settings"]),
                f"{1e3 * found['step_seconds']:.0f} ms",
                *(f"{elbos[epoch - 1]:.2f}" if epoch <= len(elbos) else formatting.NOTHING for epoch in SHOWN),
                f"{found['log_likelihood']:.2f}" if found["finished"] else formatting.NOTHING,
                formatting.NOTHING if better is None else f"{better:+.2f} +- {found['better_by_error']:.2f}",
            ]
        )
    epochs = (f"{'validation ELBO, ' if epoch == SHOWN[0] else ''}epoch {epoch}" for epoch in SHOWN)
    header = ["", "a step", *epochs, "test log-likelihood", "better than the VampPrior"]
    return formatting.markdown(header, rows)


def term_table(content: dict[str, Any]) -> str:
    """What the ELBO of each finished run is made of, and how wide posteriors and components are."""
    rows = [
        [
            _words(name, found["settings"]),
            *(f"{found[term]:.2f}" for term in ("elbo", "reconstruction", "kl")),
            str(found["active_units"]),
            *(f"{found[of]:.2f}" for of in ("posterior_variance", "component_variance")),
        ]
        for name, found in content["ways"].items()
        if found["finished"]
    ]
    variances = ["variance of a posterior", "of a component"]
    return formatting.markdown(["", "test ELBO", "reconstruction", "KL", "active units", *variances], rows)


def gradient_table(content: dict[str, Any]) -> str:
    """What of the gradient arrives, by what a step encodes and the model that it is asked of."""
    rows = []
    for name, of_model in content["gradients"].items():
        for way, found in of_model.items():
            counts = _counts(REFRESH if way == "refresh" else SUBSET)
            model = "one variance" if content["ways"][name]["settings"]["shared_variance"] else "own variances"
            rows.append([model, counts, *(formatting.percent(found[part]) for part in ("arrives", "distance"))])
    header = ["model", "a step takes", "of the part through the exemplars arrives", "the KL term's gradient is off by"]
    return formatting.markdown(header, rows, left=2)


def _words(name: str, chosen: dict[str, Any]) -> str:
    """How a way trains, as its options say it."""
    if chosen["prior"] == "vamp":
        return f"VampPrior, K = {chosen['components']}"
    counts = _counts({option: chosen[option] for option in WAYS[name] if option != "shared_variance"})
    return f"{counts}, {'one variance' if chosen['shared_variance'] else 'own variances'}"


def _counts(options: dict[str, Any]) -> str:
    return ", ".join(f"`{option}={value:g}`" for option, value in options.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.experiments.exemplar", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", type=Path, metavar="RUNS", help="the folder with a run for each way")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help="these ways alone")
    parser.add_argument("--as-they-are", action="store_true", help="train no run further")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there too")
    options = parser.parse_args(arguments)
    return command.keep(lambda: measured(options.runs, options.only, options.as_they_are), markdown, options.out)


if __name__ == "__main__":
    sys.exit(main())
