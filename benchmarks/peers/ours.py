"""fastvae itself: as it comes, each instruction set by name, without skipping, and in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import fastvae

from ..peer import Peer

ISAS = ("baseline", "avx2", "avx512")

_fastvae = Peer("fastvae", fastvae.mixture_log_prob, ours=True)
_variant = replace(_fastvae, on_request=True)

PEERS = (
    _fastvae,
    replace(_variant, name="fastvae-dense", log_prob=partial(fastvae.mixture_log_prob, dense_backward=True)),
    replace(_variant, name="fastvae-composite", log_prob=partial(fastvae.mixture_log_prob, impl="composite")),
    *(replace(_variant, name=f"fastvae-{isa}", devices=("cpu",), environment={"FASTVAE_CPU_ISA": isa}) for isa in ISAS),
)
