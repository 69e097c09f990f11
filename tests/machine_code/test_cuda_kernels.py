"""What the compiler makes of the CUDA kernels, for GPUs that are not here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from budget import diffuse_case, hard_case
from emulation import cuda
from support.internals import Operators
from support.once_a_run import once_a_run

import fastvae
from fastvae.benchmarks.inputs import concentrated
from tools.static_report import disassembly, limits
from tools.static_report.disassembly import Code
from tools.static_report.families import cuda_family
from tools.static_report.kernel import Kernel

ARCHES = list(cuda_family.flags_and_targets()[1])
SIDES = ("rows", "components")


@pytest.fixture(scope="module", params=ARCHES)
def arch(request: pytest.FixtureRequest) -> int:
    """An architecture that the kernels are compiled for."""
    return int(request.param)


@pytest.fixture(scope="module")
def kernels(arch: int, request: pytest.FixtureRequest) -> list[tuple[Kernel, Code]]:
    """All kernels as they are compiled for it.

    Here, and warnings are errors; or in the extension, where FASTVAE_TEST_BUILT_KERNELS=1 says that it was built so.
    """
    if why := cuda_family.missing():
        pytest.skip(why)
    built = os.environ.get("FASTVAE_TEST_BUILT_KERNELS") == "1"
    extension = Path(fastvae.__file__).with_name("_C.abi3.so") if built else None

    def compile_all(folder: Path) -> list[tuple[Kernel, Code]]:
        return [(kernel, disassembly.read(kernel)) for kernel in cuda_family.kernels(arch, re.compile(""), extension)]

    return once_a_run(request, f"cuda-{arch}", compile_all)


def test_every_kernel_compiles_without_spills(arch: int, kernels: list[tuple[Kernel, Code]]) -> None:
    wanted = ("forward<", "backward<rows", "backward<components", "pack_rows", "rsample<", "rsample_backward", "kl<")
    names = [kernel.name for kernel, _ in kernels]
    for dtype, several in (("float", 4), ("double", 2)):
        small = [f"small_{side}<{dtype}, {v}, {n}>" for side in SIDES for v in ("true", "false") for n in (1, several)]
        for name in (*wanted, *small):
            assert any(n.startswith(name) and dtype in n for n in names), f"{name} for {dtype} is not there"
    for kernel, code in kernels:
        assert code.registers <= 255
        assert (code.stack, code.local, code.local_accesses) == (0, 0, 0), f"{kernel.name}: {code}"
        # so that two blocks run at a time
        backward = re.match(r"backward<\w+, float", kernel.name) is not None
        if backward or kernel.name.startswith(("forward<", "small_")):
            assert code.registers <= 128
        if kernel.name in cuda_family.SHARED:
            two = backward or (kernel.name.startswith(("forward<", "small_")) and arch != 80)
            assert limits.blocks_at_once(arch, code.registers, kernel.threads, kernel.shared) >= 1 + two, kernel.name


def test_multiply_adds_take_the_issue_slots(kernels: list[tuple[Kernel, Code]]) -> None:
    """Of the innermost loop, at any D; what it loads, it loads 16 bytes at a time."""
    for kernel, code in kernels:
        if kernel.name != "forward<float>" and not re.match(r"backward<\w+, float", kernel.name):
            continue
        squares = max((loop for loop in code.loops if not loop.kinds["FADD"]), key=lambda loop: loop.multiply_adds)
        assert squares.share("FFMA") >= 0.8, f"{kernel.name}: {squares}"
        assert squares.kinds["LDS.128"] > 0 and not {"LDS.32", "LDS.64"} & set(squares.kinds), (
            f"{kernel.name}: {squares}"
        )
        # copies to shared memory are asynchronous and 16 bytes wide
        assert code.memory["LDGSTS.128"] > 0 and not {"LDGSTS.32", "LDGSTS.64"} & set(code.memory), kernel.name


def test_the_product_form_runs_on_tensor_cores(arch: int, kernels: list[tuple[Kernel, Code]]) -> None:
    """Matrices come from shared memory by ldmatrix, and lines of features go there by asynchronous 16-byte copies."""
    forward = [f"product_forward<{part}, {line}>" for part in (1, 2) for line in ("true, false", "false, false")]
    forward += ["product_forward<2, true, true>", "product_forward<2, false, true>"]
    screened = ["screened_sums<true>", "screened_sums<false>"]
    sums = [f"weighted_sums<{parts}, {rows}, false>" for parts in (1, 2) for rows in ("true", "false")]
    sums += ["weighted_sums<2, false, true>", "weighted_sums<2, true, true>"]
    sums += [f"sliced_sums<{parts}, {rows}>" for parts in (1, 2) for rows in ("true", "false")]
    wanted = [*forward, *screened, *sums]
    found = {kernel.name: (kernel, code) for kernel, code in kernels if kernel.name in wanted}
    assert sorted(found) == sorted(wanted)
    for name, (kernel, code) in found.items():
        assert kernel.tensor_cores and set(code.matrix) == {"HMMA"}, name
        assert code.memory["LDSM"] > 0 and code.memory["LDGSTS.128"] > 0 and not code.memory["LDGSTS.32"], name
        if name in (*forward, *screened):  # two blocks, so that what one waits for overlaps with the other's products
            assert code.registers <= 128, name
            assert arch == 80 or limits.blocks_at_once(arch, code.registers, 256, kernel.shared) == 2, name
    assert {name for name, (kernel, _) in found.items() if kernel.work} == {
        name for name in wanted if not name.startswith(("product_forward<1, false", "product_forward<2, false"))
    }


def test_backward_waits_for_no_memory_but_shared_memory(kernels: list[tuple[Kernel, Code]]) -> None:
    """In no loop of either pass.  Nine of ten instructions are arithmetic where all items have a weight and a lane has
    four dimensions."""
    seen = 0
    for kernel, code in kernels:
        if not (found := re.match(r"backward<(\w+), float, (\d)>", kernel.name)):
            continue
        for loop in code.loops:
            assert not any(kind.startswith(("LDG", "LDL", "STL", "STG")) for kind in loop.kinds), (
                f"{kernel.name}: {loop}"
            )
        if found[2] != "4":
            continue
        arithmetic = {"rows": {"FADD": 1, "FMUL": 1, "FFMA": 1}, "components": {"FADD": 2, "FMUL": 1, "FFMA": 1}}[
            found[1]
        ]
        second = [
            loop
            for loop in code.loops
            if all(loop.kinds[kind] == n * loop.kinds["FFMA"] for kind, n in arithmetic.items())
            and not {"LDS.32", "LDS.64"} & set(loop.kinds)
            and sum(loop.kinds[kind] for kind in arithmetic) >= 0.9 * loop.instructions
        ]
        # of the rows' side, the squares' difference form looks the same
        assert len(second) >= (2 if found[1] == "rows" else 1), f"{kernel.name}: {code.loops}"
        seen += 1
    assert seen == 2


def test_small_problems_and_samples_move_16_bytes_at_a_time(kernels: list[tuple[Kernel, Code]]) -> None:
    for kernel, code in kernels:
        if kernel.name in ("rsample<float, true>", "rsample_backward<float, true>", "kl<float, true>"):
            assert code.memory["LDG.128"] > 0 and code.memory["STG.128"] > 0, kernel.name
        if kernel.name.startswith("small_") and "true" in kernel.name:
            assert code.memory["LDGSTS.128"] > 0 and not {"LDGSTS.32", "LDGSTS.64"} & set(code.memory), kernel.name
            assert code.memory["LDS.128"] > 0, kernel.name


def test_loops_that_wait_for_memory_ask_for_much_at_a_time(kernels: list[tuple[Kernel, Code]]) -> None:
    """The sampler and the score of small problems: where a branch stood between two loads, one would wait for both."""
    loops = {kernel.name: code.loops for kernel, code in kernels}
    for name in ("rsample<float, true>", "kl<float, true>"):
        assert loops[name][0].kinds["LDG.128"] == 4, name
    # beside the loop's own jump, one for each of the two fours: the noise has none
    assert loops["rsample<float, true>"][0].kinds["BRA"] <= 3
    for own in (1, 4):
        batch = [loop for loop in loops[f"small_rows<float, true, {own}>"] if loop.kinds["LDG.32"] == 16]
        assert len(batch) == 1 and batch[0].kinds["BRA"] == 1, own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_report_knows_the_shared_memory_of_a_block(emulated: Operators, dtype: torch.dtype) -> None:
    """What the machine code does not tell is a table of the report: it must be what is launched."""
    if torch.cuda.is_available():
        pytest.skip("the emulation tells what is launched, a GPU does not")
    tiled = os.environ["FASTVAE_TILES"] == "1"
    name, several = {4: ("float", 4), 8: ("double", 2)}[dtype.itemsize]
    for n, own in ((2, 1), (140, several)):
        for D, whole in ((4, "true"), (3, "false"), (68, "true")):
            case = hard_case(n, n, D, dtype=dtype)
            args = case.z, case.mu, case.logvar, None, None
            cuda.largest_shared()
            log_prob = emulated.mixture_log_prob(*args)
            forward = "forward<{}>" if D <= 64 else "forward_wide<{}>"
            rows = forward if tiled else f"small_rows<{{}}, {whole}, {own}>"
            assert cuda.largest_shared() == cuda_family.SHARED[rows.format(name)]
            emulated.mixture_log_prob_backward(case.grad, log_prob, *args, False, False, True, True, True)
            lane = 2 if D <= 32 else 4
            components = f"backward<components, {{}}, {lane}>" if tiled else f"small_components<{{}}, {whole}, {own}>"
            assert cuda.largest_shared() == cuda_family.SHARED[components.format(name)]


def test_the_report_knows_the_shared_memory_of_products(
    emulated_tiled: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 64 dimensions, and for those where the rows' lines are not kept: 200 in forward, 128 in gradients."""
    if torch.cuda.is_available():
        pytest.skip("the emulation tells what is launched, a GPU does not")
    monkeypatch.setenv("FASTVAE_CERTIFICATE", "1")

    def shared_of(operator: Callable[..., Any], *args: Any) -> int:
        cuda.largest_shared()
        operator(*args)
        return cuda.largest_shared()

    forward = {"cuda-high": "2, {}, false", "cuda-medium": "1, {}, false", "cuda": "2, {}, true"}
    for backend, template in forward.items():
        operators, certified = cuda.operators(backend), backend == "cuda"
        for D, stays in ((64, "true"), (128, ""), (200, "false")):
            case = diffuse_case(3, 140, D)
            args = case.z, case.mu, case.logvar, None, None
            if stays and (D == 64 or not certified):  # else the difference form takes more
                name = f"product_forward<{template.format(stays)}>"
                assert shared_of(operators.mixture_log_prob, *args) == cuda_family.SHARED[name], name
            if D == 200 or (D == 128 and certified):
                continue
            # of the rows where they are certified, else the difference form takes more
            name = "weighted_sums<2, true, true>" if certified else f"weighted_sums<{template[0]}, false, false>"
            if D == 128:
                name = f"sliced_sums<{template[0]}, false>"
            wanted = certified, not certified, not certified, not certified
            log_prob = operators.mixture_log_prob(*args)
            got = shared_of(operators.mixture_log_prob_backward, case.grad, log_prob, *args, False, *wanted)
            assert got == cuda_family.SHARED[name], name


def test_the_report_knows_the_shared_memory_of_the_screen(
    emulated_tiled: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("the emulation tells what is launched, a GPU does not")
    monkeypatch.setenv("FASTVAE_SCREEN", "1")
    inputs = concentrated(3, 500, 64)
    args = inputs.z, inputs.mu, inputs.logvar, None, None
    log_prob = emulated_tiled.mixture_log_prob(*args)
    for rows in (True, False):
        cuda.largest_shared()
        emulated_tiled.mixture_log_prob_backward(
            torch.ones(3), log_prob, *args, False, rows, not rows, not rows, not rows
        )
        # the kernels for all pairs are launched as well, and have nothing to do
        others = cuda_family.SHARED[f"backward<{'rows' if rows else 'components'}, float, 4>"]
        assert cuda.largest_shared() == max(cuda_family.SHARED[f"screened_sums<{str(rows).lower()}>"], others)
