"""The exemplar prior of a data set that is sharded over ranks, each of which encodes its share."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastvae import functional as F
from fastvae.contracts import require_tensor
from fastvae.distributed.functional import mixture_log_prob
from fastvae.distributed.link import Told, agree, link_to
from fastvae.priors.base import Density, Prior
from fastvae.priors.encoded import EncodedMixture

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from fastvae.backends import BackendOptions


class ShardedExemplarPrior(EncodedMixture):
    """:class:`fastvae.ExemplarPrior` of a data set that is sharded over ranks, for data parallel training.

    Each rank has its own batch and its own share of the exemplars.  In a step it encodes its share, and computes what
    its exemplars add to the density of all ranks' batches.  All methods that compute with the exemplars must be called
    by all ranks together, equally often.

    A data set of N points is numbered over the ranks: rank 0 has the first ones.  `vae(x, index=index)` takes these
    numbers, and leaves each point out for its own rows.

    Under DistributedDataParallel the gradients are those of the mean of the ranks' losses, as usual; those that reach
    the encoder by way of the exemplars are part of them.

    Args:
        encoder: x -> (mu, logvar), the very module that the VAE encodes with.
        data: [N_r, *input_shape], the rank's share, which may be empty; not copied, and not part of `state_dict()`.
        group: the process group; None is the default one.  DistributedDataParallel communicates in the same backward
            pass: a group of the prior's own, by `torch.distributed.new_group()`, keeps the two apart.
        shared_variance, chunk_size: as of :class:`fastvae.ExemplarPrior`.
        backend: impl, precision, dense_backward, see :class:`fastvae.Prior`.

    Raises:
        TypeError, ValueError: on all ranks, if data is not such a tensor on one, or N < 2.
    """

    def __init__(
        self,
        encoder: nn.Module,
        data: Tensor,
        *,
        group: ProcessGroup | None = None,
        shared_variance: bool = False,
        chunk_size: int | None = None,
        **backend: Unpack[BackendOptions],
    ) -> None:
        super().__init__(encoder, chunk_size, 1.0, 0, **backend)
        self.group = group
        link = link_to("ShardedExemplarPrior", group)

        def check() -> tuple[str, Told, bool]:
            require_tensor("data", data)
            if data.ndim < 2 or 0 in data.shape[1:] or not data.is_floating_point():
                raise ValueError(f"data must be floating [N, *input_shape], not {data.dtype} {list(data.shape)}")
            words = f"ShardedExemplarPrior(data [N, {str(list(data.shape[1:]))[1:]}, shared_variance={shared_variance})"
            return words, Told(failed=0, K=len(data)), True

        shares = [rank.K for rank in agree(link, check)[0]]
        self.size, self._first = sum(shares), sum(shares[: link.rank])
        if self.size < 2:
            raise ValueError(f"data must hold N >= 2 points on all ranks together, not {self.size}")
        # No buffer: DistributedDataParallel would put the first rank's in the place of the others'.
        self.data = data.detach()
        self.logvar = nn.Parameter(data.new_zeros(())) if shared_variance else None

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedExemplarPrior:
        """As usual, for an average of models over time; but the copy has the same group, which cannot be copied."""
        copied = self.__class__.__new__(self.__class__)
        memo |= {id(self): copied, id(self.group): self.group}
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ShardedExemplarPrior:
        super()._apply(fn, recurse)
        self.data = fn(self.data)
        return self

    def _inputs(self, index: Tensor | None) -> Tensor:
        return self.data if index is None else self.data[index]

    def components(self) -> Any:
        """There is no rank that has all components."""
        raise NotImplementedError("a ShardedExemplarPrior has no components() of its own: no rank holds all of them")

    def density(self, index: Tensor | None = None, near: Tensor | None = None, y: Tensor | None = None) -> Density:
        self._check_given(y)
        mu, logvar = self._encoded()
        if self.logvar is not None:
            logvar = self.logvar

        def log_prob(z: Tensor) -> Tensor:
            of_all = partial(mixture_log_prob, group=self.group, rows="sharded", **self.backend_options)
            if index is None:
                return of_all(z, mu, logvar)
            # An index that is not [B] is passed on as it is, and refused on all ranks: an error here would leave the
            # other ranks waiting.
            fits = isinstance(index, Tensor) and index.shape == z.shape[-2:-1]
            exclude = index.expand(z.shape[:-1]) if fits else index
            log_prob = of_all(z, mu, logvar, exclude=exclude)
            # the weights of the others become 1 / (N - 1)
            return log_prob + (exclude >= 0).to(mu.dtype) * math.log(self.size / (self.size - 1))

        return log_prob

    def log_prob(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return self.density(y=y)(z)

    def kl(
        self,
        mu: Tensor,
        logvar: Tensor,
        num_samples: int | None = None,
        *,
        index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return Prior.kl(self, mu, logvar, num_samples, index=index, y=y)

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        return Prior.marginal_log_prob(self, z)

    def snapshot(self) -> Prior:
        return self

    @torch.no_grad()
    def sample(self, n: int, y: Tensor | None = None) -> Tensor:
        """n draws, [n, D], of each rank its own; ranks may ask for different n."""
        self._check_given(y)
        link = link_to("ShardedExemplarPrior.sample", self.group)

        def check() -> tuple[str, Told, bool]:
            if isinstance(n, bool) or not isinstance(n, int) or n < 0:
                raise ValueError(f"n must be an int, at least 0, not {n!r}")
            return "sample", Told(failed=0, M=n), True

        counts = [rank.M for rank in agree(link, check)[0]]
        wanted = link.all_rows(torch.randint(self.size, (n,), device=self.data.device), counts) - self._first
        here = (wanted >= 0) & (wanted < len(self.data))
        encoded = self._encoded(wanted[here])
        found = torch.stack(encoded).new_zeros(2, len(wanted), encoded[0].shape[-1])
        found[:, here] = torch.stack(encoded)
        mu, logvar = (link.own_rows(part, counts) for part in link.all_reduce(found))
        if self.logvar is not None:
            logvar = self.logvar.expand_as(mu)
        z, _ = F.gaussian_rsample(mu, logvar, impl=self.backend_options["impl"])
        return z
