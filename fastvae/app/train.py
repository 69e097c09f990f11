"""The training loop."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.optim import Adam

from fastvae import VAE
from fastvae.app.atomic import write_json
from fastvae.app.config import TrainConfig, write_config
from fastvae.app.dataset import Dataset
from fastvae.app.errors import RunError
from fastvae.app.models import build
from fastvae.app.randomness import Stream, reseed
from fastvae.app.run_folder import Checkpoint, Epoch, Measures, RunFolder, versions

VALIDATION_BATCH = 1000  # images encoded at once

OnBatch = Callable[[int, int], None]
OnEpoch = Callable[[Epoch], None]


@dataclass(frozen=True)
class Watchers:
    """Who is told how training goes: of each batch its epoch and index, of each epoch its history line."""

    batch: OnBatch = lambda epoch, index: None
    epoch: OnEpoch = lambda line: None


def train(
    config: TrainConfig,
    dataset: Dataset,
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    watchers: Watchers | None = None,
) -> Checkpoint:
    """Train a model, keeping in `out` a checkpoint of the last finished epoch and of the best model.

    The best model is the one with the highest validation ELBO, the KL term counting in full. Training stops
    after `config.epochs`, or when the ELBO has not improved for `config.patience` epochs after the warm-up.

    Args:
        config: the settings.
        dataset: the data that `config.data` names.
        out: the run's folder; made if it is not there.
        resume: go on from the checkpoint in `out`, to the same end, bit for bit, as without a stop.
        device: where to train, in torch's words.
        watchers: told how it goes.

    Returns:
        The last checkpoint.

    Raises:
        RunError: `out` holds a run and `resume` was not said, or the loss is no longer a finite number.
    """
    folder, watchers = RunFolder(out), watchers or Watchers()
    if folder.holds_run() and not resume:
        raise RunError(f"{out}: holds a run already; say --resume to go on with it or --overwrite to replace it.")
    vae = build(config, dataset).to(device)
    optimizer = Adam(vae.parameters(), lr=config.learning_rate, fused=True)
    state = _first(vae, optimizer)
    if folder.checkpoint.exists():
        state = folder.load(device)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    out.mkdir(parents=True, exist_ok=True)
    write_config(folder.config, config)
    if not finished(config, state):
        folder.clear_results()
    images, validation = dataset.train.x.to(device), dataset.validation.x.to(device)

    while not finished(config, state):
        epoch = state["epoch"] + 1
        started = time.perf_counter()
        beta = min(1.0, epoch / config.warmup) if config.warmup else 1.0
        reseed(config.seed, Stream.TRAIN, epoch)
        measured = _one_epoch(vae, optimizer, images, dataset.dynamic, config.batch_size, beta, epoch, watchers.batch)
        seconds = time.perf_counter() - started
        # The same noise for every epoch: the bounds of two epochs then differ by their models alone.
        reseed(config.seed, Stream.VALIDATE)
        line = Epoch(epoch=epoch, beta=beta, train=measured, validation=bound(vae, validation), seconds=seconds)
        state = _next(state, line, vae, optimizer)
        folder.save(state)
        watchers.epoch(line)

    write_json(folder.results, results(config, dataset, state, device))
    return state


def finished(config: TrainConfig, state: Checkpoint) -> bool:
    """Whether all epochs are done, or the ELBO has not improved for long enough to stop early."""
    waited = state["epoch"] - max(state["best_epoch"], config.warmup)
    return state["epoch"] >= config.epochs or waited >= config.patience


def bound(vae: VAE, x: Tensor, num_samples: int = 1) -> Measures:
    """The ELBO and its two terms, each the mean over the images x [N, pixels]."""
    was_training = vae.training
    vae.eval()
    reconstruction = kl = 0.0
    with torch.no_grad():
        for batch in x.split(VALIDATION_BATCH):
            output = vae(batch, num_samples=num_samples)
            reconstruction += float(output.reconstruction.sum(dtype=torch.float64))
            kl += float(output.kl.sum(dtype=torch.float64))
    vae.train(was_training)
    return Measures(elbo=(reconstruction - kl) / len(x), reconstruction=reconstruction / len(x), kl=kl / len(x))


def results(config: TrainConfig, dataset: Dataset, state: Checkpoint, device: str) -> dict[str, object]:
    """What a training run gave, ready for JSON."""
    seconds = [line["seconds"] for line in state["history"]]
    return {
        "config": asdict(config),
        "data": {
            "source": dataset.source,
            "train": len(dataset.train),
            "validation": len(dataset.validation),
        },
        "epochs": state["epoch"],
        "best_epoch": state["best_epoch"],
        "best_validation_elbo": state["best_elbo"],
        "stopped_early": state["epoch"] < config.epochs,
        "seconds_per_epoch": median(seconds),
        "seconds": sum(seconds),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "history": state["history"],
    }


def _first(vae: VAE, optimizer: Adam) -> Checkpoint:
    weights = copy.deepcopy(vae.state_dict())
    return Checkpoint(
        epoch=0,
        model=weights,
        optimizer=optimizer.state_dict(),
        best_epoch=0,
        best_elbo=-math.inf,
        best_model=weights,
        history=[],
    )


def _next(state: Checkpoint, line: Epoch, vae: VAE, optimizer: Adam) -> Checkpoint:
    elbo, better = line["validation"]["elbo"], line["validation"]["elbo"] > state["best_elbo"]
    if not math.isfinite(elbo):
        raise _not_finite("validation ELBO", elbo, line["epoch"])
    weights = vae.state_dict()
    return Checkpoint(
        epoch=line["epoch"],
        model=weights,
        optimizer=optimizer.state_dict(),
        best_epoch=line["epoch"] if better else state["best_epoch"],
        best_elbo=elbo if better else state["best_elbo"],
        best_model=copy.deepcopy(weights) if better else state["best_model"],
        history=[*state["history"], line],
    )


def _one_epoch(
    vae: VAE,
    optimizer: Adam,
    images: Tensor,
    dynamic: bool,
    batch_size: int,
    beta: float,
    epoch: int,
    on_batch: OnBatch,
) -> Measures:
    vae.train()
    reconstruction = kl = 0.0
    order = torch.randperm(len(images), device=images.device)
    for index, rows in enumerate(order.split(batch_size)):
        x = images[rows]
        if dynamic:
            x = torch.bernoulli(x)
        output = vae(x, beta=beta)
        loss = float(output.loss.detach())
        if not math.isfinite(loss):
            raise _not_finite("training loss", loss, epoch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        reconstruction += float(output.reconstruction.detach().sum(dtype=torch.float64))
        kl += float(output.kl.detach().sum(dtype=torch.float64))
        on_batch(epoch, index)
    count = len(images)
    return Measures(elbo=(reconstruction - kl) / count, reconstruction=reconstruction / count, kl=kl / count)


def _not_finite(what: str, value: float, epoch: int) -> RunError:
    return RunError(
        f"the {what} became {value} in epoch {epoch}. What was saved before is kept; try a lower "
        "--learning-rate or a longer --warmup."
    )
