"""The command line from end to end, in this process where that is enough."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from support.patience import PATIENCE

import fastvae
from fastvae.app.run.checkpoint import read_checkpoint
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.trained import load_run

from .conftest import ENVIRONMENT, TINY, Cli

PICTURES = ["curves.png", "latent_space.png", "pseudo_inputs.png", "reconstructions.png", "samples.png"]


def check_picture(path: Path) -> None:
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.02, f"{path} is blank"


def test_train_evaluate_sample(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, error = cli("train", "--out", out, *TINY)
    assert code == 0, error
    assert "validation ELBO" in text and f"fastvae evaluate {out}" in text
    assert sorted(p.name for p in out.glob("*.png")) == PICTURES
    for name in PICTURES:
        check_picture(out / name)
        assert str(out / name) in text
    results = json.loads((out / "results.json").read_text())
    assert results["epochs"] == len(results["history"]) == 2 and results["config"]["components"] == 8
    assert results["versions"]["torch"] == torch.__version__ and results["seconds_per_epoch"] > 0

    code, text, error = cli("evaluate", out, "--samples", 20, "--limit", 30, "--device", "cpu")
    assert code == 0, error
    evaluation = json.loads((out / "evaluation-test-30-of-300.json").read_text())
    assert evaluation["images"] == 30 and evaluation["importance_samples"] == 20
    assert evaluation["elbo"] == pytest.approx(evaluation["reconstruction"] - evaluation["kl"])
    # The importance-weighted bound is the tighter one, and no model knows digits better than this.
    assert evaluation["elbo"] < evaluation["log_likelihood"] < -10
    assert 0 < evaluation["standard_error"] < 5 and 0 <= evaluation["active_units"] <= 3
    for name in ("log-likelihood (20 importance samples)", "ELBO", "reconstruction term", "KL term", "active units"):
        assert name in text
    assert f"{evaluation['log_likelihood']:.2f}" in text

    code, text, error = cli("sample", out, "-n", 7, "--draw", "--out", tmp_path / "seven.png")
    assert code == 0, error
    check_picture(tmp_path / "seven.png")


def test_exemplars_with_the_iwae_bound(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    """A new prior and a new bound through train, evaluate and sample; what is told names the bound."""
    out = tmp_path / "run"
    model = ["--prior", "exemplar", "--no-shared-variance", "--refresh", 0.2, "--neighbours", 2, "--chunk-size", 16]
    bound = ["--bound", "iwae", "--samples", 6, "--gradient", "dreg", "--backward-samples", 2]
    code, text, error = cli("train", "--data", tiny_npz, "--out", out, *TINY, *model, *bound)
    assert code == 0, error
    assert "validation IWAE bound of 6 samples" in text
    line = json.loads((out / "results.json").read_text())["history"][-1]
    assert line["validation"]["bound"] > line["validation"]["elbo"]
    config = json.loads((out / "config.json").read_text())
    given = {
        "prior": "exemplar",
        "refresh": 0.2,
        "neighbours": 2,
        "chunk_size": 16,
        "num_samples": 6,
        "backward_samples": 2,
    }
    assert given.items() <= config.items() and config["gradient"] == "dreg" and not config["shared_variance"]
    code, _, error = cli("train", "--out", out, "--resume", "--samples", 7)
    assert code == 1 and "--samples is 7, but the run to be resumed was begun with 6" in error

    code, text, error = cli("evaluate", out, "--samples", 5)
    assert code == 0, error
    gap = json.loads((out / "evaluation.json").read_text())["gap"]
    # the prior is q(z) itself, of the very images
    assert gap["marginal_kl"] == pytest.approx({"value": 0, "standard_error": 0}, abs=1e-5)
    assert 0 < gap["mutual_information"]["value"] < np.log(gap["images"])
    assert len(gap["dimension_wise_kl"]) == 3 and "KL(q(z) || p(z))" in text
    check_picture(out / "prior_and_posterior.png")
    assert cli("sample", out, "-n", 4)[0] == 0


def test_gap_of_a_standard_prior(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    """Information and marginal KL add up to the mean KL of the training images, all by one encoder."""
    out = tmp_path / "run"
    code, said, _ = cli("train", "--data", tiny_npz, "--out", out, *TINY, "--prior", "standard", "--epochs", 8)
    assert code == 0 and "--components changes nothing with standard: it is of the prior mixture and vamp." in said
    assert cli("evaluate", out, "--samples", 5)[0] == 0
    gap = json.loads((out / "evaluation.json").read_text())["gap"]
    run = load_run(out)
    kl = fastvae.gaussian_kl(*run.vae.encoder(run.dataset.train.x)).mean().item()
    parts = gap["mutual_information"], gap["marginal_kl"]
    error = sum(part["standard_error"] for part in parts)
    assert abs(kl - sum(part["value"] for part in parts)) < 5 * error < 0.5
    # a run that goes on loses what was measured on it
    assert (out / "prior_and_posterior.png").exists()
    assert cli("train", "--out", out, "--resume", "--epochs", 9)[0] == 0
    assert not (out / "prior_and_posterior.png").exists() and not (out / "evaluation.json").exists()


def test_partial_evaluations_leave_the_full_one_alone(cli: Cli, run: Path) -> None:
    """And one image tells neither a standard error nor which units are active."""
    assert cli("evaluate", run, "-s", 3)[0] == 0
    full = (run / "evaluation.json").read_bytes()
    for options, name in (
        (["--limit", 1], "evaluation-test-1-of-8.json"),
        (["--limit", 7], "evaluation-test-7-of-8.json"),
        (["--split", "validation"], "evaluation-validation.json"),
        (["--split", "validation", "--limit", 2], "evaluation-validation-2-of-8.json"),
    ):
        code, text, error = cli("evaluate", run, "-s", 3, *options)
        assert code == 0 and str(run / name) in text, error
        assert (run / "evaluation.json").read_bytes() == full
    one = json.loads((run / "evaluation-test-1-of-8.json").read_text())
    assert one["images"] == 1 and one["standard_error"] is None and one["active_units"] is None
    assert json.loads(full)["standard_error"] > 0
    for limit in (8, 1000):  # all test images
        assert cli("evaluate", run, "-s", 4, "--limit", limit)[0] == 0
    assert json.loads((run / "evaluation.json").read_text())["importance_samples"] == 4
    _, text, _ = cli("evaluate", run, "-s", 3, "--limit", 1)
    assert "1 test image " in text
    lines = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in text.splitlines() if "│" in line}
    assert lines["its standard error over images"] == "-" and lines["active units"] == "- of 3"
    # a run that goes on loses them all
    assert cli("train", "--out", run, "--resume", "--epochs", 3)[0] == 0
    assert not list(run.glob("evaluation*"))


def test_evaluation_repeats(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    cli("train", "--data", tiny_npz, "--out", tmp_path, "--prior", "standard", *TINY)
    values = []
    for _ in range(2):
        cli("evaluate", tmp_path, "--samples", 5, "--limit", 6)
        values.append(json.loads((tmp_path / "evaluation-test-6-of-8.json").read_text())["log_likelihood"])
    assert values[0] == values[1]


def test_own_grey_images_without_labels(cli: Cli, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (60, 5, 7), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=x)
    code, _, error = cli("train", "--data", tmp_path / "mine.npz", "--out", tmp_path / "run", *TINY)
    assert code == 0, error
    for name in PICTURES:
        check_picture(tmp_path / "run" / name)
    code, _, error = cli("evaluate", tmp_path / "run", "--samples", 5)
    assert code == 0, error


def test_one_latent_dimension_has_pictures_too(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    code, _, error = cli(
        "train", "--data", tiny_npz, "--out", tmp_path / "run", *TINY, "--latent", 1, "--prior", "mixture"
    )
    assert code == 0, error
    check_picture(tmp_path / "run" / "latent_space.png")


def test_resume_and_overwrite(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    out = tmp_path / "run"
    assert cli("train", "--data", tiny_npz, "--out", out, *TINY)[0] == 0
    code, _, error = cli("train", "--data", tiny_npz, "--out", out, *TINY)
    assert code == 1 and "--resume" in error and "--overwrite" in error
    code, _, error = cli("train", "--out", out, "--resume", "--hidden", 17)
    assert code == 1 and "--hidden is 17" in error and "16" in error
    code, _, error = cli("train", "--out", out, "--resume", "--epochs", 3)
    assert code == 0 and read_checkpoint(RunFolder(out))["epoch"] == 3, error
    code, _, error = cli("train", "--data", tiny_npz, "--out", out, *TINY, "--overwrite", "--hidden", 17)
    assert code == 0 and read_checkpoint(RunFolder(out))["epoch"] == 2, error
    code, _, error = cli("train", "--out", tmp_path / "none", "--resume")
    assert code == 1 and "holds no run" in error


def test_overwrite_that_cannot_be_done_keeps_the_old_run(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    assert cli("train", "--data", tiny_npz, "--out", tmp_path / "run", *TINY)[0] == 0
    assert cli("train", "--data", tiny_npz, "--out", tmp_path / "run", *TINY, "--overwrite", "-k", 5000)[0] == 1
    assert read_checkpoint(RunFolder(tmp_path / "run"))["epoch"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "cifar"], "digits, mnist, static-mnist, freyfaces, caltech101"),
        (["train", "--data", "mnist"], "mnist.npz"),
        (["train", "--data", "none.npz"], "none.npz: there is no such file"),
        (["train", "-k", "5000"], "only 1200 training images"),
        (["train", "--epochs", "0"], "--epochs is 0"),
        (["train", "--epochs", "-4"], "--epochs is -4"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--prior", "flow"], "standard, mixture, vamp"),
        (["train", "--learning-rate", "nan"], "--learning-rate is nan"),
        (["train", "--bound", "vr"], "--bound is 'vr'; it can be elbo, iwae"),
        (["train", "--gradient", "score"], "it can be plain, stl, dreg"),
        (["train", "--gradient", "dreg"], "--gradient dreg is for --bound iwae"),
        (["train", "--samples", "0"], "--samples is 0"),
        (["train", "--bound", "iwae", "--backward-samples", "0"], "--backward-samples is 0; it should be 1 or more"),
        (["train", "--backward-samples", "5"], "--backward-samples is for --bound iwae"),
        (["train", "--chunk-size", "-1"], "--chunk-size is -1"),
        (["train", "--prior", "exemplar", "--subset", "1201"], "--subset is 1201; it should be 2 ... 1200"),
        (["train", "--subset", "9", "--refresh", "0.5"], "--subset and --refresh are two ways"),
        (["train", "--refresh", "0"], "--refresh is 0.0"),
        (
            ["train", "--refresh", "0.5", "--backward-components", "9"],
            "--backward-components and --refresh are two ways",
        ),
        (["train", "--conditional", "--backward-components", "9"], "is not for a --conditional model"),
        (["train", "--neighbours", "-2"], "--neighbours is -2"),
        (["train", "--device", "abacus"], "--device is 'abacus'"),
        (["train", "--binarize"], "--binarize is for .npz files"),
        (["train", "--resume", "--overwrite"], "contradict"),
        (["compare", "--priors", "vamp"], "--priors is 'vamp'"),
        (["compare", "--priors", "vamp,flow"], "standard, mixture, vamp"),
        (["compare", "--split", "training"], "--split is 'training'"),
        (["train", "--device", "meta"], "--device is 'meta'; it can be auto, cpu, cuda"),
        (["train", "--device", "cuda:999"], "--device cuda:999: is not here"),
        (["train", "--hidden", "1000000000"], "Take smaller ones"),
        (["train", "--prior", "mixture", "-k", "2000000000"], "Take smaller ones"),
        (["compare", "--latent", "2000000000"], "Take smaller ones"),
        (["train", "--hidden", "99999999999999999999"], "--hidden is 99999999999999999999; it should be at most"),
        (["train", "--samples", "2000000000"], "there is not enough memory"),
        (["train", "--threads", "1000000"], "--threads"),
        (["compare", "--seeds", "1000000000"], "--seeds"),
    ],
)
def test_options_that_make_no_sense(cli: Cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, text, error = cli(*arguments, "--out", tmp_path / "out")
    assert code != 0
    assert message in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error + text and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_folder_without_a_run(cli: Cli, tmp_path: Path, command: str) -> None:
    code, _, error = cli(command, tmp_path)
    assert code == 1 and "holds no run" in error


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--out", "none/a.png"], "none does not exist"),
        (["--out", "run"], "--out run: should be the name of a PNG file"),
        (["--out", "a.txt"], "--out a.txt: should be the name of a PNG file"),
        (["--count", 1001], "--count"),
        (["--count", 0], "--count"),
        (["--seed", -1], "--seed"),
        (["--out", ""], "the name is empty"),
    ],
)
def test_samples_that_cannot_be_drawn(cli: Cli, tmp_path: Path, run: Path, options: list[object], told: str) -> None:
    before = set(tmp_path.rglob("*"))
    code, text, error = cli("sample", run, *options)
    assert code in (1, 2) and told in " ".join(error.split()) and "Traceback" not in text + error
    assert set(tmp_path.rglob("*")) == before


def test_as_many_samples_as_can_be_drawn(cli: Cli, run: Path) -> None:
    assert cli("sample", run, "--count", 1000, "--out", run / "all.png")[0] == 0
    check_picture(run / "all.png")


def test_out_that_is_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, _, error = cli("train", "--out", tmp_path / "file", *TINY)
    assert code == 1 and str(tmp_path / "file") in error


def test_info_and_help(cli: Cli) -> None:
    code, text, _ = cli("info")
    assert code == 0 and torch.__version__ in text
    code, text, _ = cli("train", "--help")
    assert code == 0 and "--pseudo-init" in text and "--resume" in text


def test_ctrl_c_then_resume(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    """It is stopped in its training, which has no end, so that it is not over before the signal comes."""
    settings = ["--data", "tiny.npz", *TINY, "--patience", str(10**6)]
    command = [sys.executable, "-m", "fastvae.app.cli", "train", "--out", "parts", *settings, "--epochs", str(10**6)]
    parts = RunFolder(tmp_path / "parts")
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + PATIENCE
    while not parts.checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, text
    assert "fastvae train --out parts --resume" in text and "Traceback" not in text
    stopped_at = read_checkpoint(parts)["epoch"]
    assert stopped_at >= 1 and [path.name for path in (tmp_path / "parts").glob(".*")] == [".lock"]

    epochs = stopped_at + 20
    parts.config.write_text(json.dumps({**json.loads(parts.config.read_bytes()), "epochs": epochs}))
    straight_on = ["--out", tmp_path / "straight", *settings, "--epochs", epochs]
    for command in (["--out", tmp_path / "parts", "--resume"], straight_on):
        code, _, error = cli("train", *command)
        assert code == 0, error
    resumed, straight = (read_checkpoint(RunFolder(tmp_path / name)) for name in ("parts", "straight"))
    assert resumed["epoch"] == straight["epoch"] == epochs
    for name, weight in straight["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


def test_missing_packages_are_named() -> None:
    code = "import sys; sys.modules['typer'] = None; from fastvae.app.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "fastvae-kernels[app]"' in done.stderr
    assert "typer" in done.stderr and "Traceback" not in done.stderr


def test_importing_the_library_does_not_import_the_command_line() -> None:
    code = "import sys, fastvae; sys.exit(any(m in sys.modules for m in ('fastvae.app', 'typer', 'sklearn')))"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


def test_small_models_take_one_thread_unless_told(cli: Cli, tmp_path: Path, tiny_npz: Path) -> None:
    torch.set_num_threads(2)
    assert cli("train", "--data", tiny_npz, "--out", tmp_path / "a", *TINY)[0] == 0
    assert torch.get_num_threads() == 1
    assert cli("train", "--data", tiny_npz, "--out", tmp_path / "b", *TINY, "--threads", 2)[0] == 0
    assert torch.get_num_threads() == 2
