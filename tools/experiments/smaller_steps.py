"""Runs that have ended go on at a smaller learning rate: what their last learning rate has cost.

    python -m tools.experiments.smaller_steps RUN... --work DIR [--rate 1e-4] [--epochs 5] [--limit 500] [--out FILE]

RUN is a folder of `fastvae train` or `fastvae reproduce`, and is left as it is.  --work keeps the longer runs and what
was measured, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copy
from typing import Any

import torch

from fastvae.app.run.checkpoint import read_checkpoint, write_first_checkpoint
from fastvae.app.run.config import read_config
from fastvae.app.run.evaluation import log_likelihoods
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.trained import load_run
from fastvae.app.run.training import train
from fastvae.benchmarks import formatting
from fastvae.benchmarks.record import machine

from . import command


def measure(runs: Sequence[Path], work: Path, rate: float, epochs: int, limit: int) -> dict[str, Any]:
    """Train each on, and compare the best models of before and after on the same test images with the same noise."""
    torch.set_num_threads(1)
    found = [longer(run, work / run.absolute().name, rate, epochs, EvaluationPlan(limit=limit)) for run in runs]
    return {"torch": torch.__version__, "machine": machine("cpu"), "learning_rate": rate, "runs": found}


def longer(run: Path, work: Path, rate: float, epochs: int, plan: EvaluationPlan) -> dict[str, Any]:
    """A run as it ended, and after so many further epochs at this rate."""
    before, after = RunFolder(work / "before"), RunFolder(work / "after")
    if not after.holds_run():
        for folder in (before, after):
            folder.path.mkdir(parents=True, exist_ok=True)
        for file in (RunFolder(run).config, RunFolder(run).checkpoint):
            copy(file, before.path / file.name)
        state, config = read_checkpoint(before), read_config(before.config)
        until = state["epoch"] + epochs  # however long the bound has not improved
        write_first_checkpoint(after, replace(config, learning_rate=rate, epochs=until, patience=until), state)
    ended = load_run(before.path)
    train(read_config(after.config), ended.dataset, after.path, resume=True)
    gone_on = load_run(after.path, dataset=ended.dataset)
    first, second = log_likelihoods(ended, plan), log_likelihoods(gone_on, plan)
    gain = second - first
    done = ended.checkpoint["epoch"]
    return {
        "run": run.absolute().name,
        "learning_rate": ended.config.learning_rate,
        "epochs": done,
        "best_bound": round(ended.checkpoint["best_bound"], 3),
        "further_bounds": [round(line["validation"]["bound"], 3) for line in gone_on.checkpoint["history"][done:]],
        "images": len(gain),
        "log_likelihood": float(first.mean()),
        "gain": float(gain.mean()),
        "gain_standard_error": float(gain.std()) / len(gain) ** 0.5,
    }


def markdown(content: dict[str, Any]) -> str:
    """A row for each run."""
    header = ["", "epochs, learning rate", f"further epochs at {content['learning_rate']:g}"]
    header += ["best validation bound", "after", "log-likelihood, test images", "better by"]
    rows = []
    for run in content["runs"]:
        bounds = run["best_bound"], max(run["best_bound"], *run["further_bounds"])
        row = [f"`{run['run']}`", f"{run['epochs']} at {run['learning_rate']:g}", str(len(run["further_bounds"]))]
        row += [f"{bound:.2f}" for bound in bounds] + [f"{run['log_likelihood']:.2f}, {run['images']:,}"]
        rows.append([*row, f"{run['gain']:.2f} +- {run['gain_standard_error']:.2f}"])
    return formatting.markdown(header, rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.experiments.smaller_steps", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run that has ended")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="keeps the longer runs")
    parser.add_argument("--rate", type=float, default=1e-4, help="the smaller learning rate")
    parser.add_argument("--epochs", type=int, default=5, help="how long to go on")
    parser.add_argument("--limit", type=int, default=500, help="so many test images")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there too")
    options = parser.parse_args(arguments)
    return command.keep(
        lambda: measure(options.runs, options.work, options.rate, options.epochs, options.limit), markdown, options.out
    )


if __name__ == "__main__":
    sys.exit(main())
