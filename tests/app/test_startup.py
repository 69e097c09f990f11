"""How soon the command answers: options are checked before PyTorch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.patience import PATIENCE

from .conftest import ENVIRONMENT

# The command as it is installed, and at its end which of the libraries that load slowly it imported.
SCRIPT = """
import atexit, sys
slow = "torch", "numpy", "matplotlib", "sklearn", "scipy"
atexit.register(lambda: print(*(name for name in slow if name in sys.modules), file=sys.stderr))
from fastvae_command import main
sys.argv[0] = "fastvae"
main()
"""


def python(script: str, *arguments: str) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr and the seconds it took of the processor."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds


def command(*arguments: str) -> tuple[int, str, str, float]:
    return python(SCRIPT, *arguments)


@pytest.fixture(scope="module")
def importing_torch() -> float:
    """Seconds of the processor, 2 or so: what takes long on this machine, as busy as it is."""
    return python("import torch")[-1]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--epochs", "0", "--out", "a"], "--epochs is 0; it should be 1 or more."),
        (["train", "--bound", "vr", "--out", "a"], "it can be elbo, iwae"),
        (["train", "--device", "meta", "--out", "a"], "--device is 'meta'; it can be auto, cpu, cuda"),
        (["train", "--data", "cifar", "--out", "a"], "'cifar' is not known"),
        (["train", "--data", "none.npz", "--out", "a"], "there is no such file"),
        (["train", "--resume", "--out", "a"], "holds no run"),
        (["evaluate", "a"], "holds no run"),
        (["sample", "a"], "holds no run"),
        (["compare", "--priors", "vamp", "--out", "a"], "--priors is 'vamp'"),
        (["score", "--points", "none.npy", "--mixture", "none.npz", "--out", "a.npy"], "there is no such file"),
        (["plan", "--rows", "1", "--components", "1", "--dims", "1", "--device", "tpu"], "it can be cpu, cpu-avx2"),
        (["evaluate", ""], "the name is empty"),
        (["train", "--out", ""], "the name is empty"),
    ],
)
def test_wrong_options_are_told_before_slow_imports(arguments: list[str], told: str, importing_torch: float) -> None:
    code, _, error, seconds = command(*arguments)
    assert code in (1, 2) and told in error and error.endswith("\n\n")
    assert "Traceback" not in error and seconds < importing_torch / 2 and not Path("a").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["compare", "-h"]])
def test_help_needs_no_slow_imports(arguments: list[str], importing_torch: float) -> None:
    code, text, error, seconds = command(*arguments)
    assert code == 0 and "Usage" in text and error == "\n" and seconds < importing_torch


def test_info_takes_little_more_than_importing_torch() -> None:
    for tries_left in (2, 1, 0):
        *_, torch_alone = python("import torch")
        code, text, error, seconds = command("info")
        assert code == 0 and "extension" in text and set(error.split()) <= {"torch", "numpy"}
        if seconds < 1.6 * torch_alone:
            break
        assert tries_left, (seconds, torch_alone)  # else one of the two had the busier core


def test_the_library_is_whole_once_it_is_imported_late() -> None:
    script = """
import fastvae_command, sys
from unittest import mock
sys.argv = ["fastvae", "info"]
try: fastvae_command.main()
except SystemExit as stop: assert not stop.code
import fastvae, fastvae.app.cli
assert fastvae.VAE and fastvae.app.cli and fastvae.mixture_log_prob and sys.modules["fastvae"] is fastvae
assert fastvae.__file__ and fastvae.__path__ and fastvae.priors.Prior is fastvae.vae.Prior
"""
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_of_the_command_line_runs_as_well() -> None:
    command_line = [sys.executable, "-m", "fastvae.app.cli", "train", "--epochs", "0", "--out", "a"]
    done = subprocess.run(command_line, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "--epochs is 0" in done.stderr


def test_bench_is_reached_by_the_command() -> None:
    code, _, error, _ = command("bench", "speed")
    assert code == 1 and "there is no suite 'speed'" in error
    code, text, _, _ = command("bench", "--help")
    assert code == 0 and "--peers" in text
