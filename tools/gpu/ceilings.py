"""What the GPU at hand can do, measured beside what it does: multiply-adds, TF32 products, copied bytes, a second."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .clocks import Clock


@triton.jit
def multiply_add_kernel(x, STEPS, BLOCK: tl.constexpr):
    """Chains of multiply-adds, 16 of them in each thread, all in registers."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at)
    b = a * 0.5
    for _ in range(0, STEPS):
        for _ in tl.static_range(8):
            a = a * b + b
    tl.store(x + at, a)


def multiply_add_rate(clock: Clock, device: str, steps: int = 4096, programs: int = 132 * 16) -> float:
    """Flops a second of fp32 multiply-adds, two each."""
    block = 2048
    x = torch.rand(programs * block, device=device)

    def run() -> None:
        multiply_add_kernel[(programs,)](x, steps, BLOCK=block, num_warps=4, enable_fp_fusion=True)

    run()
    return 2 * 8 * steps * x.numel() / clock(run, 3)


def tf32_rate(clock: Clock, device: str, n: int = 8192) -> float:
    """Flops a second of a TF32 matrix product of random numbers, by PyTorch."""
    a, b = torch.randn(2, n, n, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        a @ b
        return 2 * n**3 / clock(lambda: a @ b, 5)
    finally:
        torch.set_float32_matmul_precision(before)


def copy_rate(clock: Clock, device: str, count: int = 1 << 29) -> float:
    """Bytes read and written a second by a copy of float32 numbers."""
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 8 * count / clock(lambda: target.copy_(source), 5)
