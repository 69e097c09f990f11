"""A variational autoencoder: encoder, decoder, prior and likelihood -> bounds, log-likelihood, samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import repeat
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastvae import _checks, bounds
from fastvae._few import require_repeatable, rows_on, samples_on
from fastvae.backends import BackendOptions, choice
from fastvae.contracts import encode, evaluate, require_methods, require_shape, require_tensor
from fastvae.likelihoods import LIKELIHOODS, Likelihood
from fastvae.priors import Density, Prior

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class VAEOutput:
    """What one pass gives, nats; the means over the S samples of each x.  A pytree, for torch.func and torch.export.

    Attributes:
        loss: scalar, for backward: the ELBO's is -mean(reconstruction - beta kl).
        bound: [B], the bound that was asked for, whatever beta the loss has; for "iwae" a constant to autograd.
        reconstruction: [B], E_q[log p(x | z)]; for "iwae" a constant.
        kl: [B], KL(q(z | x) || p(z)), or its estimate; for "iwae" a constant.
        z: [S, B, D], differentiable as any reparameterised sample, whatever the loss's estimator is.
        mu, logvar: [B, D], the posterior; differentiable.
        log_weights: [S, B], log p(x, z) / q(z | x), no gradient; None where the KL came in closed form.
    """

    loss: Tensor
    bound: Tensor
    reconstruction: Tensor
    kl: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor
    log_weights: Tensor | None

    @property
    def elbo(self) -> Tensor:
        """[B], the evidence lower bound, whatever beta the loss has."""
        return self.reconstruction - self.kl

    @property
    def effective_sample_size(self) -> Tensor | None:
        """[B], how many of the S samples their weights are worth; None where the KL came in closed form."""
        return None if self.log_weights is None else bounds.effective_sample_size(self.log_weights)


torch.export.register_dataclass(VAEOutput, serialized_type_name="fastvae.VAEOutput")


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def _with_own_backend(
    method: Callable[Concatenate[VAE, Parameters], Result],
) -> Callable[Concatenate[VAE, Parameters], Result]:
    """The method of a VAE, with the backend that the VAE was given for all operations inside."""

    @wraps(method)
    def wrapper(self: VAE, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with choice.with_options(self.backend_options):
            return method(self, *args, **kwargs)

    return wrapper


class VAE(nn.Module):
    """A variational autoencoder made of the modules you give it.

    Args:
        encoder: x [B, *x_shape] -> (mu [B, D], logvar [B, D]); of a conditional VAE (x, y [B, ...]).
        decoder: z [N, D] -> the likelihood's parameters: a tensor [N, *x_shape], or a pair of them; of a conditional
            VAE (z, y [N, ...]).
        prior: a :class:`fastvae.Prior`.  A VampPrior or ExemplarPrior must have been given this same encoder; it
            follows when `vae.encoder` is assigned.
        likelihood: "bernoulli" (x in [0, 1]; the decoder returns logits), "gaussian" ((mean, logvar), or a mean),
            "discretized_logistic" ((mean, logscale); x on 256 levels in [0, 1]), or a :class:`fastvae.Likelihood`.
        backend: impl, precision, dense_backward, as of :func:`fastvae.use_backend`, for all operations inside; a
            prior's own choice goes before them.

    A VAE is conditional, of p(x | y), where its methods are given y, labels or covariates.  Encoder and decoder are
    then called with y as their second argument, whether they use it or not.  A prior that is `conditional` is asked for
    p(z | y); any other prior means that z is independent of y.

    Raises:
        TypeError: prior or likelihood lacks a method; in use: the encoder does not return (mu, logvar), the decoder
            not what the likelihood takes.
        ValueError: there is no such likelihood, or the prior has another encoder; in use: a shape is not as above.
            Nothing is broadcast.

    Source: Kingma and Welling, Auto-encoding variational Bayes (ICLR 2014).
    """

    backend_options = choice.NO_OPTIONS

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        prior: Prior,
        likelihood: str | Likelihood = "bernoulli",
        **backend: Unpack[BackendOptions],
    ) -> None:
        super().__init__()
        self.backend_options = choice.checked(type(self).__name__, backend)
        require_methods("prior", prior, _PRIOR_METHODS, "a fastvae.Prior, such as StandardNormalPrior(latent_dim)")
        if isinstance(likelihood, str):
            if likelihood not in LIKELIHOODS:
                raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)} or an object, not {likelihood!r}")
            likelihood = LIKELIHOODS[likelihood]()
        require_methods("likelihood", likelihood, ("log_prob", "mean", "sample"), "a fastvae.Likelihood")
        self.encoder = encoder
        self.decoder = decoder
        self.prior = prior
        self.likelihood = likelihood

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "prior":
            _check_encoder(value, self.encoder)
        super().__setattr__(name, value)
        if name == "encoder" and hasattr(self, "prior") and hasattr(self.prior, "encoder"):
            self.prior.encoder = value

    @_with_own_backend
    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        beta: float = 1.0,
        num_samples: int = 1,
        kl: str = "auto",
        bound: str = "elbo",
        gradient: str | None = None,
        chunk_size: int | None = None,
        backward_samples: int | None = None,
        index: Tensor | None = None,
    ) -> VAEOutput:
        """One pass.

        Args:
            x: [B, *x_shape].
            y: [B, ...], what each x is conditioned on: labels, int64 [B], or covariates [B, C].  None for a VAE that is
                not conditional.
            beta: weight of the KL in the loss, for warm-up; the bound does not depend on it.
            num_samples: S draws of z for each x.
            kl: "analytic", E[log p(x|z)] - KL(q || p) in closed form; "sample", E[log p(x|z) + log p(z) - log q(z|x)];
                "auto", the former where the prior has it, else the latter.
            bound: "elbo", or "iwae", the importance weighted one, whose KL is always sampled.
            gradient: how the encoder's gradient is estimated: "plain", "stl" (sticking the landing) or, for iwae,
                "dreg" (doubly reparameterised); see :mod:`fastvae.bounds`.  All but "plain" sample the KL.  None is
                "plain" for the ELBO, "dreg" for iwae.
            chunk_size: draw so many of the S samples at a time and recompute their activations in backward, so that
                memory does not grow with S.
            backward_samples: for iwae: how many of the S samples of each x get a gradient, chosen at random by their
                weights, so that its mean is that of all S; None means all.
            index: int64 [B], which of the training points the x are; for an :class:`fastvae.ExemplarPrior`.

        Raises:
            ValueError: a name is none of these, or they do not go together, or kl is "analytic" for a prior that has
                no closed form; a shape is not the one that :class:`VAE` documents; backward_samples is for a decoder
                with dropout or batch normalisation in training mode, which gives a z another output the second time.
            TypeError: the encoder or the decoder returns something else than tensors.
        """
        if bound not in bounds.BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(map(repr, bounds.BOUNDS))}, not {bound!r}")
        if kl not in ("auto", "analytic", "sample"):
            raise ValueError(f"kl must be 'auto', 'analytic' or 'sample', not {kl!r}")
        if kl == "analytic" and not self.prior.has_closed_form_kl:
            raise ValueError(f"kl='analytic': {type(self.prior).__name__} has no closed form, use 'sample' or 'auto'")
        gradient = bounds.gradient_for(bound, gradient)
        if kl == "analytic" and (bound, gradient, chunk_size) != ("elbo", "plain", None):
            raise ValueError("kl='analytic' is for bound='elbo' with gradient='plain' and no chunk_size")
        mu, logvar = self._posterior(x, y)
        may_be_closed = bound == "elbo" and gradient == "plain" and chunk_size is None and backward_samples is None
        if may_be_closed and kl != "sample":
            z, log_likelihood, divergence = self._drawn_with_kl(x, y, mu, logvar, num_samples, index)
            drawn = bounds.Bound((log_likelihood - beta * divergence).mean(0), z, log_likelihood, divergence)
            in_closed_form = self._has_closed_form_kl()
        else:
            counts = num_samples, chunk_size, backward_samples
            drawn = self._drawn(bound, x, y, mu, logvar, gradient, beta, *counts, index)
            in_closed_form = False
        log_weights = (drawn.log_likelihood - drawn.kl).detach()  # of drawn; torch 2.10 traces no property
        reconstruction, divergence = drawn.log_likelihood.mean(0), drawn.kl.mean(0)  # [B]
        value = reconstruction - divergence if bound == "elbo" else bounds.log_mean_exp(log_weights)
        kept = None if in_closed_form else log_weights
        return self._output(-drawn.objective.mean(), value, reconstruction, divergence, drawn.z, mu, logvar, kept)

    @_with_own_backend
    def elbo(
        self,
        x: Tensor,
        num_samples: int = 1,
        kl: str = "auto",
        *,
        gradient: str | None = None,
        chunk_size: int | None = None,
        index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """The evidence lower bound of each x, [B], nats; arguments as in :meth:`forward`."""
        output: VAEOutput = self(
            x, y, num_samples=num_samples, kl=kl, gradient=gradient, chunk_size=chunk_size, index=index
        )
        return output.elbo

    @_with_own_backend
    def iwae(
        self,
        x: Tensor,
        num_samples: int,
        *,
        gradient: str | None = None,
        chunk_size: int | None = None,
        backward_samples: int | None = None,
        index: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """The importance weighted bound of each x, [B], nats; arguments as in :meth:`forward`.

        Its value is the bound, its gradient the estimator named.  Where none is wanted, `log_likelihood` gives the
        same bound in less memory.

        Source: Burda, Grosse and Salakhutdinov, Importance weighted autoencoders (ICLR 2016).
        """
        mu, logvar = self._posterior(x, y)
        counts = num_samples, chunk_size, backward_samples
        return self._drawn("iwae", x, y, mu, logvar, gradient, 1.0, *counts, index).objective

    @torch.no_grad()
    @_with_own_backend
    def log_likelihood(self, x: Tensor, num_samples: int = 5000, *, y: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x | y), by importance sampling from q(z | x), in memory bounded whatever B and S are.

        Args:
            x: [B, *x_shape].
            num_samples: S.
            y: as in :meth:`forward`.

        Returns:
            [B], nats: log 1/S sum_s p(x | z_s) p(z_s) / q(z_s | x), a lower bound in expectation that tightens with S.
            Where q(z | x) is far from p(z | x) it is much too low; see :func:`fastvae.annealing.log_likelihood`.

        Source: Burda, Grosse and Salakhutdinov, Importance weighted autoencoders (ICLR 2016).
        """
        _checks.count("num_samples", num_samples)
        self._check_y(y, x.shape[:1], "x")
        prior, rows = self.prior.snapshot(), rows_on(x.device) // 10
        parts = zip(x.split(rows), repeat(None) if y is None else y.split(rows), strict=False)
        return torch.cat([self._importance(*part, num_samples, prior) for part in parts])

    def _importance(self, x: Tensor, y: Tensor | None, num_samples: int, prior: Prior) -> Tensor:
        mu, logvar = self._posterior(x, y)
        of_prior = prior.density(y=y) if y is not None and is_conditional(prior) else prior.log_prob
        log_likelihood, log_prior = self._densities(x, y, mu, of_prior)
        draw = self._sampler(x)
        step = samples_on(x.device, len(x))
        parts = []
        for start in range(0, num_samples, step):
            z, log_q = draw(mu, logvar, min(step, num_samples - start), False)
            log_p = evaluate("the prior's log_prob", log_prior, z)
            log_w = log_likelihood(z) + log_p - log_q  # [S, B]
            parts.append(torch.logsumexp(log_w, 0))
        return torch.logsumexp(torch.stack(parts), 0) - math.log(num_samples)

    @torch.no_grad()
    @_with_own_backend
    def sample(self, n: int, *, mean: bool = False, y: Tensor | None = None) -> Tensor:
        """n draws of x ~ p(x | z), z ~ p(z), or with mean=True of E[x | z]: [n, *x_shape].

        With y, [n, ...], draw m is of p(x | z, y[m]), z ~ p(z | y[m]).
        """
        self._check_y(y, (n,), "draw")
        output = self._generate(n, y)
        return self.likelihood.mean(output) if mean else self.likelihood.sample(output)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """E[x | z] at the posterior's mean: [B, *x_shape]; y as in :meth:`forward`."""
        mean = self.likelihood.mean(self._decode_means(x, y))
        return require_shape(f"the likelihood's mean for x {list(x.shape)}", mean, x.shape)

    # A model whose latents are more than z ~ N(mu, exp(logvar)) overrides these.

    _output: ClassVar[type[VAEOutput]] = VAEOutput

    def _has_closed_form_kl(self) -> bool:
        """Whether `_drawn_with_kl` has the KL in closed form, all of it or a part: then it has no log weights."""
        return self.prior.has_closed_form_kl

    def _drawn_with_kl(
        self, x: Tensor, y: Tensor | None, mu: Tensor, logvar: Tensor, num_samples: int, index: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(z [S, B, D], log p(x | z) [S, B], KL [S, B]), in closed form where there is one."""
        z, divergence = self._kl(mu, logvar, num_samples, index, y)
        return z, self._log_likelihood_of(x, z, y=y), divergence

    def _sampler(self, x: Tensor) -> bounds.Sampler:
        """How z is drawn."""
        return bounds.gaussian_sampler

    def _densities(self, x: Tensor, y: Tensor | None, mu: Tensor, log_prior: Density) -> tuple[Density, Density]:
        """(log p(x | z), log p(z)) of what the sampler draws; log_prior is that of the prior."""
        return lambda z: self._log_likelihood_of(x, z, y=y), log_prior

    def _generate(self, n: int, y: Tensor | None) -> Any:
        """The decoder's output for n draws of z ~ p(z)."""
        return self._decode(self._prior_sample(n, y), y=y)

    def _decode_means(self, x: Tensor, y: Tensor | None) -> Any:
        """The decoder's output at the posterior's mean."""
        mu, _ = self._posterior(x, y)
        return self._decode(mu, y=y)

    def _networks_of_densities(self) -> tuple[nn.Module, ...]:
        """The networks inside p(x | z) and, of what is in the latents beside the prior's z, p(z)."""
        return (self.decoder,)

    # These are for every model.

    def _prior_sample(self, n: int, y: Tensor | None) -> Tensor:
        z = self.prior.sample(n, **self._for_prior(y))
        if z.ndim != 2 or z.shape[0] != n:
            raise ValueError(f"the prior's sample({n}) must be [{n}, D], not {list(z.shape)}")
        return z

    def _posterior(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mu [B, D], logvar [B, D]) of x [B, *x_shape] and y."""
        _check_encoder(self.prior, self.encoder)
        self._check_y(y, x.shape[:1], "x")
        return encode(self.encoder, x, y)

    def _decode(self, *z: Tensor, y: Tensor | None) -> Any:
        return self.decoder(*z) if y is None else self.decoder(*z, y)

    def _for_prior(self, y: Tensor | None) -> dict[str, Tensor]:
        """The argument y for the prior, if it takes one."""
        return {} if y is None or not is_conditional(self.prior) else {"y": y}

    def _check_y(self, y: Tensor | None, rows: tuple[int, ...], of_each: str) -> None:
        """rows: (B,), which y must begin with; of_each: what there are so many of."""
        if y is None:
            if is_conditional(self.prior):
                raise ValueError(f"the {type(self.prior).__name__} is conditional: give y, a row for each {of_each}")
        elif require_tensor("y", y).shape[:1] != rows:
            raise ValueError(f"y must be [{rows[0]}, ...], a row for each {of_each}, not {list(y.shape)}")

    def _kl(
        self, mu: Tensor, logvar: Tensor, num_samples: int, index: Tensor | None, y: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(z [S, B, D], KL [S, B]), in closed form where the prior has it."""
        known = {} if index is None else {"index": index}  # a prior of one's own need not take it
        z, divergence = self.prior.kl(mu, logvar, num_samples, **known, **self._for_prior(y))
        shape = (num_samples, *mu.shape)
        return require_shape("the prior's z", z, shape), require_shape("the prior's kl", divergence, shape[:-1])

    def _drawn(
        self,
        bound: str,
        x: Tensor,
        y: Tensor | None,
        mu: Tensor,
        logvar: Tensor,
        gradient: str | None,
        beta: float,
        num_samples: int,
        chunk_size: int | None,
        backward_samples: int | None,
        index: Tensor | None,
    ) -> bounds.Bound:
        """The bound with its KL sampled."""
        if bound == "iwae" and backward_samples is not None:
            for network in self._networks_of_densities():
                require_repeatable("backward_samples calls the decoder twice for the same z", network)
        densities = self._densities(x, y, mu, self.prior.density(index, mu, **self._for_prior(y)))
        sampler = self._sampler(x)
        return bounds.estimate(
            bound, *densities, mu, logvar, gradient, beta, num_samples, chunk_size, backward_samples, sampler
        )

    def _log_likelihood_of(self, x: Tensor, *z: Tensor, y: Tensor | None = None) -> Tensor:
        """log p(x | z), [S, B], of x [B, *x_shape] and y under z [S, B, D]; the decoder is given all z there are."""
        S, B, _ = z[0].shape
        rows = [level.flatten(0, 1) for level in z]  # [N, D]
        of_rows = None if y is None else y.expand(S, *y.shape).flatten(0, 1)  # [N, ...]

        def by_sample(part: Tensor) -> Tensor:
            """[N, ...] -> [S, B, ...], in float32 at least: a density is not to be computed in half precision."""
            if part.ndim == 0 or part.shape[0] != S * B:
                wanted = f"[{S * B}, ...] for z {' and '.join(str(list(level.shape)) for level in rows)}"
                raise ValueError(f"the decoder must return {wanted}, not {list(part.shape)}")
            part = part.float() if part.dtype in (torch.float16, torch.bfloat16) else part
            return part.unflatten(0, (S, B))

        output = tree_map_only(Tensor, by_sample, self._decode(*rows, y=of_rows))
        log_prob = self.likelihood.log_prob(output, x)
        shape = (S, B, *x.shape[1:])
        log_prob = require_shape(f"the log_prob of {type(self.likelihood).__name__}", log_prob, shape)
        log_prob = log_prob if log_prob.dtype == torch.float64 else log_prob.float()
        return log_prob.reshape(S, B, math.prod(x.shape[1:])).sum(-1)


def is_conditional(prior: Prior) -> bool:
    """Whether the prior is p(z | y)."""
    return getattr(prior, "conditional", False)  # a prior of one's own need not have it


_PRIOR_METHODS = ("log_prob", "sample", "kl", "density", "snapshot", "has_closed_form_kl")


def _check_encoder(prior: Prior, encoder: nn.Module) -> None:
    if getattr(prior, "encoder", encoder) is not encoder:
        raise ValueError(
            "the prior's encoder must be the VAE's encoder, the same object: assign `vae.encoder`, which the prior "
            "follows, or make the prior with this encoder"
        )
