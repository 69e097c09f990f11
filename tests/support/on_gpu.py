"""The shared tests on a GPU: the public functions are called with tensors on it, as users call them.

The tests' own tensors stay on the CPU, where the specification is computed.  What is replaced is the functions that the
tests call, and none of what these run: arguments are checked, a backend is chosen and autograd records on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae

from . import internals

FUNCTIONS = (
    "gaussian_kl",
    "gaussian_rsample",
    "grouped_mixture_log_prob",
    "mixture_kl",
    "mixture_log_prob",
    "mixture_log_prob_and_score",
    "mixture_marginal_log_prob",
)


def call_on(monkeypatch: pytest.MonkeyPatch, device: str, impl: str) -> None:
    """Let every public function compute on a device where a call asks for that `impl`; its results come back.

    The same seed then gives the same noise as on the CPU.
    """
    for name in FUNCTIONS:
        monkeypatch.setattr(fastvae, name, _there_and_back(getattr(fastvae, name), torch.device(device), impl))
    internals.draw_seeds_on_cpu(monkeypatch)


def _there_and_back(function: Callable[..., Any], device: torch.device, impl: str) -> Callable[..., Any]:
    """torch.compile traces it: to that, the moves are operators like others.  Bringing a result back waits for it."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        home = next((a.device for a in (*arguments, *named.values()) if isinstance(a, Tensor)), None)
        if home is None or named.get("impl") != impl:
            return function(*arguments, **named)
        result = function(
            *(_moved(a, device) for a in arguments), **{name: _moved(a, device) for name, a in named.items()}
        )
        return tuple(_moved(r, home) for r in result) if isinstance(result, tuple) else _moved(result, home)

    return call


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
