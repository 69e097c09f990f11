"""What a run is: every choice that decides its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ErrorDetails, from_json

from fastvae.app.data.places import is_own_file
from fastvae.app.user_errors import ConfigError, RunError

ModelName = Literal["vae", "hvae"]
PriorName = Literal["standard", "mixture", "vamp", "exemplar"]
PseudoInit = Literal["data", "noise", "flat"]
# The names of fastvae.bounds, said again because they are checked before PyTorch is imported.
BoundName = Literal["elbo", "iwae"]
GradientName = Literal["plain", "stl", "dreg"]

PRIORS: tuple[str, ...] = get_args(PriorName)

LARGEST = 2**31 - 1
AtLeastOne = Annotated[int, Field(ge=1, le=LARGEST)]
AtLeastZero = Annotated[int, Field(ge=0, le=LARGEST)]


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class TrainConfig:
    """All that decides the result of a training run; kept as config.json in the run's folder.

    The sizes are those of the VampPrior paper (Tomczak and Welling 2018); `model` is its one-level VAE or its
    hierarchical one, whose two levels have `latent` dimensions each. `warmup` and `patience` are in epochs;
    `learning_rate` is Adam's, whose gradients are first divided by their norms where `normalize_gradients` says so.
    `chunk_size` to `shared_variance` are the prior's; `bound`, with `num_samples` draws and the estimator `gradient` of
    `backward_samples` of them, is what training maximises. `truncated_logistic` is the likelihood of grey images as the
    paper's code has it, see :class:`fastvae.app.run.networks.TruncatedLogistic`. A `conditional` model is given the
    images' labels. `data_sha256` is the fingerprint of the images, and of a conditional model's labels, by which they
    are known again when their file has moved.
    """

    data: str = "digits"
    data_dir: str | None = None
    data_sha256: str | None = None
    binarize: bool = False
    model: ModelName = "vae"
    prior: PriorName = "vamp"
    components: AtLeastOne = 500
    pseudo_init: PseudoInit = "data"
    learn_weights: bool = False
    conditional: bool = False
    chunk_size: AtLeastOne | None = None
    subset: AtLeastOne | None = None
    refresh: Annotated[float, Field(gt=0, le=1)] = 1.0
    neighbours: AtLeastZero = 0
    backward_components: AtLeastOne | None = None
    shared_variance: bool = False
    bound: BoundName = "elbo"
    num_samples: AtLeastOne = 1
    gradient: GradientName = "plain"
    backward_samples: AtLeastOne | None = None
    latent: AtLeastOne = 40
    hidden: AtLeastOne = 300
    epochs: AtLeastOne = 100
    warmup: AtLeastZero = 20
    patience: AtLeastOne = 20
    batch_size: AtLeastOne = 100
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    normalize_gradients: bool = False
    truncated_logistic: bool = False
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _fit_together(self) -> TrainConfig:
        if self.subset is not None and self.refresh < 1:
            raise ConfigError("--subset and --refresh are two ways to save work in a step; say one of them.")
        if self.backward_components is not None and self.refresh < 1:
            raise ConfigError(
                "--backward-components and --refresh are two ways to save work in a step; say one of them."
            )
        if self.backward_components is not None and self.conditional:
            raise ConfigError("--backward-components is not for a --conditional model; leave one of them out.")
        if self.conditional and self.model == "hvae":
            raise ConfigError("--conditional is for --model vae; an hvae is not given labels.")
        if self.bound == "elbo" and self.gradient == "dreg":
            raise ConfigError("--gradient dreg is for --bound iwae; for the ELBO it would be --gradient stl.")
        if self.bound == "elbo" and self.backward_samples is not None:
            raise ConfigError("--backward-samples is for --bound iwae; for the ELBO it would be fewer --samples.")
        if self.warmup >= self.epochs:
            raise ConfigError(
                f"--warmup is {self.warmup} of {self.epochs} epochs; the KL term would never count in full. "
                "It should be below --epochs."
            )
        return self


# What runs of earlier versions do not say: for them the default holds.
ADDED_LATER = frozenset(
    {
        "data_sha256",
        "model",
        "shared_variance",
        "normalize_gradients",
        "conditional",
        "truncated_logistic",
        "backward_samples",
        "backward_components",
    }
)


def bound_name(config: TrainConfig) -> str:
    """The bound that training maximises, in words."""
    return "ELBO" if config.bound == "elbo" else f"IWAE bound of {config.num_samples} samples"


def prior_name(config: TrainConfig) -> str:
    """The prior, and the model unless it is the usual one, in words."""
    conditional = "conditional, " if config.conditional else ""
    return f"{conditional}{'hvae, ' if config.model == 'hvae' else ''}{config.prior} prior"


def latents_with_prior(config: TrainConfig) -> str:
    """The name of the latents that the prior is on: of two levels the upper one, z2."""
    return "z2" if config.model == "hvae" else "z"


def option(field: str) -> str:
    """The command-line option that sets a field of TrainConfig."""
    return "--samples" if field == "num_samples" else "--" + field.replace("_", "-")


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

# Found by `python -m tools.experiments.exemplar`.
FOR_PRIOR: dict[str, dict[str, Any]] = {"exemplar": {"shared_variance": True}}
# Exemplars that a step of training takes, unless it is said how many, or to refresh a share of all, or that few of them
# take part in backward.
EXEMPLARS = 500


def make_config(given: dict[str, Any]) -> TrainConfig:
    """The settings of a new run: what was `given`, else what suits data, prior and bound, else the general default.

    Entries of `given` that are None count as not given. A warm-up that was not given takes no more than a
    fifth of the epochs. How many exemplars a step takes is left open, see :func:`begun`.

    Raises:
        ConfigError: a setting, or a combination of them, makes no sense; the message names the option.
    """
    named = {key: value for key, value in given.items() if value is not None}
    chosen: dict[str, Any] = {}
    for field, settings in (("data", FOR_DATA), ("prior", FOR_PRIOR), ("bound", FOR_BOUND)):
        chosen |= settings.get(named.get(field, getattr(TrainConfig, field)), {})
    chosen |= named
    if "warmup" not in named:
        epochs = chosen.get("epochs", TrainConfig.epochs)
        chosen["warmup"] = min(chosen.get("warmup", TrainConfig.warmup), max(epochs, 0) // 5)
    return _validated(chosen)


# The settings that some priors have and others do not.
OF_PRIORS: dict[str, tuple[PriorName, ...]] = {
    "components": ("mixture", "vamp"),
    "pseudo_init": ("vamp",),
    "learn_weights": ("mixture", "vamp"),
    "chunk_size": ("vamp", "exemplar"),
    "subset": ("exemplar",),
    "refresh": ("vamp", "exemplar"),
    "neighbours": ("vamp", "exemplar"),
    "backward_components": ("vamp", "exemplar"),
    "shared_variance": ("exemplar",),
}


def without_effect(given: dict[str, Any], priors: Sequence[str]) -> list[str]:
    """A sentence for each setting that was given and that none of the priors has."""
    return [
        f"{option(field)} changes nothing with {' and '.join(priors)}: it is of the prior {' and '.join(owners)}."
        for field, owners in OF_PRIORS.items()
        if given.get(field) is not None and not set(owners) & set(priors)
    ]


def begun(config: TrainConfig, images: int) -> TrainConfig:
    """The settings of a new run once it is known how many training images there are.

    Where it was not said how many exemplars a step takes, it takes `EXEMPLARS` of them, or all if there are no more.
    """
    said = config.subset is not None or config.refresh < 1 or config.backward_components is not None
    if config.prior != "exemplar" or said or images <= EXEMPLARS:
        return config
    return replace(config, subset=EXEMPLARS)


def continued(saved: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The settings for going on with a run: those it was begun with, or more epochs, or data that have moved.

    Raises:
        ConfigError: an option that was given differs from what the run was begun with; names the option.
    """
    changes = {key: value for key, value in given.items() if value is not None and value != getattr(saved, key)}
    for key, value in changes.items():
        moved = key == "data_dir" or (key == "data" and is_own_file(value) and is_own_file(saved.data))
        first_known = key == "data_sha256" and saved.data_sha256 is None
        if moved or first_known or (key == "epochs" and value > saved.epochs):
            continue
        if key == "data_sha256":
            raise other_data(given.get("data") or saved.data, saved.conditional)
        more = " It can only be raised." if key == "epochs" else ""
        raise ConfigError(
            f"{option(key)} is {value}, but the run to be resumed was begun with {getattr(saved, key)}.{more}"
        )
    return _validated(asdict(saved) | changes | {"data": moved_data(saved, given.get("data"), given.get("data_dir"))})


def moved_data(config: TrainConfig, data: str | None, data_dir: str | Path | None) -> str:
    """Where a run's data are now: where `data` says, or its .npz file in `data_dir`, or where they were."""
    if data is None and data_dir is not None and is_own_file(config.data):
        return str(Path(data_dir).expanduser().absolute() / Path(config.data).name)
    return data or config.data


def other_data(data: str, conditional: bool) -> ConfigError:
    """The error that the data are not those of the run."""
    what = "images with the labels" if conditional else "images"
    return ConfigError(
        f"--data is {data}, which does not hold the {what} that the run was begun with. Say --data with the place "
        "where those are now, or begin a new run."
    )


def read_config(path: Path) -> TrainConfig:
    """Read the settings of a run.

    Raises:
        RunError: there are none, or they are damaged; the message names the option that is wrong.
    """
    known = {field.name for field in fields(TrainConfig)}
    try:
        content = from_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it should hold an option's name and value a line, in braces")
        if others := known - set(content) - ADDED_LATER | set(content) - known:
            raise ValueError(
                f"its settings are not those of this version's runs: {', '.join(sorted(others))} should "
                f"{'be there' if others <= known else 'not be there'}"
            )
        return _validated(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"{path.parent}: holds no run (there is no {path.name} in it).") from error
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).removesuffix(".")
        raise RunError(f"{path}: cannot be read ({reason}). Put it right, or train the run anew.") from error


def _validated(content: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig(**content)
    except ValidationError as error:
        raise _in_words(error.errors()[0]) from None


def _in_words(problem: ErrorDetails) -> ConfigError:
    """What pydantic found first, as the message of a wrong option."""
    context = problem.get("ctx", {})
    if isinstance(context.get("error"), ConfigError):
        return context["error"]
    wanted = {
        "greater_than_equal": "it should be {ge} or more",
        "greater_than": "it should be above {gt:g}",
        "less_than_equal": "it should be at most {le:,}",
        "literal_error": "it can be {expected}",
        "finite_number": "it should be a finite number",
        "int_type": "it should be a whole number",
        "float_type": "it should be a number",
        "bool_type": "it should be true or false",
        "string_type": "it should be text",
    }.get(problem["type"], problem["msg"])
    expected = str(context.get("expected", "")).replace("'", "").replace(" or ", ", ")
    words = wanted.format(**{**context, "expected": expected})
    return ConfigError(f"{option(str(problem['loc'][0]))} is {problem['input']!r}; {words}.")
