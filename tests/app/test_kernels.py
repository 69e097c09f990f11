"""--impl, --precision and --dense-backward: who computes, on every command that computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import internals

from fastvae.app.options import IMPLS, PRECISIONS
from fastvae.backends import PRECISIONS as ALL_PRECISIONS
from fastvae.backends import registry

from .conftest import TINY, Cli

COMMANDS = {
    "train": ("train", "--data", "tiny.npz", "--out", "new", *TINY),
    "compare": ("compare", "--data", "tiny.npz", "--out", "all", "--seeds", 1, "--samples", 10, *TINY),
    "evaluate": ("evaluate", "run", "--samples", 10),
    "sample": ("sample", "run"),
}


def test_the_names_are_those_of_the_library() -> None:
    assert set(IMPLS) == set(registry.IMPLS) and PRECISIONS == ALL_PRECISIONS


@pytest.mark.usefixtures("tiny_npz", "run")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_them(command: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = internals.note_backends(monkeypatch)
    code, _, error = cli(*COMMANDS[command], "--impl", "triton", "--precision", "high")
    assert code == 0, error
    assert asked and set(asked) <= {"triton", "triton-high"}
    assert command == "sample" or "triton-high" in asked
    asked.clear()
    code, _, error = cli(*COMMANDS[command], *(["--overwrite"] if command in ("train", "compare") else []))
    assert code == 0 and asked and set(asked) == {"cpu"}, error


@pytest.mark.usefixtures("tiny_npz")
def test_a_run_notes_what_computed_it(cli: Cli) -> None:
    assert cli(*COMMANDS["train"], "--impl", "composite", "--dense-backward")[0] == 0
    assert json.loads(Path("new/results.json").read_text())["impl"] == "composite"


@pytest.mark.usefixtures("tiny_npz", "run")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_one_is_told(command: str, cli: Cli) -> None:
    for option, value, told in (
        ("--impl", "gpu", "--impl is 'gpu'; it can be cpu, cuda, triton, composite, reference."),
        ("--precision", "low", "--precision is 'low'; it can be highest, high, medium."),
        ("--impl", "cuda", "--impl cuda: impl='cuda' cannot run"),
    ):
        if value == "cuda":
            command_line = (*COMMANDS[command], "--device", "cpu")
            if internals.missing_cuda() is None:
                told = "--impl cuda: impl='cuda' takes tensors on cuda"
        else:
            command_line = COMMANDS[command]
        code, _, error = cli(*command_line, option, value)
        assert code == 1 and told in error and "Traceback" not in error
    assert not Path("new").exists() and not Path("all").exists()
