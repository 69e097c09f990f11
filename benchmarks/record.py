"""The record of a run: JSON that is whole at every moment, and grows case by case."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastvae
from fastvae import backends
from fastvae._files import whole_file

from .errors import BenchmarkError
from .timing import Settings

FORMAT = 1
_MEASURING = ("case", "inputs", "memory", "peer", "probe", "timing")  # with the cases and the peers
_PACKAGES = {"keops": "pykeops", "scikit-learn": "scikit-learn", "numpy": "numpy", "triton": "triton"}


class Record:
    """A run's results and what they depend on.

    Attributes:
        path: the JSON file.
        content: what it holds: "machine", "versions", "code", "settings" and "cases", by key.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.content = content

    @property
    def cases(self) -> dict[str, Any]:
        """The results so far, by the key of their case."""
        cases: dict[str, Any] = self.content["cases"]
        return cases

    def holds(self, key: str, asked: tuple[str, ...]) -> bool:
        """Whether a case is there, with these contenders."""
        return key in self.cases and self.cases[key]["asked"] == list(asked)

    def add(self, key: str, result: Mapping[str, Any]) -> None:
        """Put a case's results in, and write the file."""
        self.cases[key] = dict(result)
        write_record(self.path, self.content)


def open_record(path: Path, device: str, settings: Settings, *, overwrite: bool = False) -> Record:
    """Begin a record, or go on with the one at `path`.

    Raises:
        BenchmarkError: `path` holds what is no record, or one by other code, on another machine or with other settings.
    """
    fresh = {
        "format": FORMAT,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "machine": machine(device),
        "versions": versions(),
        "code": code(device),
        "settings": asdict(settings),
        "cases": {},
    }
    if path.exists() and not overwrite:
        old = read_record(path).content
        for part in ("device", "machine", "versions", "code", "settings"):
            if _identity(old.get(part)) != _identity(fresh[part]):
                raise BenchmarkError(
                    f"{path} is from another run, with {_difference(part, old.get(part), fresh[part])}; "
                    "say --overwrite to begin it anew, or another --out."
                )
        return Record(path, old)
    path.parent.mkdir(parents=True, exist_ok=True)
    return Record(path, fresh)


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        BenchmarkError: there is none, or it is damaged or of another format.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise BenchmarkError(f"there is no record {path}") from error
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} is not a record of a benchmark ({error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "cases" not in content:
        raise BenchmarkError(f"{path} is not a record of a benchmark in format {FORMAT}")
    return Record(path, content)


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` as JSON, whole or not at all, with a line for each entry of each of its parts.

    A line a case keeps a record short and its changes readable.  NaN and infinity, which JSON lacks, are refused.
    """
    with whole_file(path) as file:
        file.write((_in_lines(content, 2) + "\n").encode())


def _in_lines(content: Any, depth: int) -> str:
    """JSON that starts a line for each entry down to a depth."""
    if depth and content and isinstance(content, Mapping):
        entries = [f"{json.dumps(name)}:{_in_lines(value, depth - 1)}" for name, value in content.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    if depth and content and isinstance(content, list):
        return "[\n" + ",\n".join(_in_lines(value, depth - 1) for value in content) + "\n]"
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def machine(device: str) -> dict[str, Any]:
    """What it runs on."""
    described = {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }
    if device.startswith("cuda"):
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def versions() -> dict[str, str]:
    """The versions of what is compared; packages that are not installed are left out."""
    found = {"fastvae": fastvae.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name, package in _PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found


def code(device: str) -> dict[str, Any]:
    """Which code was measured: commit, whether files differ from it, digest of library and benchmarks, default backend.

    The digest alone distinguishes two uncommitted versions, and is there without a checkout too.
    """
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for file in measured_files():
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    revision = _git(here, "rev-parse", "HEAD")
    # A record that is being written, and tables made from it, do not change what is measured.
    changed = _git(here, "status", "--porcelain", "--", ":/", ":!/benchmarks/results", ":!/docs", ":!/README.md")
    return {
        "commit": revision,
        "dirty": None if changed is None else bool(changed),
        "digest": digest.hexdigest()[:16],
        "default": default_backend(device),
    }


def measured_files() -> list[Path]:
    """The library without its command line, the extension, and what measures them."""
    here, library = Path(__file__).resolve().parent, Path(fastvae.__file__).parent
    rooms = [library, *(room for room in library.iterdir() if room.is_dir() and room.name not in ("app", "benchmarks"))]
    files = [file for room in rooms for file in room.glob("*.py")]
    files += [*library.glob("_C*.so"), *here.glob("*.cpp"), *here.glob("peers/*.py"), *here.glob("*_cases.py")]
    files += [here / f"{name}.py" for name in _MEASURING]
    return sorted(files, key=lambda file: (file.parent.name, file.name))


def default_backend(device: str) -> str:
    """What runs on a device where no backend is named: "cuda", or on the CPU "cpu, avx512"."""
    chosen = backends.choose(None, torch.device(device))
    return f"{chosen}, {torch.ops.fastvae.cpu_isa()}" if chosen == "cpu" else chosen


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None where this is no checkout of fastvae."""
    try:
        if not (folder.parent / ".git").exists():
            return None
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _identity(part: Any) -> Any:
    """What has to be equal for a record to be continued: of the code its digest, whatever the commit."""
    return part["digest"] if isinstance(part, dict) and "digest" in part else part


def _difference(part: str, old: Any, new: Any) -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        names = ["digest"] if "digest" in old else [*new, *old]
        name = next(name for name in names if old.get(name) != new.get(name))
        return f"{part} {name} {old.get(name)} where it is {new.get(name)} now"
    return f"{part} {old} where it is {new} now"
