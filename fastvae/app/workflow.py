"""The steps of the commands, with their progress on the terminal: train a run, evaluate one, compare many."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from fastvae._files import write_json
from fastvae.app.data.dataset import Dataset
from fastvae.app.run.checkpoint import read_checkpoint
from fastvae.app.run.comparison import Row, Verdict, judge
from fastvae.app.run.config import FOR_PRIOR, PriorName, TrainConfig, continued, option, read_config
from fastvae.app.run.evaluation import Evaluation, evaluate, unfinished_evaluation
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.lock import locked
from fastvae.app.run.networks import build
from fastvae.app.run.protocol import Protocol
from fastvae.app.run.ranks import ALONE, Ranks
from fastvae.app.run.reproduction import Reproduction, reproduction_of, write_reproduction
from fastvae.app.run.trained import TrainedRun, load_run, versions, with_fingerprint
from fastvae.app.run.training import train
from fastvae.app.show.pictures import draw_comparison, draw_gap, draw_run
from fastvae.app.show.progress import counting_progress, training_progress
from fastvae.app.show.tensorboard import tensorboard_events
from fastvae.app.user_errors import ConfigError


def train_run(
    console: Console,
    config: TrainConfig,
    dataset: Dataset,
    out: Path,
    *,
    resume: bool,
    overwrite: bool = False,
    device: str,
    label: str = "",
    tensorboard: bool = False,
    ranks: Ranks = ALONE,
) -> TrainedRun:
    """Train, or go on training, with a progress bar; then draw the run's pictures.

    Of several ranks the first one calls this function, and the others `train`.
    """
    folder = RunFolder(out)
    done = read_checkpoint(folder)["epoch"] if resume and folder.holds_run() else 0
    with ExitStack() as stack:
        watchers = stack.enter_context(training_progress(console, config, dataset, done + 1, label))
        if tensorboard:
            watchers = stack.enter_context(tensorboard_events(folder.events, watchers, done + 1))
        train(config, dataset, out, resume=resume, overwrite=overwrite, device=device, watchers=watchers, ranks=ranks)
    run = load_run(out, dataset=dataset, device=device)
    draw_run(run)
    return run


def evaluate_run(
    console: Console, run: TrainedRun, plan: EvaluationPlan, label: str = "evaluating", ranks: Ranks = ALONE
) -> Evaluation:
    """Evaluate with a progress bar; keep the result, and the picture of prior and posterior, in the run's folder.

    Of several ranks the first one calls this function, and the others `log_likelihoods`.
    """
    with counting_progress(console, label, len(plan.rows(run.dataset))) as on_images:
        evaluation = evaluate(run, plan, on_images, ranks)
    write_json(run.folder.evaluation(plan.part(run.dataset)), asdict(evaluation))
    draw_gap(run)
    unfinished_evaluation(run, plan).unlink(missing_ok=True)  # last, so that nothing is done twice after a stop
    return evaluation


@dataclass(frozen=True)
class Comparison:
    """A row for each prior, each prior's run with the first seed, and which prior is better."""

    rows: list[Row]
    shown: list[TrainedRun]
    verdict: Verdict


def compare_priors(
    console: Console,
    config: TrainConfig,
    dataset: Dataset,
    priors: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    plan: EvaluationPlan,
    *,
    device: str,
    overwrite: bool = False,
) -> Comparison:
    """Train and evaluate every prior with every seed, each in a folder of its own under `out`.

    What is already done, and was done the same way, is not done again unless `overwrite` is said.
    """
    config = with_fingerprint(config, dataset)
    for prior in priors:
        build(_with(config, prior), dataset)  # what cannot be built is told before hours of training
    if overwrite:
        for prior in priors:
            for seed in seeds:
                with locked(_folder(out, prior, seed).path):
                    _folder(out, prior, seed).clear()
    rows, shown = [], []
    for prior in priors:
        runs, evaluations = [], []
        for seed in seeds:
            folder, label = _folder(out, prior, seed), f"{prior}, seed {seed}:"
            with locked(folder.path):
                run = _trained(console, _with(config, prior, seed), dataset, folder, device, label)
                evaluation = evaluate_once(console, run, plan, f"{label} evaluating")
            console.print(
                f"{label} log-likelihood {evaluation.log_likelihood:.2f} "
                f"(epoch {run.checkpoint['best_epoch']}, the best of {run.checkpoint['epoch']})",
                highlight=False,
                soft_wrap=True,
            )
            runs.append(run)
            evaluations.append(evaluation)
        rows.append(
            Row(
                prior,
                [e.log_likelihood for e in evaluations],
                [e.elbo for e in evaluations],
                [e.kl for e in evaluations],
                [e.active_units for e in evaluations],
                [median(line["seconds"] for line in run.checkpoint["history"]) for run in runs],
            )
        )
        shown.append(runs[0])
    return Comparison(rows, shown, judge(rows))


def keep_comparison(
    comparison: Comparison, config: TrainConfig, plan: EvaluationPlan, part: str, out: Path
) -> list[Path]:
    """Write compare.json and the picture of all priors into `out`; the files, with the pictures of the runs.

    Where `part` of the data was measured on (see `EvaluationPlan.part`), the JSON file is named after it.
    """
    pictures = [out / "compare.png", *(path for run in comparison.shown for path in run.folder.pictures())]
    draw_comparison(comparison.shown, pictures[0])
    rows, verdict = comparison.rows, comparison.verdict
    summary: dict[str, Any] = {
        "config": {key: value for key, value in asdict(config).items() if key not in ("prior", "seed")},
        "split": plan.split,
        "importance_samples": plan.samples,
        "precision": plan.precision,
        "seeds": list(range(len(rows[0].log_likelihood))),
        "priors": [asdict(row) for row in rows],
        "verdict": {**asdict(verdict), "beyond_noise": verdict.beyond_noise, "sentence": str(verdict)},
        "versions": versions(),
        "pictures": [str(path.relative_to(out)) for path in pictures],
    }
    result = out / (f"compare-{part}.json" if part else "compare.json")
    write_json(result, summary)
    return [result, *pictures]


def reproduce_figure(
    console: Console,
    protocol: Protocol,
    dataset: Dataset,
    seed: int,
    out: Path,
    *,
    device: str,
    as_it_is: bool = False,
    limit: int | None = None,
) -> Reproduction:
    """Train and evaluate by a protocol, going on with what `out` holds; keep the record in `out`.

    With `as_it_is` nothing is trained, and with a `limit` only so many test images are measured.

    Raises:
        RunError: `as_it_is`, to train no further, was said of a folder without a run.
        ConfigError: the run in `out` is not by this protocol.
    """
    folder, config = RunFolder(out), replace(protocol.config, seed=seed)
    if folder.holds_run():
        _check_protocol(folder, config)
    if as_it_is:
        run = load_run(out, dataset=dataset, device=device)
    else:
        run = _trained(console, config, dataset, folder, device, label="")
    evaluation = evaluate_once(console, run, replace(protocol.plan, limit=limit))
    reproduction = reproduction_of(protocol, run, evaluation)
    write_reproduction(reproduction, folder.reproduction)
    return reproduction


def _check_protocol(folder: RunFolder, config: TrainConfig) -> None:
    """Raise ConfigError unless the run in the folder has a protocol's settings, or fewer epochs so far."""
    saved, asked = asdict(read_config(folder.config)), asdict(config)
    for name, value in asked.items():
        same = saved[name] == value or (name == "epochs" and saved[name] < value)
        if not same and name not in ("data_dir", "data_sha256"):
            raise ConfigError(
                f"{folder.path}: holds another run than this protocol's: {option(name)} is {saved[name]} there and "
                f"should be {value}. Name another --out."
            )


def _folder(out: Path, prior: str, seed: int) -> RunFolder:
    return RunFolder(out / f"{prior}-seed{seed}")


def _with(config: TrainConfig, prior: str, seed: int = 0) -> TrainConfig:
    return replace(config, prior=cast(PriorName, prior), seed=seed, **FOR_PRIOR.get(prior, {}))


def _trained(
    console: Console, config: TrainConfig, dataset: Dataset, folder: RunFolder, device: str, label: str
) -> TrainedRun:
    if folder.holds_run():
        saved = read_config(folder.config)
        try:
            config = continued(saved, asdict(config))
        except ConfigError as error:
            raise ConfigError(f"{folder.path}: {error} Say --overwrite, or another --out.") from error
        if folder.results.exists() and saved.epochs == config.epochs:
            return load_run(folder.path, dataset=dataset, device=device)
    return train_run(console, config, dataset, folder.path, resume=folder.holds_run(), device=device, label=label)


def evaluate_once(console: Console, run: TrainedRun, plan: EvaluationPlan, label: str = "evaluating") -> Evaluation:
    """The evaluation that is in the run's folder, if it is whole and of the same plan; else `evaluate_run`.

    One of another plan is kept under another name, and the user is told.
    """
    part = plan.part(run.dataset)
    path = run.folder.evaluation(part)
    try:
        earlier = _EVALUATION.validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return evaluate_run(console, run, plan, label)
    asked = plan.split, len(plan.rows(run.dataset)), plan.samples, plan.precision
    if asked == (earlier.split, earlier.images, earlier.importance_samples, earlier.precision):
        return earlier
    kept = run.folder.other_evaluation(part, earlier.importance_samples, earlier.precision)
    path.replace(kept)
    console.print(
        f"{path} was measured with {earlier.importance_samples} importance samples at precision "
        f"{earlier.precision or 'unknown'}; it is kept as {kept}, and made anew with {plan.samples} at "
        f"{plan.precision}.",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return evaluate_run(console, run, plan, label)


_EVALUATION = TypeAdapter(Evaluation)
