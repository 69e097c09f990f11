"""What is shipped: the source archive, and wheels built from it and installed elsewhere."""

from __future__ import annotations

import os
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from support.shipping import ROOT, call, source_archive

import fastvae

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


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source archive, outside of any repository and in a folder whose name has a space."""
    folder, archive = tmp_path_factory.mktemp("source archive"), source_archive(request)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def install(source: Path, folder: Path, **variables: str) -> tuple[str, set[str]]:
    """Build a wheel of the archive and install it into `folder`: its tags, and its files."""
    call("-m", "build", "--no-isolation", "--wheel", "--outdir", folder, source, folder=folder, **variables)
    (wheel,) = folder.glob("fastvae_kernels-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    call("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", wheel, folder=folder)
    (installed,) = distributions(name="fastvae-kernels", path=[str(folder / "site")])
    assert installed.version == fastvae.__version__
    integrations = {"pyro", "pythae", "safetensors", "scvi", "sklearn", "tensorboard"}
    extras = {"app", "bench", "dev", "docs", "triton"} | integrations
    assert extras == set(installed.metadata.get_all("Provides-Extra") or ())
    return wheel.stem.split("-", 2)[2], {name for name in names if ".dist-info/" not in name}


def use(folder: Path) -> str:
    """Use what is installed in `folder`, with no compiler on the PATH: what info() says of impl="cpu"."""
    return call("-c", SCRIPT, folder / "site", folder=folder, PATH="")


def library() -> set[str]:
    """The files of the package, without the extension."""
    files = {"fastvae_command.py", "fastvae/py.typed", "fastvae/benchmarks/probe.cpp"}
    for folder, package in (
        ("fastvae", "fastvae"),
        ("kernels", "fastvae/kernels"),
        ("benchmarks", "fastvae/benchmarks"),
    ):
        for pattern in ("*.py", "app/**/*.json", "app/**/*.toml"):
            found = (ROOT / folder).rglob(pattern)
            files |= {f"{package}/{path.relative_to(ROOT / folder).as_posix()}" for path in found}
    return files


def test_the_archive_has_the_sources(source: Path) -> None:
    for name in ("csrc", "kernels", "fastvae", "tests"):
        files = [path for path in (ROOT / name).rglob("*.*") if path.suffix != ".so" and path.is_file()]
        files = [path for path in files if path.parent.name != "__pycache__"]  # where other tests' imports write
        missing = [path for path in files if not (source / path.relative_to(ROOT)).exists()]
        assert files and not missing


@pytest.fixture
def installed(source: Path, tmp_path: Path) -> tuple[str, set[str]]:
    """The tags and files of a wheel that is built and installed here: quickly, without CUDA and optimisation."""
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    return install(source, tmp_path, FASTVAE_CUDA="0", CXX=str(compiler))


def test_a_wheel_works_elsewhere(installed: tuple[str, set[str]], tmp_path: Path) -> None:
    tags, files = installed
    assert tags.startswith("cp310-abi3-linux_")
    assert files == library() | {"fastvae/_C.abi3.so"}
    assert use(tmp_path).startswith("compiled kernels (")


def test_without_a_compiler(source: Path, tmp_path: Path) -> None:
    """FASTVAE_NO_EXTENSION=1 makes a wheel for every platform, and info() says aloud what is missing."""
    tags, files = install(source, tmp_path, FASTVAE_NO_EXTENSION="1", CC="/bin/false", CXX="/bin/false")
    assert tags == "py3-none-any" and files == library()
    assert use(tmp_path).startswith("missing: the extension was not built")


def test_a_switch_that_is_neither_on_nor_off(source: Path) -> None:
    with pytest.raises(AssertionError, match="FASTVAE_NO_EXTENSION must be 0 or 1, not 'yes'"):
        call("setup.py", "--version", folder=source, FASTVAE_NO_EXTENSION="yes")


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        ("__version__ = '2.9.1'", "the compiled kernels need torch 2.10 or newer; this is torch 2.9.1"),
        ("raise ImportError", "install torch 2.10 or newer before fastvae, or leave out --no-build-isolation"),
    ],
)
def test_a_torch_that_cannot_build(source: Path, tmp_path: Path, torch: str, message: str) -> None:
    """`torch` stands for the one that is installed."""
    (tmp_path / "torch/utils").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").write_text(torch)
    (tmp_path / "torch/utils/__init__.py").touch()
    (tmp_path / "torch/utils/cpp_extension.py").write_text("BuildExtension = CppExtension = None")
    with pytest.raises(AssertionError, match=message):
        call("setup.py", "--version", folder=source, PYTHONPATH=str(tmp_path))
