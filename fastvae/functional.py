"""The public operations: what they take, what is checked, which backend runs.

Shapes: `...` is any leading batch shape, D the latent dimensions, K the components, S the samples.  logvar is
log sigma^2.  Densities are in nats and include -D/2 log 2 pi.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae import _checks, reference
from fastvae._noise import draw_seed, part_of_batch, rows_of_batch
from fastvae.autograd import (
    GaussianKL,
    GaussianRsample,
    LabelledMixtureLogProb,
    MixtureKL,
    MixtureLogProb,
    MixtureLogProbAndScore,
)
from fastvae.backends.choice import choose, dense
from fastvae.backends.registry import PRECISIONS, check_name
from fastvae.dispatch import call


def mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    exclude: Tensor | None = None,
    labels: Tensor | None = None,
    dense_backward: bool | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Log density of a mixture of K diagonal Gaussians, log p(z) = logsumexp_k [log w_k + log N(z; mu_k, sigma_k^2)].

    Differentiable once in z, mu, logvar and log_weights.  Memory grows with M + K for M rows.  An array of M x K
    exponents exists only for small problems on the CPU, where up to 16 MiB are kept for backward.

    Args:
        z: [..., D], the points.
        mu: [K, D], the means.
        logvar: broadcastable to [K, D], the log variances; [D], [1, D] or [] is one variance for all components,
            [K, 1] an isotropic one for each.  A single dimension means [D], also where K = D.
        log_weights: [K], used as given and never renormalised; a log weight of -inf removes the component.  None means
            -log K each.  With labels, [L, K].  :func:`fastvae.log_weights_of` makes them of weights that may be 0.
        exclude: int64 [...], for each row the index of a component to leave out, or -1 for none.
        labels: int64 [...], for each row the label, 0 ... L - 1, that chooses its weights: log_weights must then be
            [L, K], and row m's are `log_weights[labels[m]]`.  Rows of one label meet the components in one call of the
            kernel, so that the cost is that of a call without labels and a small part for each label that occurs.
        dense_backward: True computes every term of the gradients.  By default, pairs of a row and a component whose
            responsibility is below 2^-24 / K (2^-53 / K in float64) may be left out; where z needs a gradient, only if
            the pair's share of that gradient is below such a fraction of what the widest component alone could give.
            What a row leaves out is below a rounding.  A parameter that no row uses gets a gradient of exactly 0
            instead of about 1e-12.
        precision: "highest", "high" or "medium": how inexact tensor cores may be; None follows
            `torch.get_float32_matmul_precision()`.  "highest" is as exact as the difference form, and all backends
            compute it; "cuda" and "triton" have the others, and docs/guides/backends-and-precision.md has their errors.
        impl: "cpu", "triton", "cuda", "composite", "reference", or None to choose by device, see
            :func:`fastvae.backends.choose`.

    Returns:
        [...], nats; float64 if any argument is, else float32.  -inf where no component is left.

    Raises:
        TypeError: an argument is not a floating tensor (`exclude`: not int64).
        ValueError: K = 0, shapes that do not fit, mixed devices, `exclude` or `labels` out of range, an unknown name.
        RuntimeError: the named backend is not built.

    Equals, holding [M, K, D] numbers::

        MixtureSameFamily(Categorical(logits=log_weights), Independent(Normal(mu, (0.5 * logvar).exp()), 1)).log_prob(z)

    Source: the prior of Tomczak and Welling, VAE with a VampPrior (AISTATS 2018), eq. 8 and 9.
    """
    check_name("precision", precision, PRECISIONS)
    if labels is not None:
        mixture = z, mu, logvar, log_weights, exclude, labels
        return _by_label(*mixture, False, dense_backward, precision, impl)[0]
    z, mu, logvar, log_weights, exclude = _checks.mixture(z, mu, logvar, log_weights, exclude)
    backend = choose(impl, z.device, z.dtype, precision)
    if backend == "reference":
        return reference.mixture_log_prob(z, mu, logvar, log_weights, exclude=exclude)
    rows = _checks.flat(z, mu, logvar, log_weights, exclude)
    return _checks.shaped(call(MixtureLogProb, *rows, dense(dense_backward), backend), z.shape[:-1])


def mixture_log_prob_and_score(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    exclude: Tensor | None = None,
    labels: Tensor | None = None,
    dense_backward: bool | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`mixture_log_prob` and its score, d log p(z) / dz, in the same pass over the components.

    Args, Raises: as :func:`mixture_log_prob`.

    Returns:
        (log_prob [...], score [..., D]).  log_prob is differentiable as usual, the score is a constant to autograd.
        Where the density is zero the score is 0.

    Equals, but for the second pass::

        log_prob = mixture_log_prob(z, ...);  score, = torch.autograd.grad(log_prob.sum(), z)
    """
    check_name("precision", precision, PRECISIONS)
    if labels is not None:
        mixture = z, mu, logvar, log_weights, exclude, labels
        return _by_label(*mixture, True, dense_backward, precision, impl)
    z, mu, logvar, log_weights, exclude = _checks.mixture(z, mu, logvar, log_weights, exclude)
    backend = choose(impl, z.device, z.dtype, precision)
    if backend == "reference":
        return reference.mixture_log_prob_and_score(z, mu, logvar, log_weights, exclude=exclude)
    rows = _checks.flat(z, mu, logvar, log_weights, exclude)
    log_prob, score = call(MixtureLogProbAndScore, *rows, dense(dense_backward), backend)
    return _checks.shaped(log_prob, z.shape[:-1]), _checks.shaped(score, z.shape)


def _by_label(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    exclude: Tensor | None,
    labels: Tensor,
    with_score: bool,
    dense_backward: bool | None,
    precision: str | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    """(log p(z | label) [...], its score [..., D]; without elements where it is not asked for)."""
    z, mu, logvar, log_weights, exclude = _checks.labelled(z, mu, logvar, log_weights, exclude, labels)
    backend = choose(impl, z.device, z.dtype, precision)
    if backend == "reference":
        _checks.label_range(labels, len(log_weights))
        mixture = z, mu, logvar, log_weights
        if with_score:
            return reference.mixture_log_prob_and_score(*mixture, exclude=exclude, labels=labels)
        return reference.mixture_log_prob(*mixture, exclude=exclude, labels=labels), z.new_empty(0)
    rows = *_checks.flat(z, mu, logvar, log_weights, exclude), labels.reshape(-1).contiguous()
    options = None, len(log_weights), with_score, dense(dense_backward), backend
    log_prob, score = call(LabelledMixtureLogProb, *rows, *options)
    return _checks.shaped(log_prob, z.shape[:-1]), _checks.shaped(score, z.shape) if with_score else score


def gaussian_rsample(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    generator: torch.Generator | None = None,
    path_derivative: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Reparameterised samples z = mu + sigma eps of a diagonal Gaussian, and their log density.

    The noise is a function of one 64-bit seed, drawn from PyTorch's generator, and of an element's place: the same
    for every backend, dtype and number of threads.  It is not stored; backward draws it again.

    Args:
        mu: [..., D], the means.
        logvar: broadcastable to [..., D], the log variances.
        num_samples: S samples a row; None means one, without a dimension for it.
        generator: where the seed comes from; None means the device's default generator.
        path_derivative: let the gradient of log_q flow through z alone, not through the parameters of q ("sticking
            the landing": Roeder et al. 2017).  The values are the same.
        impl: "cpu", "triton", "cuda", "composite", "reference", or None to choose by device.

    Returns:
        (z, log_q): z [S, ..., D] or [..., D] in the dtype of the input; log_q = log q(z | x), [S, ...] or [...],
        nats, summed over D, in float32 at least (of z before it is rounded to a half precision).

    Raises:
        TypeError: mu or logvar is not a floating tensor, num_samples is not an integer.
        ValueError: shapes that do not fit, mixed devices, num_samples < 1, an unknown backend.

    Equals, but for the noise::

        q = Independent(Normal(mu, (0.5 * logvar).exp()), 1);  z = q.rsample((S,));  log_q = q.log_prob(z)

    Source: Kingma and Welling, Auto-encoding variational Bayes (ICLR 2014).
    """
    dtype = _checks.result_dtype(mu=mu, logvar=logvar)
    mu, logvar = _checks.gaussian(mu, logvar, _checks.compute_dtype(dtype))
    if (part := part_of_batch()) is not None:
        with rows_of_batch(None):
            z, log_q = gaussian_rsample(
                part.widened(mu), part.widened(logvar), num_samples,
                generator=generator, path_derivative=path_derivative, impl=impl,
            )  # fmt: skip
        return _checks.cast(part.own(z, -2), dtype), part.own(log_q, -1)
    shape = _checks.sampled_shape(num_samples, mu)
    backend = choose(impl, mu.device)
    if backend == "reference":
        z, log_q = reference.gaussian_rsample(
            mu, logvar, num_samples, generator=generator, path_derivative=path_derivative
        )
        return _checks.cast(z, dtype), log_q
    seed = draw_seed(mu.device, generator)
    z, log_q = call(
        GaussianRsample, _checks.rows(mu), _checks.rows(logvar), seed, num_samples, path_derivative, backend
    )
    return _checks.cast(_checks.shaped(z, shape), dtype), _checks.shaped(log_q, shape[:-1])


def gaussian_kl(mu: Tensor, logvar: Tensor, *, impl: str | None = None) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, I)) in closed form, summed over D.

    Args:
        mu: [..., D], the means.
        logvar: broadcastable to [..., D], the log variances.
        impl: "cpu", "triton", "cuda", "composite", "reference", or None to choose by device.

    Returns:
        [...], nats; float64 if an argument is, else float32.

    Raises:
        TypeError, ValueError: as :func:`gaussian_rsample`.

    Equals::

        0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1)

    Source: Kingma and Welling, Auto-encoding variational Bayes (ICLR 2014), appendix B.
    """
    mu, logvar = _checks.gaussian(mu, logvar, _checks.compute_dtype(_checks.result_dtype(mu=mu, logvar=logvar)))
    backend = choose(impl, mu.device)
    if backend == "reference":
        return reference.gaussian_kl(mu, logvar)
    return _checks.shaped(call(GaussianKL, _checks.rows(mu), _checks.rows(logvar), backend), mu.shape[:-1])


def mixture_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor,
    prior_logvar: Tensor,
    log_weights: Tensor | None = None,
    num_samples: int | None = None,
    *,
    generator: torch.Generator | None = None,
    path_derivative: bool = False,
    exclude: Tensor | None = None,
    dense_backward: bool | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples of q(z | x) = N(mu, sigma^2) and, for each, an estimate of KL(q || p) to a mixture prior p.

    Args:
        mu, logvar: [..., D], the posterior; see :func:`gaussian_rsample` for these, `num_samples`, `generator` and
            `path_derivative`.
        prior_mu, prior_logvar, log_weights: [K, D], broadcastable to [K, D], [K]: the mixture; see
            :func:`mixture_log_prob` for these, `dense_backward`, `precision` and `impl`.
        exclude: int64 [...], for each posterior the index of a component to leave out of its prior, or -1.

    Returns:
        (z, kl): z [S, ..., D] or [..., D]; kl = log q(z | x) - log p(z), [S, ...] or [...], nats.

    Raises:
        TypeError, ValueError, RuntimeError: as the two operations it is made of.

    Equals::

        z, log_q = gaussian_rsample(mu, logvar, num_samples);  kl = log_q - mixture_log_prob(z, prior_mu, ...)
    """
    check_name("precision", precision, PRECISIONS)
    dtype = _checks.result_dtype(mu=mu, logvar=logvar)
    wide = _checks.compute_dtype(
        _checks.result_dtype(
            mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, log_weights=log_weights
        )
    )
    mu, logvar = _checks.gaussian(mu, logvar, wide)
    prior_mu, prior_logvar, log_weights = _checks.components(prior_mu, prior_logvar, log_weights, wide, "prior_")
    K, D = prior_mu.shape
    if mu.shape[-1] != D:
        raise ValueError(
            f"prior_mu must be [K, {mu.shape[-1]}] to match mu {_checks.shape_of(mu)}, not {_checks.shape_of(prior_mu)}"
        )
    shape = _checks.sampled_shape(num_samples, mu)
    if exclude is not None:
        _checks.tensor("exclude", exclude)
        if _checks.same_shape(exclude, mu.shape[:-1]):
            exclude = exclude.expand(shape[:-1])
        _checks.excluded(exclude, shape, mu.device, K)
    if part_of_batch() is not None:  # the density is of this process's rows alone
        z, log_q = gaussian_rsample(
            mu, logvar, num_samples, generator=generator, path_derivative=path_derivative, impl=impl
        )
        log_p = mixture_log_prob(
            z, prior_mu, prior_logvar, log_weights,
            exclude=exclude, dense_backward=dense_backward, precision=precision, impl=impl,
        )  # fmt: skip
        return _checks.cast(z, dtype), log_q - log_p
    backend = choose(impl, mu.device, wide, precision)
    if backend == "reference":
        z, kl = reference.mixture_kl(
            mu, logvar, prior_mu, prior_logvar, log_weights, num_samples, generator=generator,
            path_derivative=path_derivative, exclude=exclude,
        )  # fmt: skip
        return _checks.cast(z, dtype), kl
    seed = draw_seed(mu.device, generator)
    z, kl = call(
        MixtureKL,
        _checks.rows(mu),
        _checks.rows(logvar),
        prior_mu.contiguous(),
        prior_logvar.contiguous(),
        None if log_weights is None else log_weights.contiguous(),
        None if exclude is None else exclude.reshape(-1).contiguous(),
        seed,
        num_samples,
        path_derivative,
        dense(dense_backward),
        backend,
    )
    return _checks.cast(_checks.shaped(z, shape), dtype), _checks.shaped(kl, shape[:-1])
