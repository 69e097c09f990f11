"""The stages of a run on a GPU, in the order of their worth, and what a dry run does of each."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence

from .stage import ROOT, Context, Stage

OURS = [f"fastvae-triton-{precision}" for precision in ("highest", "high", "medium")]
PEERS = [*OURS, "fastvae-cuda", "eager", "expansion", "expansion-compile", "expansion-tf32"]
SHAPES = ((4096, 50_000, 64), (100, 500, 40))

# opcheck of every operator would take the time of the others; test_gpu.py has it of the density's.
GPU_TESTS = ["tests", "-k", "((triton or cuda-emulated) and not opcheck) or gpu or training_step"]
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
    """In place on a GPU's machine, aside in a dry run; where there is none that loads."""
    return ["-m", "tools.gpu.build", *(["--aside", str(context.out / "build")] if context.dry else [])]


def _static(context: Context) -> Sequence[str]:
    """What this machine's compiler makes of the large kernels; the whole report is a command of its own."""
    match = "^gaussian.kl" if context.dry else "(difference|product).*general"
    command = ["-m", "tools.static_report", "--family", "triton", "--arch", "90", "--match", match]
    return [*command, "--out", str(context.out / "static.json")]


def _test(context: Context) -> Sequence[str]:
    """The shared tests on the GPU, and those that only a GPU can run; in a dry run a few of them, interpreted."""
    chosen = [find_test("test_gpu.py"), find_test("test_triton.py"), *DRY_TESTS] if context.dry else GPU_TESTS
    command = ["-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *chosen]
    # most of the time goes into compiling a kernel for each kind of call, which every core helps with
    side_by_side = ["--numprocesses", "auto", "--dist", "worksteal"]
    return [*command, *side_by_side] if importlib.util.find_spec("xdist") and not context.dry else command


def _bench(context: Context) -> Sequence[str]:
    """`fastvae bench` with the Triton and CUDA kernels beside the peers."""
    command = ["-m", "fastvae.app.cli", "bench", "mixture", "gaussian", "--overwrite", "--out", str(context.out)]
    if context.dry:
        return [*command, "--quick", "--device", "cpu", "--shapes", "16,40,8", "--peers", f"{OURS[0]},eager,expansion"]
    shapes = [part for shape in SHAPES for part in ("--shapes", _written(shape))]
    return [*command, "--device", "cuda", *shapes, "--peers", ",".join(PEERS)]


def _peer(name: str, module: str, seconds: float, shapes: Sequence[tuple[int, int, int]]) -> Stage:
    """A peer that may end its process, or take minutes to begin: beside the CUDA kernels in a process of its own."""

    def arguments(context: Context) -> Sequence[str]:
        ours = "eager" if context.dry else "fastvae-cuda"
        command = ["-m", "fastvae.app.cli", "bench", "mixture", "--overwrite", "--out", str(context.out / name)]
        command += ["--peers", f"{ours},{name}"]
        if context.dry:
            return [*command, "--quick", "--device", "cpu", "--shapes", "16,40,8"]
        return [*command, "--device", "cuda", *(part for shape in shapes for part in ("--shapes", _written(shape)))]

    def why_not(context: Context) -> str | None:
        if context.dry and name == "flash-gmm":
            return "it runs on GPUs alone"
        return None if importlib.util.find_spec(module) else f"there is no module {module}"

    return Stage(name, seconds, arguments, why_not=why_not)


def _written(shape: tuple[int, int, int]) -> str:
    return ",".join(map(str, shape))


def _train(context: Context) -> Sequence[str]:
    """Two epochs by the command line, as a user trains: on images made here, at MNIST's sizes or in a dry run small."""
    return ["-m", "tools.gpu.train", "--out", str(context.out / "train"), *(["--dry-run"] if context.dry else [])]


def _sanitize(context: Context) -> Sequence[str]:
    return ["-m", "tools.gpu.sanitize", *(["--dry-run"] if context.dry else [])]


def _without_sanitizer(context: Context) -> str | None:
    if context.dry or shutil.which("compute-sanitizer"):
        return None
    return "compute-sanitizer is not there; it comes with the CUDA toolkit"


def _figures(context: Context) -> Sequence[str]:
    """The page and the figures of what `bench` recorded, also where it ran out of time."""
    record = context.out / ("cpu.json" if context.dry else "cuda.json")
    return ["-m", "tools.figures", str(record), "--out", str(context.out)]


def _measuring(module: str, seconds: float) -> Stage:
    """A module of this folder that measures by the Triton kernels, interpreted in a dry run."""

    def arguments(context: Context) -> Sequence[str]:
        return ["-m", f"tools.gpu.{module}", "--out", str(context.out), *(["--dry-run"] if context.dry else [])]

    return Stage(module, seconds, arguments, variables=_interpreted_if_dry)


def _interpreted_if_dry(context: Context) -> dict[str, str | None]:
    return {"TRITON_INTERPRET": "1" if context.dry else None}


def _of_tests(context: Context) -> dict[str, str | None]:
    """One thread for each of the processes, which are as many as there are cores."""
    return _interpreted_if_dry(context) | {"OMP_NUM_THREADS": "1"}


# What is worth most comes first: a machine that is lent for a quarter of an hour may be gone before the end.  Together
# they are below TOTAL, so that one command of at most ten minutes runs them all, and some can be run again.
TOTAL = 570.0
STAGES = (
    Stage("build", 70, _build),
    _measuring("measure", 140),
    Stage("test", 110, _test, variables=_of_tests),
    Stage("train", 40, _train),
    Stage("bench", 45, _bench, variables=_interpreted_if_dry),
    Stage("sanitize", 35, _sanitize, why_not=_without_sanitizer),
    _measuring("tune", 45),
    _peer("keops", "pykeops", 20, SHAPES),
    _peer("flash-gmm", "flash_gmm_diag_h100", 35, SHAPES[1:]),
    Stage("static", 15, _static, variables=lambda context: {"TRITON_INTERPRET": None}),
    Stage("figures", 10, _figures),
)
