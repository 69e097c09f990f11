"""A variational autoencoder with two levels of latents, z2 above z1: a deeper prior and a deeper posterior.

    p(x, z1, z2) = p(x | z1, z2) p(z1 | z2) p(z2)        q(z1, z2 | x) = q(z1 | x, z2) q(z2 | x)

To the bounds the two are one z, [z1, z2] side by side, with the densities p(z) = p(z1 | z2) p(z2) and q(z | x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastvae import bounds
from fastvae import functional as F
from fastvae._noise import LOG_2PI
from fastvae.backends import BackendOptions
from fastvae.contracts import describe, evaluate, gaussian_from
from fastvae.likelihoods import Likelihood
from fastvae.priors import Density, Prior
from fastvae.vae import VAE, VAEOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class HierarchicalVAEOutput(VAEOutput):
    """A :class:`fastvae.vae.VAEOutput` of two levels.

    Attributes:
        kl: [B], the KL of both levels together, KL(q(z1, z2 | x) || p(z1, z2)).
        z: [S, B, D1 + D2], z1 and z2 side by side.
        mu, logvar: [B, D2], those of q(z2 | x).
        loss, bound, reconstruction, log_weights: as of VAEOutput.
    """

    @property
    def z1(self) -> Tensor:
        """[S, B, D1], the lower level, on which x depends most."""
        return _levels(self.z, self.mu)[0]

    @property
    def z2(self) -> Tensor:
        """[S, B, D2], the upper level, whose prior is the model's `prior`."""
        return _levels(self.z, self.mu)[1]


torch.export.register_dataclass(HierarchicalVAEOutput, serialized_type_name="fastvae.HierarchicalVAEOutput")


class HierarchicalVAE(VAE):
    """A :class:`fastvae.VAE` with two levels of latents: z2, whose prior is any of fastvae's, and z1 below it.

    Args:
        encoder: q(z2 | x): x [B, *x_shape] -> (mu [B, D2], logvar [B, D2]).  The encoder that a VampPrior or
            ExemplarPrior must have been given.
        lower_encoder: q(z1 | x, z2): x [B, *x_shape] and z2 [S, B, D2] -> (mu, logvar), both [S, B, D1].  It is given
            each x once, however many z2 belong to it, so that what depends on x alone is computed once.
        lower_prior: p(z1 | z2): z2 [N, D2] -> (mu [N, D1], logvar [N, D1]).
        decoder: p(x | z1, z2): z1 [N, D1] and z2 [N, D2] -> the likelihood's parameters, as of :class:`fastvae.VAE`.
        prior: p(z2), a :class:`fastvae.Prior`.
        likelihood, backend: as of :class:`fastvae.VAE`.

    The methods are those of :class:`fastvae.VAE`, with these differences:

    - `forward` returns a :class:`fastvae.hierarchical.HierarchicalVAEOutput`.  `beta` weighs the KL of both levels.
    - With `kl="auto"` the KL between q(z1 | x, z2) and p(z1 | z2) is in closed form for each z2 drawn, and that of z2
      where the prior has one.  `kl="sample"` has both sampled.
    - `gradient="stl"` and "dreg" run the lower encoder twice.  It should have no random numbers of its own in it, as
      dropout has, or the gradient in its parameters is that of another draw of them.
    - It is not conditional: y is refused.
    - `reconstruct` decodes the mean of q(z2 | x), and the mean of q(z1 | x, z2) at it.

    Raises:
        TypeError, ValueError: as :class:`fastvae.VAE`; in use: a network does not return what is said above.

    Source: Tomczak and Welling, VAE with a VampPrior (AISTATS 2018), section 4.
    """

    _output: ClassVar[type[VAEOutput]] = HierarchicalVAEOutput

    def __init__(
        self,
        encoder: nn.Module,
        lower_encoder: nn.Module,
        lower_prior: nn.Module,
        decoder: nn.Module,
        prior: Prior,
        likelihood: str | Likelihood = "bernoulli",
        **backend: Unpack[BackendOptions],
    ) -> None:
        super().__init__(encoder, decoder, prior, likelihood, **backend)
        for name, network in (("lower_encoder", lower_encoder), ("lower_prior", lower_prior)):
            if not isinstance(network, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, not {describe(network)}")
        self.lower_encoder = lower_encoder
        self.lower_prior = lower_prior

    def _has_closed_form_kl(self) -> bool:
        return True  # that of z1

    def _check_y(self, y: Tensor | None, rows: tuple[int, ...], of_each: str) -> None:
        if y is not None:
            raise ValueError("a HierarchicalVAE is not conditional, and takes no y")
        super()._check_y(y, rows, of_each)

    def _drawn_with_kl(
        self, x: Tensor, y: Tensor | None, mu: Tensor, logvar: Tensor, num_samples: int, index: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z2, kl = self._kl(mu, logvar, num_samples, index, y)
        q_mu, q_logvar = self._lower_posterior(x, z2)
        z1, _ = F.gaussian_rsample(q_mu, q_logvar)
        kl = kl + _gaussian_kl(q_mu, q_logvar, *self._lower_prior_of(z2, q_mu.shape[-1]))
        return torch.cat((z1, z2), -1), self._log_likelihood_of(x, z1, z2), kl

    def _sampler(self, x: Tensor) -> bounds.Sampler:
        def draw(mu: Tensor, logvar: Tensor, count: int, path_derivative: bool) -> tuple[Tensor, Tensor]:
            z2, log_q2 = F.gaussian_rsample(mu, logvar, count, path_derivative=path_derivative)
            z1, log_q1 = F.gaussian_rsample(*self._lower_posterior(x, z2), path_derivative=path_derivative)
            if path_derivative and torch.is_grad_enabled():
                log_q1 = log_q1 + self._path_by_z2(x, z1, z2)
            return torch.cat((z1, z2), -1), log_q1 + log_q2

        return draw

    def _path_by_z2(self, x: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
        """Zeros [S, B], whose gradient is that of log q(z1 | x, z2) in z2, by way of the lower encoder's output.

        `path_derivative` leaves it out with all else that log q depends on but z1.  Only the gradient in the lower
        encoder's parameters is to be left out; so here they are constants.
        """
        constants = {name: parameter.detach() for name, parameter in self.lower_encoder.named_parameters()}
        output = torch.func.functional_call(self.lower_encoder, constants, (x.detach(), z2))
        mu, logvar = self._checked_lower(output, x, z2)
        log_q = gaussian_log_prob(z1.detach(), mu, logvar)
        return log_q - log_q.detach()

    def _densities(self, x: Tensor, y: Tensor | None, mu: Tensor, log_prior: Density) -> tuple[Density, Density]:
        def log_likelihood(z: Tensor) -> Tensor:
            return self._log_likelihood_of(x, *_levels(z, mu))

        def log_p(z: Tensor) -> Tensor:
            z1, z2 = _levels(z, mu)
            log_p1 = gaussian_log_prob(z1, *self._lower_prior_of(z2, z1.shape[-1]))
            return log_p1 + evaluate("the prior's log_prob", log_prior, z2)

        return log_likelihood, log_p

    def _generate(self, n: int, y: Tensor | None) -> Any:
        z2 = self._prior_sample(n, y)
        z1, _ = F.gaussian_rsample(*self._lower_prior_of(z2))
        return self.decoder(z1, z2)

    def _decode_means(self, x: Tensor, y: Tensor | None) -> Any:
        z2, _ = self._posterior(x, y)
        z1, _ = self._lower_posterior(x, z2[None])
        return self.decoder(z1[0], z2)

    def _networks_of_densities(self) -> tuple[nn.Module, ...]:
        return self.decoder, self.lower_prior

    def _lower_posterior(self, x: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of q(z1 | x, z2), [S, B, D1], of x [B, *x_shape] and z2 [S, B, D2]."""
        return self._checked_lower(self.lower_encoder(x, z2), x, z2)

    def _checked_lower(self, output: object, x: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        of = f"x {list(x.shape)} and z2 {list(z2.shape)}"
        return gaussian_from("lower_encoder", output, of, "S, B, D1", z2.shape[:-1])

    def _lower_prior_of(self, z2: Tensor, D1: int | None = None) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of p(z1 | z2), [..., D1], of z2 [..., D2]; D1 is what it must be, None for any."""
        lead, rows = z2.shape[:-1], z2.flatten(0, -2)
        wanted = f"N, {'D1' if D1 is None else D1}"
        output = self.lower_prior(rows)
        mu, logvar = gaussian_from("lower_prior", output, f"z2 {list(rows.shape)}", wanted, rows.shape[:1], D1)
        return mu.reshape(*lead, mu.shape[-1]), logvar.reshape(*lead, mu.shape[-1])


def _levels(z: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """(z1 [..., D1], z2 [..., D2]) of z [..., D1 + D2]; mu [..., D2] tells D2."""
    D2 = mu.shape[-1]
    return z[..., :-D2], z[..., -D2:]


def gaussian_log_prob(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, exp(logvar)), [...], nats, of z, mu and logvar [..., D]: a Gaussian of its own for each row."""
    z, mu, logvar = _wide(z), _wide(mu), _wide(logvar)
    return -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar + LOG_2PI).sum(-1)


def _gaussian_kl(mu: Tensor, logvar: Tensor, p_mu: Tensor, p_logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(p_mu, exp(p_logvar))) in closed form, [...], nats, of [..., D].

    The KL stays what it is where both are shifted and scaled; so p becomes N(0, I).
    """
    mu, logvar, p_mu, p_logvar = map(_wide, (mu, logvar, p_mu, p_logvar))
    return F.gaussian_kl((mu - p_mu) * torch.exp(-0.5 * p_logvar), logvar - p_logvar)


def _wide(value: Tensor) -> Tensor:
    """In float32 at least: a density is not to be computed in half precision."""
    return value if value.dtype == torch.float64 else value.float()
