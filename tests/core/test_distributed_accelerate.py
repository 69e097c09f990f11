"""A sharded exemplar prior in a loop of Hugging Face's Accelerate, by two processes."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from support.sharded import model
from torch import Tensor

import fastvae.distributed

from .test_distributed_lightning import BATCHES, DATA, SHARES, STEPS, assert_trained_as_one_process_does, loss_of


def train(rank: int, folder: str) -> dict[str, Tensor]:
    """Accelerate finds the environment of torchrun, and the process group that is there already."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost"
    )
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    assert (accelerator.process_index, accelerator.num_processes) == (rank, 2)
    group = torch.distributed.new_group()
    prior = fastvae.distributed.ShardedExemplarPrior
    vae = model(lambda encoder: prior(encoder, DATA.split(SHARES)[rank], group=group))
    optimizer = torch.optim.SGD(vae.parameters(), 0.1)
    rows = torch.utils.data.DataLoader([*BATCHES[0], *BATCHES[1]] * STEPS, batch_size=3)
    ddp, optimizer, rows = accelerator.prepare(vae, optimizer, rows)
    assert isinstance(ddp, torch.nn.parallel.DistributedDataParallel) and len(rows) == STEPS
    for step, index in enumerate(rows):
        assert index.tolist() == BATCHES[rank]
        optimizer.zero_grad()
        accelerator.backward(loss_of(ddp, rank, step))
        optimizer.step()
    return {name: value.detach().clone() for name, value in vae.named_parameters()}


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Accelerate is not installed")
def test_accelerate_trains_as_one_process_does(tmp_path: Path) -> None:
    assert_trained_as_one_process_does(train, tmp_path)
