"""The names of the published code's parameters, for ours: what a comparison of weights rests on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastvae.app.run.networks import build
from tools.experiments import anchor

GATED = [f"{gate}.{kind}" for gate in "hg" for kind in ("weight", "bias")]
LINEAR, WRAPPED = ["weight", "bias"], ["linear.weight", "linear.bias"]


def theirs(model: str, prior: str, images: str) -> list[str]:
    """The parameters of models/VAE.py and models/HVAE_2level.py in jmtomczak/vae_vampprior, by name."""
    if model == "vae":
        gated = ["q_z_layers.0", "q_z_layers.1", "p_x_layers.0", "p_x_layers.1"]
        gaussians = ["q_z"]
    else:
        gated = [f"{network}.{layer}" for network in ("q_z2_layers", "p_z1_layers") for layer in "01"]
        gated += [f"{network}_{part}.0" for network in ("q_z1_layers", "p_x_layers") for part in ("z2", "joint")]
        gated += ["q_z1_layers_x.0", "p_x_layers_z1.0"]
        gaussians = ["q_z2", "q_z1", "p_z1"]
    outputs = ["p_x_mean"] if images == "binary" else ["p_x_mean", "p_x_logvar"]
    named = [(layer, GATED) for layer in gated] + [(output, WRAPPED) for output in outputs]
    for gaussian in gaussians:
        named += [(f"{gaussian}_mean", LINEAR), (f"{gaussian}_logvar", WRAPPED)]
    return [f"{layer}.{rest}" for layer, of in named for rest in of] + ["means.linear.weight"] * (prior == "vamp")


def test_every_parameter_has_its_own_in_the_published_code() -> None:
    cases = list(anchor.fresh_cases())
    assert len(cases) == 8
    for config, dataset in cases:
        names = theirs(config.model, config.prior, dataset.kind)
        ours = [anchor.our_name(name, config.model, dataset.kind) for name in names]
        assert sorted(ours) == sorted(dict(build(config, dataset).named_parameters()))


def test_what_is_no_working_copy_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert anchor.main([str(tmp_path / "nowhere")]) == 2
    assert "no working copy of jmtomczak/vae_vampprior" in capsys.readouterr().err
