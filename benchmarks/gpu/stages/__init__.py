"""Every file here is a stage: a module with STAGE.  A new file is found by being here."""

from __future__ import annotations

import importlib
import pkgutil

from ..stage import Stage


def all_stages() -> list[Stage]:
    """Every stage of this folder, in order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    stages = [importlib.import_module(f"{__name__}.{name}").STAGE for name in names]
    return sorted(stages, key=lambda stage: stage.order)
