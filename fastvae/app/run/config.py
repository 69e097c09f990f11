"""What a run is: every choice that decides its result."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastvae.app.data.whole_file import write_json
from fastvae.app.user_errors import ConfigError, RunError
from fastvae.bounds import BOUNDS, GRADIENTS

PRIORS = ("standard", "mixture", "vamp", "exemplar")
PSEUDO_INITS = ("data", "noise")


@dataclass(frozen=True)
class TrainConfig:
    """All that decides the result of a training run; kept as config.json in the run's folder.

    The sizes are those of the VampPrior paper's one-layer VAE (Tomczak and Welling 2018). `warmup` and
    `patience` are in epochs; `learning_rate` is Adam's. `chunk_size` to `neighbours` are the prior's; `bound`, with
    `num_samples` draws and the estimator `gradient`, is what training maximises.
    """

    data: str = "digits"
    data_dir: str | None = None
    binarize: bool = False
    prior: str = "vamp"
    components: int = 500
    pseudo_init: str = "data"
    learn_weights: bool = False
    chunk_size: int | None = None
    subset: int | None = None
    refresh: float = 1.0
    neighbours: int = 0
    bound: str = "elbo"
    num_samples: int = 1
    gradient: str = "plain"
    latent: int = 40
    hidden: int = 300
    epochs: int = 100
    warmup: int = 20
    patience: int = 20
    batch_size: int = 100
    learning_rate: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("prior", self.prior, PRIORS)
        _one_of("pseudo_init", self.pseudo_init, PSEUDO_INITS)
        _one_of("bound", self.bound, BOUNDS)
        _one_of("gradient", self.gradient, GRADIENTS)
        for name in (
            "components",
            "latent",
            "hidden",
            "epochs",
            "patience",
            "batch_size",
            "num_samples",
            "chunk_size",
            "subset",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{option(name)} is {getattr(self, name)}; it should be 1 or more.")
        for name in ("warmup", "seed", "neighbours"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{option(name)} is {getattr(self, name)}; it should be 0 or more.")
        if not 0 < self.refresh <= 1:
            raise ConfigError(f"--refresh is {self.refresh}; it should be above 0 and at most 1.")
        if self.subset is not None and self.refresh < 1:
            raise ConfigError("--subset and --refresh are two ways to save work in a step; say one of them.")
        if self.bound == "elbo" and self.gradient == "dreg":
            raise ConfigError("--gradient dreg is for --bound iwae; for the ELBO it would be --gradient stl.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(f"--learning-rate is {self.learning_rate}; it should be above 0.")
        if self.warmup >= self.epochs:
            raise ConfigError(
                f"--warmup is {self.warmup} of {self.epochs} epochs; the KL term would never count in full. "
                "It should be below --epochs."
            )


def bound_name(config: TrainConfig) -> str:
    """The bound that training maximises, in words."""
    return "ELBO" if config.bound == "elbo" else f"IWAE bound of {config.num_samples} samples"


def option(field: str) -> str:
    """The command-line option that sets a field of TrainConfig."""
    return "--samples" if field == "num_samples" else "--" + field.replace("_", "-")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{option(name)} is {value!r}; it can be {', '.join(choices)}.")


# Found by trying, judged on the validation set alone.
FOR_DATA: dict[str, dict[str, Any]] = {
    "digits": {
        "components": 100,
        "latent": 16,
        "hidden": 100,
        "epochs": 250,
        "warmup": 40,
        "patience": 50,
        "learning_rate": 2e-3,
    }
}

FOR_BOUND: dict[str, dict[str, Any]] = {"iwae": {"num_samples": 50, "gradient": "dreg"}}


def make_config(given: dict[str, Any]) -> TrainConfig:
    """The settings of a new run: what was `given`, else what suits the data, else the general default.

    Entries of `given` that are None count as not given. A warm-up that was not given takes no more than a
    fifth of the epochs.
    """
    named = {key: value for key, value in given.items() if value is not None}
    for_bound = FOR_BOUND.get(named.get("bound", TrainConfig.bound), {})
    chosen = FOR_DATA.get(named.get("data", TrainConfig.data), {}) | for_bound | named
    if "warmup" not in named:
        epochs = chosen.get("epochs", TrainConfig.epochs)
        chosen["warmup"] = min(chosen.get("warmup", TrainConfig.warmup), max(epochs, 0) // 5)
    return TrainConfig(**chosen)


def continued(saved: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The settings for going on with a run: those it was begun with, or more epochs, or data that have moved.

    Raises:
        ConfigError: an option that was given differs from what the run was begun with; names the option.
    """
    changes = {key: value for key, value in given.items() if value is not None and value != getattr(saved, key)}
    for key, value in changes.items():
        if key == "data_dir" or (key == "epochs" and value > saved.epochs):
            continue
        more = " It can only be raised." if key == "epochs" else ""
        raise ConfigError(
            f"{option(key)} is {value}, but the run to be resumed was begun with {getattr(saved, key)}.{more}"
        )
    return replace(saved, **changes)


def write_config(path: Path, config: TrainConfig) -> None:
    """Write the settings as JSON."""
    write_json(path, asdict(config))


def read_config(path: Path) -> TrainConfig:
    """Read settings that `write_config` wrote."""
    known = {field.name for field in fields(TrainConfig)}
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or set(content) != known:
            raise ValueError("its fields are not those of this version's runs")
        return TrainConfig(**content)
    except FileNotFoundError as error:
        raise RunError(f"{path.parent}: holds no run (there is no {path.name} in it).") from error
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: cannot be read ({error}).") from error
