"""What the machine code of a kernel holds, by NVIDIA's cuobjdump: the one of Triton's package, or the one on PATH."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from fastvae.benchmarks.errors import BenchmarkError

from .kernel import Kernel

MATRIX = ("HGMMA", "HMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA", "QGMMA")
_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.M)
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.M)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_MEMORY = ("LDG", "STG", "LDGSTS", "LDS", "LDSM", "STS", "LDL", "STL")
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Loop:
    """An innermost loop: how many instructions it has, and of which kinds: FFMA, MUFU, LDS.128, ..."""

    instructions: int
    kinds: Counter[str]

    def share(self, kind: str) -> float:
        return self.kinds[kind] / self.instructions

    @property
    def multiply_adds(self) -> int:
        return sum(self.kinds[kind] for kind in ("FFMA", "DFMA", "DMMA"))


@dataclass(frozen=True)
class Code:
    """A kernel's machine code, counted over the whole of it, each instruction once however often it runs.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread, which is where spilled registers go.
        local: bytes of local memory of a thread beside the stack.
        instructions: by opcode, without modifiers.
        loads, stores: of global memory, by width in bytes of a thread; asynchronous copies are loads.
        local_accesses: loads from and stores to local memory.
        exp2: exponentials.
        memory: what touches memory, by opcode and width in bits of a thread: LDS.128, LDG.32, ...
        loops: those that multiply and add, most of these first.
    """

    registers: int
    stack: int
    local: int
    instructions: Counter[str]
    loads: Counter[int]
    stores: Counter[int]
    local_accesses: int
    exp2: int
    memory: Counter[str]
    loops: list[Loop]

    @property
    def matrix(self) -> dict[str, int]:
        """Matrix instructions by opcode; HGMMA is wgmma, UTCHMMA is tcgen05."""
        return {name: self.instructions[name] for name in MATRIX if self.instructions[name]}

    @property
    def wide_loads(self) -> float:
        """The share of 16-byte loads in the bytes that the load instructions load."""
        total = sum(width * count for width, count in self.loads.items())
        return sum(width * count for width, count in self.loads.items() if width >= 16) / total if total else 1.0


def read(kernel: Kernel) -> Code:
    """Disassemble a kernel.

    Raises:
        BenchmarkError: there is no cuobjdump, or it cannot read the machine code.
    """
    found = _usage(kernel.cubin)
    name = kernel.function or next(iter(found), None)
    if name is None or name not in found or (kernel.function is None and len(found) != 1):
        held = ", ".join(found) or "none"
        raise BenchmarkError(f"{kernel.name}: the machine code should hold one kernel, it has {held}")
    registers, stack, _, local = found[name]
    instructions = _INSTRUCTION.findall(_listings(kernel.cubin).get(name, ""))
    if not instructions:
        raise BenchmarkError(f"{kernel.name}: cuobjdump shows no instructions")
    parts = [opcode.split(".") for _, opcode, _ in instructions]
    kinds = [_kind(*each) for each in parts]
    loops = sorted(_inner_loops(instructions, kinds), key=lambda loop: -loop.multiply_adds)
    return Code(
        registers,
        stack,
        local,
        Counter(head for head, *_ in parts),
        _widths(parts, "LDG", "LDGSTS"),
        _widths(parts, "STG"),
        sum(head in ("LDL", "STL") for head, *_ in parts),
        sum(head == "MUFU" and "EX2" in rest for head, *rest in parts),
        Counter(kind for (head, *_), kind in zip(parts, kinds, strict=True) if head in _MEMORY),
        [loop for loop in loops if loop.multiply_adds],
    )


def functions(cubin: bytes) -> list[str]:
    """The kernels in it, by their symbols."""
    return list(_usage(cubin))


@lru_cache(maxsize=64)  # which is asked for all sources first, and is short
def _usage(cubin: bytes) -> dict[str, list[int]]:
    """Of each kernel: registers, stack, shared and local memory."""
    usage = _run_on(cubin, "-res-usage")
    return {match[1]: [int(n) for n in match.groups()[1:]] for match in _USAGE.finditer(usage)}


@lru_cache(maxsize=4)
def _listings(cubin: bytes) -> dict[str, str]:
    """The instructions of each kernel."""
    _, *parts = _FUNCTION.split(_run_on(cubin, "-sass"))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _run_on(cubin: bytes, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return run(option, path)


def _kind(head: str, *modifiers: str) -> str:
    if head not in _MEMORY or head == "LDSM":  # matrices, all lanes together
        return head
    return f"{head}.{next((m for m in modifiers if m in ('64', '128', '256')), '32')}"


def _inner_loops(instructions: list[tuple[str, str, str]], kinds: list[str]) -> Iterator[Loop]:
    """Backward jumps that have none of another loop between them and their target."""
    place = {int(address, 16): i for i, (address, _, _) in enumerate(instructions)}
    jumps = []
    for i, (_, opcode, operands) in enumerate(instructions):
        target = _TARGET.search(operands) if opcode.split(".")[0] == "BRA" else None
        if target and (begin := place[int(target[1], 16)]) < i:
            jumps.append((begin, i))
    for begin, end in jumps:
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in jumps):
            yield Loop(end + 1 - begin, Counter(kinds[begin : end + 1]))


def _widths(parts: list[list[str]], *heads: str) -> Counter[int]:
    widths = {"64": 8, "128": 16, "256": 32, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return Counter(
        next((widths[modifier] for modifier in rest if modifier in widths), 4) for head, *rest in parts if head in heads
    )


@cache
def _tool() -> str:
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        shipped = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if shipped.is_file():
            return str(shipped)
    found = shutil.which("cuobjdump")
    if found is None:
        raise BenchmarkError("there is no cuobjdump: it comes with Triton and with the CUDA toolkit")
    return found


def run(*arguments: str | Path, folder: str | None = None) -> str:
    """What cuobjdump says, run in a folder.

    Raises:
        BenchmarkError: there is no cuobjdump, or it fails.
    """
    done = subprocess.run([_tool(), *map(str, arguments)], capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode != 0:
        raise BenchmarkError(f"cuobjdump {' '.join(map(str, arguments))} failed: {done.stderr.strip()}")
    return done.stdout
