"""Where a run is computed: the device, the threads, the kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

import fastvae
from fastvae.app.data.dataset import Dataset
from fastvae.app.run.config import TrainConfig
from fastvae.app.run.ranks import ALONE, Ranks
from fastvae.app.user_errors import ConfigError
from fastvae.backends import choose

SMALL = 2_000_000  # multiply-adds of a layer and batch, below which threads cost more than they save


def use_threads(count: int | None, config: TrainConfig, dataset: Dataset) -> None:
    """Set torch's CPU threads to `count`, or to one if none is given and the model is small.

    Two threads gain a small model next to nothing, and where other programs want the cores too, threads that
    wait for each other have been seen to make it ten times slower.
    """
    if count is None and dataset.num_pixels * config.hidden * config.batch_size < SMALL:
        count = 1
    if count is not None:
        torch.set_num_threads(count)


def pick_device(name: str, ranks: Ranks = ALONE) -> str:
    """Resolve auto, and check that the device is there.  Of several ranks each takes a device of its own.

    Raises:
        ConfigError: it is not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.size > 1 and name != "cpu":
        _take_own(name, ranks)
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"--device {name}: is not here ({reason}); take cpu, or auto.") from error
    return name


def _take_own(name: str, ranks: Ranks) -> None:
    """Make the device of this rank's number PyTorch's current one, which `name` then means."""
    if ":" in name:
        raise ConfigError(
            f"--device {name}: {ranks.size} processes need a device each; say {name.partition(':')[0]}, of which each "
            "process takes its own."
        )
    there = torch.accelerator.device_count()
    if ranks.on_machine >= there:
        raise ConfigError(
            f"--device {name}: there are {there} on this machine, too few for a process each; start fewer processes, "
            "or say --device cpu."
        )
    torch.accelerator.set_device_index(ranks.on_machine)


def use_kernels(
    device: str, impl: str | None, precision: str | None, dense_backward: bool = False
) -> AbstractContextManager[None]:
    """`fastvae.use_backend` for the work of a command.

    Raises:
        ConfigError: that backend does not run on the device.
    """
    try:
        choose(impl, torch.device(device))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--impl {impl}: {str(error).rstrip('.')}.") from error
    return fastvae.use_backend(impl, precision=precision, dense_backward=dense_backward or None)
