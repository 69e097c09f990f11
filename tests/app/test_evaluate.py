"""The evaluation of a run, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from fastvae import VAE
from fastvae.app.run import evaluation

from .conftest import Cli


def test_evaluation_goes_on(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done before a stop isn't done again, and the result is that of an evaluation that never stopped."""
    monkeypatch.setattr(evaluation, "BATCH", 3)
    monkeypatch.setattr(evaluation, "KEEP_EVERY", -1.0)
    command = ["evaluate", run, "--samples", 20]
    assert cli(*command)[0] == 0
    whole = json.loads((run / "evaluation.json").read_text())

    log_likelihood, calls = VAE.log_likelihood, []

    def counted(self: VAE, x: Tensor, num_samples: int = 5000, *, y: Tensor | None = None) -> Tensor:
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return log_likelihood(self, x, num_samples, y=y)

    monkeypatch.setattr(VAE, "log_likelihood", counted)
    code, text, _ = cli(*command)
    assert code == 130 and "goes on from here" in text
    assert len(json.loads((run / "evaluation-unfinished.json").read_text())["log_likelihood"]) == 6
    code, _, error = cli("evaluate", run, "--samples", 21, "--limit", 3)  # another measurement does not take it up
    assert code == 0, error
    assert (run / "evaluation-unfinished.json").exists()
    calls[:] = [0, 0, 0]
    assert cli(*command)[0] == 0
    assert sum(calls) == whole["images"] - 6
    assert not (run / "evaluation-unfinished.json").exists()
    again = json.loads((run / "evaluation.json").read_text())
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"log_likelihood": 3}'])
def test_damaged_unfinished_evaluation(cli: Cli, run: Path, damage: str) -> None:
    assert cli("evaluate", run, "--samples", 5)[0] == 0
    whole = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation-unfinished.json").write_text(damage)
    code, _, error = cli("evaluate", run, "--samples", 5)
    assert code == 0, error
    assert json.loads((run / "evaluation.json").read_text())["log_likelihood"] == whole["log_likelihood"]
