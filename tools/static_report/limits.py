"""The limits of an H200, by its datasheet, and which of them binds a kernel."""

from __future__ import annotations

from collections.abc import Mapping

# A second, on an H200 (SXM): 132 multiprocessors at 1.98 GHz.
MULTIPROCESSORS, CLOCK = 132, 1.98e9
RATES: Mapping[str, float] = {
    "fp32": MULTIPROCESSORS * 128 * CLOCK,  # instructions: additions, products or multiply-adds
    "exp2": MULTIPROCESSORS * 16 * CLOCK,
    "fp16": 990e12,  # flops of dense matrix products
    "fp64": 67e12,  # the same, in float64
    "fp64 issue": MULTIPROCESSORS * 64 * CLOCK,  # instructions, as fp32
    "fill": MULTIPROCESSORS * 64 * CLOCK,  # bytes that the multiprocessors take from the L2 cache
    "memory": 4.8e12,  # bytes
}
NAMES = {
    "fp32": "fp32 issue",
    "exp2": "exponentials",
    "fp16": "fp16 tensor cores",
    "fp64": "fp64 tensor cores",
    "fp64 issue": "fp64 issue",
    "fill": "L2 cache",
    "memory": "memory",
}


def floor(work: Mapping[str, float]) -> tuple[float, str] | None:
    """(the minimal seconds of a launch, what binds it); None where the work is not known."""
    if not work:
        return None
    seconds = {name: amount / RATES[name] for name, amount in work.items()}
    binding = max(seconds, key=seconds.__getitem__)
    return seconds[binding], NAMES[binding]


# (registers, shared memory in bytes, threads, blocks) of a multiprocessor, and what a block may take of shared memory.
MULTIPROCESSOR = {80: (65536, 164 << 10, 2048, 32), 90: (65536, 228 << 10, 2048, 32), 100: (65536, 228 << 10, 2048, 32)}
SHARED_OF_A_BLOCK = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
RESERVED = 1 << 10  # bytes of shared memory that every block takes beside its own


def blocks_at_once(arch: int, registers: int, threads: int, shared: int) -> int:
    """How many blocks a multiprocessor holds; 0 if a block asks for too much."""
    all_registers, all_shared, all_threads, all_blocks = MULTIPROCESSOR[arch]
    if shared > SHARED_OF_A_BLOCK[arch]:
        return 0
    of_a_warp = -(-registers * 32 // 256) * 256  # registers are handed out by 256
    by_registers = all_registers // (of_a_warp * (threads // 32))
    return min(by_registers, all_shared // (shared + RESERVED), all_threads // threads, all_blocks)
