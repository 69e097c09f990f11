"""A conditional model of the digits against one that is not told the label."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvae.app.data.named_sets import load
from fastvae.app.run.config import make_config
from fastvae.app.run.trained import load_run
from fastvae.app.run.training import train


def test_labels_help(tmp_path: Path) -> None:
    """log p(x | y) is higher than log p(x), on average by I(x; y), which is at most log 10 = 2.3 nats."""
    digits = load("digits")
    values = []
    for conditional in (False, True):
        out = tmp_path / str(conditional)
        train(make_config({"epochs": 40, "conditional": conditional}), digits, out)
        run = load_run(out, dataset=digits)
        torch.manual_seed(0)
        values.append(run.vae.log_likelihood(digits.test.x, 200, y=run.y(digits.test)))
    gain = values[1] - values[0]  # [300], paired by image
    error = float(gain.std()) / len(gain) ** 0.5
    assert 1.0 < float(gain.mean()) < 2.3 + 3 * error
