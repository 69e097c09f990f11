"""What docs/guides/with-pytorch.md says of data parallel training."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastvae

from .names import Encoder, make_decoder

WORLD = 2


def train(rank: int, folder: str) -> None:
    """Three steps, each process on images of its own; writes the parameters that it ends with."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    encoder = Encoder()
    vae = fastvae.VAE(encoder, make_decoder(), fastvae.VampPrior(encoder, torch.rand(20, 64)))
    model = DistributedDataParallel(vae)
    optimizer = torch.optim.Adam(model.parameters())
    torch.manual_seed(1 + rank)
    images = torch.rand(30, 64)
    for _ in range(3):
        optimizer.zero_grad()
        model(images).loss.backward()
        optimizer.step()
    torch.save(vae.state_dict(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_the_processes_stay_equal(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train, (str(tmp_path),), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD))
    assert first.keys() == second.keys() and "prior.pseudo_inputs" in first
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(0)
    Encoder(), make_decoder()
    assert not torch.equal(first["prior.pseudo_inputs"], torch.rand(20, 64))  # they were trained
