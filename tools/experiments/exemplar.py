"""What an exemplar prior is worth by the way in which it is trained, beside a VampPrior: static MNIST, 30 epochs, one seed.

    python -m tools.experiments.exemplar RUNS [--only NAME ...] [--as-they-are] [--out FILE.json]

RUNS is a folder with a run of `fastvae train` for each way.  Those that are not there, or not at their end, are trained
first; what was stopped goes on.  --as-they-are trains no further.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastvae.app.data.dataset import Dataset
from fastvae.app.data.named_sets import load
from fastvae.app.run.checkpoint import Epoch
from fastvae.app.run.config import TrainConfig, continued, make_config, read_config
from fastvae.app.run.evaluation import ACTIVE, BOUND_SAMPLES, log_likelihoods, posterior_means
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.measuring import measure
from fastvae.app.run.randomness import Stream, reseed
from fastvae.app.run.trained import TrainedRun, load_run
from fastvae.app.run.training import Watchers, train
from fastvae.benchmarks import formatting
from fastvae.benchmarks.record import code, machine, versions, write_record
from fastvae.contracts import encode

from . import command

DATA, EPOCHS = "static-mnist", 30
PLAN = EvaluationPlan("test", samples=1000, limit=1000)
REFERENCE = "vamp"
REFRESH: dict[str, Any] = {"refresh": 0.01, "neighbours": 5}
SHARED: dict[str, Any] = {"shared_variance": True}
WAYS: dict[str, dict[str, Any]] = {
    REFERENCE: {"prior": "vamp"},
    "refresh": REFRESH,
    "refresh-shared": REFRESH | SHARED,
    "subset-500": {"subset": 500},
    "subset-500-shared": {"subset": 500} | SHARED,
    "subset-2500-shared": {"subset": 2500} | SHARED,
}


def settings(name: str, epochs: int = EPOCHS) -> TrainConfig:
    """Those of a way's run: the defaults of `fastvae train`, but for what the way changes."""
    return make_config({"data": DATA, "prior": "exemplar", "epochs": epochs, **WAYS[name]})


def trained(name: str, folder: RunFolder, dataset: Dataset) -> TrainedRun:
    """A way's run, trained to its end."""
    config, resume = settings(name), folder.holds_run()
    if resume:
        config = continued(read_config(folder.config), asdict(config))

    def tell(line: Epoch) -> None:
        print(f"{name}: epoch {line['epoch']}, validation bound {line['validation']['bound']:.2f}", file=sys.stderr)

    train(config, dataset, folder.path, resume=resume, watchers=Watchers(epoch=tell))
    return load_run(folder.path, dataset=dataset)


@torch.no_grad()
def worth(run: TrainedRun) -> tuple[dict[str, Any], Tensor]:
    """What the record keeps of a run, and the log-likelihood of each image of the plan, float64 [N]."""
    each, x = log_likelihoods(run, PLAN), PLAN.images(run.dataset)
    reseed(run.config.seed, Stream.EVALUATE)
    measures = measure(run.vae, x, num_samples=BOUND_SAMPLES)
    means = posterior_means(run.vae, x)
    _, logvar, _ = run.vae.prior.components()
    history = run.checkpoint["history"]
    changed = {
        field.name: getattr(run.config, field.name)
        for field in fields(TrainConfig)
        if field.name not in ("data", "data_dir", "data_sha256")
    }
    found = {
        "settings": changed,
        "epochs": run.checkpoint["epoch"],
        "best_epoch": run.checkpoint["best_epoch"],
        "seconds_per_epoch": round(median(line["seconds"] for line in history), 2),
        "train_elbo": [round(line["train"]["elbo"], 3) for line in history],
        "validation": {
            name: [round(line["validation"][name], 3) for line in history] for name in ("elbo", "reconstruction", "kl")
        },
        "log_likelihood": float(each.mean()),
        "standard_error": float(each.std()) / len(each) ** 0.5,
        "elbo": measures["elbo"],
        "reconstruction": measures["reconstruction"],
        "kl": measures["kl"],
        "active_units": int((means.var(0, correction=0) > ACTIVE).sum()),
        "posterior_logvar": float(encode(run.vae.encoder, x)[1].mean()),
        "prior_logvar": float(logvar.mean()),
    }
    return found, each


def measured(runs: Path, names: list[str], train_on: bool) -> dict[str, Any]:
    """The record."""
    torch.set_num_threads(1)
    dataset, ways, every = load(DATA), {}, {}
    for name in names:
        folder = RunFolder(runs / name)
        if train_on:
            run = trained(name, folder, dataset)
        elif folder.holds_run():
            run = load_run(folder.path, dataset=dataset)
        else:
            continue
        ways[name], every[name] = worth(run)
    for name, found in ways.items():
        if REFERENCE in every and name != REFERENCE:
            difference = every[name] - every[REFERENCE]  # of the same images, so that their own spread is not in it
            found["better_by"] = float(difference.mean())
            found["better_by_error"] = float(difference.std()) / len(difference) ** 0.5
    return {
        "data": DATA,
        "images": PLAN.limit,
        "importance_samples": PLAN.samples,
        "ways": ways,
        "machine": machine("cpu"),
        "versions": versions(),
        "code": code("cpu"),
    }


def markdown(content: dict[str, Any]) -> str:
    """A line for each way."""
    rows = []
    for name, found in content["ways"].items():
        elbos = found["validation"]["elbo"]
        better, error = found.get("better_by"), found.get("better_by_error")
        rows.append(
            [
                words(name, found["settings"]),
                f"{found['seconds_per_epoch']:.0f} s",
                *(f"{elbos[epoch - 1]:.2f}" if epoch <= len(elbos) else formatting.NOTHING for epoch in SHOWN),
                f"{found['reconstruction']:.2f}",
                f"{found['kl']:.2f}",
                f"{found['log_likelihood']:.2f}",
                formatting.NOTHING if better is None else f"{better:+.2f} +- {error:.2f}",
            ]
        )
    header = [
        "in a step of training",
        "an epoch",
        *(f"validation ELBO, epoch {epoch}" for epoch in SHOWN),
        "reconstruction",
        "KL",
        "test log-likelihood",
        "better than the VampPrior by",
    ]
    return formatting.markdown(header, rows)


def words(name: str, settings: dict[str, Any]) -> str:
    """How a way trains, as its options say it."""
    if settings["prior"] == "vamp":
        return f"VampPrior, {settings['components']} pseudo-inputs"
    said = [f"`--{option.replace('_', '-')} {settings[option]}`" for option in WAYS[name] if option != "shared_variance"]
    return ", ".join([*said, *(["`--shared-variance`"] if settings["shared_variance"] else [])])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.experiments.exemplar", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", type=Path, metavar="RUNS", help="the folder with a run for each way")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME", help="these ways alone")
    parser.add_argument("--as-they-are", action="store_true", help="train no run further")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there too")
    options = parser.parse_args(arguments)
    return command.keep(
        lambda: measured(options.runs, options.only, not options.as_they_are), markdown, options.out
    )


if __name__ == "__main__":
    sys.exit(main())
