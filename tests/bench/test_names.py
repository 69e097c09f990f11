"""The benchmarks have one name, need nothing of the app, and are there in a checkout that is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.patience import PATIENCE

ROOT = Path(__file__).parents[2]
EVERY_MODULE = """
import pkgutil, sys
import fastvae.benchmarks
for module in pkgutil.walk_packages(fastvae.benchmarks.__path__, "fastvae.benchmarks."):
    __import__(module.name)
names = [name for name, module in sys.modules.items() if name.startswith("fastvae.benchmarks")]
assert len(names) > 25, names
assert not [name for name in sys.modules if name.partition(".")[0] == "benchmarks"]
print(*[name for name in sys.modules if name.startswith("fastvae.app")])
"""


def python(script: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, *options, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_no_module_needs_the_app() -> None:
    done = python(EVERY_MODULE)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_the_commands_load_the_benchmarks_only_when_they_measure() -> None:
    pytest.importorskip("typer")
    script = "import sys, fastvae.app.commands; print([n for n in sys.modules if n.startswith('fastvae.benchmarks')])"
    done = python(script)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr


def test_a_second_name_is_refused() -> None:
    done = python("import benchmarks.record")
    assert done.returncode != 0 and "import the benchmarks as fastvae.benchmarks, not as benchmarks" in done.stderr


def test_a_checkout_that_only_stands_on_the_path_has_them() -> None:
    """As on a machine where nothing can be installed: without `site` an editable install is not looked at."""
    packages = Path(torch.__file__).parents[1]
    script = "import fastvae.benchmarks.suites, tools.gpu.stages; print(fastvae.benchmarks.__file__)"
    done = python(script, "-S", PYTHONPATH=os.pathsep.join(map(str, (ROOT, packages))))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == ROOT / "benchmarks" / "__init__.py"
