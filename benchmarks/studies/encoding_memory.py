"""How much memory a training step takes with K pseudo-inputs, encoded in chunks or at once."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

SIZES = (500, 5_000, 50_000)
_STEP = """
import sys, torch, fastvae
from fastvae._networks import BinaryDecoder, Encoder

K, chunk_size = int(sys.argv[1]), int(sys.argv[2]) or None
encoder, decoder = Encoder(784, 300, 40), BinaryDecoder(784, 300, 40)
vae = fastvae.VAE(encoder, decoder, fastvae.VampPrior(encoder, torch.rand(K, 784), chunk_size=chunk_size))
optimizer = torch.optim.Adam(vae.parameters(), fused=True)
for _ in range(2):
    optimizer.zero_grad()
    vae(torch.rand(100, 784).round()).loss.backward()
    optimizer.step()
with open("/proc/self/status") as file:
    print(next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")))
"""


def study() -> dict[str, Any]:
    """Peak of a process that takes two steps with K pseudo-inputs of 784 pixels, in chunks and at once."""
    rows = []
    for K in SIZES:
        for chunk_size in (1000, 0):
            command = [sys.executable, "-c", _STEP, str(K), str(chunk_size)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append({"K": K, "chunk_size": chunk_size or None, "peak_bytes": int(done.stdout)})
            print(rows[-1], flush=True)
    return {"rows": rows}
