"""What is shipped: the source archive, and wheels built from it and installed elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, fastvae, fastvae.kernels
assert fastvae.__file__.startswith(sys.argv[1]), fastvae.__file__
z = torch.randn(5, 3, requires_grad=True)
fastvae.mixture_kl(z, z, torch.randn(7, 3), torch.zeros(()))[1].sum().backward()
assert torch.isfinite(z.grad).all()
print(fastvae.info()["impl='cpu'"])
"""


def call(*command: str | Path, folder: Path, **variables: str) -> str:
    """What a command prints, run in `folder` and away from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source archive."""
    folder = tmp_path_factory.mktemp("sdist")
    call("-m", "build", "--no-isolation", "--sdist", "--outdir", folder, ROOT, folder=folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def install(source: Path, folder: Path, **variables: str) -> str:
    """Build a wheel of the archive, install it into `folder`, use it, and give what it says of the CPU."""
    call("-m", "build", "--no-isolation", "--wheel", "--outdir", folder, source, folder=folder, **variables)
    (wheel,) = folder.glob("*.whl")
    call("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", wheel, folder=folder)
    return call("-c", SCRIPT, folder / "site", folder=folder)


def test_the_archive_has_the_kernels(source: Path) -> None:
    for name in ("csrc", "kernels", "fastvae", "tests"):
        files = [path for path in (ROOT / name).rglob("*.*") if path.is_file() and path.suffix not in (".so", ".pyc")]
        missing = [path for path in files if not (source / path.relative_to(ROOT)).exists()]
        assert files and not missing


def test_a_wheel_works_elsewhere(source: Path, tmp_path: Path) -> None:
    """Without CUDA, which the installation that is tested has been built with where there is nvcc."""
    assert install(source, tmp_path, FASTVAE_CUDA="0").startswith("cpu (compiled kernels")
    assert "abi3" in next(tmp_path.glob("*.whl")).name
    assert (source / "fastvae/py.typed").exists() and (tmp_path / "site/fastvae/py.typed").exists()


def test_without_a_compiler(source: Path, tmp_path: Path) -> None:
    """FASTVAE_NO_EXTENSION=1 installs the composite backend, and info() says so aloud."""
    told = install(source, tmp_path, FASTVAE_NO_EXTENSION="1", CC="/bin/false", CXX="/bin/false")
    assert told.startswith("composite") and "missing: the extension was not built" in told
