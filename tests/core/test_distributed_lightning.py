"""A sharded exemplar prior in a LightningModule, by two processes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.ranks import Ranks
from support.sharded import model
from torch import Tensor

import fastvae
import fastvae.distributed

DATA = torch.linspace(0, 1, 66).sin().square().reshape(11, 6)
SHARES, BATCHES = [5, 6], [[0, 7, 10], [3, 1, 6]]  # of the two ranks
STEPS = 2


def loss_of(vae: torch.nn.Module, rank: int, step: int) -> Tensor:
    index = torch.tensor(BATCHES[rank])
    torch.manual_seed(10 * step + rank)
    return vae(DATA[index], index=index).loss


def train(rank: int, folder: str) -> dict[str, Tensor]:
    """Lightning finds the environment of torchrun, and the process group that is there already."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", TORCHELASTIC_RUN_ID="fastvae")
    import lightning

    class Module(lightning.LightningModule):
        def configure_model(self) -> None:  # the first hook that has the process group
            if hasattr(self, "vae"):
                return
            share = DATA.split(SHARES)[rank]
            group = torch.distributed.new_group()
            prior = fastvae.distributed.ShardedExemplarPrior
            self.vae = model(lambda encoder: prior(encoder, share, group=group))

        def training_step(self, batch: Tensor, step: int) -> Tensor:
            return loss_of(self.vae, rank, step)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = lightning.Trainer(
        accelerator="cpu", strategy="ddp", devices=2, max_steps=STEPS, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(range(STEPS), batch_size=1))
    assert trainer.world_size == 2 and trainer.global_step == STEPS
    return {name: value.detach().clone() for name, value in module.vae.named_parameters()}


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_lightning_trains_as_one_process_does(tmp_path: Path) -> None:
    assert_trained_as_one_process_does(train, tmp_path)


def assert_trained_as_one_process_does(train_on: Callable[[int, str], dict[str, Tensor]], folder: Path) -> None:
    """By the parameters that two ranks end with; train_on(rank, folder) is called on each."""
    ranks = Ranks(2)
    try:
        first, second = ranks(train_on, str(folder))
    finally:
        ranks.close()
    vae = model(lambda encoder: fastvae.ExemplarPrior(encoder, DATA))
    optimizer = torch.optim.SGD(vae.parameters(), 0.1)
    start = {name: value.detach().clone() for name, value in vae.named_parameters()}
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([loss_of(vae, rank, step) for rank in range(2)]).mean().backward()
        optimizer.step()
    for name, value in vae.named_parameters():
        assert torch.equal(first[name], second[name]) and not torch.equal(first[name], start[name])
        torch.testing.assert_close(first[name], value.detach(), rtol=1e-5, atol=1e-6)
