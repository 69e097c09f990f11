"""The expansion under torch.compile."""

from __future__ import annotations

from dataclasses import replace

from . import expansion

PEER = replace(expansion.PEER, name="expansion-compile", compiled=True, pair_arrays=(2, 3))
