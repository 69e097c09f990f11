"""The kernels' machine code, compiled here for GPUs that are not here: the bars that a change must not break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.once_a_run import once_a_run

from fastvae.backends import triton
from tools.static_report import disassembly, limits
from tools.static_report.__main__ import main
from tools.static_report.families import all_families, cuda_family, triton_family
from tools.static_report.report_tables import TABLES, all_fields, record

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Every Triton kernel for sm_90, by candidate tiles too, and the large ones for the other two; side by side."""
    pytest.importorskip("triton")
    return once_a_run(request, "triton-kernels", compile_triton_kernels)


def compile_triton_kernels(folder: Path) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = []
    large = r"^(difference|product).*, high\w*, general"
    jobs = (("90", "general|^gaussian|^small"), ("90", r"candidate.* stages, \w+$"), ("80", large), ("100", large))
    for place, (arch, match) in enumerate(jobs):
        command = [sys.executable, "-m", "tools.static_report", "--family", "triton", "--arch", arch]
        command += ["--match", match, "--out", str(folder / f"{place}.json")]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, **output))
    for process in running:
        told, _ = process.communicate(timeout=900)
        assert process.returncode == 0, told.decode()
    return [k for path in sorted(folder.glob("*.json")) for k in json.loads(path.read_text())["kernels"]]


def of(kernels: list[dict[str, Any]], *parts: str, arch: int | None = None) -> list[dict[str, Any]]:
    """The kernels whose name and case hold all parts; at least one."""
    found = [
        k for k in kernels if all(part in f"{k['kernel']}, {k['case']}" for part in parts) and arch in (None, k["arch"])
    ]
    assert found, parts
    return found


def test_nothing_spills(kernels: list[dict[str, Any]]) -> None:
    """No stack, no local memory, no instruction that touches it; and every block fits a multiprocessor."""
    for k in kernels:
        assert (k["stack"], k["local"], k["local_accesses"]) == (0, 0, 0), (k["kernel"], k["case"], k["arch"])
        assert k["blocks"] >= 1, (k["kernel"], k["case"], k["arch"])


def test_every_tile_that_is_offered_is_compiled(kernels: list[dict[str, Any]]) -> None:
    """For sm_90, in float64 as well; that none spills stands above."""
    tiles = triton.load("tiles")
    for form in triton_family.FORMS:
        about = ("highest", 64, 90, torch.float64) if form == "float64" else (form, 64, 90, torch.float32)
        for call, kind in (("forward", "forward"), ("score", "score"), ("backward", "parameters")):
            first, *others = tiles.candidates(kind, *about)
            assert first == tiles.tile_for(kind, *about) and others and len({first, *others}) == 1 + len(others)
            found = [k["case"] for k in of(kernels, f" {form}, candidate", f", {call}", arch=90)]
            assert len(found) == len(others), (form, call, found)


@pytest.mark.parametrize(("arch", "instruction"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_lower_precisions_use_the_tensor_cores(kernels: list[dict[str, Any]], arch: int, instruction: str) -> None:
    """wgmma on sm_90, tcgen05 on sm_100; and the difference form does not."""
    for k in of(kernels, "product.", arch=arch):
        assert set(k["matrix"]) == {instruction}, (k["kernel"], k["case"])
    for k in of(kernels, "difference.", arch=arch):
        assert not k["matrix"], (k["kernel"], k["case"])
    both = {"product.forward_kernel", "product.parameters_kernel"}
    assert {k["kernel"] for k in of(kernels, "product.", arch=arch)} == both


def test_wgmma_for_every_lower_precision(kernels: list[dict[str, Any]]) -> None:
    for precision in ("high,", "medium,"):
        for call in ("forward", "score", "backward"):
            assert all(k["matrix"]["HGMMA"] > 0 for k in of(kernels, "product.", precision, call, arch=90))


def test_loads_are_wide(kernels: list[dict[str, Any]]) -> None:
    """16 bytes a thread for the operands and the samples; what is left are numbers of rows and components."""
    for name in ("difference.", "product.", "gaussian."):
        for k in of(kernels, name):
            if k["case"].startswith("float64"):  # tiles of the difference form have no blocks of 4 x 4 there
                continue
            assert k["wide_loads"] >= 0.75, (k["kernel"], k["case"], k["arch"], k["loads"])


def test_small_problems_load_their_operands_wide(kernels: list[dict[str, Any]]) -> None:
    """Components forward, rows backward: what the loops read; the rest are numbers of rows and components."""
    for k in of(kernels, "small_forward.forward_kernel"):
        assert k["wide_loads"] >= 0.75, (k["case"], k["loads"])
    (backward,) = of(kernels, "small_backward.backward_kernel", "KL, backward")
    assert backward["loads"]["16"] >= 4, backward["loads"]


def test_log_q_is_summed_in_the_samplers_order() -> None:
    """Compiled, small problems and the sampler have one layout along a row: so log q has the same bits on a GPU too."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", LAYOUTS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    layouts = done.stdout.split()
    assert len(layouts) == 16 and layouts[::2] == layouts[1::2]


LAYOUTS = """
import itertools
import re
import torch
from tools.static_report.families.triton_family import compile_launch, launches
from fastvae.backends import triton
gaussian, kl = triton.load("gaussian"), triton.load("mixture_kl")
seed = torch.empty(1, dtype=torch.int64, device="meta")
for D, dtype in itertools.product((40, 7, 130, 256), (torch.float32, torch.float64)):
    q, prior = (torch.empty(n, D, device="meta", dtype=dtype) for n in (100, 200))
    for call in (
        lambda: gaussian.gaussian_rsample(q, q, seed, 1),
        lambda: kl.mixture_kl(None, q, q, seed, 1, prior, prior, None, None, True),
    ):
        (launch,) = launches(call)
        code = compile_launch(launch, 90).asm["ttgir"]
        name = re.search(r"tensor<\\d+x\\d+xf(?:32|64), (#\\w+)>\\) ->", code[code.index('"tt.reduce"'):])[1]
        layout = re.search(rf"^{name} = (.*)$", code, re.M)[1]
        print("-".join(re.findall(r"\\[\\d+, (\\d+)\\]", layout)))  # of dimension 1: a thread's, a warp's, a block's
"""


def test_the_difference_form_is_multiply_adds(kernels: list[dict[str, Any]]) -> None:
    """Of 128 x 128 elements and four dimensions a thread has 256 of each of its three operations."""
    (k,) = of(kernels, "difference.forward_kernel", "highest, general, forward", arch=90)
    assert all(k["fp32"][name] >= 256 for name in ("FFMA", "FADD", "FMUL"))
    assert k["loads"] == {"16": 25}  # two of rows' and components' fours for each of them, and the constants


def test_float64_is_multiply_adds_too(kernels: list[dict[str, Any]]) -> None:
    """Each of its three operations for 64 x 32 elements and four dimensions, and a floor of its own."""
    (k,) = of(kernels, "difference.forward_kernel", "float64, general, forward", arch=90)
    assert all(k["fp64"][name] >= 4 * 64 * 32 // 256 for name in ("DFMA", "DADD", "DMUL"))
    assert k["bound_by"] == "fp64 issue" and k["work"]["fp64 issue"] == 3 * 64 * 4096 * 50_016  # K padded to tiles


def test_the_floor_names_what_binds(kernels: list[dict[str, Any]]) -> None:
    (forward,) = of(kernels, "difference.forward_kernel", "highest, general, forward", arch=90)
    pairs = 4096 * 50_048  # K padded to tiles
    assert forward["work"]["fp32"] == 3 * 64 * pairs and forward["bound_by"] == "fp32 issue"
    assert forward["floor_seconds"] == pytest.approx(3 * 64 * pairs / (132 * 128 * 1.98e9))
    (high,) = of(kernels, "product.forward_kernel", "high, general, forward", arch=90)
    assert high["work"]["fp16"] == 3 * 2 * 128 * pairs and high["bound_by"] == "fp16 tensor cores"


def test_how_many_blocks_fit() -> None:
    """By registers, by threads, by shared memory, by blocks; none where one asks for too much."""
    assert limits.blocks_at_once(90, 168, 256, 0) == 1
    assert limits.blocks_at_once(90, 128, 256, 0) == 2
    assert limits.blocks_at_once(90, 32, 256, 0) == 8
    assert limits.blocks_at_once(90, 32, 32, 0) == 32
    assert limits.blocks_at_once(90, 32, 128, 100 << 10) == 2
    assert limits.blocks_at_once(80, 32, 128, 200 << 10) == 0


def test_the_table_has_a_line_for_each(kernels: list[dict[str, Any]]) -> None:
    table = all_fields(kernels).splitlines()
    assert len(table) == 2 + len(kernels)
    assert any("HGMMA" in line and "sm_90" in line and "fp16 tensor cores" in line for line in table)


def test_the_record_has_what_the_tables_print(kernels: list[dict[str, Any]]) -> None:
    """A table of the record is that of the whole report, and the record is much smaller."""
    report = {"versions": {"triton": "3"}, "kernels": kernels}
    kept = json.loads(json.dumps(record(report, "triton")))
    assert kept["versions"] == report["versions"] and 0 < len(kept["kernels"]) < len(kernels)
    for name in ("triton-static", "triton-candidates"):
        assert TABLES[name](kept["kernels"]) == TABLES[name](kernels)
        assert len(TABLES[name](kernels).splitlines()) > 10
    assert len(json.dumps(kept)) < len(json.dumps(report)) / 4
    of_others = {**report, "kernels": [{**kernel, "family": "cuda"} for kernel in kernels]}
    assert record(of_others, "triton")["kernels"] == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--record", ".", "--arch", "90"], "--record is of all kernels"),
        (["--record", ".", "--match", "kl"], "--record is of all kernels"),
        (["--family", "opencl"], "--family opencl: the families are"),
        (["--arch", "95"], "--arch 95: should be of 80, 90, 100"),
        (["--match", "("], "not a regular expression"),
    ],
)
def test_bad_arguments_are_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN7fastvae4cuda12_GLOBAL__N_17forwardIfEEvNS0_7MixtureIT_EE", "forward<float>"),
        ("_ZN7fastvae4cuda12_GLOBAL__N_18backwardILNS1_4SideE1EdEEvNS1_4TaskIT0_EE", "backward<components, double>"),
        ("_ZN7fastvae4cuda12_GLOBAL__N_17rsampleIfLb1EEEvNS0_6SampleIT_EEi", "rsample<float, true>"),
        ("_ZN7fastvae4cuda12_GLOBAL__N_110small_rowsIdLb0ELi2EEEvNS1_4TaskIT_EE", "small_rows<double, false, 2>"),
    ],
)
def test_cuda_kernels_are_called_what_the_source_calls_them(symbol: str, name: str) -> None:
    assert cuda_family.readable(symbol) == name


def test_a_loop_within_a_loop_is_the_innermost() -> None:
    """By its jump back; a jump forward is no loop."""
    operands = ["", "", " `(.L) 0x30", "", " 0x10", " P1, 0x0", ""]
    opcodes = ["MOV", "FFMA", "BRA", "FADD", "BRA", "BRA.U", "EXIT"]
    instructions = [(f"{16 * i:04x}", *both) for i, both in enumerate(zip(opcodes, operands, strict=True))]
    (loop,) = disassembly._inner_loops(instructions, opcodes)
    assert (loop.instructions, loop.multiply_adds, loop.share("FFMA")) == (4, 1, 0.25)


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cuda_family.shutil, "which", lambda name: None)
    assert main(["--family", "cuda"]) == 2
    assert "--family cuda: there is no nvcc" in capsys.readouterr().err


def test_one_command_reports_both_families(tmp_path: Path) -> None:
    """A Triton kernel and a CUDA kernel that do the same, in one table; the one source with it is compiled."""
    for family in all_families().values():
        if (why := family.missing()) is not None and "TRITON_INTERPRET" not in why:
            pytest.skip(why)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", OF_ONE_SOURCE, "--arch", "90"]
    command += ["--match", r"^(gaussian\.kl_kernel, KL, forward|kl<float, true>)", "--out", str(tmp_path / "both.json")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    found = json.loads((tmp_path / "both.json").read_text())
    assert [k["kernel"] for k in found["kernels"]] == ["kl<float, true>", "gaussian.kl_kernel"]
    assert {"nvcc", "triton"} <= set(found["versions"])
    # both read mu and logvar once, 16 bytes at a time
    assert all(k["bound_by"] == "memory" and k["loads"]["16"] > 0 for k in found["kernels"])
    assert len({k["floor_seconds"] for k in found["kernels"]}) == 1


OF_ONE_SOURCE = """
import sys
from tools.static_report.__main__ import main
from tools.static_report.families import cuda_family
whole = cuda_family.compile_source
cuda_family.compile_source = lambda source, arch: whole(source, arch) if source.name == "gaussian.cu" else (b"", [])
sys.exit(main(sys.argv[1:]))
"""


def test_the_interpreter_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the tests Triton interprets: then it cannot compile, and says so."""
    pytest.importorskip("triton")
    assert "TRITON_INTERPRET" in str(all_families()["triton"].missing())
