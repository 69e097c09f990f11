"""The CUDA kernels: csrc/cuda/*.cu, compiled as for the extension, but warnings are errors, and so is a spill."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from fastvae.benchmarks.errors import BenchmarkError

from .. import disassembly, limits
from ..kernel import Family, Kernel

TOOLS = Path(__file__).resolve().parents[2]
SOURCES = TOOLS.parent / "csrc" / "cuda"
EXPANSION = TOOLS / "experiments" / "double_expansion.cu"  # for one generation, and not part of the extension

LARGE = (4096, 50_000, 64)
NARROW = (1000, 50_000, 40)  # where backward has fewer dimensions a lane
TRAINED = (1024, 25_000, 40)  # where few pairs count
WIDE = (4096, 50_000, 128)  # where the sums of all features are those of one slice
SMALL = (100, 500, 40)
GAUSSIAN = (16_384, 256)

PRODUCTS = ("product_forward<", "weighted_sums<", "sliced_sums<", "screened_sums<")  # the kernels of the product form

# Of a block, in bytes: the size of each kernel's struct Shared, which the machine code does not tell.
# tests/machine_code/test_cuda_kernels.py compares it with what is launched.
SHARED: Mapping[str, int] = {
    **{f"{forward}<{dtype}>": 67_584 for forward in ("forward", "forward_wide") for dtype in ("float", "double")},
    **{f"backward<rows, float, {lane}>": 78_096 for lane in (2, 3, 4)},
    **{f"backward<rows, double, {lane}>": 61_968 for lane in (2, 3, 4)},
    **{f"backward<components, float, {lane}>": 79_120 for lane in (2, 3, 4)},
    **{f"backward<components, double, {lane}>": 62_480 for lane in (2, 3, 4)},
    # of the product form at D = 64, by the parts of a feature, whether rows stay there, whether pairs are certified
    **{"product_forward<2, true, false>": 94_208, "product_forward<2, false, false>": 61_440},
    **{"product_forward<1, true, false>": 70_144, "product_forward<1, false, false>": 70_144},
    **{"product_forward<2, true, true>": 89_616, "product_forward<2, false, true>": 56_848},
    **{f"weighted_sums<2, {rows}, false>": 101_376 for rows in ("true", "false")},
    **{f"weighted_sums<1, {rows}, false>": 52_224 for rows in ("true", "false")},
    **{"weighted_sums<2, false, true>": 69_648, "weighted_sums<2, true, true>": 86_032},
    # at D = 128 with 99 KiB at most: with more, the lines of the own items stay there in "high" as well
    **{f"sliced_sums<{parts}, {rows}>": 100_352 for parts in (1, 2) for rows in ("true", "false")},
    **{"screened_sums<true>": 67_600, "screened_sums<false>": 100_880},  # by whether own items are rows, at D = 64
    **{f"small_rows<float, {whole}, 1>": 73_808 for whole in ("true", "false")},
    **{f"small_rows<float, {whole}, 4>": 95_520 for whole in ("true", "false")},
    **{f"small_rows<double, {whole}, 1>": 81_040 for whole in ("true", "false")},
    **{f"small_rows<double, {whole}, 2>": 95_520 for whole in ("true", "false")},
    **{f"small_components<float, {whole}, 1>": 42_576 for whole in ("true", "false")},
    **{f"small_components<float, {whole}, 4>": 70_416 for whole in ("true", "false")},
    **{f"small_components<double, {whole}, 1>": 51_856 for whole in ("true", "false")},
    **{f"small_components<double, {whole}, 2>": 70_416 for whole in ("true", "false")},
}


def missing() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    if not SOURCES.is_dir():
        return f"{SOURCES} is not there: this runs in a checkout"
    return None if shutil.which("nvcc") else "there is no nvcc on the PATH"


def version() -> str:
    """The compiler's."""
    told = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", told)
    return found[1] if found else told


def flags_and_targets() -> tuple[list[str], dict[int, str]]:
    """What the extension is compiled with, and the target that machine code is made for, by architecture."""
    flags = (SOURCES / "nvcc.txt").read_text().split()
    targets = [found[1] for flag in flags if (found := re.search(r"code=(sm_\w+)", flag))]
    return [f for f in flags if not f.startswith("-gencode")], {int(t[3:].rstrip("a")): t for t in targets}


def kernels(arch: int, wanted: re.Pattern[str], extension: Path | None = None) -> Iterator[Kernel]:
    """Each kernel of each source whose "name, case" a pattern matches.

    Args:
        extension: the built extension, to take its machine code instead of compiling.

    Raises:
        BenchmarkError: a source does not compile without a warning.
    """
    sources = sorted(SOURCES.glob("*.cu")) * (extension is None) + [EXPANSION] * (arch == 90)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(partial(compile_source, arch=arch), sources))
    if extension is not None:
        compiled += [(binary, disassembly.functions(binary)) for binary in machine_code(extension, arch)]
    for binary, symbols in compiled:
        for symbol in symbols:
            name = EXPANSION.stem if EXPANSION.stem in symbol else readable(symbol)
            case, work = case_of(name)
            if wanted.search(f"{name}, {case}"):
                yield Kernel(
                    name,
                    case,
                    arch,
                    binary,
                    threads={"pack_components<float>": 128, "pack_components<double>": 64}.get(name, 256),
                    shared=SHARED.get(name, 0),
                    work=work,
                    tensor_cores=name == EXPANSION.stem or name.startswith(PRODUCTS),
                    function=symbol,
                )


def compile_source(source: Path, arch: int) -> tuple[bytes, list[str]]:
    """The machine code, and the kernels in it by their symbols."""
    flags, targets = flags_and_targets()
    target = targets[arch]
    code = f"-gencode=arch={target.replace('sm', 'compute')},code={target}"
    with TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.cubin"
        strict = (SOURCES / "strict.txt").read_text().split()
        command = ["nvcc", *flags, *strict, "-Xptxas=-v", code, "-cubin", str(source), "-o", str(binary)]
        compiled = subprocess.run(command, capture_output=True, text=True)
        if compiled.returncode:
            raise BenchmarkError(f"{source.name} for {target}: {compiled.stdout}{compiled.stderr}")
        return binary.read_bytes(), re.findall(r"Compiling entry function '(\w+)'", compiled.stderr)


def machine_code(extension: Path, arch: int) -> list[bytes]:
    """What each source became in the built extension.

    Raises:
        BenchmarkError: it was built without CUDA.
    """
    with TemporaryDirectory() as folder:
        disassembly.run("-xelf", "all", extension.resolve(), folder=folder)
        return [path.read_bytes() for path in sorted(Path(folder).glob(f"*.{flags_and_targets()[1][arch]}.cubin"))]


def readable(symbol: str) -> str:
    """`backward<rows, float>` for what the compiler calls it."""
    found = re.search(r"\d([a-z][a-z_]+)I((?:L.*?SideE\dE|Lb\dE|Li\dE|[fd])+)E", symbol)
    if not found:  # no template
        plain = re.search(r"\d([a-z][a-z_]+)E", symbol)
        return plain[1] if plain else symbol
    arguments = [
        {"f": "float", "d": "double"}.get(letter)
        or {"b": ("false", "true"), "i": "0123456789"}.get(kind, ("rows", "components"))[int(value)]
        for letter, kind, value in re.findall(r"([fd])|L(?:\w*?SideE|([bi]))(\d)E", found[2])
    ]
    return f"{found[1]}<{', '.join(arguments)}>"


def case_of(name: str) -> tuple[str, dict[str, float]]:
    """The problem that a kernel is looked at for, and its minimal work on that problem."""
    # a multiply-add for t and one for its square; backward computes them again for each side, and then takes three for
    # z and four for the parameters
    large = {
        "forward<float>": (LARGE, 2, 0, 1),
        "backward<rows, float, 4>": (LARGE, 2 + 3, 0, 2),
        "backward<components, float, 4>": (LARGE, 2 + 4, 1, 1),
        "backward<rows, float, 3>": (NARROW, 2 + 3, 0, 2),
        "backward<components, float, 3>": (NARROW, 2 + 4, 1, 1),
    }
    if name in large:
        (m, k, d), instructions, written, rows = large[name]
        memory = 4.0 * (2 * k + 1) * d * (1 + written) + rows * 4.0 * m * (d + 1)
        return str((m, k, d)), {"memory": memory, "exp2": 1.0 * m * k, "fp32": 1.0 * instructions * m * k * d}
    if found := re.match(r"sliced_sums<(\d)", name):
        work = product_work(WIDE, int(found[1]), passes=2)
        work["fill"] *= 2  # for the exponents, and for the sums
        return str(WIDE), work
    if found := re.match(r"(?:product_forward<(\d), true|weighted_sums<(\d))", name):
        work = product_work(LARGE, int(found[1] or found[2]), passes=1 if found[1] else 2)
        if name == "weighted_sums<2, true, true>":  # one product more, of half the features
            work["fp16"] *= 1 + 1 / 12
        return str(LARGE), work
    if name.startswith("screened_sums"):
        return str(TRAINED), screen_work()
    # A block of each multiprocessor: what all do is that many times what one does.  A number of the components costs
    # the exponential and two instructions for it, and three of each row; what a block reads comes from the L2 cache.
    m, k, d = SMALL
    blocks = limits.MULTIPROCESSORS
    small = {
        "small_rows<float, true, 1>": {
            "fp32": (2.0 + 3) * blocks * k * d,
            "exp2": 1.0 * blocks * k * (d + 1),
            "fill": 8.0 * blocks * k * d,
        },
        "small_components<float, true, 4>": {
            "fp32": (3.0 + 4) * blocks * 4 * m * d,
            "exp2": 4.0 * blocks * (m + d),
            "fill": 8.0 * blocks * m * d,
        },
    }
    gaussian = {"rsample<float, true>": 3, "rsample_backward<float, true>": 4, "kl<float, true>": 2}
    if name in small:
        return str(SMALL), small[name]
    if name in gaussian:
        return str(GAUSSIAN), {"memory": 4.0 * gaussian[name] * GAUSSIAN[0] * GAUSSIAN[1]}
    return "any", {}


def product_work(problem: tuple[int, int, int], parts: int, passes: int) -> dict[str, float]:
    """Of the product form, with features in one part of fp16 or two: one product for the exponents, one more for sums.

    Two parts are three products, with an addition for each 16 features.  A pair takes an addition for c', a maximum,
    a subtraction and one for the sum; in sums of features, four more instructions for the parts of its weight.
    Every block of 128 rows, or components, reads all of the other side from the L2 cache.
    """
    m, k, d = problem
    products = {1: 1, 2: 3}[parts]
    additions = 2 * d / 16 if parts == 2 else 0
    return {
        "fp16": 2.0 * passes * products * m * k * 2 * d,
        "fp32": m * k * (additions + (4 if passes == 1 else 8)),
        "exp2": 1.0 * m * k,
        **features_read(problem, parts),
    }


def screen_work() -> dict[str, float]:
    """One product, and six instructions for a pair: two scales, two of its error's bound, a sum and a comparison.

    Of what is left 2 pairs in 1,000 are computed, with two exponentials and ten instructions for each dimension.
    """
    m, k, d = TRAINED
    left = 0.002 * m * k
    return {
        "fp16": 2.0 * m * k * 2 * d,
        "fp32": 6.0 * m * k + 10 * left * d,
        "exp2": 2.0 * left * d,
        **features_read(TRAINED, 1),
    }


def features_read(shape: tuple[int, int, int], parts: int) -> dict[str, float]:
    m, k, d = shape
    item = 2.0 * parts * 2 * d + 16  # bytes
    return {"fill": m * k / 128 * item, "memory": (m + k) * item}


FAMILY = Family("cuda", missing, kernels)
