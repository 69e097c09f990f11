"""scvi-tools: differential abundance in one call, and SysVI with a VampPrior that is a mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastvae import grouped_mixture_log_prob, mixture_log_prob

try:
    import numpy as np
    from scvi.external.sysvi._priors import VampPrior as _SysVIVampPrior
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'fastvae.adapters.scvi needs {error.name}; pip install "fastvae-kernels[scvi]"', name=error.name
    ) from error

if TYPE_CHECKING:
    from pandas import DataFrame


@torch.inference_mode()
def differential_abundance(
    model: Any,
    adata: Any = None,
    sample_key: str | None = None,
    *,
    batch_size: int | None = 128,
    num_cells_posterior: int | None = None,
    variance_as_scale: bool = False,
    impl: str | None = None,
) -> DataFrame:
    """log p(z | sample) of every cell under every sample's aggregated posterior, as `model.differential_abundance`.

    All cells are encoded once, and all samples are scored in one call of :func:`fastvae.grouped_mixture_log_prob`.

    Args:
        model: a trained scvi-tools model with `get_latent_representation(return_dist=True)`, such as SCVI.
        adata: the cells; None means those of the model.
        sample_key: the column of `adata.obs` that names each cell's sample.
        batch_size: cells that are encoded at a time.
        num_cells_posterior: how many cells of each sample, at random by NumPy's generator, its posterior is made of;
            None means all.
        variance_as_scale: give the posteriors' variances to the normal distribution as standard deviations, as
            scvi-tools 1.4 does.  The numbers are then those of `model.differential_abundance(dof=None)`.
        impl: as of :func:`fastvae.mixture_log_prob`.

    Returns:
        [cells, samples], nats, which `adata.obsm["da_log_probs"]` gets too.

    Raises:
        ValueError: no column `sample_key`, cells without a sample, or num_cells_posterior < 1.

    Source: Boyeau et al., Deep generative modeling of sample-level heterogeneity in single-cell genomics (Nature
    Methods 2025).
    """
    import pandas as pd

    adata = model._validate_anndata(adata)
    if sample_key not in adata.obs:
        raise ValueError(f"sample_key must name a column of adata.obs, not {sample_key!r}; there are {list(adata.obs)}")
    if num_cells_posterior is not None and num_cells_posterior < 1:
        raise ValueError(f"num_cells_posterior must be at least 1, not {num_cells_posterior}")
    samples = adata.obs[sample_key].unique()
    groups = pd.Categorical(adata.obs[sample_key], categories=samples).codes.astype("int64")
    if (groups < 0).any():
        raise ValueError(f"{int((groups < 0).sum())} cells have no sample in the column {sample_key!r}")
    mean, variance = model.get_latent_representation(
        adata=adata, return_dist=True, give_mean=True, batch_size=batch_size
    )
    mu = torch.as_tensor(mean, device=model.device)
    logvar = torch.as_tensor(variance, device=model.device).log()
    kept = np.arange(len(groups))
    if num_cells_posterior is not None:
        cells = [np.flatnonzero(groups == g) for g in range(len(samples))]
        kept = np.concatenate(
            [
                np.random.choice(own, num_cells_posterior, replace=False) if len(own) > num_cells_posterior else own
                for own in cells
            ]
        )
    log_prob = grouped_mixture_log_prob(
        mu,
        mu[kept],
        (2 * logvar if variance_as_scale else logvar)[kept],
        torch.as_tensor(groups[kept], device=model.device),
        num_groups=len(samples),
        impl=impl,
    )
    table = pd.DataFrame(log_prob.cpu().numpy(), index=adata.obs_names, columns=samples)
    adata.obsm["da_log_probs"] = table
    return table


class VampPrior(_SysVIVampPrior):  # type: ignore[misc]
    """SysVI's VampPrior as a mixture of Gaussians: log_prob(z) is [M], summed over the dimensions.

    scvi-tools 1.4 takes logsumexp over the components in each dimension, and the square root of a scale.
    """

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), [M], of z [M, D]; nats."""
        mu, scale = self.get_params()
        return mixture_log_prob(z, mu, 2 * scale.log(), torch.log_softmax(self.w.flatten(), 0))

    def kl(self, qz: torch.distributions.Normal, z: Tensor) -> Tensor:
        """log q(z) - log p(z), [M], of draws z [M, D] of qz."""
        return qz.log_prob(z).sum(-1) - self.log_prob(z)


def use_mixture(model: Any) -> None:
    """Make a SysVI model's VampPrior a mixture of Gaussians, before or after training.

    Parameters, names in the state and files that were saved stay as they are.

    Args:
        model: a `scvi.external.SysVI` with `prior="vamp"`.

    Raises:
        TypeError: the model has no VampPrior.
    """
    prior = getattr(getattr(model, "module", None), "prior", None)
    if not isinstance(prior, _SysVIVampPrior):
        raise TypeError(f"model must be a SysVI with prior='vamp', not a {type(model).__name__} with {prior!r}")
    prior.__class__ = VampPrior
