"""The checkpoint of a run: all that is needed to go on, or to evaluate the best model so far."""

from __future__ import annotations

import pickle
from dataclasses import asdict
from typing import Any, cast

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import TypedDict  # pydantic reads typing's own from Python 3.12 on alone

from fastvae import VAE
from fastvae._files import as_json, whole_file, whole_files
from fastvae.app.run.config import TrainConfig
from fastvae.app.run.folder import RunFolder
from fastvae.app.user_errors import RunError

_AS_IT_IS = ConfigDict(arbitrary_types_allowed=True, strict=True, extra="forbid")


@with_config(_AS_IT_IS)
class Measures(TypedDict):
    """Means over images, in nats; `bound` is the one that training maximises, the ELBO or another."""

    bound: float
    elbo: float
    reconstruction: float
    kl: float


@with_config(_AS_IT_IS)
class Epoch(TypedDict):
    """One line of a run's history; `beta` is the weight of the KL term in the training loss."""

    epoch: int
    beta: float
    train: Measures
    validation: Measures
    seconds: float


@with_config(_AS_IT_IS)
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


_ANEW = " Without it, train the run anew with --overwrite."
_DAMAGE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, TypeError, AttributeError)
_CHECKPOINT = TypeAdapter(Checkpoint)


def write_first_checkpoint(folder: RunFolder, config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Write settings and checkpoint of a run that begins or goes on: both, or where one cannot be written, neither.

    What was measured on an earlier model is deleted, and what TensorBoard shows of an earlier run.
    """
    outdated = folder.of_the_model() + (folder.event_files() if checkpoint["epoch"] == 1 else [])
    # The settings appear first: alone they are no run yet, and an earlier checkpoint of theirs still fits them.
    with whole_files(folder.config, folder.checkpoint, outdated=outdated) as (settings, state):
        settings.write(as_json(asdict(config)))
        torch.save(checkpoint, state)


def write_checkpoint(folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Write the checkpoint, whole or not at all."""
    with whole_file(folder.checkpoint) as file:
        torch.save(checkpoint, file)


def read_checkpoint(folder: RunFolder, device: str = "cpu") -> Checkpoint:
    """Read the checkpoint; tensors and plain values only, never code.

    Raises:
        RunError: there is none, or it cannot be read.
    """
    try:
        content = torch.load(folder.checkpoint, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"{folder.path}: no epoch has been finished here yet, so there is no checkpoint.") from error
    except _DAMAGE as error:
        raise RunError(f"{folder.checkpoint}: cannot be read; it is damaged or not a checkpoint.{_ANEW}") from error
    try:
        _CHECKPOINT.validate_python(content)
    except ValidationError as error:
        raise RunError(f"{folder.checkpoint}: is not a checkpoint of this version.{_ANEW}") from error
    return cast(Checkpoint, content)


def load_weights(vae: VAE, weights: dict[str, Tensor], folder: RunFolder) -> None:
    """Put a checkpoint's weights into the model of its run.

    Raises:
        RunError: they are those of another model.
    """
    here = vae.state_dict()
    for name in dict.fromkeys([*here, *weights]):
        shapes = [list(state[name].shape) if name in state else "missing" for state in (weights, here)]
        if shapes[0] != shapes[1]:
            raise RunError(
                f"{folder.checkpoint}: is of another model than {folder.config} and the data describe ({name} is "
                f"{shapes[0]} there and should be {shapes[1]}). Put the run's own checkpoint back.{_ANEW}"
            )
    vae.load_state_dict(weights)


def load_optimizer(optimizer: Optimizer, state: dict[str, Any], folder: RunFolder) -> None:
    """Put a checkpoint's moments into the optimizer of its run.

    Raises:
        RunError: they are those of another model.
    """
    own = [{name: group[name] for name in ("lr", "capturable")} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{folder.checkpoint}: its optimizer is of another model.{_ANEW}") from error
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)  # which depend on the device: the run may have been on another one
