"""Every file here is a family: a module with FAMILY.  A new file is found by being here."""

from __future__ import annotations

import importlib
import pkgutil

from ..kernel import Family


def all_families() -> dict[str, Family]:
    """Every family of this folder by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    found = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return {family.name: family for family in found}
