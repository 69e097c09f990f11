"""The stages of a run on a GPU, in their order, and what a dry run does of each."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence

from .stage import ROOT, Context, Stage

OURS = [f"fastvae-triton-{precision}" for precision in ("highest", "high", "medium")]
PEERS = [*OURS, "fastvae-cuda", "eager", "expansion", "expansion-compile", "expansion-tf32", "keops", "flash-gmm"]
SHAPES = ((4096, 50_000, 64), (100, 500, 40))

# On a GPU a kernel is called with tensors that are on it; opcheck's own tensors are on the CPU.
GPU_TESTS = ["tests", "-k", "((triton or cuda-emulated) and not opcheck) or gpu"]
GPU_TESTS += ["--ignore=tests/bench", "--ignore=tests/machine_code"]
DRY_TESTS = ["-k", "gpu or precision_follows or stream"]


def find_test(name: str) -> str:
    """A test file by its name, in whichever folder of tests/ it is.

    Raises:
        FileNotFoundError: there is none, or more than one.
    """
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob(name)]
    if len(found) != 1:
        raise FileNotFoundError(f"tests/ should have one {name}, it has {', '.join(found) or 'none'}")
    return found[0]


def _build(context: Context) -> Sequence[str]:
    """In place on a GPU's machine, aside in a dry run."""
    aside = ["--build-lib", str(context.out / "build"), "--build-temp", str(context.out / "build" / "temp")]
    return ["setup.py", "-q", "build_ext", *(aside if context.dry else ["--inplace"])]


def _static(context: Context) -> Sequence[str]:
    """What this machine's compiler makes of the large kernels; the whole report is a command of its own."""
    match = "^gaussian.kl" if context.dry else "(difference|product).*general"
    command = ["-m", "tools.static_report", "--family", "triton", "--arch", "90", "--match", match]
    return [*command, "--out", str(context.out / "static.json")]


def _test(context: Context) -> Sequence[str]:
    """The shared tests on the GPU, and those that only a GPU can run; in a dry run a few of them, interpreted."""
    chosen = [find_test("test_gpu.py"), find_test("test_triton.py"), *DRY_TESTS] if context.dry else GPU_TESTS
    command = ["-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *chosen]
    # most of the time goes into compiling a kernel for each kind of call
    return [*command, "-n", "8"] if importlib.util.find_spec("xdist") and not context.dry else command


def _bench(context: Context) -> Sequence[str]:
    """`fastvae bench` with the Triton and CUDA kernels beside the peers."""
    command = ["-m", "fastvae.app.cli", "bench", "mixture", "gaussian", "--overwrite", "--out", str(context.out)]
    if context.dry:
        return [*command, "--quick", "--device", "cpu", "--shapes", "16,40,8", "--peers", f"{OURS[0]},eager,expansion"]
    shapes = [part for shape in SHAPES for part in ("--shapes", ",".join(map(str, shape)))]
    return [*command, "--device", "cuda", *shapes, "--peers", ",".join(PEERS)]


def _without_sanitizer(context: Context) -> str | None:
    if context.dry:
        return "a dry run has no GPU"
    found = shutil.which("compute-sanitizer")
    return None if found else "compute-sanitizer is not there; it comes with the CUDA toolkit"


def _figures(context: Context) -> Sequence[str]:
    """The page and the figures of what `bench` recorded, also where it ran out of time."""
    record = context.out / ("cpu.json" if context.dry else "cuda.json")
    return ["-m", "tools.figures", str(record), "--out", str(context.out)]


def _measuring(module: str) -> Stage:
    """A module of this folder that measures by the Triton kernels, interpreted in a dry run."""

    def arguments(context: Context) -> Sequence[str]:
        return ["-m", f"tools.gpu.{module}", "--out", str(context.out), *(["--dry-run"] if context.dry else [])]

    return Stage(module, 75, arguments, variables=_interpreted_if_dry)


def _interpreted_if_dry(context: Context) -> dict[str, str | None]:
    return {"TRITON_INTERPRET": "1" if context.dry else None}


STAGES = (
    Stage("build", 70, _build),
    Stage("static", 40, _static, variables=lambda context: {"TRITON_INTERPRET": None}),
    Stage("test", 90, _test, variables=_interpreted_if_dry),
    _measuring("measure"),
    _measuring("tune"),
    Stage("bench", 70, _bench, variables=_interpreted_if_dry),
    Stage("sanitize", 40, lambda context: ["-m", "tools.gpu.sanitize"], why_not=_without_sanitizer),
    Stage("figures", 10, _figures),
)
