"""What the ranks of a training run do; apart from the tests, so that a rank imports little."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae.app.data.dataset import Dataset, Split
from fastvae.app.run import evaluation
from fastvae.app.run.checkpoint import Checkpoint
from fastvae.app.run.config import TrainConfig
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.ranks import Ranks
from fastvae.app.run.trained import load_run
from fastvae.app.run.training import train

# 80 images in batches of 26: no batch has the same share for each of 3 ranks, and of the last one, 2, a rank has none.
CONFIG = TrainConfig(components=6, latent=3, hidden=12, epochs=2, warmup=1, batch_size=26, learning_rate=3e-3)


def images() -> Dataset:
    """Labelled grey images, whose pixels each epoch draws."""
    x = torch.rand(120, 9, generator=torch.Generator().manual_seed(1))
    splits = (Split(part, torch.arange(len(part)) % 3) for part in (x[:80], x[80:100].round(), x[100:].round()))
    return Dataset("tiny", "made here", *splits, image_shape=(3, 3), kind="binary", dynamic=True)


def train_on(rank: int, size: int, config: TrainConfig, out: Path, **options: Any) -> Checkpoint:
    return train(config, images(), out, ranks=Ranks(rank, size), **options)


def train_wrongly(rank: int, size: int, what: str, out: Path) -> None:
    config, data = replace(CONFIG, prior="exemplar"), images()
    if what == "not a number":
        x = data.train.x.clone()
        x[5, 5] = math.nan
        data = replace(data, train=replace(data.train, x=x), dynamic=False)
    if what == "other settings":
        config = replace(config, learning_rate=(1 + rank) * 1e-3)
    if what == "another prior" and rank == 2:
        config = replace(config, prior="vamp")
    if what == "small batches":
        config = replace(config, batch_size=2)
    if what == "few images":
        data = replace(data, train=replace(data.train, x=data.train.x[:2], labels=torch.arange(2)))
    if what == "backward_components":
        config = replace(config, backward_components=2)
    if what == "neighbours":
        config = replace(config, neighbours=1, refresh=0.5)
    train(config, data, out / f"of-rank-{rank}", ranks=Ranks(rank, size))


def train_in_own_folder(rank: int, size: int, out: Path) -> None:
    train_on(rank, size, CONFIG, out / f"of-rank-{rank}")


def evaluate_on(rank: int, size: int, folder: Path, samples: int) -> Tensor:
    """The log-likelihoods of the test images, three at a time."""
    evaluation.BATCH = 3
    return evaluation.log_likelihoods(load_run(folder), EvaluationPlan(samples=samples), ranks=Ranks(rank, size))
