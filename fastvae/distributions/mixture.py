"""A mixture of diagonal Gaussians as a distribution of PyTorch's."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal, constraints

from fastvae import _checks
from fastvae import functional as F
from fastvae.backends import choice
from fastvae.contracts import describe, is_readable
from fastvae.distributions import density
from fastvae.distributions.batches import Mixtures, mixtures, without_absent
from fastvae.distributions.draws import draw_components
from fastvae.distributions.pathwise import Samples
from fastvae.estimate import Estimate

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastvae.backends import BackendOptions


class MixtureOfDiagNormals(Distribution):
    """Mixtures of K diagonal Gaussians in D dimensions, a `torch.distributions.Distribution`.

    The arguments are those of Pyro's class of that name.  `log_prob` runs on the kernels of
    :func:`fastvae.mixture_log_prob`.  `rsample` has gradients in all three parameters, whatever K is: plain PyTorch in
    chunks, on every device, in memory that does not grow with the number of samples times K.

    The batch shapes of the parameters are broadcast.  Mixtures that share all parameters, by `expand` or because a
    batch shape is missing or 1, are evaluated as one mixture.  Mixtures that differ are evaluated by the kernels where
    they are large, one after the other, and by plain PyTorch where they are small, together.  Mixtures may differ in
    their weights alone, such as `component_logits` [M, K] beside `locs` [K, D]: no [M, K, D] numbers are held.

    The gradient of parameters that mixtures share by `expand` is the sum over these mixtures.  It arrives in the tensor
    that was expanded; the expanded tensor itself has all of it at the first mixture.  For the gradient of each mixture
    by itself, give a leaf, such as `locs.detach().expand(...).requires_grad_()`, or a `contiguous()` copy.

    Args:
        locs: [*batch_shape, K, D], the means.
        coord_scale: broadcastable to [*batch_shape, K, D], the standard deviations.  One dimension is [D], for all
            components alike, also where K = D; one for each component is [K, 1].
        component_logits: [*batch_shape, K], the logarithms of the weights up to a constant: they are normalised.  A
            logit of -inf is a component that is not there, and its gradient is 0.
        validate_args: whether the values of the parameters and of what `log_prob` and `cdf` are given are checked; None
            follows `torch.distributions.Distribution.set_default_validate_args`.  Shapes are always checked.
        backend: impl, precision, dense_backward, see :func:`fastvae.mixture_log_prob`.

    Raises:
        TypeError: a parameter is not a floating tensor.
        ValueError: shapes that do not fit, K = 0 or D = 0, mixed devices.  If values are checked: a NaN, a scale that
            is not above 0, a mixture whose largest logit is not finite.

    Example::

        q = MixtureOfDiagNormals(locs, coord_scale, component_logits)
        z = q.rsample((1000,))  # [1000, D]
        loss = (q.log_prob(z) - target_log_prob(z)).mean()  # differentiable in all three parameters
    """

    arg_constraints = {  # noqa: RUF012  as PyTorch's distributions have it
        "locs": constraints.real,
        "coord_scale": constraints.positive,
        "component_logits": constraints.real,
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        locs: Tensor,
        coord_scale: Tensor,
        component_logits: Tensor,
        validate_args: bool | None = None,
        **backend: Unpack[BackendOptions],
    ) -> None:
        self.backend_options = choice.checked(type(self).__name__, backend)
        _checks.result_dtype(locs=locs, coord_scale=coord_scale, component_logits=component_logits)
        if locs.ndim < 2 or 0 in locs.shape[-2:]:
            raise ValueError(f"locs must be [..., K, D] with K >= 1 and D >= 1, not {list(locs.shape)}")
        K, D = locs.shape[-2:]
        if component_logits.ndim == 0 or component_logits.shape[-1] != K:
            raise ValueError(
                f"component_logits must be [..., {K}] to match locs {list(locs.shape)}, "
                f"not {list(component_logits.shape)}"
            )
        if coord_scale.shape == (K,) and K not in (1, D):
            raise ValueError(
                f"coord_scale must be broadcastable to [..., {K}, {D}] to match locs, not [{K}]; one standard "
                f"deviation for each component is [{K}, 1], coord_scale[:, None]"
            )
        if not all(own in (1, full) for own, full in zip(reversed(coord_scale.shape), (D, K), strict=False)):
            raise ValueError(
                f"coord_scale must be broadcastable to [..., {K}, {D}] to match locs {list(locs.shape)}, "
                f"not {list(coord_scale.shape)}"
            )
        batches = locs.shape[:-2], coord_scale.shape[:-2], component_logits.shape[:-1]
        try:
            batch_shape = torch.broadcast_shapes(*batches)
        except RuntimeError:
            raise ValueError(
                f"the batch shapes of locs, coord_scale and component_logits must be broadcastable, not "
                f"{list(batches[0])}, {list(batches[1])} and {list(batches[2])}"
            ) from None
        locs, coord_scale, component_logits = (_own_gradients(p) for p in (locs, coord_scale, component_logits))
        scale = coord_scale.reshape((1,) * (2 - coord_scale.ndim) + coord_scale.shape)
        scale = scale.expand(*scale.shape[:-1], D)
        self._set_parameters((locs, scale, component_logits), batch_shape)
        super().__init__(batch_shape, torch.Size((D,)), validate_args=validate_args)
        if self._validate_args and is_readable(component_logits):
            largest = component_logits.detach().amax(-1)
            if not bool(largest.isfinite().all()):
                raise ValueError(
                    "component_logits must have a finite one for each mixture, and none of +inf, but the largest are "
                    f"{largest}"
                )

    def _set_parameters(self, given: tuple[Tensor, Tensor, Tensor], batch_shape: Sequence[int]) -> None:
        """given: the parameters as `mixtures` takes them, which all computation is done with."""
        K, D = given[0].shape[-2:]
        self._given = given
        self.locs = given[0].expand(*batch_shape, K, D)
        self.coord_scale = given[1].expand(*batch_shape, K, D)
        self.component_logits = given[2].expand(*batch_shape, K)

    @classmethod
    def of(cls, distribution: MixtureSameFamily, **backend: Unpack[BackendOptions]) -> MixtureOfDiagNormals:
        """What stands in for a MixtureSameFamily(Categorical, Independent(Normal, 1)): the same densities, faster.

        Args:
            distribution: the mixture; gradients reach its parameters.
            backend: impl, precision, dense_backward, see :func:`fastvae.mixture_log_prob`.

        Raises:
            TypeError: it is another distribution, or a mixture of others.
        """
        wanted = "distribution must be a MixtureSameFamily(Categorical, Independent(Normal, 1))"
        if not isinstance(distribution, MixtureSameFamily):
            raise TypeError(f"{wanted}, not {describe(distribution)}")
        weights, components = distribution.mixture_distribution, distribution.component_distribution
        if (
            not isinstance(components, Independent)
            or components.reinterpreted_batch_ndims != 1
            or not isinstance(components.base_dist, Normal)
            or components.base_dist.batch_shape == ()
        ):
            raise TypeError(
                f"{wanted}; the components of this one are {components}, and those wanted are "
                "Independent(Normal(loc, scale), 1) with loc and scale [..., K, D]"
            )
        normal = components.base_dist
        return cls(normal.loc, normal.scale, weights.logits, validate_args=distribution._validate_args, **backend)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> MixtureOfDiagNormals:
        new = self._get_checked_instance(MixtureOfDiagNormals, _instance)
        batch_shape = torch.Size(batch_shape)
        new._set_parameters(self._given, batch_shape)
        new.backend_options = self.backend_options
        super(MixtureOfDiagNormals, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def log_weights(self) -> Tensor:
        """The logarithms of the weights, which sum to one, [*batch_shape, K]."""
        return self.component_logits.log_softmax(-1)

    @property
    def mixture_distribution(self) -> Categorical:
        """Which component a sample is of, as MixtureSameFamily has it."""
        return Categorical(logits=self.component_logits, validate_args=False)

    @property
    def component_distribution(self) -> Independent:
        """The components, as MixtureSameFamily has them: batch shape [*batch_shape, K]."""
        return Independent(Normal(self.locs, self.coord_scale, validate_args=False), 1)

    @property
    def mean(self) -> Tensor:
        """[*batch_shape, D]."""
        of = self._mixtures()
        return self._moment(density.mean(of), of)

    @property
    def variance(self) -> Tensor:
        """Of each dimension, [*batch_shape, D]."""
        of = self._mixtures()
        return self._moment(density.variance(of), of)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), [...], for points [..., D] whose shape broadcasts with [*batch_shape, D].

        float64 if an argument is, else float32.
        """
        points, of, sample_shape = self._points(value)
        return of.unsorted(density.log_prob(points, of, self.backend_options), sample_shape)

    def cdf(self, value: Tensor) -> Tensor:
        """P(Z_1 <= value_1, ..., Z_D <= value_D), [...], for points as of :meth:`log_prob`.

        That of dimension d alone is `marginal(d).cdf(value[..., [d]])`.  Plain PyTorch in chunks, differentiable.
        """
        points, of, sample_shape = self._points(value)
        return of.unsorted(density.cdf(points, of), sample_shape)

    def marginal(self, dims: int | Sequence[int]) -> MixtureOfDiagNormals:
        """The distribution of some dimensions by themselves, in the order given; event shape [len(dims)], [1] for one.

        Raises:
            TypeError: a dimension is not an integer.
            ValueError: there is no such dimension, or none is given.
        """
        D = self.event_shape[0]
        try:
            dims = [operator.index(d) for d in (dims if isinstance(dims, Iterable) else [dims])]
        except TypeError:
            raise TypeError(f"dims must be an integer or integers, not {dims!r}") from None
        if not dims or not all(-D <= d < D for d in dims):
            raise ValueError(f"dims must be of 0 ... {D - 1} for D = {D}, and one at least, not {dims}")
        locs, scale, logits = self._given
        own = locs[..., dims], scale[..., dims], logits
        marginal = MixtureOfDiagNormals(*own, validate_args=False, **self.backend_options).expand(self.batch_shape)
        marginal._validate_args = self._validate_args
        return marginal

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples [*sample_shape, *batch_shape, D], whose gradients go to all three parameters, at any K.

        The gradient of a mean of f(z) is unbiased.  In `locs` and `coord_scale` a sample moves with each component by
        the component's responsibility for it.  In `component_logits` the gradient is implicit, by the conditional
        distribution functions of one dimension after the other.  The farther apart the components are, the fewer
        samples carry it, and the larger is its variance.  The gradients cannot be differentiated again.

        Sources: Jankowiak and Karaletsos, Pathwise derivatives for multivariate distributions (AISTATS 2019); Figurnov,
        Mohamed and Mnih, Implicit reparameterization gradients (NeurIPS 2018).
        """
        of = self._mixtures()
        sample_shape = tuple(sample_shape)
        z = _drawn(of, of.rows(sample_shape), self.backend_options["impl"])
        if torch.is_grad_enabled() and any(p.requires_grad for p in of.parameters):
            z = Samples.apply(z, *without_absent(*of.parameters))
        return of.unsorted(z, sample_shape).to(self._dtype)

    def entropy_estimate(self, num_samples: int = 10_000) -> Estimate:
        """The entropy -E[log p(z)], which has no closed form, by that many samples, [*batch_shape]; nats.

        Its value can be differentiated, its standard error not.

        Raises:
            TypeError, ValueError: num_samples is not an integer, or below 2.
        """
        num_samples = _checks.positive("num_samples", num_samples)
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, for a standard error, not {num_samples}")
        values = -self.log_prob(self.rsample((num_samples,))).double()
        return Estimate(values.mean(0), values.detach().std(0) / math.sqrt(num_samples))

    def entropy(self) -> Tensor:
        raise NotImplementedError("the entropy of a mixture has no closed form; entropy_estimate() estimates it")

    @property
    def _dtype(self) -> torch.dtype:
        return _checks.result_dtype(
            locs=self.locs, coord_scale=self.coord_scale, component_logits=self.component_logits
        )

    def _mixtures(self, dtype: torch.dtype | None = None, batch_shape: tuple[int, ...] | None = None) -> Mixtures:
        """In `dtype`, or in that of the parameters, but in float32 at least; with a larger batch shape if given."""
        dtype = _checks.compute_dtype(dtype or self._dtype)
        batch_shape = self.batch_shape if batch_shape is None else batch_shape
        return mixtures(*self._given, batch_shape, dtype)

    def _points(self, value: Tensor) -> tuple[Tensor, Mixtures, tuple[int, ...]]:
        """(value [B, R, D], the mixtures, sample_shape) of points [..., D]."""
        dtype = _checks.result_dtype(value=value, locs=self.locs, coord_scale=self.coord_scale)
        if self._validate_args and value.numel():  # PyTorch's check takes no empty batch
            self._validate_sample(value)
        D = self.event_shape[0]
        try:
            lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        except RuntimeError:
            lead = None
        if lead is None or value.ndim == 0 or value.shape[-1] != D:  # a size of 1 must not pass for D
            raise ValueError(
                f"value must be [..., {D}], broadcastable with {[*self.batch_shape, D]}, not {list(value.shape)}"
            )
        n = len(lead) - len(self.batch_shape)
        of = self._mixtures(torch.promote_types(dtype, self._dtype), lead[n:])
        return of.sorted(value.expand(*lead, D)).to(of.locs.dtype), of, lead[:n]

    def _moment(self, moment: Tensor, of: Mixtures) -> Tensor:
        """[B, 1, D] as [*batch_shape, D]."""
        everywhere = moment.expand(of.number, of.rows(()), -1)
        return of.unsorted(everywhere, ()).to(self._dtype)


def _own_gradients(parameter: Tensor) -> Tensor:
    """A copy of an expanded leaf, in which a gradient is asked for at each place; others as they are.

    What is expanded counts as shared, and what is shared gets its whole gradient at the first of its places.
    """
    leaf = parameter.requires_grad and parameter.is_leaf
    return parameter.contiguous() if leaf and 0 in parameter.stride() else parameter


@torch.no_grad()
def _drawn(of: Mixtures, R: int, impl: str | None) -> Tensor:
    """R samples of each mixture, [B, R, D]: a component by its weight, then that component alone."""
    B = of.number
    own_weights = len(of.log_weights) == B
    index = draw_components(of.log_weights, R if own_weights else B * R).reshape(B, R)
    mixture = torch.arange(B, device=index.device)[:, None]

    def of_drawn(parameter: Tensor) -> Tensor:
        b = mixture if len(parameter) == B else torch.zeros_like(mixture)
        return parameter[b, index if parameter.shape[1] > 1 else torch.zeros_like(index)]

    z, _ = F.gaussian_rsample(of_drawn(of.locs), 2 * of_drawn(of.scale).log(), impl=impl)
    return z
