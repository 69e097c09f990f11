"""The steps of the commands, with their progress on the terminal: train a run, evaluate one, compare many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from fastvae.app.data.dataset import Dataset
from fastvae.app.data.whole_file import write_json
from fastvae.app.run.comparison import Row
from fastvae.app.run.config import TrainConfig, continued, read_config
from fastvae.app.run.evaluation import Evaluation, EvaluationPlan, evaluate
from fastvae.app.run.folder import RunFolder, TrainedRun, load_run
from fastvae.app.run.training import train
from fastvae.app.show.pictures import draw_gap, draw_run
from fastvae.app.show.progress import counting_progress, training_progress
from fastvae.app.user_errors import ConfigError


def train_run(
    console: Console,
    config: TrainConfig,
    dataset: Dataset,
    out: Path,
    *,
    resume: bool,
    device: str,
    label: str = "",
) -> TrainedRun:
    """Train, or go on training, with a progress bar; then draw the run's pictures."""
    folder = RunFolder(out)
    done = folder.load()["epoch"] if resume and folder.checkpoint.exists() else 0
    with training_progress(console, config, dataset, done + 1, label) as watchers:
        train(config, dataset, out, resume=resume, device=device, watchers=watchers)
    run = load_run(out, dataset=dataset, device=device)
    draw_run(run)
    return run


def evaluate_run(console: Console, run: TrainedRun, plan: EvaluationPlan, label: str = "evaluating") -> Evaluation:
    """Evaluate with a progress bar; keep the result, and the picture of prior and posterior, in the run's folder."""
    with counting_progress(console, label, len(plan.images(run.dataset))) as on_images:
        evaluation = evaluate(run, plan, on_images)
    write_json(run.folder.evaluation, asdict(evaluation))
    draw_gap(run)
    return evaluation


def compare_priors(
    console: Console,
    config: TrainConfig,
    dataset: Dataset,
    priors: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    plan: EvaluationPlan,
    device: str,
) -> tuple[list[Row], list[TrainedRun]]:
    """Train and evaluate every prior with every seed, each in a folder of its own under `out`.

    What is already done, and was done the same way, is not done again.

    Returns:
        A row for each prior, and each prior's run with the first seed.
    """
    rows, shown = [], []
    for prior in priors:
        runs, evaluations = [], []
        for seed in seeds:
            path, label = out / f"{prior}-seed{seed}", f"{prior}, seed {seed}:"
            run = _trained(console, replace(config, prior=prior, seed=seed), dataset, path, device, label)
            evaluation = _earlier_evaluation(run, plan)
            if evaluation is None:
                evaluation = evaluate_run(console, run, plan, f"{label} evaluating")
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
    return rows, shown


def _trained(
    console: Console, config: TrainConfig, dataset: Dataset, path: Path, device: str, label: str
) -> TrainedRun:
    folder = RunFolder(path)
    if folder.holds_run():
        try:
            config = continued(read_config(folder.config), asdict(config))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error} Say --overwrite, or another --out.") from error
        if folder.results.exists() and read_config(folder.config).epochs == config.epochs:
            return load_run(path, dataset=dataset, device=device)
    return train_run(console, config, dataset, path, resume=folder.holds_run(), device=device, label=label)


def _earlier_evaluation(run: TrainedRun, plan: EvaluationPlan) -> Evaluation | None:
    try:
        content: dict[str, Any] = json.loads(run.folder.evaluation.read_text())
        evaluation = Evaluation(**content)
    except (FileNotFoundError, ValueError, TypeError):
        return None
    asked = (plan.split, plan.samples, len(plan.images(run.dataset)))
    same = (evaluation.split, evaluation.importance_samples, evaluation.images) == asked
    return evaluation if same else None
