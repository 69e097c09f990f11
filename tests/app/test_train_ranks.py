"""Training by several real processes: the curve of one process, files by one of them, and errors on all."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ranks as processes
from support.patience import PATIENCE
from support.training import CONFIG, evaluate_on, train_in_own_folder, train_on, train_wrongly

from fastvae.app.run import evaluation
from fastvae.app.run.checkpoint import Checkpoint, read_checkpoint
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.trained import load_run

from .conftest import ENVIRONMENT, TINY, Cli
from .test_train import assert_same, flat


@pytest.fixture(scope="module")
def three() -> Iterator[processes.Ranks]:
    ranks = processes.Ranks(3)
    yield ranks
    ranks.close()


def assert_close(a: Checkpoint, b: Checkpoint) -> None:
    """To the rounding of sums that were added in another order."""
    assert a["best_epoch"] == b["best_epoch"]
    measured, expected = dict(flat(a["history"])), dict(flat(b["history"]))
    assert measured.keys() == expected.keys() and len(expected) == 11 * a["epoch"]
    for key, value in expected.items():
        assert key.endswith("/seconds") or measured[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    for name, weights in b["model"].items():
        torch.testing.assert_close(a["model"][name], weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"prior": "standard", "model": "hvae", "gradient": "stl", "num_samples": 2},
        {"prior": "mixture", "learn_weights": True, "conditional": True},
        {"prior": "vamp", "normalize_gradients": True},
        {"prior": "vamp", "refresh": 0.5, "bound": "iwae", "num_samples": 3, "gradient": "dreg", "chunk_size": 4},
        {"prior": "standard", "bound": "iwae", "num_samples": 4, "gradient": "plain", "backward_samples": 2},
        {"prior": "exemplar", "shared_variance": True, "chunk_size": 7},
        {"prior": "exemplar", "subset": 20},
    ],
    ids=str,
)
def test_three_ranks_give_the_curve_and_the_weights_of_one_process(
    tmp_path: Path, three: processes.Ranks, settings: dict[str, Any]
) -> None:
    config = replace(CONFIG, **settings)
    states = three(train_on, 3, config, tmp_path / "together")
    assert_close(states[0], train_on(0, 1, config, tmp_path / "alone"))
    for state in states[1:]:
        assert_same(state, states[0])


def test_a_run_goes_on_with_any_number_of_ranks(tmp_path: Path, three: processes.Ranks) -> None:
    """With the same number, to the same bits."""
    config = replace(CONFIG, epochs=3, hidden=50)
    straight, *_ = three(train_on, 3, config, tmp_path / "straight")
    three(train_on, 3, replace(config, epochs=2), tmp_path / "same")
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    resumed, *_ = three(partial(train_on, resume=True), 3, config, tmp_path / "same")
    assert_same(resumed, straight)
    assert_same(read_checkpoint(RunFolder(tmp_path / "same")), straight)
    assert_close(train_on(0, 1, config, tmp_path / "other", resume=True), straight)


def test_three_ranks_evaluate_as_one_process_does(run: Path, three: processes.Ranks) -> None:
    """To the bit; also where another number of ranks goes on, and where the last ranks have no images left."""
    kept = RunFolder(run).unfinished_evaluation("", 7, "highest")
    together = three(evaluate_on, 3, run, 7)
    content = json.loads(kept.read_bytes())
    kept.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "BATCH", 3)
        alone = evaluation.log_likelihoods(load_run(run), EvaluationPlan(samples=7))
        assert len(alone) == 8 and json.loads(kept.read_bytes()) == content
        kept.write_text(json.dumps({**content, "log_likelihood": content["log_likelihood"][:3]}))
    for values in together + three(evaluate_on, 3, run, 7):
        assert torch.equal(values, alone)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("not a number", "RunError: the training loss became nan in epoch 1"),
        ("other settings", "ConfigError: .*--learning-rate is 0.001 on rank 0 and 0.002 on rank 1"),
        ("another prior", "ConfigError: .*--prior is 'exemplar' on rank 0 and 'vamp' on rank 2"),
        ("small batches", "ConfigError: 3 processes cannot share batches of 2 images.*--batch-size"),
        ("few images", r"ConfigError: 3 processes cannot share batches of 2 images.*\(tiny has 2 training images\)"),
        ("neighbours", "ConfigError: --neighbours is for one process"),
        ("backward_components", "ConfigError: --backward-components is for one process"),
    ],
)
def test_what_is_wrong_is_told_by_all_ranks(tmp_path: Path, three: processes.Ranks, what: str, told: str) -> None:
    three.start(train_wrongly, 3, what, tmp_path)
    for failure in three.answers():
        assert isinstance(failure, processes.Failure) and re.match(told, failure.message), failure
    assert not list(tmp_path.iterdir())


def test_the_first_rank_alone_writes(tmp_path: Path, three: processes.Ranks) -> None:
    three(train_in_own_folder, 3, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["of-rank-0"]
    assert {path.name for path in (tmp_path / "of-rank-0").iterdir()} == {
        "config.json",
        "checkpoint.pt",
        "results.json",
    }
    assert json.loads(RunFolder(tmp_path / "of-rank-0").results.read_bytes())["processes"] == 3


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path: Path, tiny_npz: Path, cli: Cli) -> None:
    """Without torchrun to end them; then two processes of torchrun go on, as one process does."""
    run = tmp_path / "run"
    arguments = ["train", "--data", tiny_npz, "--out", run, *TINY, "--epochs", 10**6, "--patience", 10**6]
    # The ranks' store is here, as torchrun has it: a port that was only looked for could be another's by then.
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "fastvae.app.cli", *map(str, arguments)],
            env={
                **ENVIRONMENT,
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
                **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)},
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        while not RunFolder(run).checkpoint.exists():
            assert all(process.poll() is None for process in ranks), ranks[0].communicate()
            time.sleep(0.01)
        ranks[1].kill()
        _, told = ranks[0].communicate(timeout=PATIENCE)
    finally:
        for process in ranks:
            process.kill()
    assert ranks[0].returncode == 1 and "error on rank 0: the other ranks are lost" in told and "Traceback" not in told

    settings = json.loads(RunFolder(run).config.read_bytes())
    epochs = read_checkpoint(RunFolder(run))["epoch"] + 2
    RunFolder(run).config.write_text(json.dumps({**settings, "epochs": epochs}))
    shutil.copytree(run, tmp_path / "copy")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "fastvae.app.cli", "train", "--resume", "--out", str(run), "--device", "cpu"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"Best of {epochs} epochs") == done.stdout.count("Wrote\n") == 1
    assert (run / "samples.png").exists() and json.loads(RunFolder(run).results.read_bytes())["processes"] == 2
    assert cli("train", "--resume", "--out", tmp_path / "copy", "--device", "cpu")[0] == 0
    assert_close(*(read_checkpoint(RunFolder(tmp_path / name)) for name in ("run", "copy")))
