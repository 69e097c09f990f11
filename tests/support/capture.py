"""A CUDA graph in name: where there is no GPU it calls the captured function again at every replay.

As a real capture it changes nothing when it is made, reads what the inputs hold at each replay, and writes its results
into the same tensors every time.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastvae import TrainingStep, _capture
from fastvae.vae import VAEOutput

Inputs = tuple[Tensor | None, ...]


def capture_in_name(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Let calls on the CPU be captured, where nothing but the device speaks against it; the shapes of x that were."""
    shapes: list[list[int]] = []
    real_captured, model_why_not, step_why_not = _capture._captured, _capture.why_not, TrainingStep._why_not

    def captured(run: Callable[..., VAEOutput], device: torch.device, inputs: Inputs) -> Callable[[], VAEOutput]:
        assert inputs[0] is not None
        shapes.append(list(inputs[0].shape))
        return real_captured(run, device, inputs) if device.type == "cuda" else _in_name(run, inputs)

    def of_a_model(module: nn.Module) -> str | None:
        why = model_why_not(module)
        return None if why is not None and "not on a CUDA device" in why else why

    def of_a_step(step: TrainingStep) -> str | None:
        why = step_why_not(step)
        on_cpu = not next(step.vae.parameters()).is_cuda  # where no optimiser takes capturable=True
        return None if why is not None and "capturable=True" in why and on_cpu else why

    monkeypatch.setattr(_capture, "_captured", captured)
    monkeypatch.setattr(_capture, "why_not", of_a_model)
    monkeypatch.setattr(TrainingStep, "_why_not", of_a_step)
    return shapes


def _in_name(run: Callable[..., VAEOutput], inputs: Inputs) -> Callable[[], VAEOutput]:
    output: VAEOutput | None = None

    def replay() -> VAEOutput:
        nonlocal output
        new = run(*inputs)
        if output is None:
            output = new
        for name, value in vars(new).items():
            if value is not None:
                getattr(output, name).copy_(value)
        return output

    return replay
