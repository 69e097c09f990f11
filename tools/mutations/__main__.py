"""Which tier of the tests catches which mistake: `python -m tools.mutations`, in an environment that runs the tests.

Each mutation of table.py is applied to a copy of the tree, alone; what it touches is built again; and of the tests that
should notice the fast tier runs first, then the rest.  Exits with 1 if a mutation is caught by neither.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fastvae.benchmarks.record import code, write_record

from .table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "results", "runs", "dist", "*.egg-info")
# By the folder of what is mutated: the tests that run it, by their names, and of these the marked ones.
SELECTION = {
    "kernels/": ("triton", "triton"),
    "csrc/cuda/": ("emulated or cuda", "emulated"),
    "csrc/cpu/": ("not composite and not triton and not emulated", "emulated or slow"),
    "fastvae/": ("not triton and not emulated", "slow"),
}
CHECK = """
import fastvae, pathlib
from fastvae.backends import triton
here = pathlib.Path.cwd()
for file in (fastvae.__file__, triton.load("tiles").__file__):
    assert here in pathlib.Path(file).parents, f"{file} would be tested, and not what is in {here}"
"""


class ToolError(Exception):
    """A mutation that says nothing: it cannot be applied, built or run."""


def copy_tree(folder: Path) -> None:
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT, symlinks=True)
    call(folder, "-c", CHECK)


def call(folder: Path, *arguments: str) -> str:
    """What Python says, run in the copy; a failure is an error of the tool."""
    done = python(folder, *arguments)
    if done.returncode:
        raise ToolError(done.stdout[-3000:])
    return done.stdout


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {"PYTHONPATH": str(folder), "FASTVAE_CUDA": "0", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | variables,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def build(folder: Path) -> None:
    """The compiled kernels, of which ninja makes what has changed; the emulations build themselves."""
    call(folder, "setup.py", "-q", "build_ext", "--inplace")


def mutated(mutation: Mutation) -> str:
    text = (ROOT / mutation.file).read_text()
    if (found := text.count(mutation.old)) != 1:
        raise ToolError(f"{mutation.file} has {found} times, and not once: {mutation.old}")
    return text.replace(mutation.old, mutation.new)


def caught(folder: Path, tests: list[str], *selection: str) -> str | None:
    """The first test that fails, or None."""
    done = python(folder, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *selection, *tests)
    if done.returncode in (0, 5):  # 5: nothing was selected
        return None
    first = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - |$)", done.stdout, re.M)
    if done.returncode != 1 or not first:
        if "Fatal Python error" in done.stdout or done.returncode < 0:
            return "the process dies"
        raise ToolError(done.stdout[-3000:])
    return first[1]


def judge(folder: Path, mutation: Mutation) -> tuple[str, str]:
    """(the tier that catches it, the test)."""
    target = folder / mutation.file
    before = target.read_text()
    try:
        target.write_text(mutated(mutation))
        if mutation.file.startswith("csrc/cpu"):
            build(folder)
        tests = list(dict.fromkeys(mutation.tests))
        names, marks = next(found for start, found in SELECTION.items() if mutation.file.startswith(start))
        for tier, selection in (("fast", "--fast"), ("full", f"-m={marks}")):
            if test := caught(folder, tests, "-k", names, selection):
                return tier, test
        return "none", ""
    finally:
        target.write_text(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--record", type=Path, help="a JSON file to write what was found to, for the tables")
    parser.add_argument("--check", action="store_true", help="only whether each mutation can be applied")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if re.search(options.only, m.name)]
    for mutation in chosen:
        mutated(mutation)
    if options.check or not chosen:
        print(f"{len(chosen)} mutations can be applied")
        return int(not chosen)
    found: dict[str, dict[str, str]] = {}
    print("| mutation | file | why it is wrong | tier | test |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="mutations") as scratch:
        folder = Path(scratch, "tree")
        copy_tree(folder)
        if any(m.file.startswith("csrc/cpu") for m in chosen):
            build(folder)
        for mutation in chosen:
            tier, test = judge(folder, mutation)
            found[mutation.name] = {"file": mutation.file, "why": mutation.why, "tier": tier, "test": test}
            print(f"| {mutation.name} | {mutation.file} | {mutation.why} | {tier} | {test} |", flush=True)
    if options.record:
        write_record(options.record, {"code": {"commit": code("cpu")["commit"]}, "mutations": found})
    return int(any(one["tier"] == "none" for one in found.values()))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolError as error:
        sys.exit(f"mutations: {error}")
