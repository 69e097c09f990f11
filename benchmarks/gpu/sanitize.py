"""The test of the CUDA kernels that needs a GPU, under each tool of compute-sanitizer that applies."""

from __future__ import annotations

import subprocess
import sys

TOOLS = ("memcheck", "racecheck")
TEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/backends/test_cuda.py", "-k", "a_gpu_gives"]


def main() -> int:
    """0 if no tool finds anything."""
    codes = []
    for tool in TOOLS:
        print(f"{tool}:", flush=True)
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, *TEST]
        codes.append(subprocess.run(command).returncode)
    print(", ".join(f"{tool}: {'clean' if code == 0 else 'failed'}" for tool, code in zip(TOOLS, codes, strict=True)))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
