"""The command line's options, each with its help; `train` and `compare` share most of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvae.app.data.places import is_own_file, own_file
from fastvae.app.run.config import EXEMPLARS, FOR_DATA, TrainConfig
from fastvae.app.user_errors import ConfigError


def _default(field: str) -> str:
    """What a field is if its option is not given, in words."""
    special = [f"{data} {settings[field]}" for data, settings in FOR_DATA.items() if field in settings]
    return f"(default {'; '.join([str(getattr(TrainConfig, field)), *special])})"


def path(text: str) -> Path:
    """A path as it was typed; with a ~ that the shell left alone."""
    if not text:
        raise typer.BadParameter("the name is empty.")
    return Path(text).expanduser()


def size(text: str) -> int:
    """A whole number from 1 on as it was typed: 100000, 100_000 or 1e5."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("NaN")
    if number.is_finite() and not 1 <= number <= MOST_PLANNED:
        raise typer.BadParameter(f"{text} is not between 1 and {MOST_PLANNED:,}.")
    if not number.is_finite() or number % 1:
        raise typer.BadParameter(f"{text!r} is no whole number, such as 100000 or 1e5.")
    return int(number)


MODEL, TRAINING, DATA, KERNELS = "Model", "Training", "Data", "Kernels"
# The names of fastvae.backends, said again because they are checked before PyTorch is imported.
IMPLS = "cpu", "cuda", "triton", "composite", "reference"
PRECISIONS = "highest", "high", "medium"
MOST_THREADS = 1024
MOST_PLANNED = 10**15  # of rows, components, dimensions and devices: float64 holds larger numbers inexactly
RECORDED_DEVICES = "cpu", "cpu-avx2", "h100", "h200"  # those of planning/rates.json

OutFolder = Annotated[
    Path, typer.Option("--out", "-o", help="The run's folder.", show_default=False, parser=path, metavar="DIR")
]
OutOfAll = Annotated[
    Path, typer.Option("--out", "-o", help="The folder for all runs.", show_default=False, parser=path, metavar="DIR")
]
OutPicture = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="The PNG to write. (default DIR/samples.png)", parser=path, metavar="FILE"),
]
OutWeights = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="The file to write. (default DIR/model.safetensors)", parser=path, metavar="FILE"),
]
Count = Annotated[int, typer.Option("--count", "-n", min=1, max=1000, help="How many samples.")]
Label = Annotated[
    int | None,
    typer.Option(help="Of a conditional model: the label of all samples. (default: the labels in turn)"),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, mnist, static-mnist, freyfaces, caltech101, or the path of an .npz file with x_train "
        "(and perhaps x_valid, x_test, y_train ...) or x: uint8 levels, or floats in [0, 1]. "
        "(default digits)",
        rich_help_panel=DATA,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="The folder with the data files. (default $FASTVAE_DATA, else ./data)",
        rich_help_panel=DATA,
        parser=path,
        metavar="DIR",
    ),
]
MovedData = Annotated[
    str | None,
    typer.Option(
        "--data", help="Where the run's .npz file is, if it has moved; it should hold the same images.", metavar="FILE"
    ),
]
MovedDataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="The folder with the data, if they have moved.", parser=path, metavar="DIR"),
]
Binarize = Annotated[
    bool | None,
    typer.Option(
        "--binarize",
        help="Binarise the grey images of an .npz file afresh in each epoch (Bernoulli likelihood), instead "
        "of modelling their 256 levels (discretised logistic).",
        rich_help_panel=DATA,
    ),
]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch mnist from OpenML if it is not there.", rich_help_panel=DATA)
]
Model = Annotated[
    str | None,
    typer.Option(
        help="vae, or hvae: two levels of latents, of --latent dimensions each, with the prior on the upper one. "
        "(default vae)",
        rich_help_panel=MODEL,
    ),
]
Prior = Annotated[
    str | None, typer.Option(help="standard, mixture, vamp or exemplar. (default vamp)", rich_help_panel=MODEL)
]
Components = Annotated[
    int | None,
    typer.Option(
        "--components",
        "-k",
        help=f"Components of the mixture, or pseudo-inputs of the VampPrior. {_default('components')}",
        rich_help_panel=MODEL,
    ),
]
PseudoInit = Annotated[
    str | None,
    typer.Option(
        help="Where pseudo-inputs start: data, training images at random; noise, around the mean image; or flat, all "
        "nearly the same grey. (default data)",
        rich_help_panel=MODEL,
    ),
]
Conditional = Annotated[
    bool | None,
    typer.Option(
        "--conditional",
        help="Model p(x|y) of images with labels y, which encoder, decoder and prior are given. "
        "With --prior standard, mixture or vamp; each label has its share of the components.",
        rich_help_panel=MODEL,
    ),
]
LearnWeights = Annotated[
    bool | None,
    typer.Option(
        "--learn-weights", help="Learn the components' weights; otherwise all are 1/K.", rich_help_panel=MODEL
    ),
]
ChunkSize = Annotated[
    int | None,
    typer.Option(
        help="How many pseudo-inputs or exemplars are encoded at a time. Backward computes their activations again, "
        "so that memory does not grow with their number. (default: all pseudo-inputs at once; 1000 exemplars)",
        rich_help_panel=MODEL,
    ),
]
Subset = Annotated[
    int | None,
    typer.Option(
        help="How many exemplars each training step takes, at random; evaluation takes all. "
        f"(default {EXEMPLARS}, or all if there are no more; with --refresh or --backward-components all)",
        rich_help_panel=MODEL,
    ),
]
Refresh = Annotated[
    float | None,
    typer.Option(
        help="The share of the pseudo-inputs or exemplars that each step encodes anew; the others keep their last "
        "encoding and get no gradient. (default 1, all)",
        rich_help_panel=MODEL,
    ),
]
Neighbours = Annotated[
    int | None,
    typer.Option(
        help="With --refresh: how many of those nearest to each image a step encodes as well. (default 0)",
        rich_help_panel=MODEL,
    ),
]
BackwardComponents = Annotated[
    int | None,
    typer.Option(
        help="How many pseudo-inputs or exemplars take part in backward in each step, chosen at random by their "
        "responsibilities, so that the gradient's mean is that of all. (default: all)",
        rich_help_panel=MODEL,
    ),
]
SharedVariance = Annotated[
    bool | None,
    typer.Option(
        "--shared-variance/--no-shared-variance",
        help="Give all exemplars one learned variance, as Norouzi et al. (2020) do, or each the encoder's own. "
        "(default: one)",
        rich_help_panel=MODEL,
    ),
]
Bound = Annotated[
    str | None,
    typer.Option(
        help="What training maximises: elbo, or iwae, the importance weighted bound. (default elbo)",
        rich_help_panel=TRAINING,
    ),
]
BoundSamples = Annotated[
    int | None,
    typer.Option(
        "--samples", help="Draws of z for each image in the bound. (default 1; iwae 50)", rich_help_panel=TRAINING
    ),
]
BackwardSamples = Annotated[
    int | None,
    typer.Option(
        help="For iwae: how many of the draws of each image get a gradient, chosen at random by their weights, so that "
        "its mean is that of all. (default: all)",
        rich_help_panel=TRAINING,
    ),
]
Gradient = Annotated[
    str | None,
    typer.Option(
        help="How the encoder's gradient is estimated: plain, stl (sticking the landing) or, for iwae, dreg (doubly "
        "reparameterised). (default plain; iwae dreg)",
        rich_help_panel=TRAINING,
    ),
]
Latent = Annotated[
    int | None,
    typer.Option(help=f"Dimensions of the latent space. {_default('latent')}", rich_help_panel=MODEL),
]
Hidden = Annotated[
    int | None,
    typer.Option(
        help=f"Units of each hidden layer, in the encoders and in the decoder. {_default('hidden')}",
        rich_help_panel=MODEL,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(help=f"Passes over the training images, at most. {_default('epochs')}", rich_help_panel=TRAINING),
]
Warmup = Annotated[
    int | None,
    typer.Option(
        help="Epochs in which the weight of the KL term grows from 0 to 1. "
        "(default 20, but at most a fifth of --epochs)",
        rich_help_panel=TRAINING,
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        help="Stop when the validation bound has not improved for this many epochs after the warm-up. "
        f"{_default('patience')}",
        rich_help_panel=TRAINING,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Images in a step, of all processes together. (default 100)", rich_help_panel=TRAINING),
]
LearningRate = Annotated[
    float | None,
    typer.Option(help=f"Adam's learning rate. {_default('learning_rate')}", rich_help_panel=TRAINING),
]
NormalizeGradients = Annotated[
    bool | None,
    typer.Option(
        "--normalize-gradients",
        help="Divide the gradient of each weight tensor by its norm before Adam's step, as the VampPrior paper's code "
        "does.",
        rich_help_panel=TRAINING,
    ),
]
TruncatedLogistic = Annotated[
    bool | None,
    typer.Option(
        "--truncated-logistic",
        help="The likelihood of grey images as the VampPrior paper's code has it: the discretised logistic without its "
        "tails, and with 1e-7 added to each probability.",
        rich_help_panel=MODEL,
    ),
]
Seed = Annotated[int | None, typer.Option(help="Decides every random number. (default 0)", rich_help_panel=TRAINING)]
Device = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1 ..., or auto: a CUDA device if there is one.",
        rich_help_panel=TRAINING,
        metavar="DEVICE",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_THREADS,
        help="CPU threads. (default 1 for models as small as that of digits, else all cores)",
        rich_help_panel=TRAINING,
    ),
]
# Of `score`, which trains nothing.
ScoringDevice = Annotated[
    str,
    typer.Option(
        help="cpu, cuda, cuda:1 ..., or auto: a CUDA device if there is one. Under torchrun each process takes one of "
        "its own.",
        metavar="DEVICE",
    ),
]
ScoringThreads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_THREADS,
        help="CPU threads, of each process. (default all cores; of several processes, 1 unless OMP_NUM_THREADS is set)",
    ),
]
Tensorboard = Annotated[
    bool,
    typer.Option(
        "--tensorboard",
        help="Write every epoch's measures for TensorBoard too, into the folder tensorboard in --out.",
        rich_help_panel=TRAINING,
    ),
]
Impl = Annotated[
    str | None,
    typer.Option(
        help=f"Who computes fastvae's operations: {', '.join(IMPLS)}. "
        "(default: what suits the device, see `fastvae info`)",
        rich_help_panel=KERNELS,
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="highest, high or medium: the lowest precision that is allowed, where the kernels have a choice. "
        "(default PyTorch's setting, highest)",
        rich_help_panel=KERNELS,
    ),
]
DenseBackward = Annotated[
    bool,
    typer.Option(
        "--dense-backward",
        help="Compute every term of the gradients, those too that are less than a rounding.",
        rich_help_panel=KERNELS,
    ),
]
ImportanceSamples = Annotated[
    int,
    typer.Option("--samples", "-s", min=1, max=10_000_000, help="Importance samples for each image's log-likelihood."),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Evaluate on this many images alone, evenly spread over the set.")
]
RunDir = Annotated[
    Path, typer.Argument(help="The folder of a training run.", show_default=False, parser=path, metavar="DIR")
]

SplitName = Annotated[str, typer.Option(help="The set to measure on: validation or test.")]


def check_device(name: str) -> None:
    """Raise ConfigError if no device to train on has that name."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ConfigError(f"--device is {name!r}; it can be auto, cpu, cuda, or cuda:1 and so on.")


def check_backend(impl: str | None, precision: str | None) -> None:
    """Raise ConfigError if there is no such backend, or no such precision."""
    for name, value, words in (("--impl", impl, IMPLS), ("--precision", precision, PRECISIONS)):
        if value is not None and value not in words:
            raise ConfigError(f"{name} is {value!r}; it can be {', '.join(words)}.")


def check_installed(option: str, package: str) -> None:
    """Raise ConfigError if the package that an option or a command needs is not there."""
    if find_spec(package) is None:
        raise ConfigError(f'{option} needs {package}, which is not installed; pip install "fastvae-kernels[{package}]"')


def check_files(inputs: Mapping[str, Path], outputs: Mapping[str, Path | None]) -> None:
    """Raise ConfigError if an input is not there, or an .npy file to write is none, is an input, or has no folder."""
    for option, file in inputs.items():
        if not file.exists():
            raise ConfigError(f"{option} {file}: there is no such file.")
    taken = [path.resolve() for path in inputs.values()]
    for option, path in outputs.items():
        if path is None:
            continue
        if path.suffix != ".npy" or path.is_dir():
            raise ConfigError(f"{option} {path}: should be the name of an .npy file.")
        if not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: the folder {path.parent.absolute()} does not exist.")
        if any(path.resolve() == other or other in path.resolve().parents for other in taken):
            raise ConfigError(f"{option} {path}: is one of the other files, or in one; name another.")
        taken.append(path.resolve())


def given(context: typer.Context) -> dict[str, Any]:
    """The fields of TrainConfig that the command line sets, None for those that it leaves; paths absolute."""
    names = {field.name for field in fields(TrainConfig)}
    chosen = {name: value for name, value in context.params.items() if name in names}
    if chosen["data_dir"] is not None:
        chosen["data_dir"] = str(chosen["data_dir"].absolute())
    if chosen["data"] is not None and is_own_file(chosen["data"]):
        chosen["data"] = str(own_file(chosen["data"], chosen["data_dir"]))
    # A flag that is not there means "as it was", not "no".
    return {name: value if _is_said(context, name) else None for name, value in chosen.items()}


def _is_said(context: typer.Context, name: str) -> bool:
    """Whether the command line gives a parameter; by a word, as typer has click's enumeration or one of its own."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
