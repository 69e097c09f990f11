"""Likelihoods p(x | z): what a decoder's output means."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal
from torch.nn.functional import logsigmoid

from fastvae.contracts import describe, is_readable

LEVELS = 256
_READ_AT_NO_COST = ("cpu",)  # devices whose values can be read without waiting for them


@runtime_checkable
class Likelihood(Protocol):
    """p(x | z), as a VAE asks for it.  Subclass it, or give the VAE any object with these three methods.

    The decoder is called with z [N, D], N = S B: S samples for each of B points x.  Its output is a tensor
    [N, ...], or a tuple, list or dictionary of such.  `log_prob` gets that output with N taken apart, [S, B, ...], in
    float32 at least; `mean` and `sample` get it as it is, [N, ...].  A likelihood with parameters of its own also
    subclasses `torch.nn.Module`; they then train with the VAE.

    Example::

        class PoissonLikelihood(fastvae.Likelihood):
            def log_prob(self, output, x):  # the decoder returns log rates
                return torch.distributions.Poisson(output.exp()).log_prob(x)

            def mean(self, output):
                return output.exp()

            def sample(self, output):
                return torch.poisson(output.exp())

        vae = fastvae.VAE(encoder, decoder, prior, likelihood=PoissonLikelihood())
    """

    @abstractmethod
    def log_prob(self, output: Any, x: Tensor) -> Tensor:
        """log p(x | z) of each element of x, in nats; the VAE adds up the elements of each point.

        Args:
            output: the decoder's output, [S, B, ...].
            x: [B, *x_shape].

        Returns:
            [S, B, *x_shape].  The VAE refuses any other shape: where output and x only broadcast, an x is scored
            against the outputs for other x too.
        """
        ...

    @abstractmethod
    def mean(self, output: Any) -> Tensor:
        """E[x | z], [N, *x_shape], for the decoder's output [N, ...]."""
        ...

    @abstractmethod
    def sample(self, output: Any) -> Tensor:
        """A draw of x, [N, *x_shape], for the decoder's output [N, ...]."""
        ...


class _OnUnitInterval(Likelihood):
    """A likelihood of x in [0, 1]."""

    _range_was_right = False

    def _check_range(self, x: Tensor) -> None:
        """ValueError where x leaves [0, 1].

        On the CPU every x is looked at.  On another device, where a look waits for all the work that is queued, only
        the first is.  A compiled or transformed model (torch.compile, torch.func) does not look.
        """
        elsewhere = x.device.type not in _READ_AT_NO_COST
        if (elsewhere and self._range_was_right) or not is_readable(x) or not x.numel():
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        low, high = (float(v) for v in x.detach().aminmax())
        if low < 0 or high > 1:
            raise ValueError(
                f"x must be in [0, 1] for {type(self).__name__}, but it spans {low:.4g} ... {high:.4g}: "
                "scale it (x / 255 for 8-bit images), or use likelihood='gaussian'"
            )
        self._range_was_right = True


class BernoulliLikelihood(_OnUnitInterval):
    """Binary x, or grey levels in [0, 1] as probabilities; the decoder returns logits [N, *x_shape].

    Raises:
        ValueError: the logits are not of x's shape, or x leaves [0, 1], where log p(x | z) has no upper bound.  On the
            CPU every x is checked, on other devices the first one, in a compiled model none.
    """

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        (logits,) = _parts(output, "logits")
        _check_event_shape(x, logits=logits)
        self._check_range(x)
        return Bernoulli(logits=logits, validate_args=False).log_prob(x)

    def mean(self, output: Tensor) -> Tensor:
        return torch.sigmoid(output)

    def sample(self, output: Tensor) -> Tensor:
        return Bernoulli(logits=output, validate_args=False).sample()


class GaussianLikelihood(Likelihood):
    """Real x; the decoder returns (mean, logvar), both [N, *x_shape], or the mean alone for a variance of 1.

    Raises:
        ValueError: mean or logvar is not of x's shape; one variance for all elements is `logvar.expand_as(mean)`.
    """

    def log_prob(self, output: Tensor | tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        return self._normal(output, x).log_prob(x)

    def mean(self, output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return self._normal(output).mean

    def sample(self, output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return self._normal(output).sample()

    def _normal(self, output: Tensor | tuple[Tensor, Tensor], x: Tensor | None = None) -> Normal:
        if isinstance(output, Tensor):
            output = (output, torch.zeros_like(output))
        mean, logvar = _parts(output, "mean", "logvar")
        if x is not None:
            _check_event_shape(x, mean=mean, logvar=logvar)
        return Normal(mean, torch.exp(0.5 * logvar), validate_args=False)


class DiscretizedLogisticLikelihood(_OnUnitInterval):
    """x on 256 grey levels in [0, 1]; the decoder returns (mean, logscale), both [N, *x_shape], of a logistic.

    Level i holds the x in [i / 256, (i + 1) / 256), and 1 belongs to level 255.  The probability of a level is the
    logistic's mass on it; the first level has the whole lower tail too, and the last one the upper tail, so that the
    256 probabilities sum to one.  With a and b the ends of the level, less the mean, over the scale, and a = -inf
    for the first level, b = inf for the last:

        log(sigmoid(b) - sigmoid(a)) = log sigmoid(b) + log sigmoid(-a) + log(1 - exp(a - b))

    This is what the VampPrior's published code (jmtomczak/vae_vampprior) computes, but for two things.  That code
    leaves the tails out, so that its probabilities sum to less than one: to 0.95 for a mean of 0.5 and a logscale of
    -2.  And it adds 1e-7 to each probability, so that no element can cost more than 16.1 nats: a model that is sure of
    the wrong level is flattered.  Log-likelihoods of the two are therefore not comparable for such models.

    Raises:
        ValueError: mean or logscale is not of x's shape, or x leaves [0, 1]; see :class:`BernoulliLikelihood`.

    Source: Kingma et al., Improved variational inference with inverse autoregressive flow (NIPS 2016).
    """

    def log_prob(self, output: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
        mean, logscale = _parts(output, "mean", "logscale")
        _check_event_shape(x, mean=mean, logscale=logscale)
        self._check_range(x)
        level = torch.floor(x * LEVELS).clamp(0, LEVELS - 1)
        first, last = level == 0, level == LEVELS - 1
        a = (level / LEVELS - mean) * torch.exp(-logscale)
        width = torch.exp(-logscale) / LEVELS  # b - a
        below_b = logsigmoid(a + width).masked_fill(last, 0.0)
        above_a = logsigmoid(-a).masked_fill(first, 0.0)
        return below_b + above_a + torch.log(-torch.expm1(-width)).masked_fill(first | last, 0.0)

    def mean(self, output: tuple[Tensor, Tensor]) -> Tensor:
        """E[x | z], where each level stands at its middle: (1/2 + sum_i P(level >= i)) / 256 over i = 1 ... 255."""
        mean, logscale = _parts(output, "mean", "logscale")
        inverse = torch.exp(-logscale)
        level = torch.zeros_like(mean)
        for i in range(1, LEVELS):
            level = level + torch.sigmoid((mean - i / LEVELS) * inverse)
        return (level + 0.5) / LEVELS

    def sample(self, output: tuple[Tensor, Tensor]) -> Tensor:
        """A draw on the 256 levels, at the middle of each; what falls outside [0, 1] is on the first or last one."""
        mean, logscale = _parts(output, "mean", "logscale")
        # The logarithm of a ratio of two exponential numbers is logistic, and exact in both tails.
        ratio = torch.empty_like(mean).exponential_().log() - torch.empty_like(mean).exponential_().log()
        x = mean + torch.exp(logscale) * ratio
        return (torch.floor(x * LEVELS).clamp(0, LEVELS - 1) + 0.5) / LEVELS


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": BernoulliLikelihood,
    "gaussian": GaussianLikelihood,
    "discretized_logistic": DiscretizedLogisticLikelihood,
}


def _parts(output: Any, *names: str) -> tuple[Tensor, ...]:
    """A decoder's output as so many tensors."""
    parts = tuple(output) if isinstance(output, tuple | list) else (output,)
    if len(parts) != len(names) or not all(isinstance(part, Tensor) for part in parts):
        wanted = f"a tensor of {names[0]}" if len(names) == 1 else f"({', '.join(names)})"
        raise TypeError(f"the decoder must return {wanted}, not {describe(output)}")
    return parts


def _check_event_shape(x: Tensor, **parts: Tensor) -> None:
    """ValueError unless each part of a decoder's output is [..., *x.shape]: what only broadcasts scores other x too."""
    for name, part in parts.items():
        if part.shape[part.ndim - x.ndim :] != x.shape:
            wanted = ", ".join(map(str, ("N", *x.shape[1:])))
            raise ValueError(
                f"the decoder's output ({name}) is {list(part.shape)}, but must end in the shape of x, "
                f"{list(x.shape)}: for z [N, D] the decoder should return [{wanted}]"
            )
