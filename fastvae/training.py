"""One step of training, which on a GPU is replayed from a CUDA graph: Python then costs one launch a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastvae import _capture
from fastvae.priors import ExemplarPrior
from fastvae.priors.encoded import EncodedMixture
from fastvae.vae import VAE, VAEOutput


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
        options: arguments of :meth:`fastvae.VAE.forward`: num_samples, kl, bound, gradient, chunk_size,
            backward_samples.

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
        parameters = inspect.signature(vae.forward).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):  # as a wrapper has
            for name in options.keys() - parameters.keys():
                raise TypeError(f"TrainingStep() got an unexpected keyword argument {name!r}")
        self.vae, self.optimizer, self.prepare, self.options = vae, optimizer, prepare, options
        self.why_not_captured = "capture=False" if capture is False else self._why_not()
        if capture and self.why_not_captured is not None:
            raise RuntimeError(f"capture=True, but the step cannot be captured: {self.why_not_captured}")
        if capture is None and self.why_not_captured is None:
            self.why_not_captured = _capture.forbidden()
        self._learning_rates: list[Tensor] = []
        self._replays = _capture.Replays(
            self._run,
            vae,
            capture=self.why_not_captured is None,
            rehearse=self._gradients,
            before_capture=optimizer.zero_grad,  # so that a graph has the gradients in memory of its own
        )
        # What is loaded are other tensors than those that a graph writes.
        optimizer.register_load_state_dict_post_hook(lambda _: self._replays.forget())

    def __call__(
        self, x: Tensor, y: Tensor | None = None, *, beta: float = 1.0, index: Tensor | None = None
    ) -> VAEOutput:
        """Train on a batch.

        Args:
            x: what :meth:`fastvae.VAE.forward` takes, or `prepare`; to be captured, on the model's device.
            y: [B, ...], as in :meth:`fastvae.VAE.forward`.
            beta: weight of the KL in the loss.
            index: int64 [B], as in :meth:`fastvae.VAE.forward`.

        Returns:
            What the pass gave, without gradients.  A captured step writes its tensors anew: what is to be kept beyond
            the next call must be copied.
        """
        if x.device == self._replays.device:
            self._keep_learning_rates(x.device)
        return self._replays(x, y, beta, index)

    def _run(self, x: Tensor, y: Tensor | None, beta: float | Tensor, index: Tensor | None) -> VAEOutput:
        output = self._gradients(x, y, beta, index)
        self.optimizer.step()
        return output

    def _gradients(self, x: Tensor, y: Tensor | None, beta: float | Tensor, index: Tensor | None) -> VAEOutput:
        """Forward and backward."""
        self.optimizer.zero_grad()
        x = x if self.prepare is None else self.prepare(x)
        output = self.vae(x, y, beta=beta, index=index, **self.options)
        output.loss.backward()
        values = {field.name: getattr(output, field.name) for field in fields(output)}
        return replace(output, **{name: None if value is None else value.detach() for name, value in values.items()})

    def _why_not(self) -> str | None:
        """Why a step cannot be captured, or None."""
        if self.options.get("chunk_size") is not None:
            return "chunk_size recomputes activations with random numbers that it sets back"
        for prior in self.vae.modules():
            if isinstance(prior, EncodedMixture) and prior.refresh < 1:
                return "the prior's refresh takes other components in every step"
            if isinstance(prior, ExemplarPrior) and prior.subset is not None:
                return "the prior draws another subset in every step"
        why = _capture.why_not(self.vae)
        if why is None and not all(group.get("capturable") for group in self.optimizer.param_groups):
            return f"{type(self.optimizer).__name__} was not made with capturable=True, which Adam and others take"
        return why

    def _keep_learning_rates(self, device: torch.device) -> None:
        """A graph reads the tensors that it was captured with: schedulers and users may assign numbers instead."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self._learning_rates):  # the first call, or one after add_param_group
            self._replays.forget()
            self._learning_rates = [torch.empty((), device=device, dtype=torch.float32) for _ in groups]
        for group, kept in zip(groups, self._learning_rates, strict=True):
            if group["lr"] is not kept:
                kept.fill_(group["lr"])
                group["lr"] = kept
