"""A run that goes on at a smaller learning rate, on the digits."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvae.app.data.named_sets import load
from fastvae.app.run.checkpoint import read_checkpoint
from fastvae.app.run.config import make_config
from fastvae.app.run.folder import RunFolder
from fastvae.app.run.training import train
from tools.experiments import smaller_steps


def test_a_run_goes_on_and_is_left_as_it_is(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    config = make_config({"data": "digits", "epochs": 3, "patience": 1, "learning_rate": 1e-2, "hidden": 20})
    train(config, load("digits"), tmp_path / "run")
    ended = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    try:
        found = smaller_steps.measure([tmp_path / "run"], tmp_path / "work", 1e-3, 2, 30)
        again = smaller_steps.measure([tmp_path / "run"], tmp_path / "work", 1e-3, 2, 30)
    finally:
        torch.set_num_threads(threads)
    assert found == again and (tmp_path / "run" / "checkpoint.pt").read_bytes() == ended
    after = read_checkpoint(RunFolder(tmp_path / "work" / "run" / "after"))
    assert after["optimizer"]["param_groups"][0]["lr"] == 1e-3
    (row,) = found["runs"]
    assert len(after["history"]) == 5 and (row["epochs"], row["learning_rate"]) == (3, 1e-2)
    assert row["further_bounds"] == [round(line["validation"]["bound"], 3) for line in after["history"][3:]]
    assert row["images"] == 30 and row["gain"] > 0 and row["gain_standard_error"] > 0
    assert "| `run` | 3 at 0.01 | 2 |" in smaller_steps.markdown(found)
