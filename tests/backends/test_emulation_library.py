"""How the emulations are compiled: once for each state of their sources, by one process, and once in vain."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulation import library
from emulation.library import CompileError
from support.patience import PATIENCE

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A source and a header, beside which libraries are built."""
    monkeypatch.setattr(library, "BUILD", tmp_path / "build")
    (tmp_path / "answer.h").write_text("constexpr int kAnswer = 42;\n")
    file = tmp_path / "answer.cu"
    file.write_text('#include "answer.h"\nextern "C" int answer() { return kAnswer; }\n')
    return file


def build(source: Path) -> Path:
    return library.library("answer", [source], [source.parent], [])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is compiled from here on."""
    compiled: list[Path] = []
    real = library._compile

    def watch(built: Path, *rest: object) -> None:
        compiled.append(built)
        real(built, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(library, "_compile", watch)
    return compiled


def test_once_for_each_state_of_the_sources(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = counted(monkeypatch)
    first = build(source)
    assert ctypes.CDLL(str(first)).answer() == 42
    assert build(source) == first and len(compiled) == 1
    (source.parent / "answer.h").write_text("constexpr int kAnswer = 43;\n")
    second = build(source)
    assert len(compiled) == 2 and not first.exists(), "what is out of date is removed"
    assert ctypes.CDLL(str(second)).answer() == 43


def test_what_does_not_compile_is_told_once_and_tried_again_by_another_run(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = counted(monkeypatch)
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "this run")
    whole = source.read_text()
    source.write_text(whole.replace("kAnswer;", "kQuestion;"))
    with pytest.raises(CompileError, match="kQuestion"):
        build(source)
    with pytest.raises(CompileError, match=r"answer does not compile, see .*log"):
        build(source)
    assert len(compiled) == 1 and not list(library.BUILD.glob("*.so"))
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", "another run")
    with pytest.raises(CompileError, match="kQuestion"):
        build(source)
    source.write_text(whole)
    assert build(source).exists()


def test_the_outcome_is_kept_by_a_process() -> None:
    tries: list[int] = []

    def fails() -> None:
        tries.append(1)
        raise CompileError("it does not compile:\nbecause of line 3")

    kept = library.once(fails)
    with pytest.raises(CompileError, match="line 3"):
        kept()
    with pytest.raises(CompileError) as again:
        kept()
    assert len(tries) == 1 and "line 3" not in str(again.value)


def test_of_two_processes_one_compiles(source: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from pathlib import Path\nfrom emulation import library\n"
        "library.BUILD, real = Path(sys.argv[3]), library._compile\n"
        "def watch(*given):\n    print('compiles')\n    real(*given)\n"
        "library._compile = watch\n"
        "library.library('answer', [Path(sys.argv[4])], [], [])\n"
    )
    tests = Path(library.__file__).parents[1]
    command = [sys.executable, "-c", script, tests, tests.parent, source.parent / "build", source]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=PATIENCE)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0] and "".join(told).count("compiles") == 1
