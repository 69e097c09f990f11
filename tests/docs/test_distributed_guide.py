"""The programs of docs/guides/distributed.md run by torchrun, with two processes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .test_pages import DOCS

ROOT = DOCS.parent
BEFORE = """
import accelerate
import lightning
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import fastvae.distributed
from tests.docs.names import Encoder, make_decoder

torch.manual_seed(0)
train_images = torch.rand(230, 64)


def fresh():
    global encoder, decoder, optimizer
    encoder, decoder = Encoder(), make_decoder()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])


def show(name, vae):
    found = torch.cat([p.detach().flatten() for p in vae.parameters()])
    of_ranks = [None, None]
    dist.all_gather_object(of_ranks, found)
    assert torch.equal(*of_ranks) and bool(found.isfinite().all()), name
    print(f"{name} on rank {dist.get_rank()}", flush=True)
"""
DDP = """
fresh()
before = torch.nn.utils.parameters_to_vector(encoder.parameters()).detach().clone()
{}
assert not torch.equal(before, torch.nn.utils.parameters_to_vector(encoder.parameters()))
show("DDP", model)
"""
MESH = """
torch.manual_seed(0)
z, logvar_r = torch.randn(5, 8), torch.zeros(3, 8)
mu_r = (torch.randn(3, 8) + dist.get_rank()).requires_grad_()
{}
assert bool(mu_r.grad.any())
of_ranks = [None, None]
dist.all_gather_object(of_ranks, log_prob.detach())
assert torch.equal(*of_ranks)
print(f"mesh on rank {{dist.get_rank()}}", flush=True)
"""
ACCELERATE = """
fresh()
{}
assert accelerator.num_processes == 2 and isinstance(model, DistributedDataParallel)
show("Accelerate", model)
"""
LIGHTNING = """
fresh()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
Trainer = lightning.Trainer
lightning.Trainer = lambda **given: Trainer(**given, **quiet)
{}
module = Module()
module.validation_step = lambda index, batch_idx: None
trainer = lightning.Trainer(accelerator="cpu", strategy="ddp", devices=2, max_epochs=1)
trainer.fit(module, DataLoader(range(230), batch_size=50))
trained = module.vae
trainer.validate(module, DataLoader(range(20)), verbose=False)
assert module.vae is trained
show("Lightning", trained)
"""


def program(line: str) -> str:
    """The one of the page that has this line."""
    page = (DOCS / "guides" / "distributed.md").read_text()
    (found,) = [block for block in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if line in block]
    return found


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Accelerate is not installed")
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")
def test_the_programs_run(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        BEFORE
        + DDP.format(program("dist.init_process_group()"))
        + MESH.format(program("init_device_mesh").replace('"cuda", (2, 4)', '"cpu", (1, 2)'))
        + ACCELERATE.format(program("accelerate.Accelerator()"))
        + LIGHTNING.format(program("class Module(lightning.LightningModule)"))
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    run = subprocess.run(
        [*torchrun, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    for rank in range(2):
        for name in ("DDP", "mesh", "Accelerate", "Lightning"):
            assert f"{name} on rank {rank}" in run.stdout
