"""Benchmarks are installed under their one name and without records; tools are in the source archive alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.patience import PATIENCE
from support.shipping import ROOT, call, source_archive


@pytest.fixture
def archive(request: pytest.FixtureRequest) -> Path:
    pytest.importorskip("build")
    return source_archive(request)


def test_the_archive_has_tools_records_and_pages(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for folder, pattern in (
        ("tools", "*.py"),
        ("benchmarks", "*.py"),
        ("benchmarks/results", "*.json"),
        ("docs", "*.md"),
    ):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern)}
        assert files and files <= names, files - names
    links = "fastvae/benchmarks/", "fastvae/kernels/"
    assert not [name for name in names if name.startswith(links)], "the links' files would be there twice"


def test_the_wheel_has_benchmarks_alone(archive: Path, tmp_path: Path) -> None:
    """A wheel that is made from the archive, without the extension."""
    make = "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", archive
    call(*make, folder=tmp_path, FASTVAE_NO_EXTENSION="1")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(tmp_path)
    roots = {name.partition("/")[0].partition("-")[0] for name in names}
    assert roots == {"fastvae", "fastvae_command.py", "fastvae_kernels"}  # the last is what describes the distribution
    assert "fastvae/benchmarks/probe.cpp" in names and not [name for name in names if "results/" in name]
    script = "import fastvae.benchmarks.studies.__main__, fastvae.benchmarks.suites as s; print(s.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "fastvae" / "benchmarks" / "suites.py")
