"""The VampPrior's published code trained as it is, beside a run of `fastvae reproduce`, epoch by epoch.

    python -m tools.experiments.anchor_training CHECKOUT NAME [--work DIR] [--epochs N] [--out FILE.json]

CHECKOUT is a working copy of github.com/jmtomczak/vae_vampprior; NAME is a protocol of `fastvae reproduce`, on binary
images that were drawn once.  Model, initial weights, loss, optimiser, warm-up and end are the published ones.  The
images and the order of an epoch's batches come from here: the published code shuffles them without a seed.  In float32,
on one CPU thread.  The folder --work keeps the training after each epoch, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from fastvae._files import whole_file
from fastvae.app.data.named_sets import load
from fastvae.app.run.config import TrainConfig
from fastvae.app.run.protocol import read_protocol
from fastvae.benchmarks import formatting
from fastvae.benchmarks.record import machine

from . import command
from .anchor import make_importable, their_model

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "reproductions"
SEED = 14  # the published code's default


def measure(checkout: Path, name: str, work: Path, epochs: int | None) -> dict[str, Any]:
    """Train until the end, or until so many epochs are done, and say how both codes' bounds went."""
    make_importable(checkout)
    torch.set_num_threads(1)
    config = read_protocol(name).config
    dataset = load(config.data)
    if dataset.kind != "binary" or dataset.dynamic:
        raise RuntimeError(f"{name}: its images are not binary ones that were drawn once")
    torch.manual_seed(SEED)
    model = their_model(config, dataset, torch.float32)
    optimizer = import_module("utils.optimizer").AdamNormGrad(model.parameters(), lr=config.learning_rate)
    kept, history = work / f"{name}.pt", []
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    work.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PyTorch has deprecated since
        while len(history) < (epochs or config.epochs) and not ended(history, config):
            start = time.perf_counter()
            torch.manual_seed(1000 * SEED + len(history))
            train_epoch(model, optimizer, dataset.train.x, min(1, (len(history) + 1) / config.warmup), config)
            with torch.no_grad():
                losses = [mean_loss(model, x) for x in dataset.validation.x.split(config.batch_size)]
            bound = -float(torch.stack(losses).mean())
            history.append({"validation": bound, "seconds": time.perf_counter() - start})
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
            with whole_file(kept) as file:
                torch.save(state, file)
            print(f"epoch {len(history)}: {bound:.3f}", flush=True)
    ours = json.loads((RECORDS / f"{name}-seed-0.json").read_bytes())
    return {
        "protocol": name,
        "torch": torch.__version__,
        "machine": machine("cpu"),
        "ended": ended(history, config),
        "seconds": round(sum(line["seconds"] for line in history), 1),
        "published_code": [round(line["validation"], 3) for line in history],
        "fastvae": ours["validation_bounds"],
    }


def mean_loss(model: nn.Module, x: Tensor, beta: float = 1.0) -> Tensor:
    """Their loss, the mean over the images x [B, pixels]."""
    loss: Tensor = model.calculate_loss(x, beta, average=True)[0]  # type: ignore[operator]
    return loss


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, beta: float, config: TrainConfig
) -> None:
    """One pass over the images x [N, pixels]."""
    for batch in torch.randperm(len(x)).split(config.batch_size):
        optimizer.zero_grad()
        mean_loss(model, x[batch], beta).backward()
        optimizer.step()


def ended(history: list[dict[str, float]], config: TrainConfig) -> bool:
    """Whether the published code would stop here: more than `patience` epochs after the warm-up brought nothing."""
    best, waited = float("-inf"), 0
    for epoch, line in enumerate(history, 1):
        if line["validation"] > best:
            best, waited = line["validation"], 0
        elif epoch >= config.warmup:
            waited += 1
    return waited > config.patience


def markdown(content: dict[str, Any]) -> str:
    """The validation bounds of both at some epochs, and how far apart the last ten are on average."""
    theirs, ours = content["published_code"], content["fastvae"]
    both = min(len(theirs), len(ours))
    epochs = sorted({1, *range(20, both + 1, 20), both})
    pairs = [(theirs[epoch - 1], ours[epoch - 1]) for epoch in epochs]
    rows = [[str(epoch), f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"] for epoch, (a, b) in zip(epochs, pairs, strict=True)]
    last = [b - a for a, b in zip(theirs[:both], ours[:both], strict=True)][-10:]
    whole = "until it ended" if content["ended"] else "which were not all"
    return (
        formatting.markdown(["epoch", "published code", "fastvae", "better by"], rows)
        + f"\n\nOver the last {len(last)} of these epochs fastvae is better by {mean(last):+.2f} on average. The "
        f"published code was trained for {len(theirs)} epochs, {whole}."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.experiments.anchor_training", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="a working copy of jmtomczak/vae_vampprior")
    parser.add_argument("name", metavar="NAME", help="a protocol of `fastvae reproduce`")
    parser.add_argument("--work", type=Path, default=Path("runs/anchor"), metavar="DIR", help="keeps the training")
    parser.add_argument("--epochs", type=int, metavar="N", help="stop after so many, if not before")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the figures there too")
    options = parser.parse_args(arguments)
    return command.keep(
        lambda: measure(options.checkout, options.name, options.work, options.epochs), markdown, options.out
    )


if __name__ == "__main__":
    sys.exit(main())
