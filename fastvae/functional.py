"""The public operations: what they take, what is checked, which backend runs.

Shapes: `...` is any leading batch shape, D the latent dimensions, K the components, S the samples.  logvar is
log sigma^2.  Densities are in nats and include -D/2 log 2 pi.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae import backends, reference
from fastvae.autograd import GaussianKL, GaussianRsample, MixtureKL, MixtureLogProb, MixtureLogProbAndScore, call

_PRECISIONS = ("highest", "high", "medium")


def mixture_log_prob(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    exclude: Tensor | None = None,
    dense_backward: bool = False,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """Log density of a mixture of K diagonal Gaussians, log p(z) = logsumexp_k [log w_k + log N(z; mu_k, sigma_k^2)].

    Differentiable once in z, mu, logvar and log_weights.  Memory is O(M + K) for M rows: no [M, K] array exists, but
    where the compiled kernels on a CPU keep one of at most 16 MiB for backward.

    Args:
        z: [..., D], the points.
        mu: [K, D], the means.
        logvar: broadcastable to [K, D], the log variances; [D], [1, D] or [] is one variance for all components,
            [K, 1] an isotropic one for each.
        log_weights: [K], used as given and never renormalised; -inf is a component that is not there.  None means
            -log K each.
        exclude: int64 [...], for each row the index of a component to leave out, or -1 for none.
        dense_backward: compute every term of the gradients.  By default the compiled kernels leave out pairs of a
            row and a component whose responsibility is below 2^-24 / K (2^-53 / K in float64) and, where z needs a
            gradient, its share of that gradient below such a fraction of what the widest component alone could give.
            All that a row leaves out is less than a rounding, so the gradient in z stays what it is; a parameter
            that no row uses gets exactly 0 where dense arithmetic gives about 1e-12.
        precision: "highest", "high" or "medium": how inexact tensor cores may be; None follows
            `torch.get_float32_matmul_precision()`.  "highest" is the difference form, which all backends compute;
            "triton" alone has the others, whose errors docs/triton-kernels.md tells.
        impl: "cpu", "triton", "cuda", "composite", "reference", or None to choose by device, see
            :func:`fastvae.backends.choose`.

    Returns:
        [...], nats; float64 if any argument is, else float32.  -inf where no component is left.

    Raises:
        TypeError: an argument is not a floating tensor (`exclude`: not int64).
        ValueError: K = 0, shapes that do not fit, mixed devices, `exclude` out of range, an unknown name.
        RuntimeError: the named backend is not built.

    Equals, holding [M, K, D] numbers::

        MixtureSameFamily(Categorical(logits=log_weights), Independent(Normal(mu, (0.5 * logvar).exp()), 1)).log_prob(z)

    Source: the prior of Tomczak and Welling, VAE with a VampPrior (AISTATS 2018), eq. 8 and 9.
    """
    _check_precision(precision)
    z, mu, logvar, log_weights, exclude = _check_mixture(z, mu, logvar, log_weights, exclude)
    backend = backends.choose(impl, z.device)
    if backend == "reference":
        return reference.mixture_log_prob(z, mu, logvar, log_weights, exclude=exclude)
    backend = backends.at_precision(backend, precision, z.dtype)
    rows = _flat(z, mu, logvar, log_weights, exclude)
    return _shaped(call(MixtureLogProb, *rows, dense_backward, backend), z.shape[:-1])


def mixture_log_prob_and_score(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None = None,
    *,
    exclude: Tensor | None = None,
    dense_backward: bool = False,
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
    _check_precision(precision)
    z, mu, logvar, log_weights, exclude = _check_mixture(z, mu, logvar, log_weights, exclude)
    backend = backends.choose(impl, z.device)
    if backend == "reference":
        return reference.mixture_log_prob_and_score(z, mu, logvar, log_weights, exclude=exclude)
    backend = backends.at_precision(backend, precision, z.dtype)
    rows = _flat(z, mu, logvar, log_weights, exclude)
    log_prob, score = call(MixtureLogProbAndScore, *rows, dense_backward, backend)
    return _shaped(log_prob, z.shape[:-1]), _shaped(score, z.shape)


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
    mu, logvar, dtype = _check_gaussian(mu, logvar)
    shape = _sampled_shape(num_samples, mu)
    backend = backends.choose(impl, mu.device)
    if backend == "reference":
        z, log_q = reference.gaussian_rsample(
            mu, logvar, num_samples, generator=generator, path_derivative=path_derivative
        )
        return _cast(z, dtype), log_q
    seed = reference.draw_seed(mu.device, generator)
    z, log_q = call(GaussianRsample, _rows(mu), _rows(logvar), seed, num_samples, path_derivative, backend)
    return _cast(_shaped(z, shape), dtype), _shaped(log_q, shape[:-1])


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
    mu, logvar, _ = _check_gaussian(mu, logvar)
    backend = backends.choose(impl, mu.device)
    if backend == "reference":
        return reference.gaussian_kl(mu, logvar)
    return _shaped(call(GaussianKL, _rows(mu), _rows(logvar), backend), mu.shape[:-1])


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
    dense_backward: bool = False,
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
    _check_precision(precision)
    mu, logvar, dtype = _check_gaussian(mu, logvar)
    wide = _compute_dtype(_result_dtype(mu=mu, prior_mu=prior_mu, prior_logvar=prior_logvar, log_weights=log_weights))
    prior_logvar = _check_components(prior_mu, prior_logvar, log_weights, "prior_")
    K, D = prior_mu.shape
    if mu.shape[-1] != D:
        raise ValueError(f"prior_mu must be [K, {mu.shape[-1]}] to match mu {_shape(mu)}, not {_shape(prior_mu)}")
    shape = _sampled_shape(num_samples, mu)
    if exclude is not None:
        _check_tensor("exclude", exclude)
        if exclude.shape == mu.shape[:-1]:
            exclude = exclude.expand(shape[:-1])
        _check_exclude(exclude, shape, mu.device, K)
    backend = backends.choose(impl, mu.device)
    if backend == "reference":
        z, kl = reference.mixture_kl(
            mu, logvar, prior_mu, prior_logvar, log_weights, num_samples, generator=generator,
            path_derivative=path_derivative, exclude=exclude,
        )  # fmt: skip
        return _cast(z, dtype), kl
    seed = reference.draw_seed(mu.device, generator)
    z, kl = call(
        MixtureKL,
        _rows(_cast(mu, wide)),
        _rows(_cast(logvar, wide)),
        _cast(prior_mu, wide).contiguous(),
        _cast(prior_logvar, wide).contiguous(),
        None if log_weights is None else _cast(log_weights, wide).contiguous(),
        None if exclude is None else exclude.reshape(-1).contiguous(),
        seed,
        num_samples,
        path_derivative,
        dense_backward,
        backends.at_precision(backend, precision, wide),
    )
    return _cast(_shaped(z, shape), dtype), _shaped(kl, shape[:-1])


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")


def _result_dtype(**tensors: Tensor | None) -> torch.dtype:
    """The dtype that these promote to; TypeError for what is not floating, ValueError for mixed devices."""
    first, dtype, device = None, None, None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            _check_tensor(name, tensor)
        own = tensor.dtype
        if own != dtype:
            if not own.is_floating_point:
                raise TypeError(f"{name} must be a floating tensor, not {own}")
            dtype = own if dtype is None else torch.promote_types(dtype, own)
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, but {first} is on {device}")
    assert dtype is not None
    return dtype


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), which takes long, beside a small operator, to find out that it has nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _check_gaussian(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """mu and logvar of one shape [..., D], in the dtype of the computation; and the dtype of the result."""
    result = _result_dtype(mu=mu, logvar=logvar)
    dtype = _compute_dtype(result)
    if mu.ndim == 0 or mu.shape[-1] == 0:
        raise ValueError(f"mu must be [..., D] with D >= 1, not {_shape(mu)}")
    if logvar.shape != mu.shape:
        logvar = _expand("logvar", logvar, mu.shape, "mu")
    return _cast(mu, dtype), _cast(logvar, dtype), result


def _check_mixture(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments in the dtype of the computation; logvar [K, D], or [1, D] where the components share it."""
    dtype = _compute_dtype(_result_dtype(z=z, mu=mu, logvar=logvar, log_weights=log_weights))
    logvar = _check_components(mu, logvar, log_weights)
    K, D = mu.shape
    if z.ndim == 0 or z.shape[-1] != D:
        raise ValueError(f"z must be [..., {D}] to match mu {_shape(mu)}, not {_shape(z)}")
    if exclude is not None:
        _check_tensor("exclude", exclude)
        _check_exclude(exclude, z.shape, z.device, K)
    if log_weights is not None:
        log_weights = _cast(log_weights, dtype)
    return _cast(z, dtype), _cast(mu, dtype), _cast(logvar, dtype), log_weights, exclude


def _check_exclude(exclude: Tensor, z_shape: tuple[int, ...], device: torch.device, K: int) -> None:
    lead = z_shape[:-1]
    if exclude.dtype != torch.int64:
        raise TypeError(f"exclude must be an int64 tensor, not {exclude.dtype}")
    if exclude.shape != lead:
        raise ValueError(f"exclude must be {list(lead)} to match z {list(z_shape)}, not {_shape(exclude)}")
    if exclude.device != device:
        raise ValueError(f"exclude is on {exclude.device}, but z is on {device}")
    # Elsewhere than on the CPU this would wait for the device, and a graph cannot branch on it: there an index
    # that is out of range leaves nothing out.
    if exclude.device.type == "cpu" and exclude.numel() and not torch.compiler.is_compiling():
        low, high = (int(v) for v in exclude.aminmax())
        if low < -1 or high >= K:
            raise ValueError(f"exclude must be in -1 ... {K - 1} for K = {K}, it spans {low} ... {high}")


def _sampled_shape(num_samples: int | None, mu: Tensor) -> tuple[int, ...]:
    """The shape of the samples of mu [..., D]."""
    if num_samples is None:
        return mu.shape
    if isinstance(num_samples, bool) or not isinstance(num_samples, (int, torch.SymInt)):
        raise TypeError(f"num_samples must be an integer or None, not {type(num_samples).__name__}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    return num_samples, *mu.shape


def _check_components(mu: Tensor, logvar: Tensor, log_weights: Tensor | None, prefix: str = "") -> Tensor:
    """logvar as [K, D], or [1, D] where the components share it; prefix: of the arguments' names."""
    if mu.ndim != 2 or 0 in mu.shape:
        raise ValueError(f"{prefix}mu must be [K, D] with K >= 1 and D >= 1, not {_shape(mu)}")
    K, D = mu.shape
    if log_weights is not None and log_weights.shape != (K,):
        raise ValueError(f"log_weights must be [{K}] to match {prefix}mu {_shape(mu)}, not {_shape(log_weights)}")
    if logvar.shape == mu.shape:
        return logvar
    if logvar.shape == (K,) and K not in (1, D):  # where K = D, [D] it is
        raise ValueError(
            f"{prefix}logvar must be broadcastable to [{K}, {D}] to match {prefix}mu, not [{K}]; "
            f"one log variance for each component is [{K}, 1], {prefix}logvar[:, None]"
        )
    shared = logvar.ndim < 2 or logvar.shape[0] == 1
    return _expand(f"{prefix}logvar", logvar, (1, D) if shared else (K, D), f"{prefix}mu")


def _expand(name: str, tensor: Tensor, shape: tuple[int, ...], other: str) -> Tensor:
    try:
        return tensor.expand(shape)
    except RuntimeError:
        wanted = list(shape)
        raise ValueError(f"{name} must be broadcastable to {wanted} to match {other}, not {_shape(tensor)}") from None


def _check_precision(precision: str | None) -> None:
    if precision is not None and precision not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(map(repr, _PRECISIONS))} or None, not {precision!r}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _rows(tensor: Tensor) -> Tensor:
    """[..., D] -> contiguous [M, D]; M is spelt out because -1 is ambiguous for an empty batch."""
    if tensor.ndim != 2:
        tensor = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return tensor.contiguous()


def _shaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reshaped, but for what has the shape: each view is a node of the graph, which a small call feels."""
    return tensor if tensor.shape == shape else tensor.reshape(shape)


def _flat(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    return (
        _rows(z),
        mu.contiguous(),
        logvar.contiguous(),
        None if log_weights is None else log_weights.contiguous(),
        None if exclude is None else exclude.reshape(-1).contiguous(),
    )
