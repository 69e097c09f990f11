"""fastvae.adapters.pythae beside pythae itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pythae", reason='pythae is not installed: pip install "fastvae-kernels[pythae]"')

import pythae.models
import pythae.samplers
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder
from torch import Tensor

import fastvae
from fastvae.adapters.pythae import VAMP, VAMPSampler

D, K = 4, 30


class Identity(BaseDecoder):
    """Shows z itself."""

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=z)


def models(**extra):
    """pythae's model and ours, with the same parameters; the encoder's variances differ much."""
    torch.manual_seed(0)
    config = pythae.models.VAMPConfig(
        input_dim=(8,), latent_dim=D, number_components=K, uses_default_decoder=not extra, reconstruction_loss="mse"
    )
    theirs, ours = pythae.models.VAMP(config, **extra), VAMP(config, **extra)
    with torch.no_grad():
        theirs.pseudo_inputs[0].weight.uniform_(0, 1)
        theirs.encoder.log_var.weight *= 40
        theirs.encoder.embedding.weight *= 40
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def test_the_model_is_pythaes() -> None:
    theirs, ours = models()
    x = {"data": torch.rand(16, 8)}
    z = torch.randn(16, D)
    torch.testing.assert_close(ours._log_p_z(z), theirs._log_p_z(z), rtol=1e-4, atol=1e-4)
    losses = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        output = model(x)
        output.loss.backward()
        losses.append((output.loss, model.pseudo_inputs[0].weight.grad, model.encoder.log_var.weight.grad))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)


def kl_of(model):
    def kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        log_q = (-0.5 * (logvar + (z - mu) ** 2 / logvar.exp())).sum(1)  # as pythae's loss function has it
        return z, log_q - model._log_p_z(z)

    return kl


def test_the_audit_finds_what_is_wrong_with_pythaes_sampler() -> None:
    theirs, _ = models(decoder=Identity())
    mu, logvar, log_weights = VAMP.components(theirs)
    sampler = pythae.samplers.VAMPSampler(theirs)
    report = fastvae.audit(
        theirs._log_p_z, mu, logvar, log_weights=log_weights, sample=sampler.sample, kl=kl_of(theirs)
    )
    assert report.names == ["log-2pi-dropped", "samples-tanh-of-log-variance", "first-components-in-order"], str(report)


def test_ours_passes_the_audit() -> None:
    _, ours = models(decoder=Identity())
    report = fastvae.audit(ours, sample=VAMPSampler(ours).sample, kl=kl_of(ours))
    assert report, str(report)


def test_the_sampler_gives_what_pythaes_gives(tmp_path) -> None:
    theirs, ours = models()
    for model in (theirs, ours):
        assert VAMPSampler(model).sample(7, batch_size=3).shape == pythae.samplers.VAMPSampler(model).sample(7).shape
    with pytest.raises(ValueError, match="num_samples"):
        VAMPSampler(ours).sample(0)
