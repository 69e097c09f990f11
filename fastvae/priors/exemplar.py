"""The prior whose components are the encoder's posteriors of a whole data set."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastvae import functional as F
from fastvae.contracts import require_index, require_tensor
from fastvae.priors.base import Density, Prior
from fastvae.priors.encoded import EncodedMixture

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastvae.backends import BackendOptions


class ExemplarPrior(EncodedMixture):
    """p(z) = 1/N sum_n q(z | x_n) over a whole data set, or with one learned variance for all: N(z; mu(x_n), s^2 I).

    In training a point must not be its own exemplar, or the encoder may shrink q(z | x_n) to nothing at no cost.  So
    say which points a batch holds, `vae(x, index=index)`: each is left out for its own rows, and the others weigh
    1 / (N - 1).  Without `index`, as in evaluation, all N count; a step of training without it warns, once.

    Args:
        encoder: x -> (mu, logvar), the very module that the VAE encodes with; shared, see :class:`EncodedMixture`.
        data: [N, *input_shape], N >= 2.  Not copied, and not part of `state_dict()`.
        shared_variance: one learned variance s^2 for all components and dimensions, in place of the encoder's.
        subset: in each step of training take so many of the points at random, in place of all N.  The log of a
            subset's mixture is lower in expectation than that of the whole, so that the bound stays a bound.
        refresh, neighbours: the share of the exemplars that a step of training encodes anew, and how many of those
            nearest to each row, see :class:`EncodedMixture`.  Not together with `subset`.
        backward_components: how many exemplars' encodings get a gradient in a step of training, as in
            :class:`VampPrior`; with `subset`, of the exemplars that it takes.  Not together with `refresh`.
        chunk_size: encode this many at a time, as in :class:`VampPrior`.
        backend: impl, precision, dense_backward, see :class:`fastvae.Prior`.

    Source: Norouzi, Fleet and Norouzi, Exemplar VAE: linking generative models, nearest neighbor retrieval, and data
    augmentation (NeurIPS 2020).
    """

    data: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        data: Tensor,
        *,
        shared_variance: bool = False,
        subset: int | None = None,
        refresh: float = 1.0,
        neighbours: int = 0,
        backward_components: int | None = None,
        chunk_size: int | None = None,
        **backend: Unpack[BackendOptions],
    ) -> None:
        super().__init__(encoder, chunk_size, refresh, neighbours, backward_components, **backend)
        require_tensor("data", data)
        if data.ndim < 2 or 0 in data.shape[1:] or len(data) < 2 or not data.is_floating_point():
            raise ValueError(
                f"data must be floating [N, *input_shape] with N >= 2, not {data.dtype} {list(data.shape)}"
            )
        if subset is not None and not 2 <= subset <= len(data):
            raise ValueError(f"subset must be 2 ... {len(data)}, the points in data, or None, not {subset}")
        if subset is not None and refresh < 1:
            raise ValueError("subset and refresh are two ways to save work in a step; give one of them")
        self.register_buffer("data", data.detach(), persistent=False)
        self.logvar = nn.Parameter(data.new_zeros(())) if shared_variance else None
        self.subset = subset
        self._warned = False

    def component_log_weights(self) -> Tensor:
        return self.data.new_full((len(self.data),), -math.log(len(self.data)))

    def density(self, index: Tensor | None = None, near: Tensor | None = None, y: Tensor | None = None) -> Density:
        self._check_given(y)
        mu, logvar, own, chosen = self._step(index, near)
        K = len(mu)
        few = self._takes_few(K)
        if self.logvar is not None:
            logvar = self.logvar  # one for all, which the kernels need not read K times, and never an old one
        # The others' weights become 1 / (K - 1), but for the rows whose own point is not among the components.
        more = None if own is None else (own >= 0).to(mu.dtype) * math.log(K / (K - 1))  # [B]

        def log_prob(z: Tensor) -> Tensor:
            if own is not None and z.shape[-2:-1] != own.shape:
                raise ValueError(f"index must be [B] to match z [..., B, D] {list(z.shape)}, not {list(own.shape)}")
            exclude = None if own is None else own.expand(z.shape[:-1])
            components = mu, logvar
            if few:
                components = self._with_gradient_of_few(z, mu, logvar, exclude=exclude, index=chosen)
            of_all = F.mixture_log_prob(z, *components, exclude=exclude, **self.backend_options)
            return of_all if more is None else of_all + more

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
        return Prior.kl(self, mu, logvar, num_samples, index=index, y=y)  # Mixture's does not know `index`

    def _step(self, index: Tensor | None, near: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The components of a step, mu [K, D] and logvar [K, D]; which of them each row is, int64 [B], or -1; and which
        of the points they are, int64 [K], None for all.
        """
        N = len(self.data)
        self._warn_without(index)
        if index is not None:
            require_index(index, N, others=True)
        if self.subset is None or not self.training:
            encoded = self._without_activations() if self._takes_few(N) else self._refreshed(index, near)
            return (*encoded, index, None)
        chosen = torch.randperm(N, device=self.data.device)[: self.subset]
        encoded = self._without_activations(chosen) if self._takes_few(self.subset) else self._encoded(chosen)
        if index is None:
            return (*encoded, None, chosen)
        place = chosen.new_full((N + 1,), -1)  # the last is for an index of -1
        place[chosen] = torch.arange(self.subset, device=chosen.device)
        return (*encoded, place[index], chosen)

    def _warn_without(self, index: Tensor | None) -> None:
        if index is not None or self._warned or not (self.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling():
            return
        self._warned = True
        warnings.warn(
            "ExemplarPrior in training without `index`: each x may be its own exemplar, so the encoder may shrink "
            "q(z | x) to nothing at no cost. Give the rows of `data` that x holds, vae(x, index=rows), with -1 for "
            "what is not in `data`; evaluate in eval() mode or under torch.no_grad()",
            stacklevel=2,
        )

    def _inputs(self, index: Tensor | None) -> Tensor:
        return self.data if index is None else self.data[index]

    def _encode(self, u: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        mu, logvar = super()._encode(u, y)
        return mu, logvar if self.logvar is None else self.logvar.expand(mu.shape)
