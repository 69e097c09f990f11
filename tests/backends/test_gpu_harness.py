"""How the shared tests reach a GPU, where there is none: `support.on_gpu` with another device in its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.test_operators import OPERATIONS, Operation
from support.on_gpu import FUNCTIONS, TAKE_A_DEVICE, call_on
from torch import Tensor

import fastvae


def test_every_function_that_takes_an_impl_is_moved() -> None:
    public = {name: getattr(fastvae, name) for name in fastvae.__all__}
    functions = [name for name, f in public.items() if inspect.isfunction(f) and "impl" in (f.__kwdefaults__ or {})]
    assert sorted(functions) == sorted(FUNCTIONS + TAKE_A_DEVICE)


def test_a_function_that_takes_a_device_is_given_it(monkeypatch: pytest.MonkeyPatch) -> None:
    call_on(monkeypatch, "meta", "composite")
    z, mu = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="device='meta' cannot compute here"):
        fastvae.streamed_log_prob(z, mu, mu, impl="composite")
    assert fastvae.streamed_log_prob(z, mu, mu, impl="cpu").shape == (4,)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_moves_are_traced(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile makes one graph of them and of what runs between: nothing in the harness is hidden from it."""
    call_on(monkeypatch, "meta", "composite")
    torch._dynamo.reset()
    traced: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
        traced.append(graph)
        raise ZeroDivisionError  # there is nothing to compute on that device

    compiled = torch.compile(operation, fullgraph=True, dynamic=True, backend=backend)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="ZeroDivisionError"):
        compiled(torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True), "composite")
    devices = {
        value.device.type for graph in traced for node in graph.graph.nodes
        if isinstance(value := node.meta.get("example_value"), Tensor)
    }  # fmt: skip
    assert devices == {"cpu", "meta"}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_function_itself_runs_on_the_device(operation: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no data there, so that its result cannot come back; another impl stays where it was."""
    z, mu = torch.randn(4, 3), torch.randn(5, 3)
    torch.manual_seed(0)
    want = operation(z, mu, "composite")
    call_on(monkeypatch, "meta", "composite")
    with pytest.raises(NotImplementedError, match="copy out of meta"):
        operation(z, mu, "composite")
    call_on(monkeypatch, "meta", "triton")
    assert all(r.device.type == "cpu" for r in operation(z, mu, "reference"))
    monkeypatch.undo()
    call_on(monkeypatch, "cpu", "composite")
    torch.manual_seed(0)
    assert all(torch.equal(g, w) for g, w in zip(operation(z, mu, "composite"), want, strict=True))
