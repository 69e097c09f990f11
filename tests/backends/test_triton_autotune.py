"""The choice of tiles by time: the clock is one that says what a test wants, because an interpreter's says nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.internals import triton_module
from support.patience import PATIENCE

import fastvae

pytest.importorskip("triton")
autotune, tiles, tuned_tiles = (triton_module(name) for name in ("autotune", "tiles", "tuned_tiles"))


@dataclass
class Clock:
    """The candidates' milliseconds, in their order; an error is raised instead."""

    times: list[float | Exception]
    asked: list[Any] = field(default_factory=list)

    def __call__(self, run: Any) -> float:
        said = self.times[len(self.asked) % len(self.times)]
        self.asked.append(run.args[-1])
        run()
        if isinstance(said, Exception):
            raise said
        return said


@pytest.fixture
def clock(triton: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    """Tuning is on; of three small candidates the second is the fastest, unless a test says otherwise."""
    monkeypatch.setenv("FASTVAE_AUTOTUNE", "1")
    monkeypatch.setenv("FASTVAE_CACHE_DIR", str(tmp_path))
    forget(monkeypatch)
    clock = Clock([3.0, 1.0, 2.0])
    monkeypatch.setattr(autotune, "clock_of", lambda device: clock)

    def candidates(kind: str, *about: Any) -> list[Any]:
        first = tiles.tile_for(kind, *about)
        return [first, first._replace(rows=32, columns=32), first._replace(rows=64, columns=32)]

    monkeypatch.setattr(tiles, "candidates", candidates)
    return clock


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process does not know."""
    monkeypatch.setattr(autotune, "_known", {})
    monkeypatch.setattr(tuned_tiles, "_warned", set())


def choose(M: int = 40, K: int = 70, D: int = 8, kind: str = "forward", **changes: Any) -> Any:
    z, mu = torch.zeros(M, D), torch.zeros(K, D)
    given: dict[str, Any] = {"precision": "highest", "z": z, "mu": mu, "logvar": mu, "run": lambda tile: None}
    return autotune.choose(kind, **(given | changes))


def offered(kind: str = "forward") -> list[Any]:
    return tiles.candidates(kind, "highest", 8, 90, torch.float32)


def used(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tiles that calls from here on run with."""
    seen: list[Any] = []

    def watch(launch: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            seen.append(arguments[-1])
            launch(*arguments)

        return run

    for module in map(triton_module, ("mixture_forward", "mixture_parameters")):
        monkeypatch.setattr(module, "launch", watch(module.launch))
    return seen


def test_the_fastest_wins_and_is_timed_once(clock: Clock) -> None:
    assert [choose() for _ in range(3)] == [offered()[1]] * 3
    assert clock.asked == offered()


def test_calls_run_with_the_choice(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, score and parameters are each timed with whole calls, and then run with what won."""
    leaves = [t.requires_grad_() for t in (torch.randn(20, 8), torch.randn(40, 8), torch.zeros(40, 8))]
    for call, kind, count in (
        (lambda: fastvae.mixture_log_prob(*(t.detach() for t in leaves), impl="triton"), ["forward"], 1),
        (lambda: fastvae.mixture_log_prob(*leaves, impl="triton").sum().backward(), ["score", "parameters"], 2),
    ):
        clock.asked.clear()
        seen = used(monkeypatch)
        call()
        assert len(clock.asked) == 3 * count and len(seen) == 4 * count
        again = used(monkeypatch)
        call()
        assert len(clock.asked) == 3 * count and again == [offered(k)[1] for k in kind]


def test_tuning_changes_no_result(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates run over the same outputs; what is returned is the choice's, as if it had run alone."""
    results = []
    for _ in range(2):  # tuned, then known
        leaves = [t.requires_grad_() for t in (torch.ones(20, 8), torch.eye(40, 8), torch.zeros(40, 8))]
        log_prob = fastvae.mixture_log_prob(*leaves, impl="triton")
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), leaves)))
    assert len(clock.asked) == 6
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("value", [None, "0", ""])
def test_without_the_variable_the_table_decides(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, value: str | None, tmp_path: Path
) -> None:
    """Also where another process has left a choice."""
    choose()
    clock.asked.clear()
    forget(monkeypatch)
    monkeypatch.delenv("FASTVAE_AUTOTUNE") if value is None else monkeypatch.setenv("FASTVAE_AUTOTUNE", value)
    assert choose() == offered()[0] and not clock.asked


def test_the_interpreter_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor anything but a GPU."""
    monkeypatch.setenv("FASTVAE_AUTOTUNE", "1")
    monkeypatch.setenv("FASTVAE_CACHE_DIR", str(tmp_path))
    assert autotune.clock_of(torch.device("cpu")) is None and autotune.clock_of(torch.device("meta")) is None
    monkeypatch.setattr(autotune, "INTERPRETED", True)
    assert autotune.clock_of(torch.device("cuda")) is None
    assert choose() == tiles.tile_for("forward", "highest", 8, 90, torch.float32)
    assert not list(tmp_path.iterdir())


SECOND = """
import sys, torch
from fastvae.backends import triton
autotune, tiles = triton.load("autotune"), triton.load("tiles")
def never(run):
    raise SystemExit("timed again")
autotune.clock_of = lambda device: never
z, mu = torch.zeros(40, 8), torch.zeros(70, 8)
print(tuple(autotune.choose("forward", "highest", z, mu, mu, None)))
"""


def python(script: str, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TRITON_INTERPRET": "1"} | variables
    return subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)


def test_a_second_process_takes_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And so does this one, once it has forgotten; with real candidates, of which the last wins."""
    monkeypatch.setenv("FASTVAE_AUTOTUNE", "1")
    monkeypatch.setenv("FASTVAE_CACHE_DIR", str(tmp_path))
    clock = Clock([])
    real = tiles.candidates("forward", "highest", 8, 90, torch.float32)
    clock.times = [float(len(real) - i) for i in range(len(real))]
    monkeypatch.setattr(autotune, "clock_of", lambda device: clock)
    forget(monkeypatch)
    assert choose() == real[-1] and len(clock.asked) == len(real)
    forget(monkeypatch)
    assert choose() == real[-1] and len(clock.asked) == len(real)
    second = python(SECOND)
    told, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0 and told.strip() == str(tuple(real[-1]))


def test_nothing_is_timed_while_a_graph_is_captured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is taken, from the file too; otherwise the table, which is not taken for a choice later."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == offered()[0] and not clock.asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert choose() == offered()[1] and len(clock.asked) == 3
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose() == offered()[1]
    forget(monkeypatch)
    assert choose() == offered()[1] and len(clock.asked) == 3


def test_a_candidate_that_fails_is_passed_over(clock: Clock) -> None:
    clock.times = [3.0, RuntimeError("out of resource: shared memory\nmore"), 2.0]
    assert choose() == offered()[2]
    (entries,) = json.loads(tuned_tiles.path().read_text())["tiles"].values()
    assert [e["milliseconds"] for e in entries] == [2.0, 3.0, None]
    assert entries[2]["failure"] == "RuntimeError: out of resource: shared memory"


def test_where_all_fail_the_table_does_what_it_does(clock: Clock) -> None:
    """Its failure is the call's; and nothing is kept."""
    clock.times = [RuntimeError("out of memory")]
    assert choose() == offered()[0] and not tuned_tiles.path().exists()
    clock.times = [3.0, 1.0, 2.0]
    clock.asked.clear()
    assert choose() == offered()[1]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "",
        "[]",
        "\x00\xff",
        '{"other": 1}',
        '{"format": "fastvae tiles 2", "tiles": {}}',
        '{"format": "fastvae tiles 1", "tiles": {"a": [{"rows": 16}]}}',
        '{"format": "fastvae tiles 1", "tiles": {"a": []}}',
        '{"format": "fastvae tiles 1", "tiles": 1}',
    ],
)
def test_a_damaged_file_is_set_aside(clock: Clock, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """With a warning, whole, and beside what was set aside before; then all is as if there had been none."""
    file = tuned_tiles.path()
    for aside in ("tiles.json.bad", "tiles.json.bad1"):
        forget(monkeypatch)
        file.write_bytes(content.encode("latin1"))
        with pytest.warns(UserWarning, match=f"no record of tiles.*{aside}"):
            assert choose() == offered()[1]
        assert file.with_name(aside).read_bytes() == content.encode("latin1")
        assert len(json.loads(file.read_text())["tiles"]) == 1


def test_a_folder_that_cannot_be_written_is_told_once(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Then each process times for itself.  A file stands where the folder would be: that stops root, too."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTVAE_CACHE_DIR", str(tmp_path / "file"))
    assert [choose(), choose(), choose(D=16), choose(D=16)] == [offered()[1]] * 4
    assert len(clock.asked) == 6
    (warning,) = recwarn.list
    assert "kept for this process alone" in str(warning.message) and str(tmp_path / "file") in str(warning.message)


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FASTVAE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned_tiles.path() == tmp_path / ".cache" / "fastvae" / "tiles.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned_tiles.path() == tmp_path / "xdg" / "fastvae" / "tiles.json"
    monkeypatch.setenv("FASTVAE_CACHE_DIR", str(tmp_path / "own"))
    assert tuned_tiles.path() == tmp_path / "own" / "tiles.json"


def test_the_key_is_bucketed(clock: Clock) -> None:
    """M and K by powers of two, D as it is padded: within them nothing is timed anew."""
    for M, K, D in ((33, 65, 5), (64, 128, 8), (40, 70, 7)):
        choose(M, K, D)
    assert len(clock.asked) == 3
    for M, K, D in ((65, 70, 8), (32, 70, 8), (40, 129, 8), (40, 64, 8), (40, 70, 9)):
        choose(M, K, D)
    assert len(clock.asked) == 6 * 3


def test_the_key_tells_apart_what_has_another_best_tile(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind, sums, precision, dtype, variance, device, architecture, Triton."""
    double = torch.zeros(40, 8, dtype=torch.float64)
    changes: list[dict[str, Any]] = [
        {},
        {"kind": "score"},
        {"detail": " dense"},
        {"precision": "high"},
        {"z": double},
        {"logvar": torch.zeros(1, 8)},
    ]
    for change in changes:
        choose(**change)
    monkeypatch.setattr(autotune, "_name", lambda device: "another GPU")
    choose()
    monkeypatch.setattr(tiles, "capability", lambda device: 100)
    choose()
    monkeypatch.setattr(autotune.triton, "__version__", "9.9")
    choose()
    assert len(clock.asked) == 3 * 9
    found = list(json.loads(tuned_tiles.path().read_text())["tiles"])
    assert "another GPU, sm_100, Triton 9.9, forward, highest, float32, D 8, a variance each, M 64, K 128" in found
    assert any("one variance" in key for key in found) and any("float64" in key for key in found)


def test_what_others_wrote_stays(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process writes while this one times: both are kept, and of one key what came first."""
    choose(D=16)
    between: list[Any] = []

    def other(tile: Any) -> None:
        if not between:
            between.append(tuned_tiles.keep("another", [tuned_tiles.Timed(tile, 1.0)], [tile]))
            first = tuned_tiles.Timed(offered()[2], 0.5)
            key = autotune.key_of("forward", "highest", *[torch.zeros(40, 8)] + [torch.zeros(70, 8)] * 2, "")
            between.append(tuned_tiles.keep(str(key), [first], offered()))

    assert choose(run=other) == offered()[2]
    assert len(json.loads(tuned_tiles.path().read_text())["tiles"]) == 3
    forget(monkeypatch)
    assert choose() == offered()[2] and choose(D=16) == offered()[1] and len(clock.asked) == 6


def test_what_is_no_longer_offered_is_timed_anew(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of other kernels' tiles: one of them may be none for these."""
    choose()
    forget(monkeypatch)
    left = [offered()[0], offered()[2]]
    monkeypatch.setattr(tiles, "candidates", lambda *about: left)
    clock.times, clock.asked = [2.0, 1.0], []
    assert choose() == left[1] and clock.asked == left
    forget(monkeypatch)
    assert choose() == left[1] and clock.asked == left


MANY = """
from fastvae.backends import triton
tiles, tuned_tiles = triton.load("tiles"), triton.load("tuned_tiles")
tile = tiles.Tile(16, 16, 16, 4, 1)
for n in range(10):
    tuned_tiles.keep("{NAME} " + str(n), [tuned_tiles.Timed(tile, 1.0)], [tile])
"""


def test_processes_that_write_at_once_lose_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTVAE_CACHE_DIR", str(tmp_path))
    running = [python(MANY.replace("{NAME}", name)) for name in "ab"]
    assert [process.wait(timeout=PATIENCE) for process in running] == [0, 0]
    assert len(json.loads(tuned_tiles.path().read_text())["tiles"]) == 20
    assert {f.name for f in tmp_path.iterdir()} == {"tiles.json", "tiles.json.lock"}
