"""What a protocol's run gave, beside the published figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastvae.app.run.checkpoint import Checkpoint
from fastvae.app.run.evaluation import Evaluation
from fastvae.app.run.protocol import Protocol
from fastvae.app.run.trained import TrainedRun
from fastvae.app.run.training import finished
from fastvae.benchmarks.record import code, machine, versions, write_record


@dataclass(frozen=True)
class Reproduction:
    """A run of a protocol, and what it was worth.

    Attributes:
        protocol: the protocol's name, title, published figures and differences.
        seed: the run's.
        finished: whether training went to its end, and all test images were measured; else it was measured on the way.
        epochs, best_epoch: how many there were, and which had the best validation bound.
        validation_bounds: nats per image after each epoch.
        seconds, seconds_per_epoch: of training; the sum, and the median.
        evaluation: what the best model is worth on the test images.
        machine, versions, code: what it ran on and with.
    """

    protocol: dict[str, Any]
    seed: int
    finished: bool
    epochs: int
    best_epoch: int
    validation_bounds: list[float]
    seconds: float
    seconds_per_epoch: float
    evaluation: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    code: dict[str, Any]


def reproduction_of(protocol: Protocol, run: TrainedRun, evaluation: Evaluation) -> Reproduction:
    """The record of a run that has been evaluated."""
    state: Checkpoint = run.checkpoint
    seconds = [line["seconds"] for line in state["history"]]
    measured = asdict(evaluation)
    del measured["gap"]  # of the training images; it is in the run's own files
    return Reproduction(
        protocol={
            "name": protocol.name,
            "title": protocol.title,
            "published": [asdict(figure) for figure in protocol.published],
            "differences": list(protocol.differences),
        },
        seed=run.config.seed,
        finished=finished(protocol.config, state) and evaluation.images == len(run.dataset.test),
        epochs=state["epoch"],
        best_epoch=state["best_epoch"],
        validation_bounds=[round(line["validation"]["bound"], 3) for line in state["history"]],
        seconds=round(sum(seconds), 1),
        seconds_per_epoch=round(median(seconds), 3),
        evaluation=measured,
        machine=machine(run.device),
        versions=versions(),
        code=code(run.device),
    )


def write_reproduction(reproduction: Reproduction, path: Path) -> None:
    """Write the record as JSON, whole or not at all."""
    write_record(path, asdict(reproduction))
