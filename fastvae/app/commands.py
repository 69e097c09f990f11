"""The commands of the command line."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import fastvae
from fastvae.app import options
from fastvae.app.bench import bench
from fastvae.app.data.named_sets import load
from fastvae.app.data.whole_file import write_json
from fastvae.app.run.comparison import Row, judge, mean_and_spread
from fastvae.app.run.config import PRIORS, bound_name, continued, make_config, read_config
from fastvae.app.run.evaluation import EvaluationPlan
from fastvae.app.run.folder import GAP, RunFolder, load_run, versions
from fastvae.app.run.gap import Gap
from fastvae.app.run.networks import build
from fastvae.app.show.pictures import draw_comparison, draw_samples
from fastvae.app.show.progress import interruptible
from fastvae.app.user_errors import ConfigError
from fastvae.app.workflow import compare_priors, evaluate_run, train_run

app = typer.Typer(
    help="Train variational autoencoders with a standard prior, a mixture or a VampPrior, and compare them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()


@app.command("train")
def train_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.", show_default=False)],
    data: options.Data = None,
    prior: Annotated[
        str | None,
        typer.Option(help="standard, mixture, vamp or exemplar. (default vamp)", rich_help_panel=options.MODEL),
    ] = None,
    components: options.Components = None,
    pseudo_init: options.PseudoInit = None,
    learn_weights: options.LearnWeights = None,
    chunk_size: options.ChunkSize = None,
    subset: options.Subset = None,
    refresh: options.Refresh = None,
    neighbours: options.Neighbours = None,
    latent: options.Latent = None,
    hidden: options.Hidden = None,
    bound: options.Bound = None,
    num_samples: options.BoundSamples = None,
    gradient: options.Gradient = None,
    epochs: options.Epochs = None,
    warmup: options.Warmup = None,
    patience: options.Patience = None,
    batch_size: options.BatchSize = None,
    learning_rate: options.LearningRate = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Decides every random number. (default 0)", rich_help_panel=options.TRAINING),
    ] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    data_dir: options.DataDir = None,
    binarize: options.Binarize = None,
    download: options.Download = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, from its checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
) -> None:
    """Train a VAE: the model of the VampPrior paper (Tomczak and Welling 2018), gated dense layers.

    The folder --out gets config.json, checkpoint.pt (the last epoch and the best model so far), results.json
    and the pictures. Ctrl-C keeps the last checkpoint, and --resume goes on from it as if there had been no
    stop; with --resume, options need not be said again, and --epochs may be raised.
    """
    folder, given = RunFolder(out), options.given(context)
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite contradict each other; say one of them.")
    config = continued(read_config(folder.config), given) if resume else make_config(given)
    device = options.pick_device(device)
    dataset = load(config.data, config.data_dir, binarize=config.binarize, download=download)
    options.use_threads(threads, config, dataset)
    if overwrite:
        build(config, dataset)  # what cannot be built must not cost the old run
        folder.clear()
    with interruptible(console, lambda: _how_to_resume(folder)):
        run = train_run(console, config, dataset, out, resume=resume, device=device)
    best = run.checkpoint["best_epoch"]
    line = run.checkpoint["history"][best - 1]["validation"]
    _say(
        f"Best of {run.checkpoint['epoch']} epochs: {best}, with a validation {bound_name(config)} of"
        f" {line['bound']:.2f} nats (reconstruction {line['reconstruction']:.2f}, KL {line['kl']:.2f})."
    )
    _name_files(folder.files())
    _say(f"For its test log-likelihood: fastvae evaluate {shlex.quote(str(out))}")


@app.command("evaluate")
def evaluate_command(
    run_dir: options.RunDir,
    samples: options.ImportanceSamples = 5000,
    limit: options.Limit = None,
    split: options.SplitName = "test",
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measure the best model of a run: log-likelihood by importance sampling, ELBO, KL and active units.

    And how far its prior is from the aggregated posterior q(z), the mean of q(z|x) over all training images. Writes
    evaluation.json, and a picture of the two, into the run's folder.
    """
    plan = EvaluationPlan(split, samples, limit)
    run = load_run(run_dir, data_dir, device=options.pick_device(device))
    options.use_threads(threads, run.config, run.dataset)
    with interruptible(console, lambda: "Nothing was written."):
        result = evaluate_run(console, run, plan)
    table = Table(title=f"{run.dataset.name}, {run.config.prior} prior: {result.images} {split} images")
    table.add_column("nats per image, mean")
    table.add_column(justify="right")
    table.add_row(
        f"log-likelihood ({samples} importance samples)",
        f"{result.log_likelihood:.2f} +- {result.standard_error:.2f} (standard error)",
    )
    table.add_row("ELBO", f"{result.elbo:.2f}")
    table.add_row("reconstruction term", f"{result.reconstruction:.2f}")
    table.add_row("KL term", f"{result.kl:.2f}")
    table.add_row("active units", f"{result.active_units} of {result.latent}")
    console.print(table)
    console.print(_gap_table(result.gap))
    _name_files([run.folder.evaluation, run.folder.picture(GAP)])


@app.command("sample")
def sample_command(
    run_dir: options.RunDir,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many samples.")] = 100,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The PNG to write. (default DIR/samples.png)")] = None,
    draw: Annotated[bool, typer.Option("--draw", help="Draw pixels from p(x|z), instead of showing its mean.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other samples.")] = 0,
    data_dir: options.DataDir = None,
    device: options.Device = "auto",
) -> None:
    """Draw images from the best model of a run: z from the prior, then the decoder's image of it."""
    run = load_run(run_dir, data_dir, device=options.pick_device(device))
    path = out or run.folder.picture("samples")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: the folder {path.parent.absolute()} does not exist.")
    draw_samples(run, path, count, drawn=draw, seed=seed)
    _name_files([path])


@app.command("compare")
def compare_command(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for all runs.", show_default=False)],
    data: options.Data = None,
    priors: Annotated[str, typer.Option(help="Two or more priors, with commas between.")] = "standard,vamp",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ...")] = 3,
    components: options.Components = None,
    pseudo_init: options.PseudoInit = None,
    learn_weights: options.LearnWeights = None,
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
    data_dir: options.DataDir = None,
    binarize: options.Binarize = None,
    download: options.Download = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the runs in --out.")] = False,
) -> None:
    """Train several priors with several seeds, evaluate each, and say which is better and by how much.

    Said again with the same --out, it goes on where it was stopped, and does nothing twice.
    """
    names = [name.strip() for name in priors.split(",")]
    if len(names) < 2 or len(set(names)) < len(names) or not set(names) <= set(PRIORS):
        raise ConfigError(f"--priors is {priors!r}; it should be two or more of {', '.join(PRIORS)}.")
    plan = EvaluationPlan(split, samples, limit)
    config = make_config(options.given(context))
    device = options.pick_device(device)
    dataset = load(config.data, config.data_dir, binarize=config.binarize, download=download)
    options.use_threads(threads, config, dataset)
    for name in names:
        build(replace(config, prior=name), dataset)  # what cannot be built is told before hours of training
    if overwrite:
        for name in names:
            for seed in range(seeds):
                RunFolder(out / f"{name}-seed{seed}").clear()
    with interruptible(console, lambda: "The same command goes on from here."):
        rows, shown = compare_priors(console, config, dataset, names, range(seeds), out, plan, device)
    verdict = judge(rows)
    console.print(
        _comparison_table(
            rows,
            f"{dataset.name}: {len(plan.images(dataset))} {split} images, nats per image, seeds: {seeds}",
        )
    )
    _say(f"{verdict}")
    pictures = [out / "compare.png", *(p for run in shown for p in run.folder.pictures())]
    draw_comparison(shown, pictures[0])
    summary = {
        "config": {key: value for key, value in asdict(config).items() if key not in ("prior", "seed")},
        "split": split,
        "importance_samples": samples,
        "seeds": list(range(seeds)),
        "priors": [asdict(row) for row in rows],
        "verdict": {**asdict(verdict), "beyond_noise": verdict.beyond_noise, "sentence": str(verdict)},
        "versions": versions(),
        "pictures": [str(path.relative_to(out)) for path in pictures],
    }
    write_json(out / "compare.json", summary)
    _name_files([out / "compare.json", *pictures])


app.command("bench")(bench)


@app.command("info")
def info_command() -> None:
    """Tell what is built, what runs where, and the versions."""
    print(fastvae.info())


def _gap_table(gap: Gap) -> Table:
    table = Table(title=f"prior p(z) and aggregated posterior q(z) of {gap['images']} training images")
    table.add_column(f"nats, mean of {gap['draws']} draws")
    table.add_column(justify="right")
    each = gap["dimension_wise_kl"]
    largest = max(range(len(each)), key=lambda d: each[d]["value"])
    rows = {
        f"I(x; z), at most log {gap['images']} = {math.log(gap['images']):.2f}": gap["mutual_information"],
        "KL(q(z) || p(z)), lost to the prior": gap["marginal_kl"],
        "total correlation of q(z)": gap["total_correlation"],
        f"largest KL of one dimension, z[{largest}]": each[largest],
    }
    for name, measured in rows.items():
        table.add_row(name, f"{measured['value']:.3f} +- {measured['standard_error']:.3f}")
    table.add_row("sum of the dimensions' KL", f"{sum(one['value'] for one in each):.3f}")
    return table


def _comparison_table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("prior", "log-likelihood", "ELBO", "KL"):
        table.add_column(heading, justify="left" if heading == "prior" else "right", no_wrap=True)
    for heading in ("active units", "seconds per epoch"):
        # The headings break over lines, so that all fits 80 columns.
        table.add_column(heading, justify="right", max_width=8)
    for row in rows:
        table.add_row(
            row.prior,
            mean_and_spread(row.log_likelihood),
            mean_and_spread(row.elbo),
            mean_and_spread(row.kl),
            f"{fmean(row.active_units):.1f}",
            f"{fmean(row.seconds_per_epoch):.3f}",
        )
    return table


def _how_to_resume(folder: RunFolder) -> str:
    command = f"fastvae train --out {shlex.quote(str(folder.path))} --resume"
    if not folder.holds_run():
        return "Nothing was written."
    if not folder.checkpoint.exists():
        return f"No epoch was finished; begin again with: {command}"
    return f"{folder.checkpoint} has epoch {folder.load()['epoch']}; go on with: {command}"


def _say(text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _name_files(files: list[Path]) -> None:
    _say("Wrote\n  " + "\n  ".join(map(str, files)))
