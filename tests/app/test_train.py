"""Training: bit-for-bit resumption, checkpoints that survive, the best model, what is refused."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from fastvae import VAE, ExemplarPrior, VampPrior, bounds
from fastvae._files import whole_file
from fastvae.app.data.dataset import Dataset, Split
from fastvae.app.run.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fastvae.app.run.config import (
    OF_PRIORS,
    PRIORS,
    BoundName,
    GradientName,
    TrainConfig,
    continued,
    make_config,
    option,
    without_effect,
)
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.measuring import measure
from fastvae.app.run.networks import build
from fastvae.app.run.randomness import Stream, reseed
from fastvae.app.run.trained import load_run
from fastvae.app.run.training import Watchers, finished, train
from fastvae.app.user_errors import ConfigError, RunError

TINY = TrainConfig(components=6, latent=3, hidden=12, epochs=4, warmup=2, batch_size=32)


def tiny_data(kind: str = "binary", dynamic: bool = True) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(120, 9, generator=generator)
    held_out = x[80:].round()
    if kind == "gray":
        x = held_out = (torch.floor(x * 256) + 0.5) / 256
    elif not dynamic:
        x = x.round()
    splits = Split(x[:80]), Split(held_out[-40:-20]), Split(held_out[-20:])
    return Dataset("tiny", "made here", *splits, image_shape=(3, 3), kind=kind, dynamic=dynamic)  # type: ignore[arg-type]


def flat(state: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves of nested dicts and lists, with their paths."""
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from flat(value, f"{prefix}/{key}")
    else:
        yield prefix, state


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    left, right = dict(flat(a)), dict(flat(b))
    assert left.keys() == right.keys()
    for key, value in left.items():
        if key.endswith("/seconds"):
            continue
        same = torch.equal(value, right[key]) if isinstance(value, Tensor) else value == right[key]
        assert same, f"{key} differs: {value} and {right[key]}"


@pytest.mark.parametrize("prior", ["standard", "mixture", "vamp"])
def test_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, prior: str) -> None:
    config, data = replace(TINY, prior=prior, learn_weights=True), tiny_data()
    straight = train(config, data, tmp_path / "straight")
    train(replace(config, epochs=3), data, tmp_path / "parts")
    torch.rand(17)  # whatever happens in between must not matter
    resumed = train(config, data, tmp_path / "parts", resume=True)
    assert resumed["epoch"] == 4
    assert_same(straight, resumed)
    assert_same(read_checkpoint(RunFolder(tmp_path / "straight")), read_checkpoint(RunFolder(tmp_path / "parts")))


def test_interrupted_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    data = tiny_data()

    def interrupt(epoch: int, index: int) -> None:
        if (epoch, index) == (3, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, data, tmp_path / "parts", watchers=Watchers(batch=interrupt))
    assert read_checkpoint(RunFolder(tmp_path / "parts"))["epoch"] == 2
    assert_same(train(TINY, data, tmp_path / "parts", resume=True), train(TINY, data, tmp_path / "straight"))


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    a = train(TINY, tiny_data(), tmp_path / "a")
    b = train(replace(TINY, seed=1), tiny_data(), tmp_path / "b")
    assert not torch.equal(a["model"]["encoder.mu.weight"], b["model"]["encoder.mu.weight"])


def test_interrupted_write_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as file:
        file.write(b"half of the n")
        file.flush()
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    state = train(TINY, tiny_data(), tmp_path)
    broken = {**state, "epoch": lambda: None}
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(RunFolder(tmp_path), broken)  # type: ignore[arg-type]
    assert_same(read_checkpoint(RunFolder(tmp_path)), state)
    assert not list(tmp_path.glob(".*"))


def test_checkpoint_never_runs_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trace"),)

    torch.save({"epoch": Bomb()}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match="damaged or not a checkpoint"):
        read_checkpoint(RunFolder(tmp_path))
    assert not (tmp_path / "trace").exists()


def test_truncated_checkpoint(tmp_path: Path) -> None:
    train(TINY, tiny_data(), tmp_path)
    path = RunFolder(tmp_path).checkpoint
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(RunError, match="damaged"):
        train(TINY, tiny_data(), tmp_path, resume=True)


def test_pseudo_inputs_are_training_images_after_build() -> None:
    data = tiny_data()
    prior = build(TINY, data).prior
    assert isinstance(prior, VampPrior)
    matches = (prior.pseudo_inputs[:, None] == data.train.x).all(-1)
    assert matches.any(1).all() and len(matches.int().argmax(1).unique()) == TINY.components


def test_pseudo_inputs_from_noise_differ_and_are_in_range() -> None:
    config, data = replace(TINY, components=200, pseudo_init="noise"), tiny_data()
    prior = build(config, data).prior
    assert isinstance(prior, VampPrior)
    u = prior.pseudo_inputs.detach()
    assert float(u.min()) >= 0 and float(u.max()) <= 1
    assert float((u.mean(0) - data.train.x.mean(0)).abs().max()) < 0.05
    assert float(u.std(0).min()) > 0.05


def test_he_normal_weights() -> None:
    vae = build(replace(TINY, hidden=200, latent=40, prior="standard"), tiny_data())
    for layer in (m for m in vae.modules() if isinstance(m, nn.Linear) and m.weight.numel() > 4000):
        assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 / layer.in_features), rel=0.08)


def test_more_pseudo_inputs_than_images() -> None:
    with pytest.raises(ConfigError, match=r"--components is 81, but tiny has only 80 training images"):
        build(replace(TINY, components=81), tiny_data())
    build(replace(TINY, components=81, pseudo_init="noise"), tiny_data())


def test_best_model_has_the_best_true_bound(tmp_path: Path) -> None:
    config, data = replace(TINY, epochs=8, warmup=5, learning_rate=0.02), tiny_data()
    state = train(config, data, tmp_path)
    bounds = [line["validation"]["bound"] for line in state["history"]]
    assert state["best_bound"] == max(bounds) == bounds[state["best_epoch"] - 1]
    assert [line["beta"] for line in state["history"]] == [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    vae = load_run(tmp_path, dataset=data).vae
    reseed(config.seed, Stream.VALIDATE)
    again = measure(vae, data.validation.x)
    assert again["elbo"] == pytest.approx(state["best_bound"], abs=1e-5)
    assert again["elbo"] == pytest.approx(again["reconstruction"] - again["kl"])


@pytest.mark.parametrize(
    ("epoch", "best_epoch", "stop"),
    [(14, 1, False), (15, 1, True), (15, 12, False), (17, 12, True), (99, 98, False), (100, 100, True)],
)
def test_patience_is_counted_after_the_warm_up(epoch: int, best_epoch: int, stop: bool) -> None:
    config = TrainConfig(epochs=100, warmup=10, patience=5)
    state: Any = {"epoch": epoch, "best_epoch": best_epoch}
    assert finished(config, state) is stop


def test_training_pixels_are_drawn_afresh_in_each_epoch(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, VAE) and module.training:
            seen.append(inputs[0].clone())

    hook = nn.modules.module.register_module_forward_pre_hook(watch)
    try:
        train(replace(TINY, epochs=2, warmup=1, batch_size=80), tiny_data(), tmp_path)
    finally:
        hook.remove()
    first, second = seen
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first.sum(0), second.sum(0))


@pytest.mark.parametrize(
    "settings",
    [
        {"prior": "exemplar", "refresh": 0.1, "neighbours": 2, "chunk_size": 7},
        {"prior": "exemplar", "bound": "iwae", "num_samples": 3, "gradient": "dreg", "subset": 20},
        {"prior": "exemplar", "subset": 20, "backward_components": 6, "chunk_size": 4},
        {"prior": "vamp", "bound": "iwae", "num_samples": 5, "gradient": "dreg", "backward_samples": 2},
        {"prior": "vamp", "refresh": 0.5, "gradient": "stl", "num_samples": 2},
    ],
)
def test_priors_and_bounds_train_and_resume(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Bit for bit as without a stop, whatever a prior keeps between steps; and the bound rises."""
    config, data = replace(TINY, epochs=6, learning_rate=3e-3, **settings), tiny_data()
    straight = train(config, data, tmp_path / "straight")
    train(replace(config, epochs=3), data, tmp_path / "parts")
    assert_same(train(config, data, tmp_path / "parts", resume=True), straight)
    first, last = straight["history"][0], straight["history"][-1]
    assert last["validation"]["bound"] > first["validation"]["bound"]


def test_training_leaves_each_images_own_exemplar_out(tmp_path: Path) -> None:
    """The prior is asked for the very rows of each batch, in training and only there."""
    asked: list[Tensor | None] = []

    class Watched(ExemplarPrior):
        def density(self, index: Tensor | None = None, near: Tensor | None = None):  # type: ignore[no-untyped-def]
            asked.append(index)
            return super().density(index, near)

    data, seen = tiny_data(dynamic=False), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastvae.app.run.networks.ExemplarPrior", Watched)
        hook = nn.modules.module.register_module_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0]) if isinstance(module, VAE) and module.training else None
        )
        try:
            train(replace(TINY, prior="exemplar", epochs=1, warmup=0), data, tmp_path)
        finally:
            hook.remove()
    assert len(asked) == len(seen) == 3 and all(index is not None for index in asked)
    for index, x in zip(asked, seen, strict=True):
        assert torch.equal(data.train.x[index], x)
    assert sorted(torch.cat([i for i in asked if i is not None]).tolist()) == list(range(80))


@pytest.mark.parametrize("prior", ["standard", "vamp"])
def test_grey_images_train(tmp_path: Path, prior: str) -> None:
    state = train(replace(TINY, prior=prior, epochs=15, learning_rate=3e-3), tiny_data("gray"), tmp_path)
    assert state["history"][-1]["train"]["elbo"] > state["history"][0]["train"]["elbo"] + 1


def test_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    good = tiny_data()
    train(replace(TINY, epochs=3), good, tmp_path)
    x = good.train.x.clone()
    x[3, 3] = math.nan
    bad = replace(good, train=Split(x), dynamic=False)
    with pytest.raises(RunError, match=r"training loss became nan in epoch 4.*--learning-rate"):
        train(TINY, bad, tmp_path, resume=True)
    state = read_checkpoint(RunFolder(tmp_path))
    assert state["epoch"] == 3 and all(w.isfinite().all() for w in state["model"].values())


def test_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    train(TINY, tiny_data(), tmp_path)
    with pytest.raises(RunError, match=r"holds a run already; say --resume .* or --overwrite"):
        train(TINY, tiny_data(), tmp_path)


def test_the_settings_have_the_librarys_names() -> None:
    """They are written twice, because the command line checks them before it imports the library."""
    assert get_args(BoundName) == bounds.BOUNDS and get_args(GradientName) == bounds.GRADIENTS


def test_what_takes_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told from a lower bound, so that nothing that could be trained is refused."""
    config, data = replace(TINY, prior="standard", hidden=50), tiny_data()
    weights = sum(parameter.numel() for parameter in build(config, data).parameters())
    monkeypatch.setattr("fastvae.app.run.networks.physical_memory", lambda: 5 * 4 * weights)
    build(config, data)
    monkeypatch.setattr("fastvae.app.run.networks.physical_memory", lambda: int(5 * 4 * 0.9 * weights))
    with pytest.raises(ConfigError, match=r"--hidden 50, --latent 3 and --components 6 make .* weights"):
        build(config, data)
    monkeypatch.setattr("fastvae.app.run.networks.physical_memory", lambda: None)
    build(config, data)


@pytest.mark.parametrize("field", ["prior", "components", "latent", "learning_rate", "seed", "data"])
def test_resume_with_another_setting_names_it(field: str) -> None:
    value = {"prior": "standard", "learning_rate": 0.1, "data": "mnist"}.get(field, 7)
    with pytest.raises(ConfigError, match=f"{option(field)} is {value}, but .* begun with {getattr(TINY, field)}"):
        continued(TINY, {field: value})


def test_resume_with_more_epochs_or_moved_data() -> None:
    assert continued(TINY, {"epochs": 9, "data_dir": "/x", "seed": None}) == replace(TINY, epochs=9, data_dir="/x")
    with pytest.raises(ConfigError, match=r"--epochs is 3.*only be raised"):
        continued(TINY, {"epochs": 3})


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"epochs": -1},
        {"components": 0},
        {"latent": 0},
        {"hidden": -3},
        {"patience": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"seed": -1},
        {"warmup": -1},
        {"warmup": 100},
        {"prior": "flow"},
        {"pseudo_init": "zeros"},
        {"bound": "vr"},
        {"gradient": "dreg"},
        {"refresh": 0.0},
        {"neighbours": -1},
        {"chunk_size": 0},
        {"backward_components": 0},
    ],
)
def test_settings_that_make_no_sense(bad: dict[str, Any]) -> None:
    (field,) = bad
    with pytest.raises(ConfigError, match=option(field)):
        make_config({"data": "mnist", **bad})


@pytest.mark.parametrize("field", OF_PRIORS)
def test_settings_of_another_prior_are_named(field: str) -> None:
    given = {field: {"learn_weights": True, "shared_variance": False}.get(field, 3)}
    for prior in PRIORS:
        lines = without_effect({"seed": 1, "refresh": None} | given, [prior])
        assert len(lines) == (prior not in OF_PRIORS[field])
        assert all(
            re.match(f"{option(field)} changes nothing with {prior}: it is of the prior", line) for line in lines
        )
    assert not without_effect(given, PRIORS)


def test_warm_up_never_takes_more_than_a_fifth_unless_asked() -> None:
    assert make_config({"data": "mnist", "epochs": 30}).warmup == 6
    assert make_config({"data": "mnist", "epochs": 30, "warmup": 25}).warmup == 25
