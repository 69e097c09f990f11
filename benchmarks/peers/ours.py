"""fastvae itself: as it comes, each instruction set by name, without skipping, in plain PyTorch, in Triton, in CUDA."""

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
    *(
        replace(
            _variant,
            name=f"fastvae-triton-{precision}",
            log_prob=partial(fastvae.mixture_log_prob, impl="triton", precision=precision),
            needs=("triton",),
            allowed_error=error,
        )
        for precision, error in (("highest", 1e-3), ("high", 1e-2), ("medium", 1.0))
    ),
    replace(_variant, name="fastvae-cuda", log_prob=partial(fastvae.mixture_log_prob, impl="cuda"), devices=("cuda",)),
    *(replace(_variant, name=f"fastvae-{isa}", devices=("cpu",), environment={"FASTVAE_CPU_ISA": isa}) for isa in ISAS),
)
