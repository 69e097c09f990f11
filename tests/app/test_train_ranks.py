"""Training by several processes: the curve of one process, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ranks as processes

from fastvae.app.run.checkpoint import Checkpoint
from fastvae.app.run.config import TrainConfig
from fastvae.app.run.ranks import Ranks
from fastvae.app.run.training import train
from fastvae.app.user_errors import AppError

from .test_train import assert_same, flat, tiny_data

CONFIG = TrainConfig(components=6, latent=3, hidden=12, epochs=3, warmup=2, batch_size=11, learning_rate=3e-3)


def labelled(**of_data: Any):
    data = tiny_data(**of_data)
    splits = (replace(s, labels=torch.arange(len(s)) % 3) for s in (data.train, data.validation, data.test))
    return replace(data, **dict(zip(("train", "validation", "test"), splits, strict=True)))


def train_on(rank: int, size: int, config: TrainConfig, out: str, of_data: dict[str, Any], resume: bool = False) -> Any:
    torch.set_num_threads(1)
    return train(config, labelled(**of_data), Path(out), resume=resume, ranks=Ranks(rank, size))


@pytest.fixture(scope="module", params=[2, 3])
def together(request: pytest.FixtureRequest) -> Iterator[processes.Ranks]:
    ranks = processes.Ranks(request.param)
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"prior": "standard", "conditional": True},
        {"prior": "mixture", "learn_weights": True, "conditional": True},
        {"prior": "mixture", "learn_weights": True},
        {"prior": "vamp", "normalize_gradients": True},
        {"prior": "vamp", "conditional": True},
        {"prior": "vamp", "refresh": 0.5, "bound": "iwae", "num_samples": 3, "gradient": "dreg", "chunk_size": 4},
        {"prior": "vamp", "model": "hvae"},
        {"prior": "standard", "model": "hvae", "gradient": "stl", "num_samples": 2},
        {"prior": "exemplar"},
        {"prior": "exemplar", "shared_variance": True, "chunk_size": 7, "bound": "iwae", "num_samples": 2, "gradient": "plain"},
        {"prior": "exemplar", "model": "hvae"},
        {"prior": "exemplar", "subset": 20},
        {"prior": "exemplar", "refresh": 0.3},
    ], ids = str,
)
@pytest.mark.parametrize("of_data", [{}, {"kind": "gray"}, {"dynamic": False}], ids=str)
def test_matrix(tmp_path, together, settings, of_data):
    config = replace(CONFIG, **settings)
    size = len(together.processes)
    states = together(train_on, size, config, str(tmp_path / "all"), of_data)
    one = train(config, labelled(**of_data), tmp_path / "one")
    for s in states[1:]:
        assert_same(s, states[0])
    worst = 0
    for (k, a), (k2, b) in zip(flat(one["history"]), flat(states[0]["history"])):
        if not k.endswith("seconds"):
            worst = max(worst, abs(a - b))
    for k in one["model"]:
        worst = max(worst, float((one["model"][k] - states[0]["model"][k]).abs().max()))
    print("WORST", settings, size, worst)
    together(train_on, size, replace(config, epochs=2+0, warmup=1), str(tmp_path / "parts"), of_data)
    assert worst < 1e-4
