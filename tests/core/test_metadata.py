"""What is said about the distribution, and the places that must say the same."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import fastvae

ROOT = Path(__file__).parents[2]
NAME = "fastvae-kernels"
OWN = re.compile(r"(fastvae[\w-]*)\[([\w,]+)\]")


@pytest.fixture
def project() -> dict[str, Any]:
    """pyproject.toml, read."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def test_one_version(project: dict[str, Any]) -> None:
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastvae._version.__version__"}
    assert fastvae.__version__ == fastvae._version.__version__


def test_extras_are_of_this_distribution(project: dict[str, Any]) -> None:
    """`fastvae` alone is another project on the package index."""
    assert project["project"]["name"] == NAME
    extras = project["project"]["optional-dependencies"]
    named = [match.groups() for match in map(OWN.match, chain(*extras.values())) if match]
    assert named and {name for name, _ in named} == {NAME}
    assert {extra for _, several in named for extra in several.split(",")} <= set(extras)


def test_what_the_guides_name_is_there_where_the_tests_run(project: dict[str, Any]) -> None:
    """Else the tests of these libraries would be skipped everywhere."""
    extras = project["project"]["optional-dependencies"]
    installed = {re.split(r"[^\w-]", line)[0] for line in (*extras["dev"], *extras["docs"], *extras["safetensors"])}
    assert {"accelerate", "lightning", "safetensors", "zarr"} <= installed


def test_changelog_has_the_version() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    form = re.compile(r"## \[(\d+\.\d+\.\d+)\] - (?:unreleased|\d{4}-\d\d-\d\d)")
    matches = [form.fullmatch(line) for line in headings]
    assert all(matches), headings
    found = [tuple(map(int, match[1].split("."))) for match in matches if match]
    assert found == sorted(set(found), reverse=True)
    assert headings[0].startswith(f"## [{fastvae.__version__}]")


def test_wheels_are_built_with_what_is_tested_and_tested_with_the_oldest(project: dict[str, Any]) -> None:
    settings = project["tool"]["cibuildwheel"]
    torch = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch and torch[1] in settings["before-build"].split()
    (oldest,) = [line.removeprefix("torch>=") for line in project["project"]["dependencies"] if line[:5] == "torch"]
    assert f"torch=={oldest}.0" in settings["test-requires"]
    assert f"torch>={oldest}" in project["build-system"]["requires"]


def test_workflows_make_what_the_makefile_has(project: dict[str, Any]) -> None:
    yaml = pytest.importorskip("yaml")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made, pythons = set(), set()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            matrix = job.get("strategy", {}).get("matrix", {})
            pythons |= set(matrix.get("python", ()))
            made |= {
                *matrix.get("target", ()),
                *(line["target"] for line in matrix.get("include", ()) if "target" in line),
            }
            for step in job["steps"]:
                made |= set(re.findall(r"^make (?:-C \S+ )?([\w-]+)", step.get("run", ""), re.MULTILINE))
    assert {"docs", "lint", "test", "test-slow"} <= made <= targets
    said = [line.rpartition(" ")[2] for line in project["project"]["classifiers"] if ":: Python :: 3." in line]
    assert sorted(said) == sorted(pythons)
