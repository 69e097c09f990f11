"""A run that was trained: its best model, with its settings and its data."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import fastvae
from fastvae import VAE
from fastvae.app.data.dataset import Dataset, Split
from fastvae.app.data.named_sets import load
from fastvae.app.run.checkpoint import Checkpoint, load_weights, read_checkpoint
from fastvae.app.run.config import TrainConfig, moved_data, other_data, read_config
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.networks import build


@dataclass(frozen=True)
class TrainedRun:
    """A run with its best model, in evaluation mode."""

    folder: RunFolder
    config: TrainConfig
    dataset: Dataset
    vae: VAE
    checkpoint: Checkpoint
    device: str

    def y(self, split: Split) -> Tensor | None:
        """The labels of a set of images, int64 [N], as a conditional model takes them; None for other models."""
        return self.dataset.y(split).to(self.device) if self.config.conditional else None


def load_run(
    path: Path,
    data_dir: Path | None = None,
    *,
    data: str | None = None,
    dataset: Dataset | None = None,
    device: str = "cpu",
) -> TrainedRun:
    """Load the best model of a run, and its data.

    Args:
        path: the run's folder.
        data_dir: where the data are if they have moved.
        data: where the run's .npz file is if it has moved.
        dataset: the data, if they are loaded already.
        device: where to put the model, in torch's words.

    Raises:
        RunError: there is no run, or it is damaged.
        DataError, ConfigError: the data are not there, or are not the run's.
    """
    folder = RunFolder(path)
    config = read_config(folder.config)
    checkpoint = read_checkpoint(folder, device)
    if dataset is None:
        place = moved_data(config, data, data_dir)
        config = replace(config, data=place, data_dir=config.data_dir if data_dir is None else str(data_dir))
        dataset = load(place, config.data_dir, binarize=config.binarize)
    config = with_fingerprint(config, dataset)
    vae = build(config, dataset).to(device)
    load_weights(vae, checkpoint["best_model"], folder)
    return TrainedRun(folder, config, dataset, vae.eval(), checkpoint, device)


def with_fingerprint(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """The settings with the fingerprint of the data.

    Raises:
        ConfigError: the settings have the fingerprint of other data.
        DataError: the model is conditional and an image has no label.
    """
    fingerprint = dataset.labelled_fingerprint if config.conditional else dataset.fingerprint
    if config.data_sha256 not in (None, fingerprint):
        raise other_data(config.data, config.conditional)
    return replace(config, data_sha256=fingerprint)


def versions() -> dict[str, str]:
    """What a run's numbers may depend on."""
    return {"fastvae": fastvae.__version__, "torch": torch.__version__, "python": platform.python_version()}
