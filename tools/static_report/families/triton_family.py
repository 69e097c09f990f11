"""The Triton kernels: exactly what the launchers would launch, recorded on tensors without data, then compiled."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from fastvae.backends import triton as triton_kernels

from ..kernel import Family, Kernel
from ..limits import MULTIPROCESSORS

M, K, D = 4096, 50_000, 64
GAUSSIAN = (16_384, 256)
SMALL = (100, 500, 40)
PRECISIONS = ("highest", "high", "medium")
FORMS = (*PRECISIONS, "float64")


class Launch(NamedTuple):
    """One kernel as it would be launched: its arguments by name, and the compiler's options."""

    kernel: Any  # triton.JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]


def missing() -> str | None:
    """Why the kernels cannot be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if triton_kernels.load("launch").INTERPRETED:
        return "TRITON_INTERPRET is set, so Triton would interpret and not compile"
    return None


def launches(call: Callable[[], object]) -> list[Launch]:
    """What `call` would launch; nothing runs."""
    import triton

    recorded = []

    def record(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, positional, strict=False))
        arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        recorded.append(Launch(kernel, arguments, options))

    with patch.object(triton.JITFunction, "run", record):
        call()
    return recorded


def specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list]]:
    """Types, constants and known divisors of the arguments, as a launch would have them."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, divisible = _kind(value)
        if parameter.is_constexpr or kind is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        signature[parameter.name] = kind
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, arch: int) -> Any:
    """The kernel of a launch, compiled ahead of time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, *specialise(launch))
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


_POINTERS = {torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64", torch.int64: "*i64"}


def _kind(value: Any) -> tuple[str | None, bool]:
    """(Triton's type of an argument, whether 16 divides it); the type is None for what becomes a constant."""
    if value is None or value is True or value is False or (isinstance(value, int) and value == 1):
        return None, False
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype], True
    if isinstance(value, int):
        return ("i32" if value < 2**31 else "i64"), value % 16 == 0
    return "fp32", False


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


def large_calls(form: str, shared: bool) -> dict[str, Callable[[], object]]:
    """Forward, score and backward of a large problem, in a precision or in float64."""
    mixture = triton_kernels.load("mixture")
    precision, empty = (form, _empty) if form in PRECISIONS else ("highest", partial(_empty, dtype=torch.float64))
    rest = (empty(M, D), empty(K, D), empty(1 if shared else K, D), None, None)
    backward = partial(mixture.mixture_log_prob_backward, precision, empty(M), empty(M), *rest)
    return {
        "forward": partial(mixture.mixture_log_prob, precision, *rest),
        "score": partial(mixture.mixture_log_prob_and_score, precision, *rest),
        "backward": partial(backward, False, False, True, True, True),
    }


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kind of call, with the case it stands for."""
    mixture, gaussian = triton_kernels.load("mixture"), triton_kernels.load("gaussian")
    for form in FORMS:
        for shared in (False, True):
            for name, call in large_calls(form, shared).items():
                yield f"{form}, {'shared variance' if shared else 'general'}, {name}", call
    kl = triton_kernels.load("mixture_kl")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    for form, empty in (("", _empty), (" in float64", partial(_empty, dtype=torch.float64))):
        rows, components, of_rows = empty(SMALL[0], SMALL[2]), empty(*SMALL[1:]), empty(SMALL[0])
        prior = components, components, None, None
        density = partial(mixture.mixture_log_prob, "highest", rows, components, components, None, None)
        yield f"density{form}, forward", density
        yield f"KL{form}, forward", partial(kl.mixture_kl, None, rows, rows, seed, 1, *prior, True)
        saved = rows[None], of_rows, rows, *prior
        backward = partial(kl.mixture_kl_backward, None, rows[None], of_rows[None], rows, seed, False, *saved)
        yield f"KL{form}, backward", partial(backward, False, True, True, True, True)
        mu, per_row = empty(*GAUSSIAN), empty(GAUSSIAN[0])
        sampled = mu[None], per_row[None], mu, seed, False
        yield f"samples{form}, forward", partial(gaussian.gaussian_rsample, mu, mu, seed, 1)
        yield f"samples{form}, backward", partial(gaussian.gaussian_rsample_backward, *sampled)
        yield f"KL{form}, forward", partial(gaussian.gaussian_kl, mu, mu)
        yield f"KL{form}, backward", partial(gaussian.gaussian_kl_backward, per_row, mu, mu)


def kernels(arch: int, wanted: re.Pattern[str]) -> Iterator[Kernel]:
    """Each kernel of each call, once; then the large ones by every tile that is offered beside the table's."""
    seen: set[str] = set()
    with patch.object(triton_kernels.load("tiles"), "capability", lambda device: arch):
        for case, call in calls():
            yield from _compiled(case, launches(call), arch, wanted, seen)
        for case, call in candidate_calls(arch):
            large = [launch for launch in launches(call) if _module(launch) in ("difference", "product")]
            yield from _compiled(case, large, arch, wanted, seen)


def candidate_calls(arch: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The large calls and their cases, by every tile that is offered beside the table's while its call is yielded."""
    tiles, autotune = triton_kernels.load("tiles"), triton_kernels.load("autotune")
    for form in FORMS:
        of_form = (form, D, arch) if form in PRECISIONS else ("highest", D, arch, torch.float64)
        for shared in (False, True):
            for name, call in large_calls(form, shared).items():
                for tile in tiles.candidates("parameters" if name == "backward" else name, *of_form)[1:]:
                    sizes = f"{tile.rows} x {tile.columns}, {tile.warps} warps, {tile.stages} stages"
                    case = f"{form}, candidate {sizes}{', shared variance' * shared}, {name}"
                    with patch.object(autotune, "choose", lambda *about, tile=tile: tile):
                        yield case, call


def _module(launch: Launch) -> str:
    return str(launch.kernel.fn.__module__.rpartition(".")[2])


def _compiled(
    case: str, recorded: list[Launch], arch: int, wanted: re.Pattern[str], seen: set[str]
) -> Iterator[Kernel]:
    """The kernels among these launches that are wanted and not yet seen."""
    for launch in recorded:
        module = _module(launch)
        name = f"{module}.{launch.kernel.fn.__name__}"
        if not wanted.search(f"{name}, {case}"):
            continue
        signature, constants, attributes = specialise(launch)
        key = repr((name, signature, constants, attributes, launch.options))
        if key in seen:
            continue
        seen.add(key)
        compiled = compile_launch(launch, arch)
        yield Kernel(
            name,
            case,
            arch,
            compiled.asm["cubin"],
            32 * compiled.metadata.num_warps,
            compiled.metadata.shared,
            work(name, launch.arguments),
            tensor_cores=module == "product",
        )


def work(name: str, arguments: dict[str, Any]) -> dict[str, float]:
    """The minimal work of the main kernels."""
    module, kernel = name.split(".")
    if module == "gaussian":
        rows, dims = GAUSSIAN
        arrays = {"sample_kernel": 3, "sample_backward_kernel": 4, "kl_kernel": 2, "kl_backward_kernel": 4}[kernel]
        return {"memory": float(arguments["logvar"].element_size() * rows * dims * arrays)}
    if module.startswith("small"):
        if arguments["z"].dtype == torch.float64:
            return {}
        return _small_work(kernel, arguments)
    if module not in ("difference", "product"):
        return {}
    pairs = arguments["M_PADDED"] * arguments["K_PADDED"]
    score = bool(arguments.get("SCORE"))
    gradients = 1 + score if kernel == "forward_kernel" else 1 + arguments["NEED_S1"] + arguments["NEED_S2"]
    tensors = {id(v): v for v in arguments.values() if isinstance(v, Tensor)}
    counted = {
        "exp2": float(pairs),
        "memory": float(sum(v.numel() * v.element_size() for v in tensors.values())),
    }
    if module == "difference":
        # a subtraction, a product and a multiply-add; as much for the score; for S1 two of these, and two more for S2
        slots = 3 + (3 * score if kernel == "forward_kernel" else 2 * (gradients - 1))
        issued = float(pairs * arguments["D"] * slots)
        if arguments["z"].dtype == torch.float64:  # whose exponentials are multiply-adds, some twenty a pair
            return {"fp64 issue": issued, "memory": counted["memory"]}
        return counted | {"fp32": issued}
    products = 3 if arguments["PARTS"] == 2 else 1
    return counted | {"fp16": 2.0 * pairs * arguments["F"] * (1 + (gradients > 1)) * products}


EXP = 19  # fp32 instructions of s = exp(-logvar / 2), see kernels/arithmetic.py


def _small_work(kernel: str, arguments: dict[str, Any]) -> dict[str, float]:
    """As if every multiprocessor had as many programs as the busiest: their cycles are what a launch takes.

    A row's element is a subtraction, a product, a multiply-add and the sum's addition, and three more for the score; as
    many backward, for S1 and S2.
    """
    rows, columns = arguments["ROWS"], arguments["COLUMNS"]
    of_rows, of_components = (-(-arguments["N"] // rows), -(-arguments["K"] // columns))
    if kernel == "forward_kernel":
        programs, tiles = of_rows, of_components
        element = EXP / rows + 4 + 3 * (arguments["score"] is not None)
    else:
        programs, tiles, element = of_components, of_rows, 7
    busiest = -(-programs // MULTIPROCESSORS) * MULTIPROCESSORS
    return {"fp32": float(busiest * tiles * rows * columns * arguments["DIMS"] * element)}


FAMILY = Family("triton", missing, kernels)
