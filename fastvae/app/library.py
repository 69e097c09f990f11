"""Importing fastvae itself, and with it PyTorch, once the options are known to be right."""

from __future__ import annotations

import sys


def import_library() -> None:
    """Run the file of the package fastvae, if the command's entry point (`fastvae_command`) put that off."""
    package = sys.modules["fastvae"]
    spec = package.__spec__
    if not hasattr(package, "__version__"):
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(package)
