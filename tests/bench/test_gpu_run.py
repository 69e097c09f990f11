"""The run of everything on a GPU: its stages, how one survives another, its verdicts; without a GPU."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastvae.backends import triton
from tools.gpu import build, delivery, pytest_log, sanitize, stages, tune
from tools.gpu import gpu_targets as targets
from tools.gpu.__main__ import main
from tools.gpu.clocks import KernelClock
from tools.gpu.stage import FAILED, LEFT_OUT, OVERTIME, PASSED, Context, Stage, run
from tools.gpu.stages import STAGES
from tools.gpu.training import SMALL, Training


def stage(name: str, script: str, **changes: object) -> Stage:
    return replace(Stage(name, 0.2, lambda context: ["-c", script]), **changes)  # type: ignore[arg-type]


def test_the_stages_and_their_time() -> None:
    """In the order of their worth, and together within one command of ten minutes."""
    names = [
        "build",
        "measure",
        "test",
        "train",
        "bench",
        "sanitize",
        "tune",
        "keops",
        "flash-gmm",
        "static",
        "figures",
    ]
    assert [s.name for s in STAGES] == names
    assert sum(s.seconds for s in STAGES) <= stages.TOTAL < 600


def test_the_page_has_the_stages_and_their_time() -> None:
    page = (stages.ROOT / "docs" / "developers" / "testing.md").read_text()
    text = page.partition("## On a GPU\n")[2].partition("\n## ")[0]
    written = [
        (name, float(seconds))
        for names, numbers in re.findall(r"^\| ([\w, -]+) \| ([\d, ]+) \|", text, re.MULTILINE)
        for name, seconds in zip(names.split(", "), numbers.split(", "), strict=True)
    ]
    assert written == [(s.name, s.seconds) for s in STAGES]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Python code; the time of a process begins once it has run this or has ended, however long starting takes."""

    class Begun(subprocess.Popen[Any]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            while not (tmp_path / f"begun-{self.pid}").exists() and self.poll() is None:
                time.sleep(0.01)

    monkeypatch.setattr(subprocess, "Popen", Begun)
    return f"import os; print('begun', flush=True); open({str(tmp_path)!r} + f'/begun-{{os.getpid()}}', 'w').close()"


def test_what_becomes_of_a_stage(tmp_path: Path, begun: str) -> None:
    """Passed, failed, out of time, or left out; its log is kept, and nothing is raised."""
    context = Context(tmp_path, dry=True)
    good = run(stage("good", "print('one'); print('two')", seconds=10), context)
    assert (good.status, good.detail) == (PASSED, "two") and (tmp_path / "good.log").read_text() == "one\ntwo\n"
    bad = run(stage("bad", "raise SystemExit('no such device')", seconds=10), context)
    assert (bad.status, bad.detail) == (FAILED, "no such device")
    late = run(stage("late", f"import time; {begun}; time.sleep(60)", seconds=0.02), context)
    assert late.status == OVERTIME and "begun" in (tmp_path / "late.log").read_text() and late.seconds < 30
    left = run(stage("left", "", why_not=lambda context: "there is no nvcc"), context)
    assert (left.status, left.detail) == (LEFT_OUT, "there is no nvcc")


def test_all_stages_together_have_their_time_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has less of it left than of its own is ended earlier; after that the others are left out."""
    context = Context(tmp_path, dry=True)
    monkeypatch.setattr("tools.gpu.stage.LEAST", 0.1)
    late = run(stage("late", "import time; time.sleep(60)", seconds=60), context, 0.2)
    assert late.status == OVERTIME and late.seconds < 30
    left = run(stage("left", "print('ran')", seconds=60), context, 0.05)
    assert left.status == LEFT_OUT and "took all the time" in left.detail


def test_variables_are_set_and_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTVAE_ONE", "1")
    script = "import os; print(os.environ.get('FASTVAE_ONE'), os.environ.get('FASTVAE_TWO'))"
    given = {"FASTVAE_ONE": None, "FASTVAE_TWO": "2"}
    assert (
        run(stage("s", script, seconds=10, variables=lambda context: given), Context(tmp_path, True)).detail == "None 2"
    )


def test_a_dry_run_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One stage fails, the next runs; the summary has both, and the command says that one failed."""
    two = (stage("first", "raise SystemExit('broken')", seconds=10), stage("second", "print('fine')", seconds=10))
    monkeypatch.setattr("tools.gpu.__main__.STAGES", two)
    assert main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert found["dry"] and [(s["name"], s["status"]) for s in found["stages"]] == [
        ("first", FAILED),
        ("second", PASSED),
    ]
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert page.startswith("# A dry run, without a GPU") and "| first | failed |" in page and "broken" in page
    assert main(["--dry-run", "--only", "second", "--out", str(tmp_path / "out")]) == 0
    assert "| second | passed |" in capsys.readouterr().out


def test_the_tests_that_fail_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the stage "test", from pytest's own words."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', ['a b', 'c - d', 'e'])\n"
        "def test_it(n): assert n == 'e', 'no - more'\n"
        "def test_left_out(): pytest.skip('why')\n"
    )
    command = ["-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    tests = Stage("test", 60, lambda context: command)
    monkeypatch.setattr("tools.gpu.__main__.STAGES", (tests,))
    assert main(["--dry-run", "--out", str(tmp_path / "out")]) == 1
    (found,) = json.loads((tmp_path / "out" / "tests.json").read_text())["runs"]
    failures = [failure.rpartition("/")[2] for failure in found.pop("failures")]
    assert failures == ["test_it.py::test_it[a b]", "test_it.py::test_it[c - d]"]
    assert found == {"passed": 1, "failed": 2, "skipped": 1, "ended_early": False}


def test_a_log_without_a_run_says_nothing() -> None:
    assert pytest_log.outcomes("no module named pytest\n") is None
    assert pytest_log.outcomes("!!! KeyboardInterrupt !!!\n4 failed, 2 passed in 1.3s (0:02:21)\n") == {
        "passed": 2, "failed": 4, "skipped": 0, "ended_early": True, "failures": []
    }  # fmt: skip


def test_a_test_file_is_found_in_whatever_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    (tmp_path / "tests" / "backends").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"should have one test_gpu\.py, it has none"):
        stages.find_test("test_gpu.py")
    (tmp_path / "tests" / "backends" / "test_gpu.py").touch()
    assert stages.find_test("test_gpu.py") == "tests/backends/test_gpu.py"
    (tmp_path / "tests" / "test_gpu.py").touch()
    with pytest.raises(FileNotFoundError, match="should have one"):
        stages.find_test("test_gpu.py")


def test_bad_arguments_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--only", "nothing"]) == 2
    assert "--only nothing: the stages are build, measure" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main([]) == 2
        assert "no CUDA device; --dry-run" in capsys.readouterr().err


def test_targets_are_met_missed_or_never_run() -> None:
    assert all(target.verdict({})[1] == targets.NEVER_RUN for target in targets.TARGETS)
    assert all(f"| {targets.NEVER_RUN} |" in line for line in targets.target_table({}).splitlines()[2:])
    rates = {"multiply-add rate": 60e12, "tf32 rate": 400e12, "copy rate": 4e12}
    fast = rates | {"forward high": 6e-4, "forward medium": 3e-4, "forward highest": 1.4e-3, "both high": 2e-3}
    fast |= {"forward expansion": 2e-3, "forward expansion tf32": 1e-3, "both expansion": 7e-3}
    fast |= {"rsample": 13e-6, "peak memory": 1.5e9, "graph": 30e-6, "small": 6e-6, "KL graph": 15e-6}
    fast |= {"both expansion, diffuse": 1.5e-3, "both expansion tf32, diffuse": 8e-4}
    fast |= {"forward expansion, mnist_latents": 3e-4, "both expansion, mnist_latents": 1.2e-3}
    cuda = {"forward cuda": 8e-4, "both cuda": 4e-3, "rsample cuda": 13e-6, "small cuda": 7e-6}
    cuda |= {"forward cuda high": 3e-4, "both cuda high": 1.9e-3}
    cuda |= {"both cuda highest, diffuse": 1e-3, "both cuda high, diffuse": 5e-4}
    cuda |= {"forward cuda highest, mnist_latents": 8e-5, "both cuda highest, mnist_latents": 2e-4}
    fast |= cuda | {"step cuda captured 500, call": 9e-4, "step cuda 500, call": 5e-3, "step eager 500, call": 6e-3}
    assert [target.verdict(fast)[1] for target in targets.TARGETS] == [targets.MET] * len(targets.TARGETS)
    ours = ("forward high", "forward medium", "forward highest", "both high", "rsample", "peak memory", "graph")
    ours += ("small", "KL graph")
    slow = fast | {name: 2 * fast[name] for name in ours} | {name: 5 * seconds for name, seconds in cuda.items()}
    slow |= {"step cuda captured 500, call": 2e-3, "step cuda 500, call": 7e-3}
    assert [target.verdict(slow)[1] for target in targets.TARGETS] == [targets.MISSED] * len(targets.TARGETS)


def test_a_dry_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every candidate's time, the table's told apart, by the users' mechanism; what fails costs no other."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("interprets, which it does not where there is a GPU")
    works = [tune.Work("forward", "highest", (5, 9, 3)), tune.Work("score", "highest", (5, 0, 3))]
    works.append(tune.Work("parameters", "highest", (5, 9, 3), double=True))
    monkeypatch.setattr(tune, "works", lambda dry: iter(works))

    def compile_all(chosen: list[tune.Work], device: str) -> None:
        tune.compile_tiles(chosen[0], device)  # in another process, where this one would not know of it
        monkeypatch.setattr(triton.load("autotune"), "_known", {})

    monkeypatch.setattr(tune, "compile_all", compile_all)
    (tmp_path / "tiles.json").write_text("of an earlier run")
    assert tune.main(["--dry-run", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "tune.json").read_text())
    assert found["dry"] and list(found["failed"]) == [str(works[1])]
    assert [one["work"] for one in found["calls"]] == [str(works[0]), str(works[2])]
    offered = triton.load("tiles").candidates("forward", "highest", 3, 90, torch.float32)
    timed = found["calls"][0]["timed"]
    assert {tuple(one[name] for name in offered[0]._fields) for one in timed} == set(offered)
    assert all(one["milliseconds"] > 0 for one in timed) and sum(one["table"] for one in timed) == 1
    assert "2 calls tuned, 1 failed" in capsys.readouterr().out


def test_the_stages_commands_are_there() -> None:
    """Modules and files that the stages name exist."""
    for dry in (True, False):
        for s in STAGES:
            first, *rest = s.arguments(Context(Path("/nowhere"), dry))
            if first == "-m":
                __import__(rest[0]) if rest[0] not in ("pytest",) else None
                assert rest[0] in sys.modules or rest[0] == "pytest"
            else:
                assert (Path(__file__).parents[2] / first).is_file()


def test_what_would_be_too_large_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long log the end is kept; what does not fit any more has its name in LEFT_OUT."""
    monkeypatch.setattr(delivery, "LARGEST", 1000)
    monkeypatch.setattr(delivery, "MOST", 2500)
    (tmp_path / "short.log").write_bytes(b"short")
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.log").write_bytes(os.urandom(5000) + name.encode())
    files = sorted(tmp_path.iterdir())
    with tarfile.open(fileobj=io.BytesIO(delivery.packed(files, tmp_path))) as tar:
        contents = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    assert contents["short.log"] == b"short"
    kept = [name for name in ("a", "b", "c") if f"{name}.log" in contents]
    assert all(
        len(contents[f"{name}.log"]) == 1000 and contents[f"{name}.log"].endswith(name.encode()) for name in kept
    )
    assert contents["LEFT_OUT"].decode().split() == [f"{name}.log" for name in ("a", "b", "c") if name not in kept]
    assert 0 < len(kept) < 3


class Device:
    """A GPU's clock: it sleeps for as long as it is told, and each launch takes the host a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, launch: int) -> None:
        self.host, self.free, self.launch, self.slept = 0, 0, launch, []
        device = self

        class Event:
            def __init__(self, **_: object) -> None:
                self.at = 0

            def record(self) -> None:
                self.at = max(device.host, device.free)

            def query(self) -> bool:
                return self.at <= device.host

            def elapsed_time(self, end: Event) -> float:
                return float(end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep, raising=False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(zero_=lambda: None))

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles)
        self.host = max(self.host, self.free)
        self.free = self.host + cycles

    def kernel(self, milliseconds: int) -> None:
        self.host += self.launch
        self.free = max(self.host, self.free) + milliseconds


@pytest.mark.parametrize("launches", [1, 5])
def test_kernels_are_timed_behind_a_full_queue(launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sleep grows until the whole call is queued, and the launches are not in the time."""
    device = Device(monkeypatch, launch=1 << 20)
    clock = KernelClock()
    seconds = clock(lambda: [device.kernel(3) for _ in range(launches)], 2)
    assert seconds == 0.003 * launches
    assert device.slept[-1] > launches * device.launch and len(set(device.slept)) == (1 if launches == 1 else 3)


def test_a_call_that_waits_for_the_device_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, launch=1)

    def waits() -> None:
        device.kernel(3)
        device.host = device.free + 1

    assert KernelClock()(waits, 1) > 0 and device.slept[-1] == KernelClock.LONGEST


def test_a_step_from_a_graph_is_the_step() -> None:
    """Where there is no graph it runs as usual; the eager prior and ours start from the same weights."""
    losses = {}
    for prior in ("eager", "composite"):
        usual, captured = (Training(prior, 7, "cpu", SMALL) for _ in range(2))
        torch.manual_seed(0)
        losses[prior] = [float(usual.step()) for _ in range(3)]
        torch.manual_seed(0)
        third = captured.captured()  # after two steps
        assert float(third()) == losses[prior][2]  # type: ignore[arg-type]
    assert losses["eager"][0] == pytest.approx(losses["composite"][0], rel=0.2)  # the noise is not the same


def test_a_tool_that_does_not_end_costs_the_other_nothing(begun: str, capsys: pytest.CaptureFixture[str]) -> None:
    python = [sys.executable, "-c"]
    found = sanitize.watched(
        {
            "slow": [*python, f"import time; {begun}; time.sleep(60)"],
            "bad": [*python, "raise SystemExit('a race')"],
            "good": [*python, "print('nothing found')"],
        },
        seconds=1,
    )
    assert found == {"slow": "did not end in 1 s", "bad": "failed", "good": "clean"}
    told = capsys.readouterr().out
    assert all(words in told for words in ("begun", "a race", "nothing found"))


@pytest.mark.parametrize(
    ("said", "aside", "built"),
    [
        ("print(None)", False, None),
        ("print(None)", True, None),
        ("print('the extension was not built')", False, ["--inplace"]),
        ("raise ImportError('an extension of other sources')", True, ["--build-lib", "--build-temp"]),
    ],
)
def test_what_is_there_and_loads_is_not_built(
    said: str, aside: bool, built: list[str] | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Whatever keeps an extension from being loaded is a reason to build one: in place, in a dry run aside."""
    (tmp_path / "setup.py").write_text("import json, sys; json.dump(sys.argv, open('asked.json', 'w'))")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "ASK", said)
    assert build.main(["--aside", str(tmp_path / "aside")] if aside else []) == 0
    told, asked = capsys.readouterr().out, tmp_path / "asked.json"
    assert asked.exists() == (built is not None)
    if built is None:
        assert told == "the extension is there, and loads\n"
        return
    assert [word for word in json.loads(asked.read_text()) if word.startswith("--")] == built
    assert told.startswith("built, because ") and ("not built" in told or "other sources" in told)
