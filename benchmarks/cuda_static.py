"""What the compiler makes of the CUDA kernels: no GPU is needed, and no time is measured.

    python -m benchmarks.cuda_static [--out benchmarks/results/cuda-static.json]

Compiles csrc/cuda/*.cu for every target with warnings as errors, and reads registers, spills and shared memory from
the assembler, and the instructions of the innermost loops and the widths of loads from the disassembly.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastvae.app.atomic import write_json
from fastvae.app.errors import ConfigError

from .words import duration, markdown, percent

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
KERNELS = tuple(sorted(SOURCES.glob("*.cu")))
EXPANSION = Path(__file__).parent / "double_expansion.cu"
STRICT = ("-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage,--warning-as-error")

# An NVIDIA H200 by its data sheet: fp32 multiply-adds and bytes a second.
MULTIPLY_ADDS, BANDWIDTH = 67e12 / 2, 4.8e12


@dataclass(frozen=True)
class Loop:
    """An innermost loop: how many instructions it has, and of which kinds."""

    instructions: int
    kinds: dict[str, int]

    def share(self, kind: str) -> float:
        return self.kinds.get(kind, 0) / self.instructions


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target, as compiled.

    Attributes:
        name: as in the source, with the number type: `forward<float>`.
        spills: bytes stored to and loaded from local memory for want of registers.
        local: instructions that touch local memory.
        shared: bytes of static shared memory.
        loops: those that multiply and add, by their count of these, most first.
        kinds: its loads and stores, by kind and width in bits.
    """

    name: str
    target: str
    registers: int
    spills: int
    stack: int
    shared: int
    local: int
    loops: list[Loop]
    kinds: dict[str, int]


def tools() -> tuple[str, str]:
    """nvcc and nvdisasm; the latter also comes with Triton.

    Raises:
        ConfigError: one of them is not there.
    """
    nvcc, nvdisasm = shutil.which("nvcc"), shutil.which("nvdisasm")
    if nvdisasm is None and (triton := find_spec("triton")) is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        nvdisasm = str(path) if path.exists() else None
    if nvcc is None or nvdisasm is None:
        raise ConfigError(f"{'nvcc' if nvcc is None else 'nvdisasm (it also comes with triton)'} is not there")
    return nvcc, nvdisasm


def flags_and_targets() -> tuple[list[str], list[str]]:
    """What the extension is compiled with, and the targets that machine code is made for.

    Raises:
        ConfigError: the sources are not there.
    """
    if not SOURCES.is_dir():
        raise ConfigError(f"{SOURCES} is not there: this runs in a checkout")
    words = (SOURCES / "nvcc.txt").read_text().split()
    targets = [found[1] for word in words if (found := re.search(r"code=(sm_\w+)", word))]
    return [word for word in words if not word.startswith("-gencode")], targets


def compile_kernels(target: str, folder: Path, sources: Sequence[Path] = KERNELS) -> Iterator[Kernel]:
    """Every kernel of the sources, for one target.

    Raises:
        ConfigError: a tool is missing, or a source does not compile without a warning.
    """
    nvcc, nvdisasm = tools()
    flags, _ = flags_and_targets()
    for source in sources:
        binary = folder / f"{source.stem}.{target}.cubin"
        code = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
        command = [nvcc, *flags, *STRICT, code, "-cubin", str(source), "-o", str(binary)]
        compiled = subprocess.run(command, capture_output=True, text=True)
        if compiled.returncode:
            raise ConfigError(f"{source.name} for {target}: {compiled.stdout}{compiled.stderr}")
        text = subprocess.run([nvdisasm, "-c", str(binary)], capture_output=True, text=True, check=True).stdout
        sections = dict(re.findall(r"\.section\s+\.text\.(\w+),(.*?)(?=\.section\s|\Z)", text, re.DOTALL))
        for symbol, report in _reports(compiled.stderr):
            yield _kernel(symbol, target, report, sections[symbol])


def _reports(text: str) -> Iterator[tuple[str, str]]:
    """What the assembler says of each kernel, by its symbol."""
    pieces = re.split(r"Compiling entry function '(\w+)'", text)
    yield from zip(pieces[1::2], pieces[2::2], strict=True)


def _kernel(symbol: str, target: str, report: str, code: str) -> Kernel:
    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        return int(found[1]) if found else 0

    instructions, labels = _instructions(code)
    loops = sorted(_inner_loops(instructions, labels), key=lambda loop: -_multiply_adds(loop))
    kinds = Counter(kind for kind in map(_kind, instructions) if kind.startswith(("LD", "ST")))
    return Kernel(
        name=_readable(symbol),
        target=target,
        registers=number(r"Used (\d+) registers"),
        spills=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
        shared=number(r"(\d+) bytes smem"),
        local=sum(count for kind, count in kinds.items() if kind.startswith(("LDL", "STL"))),
        loops=[loop for loop in loops if _multiply_adds(loop)],
        kinds=dict(kinds),
    )


def _multiply_adds(loop: Loop) -> int:
    return sum(loop.kinds.get(kind, 0) for kind in ("FFMA", "DFMA", "DMMA"))


def _readable(symbol: str) -> str:
    """`backward<rows, float>` for what the compiler calls it."""
    found = re.search(r"\d([a-z][a-z_]+)I(?:L.*?SideE(\d)E)?(?:Lb(\d)E)?([fd])(?:Lb(\d)E)?E", symbol)
    if not found:
        return symbol
    name, side, flag, dtype, other = found.groups()
    words = [["rows", "components"][int(side)]] if side else []
    words += [["false", "true"][int(flag)]] if flag else []
    words += [{"f": "float", "d": "double"}[dtype]]
    words += [["false", "true"][int(other)]] if other else []
    return f"{name}<{', '.join(words)}>"


def _instructions(code: str) -> tuple[list[str], dict[str, int]]:
    """The instructions without their predicates, and the place of each label."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(found[1])
    return instructions, labels


def _inner_loops(instructions: Sequence[str], labels: dict[str, int]) -> Iterator[Loop]:
    """Backward jumps that have none of another loop between them and their target."""
    jumps = []
    for i, instruction in enumerate(instructions):
        found = re.match(r"(?:BRA|CALL).*`\((\.L_x_\d+)\)", instruction)
        if found and labels.get(found[1], i + 1) <= i:
            jumps.append((labels[found[1]], i))
    for begin, end in jumps:
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in jumps):
            body = instructions[begin : end + 1]
            yield Loop(len(body), dict(Counter(map(_kind, body))))


def _kind(instruction: str) -> str:
    """FFMA, MUFU, ...; for loads and stores also the width: LDS.128."""
    operation = instruction.split()[0]
    name, *modifiers = operation.split(".")
    if name in ("LDS", "STS", "LDG", "STG", "LDGSTS", "LDL", "STL"):
        return f"{name}.{next((m for m in modifiers if m in ('64', '128')), '32')}"
    return name


def floors(M: int, K: int, D: int) -> dict[str, float]:
    """The least time on an H200 by its data sheet, seconds: by issue slots, and for moving each number once."""
    return {
        "forward_arithmetic": 2 * M * K * D / MULTIPLY_ADDS,
        "forward_memory": 4 * (M * D + 2 * K * D + K + M) / BANDWIDTH,
        # backward computes the squares again for each side; then 3 slots an element for z, and 4 for the parameters
        "backward_arithmetic": (2 + 3 + 2 + 4) * M * K * D / MULTIPLY_ADDS,
    }


def record() -> dict[str, Any]:
    """Everything, for every target."""
    nvcc, _ = tools()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", version)
    with TemporaryDirectory() as folder:
        kernels = [k for target in flags_and_targets()[1] for k in compile_kernels(target, Path(folder))]
        (expansion,) = compile_kernels("sm_90a", Path(folder), [EXPANSION])
    shapes = ((4096, 50000, 64), (1024, 25000, 40))
    return {
        "nvcc": found[1] if found else version,
        "floors": [{"M": M, "K": K, "D": D, **floors(M, K, D)} for M, K, D in shapes],
        "kernels": [asdict(kernel) for kernel in kernels],
        "double_expansion": asdict(expansion),
    }


def kernel_table(content: dict[str, Any]) -> str:
    """The kernels that matter, as Markdown: one row for each target."""
    rows = []
    for kernel in content["kernels"]:
        if kernel["name"] in _SHOWN:
            fma = [loop["kinds"].get("FFMA", 0) / loop["instructions"] for loop in kernel["loops"]]
            kinds = kernel["kinds"]
            rows.append(
                [
                    f"`{kernel['name']}`",
                    kernel["target"],
                    str(kernel["registers"]),
                    str(kernel["spills"]),
                    percent(max(fma, default=None)),
                    *(str(kinds.get(kind, 0)) for kind in ("LDGSTS.128", "LDS.128", "LDG.128", "LDG.64", "LDG.32")),
                ]
            )
    headings = ["kernel", "target", "registers", "bytes spilled", "FFMA in the innermost loop"]
    return markdown([*headings, "LDGSTS.128", "LDS.128", "LDG.128", "LDG.64", "LDG.32"], rows, left=2)


_SHOWN = ("forward<float>", "backward<rows, float>", "backward<components, float>", "rsample<float, true>")


def floor_table(content: dict[str, Any]) -> str:
    """The floors, as Markdown."""
    rows = [
        [f"({f['M']}, {f['K']}, {f['D']})"]
        + [duration(f[name]) for name in ("forward_arithmetic", "forward_memory", "backward_arithmetic")]
        for f in content["floors"]
    ]
    return markdown(["(M, K, D)", "forward, multiply-adds", "forward, memory", "all gradients, issue slots"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the compiler makes of the CUDA kernels.")
    parser.add_argument("--out", type=Path, help="write the record to this file, too")
    out = parser.parse_args().out
    content = record()
    for kernel in content["kernels"]:
        share = max((loop["kinds"].get("FFMA", 0) / loop["instructions"] for loop in kernel["loops"]), default=0.0)
        print(
            f"{kernel['target']:8} {kernel['name']:36} {kernel['registers']:4} registers"
            f" {kernel['spills']:3} bytes spilled {100 * share:4.0f} % FFMA in the innermost loop"
        )
    if out is not None:
        write_json(out, content)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        raise SystemExit(f"cuda_static: {error}") from None
