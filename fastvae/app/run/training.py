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

from fastvae import VAE, TrainingStep
from fastvae._files import write_json
from fastvae.app.data.dataset import Dataset
from fastvae.app.run.checkpoint import (
    Checkpoint,
    Epoch,
    Measures,
    load_optimizer,
    load_weights,
    read_checkpoint,
    write_checkpoint,
    write_first_checkpoint,
)
from fastvae.app.run.config import TrainConfig, begun, option
from fastvae.app.run.data_parallel import shared_training
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.measuring import Meter, Total
from fastvae.app.run.networks import build
from fastvae.app.run.optimizer import NormalizedAdam
from fastvae.app.run.randomness import Stream, reseed
from fastvae.app.run.ranks import ALONE, Ranks
from fastvae.app.run.trained import versions, with_fingerprint
from fastvae.app.user_errors import ConfigError, RunError
from fastvae.backends import choose

OnBatch = Callable[[int, int], None]
OnEpoch = Callable[[Epoch], None]


@dataclass(frozen=True)
class Watchers:
    """Functions that are called as training goes: after a batch with its epoch and index, after an epoch with its line
    of the history.
    """

    batch: OnBatch = lambda epoch, index: None
    epoch: OnEpoch = lambda line: None


def train(
    config: TrainConfig,
    dataset: Dataset,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    watchers: Watchers | None = None,
    ranks: Ranks = ALONE,
) -> Checkpoint:
    """Train a model, keeping in `out` a checkpoint of the last finished epoch and of the best model.

    The best model is the one with the highest validation bound, the KL term counting in full. Training stops
    after `config.epochs`, or when the bound has not improved for `config.patience` epochs after the warm-up.

    Nothing is written before the first epoch is finished, so what fails at once leaves `out` as it was.

    Args:
        config: the settings.
        dataset: the data that `config.data` names.
        out: the run's folder; made if it is not there.
        resume: go on from the checkpoint in `out`, to the same end, bit for bit, as without a stop.
        overwrite: replace the run in `out`, once the first epoch of the new one is finished.
        device: where to train, in torch's words.
        watchers: told how it goes.
        ranks: those that train together, joined; each calls this function, with settings and data that are the same.

    Returns:
        The last checkpoint.

    Raises:
        RunError: `out` holds a run and neither `resume` nor `overwrite` was said, the run does not fit the settings, or
            the loss is no longer a finite number.
        ConfigError: the data are not those that the settings have the fingerprint of; there are more ranks than images
            in a batch; the ranks' settings differ.
    """
    folder, watchers = RunFolder(out), watchers or Watchers()
    if not (resume or overwrite):
        folder.refuse_run()
    config = with_fingerprint(config, dataset)
    earlier = read_checkpoint(folder, device) if resume and folder.holds_run() else None
    if earlier is None:
        config = begun(config, len(dataset.train))
    _check_ranks(ranks, config, dataset, earlier)  # before anything else that they do together
    vae = build(config, dataset, ranks).to(device)
    kind = NormalizedAdam if config.normalize_gradients else Adam
    optimizer = kind(vae.parameters(), lr=config.learning_rate, fused=True, capturable=device.startswith("cuda"))
    state = earlier or _first(vae, optimizer)
    if earlier is not None:
        load_weights(vae, earlier["model"], folder)
        load_optimizer(optimizer, earlier["optimizer"], folder)
    if finished(config, state):
        ranks.on_first(write_json, folder.config, asdict(config))  # the data may have moved
    first = state["epoch"] + 1
    images, validation = dataset.train.x.to(device), dataset.validation.x.to(device)
    labels, held_out = (
        dataset.y(split).to(device) if config.conditional else None for split in (dataset.train, dataset.validation)
    )
    step = TrainingStep(
        shared_training(vae, ranks, images, labels),
        optimizer,
        prepare=lambda rows: torch.bernoulli(images[rows]) if dataset.dynamic else images[rows],
        num_samples=config.num_samples,
        bound=config.bound,
        gradient=config.gradient,
        backward_samples=config.backward_samples,
    )
    meter = Meter(vae, config.num_samples, config.bound, ranks)

    while not finished(config, state):
        epoch = state["epoch"] + 1
        started = time.perf_counter()
        beta = min(1.0, epoch / config.warmup) if config.warmup else 1.0
        reseed(config.seed, Stream.TRAIN, epoch)
        measured = _one_epoch(step, images, labels, config.batch_size, beta, epoch, watchers.batch, ranks)
        seconds = time.perf_counter() - started
        # The same noise for every epoch: the bounds of two epochs then differ by their models alone.
        reseed(config.seed, Stream.VALIDATE)
        validated = meter(validation, held_out)
        line = Epoch(epoch=epoch, beta=beta, train=measured, validation=validated, seconds=seconds)
        state = _next(state, line, vae, optimizer)
        if epoch == first:
            ranks.on_first(out.mkdir, parents=True, exist_ok=True)
            ranks.on_first(write_first_checkpoint, folder, config, state)
        else:
            ranks.on_first(write_checkpoint, folder, state)
        watchers.epoch(line)

    ranks.on_first(write_json, folder.results, results(config, dataset, state, device, ranks))
    return state


def finished(config: TrainConfig, state: Checkpoint) -> bool:
    """Whether all epochs are done, or the bound has not improved for long enough to stop early."""
    waited = state["epoch"] - max(state["best_epoch"], config.warmup)
    return state["epoch"] >= config.epochs or waited >= config.patience


def results(
    config: TrainConfig, dataset: Dataset, state: Checkpoint, device: str, ranks: Ranks = ALONE
) -> dict[str, object]:
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
        "best_validation_bound": state["best_bound"],
        "stopped_early": state["epoch"] < config.epochs,
        "seconds_per_epoch": median(seconds),
        "seconds": sum(seconds),
        "device": device,
        "processes": ranks.size,
        "impl": choose(None, torch.device(device), precision=None),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "history": state["history"],
    }


def _check_ranks(ranks: Ranks, config: TrainConfig, dataset: Dataset, earlier: Checkpoint | None) -> None:
    settings = {option(name): value for name, value in asdict(config).items()}
    ranks.check_same(settings | {"the last epoch": 0 if earlier is None else earlier["epoch"]})
    rows = min(config.batch_size, len(dataset.train))
    if ranks.size > rows:
        raise ConfigError(
            f"{ranks.size} processes cannot share batches of {rows} images; start fewer, or say a larger --batch-size "
            f"({dataset.name} has {len(dataset.train)} training images)."
        )
    if ranks.size > 1 and config.neighbours:
        raise ConfigError("--neighbours is for one process: each of several knows those of its own images alone.")
    if ranks.size > 1 and config.backward_components is not None:
        raise ConfigError("--backward-components is for one process: each of several would choose by its own images.")


def _first(vae: VAE, optimizer: Adam) -> Checkpoint:
    weights = copy.deepcopy(vae.state_dict())
    return Checkpoint(
        epoch=0,
        model=weights,
        optimizer=optimizer.state_dict(),
        best_epoch=0,
        best_bound=-math.inf,
        best_model=weights,
        history=[],
    )


def _next(state: Checkpoint, line: Epoch, vae: VAE, optimizer: Adam) -> Checkpoint:
    bound = line["validation"]["bound"]
    better = bound > state["best_bound"]
    if not math.isfinite(bound):
        raise _not_finite("validation bound", bound, line["epoch"])
    weights = vae.state_dict()
    return Checkpoint(
        epoch=line["epoch"],
        model=weights,
        optimizer=optimizer.state_dict(),
        best_epoch=line["epoch"] if better else state["best_epoch"],
        best_bound=bound if better else state["best_bound"],
        best_model=copy.deepcopy(weights) if better else state["best_model"],
        history=[*state["history"], line],
    )


def _one_epoch(
    step: TrainingStep,
    images: Tensor,
    labels: Tensor | None,
    batch_size: int,
    beta: float,
    epoch: int,
    on_batch: OnBatch,
    ranks: Ranks,
) -> Measures:
    step.vae.train()
    total = Total(images.device)
    order = torch.randperm(len(images), device=images.device)
    for number, rows in enumerate(order.split(batch_size)):
        output = step(rows, None if labels is None else labels[rows], beta=beta, index=rows)
        total.add(output)
        on_batch(epoch, number)
    total = total.of_all(ranks)
    if not math.isfinite(total.loss):
        raise _not_finite("training loss", total.loss, epoch)
    return total.mean()


def _not_finite(what: str, value: float, epoch: int) -> RunError:
    return RunError(
        f"the {what} became {value} in epoch {epoch}. What was saved before is kept; try a lower "
        "--learning-rate or a longer --warmup."
    )
