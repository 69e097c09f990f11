"""The CUDA kernels under the tools of compute-sanitizer that apply, side by side: python -m tools.gpu.sanitize

One that does not end in its time says so, and costs the others nothing.  A dry run does the same work without the
tools, by composite.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

TOOLS = ("memcheck", "racecheck")
SECONDS = 40.0  # for both; the stage has a little more
EXERCISE = [sys.executable, "-m", "tools.gpu.exercise"]


def command(tool: str) -> list[str]:
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *EXERCISE]


def watched(commands: dict[str, list[str]], seconds: float) -> dict[str, str]:
    """Run them at once; what became of each by its name: clean, failed, or out of time."""
    running = {
        name: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name, command in commands.items()
    }
    end, found = time.monotonic() + seconds, {}
    for name, process in running.items():
        try:
            told, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
            found[name] = "clean" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            process.kill()
            told, _ = process.communicate()
            found[name] = f"did not end in {seconds:.0f} s"
        print(f"{name}:\n{told}", flush=True)
    return found


def main(arguments: list[str]) -> int:
    """0 if every tool ended and found nothing."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.sanitize", description=__doc__.split(":")[0])
    parser.add_argument("--dry-run", action="store_true", help="without a GPU and without the tools")
    options = parser.parse_args(arguments)
    dry = {"no tool": [*EXERCISE, "--impl", "composite", "--device", "cpu"]}
    found = watched(dry, 10 * SECONDS) if options.dry_run else watched({t: command(t) for t in TOOLS}, SECONDS)
    print(", ".join(f"{name}: {status}" for name, status in found.items()))
    return int(any(status != "clean" for status in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
