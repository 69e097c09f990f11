"""The same under torch.compile, which fuses M x K x D away in forward."""

from __future__ import annotations

from dataclasses import replace

from . import eager

PEER = replace(eager.PEER, name="eager-compile", compiled=True, full_arrays=(0, 1), pair_arrays=(1, 3))
