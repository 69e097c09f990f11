"""One step of training, which on a GPU is replayed from a CUDA graph: Python then costs one launch a step."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastvae.backends import choice
from fastvae.priors import ExemplarPrior
from fastvae.priors.encoded import EncodedMixture
from fastvae.vae import VAE, VAEOutput

_WARM_UP = 2  # passes before capture, in which libraries choose their kernels and allocate what they keep


class TrainingStep:
    """Forward, backward and the optimiser's step of a VAE, as one call.

    On a CUDA device the first call with a shape runs as usual, the second is captured in a CUDA graph, and from then on
    every call with that shape replays the graph.  Elsewhere, and where a step is known not to be capturable, every call
    runs as usual.  The numbers are the same either way, but for learning rates, which a graph has in float32.

    The weight `beta`, the optimiser's learning rates and the random numbers are new in every step, captured or not.
    Other settings of the optimiser stay as they were at the capture, so that OneCycleLR needs `cycle_momentum=False`.
    A step is captured anew where autocast, `use_backend` or a module's training mode has changed, and after
    `optimizer.load_state_dict`.

    Args:
        vae: the model.  Everything in it must run without waiting for the device, and no result of a pass outside of
            the step may still hold its graph (`detach` it), or the capture fails with PyTorch's error; `capture=False`
            then trains as usual.
        optimizer: of the model's parameters.  To be captured it must have been made with `capturable=True`, and the
            model must not be wrapped in DistributedDataParallel.  Its learning rates become tensors, into which
            numbers that are assigned later are copied.  Which gradients `p.grad` has after a call is not defined.
        prepare: called with x within the step, for the model's input: to binarise images, or to pick them by their
            indices from a data set that is on the device.
        capture: False never captures; True raises RuntimeError where a step cannot be captured; None captures where it
            can, unless FASTVAE_CAPTURE=0 is in the environment.
        options: arguments of :meth:`fastvae.VAE.forward`: num_samples, kl, bound, gradient, chunk_size.

    Raises:
        TypeError: VAE.forward has no such argument.

    Attributes:
        why_not_captured: the reason why steps are not captured; None where they are.

    Example::

        optimizer = torch.optim.Adam(vae.parameters(), lr=5e-4, capturable=True)
        step = fastvae.TrainingStep(vae, optimizer, prepare=torch.bernoulli)
        for x in batches:
            loss = step(x).loss  # a tensor on the device; float(loss) waits for it
    """

    def __init__(
        self,
        vae: VAE,
        optimizer: Optimizer,
        *,
        prepare: Callable[[Tensor], Tensor] | None = None,
        capture: bool | None = None,
        **options: Any,
    ) -> None:
        for name in options.keys() - inspect.signature(vae.forward).parameters.keys():
            raise TypeError(f"TrainingStep() got an unexpected keyword argument {name!r}")
        self.vae, self.optimizer, self.prepare, self.options = vae, optimizer, prepare, options
        if capture is None and os.environ.get("FASTVAE_CAPTURE") == "0":
            self.why_not_captured: str | None = "FASTVAE_CAPTURE=0"
        else:
            self.why_not_captured = "capture=False" if capture is False else self._why_not()
        if capture and self.why_not_captured is not None:
            raise RuntimeError(f"capture=True, but the step cannot be captured: {self.why_not_captured}")
        self._device = next(vae.parameters()).device if self.why_not_captured is None else None
        self._learning_rates: list[Tensor] = []
        self._graphs: dict[tuple[Any, ...], _Graph | None] = {}  # None: has run once
        # What is loaded are other tensors than those that a graph writes.
        optimizer.register_load_state_dict_post_hook(lambda _: self._graphs.clear())

    def __call__(self, x: Tensor, *, beta: float = 1.0, index: Tensor | None = None) -> VAEOutput:
        """Train on a batch.

        Args:
            x: what :meth:`fastvae.VAE.forward` takes, or `prepare`; to be captured, on the model's device.
            beta: weight of the KL in the loss.
            index: int64 [B], as in :meth:`fastvae.VAE.forward`.

        Returns:
            What the pass gave, without gradients.  A captured step writes its tensors anew: what is to be kept beyond
            the next call must be copied.
        """
        if x.device != self._device:
            return self._run(x, beta, index)
        self._keep_learning_rates()
        kind = self._device.type
        key = (
            *(x.shape, x.dtype, None if index is None else index.shape),
            *(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), choice.current()),
            tuple(module.training for module in self.vae.modules()),
        )
        if key not in self._graphs:
            self._graphs[key] = None
            with warnings.catch_warnings():  # of a capturable optimiser that runs as usual, which it does once
                warnings.filterwarnings("ignore", message=".*without CUDA graph capture")
                return self._run(x, beta, index)
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = _Graph(self, x, index)
        return graph.replay(x, beta, index)

    def _run(self, x: Tensor, beta: float | Tensor, index: Tensor | None) -> VAEOutput:
        output = self._gradients(x, beta, index)
        self.optimizer.step()
        return output

    def _gradients(self, x: Tensor, beta: float | Tensor, index: Tensor | None) -> VAEOutput:
        """Forward and backward."""
        self.optimizer.zero_grad()
        output = self.vae(x if self.prepare is None else self.prepare(x), beta=beta, index=index, **self.options)
        output.loss.backward()
        values = {field.name: getattr(output, field.name) for field in fields(output)}
        return replace(output, **{name: None if value is None else value.detach() for name, value in values.items()})

    def _why_not(self) -> str | None:
        """Why a step cannot be captured, or None."""
        if self.options.get("chunk_size") is not None:
            return "chunk_size recomputes activations with random numbers that it sets back"
        for prior in self.vae.modules():
            if isinstance(prior, EncodedMixture) and prior.chunk_size is not None:
                return "the prior's chunk_size recomputes activations with random numbers that it sets back"
            if isinstance(prior, EncodedMixture) and prior.refresh < 1:
                return "the prior's refresh takes other components in every step"
            if isinstance(prior, ExemplarPrior) and prior.subset is not None:
                return "the prior draws another subset in every step"
        if {parameter.device.type for parameter in self.vae.parameters()} != {"cuda"}:
            return "the model is not on a CUDA device"
        if not all(group.get("capturable") for group in self.optimizer.param_groups):
            return f"{type(self.optimizer).__name__} was not made with capturable=True, which Adam and others take"
        return None

    def _keep_learning_rates(self) -> None:
        """A graph reads the tensors that it was captured with: schedulers and users may assign numbers instead."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self._learning_rates):  # the first call, or one after add_param_group
            self._graphs.clear()
            self._learning_rates = [torch.empty((), device=self._device, dtype=torch.float32) for _ in groups]
        for group, kept in zip(groups, self._learning_rates, strict=True):
            if group["lr"] is not kept:
                kept.fill_(group["lr"])
                group["lr"] = kept


class _Graph:
    """A captured step, with the tensors that it reads and writes."""

    def __init__(self, step: TrainingStep, x: Tensor, index: Tensor | None) -> None:
        self.x, self.index = x.detach().clone(), None if index is None else index.clone()
        self.beta = torch.ones((), device=x.device, dtype=torch.float64)  # Python's numbers
        with _without_autocast_cache():
            with _unchanged(step.vae, x.device), _side_stream(x.device):
                for _ in range(_WARM_UP):
                    step._gradients(self.x, self.beta, self.index)
            step.optimizer.zero_grad()  # so that the capture allocates the gradients anew, in the graph's own memory
            self.run, self.output = _captured(step, self.x, self.beta, self.index)

    def replay(self, x: Tensor, beta: float, index: Tensor | None) -> VAEOutput:
        self.x.copy_(x.detach())
        self.beta.fill_(beta)
        if self.index is not None and index is not None:
            self.index.copy_(index)
        self.run()
        return self.output


def _captured(
    step: TrainingStep, x: Tensor, beta: Tensor, index: Tensor | None
) -> tuple[Callable[[], None], VAEOutput]:
    """A function that replays the step on what these tensors then hold, and its output, which it writes anew."""
    graph = torch.cuda.CUDAGraph()
    # Without a stream of this device, PyTorch captures on one of whichever device it captured on first.
    with torch.cuda.device(x.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(x.device)):
        output = step._run(x, beta, index)
    return graph.replay, output


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
