"""The evaluation of a run, stopped and gone on with."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastvae import VAE, use_backend
from fastvae.app import workflow
from fastvae.app.run import evaluation
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.trained import load_run
from fastvae.backends.choice import current

from .conftest import Cli


def test_evaluation_goes_on(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done before a stop isn't done again, and the result is that of an evaluation that never stopped."""
    monkeypatch.setattr(evaluation, "BATCH", 3)
    command = ["evaluate", run, "--samples", 20]
    assert cli(*command)[0] == 0
    whole = json.loads((run / "evaluation.json").read_text())
    unfinished = run / "evaluation-unfinished-20-highest.json"
    assert not unfinished.exists()

    log_likelihood, calls = VAE.log_likelihood, []

    def counted(self: VAE, x: Tensor, num_samples: int = 5000, *, y: Tensor | None = None) -> Tensor:
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return log_likelihood(self, x, num_samples, y=y)

    monkeypatch.setattr(VAE, "log_likelihood", counted)
    code, text, _ = cli(*command)
    assert code == 130 and "goes on from here" in text
    assert len(json.loads(unfinished.read_text())["log_likelihood"]) == 6
    # These neither take it up nor replace it.
    for other in (["--samples", 21, "--limit", 3], ["--samples", 21], ["--samples", 20, "--precision", "high"]):
        code, _, error = cli("evaluate", run, *other)
        assert code == 0, error
        assert len(json.loads(unfinished.read_text())["log_likelihood"]) == 6
    calls[:] = [0, 0, 0]
    assert cli(*command)[0] == 0
    assert sum(calls) == whole["images"] - 6
    assert not unfinished.exists()
    again = json.loads((run / "evaluation.json").read_text())
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}


@pytest.mark.parametrize("plan", [EvaluationPlan(samples=5), EvaluationPlan(samples=5, precision="medium")])
def test_the_precision_is_the_plans(run: Path, monkeypatch: pytest.MonkeyPatch, plan: EvaluationPlan) -> None:
    """Whatever is said outside."""
    log_likelihood, found = VAE.log_likelihood, set()

    def looking(self: VAE, *arguments: Any, **options: Any) -> Tensor:
        found.add(current().precision)
        return log_likelihood(self, *arguments, **options)

    monkeypatch.setattr(VAE, "log_likelihood", looking)
    with use_backend(precision="high"):
        assert evaluation.evaluate(load_run(run), plan).precision == plan.precision
    assert found == {plan.precision}


def test_an_evaluation_by_another_plan_is_made_anew_and_kept(run: Path) -> None:
    """Also one of before its precision was kept: nobody knows what it was."""
    told, loaded, path, plan = StringIO(), load_run(run), run / "evaluation.json", EvaluationPlan(samples=3)
    console = Console(file=told)
    workflow.evaluate_run(console, loaded, EvaluationPlan(samples=3, precision="medium"))
    by_medium = path.read_bytes()
    found = workflow.evaluate_once(console, loaded, plan)
    assert found.precision == "highest" and (run / "evaluation-3-medium.json").read_bytes() == by_medium
    assert f"it is kept as {run / 'evaluation-3-medium.json'}, and made anew with 3 at highest" in told.getvalue()
    assert workflow.evaluate_once(console, loaded, plan) == found
    old = json.loads(path.read_text())
    del old["precision"]
    path.write_text(json.dumps(old | {"log_likelihood": -1.0}))
    assert workflow.evaluate_once(console, loaded, plan).log_likelihood == found.log_likelihood
    assert json.loads((run / "evaluation-3-unknown.json").read_text())["log_likelihood"] == -1.0


@pytest.mark.parametrize(("module", "name"), [(evaluation, "measure_gap"), (workflow, "draw_gap")])
def test_stopped_after_the_log_likelihood(
    cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    """The long part is kept until all is done."""

    def stop(run: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        assert cli("evaluate", run, "--samples", 20)[0] == 130
    monkeypatch.setattr(VAE, "log_likelihood", lambda *_: pytest.fail("this was done before"))
    code, _, error = cli("evaluate", run, "--samples", 20)
    assert code == 0, error
    assert (run / "evaluation.json").exists() and not list(run.glob("*unfinished*"))


def test_no_finite_log_likelihood(cli: Cli, run: Path) -> None:
    state = torch.load(run / "checkpoint.pt")
    state["best_model"]["decoder.logits.bias"][:] = 3e38
    torch.save(state, run / "checkpoint.pt")
    code, _, error = cli("evaluate", run, "--samples", 5)
    assert code == 1 and "log-likelihood of test image 0 is -inf, no finite number" in error
    assert not (run / "evaluation.json").exists()


def test_killed(cli: Cli, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is written along the way too, for a process that cannot tidy up."""
    monkeypatch.setattr(evaluation, "BATCH", 3)
    monkeypatch.setattr(evaluation, "KEEP_EVERY", -1.0)
    lengths = []
    write = evaluation.write_json
    monkeypatch.setattr(
        evaluation,
        "write_json",
        lambda path, content: (lengths.append(len(content["log_likelihood"])), write(path, content)),
    )
    assert cli("evaluate", run, "--samples", 5, "--limit", 7)[0] == 0
    assert lengths == [3, 6, 7, 7]


def test_some_images_are_spread_over_the_set(run: Path) -> None:
    """A set may be ordered by class."""
    loaded = load_run(run)
    test = loaded.dataset.test.x
    assert len(test) == 8
    plan = EvaluationPlan("test", 5, limit=3)
    assert torch.equal(plan.images(loaded.dataset), test[[0, 2, 5]])
    for limit in (None, 8, 100):
        assert torch.equal(EvaluationPlan("test", 5, limit=limit).images(loaded.dataset), test)


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"log_likelihood": 3}'])
def test_damaged_unfinished_evaluation(cli: Cli, run: Path, damage: str) -> None:
    assert cli("evaluate", run, "--samples", 5)[0] == 0
    whole = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation-unfinished-5-highest.json").write_text(damage)
    code, _, error = cli("evaluate", run, "--samples", 5)
    assert code == 0, error
    assert json.loads((run / "evaluation.json").read_text())["log_likelihood"] == whole["log_likelihood"]
