"""How much memory there is."""

from __future__ import annotations

import os


def physical_memory() -> int | None:
    """The bytes of this machine's memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
