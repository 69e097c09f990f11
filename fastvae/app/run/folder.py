"""The folder of a training run: what is in it, and its checkpoint."""

from __future__ import annotations

import pickle
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

import fastvae
from fastvae import VAE
from fastvae.app.data.dataset import Dataset
from fastvae.app.data.named_sets import load
from fastvae.app.data.whole_file import whole_file
from fastvae.app.run.config import TrainConfig, read_config
from fastvae.app.run.networks import build
from fastvae.app.user_errors import RunError

PICTURES = ("curves", "reconstructions", "samples", "pseudo_inputs", "latent_space")
GAP = "prior_and_posterior"  # the picture that evaluation draws


def versions() -> dict[str, str]:
    """What a run's numbers may depend on."""
    return {"fastvae": fastvae.__version__, "torch": torch.__version__, "python": platform.python_version()}


class Measures(TypedDict):
    """Means over images, in nats; `bound` is the one that training maximises, the ELBO or another."""

    bound: float
    elbo: float
    reconstruction: float
    kl: float


class Epoch(TypedDict):
    """One line of a run's history; `beta` is the weight of the KL term in the training loss."""

    epoch: int
    beta: float
    train: Measures
    validation: Measures
    seconds: float


class Checkpoint(TypedDict):
    """All that is needed to go on, or to evaluate the best model so far.

    Random number generators have no state to keep: every epoch seeds them anew (see `randomness`).
    """

    epoch: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    best_epoch: int
    best_bound: float
    best_model: dict[str, Tensor]
    history: list[Epoch]


@dataclass(frozen=True)
class RunFolder:
    """Names the files of a run."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings, as JSON."""
        return self.path / "config.json"

    @property
    def checkpoint(self) -> Path:
        """The last whole checkpoint."""
        return self.path / "checkpoint.pt"

    @property
    def results(self) -> Path:
        """What training gave, as JSON; there once training is finished."""
        return self.path / "results.json"

    @property
    def evaluation(self) -> Path:
        """What evaluation gave, as JSON."""
        return self.path / "evaluation.json"

    def picture(self, name: str) -> Path:
        """The PNG of one of PICTURES, or of GAP."""
        return self.path / f"{name}.png"

    def pictures(self) -> list[Path]:
        """The pictures that are there."""
        return [path for path in map(self.picture, (*PICTURES, GAP)) if path.exists()]

    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return self.config.exists() or self.checkpoint.exists()

    def files(self) -> list[Path]:
        """The files of a run that are there."""
        files = (self.config, self.checkpoint, self.results, self.evaluation)
        return [*(path for path in files if path.exists()), *self.pictures()]

    def clear(self) -> None:
        """Delete the files of a run, and no others."""
        for file in self.files():
            file.unlink()

    def clear_results(self) -> None:
        """Delete what was measured on a model that is about to be trained further."""
        self.results.unlink(missing_ok=True)
        self.evaluation.unlink(missing_ok=True)
        self.picture(GAP).unlink(missing_ok=True)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint, whole or not at all."""
        with whole_file(self.checkpoint) as file:
            torch.save(checkpoint, file)

    def load(self, device: str = "cpu") -> Checkpoint:
        """Read the checkpoint; tensors and plain values only, never code.

        Raises:
            RunError: there is none, or it cannot be read.
        """
        try:
            content = torch.load(self.checkpoint, map_location=device, weights_only=True)
        except FileNotFoundError as error:
            raise RunError(f"{self.path}: no epoch has been finished here yet, so there is no checkpoint.") from error
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
            raise RunError(f"{self.checkpoint}: cannot be read; it is damaged or not a checkpoint.") from error
        if not isinstance(content, dict) or set(content) != set(Checkpoint.__annotations__):
            raise RunError(f"{self.checkpoint}: is not a checkpoint of this version.")
        return cast(Checkpoint, content)


@dataclass(frozen=True)
class TrainedRun:
    """A run with its best model, in evaluation mode."""

    folder: RunFolder
    config: TrainConfig
    dataset: Dataset
    vae: VAE
    checkpoint: Checkpoint
    device: str


def load_run(
    path: Path, data_dir: Path | None = None, *, dataset: Dataset | None = None, device: str = "cpu"
) -> TrainedRun:
    """Load the best model of a run, and its data, which are in `data_dir` if they have moved."""
    folder = RunFolder(path)
    config = read_config(folder.config)
    checkpoint = folder.load(device)
    if dataset is None:
        dataset = load(config.data, data_dir or config.data_dir, binarize=config.binarize)
    vae = build(config, dataset).to(device)
    try:
        vae.load_state_dict(checkpoint["best_model"])
    except RuntimeError as error:
        raise RunError(f"{folder.checkpoint}: does not fit {folder.config} and the data ({error}).") from error
    return TrainedRun(folder, config, dataset, vae.eval(), checkpoint, device)
