"""A function of tensors that on a GPU is replayed from a CUDA graph: Python then costs one launch a call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastvae.backends import choice
from fastvae.priors import Mixture
from fastvae.priors.encoded import EncodedMixture

Input = Tensor | float | None
Output = TypeVar("Output")

_WARM_UP = 2  # passes before capture, in which libraries choose their kernels and allocate what they keep


class Replays(Generic[Output]):
    """`run(*inputs)`, of which a CUDA graph is made for each kind of inputs.

    The first call of a kind runs as usual, the second is captured, and from then on every call of that kind replays the
    graph on the inputs that it is given.  The kinds are told apart by the tensors' shapes and dtypes, by the modules'
    training modes, and by what autocast and `use_backend` say; numbers may differ from call to call.

    Args:
        run: the function.  A replay reads other tensors, such as weights, where they were at the capture: they must
            have been changed in place.
        module: what runs in it.
        capture: False calls `run` every time, as do inputs on another device than the module's.
        rehearse: called with the inputs before a capture: as much of `run` as changes nothing but gradients, buffers of
            the module and random states.  The latter two are set back.
        before_capture: called after the rehearsals.
    """

    def __init__(
        self,
        run: Callable[..., Output],
        module: nn.Module,
        *,
        capture: bool,
        rehearse: Callable[..., object] | None = None,
        before_capture: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.module = run, module
        self.device = next(module.parameters()).device if capture else None
        self.rehearse, self.before_capture = rehearse or run, before_capture
        self._graphs: dict[tuple[Any, ...], _Graph[Output] | None] = {}  # None: has run once

    def forget(self) -> None:
        """Begin anew: a graph would go on with tensors that are no longer used."""
        self._graphs.clear()

    def __call__(self, x: Tensor, *others: Input) -> Output:
        """What run(x, *others) returns; after a capture, in tensors that the next call writes anew."""
        inputs, kind = (x, *others), x.device.type
        if x.device != self.device:
            return self.run(*inputs)
        key = (
            *((value.shape, value.dtype) if isinstance(value, Tensor) else value is None for value in inputs),
            *(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), choice.current()),
            tuple(module.training for module in self.module.modules()),
        )
        if key not in self._graphs:
            self._graphs[key] = None
            with warnings.catch_warnings():  # of a capturable optimiser that runs as usual, which it does once
                warnings.filterwarnings("ignore", message=".*without CUDA graph capture")
                return self.run(*inputs)
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = _Graph(self, x.device, inputs)
        return graph.replay(inputs)


def forbidden() -> str | None:
    """Why nothing is captured that need not be, or None."""
    return "FASTVAE_CAPTURE=0" if os.environ.get("FASTVAE_CAPTURE") == "0" else None


def why_not(module: nn.Module) -> str | None:
    """Why passes of a module cannot be captured, or None."""
    for part in module.modules():
        if isinstance(part, DistributedDataParallel):
            return "DistributedDataParallel exchanges gradients, and finds out anew which come together"
        if isinstance(part, EncodedMixture) and part.chunk_size is not None:
            return "the prior's chunk_size recomputes activations with random numbers that it sets back"
        if isinstance(part, Mixture) and part.conditional:
            return "the prior sorts the rows by their labels, and waits for the device to learn how many each has"
    if {parameter.device.type for parameter in module.parameters()} != {"cuda"}:
        return "the model is not on a CUDA device"
    return None


class _Graph(Generic[Output]):
    """A captured call, with the tensors that it reads."""

    def __init__(self, replays: Replays[Output], device: torch.device, inputs: tuple[Input, ...]) -> None:
        self.inputs = tuple(_own(value, device) for value in inputs)
        with _without_autocast_cache():
            with _unchanged(replays.module, device), _side_stream(device):
                for _ in range(_WARM_UP):
                    replays.rehearse(*self.inputs)
            replays.before_capture()
            self.run = _captured(replays.run, device, self.inputs)

    def replay(self, inputs: tuple[Input, ...]) -> Output:
        for own, value in zip(self.inputs, inputs, strict=True):
            if own is None or value is None:
                continue
            if isinstance(value, Tensor):
                own.copy_(value.detach())
            else:
                own.fill_(value)
        return self.run()


def _own(value: Input, device: torch.device) -> Tensor | None:
    """A tensor for an input of the graph to be copied to."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.detach().clone()
    return torch.full((), value, device=device, dtype=torch.float64)  # as Python's numbers are


def _captured(
    run: Callable[..., Output], device: torch.device, inputs: tuple[Tensor | None, ...]
) -> Callable[[], Output]:
    """A function that replays run on what the inputs then hold, and returns its output, which it writes anew."""
    graph = torch.cuda.CUDAGraph()
    # Without a stream of this device, PyTorch captures on one of whichever device it captured on first.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        output = run(*inputs)

    def replay() -> Output:
        graph.replay()
        return output

    return replay


@contextmanager
def _unchanged(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo what passes change beside the gradients: random states, and buffers such as running means."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), before, strict=True):
                buffer.copy_(value)


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Have autocast cast the weights in every pass: a graph would go on with those that it found cast already."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream of its own, as PyTorch asks for what comes before a capture."""
    if device.type != "cuda":
        yield
        return
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield
    main.wait_stream(side)
