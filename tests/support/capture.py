"""A CUDA graph in name: where there is no GPU it calls the step's own function again at every replay.

As a real capture it changes nothing when it is made, reads what the step's tensors hold at each replay, and writes its
results into the same tensors every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastvae import TrainingStep, training
from fastvae.vae import VAEOutput


def capture_in_name(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let every step be captured; the shapes of x that were, in turn."""
    shapes: list[list[int]] = []
    real = training._captured

    def captured(step: TrainingStep, x: Tensor, *others: Any) -> tuple[Callable[[], None], VAEOutput]:
        shapes.append(list(x.shape))
        return real(step, x, *others) if x.is_cuda else _in_name(step, x, *others)

    def why_not(step: TrainingStep) -> str | None:
        return reason(step) if next(step.vae.parameters()).is_cuda else None

    reason = TrainingStep._why_not
    monkeypatch.setattr(training, "_captured", captured)
    monkeypatch.setattr(TrainingStep, "_why_not", why_not)
    return shapes


def _in_name(step: TrainingStep, *arguments: Any) -> tuple[Callable[[], None], VAEOutput]:
    before = [tensor.clone() for tensor in _changed_by(step)]
    with torch.random.fork_rng([]):
        output = step._run(*arguments)
    with torch.no_grad():
        for tensor, value in zip(_changed_by(step), before, strict=True):
            tensor.copy_(value)

    def replay() -> None:
        for name, value in vars(step._run(*arguments)).items():
            if value is not None:
                getattr(output, name).copy_(value)

    return replay, output


def _changed_by(step: TrainingStep) -> list[Tensor]:
    moments = (value for state in step.optimizer.state.values() for value in state.values() if value is not None)
    return [*step.vae.state_dict().values(), *moments]
