"""What is built and what runs where."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

import torch

from fastvae._version import __version__
from fastvae.backends import native
from fastvae.backends.registry import BACKENDS, choose


class Info(dict[str, str]):
    """What is built and what runs where; printed, a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in self.items())


def info() -> Info:
    """What is built, which backend `impl=None` takes on which device, which backends there are, and the versions."""
    lines = {
        "fastvae": __version__,
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "extension": "built" if native.extension_missing is None else "missing",
    }
    for device in ("cpu", "cuda", "other devices"):
        named = torch.device("meta" if device == "other devices" else device)
        there = device != "cuda" or torch.cuda.is_available()
        lines[f"on {device}"] = _default(choose(None, named)) if there else "PyTorch finds no device"
    for backend in BACKENDS.values():
        if backend.precision == "highest":
            lines[f"impl={backend.impl!r}"] = _status(backend.impl)
    lines["FASTVAE_CPU_ISA"] = os.environ.get("FASTVAE_CPU_ISA", "not set")
    return Info(lines)


def _default(impl: str) -> str:
    records = BACKENDS[impl].measured_in
    return f"impl={impl!r} by default" + (f", by the records {', '.join(records)}" if records else "")


def _status(impl: str) -> str:
    """What a backend is, or why it is missing on the device that it is made for."""
    backend = BACKENDS[impl]
    why = backend.missing(torch.device(backend.devices[0] if backend.devices else "cpu"))
    if why is not None:
        return f"missing: {why}"
    if impl == "cpu":
        return f"{backend.about} ({torch.ops.fastvae.cpu_isa()}, {torch.get_num_threads()} threads)"
    precisions = [other.precision for other in BACKENDS.values() if other.impl == impl]
    return backend.about + (f"; precision {', '.join(precisions)}" if len(precisions) > 1 else "")


def _version_of(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else "not installed"
