"""Build the extension where there is none that runs here: python -m tools.gpu.build [--aside DIR]

One that is there and loads serves every torch from 2.10 and every Python: a machine may be given it ready-built.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from .stage import ROOT

ASK = """
import sys, torch
from fastvae.backends import native
on_gpu = sys.argv[1] == "gpu"
print(native.missing_on_cuda(torch.device("cuda")) if on_gpu else native.cuda_not_built())
"""


def missing(on_gpu: bool) -> str | None:
    """Why there is no extension that runs, or None; on a machine without a GPU it is enough that it has CUDA kernels.

    A process of its own asks, because an extension of other sources may keep the library from being imported.
    """
    command = [sys.executable, "-c", ASK, "gpu" if on_gpu else "dry"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    told = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    last = told[-1] if told else f"Python ended with {done.returncode}"
    return None if last == "None" else last


def main(arguments: list[str]) -> int:
    """0 if there is an extension that runs, as far as can be told here."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.build", description=__doc__.split("\n")[0])
    parser.add_argument("--aside", type=Path, help="a dry run: CUDA kernels need not run, and what is built goes there")
    options = parser.parse_args(arguments)
    if (why := missing(on_gpu=options.aside is None)) is None:
        print("the extension is there, and loads")
        return 0
    place = ["--inplace"]
    if options.aside:
        place = ["--build-lib", str(options.aside), "--build-temp", str(options.aside / "temp")]
    code = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", *place], cwd=ROOT).returncode
    print(f"{'not ' * (code != 0)}built, because {why}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
