"""fastvae.adapters.scvi beside scvi-tools itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("scvi", reason='scvi-tools is not installed: pip install "fastvae-kernels[scvi]"')

import anndata
import numpy as np
import scvi
from scvi.external.sysvi._priors import VampPrior as SysVIVampPrior
from torch.distributions import Normal

import fastvae
from fastvae.adapters.scvi import VampPrior, differential_abundance, use_mixture

CELLS, GENES, SAMPLES = 120, 20, 4


def cells() -> anndata.AnnData:
    g = np.random.default_rng(0)
    data = anndata.AnnData(g.poisson(3.0, (CELLS, GENES)).astype("float32"))
    data.obs["donor"] = [f"donor {n}" for n in g.integers(0, SAMPLES, CELLS)]
    data.obs["batch"] = [f"batch {n % 2}" for n in range(CELLS)]
    return data


@pytest.fixture(scope="module")
def model():
    data = cells()
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(data, n_latent=5, n_hidden=16)
    model.train(max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False)
    return model


def test_differential_abundance_is_that_of_scvi_tools(model) -> None:
    model.differential_abundance(sample_key="donor", dof=None)
    theirs = model.adata.obsm["da_log_probs"].copy()
    ours = differential_abundance(model, sample_key="donor", variance_as_scale=True)
    assert list(ours.columns) == list(theirs.columns) and list(ours.index) == list(theirs.index)
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-4, atol=1e-3)
    assert ours.equals(model.adata.obsm["da_log_probs"])


def test_differential_abundance_is_the_posteriors_mixture(model) -> None:
    ours = differential_abundance(model, sample_key="donor")
    mu, variance = (torch.as_tensor(x) for x in model.get_latent_representation(return_dist=True))
    for donor in ours:
        own = torch.as_tensor((model.adata.obs["donor"] == donor).values)
        expected = fastvae.reference.mixture_log_prob(mu.double(), mu[own].double(), variance[own].double().log())
        np.testing.assert_allclose(ours[donor].values, expected, rtol=1e-4, atol=1e-3)


def test_few_cells_of_each_sample_and_wrong_arguments(model) -> None:
    few = differential_abundance(model, sample_key="donor", num_cells_posterior=3)
    assert few.shape == (CELLS, SAMPLES) and np.isfinite(few.values).all()
    with pytest.raises(ValueError, match="sample_key must name a column"):
        differential_abundance(model, sample_key="patient")
    with pytest.raises(ValueError, match="num_cells_posterior"):
        differential_abundance(model, sample_key="donor", num_cells_posterior=0)


def test_the_audit_finds_the_variances_that_scvi_tools_takes_for_scales(model) -> None:
    mu, variance = (torch.as_tensor(x) for x in model.get_latent_representation(return_dist=True))
    posterior = model.get_aggregated_posterior(dof=None)
    assert fastvae.audit(posterior.log_prob, mu, variance.log()).names == ["variance-as-scale"]


@pytest.fixture
def sysvi():
    data = cells()
    scvi.external.SysVI.setup_anndata(data, batch_key="batch")
    return scvi.external.SysVI(data, prior="vamp", n_prior_components=7, n_latent=4)


def test_the_audit_finds_what_is_wrong_with_sysvi(sysvi) -> None:
    prior = sysvi.module.prior.eval()
    assert type(prior) is SysVIVampPrior
    mu, scale = prior.get_params()

    def kl(mu_q, logvar_q):
        q = Normal(mu_q, (0.5 * logvar_q).exp())
        z = q.sample()
        return z, prior.kl(q, z)

    # At initialisation all scales are much alike, and the effect of the second square root is that of a scale.
    names = fastvae.audit(prior, mu, scale=scale, kl=kl).names
    assert names == [
        "sum-over-dimensions-forgotten", "product-of-mixtures", "scale-as-variance", "kl-log-p-wrong",
    ]  # fmt: skip


def test_sysvi_with_a_mixture_passes_the_audit_and_trains(sysvi) -> None:
    before = sysvi.module.state_dict()
    use_mixture(sysvi)
    prior = sysvi.module.prior
    assert type(prior) is VampPrior and list(sysvi.module.state_dict()) == list(before)
    mu, scale = prior.get_params()
    report = fastvae.audit(prior, mu, scale=scale, log_weights=torch.log_softmax(prior.w.flatten(), 0))
    assert report, str(report)
    sysvi.train(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False)
    assert type(sysvi.module.prior) is VampPrior
    assert all(p.isfinite().all() for p in sysvi.module.parameters())


def test_a_model_without_a_vamp_prior_is_refused(model) -> None:
    with pytest.raises(TypeError, match="SysVI with prior='vamp'"):
        use_mixture(model)
