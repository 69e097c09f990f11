"""Priors whose components are the encoder's posteriors of K inputs, and the VampPrior, whose inputs are learned."""

from __future__ import annotations

import math
import warnings
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvae import _checks
from fastvae import functional as F
from fastvae._few import forget_casts, require_repeatable, resampled, rows_on
from fastvae._noise import rows_of_batch
from fastvae.contracts import encode, is_readable, require_tensor
from fastvae.em.responsibilities import responsibility_sums
from fastvae.priors.base import Density, Prior
from fastvae.priors.mixture import Mixture, checked_labels
from fastvae.priors.weights import weight_logits

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastvae.backends import BackendOptions


class EncodedMixture(Mixture):
    """A mixture whose component k is q(z | u_k), which the encoder makes of an input u_k.

    The encoder is shared but not owned: `parameters()` and `state_dict()` of the prior do not hold it, so that the
    VAE's hold it once.  Assigning `vae.encoder` (another encoder, or the same one wrapped) assigns `encoder` here too.

    With `refresh` below 1, a step of training (`kl` and `density` in training mode) encodes only that share of the
    inputs, in a random order, and reuses the last encodings of the others without a gradient.  No encoding is older
    than 1 / refresh steps.  The gradient by way of the components is then biased: about the share `refresh` of it
    arrives, and training shows it.  `neighbours` brings more of it back: each row's nearest components, which hold
    most of its responsibilities, are encoded too.  `log_prob`, `components`, `sample` and evaluation mode encode all,
    and so does the first step after `train()` or `eval()`.

    With `backward_components`, a step of training encodes all inputs without activations, and so many of them once
    more with a gradient.  The density is that of all components, exactly; so are its gradients in z, in the weights
    and in a shared variance.  Of the gradient by way of the encodings, which is the sum of the components' parts, those
    of the components chosen stand for all, scaled so that the mean is that of all.  Components are chosen at random by
    their responsibilities, summed over the rows, and one whose part is 0 never is: where no more than
    `backward_components` have a part, the gradient is exact.  Each evaluation of the density chooses anew.  A subclass
    whose `step_components` differ from `components` has no use for it.
    """

    encoder: nn.Module

    def __init__(
        self,
        encoder: nn.Module,
        chunk_size: int | None,
        refresh: float,
        neighbours: int,
        backward_components: int | None = None,
        **backend: Unpack[BackendOptions],
    ) -> None:
        super().__init__(**backend)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 or None, not {chunk_size}")
        if not 0 < refresh <= 1:
            raise ValueError(f"refresh must be above 0 and at most 1, the share of a step, not {refresh}")
        if neighbours < 0:
            raise ValueError(f"neighbours must be at least 0, not {neighbours}")
        if backward_components is not None:
            backward_components = _checks.positive("backward_components", backward_components)
            if refresh < 1:
                raise ValueError(
                    "backward_components and refresh are two ways to save work in a step; give one of them"
                )
        self.encoder = encoder
        self.chunk_size = chunk_size
        self.refresh = refresh
        self.neighbours = neighbours
        self.backward_components = backward_components

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "encoder":
            return super().__setattr__(name, value)
        self.__dict__["encoder"] = value  # past nn.Module's registry: the VAE registers it
        self._forget()

    def train(self, mode: bool = True) -> EncodedMixture:
        """As of any module; and `refresh` begins anew, with all components encoded in the next step."""
        self._forget()
        return super().train(mode)

    def _forget(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None  # (mu [K, D], logvar [K, D]) as last encoded
        self._turns: list[Tensor] = []  # the components whose turn is still to come, a step's worth in each

    def _inputs(self, index: Tensor | None) -> Tensor:
        """u [n, *input_shape] of these components, None for all."""
        raise NotImplementedError

    def _encode(self, u: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """(mu [n, D], logvar [n, D]) of inputs [n, *input_shape], and of their labels where they have any."""
        return encode(self.encoder, u, y)

    def _encoded(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mu [n, D], logvar [n, D]), in chunks whose activations are not kept but computed again in backward.

        Those of a single chunk are kept: backward would need as much memory for them.
        """
        u, y = self._inputs(index), self.component_labels()
        if y is not None and index is not None:
            y = y[index]
        if self.chunk_size is None or len(u) <= self.chunk_size:
            return self._encode(u, y)
        parts = zip(u.split(self.chunk_size), repeat(None) if y is None else y.split(self.chunk_size), strict=False)
        encoded = [checkpoint(self._encode, *part, use_reentrant=False) for part in parts]
        mu, logvar = (torch.cat(part) for part in zip(*encoded, strict=True))
        return mu, logvar

    def _refreshed(self, index: Tensor | None, near: Tensor | None) -> tuple[Tensor, Tensor]:
        """(mu [K, D], logvar [K, D]) for a step of training; index and near as in :meth:`Prior.density`."""
        if self.refresh == 1 or not self.training:
            return self._encoded()
        if self._kept is None:
            with torch.no_grad():
                self._kept = self._encoded()
        kept_mu, kept_logvar = self._kept
        K = len(kept_mu)
        if not self._turns:
            self._turns = list(torch.randperm(K, device=kept_mu.device).split(math.ceil(self.refresh * K)))
        turn = self._turns.pop()
        if self.neighbours and near is not None:
            points = near.detach().reshape(-1, near.shape[-1])
            nearest = _nearest(points, kept_mu, min(self.neighbours, K), index)
            turn = torch.cat([turn, nearest.flatten()]).unique()
        mu, logvar = self._encoded(turn)
        mu, logvar = kept_mu.index_copy(0, turn, mu), kept_logvar.index_copy(0, turn, logvar)
        self._kept = mu.detach(), logvar.detach()
        return mu, logvar

    def _takes_few(self, K: int | None = None) -> bool:
        """Whether a gradient is to reach the encoder by way of few of the K components of a step, None for all."""
        few = self.backward_components
        if few is None or not (self.training and torch.is_grad_enabled()):
            return False
        return few < (self.component_log_weights().shape[-1] if K is None else K)

    @torch.no_grad()
    def _without_activations(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mu [n, D], logvar [n, D]) of these components, None for all, in pieces that a cache holds."""
        require_repeatable("backward_components calls the encoder twice for the same input", self.encoder)
        u = self._inputs(index)
        rows = self.chunk_size or (len(u) if torch.compiler.is_compiling() else rows_on(u.device))
        parts = [self._encode(part, None) for part in u.split(rows)]
        forget_casts()
        mu, logvar = (torch.cat(part) for part in zip(*parts, strict=True))
        return mu, logvar

    def _with_gradient_of_few(
        self,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_weights: Tensor | None = None,
        exclude: Tensor | None = None,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same mu and logvar, with the gradient of components that are chosen anew in each call.

        Args:
            z: [..., D], the points whose responsibilities choose.
            mu, logvar: as `_without_activations(index)` gave them; logvar may also be one for all, [], which the
                encoder does not give.
            log_weights, exclude: as of :func:`fastvae.mixture_log_prob`.
            index: int64 [K], which inputs these are the encodings of; None, all of them.
        """
        if not torch.is_grad_enabled():
            return mu, logvar
        assert self.backward_components is not None
        sums = responsibility_sums(z, mu, logvar, log_weights, exclude, **self.backend_options)  # [K]
        with rows_of_batch(None):  # the choice is not one of a row
            kept, weight = (t.squeeze(1) for t in resampled(sums[:, None], self.backward_components))
        scale = torch.where(weight > 0, weight / sums[kept], 0.0)  # a weight of 0 fills the number
        few = self._encoded(kept if index is None else index[kept])
        if torch.compiler.is_compiling():
            # The compiled backward pass makes anew, with other random numbers, what no output of the forward pass
            # depends on.  So the means must seem to depend on the components kept.
            mu = torch.where(kept[0] >= 0, mu, math.nan)
        scale = scale[:, None]
        mu = _OfFew.apply(mu, few[0], kept, scale)
        return mu, logvar if logvar.ndim == 0 else _OfFew.apply(logvar, few[1], kept, scale)

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        return (*self._encoded(), self.component_log_weights())

    def density(self, index: Tensor | None = None, near: Tensor | None = None, y: Tensor | None = None) -> Density:
        if not self._takes_few():
            return super().density(index, near, y)
        if self.conditional:
            raise ValueError("backward_components is not for a conditional prior")
        self._check_given(y)
        encoded, log_weights = self._without_activations(), self.component_log_weights()

        def log_prob(z: Tensor) -> Tensor:
            mu, logvar = self._with_gradient_of_few(z, *encoded, log_weights)
            return F.mixture_log_prob(z, mu, logvar, log_weights, **self.backend_options)

        return log_prob

    def kl(
        self,
        mu: Tensor,
        logvar: Tensor,
        num_samples: int | None = None,
        *,
        index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self._takes_few():
            return super().kl(mu, logvar, num_samples, index=index, y=y)
        return Prior.kl(self, mu, logvar, num_samples, index=index, y=y)

    def step_components(self, near: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return (*self._refreshed(None, near), self.component_log_weights())

    def component_parameters(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self._encoded(index)


class _OfFew(torch.autograd.Function):
    """Passes `of_all` [K, D] on; what arrives for the rows `kept` [n] goes on to `few` [n, D], times `scale` [n, 1]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(of_all: Tensor, few: Tensor, kept: Tensor, scale: Tensor) -> Tensor:
        return of_all.view_as(of_all)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        kept, scale = ctx.saved_tensors
        return None, (grad[kept] * scale).to(grad.dtype), None, None  # scales are too large for float16


def _nearest(points: Tensor, mu: Tensor, count: int, index: Tensor | None) -> Tensor:
    """Which of the means mu [K, D] are nearest to each of the points [B, D], but for its own: int64 [B, count].

    By the expansion of the squared distance: what it cancels matters to a density, but not to a choice.
    """
    best, which = points.new_empty(len(points), 0), mu.new_empty((len(points), 0), dtype=torch.int64)
    size = max(count, 2**22 // max(1, len(points)))  # so that the table stays small whatever K is
    for start, part in zip(range(0, len(mu), size), mu.split(size), strict=True):
        distance = torch.addmm(part.square().sum(1), points, part.T, alpha=-2)  # [B, size], less |point|^2
        if index is not None:
            own = torch.arange(start, start + len(part), device=mu.device) == index[:, None]
            distance = distance.masked_fill(own, math.inf)
        found = distance.topk(min(count, len(part)), 1, largest=False)
        best, which = torch.cat([best, found.values], 1), torch.cat([which, found.indices + start], 1)
    return which.gather(1, best.topk(count, 1, largest=False).indices)


class VampPrior(EncodedMixture):
    """p(z) = sum_k w_k q(z | u_k): the posterior of K learned pseudo-inputs (Tomczak and Welling 2018).

    Args:
        encoder: x -> (mu, logvar), the very module that the VAE encodes with.  The prior shares it but doesn't own
            it: `parameters()` and `state_dict()` of the prior hold the pseudo-inputs (and weights) alone, so that
            the VAE's hold the encoder once.
        pseudo_inputs: [K, *input_shape], the tensor to start from: data, or noise.
        value_range: (low, high), what the pseudo-inputs are clamped to wherever they are used: the range of the data.
            What is clamped gets no gradient, so a warning says what share of `pseudo_inputs` starts outside.
        learn_weights: make the weights w_k parameters too.
        probs: [K], the weights to start from, as of :class:`fastvae.MixturePrior`; None means 1 / K each.  [L, K] are
            weights for each label, which makes the prior conditional.
        labels: int64 [K], the label of each pseudo-input, for an encoder that takes (x, y): component k is then
            q(z | u_k, labels[k]).  The prior is conditional: p(z | y) is the mixture of the components with the label
            y, or, where `probs` is [L, K], that of all components with the label's weights.
        chunk_size: encode this many pseudo-inputs at a time and recompute their activations in backward, so that
            memory does not grow with K; None encodes all at once.
        refresh, neighbours: the share of the components that a step of training encodes anew, and how many of those
            nearest to each row, see :class:`EncodedMixture`.
        backward_components: how many components' encodings get a gradient in a step of training, chosen at random by
            their responsibilities, so that its mean is that of all; None means all.  See :class:`EncodedMixture`.  Not
            for a conditional prior, and not together with `refresh`.
        backend: impl, precision, dense_backward, see :class:`fastvae.Prior`.

    Source: Tomczak and Welling, VAE with a VampPrior (AISTATS 2018).
    """

    logits: Tensor
    labels: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        pseudo_inputs: Tensor,
        *,
        value_range: tuple[float, float] = (0.0, 1.0),
        learn_weights: bool = False,
        probs: Tensor | None = None,
        labels: Tensor | None = None,
        chunk_size: int | None = None,
        refresh: float = 1.0,
        neighbours: int = 0,
        backward_components: int | None = None,
        **backend: Unpack[BackendOptions],
    ) -> None:
        super().__init__(encoder, chunk_size, refresh, neighbours, backward_components, **backend)
        require_tensor("pseudo_inputs", pseudo_inputs)
        if pseudo_inputs.ndim < 2 or 0 in pseudo_inputs.shape or not pseudo_inputs.is_floating_point():
            raise ValueError(
                "pseudo_inputs must be floating [K, *input_shape] with K >= 1, "
                f"not {pseudo_inputs.dtype} {list(pseudo_inputs.shape)}"
            )
        if not value_range[0] < value_range[1]:
            raise ValueError(f"value_range must be (low, high) with low < high, not {value_range}")
        _warn_of_clamping(pseudo_inputs.detach(), value_range)
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())
        self.logits = weight_logits(pseudo_inputs, probs, learn_weights)
        self.register_buffer("labels", checked_labels(labels, self.logits))
        self.conditional = labels is not None or self.logits.ndim == 2
        if self.conditional and backward_components is not None:
            raise ValueError("backward_components is not for a conditional prior: leave out labels and probs [L, K]")
        self.value_range = value_range

    def inputs(self) -> Tensor:
        """The pseudo-inputs as the encoder sees them, in their range: [K, *input_shape]."""
        return self.pseudo_inputs.clamp(*self.value_range)

    def component_log_weights(self) -> Tensor:
        return torch.log_softmax(self.logits, -1)

    def component_labels(self) -> Tensor | None:
        return self.labels

    def _inputs(self, index: Tensor | None) -> Tensor:
        return self.pseudo_inputs if index is None else self.pseudo_inputs[index]

    def _encode(self, u: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return super()._encode(u.clamp(*self.value_range), y)


def _warn_of_clamping(pseudo_inputs: Tensor, value_range: tuple[float, float]) -> None:
    low, high = value_range
    if not is_readable(pseudo_inputs):
        return
    outside = int(((pseudo_inputs < low) | (pseudo_inputs > high)).count_nonzero())
    if outside:
        lowest, highest = torch.stack(pseudo_inputs.aminmax()).tolist()
        warnings.warn(
            f"value_range is ({low}, {high}), but {outside / pseudo_inputs.numel():.2%} of the values in pseudo_inputs "
            f"lie outside (they span {lowest:.4g} ... {highest:.4g}): these are clamped and get no gradient. "
            "Give value_range the range of the data",
            stacklevel=3,
        )
