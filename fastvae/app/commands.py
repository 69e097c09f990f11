"""The commands of the command line.

Each checks its options first, without PyTorch, whose import takes seconds; then it imports what does the work.
"""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastvae.app import options
from fastvae.app.data.places import check_name
from fastvae.app.library import import_library
from fastvae.app.narrow_help import Command, Group
from fastvae.app.run.config import (
    PRIORS,
    TrainConfig,
    bound_name,
    continued,
    latents_with_prior,
    make_config,
    moved_data,
    prior_name,
    read_config,
    without_effect,
)
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.folder import GAP, RunFolder
from fastvae.app.run.lock import locked
from fastvae.app.run.ranks import launched
from fastvae.app.show.interruption import interruptible
from fastvae.app.user_errors import ConfigError

app = typer.Typer(
    cls=Group,
    help="Train variational autoencoders with a standard prior, a mixture or a VampPrior, and compare them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ranks = launched()
console = Console(quiet=not ranks.first)


def _first_locks(folder: Path) -> AbstractContextManager[None]:
    """The folder kept for this process, or for the ranks of which this is one."""
    return locked(folder) if ranks.first else nullcontext()


@app.callback()
def _check_launch(context: typer.Context) -> None:
    command = context.invoked_subcommand
    if ranks.size > 1 and command not in ("train", "evaluate", "score"):
        raise ConfigError(f"fastvae {command} runs in one process, not in {ranks.size}; start it without torchrun.")


@app.command("train", cls=Command)
def train_command(
    context: typer.Context,
    out: options.OutFolder,
    data: options.Data = None,
    model: options.Model = None,
    prior: options.Prior = None,
    components: options.Components = None,
    pseudo_init: options.PseudoInit = None,
    learn_weights: options.LearnWeights = None,
    conditional: options.Conditional = None,
    chunk_size: options.ChunkSize = None,
    subset: options.Subset = None,
    refresh: options.Refresh = None,
    neighbours: options.Neighbours = None,
    backward_components: options.BackwardComponents = None,
    shared_variance: options.SharedVariance = None,
    latent: options.Latent = None,
    hidden: options.Hidden = None,
    bound: options.Bound = None,
    num_samples: options.BoundSamples = None,
    gradient: options.Gradient = None,
    backward_samples: options.BackwardSamples = None,
    epochs: options.Epochs = None,
    warmup: options.Warmup = None,
    patience: options.Patience = None,
    batch_size: options.BatchSize = None,
    learning_rate: options.LearningRate = None,
    normalize_gradients: options.NormalizeGradients = None,
    truncated_logistic: options.TruncatedLogistic = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    tensorboard: options.Tensorboard = False,
    impl: options.Impl = None,
    precision: options.Precision = None,
    dense_backward: options.DenseBackward = False,
    data_dir: options.DataDir = None,
    binarize: options.Binarize = None,
    download: options.Download = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, from its checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
) -> None:
    """Train a VAE: a model of the VampPrior paper (Tomczak and Welling 2018), gated dense layers.

    The folder --out gets config.json, checkpoint.pt (the last epoch and the best model so far), results.json
    and the pictures. Ctrl-C keeps the last checkpoint, and --resume goes on from it as if there had been no
    stop. With --resume, --epochs may be raised, and other options need not be said again, but for --device, --threads
    and those of the kernels, which are no part of a run.

    Under torchrun, processes share each batch: torchrun --nproc-per-node 8 --no-python fastvae train ... gives the
    loss curve of one process.
    """
    folder, given = RunFolder(out), options.given(context)

    def settings() -> TrainConfig:
        config = continued(read_config(folder.config), given) if resume else make_config(given)
        check_name(config.data, config.data_dir, binarize=config.binarize)
        return config

    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; say one of them.")
    options.check_device(device)
    options.check_backend(impl, precision)
    if tensorboard:
        options.check_installed("--tensorboard", "tensorboard")
    for sentence in without_effect(given, [settings().prior]):
        _say(sentence)
    if not (resume or overwrite):
        folder.refuse_run()
    with (
        interruptible(console, lambda: _how_to_resume(folder, impl, precision, dense_backward, tensorboard)),
        _first_locks(out),
    ):
        import_library()
        from fastvae.app.data.named_sets import load
        from fastvae.app.run.device import pick_device, use_kernels, use_threads
        from fastvae.app.run.training import train
        from fastvae.app.workflow import train_run

        config, device = settings(), pick_device(device, ranks)  # again, now that no other process can change the run
        dataset = load(config.data, config.data_dir, binarize=config.binarize, download=download)
        use_threads(threads, config, dataset)
        with use_kernels(device, impl, precision, dense_backward), ranks.joined(device):
            if not ranks.first:
                train(config, dataset, out, resume=resume, overwrite=overwrite, device=device, ranks=ranks)
                return
            run = train_run(
                console,
                config,
                dataset,
                out,
                resume=resume,
                overwrite=overwrite,
                device=device,
                tensorboard=tensorboard,
                ranks=ranks,
            )
    best = run.checkpoint["best_epoch"]
    line = run.checkpoint["history"][best - 1]["validation"]
    _say(
        f"Best of {run.checkpoint['epoch']} epochs: {best}, with a validation {bound_name(config)} of"
        f" {line['bound']:.2f} nats (reconstruction {line['reconstruction']:.2f}, KL {line['kl']:.2f})."
    )
    _name_files(folder.files())
    _say(f"For its test log-likelihood: fastvae evaluate {shlex.quote(str(out))}")


@app.command("evaluate", cls=Command)
def evaluate_command(
    run_dir: options.RunDir,
    samples: options.ImportanceSamples = 5000,
    limit: options.Limit = None,
    split: options.SplitName = "test",
    data: options.MovedData = None,
    data_dir: options.MovedDataDir = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    impl: options.Impl = None,
    precision: options.Precision = None,
) -> None:
    """Measure the best model of a run: log-likelihood by importance sampling, ELBO, KL and active units.

    It also measures how far the prior is from the aggregated posterior q(z), the mean of q(z|x) over all training
    images. The run's folder gets evaluation.json and a picture of both densities. A measurement on the validation
    images, or with --limit on some images alone, gets a file of its own, such as evaluation-test-100-of-10000.json.
    Under torchrun, processes share the images.
    """
    plan = EvaluationPlan(split, samples, limit, precision or "highest")
    _check_run(run_dir, data, data_dir, device)
    options.check_backend(impl, precision)
    with interruptible(console, lambda: "The same command goes on from here."), _first_locks(run_dir):
        import_library()
        from fastvae.app.run.device import pick_device, use_kernels, use_threads
        from fastvae.app.run.evaluation import log_likelihoods
        from fastvae.app.run.trained import load_run
        from fastvae.app.show.result_tables import evaluation_table, gap_table, images_in_words
        from fastvae.app.workflow import evaluate_run

        run = load_run(run_dir, data_dir, data=data, device=pick_device(device, ranks))
        use_threads(threads, run.config, run.dataset)
        with use_kernels(run.device, impl, precision), ranks.joined(run.device):
            if not ranks.first:
                log_likelihoods(run, plan, ranks=ranks)
                return
            result = evaluate_run(console, run, plan, ranks=ranks)
    title = f"{run.dataset.name}, {prior_name(run.config)}: {images_in_words(result.images, split)}"
    z = latents_with_prior(run.config)
    console.print(evaluation_table(result, title, z))
    console.print(gap_table(result.gap, z))
    _name_files([run.folder.evaluation(plan.part(run.dataset)), run.folder.picture(GAP)])


@app.command("sample", cls=Command)
def sample_command(
    run_dir: options.RunDir,
    count: options.Count = 100,
    out: options.OutPicture = None,
    draw: Annotated[bool, typer.Option("--draw", help="Draw pixels from p(x|z), instead of showing its mean.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other samples.")] = 0,
    label: options.Label = None,
    data: options.MovedData = None,
    data_dir: options.MovedDataDir = None,
    device: options.Device = "auto",
    impl: options.Impl = None,
    precision: options.Precision = None,
) -> None:
    """Draw images from the best model of a run: z from the prior, then the decoder's image of it."""
    _check_run(run_dir, data, data_dir, device)
    if label is not None and not read_config(RunFolder(run_dir).config).conditional:
        raise ConfigError("--label is for a conditional model, one that was trained with --conditional.")
    options.check_backend(impl, precision)
    path = out or RunFolder(run_dir).picture("samples")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: the folder {path.parent.absolute()} does not exist.")
    if path.is_dir() or path.suffix.lower() != ".png":
        raise ConfigError(f"--out {path}: should be the name of a PNG file, such as samples.png.")
    with interruptible(console, lambda: "Nothing was written."):
        import_library()
        from fastvae.app.run.device import pick_device, use_kernels
        from fastvae.app.run.trained import load_run
        from fastvae.app.show.pictures import draw_samples

        run = load_run(run_dir, data_dir, data=data, device=pick_device(device))
        with use_kernels(run.device, impl, precision):
            draw_samples(run, path, count, drawn=draw, seed=seed, label=label)
    _name_files([path])


@app.command("export", cls=Command)
def export_command(
    run_dir: options.RunDir,
    out: options.OutWeights = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
) -> None:
    """Write the weights of a run's best model as a safetensors file, with the settings in its metadata."""
    folder = RunFolder(run_dir)
    read_config(folder.config)
    path = out or folder.path / "model.safetensors"
    if path.suffix.lower() != ".safetensors" or path.is_dir():
        raise ConfigError(f"--out {path}: should be the name of a file, such as model.safetensors.")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: the folder {path.parent.absolute()} does not exist.")
    if path.exists() and not overwrite:
        raise ConfigError(f"--out {path}: is there already; say --overwrite to replace it.")
    options.check_installed("fastvae export", "safetensors")
    with interruptible(console, lambda: "Nothing was written."), locked(run_dir):
        import_library()
        from fastvae.app.run.weights import export_weights

        export_weights(folder, path)
    _name_files([path])


@app.command("compare", cls=Command)
def compare_command(
    context: typer.Context,
    out: options.OutOfAll,
    data: options.Data = None,
    priors: Annotated[str, typer.Option(help="Two or more priors, with commas between.")] = "standard,vamp",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="How many seeds: 0, 1, ...")] = 3,
    model: options.Model = None,
    components: options.Components = None,
    pseudo_init: options.PseudoInit = None,
    learn_weights: options.LearnWeights = None,
    conditional: options.Conditional = None,
    latent: options.Latent = None,
    hidden: options.Hidden = None,
    epochs: options.Epochs = None,
    warmup: options.Warmup = None,
    patience: options.Patience = None,
    batch_size: options.BatchSize = None,
    learning_rate: options.LearningRate = None,
    samples: options.ImportanceSamples = 5000,
    limit: options.Limit = None,
    split: options.SplitName = "test",
    device: options.Device = "auto",
    threads: options.Threads = None,
    impl: options.Impl = None,
    precision: options.Precision = None,
    dense_backward: options.DenseBackward = False,
    data_dir: options.DataDir = None,
    binarize: options.Binarize = None,
    download: options.Download = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the runs in --out.")] = False,
) -> None:
    """Train several priors with several seeds, evaluate each, and say which is better and by how much.

    The same command goes on where an earlier one with this --out was stopped, and repeats nothing.
    """
    names = [name.strip() for name in priors.split(",")]
    if len(names) < 2 or len(set(names)) < len(names) or not set(names) <= set(PRIORS):
        raise ConfigError(f"--priors is {priors!r}; it should be two or more of {', '.join(PRIORS)}.")
    plan = EvaluationPlan(split, samples, limit, precision or "highest")
    config = make_config(options.given(context))
    for sentence in without_effect(options.given(context), names):
        _say(sentence)
    check_name(config.data, config.data_dir, binarize=config.binarize)
    options.check_device(device)
    options.check_backend(impl, precision)
    without = " without --overwrite" if overwrite else ""
    with interruptible(console, lambda: f"The same command{without} goes on from here."), locked(out):
        import_library()
        from fastvae.app.data.named_sets import load
        from fastvae.app.run.device import pick_device, use_kernels, use_threads
        from fastvae.app.show.result_tables import comparison_tables, images_in_words
        from fastvae.app.show.width import is_narrow
        from fastvae.app.workflow import compare_priors, keep_comparison

        device = pick_device(device)
        dataset = load(config.data, config.data_dir, binarize=config.binarize, download=download)
        use_threads(threads, config, dataset)
        with use_kernels(device, impl, precision, dense_backward):
            comparison = compare_priors(
                console, config, dataset, names, range(seeds), out, plan, device=device, overwrite=overwrite
            )
            written = keep_comparison(comparison, config, plan, plan.part(dataset), out)
    title = f"{dataset.name}: {images_in_words(len(plan.rows(dataset)), split)}, nats per image, seeds: {seeds}"
    for table in comparison_tables(comparison.rows, title, narrow=is_narrow(console)):
        console.print(table)
    _say(f"{comparison.verdict}")
    _name_files(written)


@app.command("reproduce", cls=Command)
def reproduce_command(
    name: Annotated[
        str | None, typer.Argument(help="What to reproduce; none lists what there is.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The run's folder. (default runs/NAME-seed-SEED)",
            parser=options.path,
            metavar="DIR",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random number.")] = 0,
    as_it_is: Annotated[
        bool,
        typer.Option(
            "--as-it-is", help="Train no further: measure the best model so far, and record that it is not finished."
        ),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=2, help="With --as-it-is: measure on this many test images alone, evenly spread.")
    ] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    data_dir: options.DataDir = None,
    download: options.Download = False,
) -> None:
    """Train by the protocol of a published figure, measure on the test images, and show both figures.

    The same command goes on where an earlier one was stopped. The folder also gets reproduction.json, the record of the
    run. On one CPU thread a run takes hours, on a GPU minutes.
    """
    from fastvae.app.run.protocol import protocol_names, read_protocol

    if name is None:
        from fastvae.app.show.result_tables import protocols_table
        from fastvae.app.show.width import is_narrow

        protocols = [read_protocol(each) for each in protocol_names()]
        console.print(protocols_table(protocols, narrow=is_narrow(console)))
        return
    protocol, folder = read_protocol(name), RunFolder(out or Path("runs") / f"{name}-seed-{seed}")
    config = protocol.config
    check_name(config.data, data_dir)
    options.check_device(device)
    if limit is not None and not as_it_is:
        raise ConfigError("--limit is for --as-it-is: a run that has ended is measured on all test images.")
    if as_it_is and not folder.holds_run():
        raise ConfigError(f"--as-it-is: {folder.path} holds no run to measure.")
    with interruptible(console, lambda: "The same command goes on from here."), locked(folder.path):
        import_library()
        from fastvae.app.data.named_sets import load
        from fastvae.app.run.device import pick_device, use_threads
        from fastvae.app.show.result_tables import reproduction_table
        from fastvae.app.workflow import reproduce_figure

        device = pick_device(device)
        dataset = load(config.data, data_dir, download=download)
        use_threads(threads, config, dataset)
        reproduction = reproduce_figure(
            console, protocol, dataset, seed, folder.path, device=device, as_it_is=as_it_is, limit=limit
        )
    console.print(reproduction_table(reproduction))
    for difference in protocol.differences:
        _say(f"Not as published: {difference}")
    _name_files(folder.files())


@app.command("score", cls=Command)
def score_command(
    points: Annotated[
        Path,
        typer.Option(
            help="The points [M, D]: an .npy file, or the array z of an .npz or .safetensors file.",
            show_default=False,
            parser=options.path,
            metavar="FILE",
        ),
    ],
    mixture: Annotated[
        Path,
        typer.Option(
            help="The components: mu [K, D], logvar, which is log sigma^2 and broadcasts to [K, D], and perhaps "
            "log_weights [K] (else 1/K each), in an .npz or .safetensors file, or a folder of mu.npy, logvar.npy and "
            "log_weights.npy.",
            show_default=False,
            parser=options.path,
            metavar="FILE",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="The .npy file to write, log p(z) [M].",
            show_default=False,
            parser=options.path,
            metavar="FILE",
        ),
    ],
    score: Annotated[
        Path | None,
        typer.Option(
            help="Also write the score d log p(z) / dz [M, D] to this .npy file.", parser=options.path, metavar="FILE"
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or float64: what is computed and written. (default: by the inputs)")
    ] = None,
    memory: Annotated[int, typer.Option(min=1, help="MiB that rows and components may take at a time.")] = 256,
    device: options.ScoringDevice = "auto",
    threads: options.ScoringThreads = None,
    impl: options.Impl = None,
    precision: options.Precision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, and replace --out.")] = False,
) -> None:
    """Score points against a mixture of Gaussians from files that may be larger than memory.

    Rows are written block by block into a hidden file beside --out, which appears once all are done. After Ctrl-C or
    a kill the same command goes on with the next block. Under torchrun each process scores a share of the rows:
    torchrun --nproc-per-node 4 --no-python fastvae score ...
    """
    if dtype not in (None, "float32", "float64"):
        raise ConfigError(f"--dtype is {dtype!r}; it can be float32 or float64.")
    options.check_device(device)
    options.check_backend(impl, precision)
    options.check_files({"--points": points, "--mixture": mixture}, {"--out": out, "--score": score})
    without = " without --overwrite" if overwrite else ""
    with interruptible(console, lambda: f"The same command{without} goes on from here."):
        import_library()
        import torch

        from fastvae.app.run.device import pick_device, use_kernels
        from fastvae.app.scoring.score import Job, score_files

        if threads is not None:
            torch.set_num_threads(threads)
        device = pick_device(device, ranks)
        job = Job(points, mixture, out, score, dtype, memory << 20, precision, impl)
        with use_kernels(device, impl, precision):
            done = score_files(console, job, device, overwrite=overwrite, ranks=ranks)
    if not ranks.first:
        return
    resumed = f", {done.resumed_rows:,} of them by an earlier run" if done.resumed_rows else ""
    shared = f", by {ranks.size:,} processes" if ranks.size > 1 else ""
    _say(
        f"{done.rows:,} rows against {done.components:,} components{resumed}{shared}; "
        f"{done.bytes_read / 1e6:,.1f} MB were read to compute them."
    )
    _name_files([out] if score is None else [out, score])


@app.command("plan", cls=Command)
def plan_command(
    rows: Annotated[
        int,
        typer.Option(
            help="M, the points to score: 100000 or 1e5.", parser=options.size, metavar="<int>", show_default=False
        ),
    ],
    components: Annotated[
        int, typer.Option(help="K, of the mixture.", parser=options.size, metavar="<int>", show_default=False)
    ],
    dims: Annotated[int, typer.Option(min=1, max=options.MOST_PLANNED, help="D, of a point.", show_default=False)],
    devices: Annotated[int, typer.Option(min=1, max=options.MOST_PLANNED, help="How many share the work.")] = 1,
    device: Annotated[str, typer.Option(help=f"What they are: {', '.join(options.RECORDED_DEVICES)}.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, max=options.MOST_THREADS, help="Of each device, for a CPU.")] = 1,
    score: Annotated[bool, typer.Option("--score", help="Exchange the score d log p(z) / dz too.")] = False,
    memory: Annotated[
        int, typer.Option(min=1, max=options.MOST_PLANNED, help="MiB that rows and components may take at a time.")
    ] = 256,
    network: Annotated[
        float | None, typer.Option(min=1e-6, help="GB/s that a device receives from others. (default: not known)")
    ] = None,
) -> None:
    """Tell what a job would take, before it is run: time, memory, bytes read and exchanged.

    The times come from recorded measurements, for densities in float32. Where a rate was never recorded, the plan says
    what the rate would have to be.
    """
    if device not in options.RECORDED_DEVICES:
        raise ConfigError(f"--device is {device!r}; it can be {', '.join(options.RECORDED_DEVICES)}.")
    if threads > 1 and not device.startswith("cpu"):
        raise ConfigError(f"--threads is for a CPU, and --device is {device}.")
    import_library()
    from fastvae.app.planning.cost import LAYOUTS, Work, all_rates, limit
    from fastvae.app.planning.table import plan_table

    rates = all_rates()[device]
    bytes_per_second = None if network is None else network * 1e9
    work = Work(rows, components, dims, devices, threads, score, memory << 20, bytes_per_second)
    console.print(plan_table(work, rates))
    _say(f"By {rates.source}: {rates.machine}.")
    if rates.deviation is None:
        _say(f"The record has one shape, with {rates.fewest_rows:,} rows; other shapes may differ.")
    else:
        _say(
            f"The recorded times are within {rates.deviation:.0%} of what the plan computes for them. A slower core, "
            "or one that other programs share, takes longer."
        )
    if score:
        _say("The time of the score is not recorded, and not in the plan.")
    names = {"rows": "the rows sharded", "components": "the components sharded", "mesh": "a mesh", "ring": "a ring"}
    for layout in LAYOUTS:
        _say(f"With {names[layout]}, {limit(work, rates, layout)}.")


@app.command(
    "bench",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def bench_command(context: typer.Context) -> None:
    """Measure fastvae beside what one would use instead: time, peak memory, and error in nats."""
    import_library()
    from fastvae.app.bench import bench

    alone = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    alone.command(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})(bench)
    alone(context.args, prog_name="fastvae bench")


@app.command("info", cls=Command)
def info_command() -> None:
    """Tell what is built, what runs where, and the versions."""
    import_library()
    import fastvae

    print(fastvae.info())


def _check_run(run_dir: Path, data: str | None, data_dir: Path | None, device: str) -> None:
    options.check_device(device)
    config = read_config(RunFolder(run_dir).config)
    check_name(moved_data(config, data, data_dir), data_dir or config.data_dir, binarize=config.binarize)


def _how_to_resume(
    folder: RunFolder, impl: str | None, precision: str | None, dense_backward: bool, tensorboard: bool
) -> str:
    command = f"fastvae train --out {shlex.quote(str(folder.path))} --resume"
    command += f" --impl {impl}" if impl else ""
    command += f" --precision {precision}" if precision else ""
    command += " --dense-backward" if dense_backward else ""
    command += " --tensorboard" if tensorboard else ""
    if not folder.holds_run():
        return "No epoch was finished, and nothing was written."
    more = "" if ranks.size == 1 else " (by torchrun with any number of processes, or without)"
    return f"{folder.checkpoint} keeps what was trained; go on with: {command}{more}"


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _name_files(files: list[Path]) -> None:
    _say("Wrote\n  " + "\n  ".join(map(str, files)))
