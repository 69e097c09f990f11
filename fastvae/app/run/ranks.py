"""The processes that work on one model together: how many there are, and which of them this is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

from fastvae.app.user_errors import ConfigError, RunError

PATIENCE = timedelta(minutes=10)  # for a rank that others wait for: it may be starting, or writing a checkpoint
_WORDS = "gloo", "NCCL", "TCPStore", "process group", "lost the other ranks"  # in a failed communication's message

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The ranks that train or evaluate a model together, each with a share of the images.

    Attributes:
        rank: this process's number, 0 ... size - 1.
        size: how many there are.
        on_machine: this process's number among those on its machine.
    """

    rank: int = 0
    size: int = 1
    on_machine: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, to the run's folder and to the terminal."""
        return self.rank == 0

    def on_first(
        self, function: Callable[Arguments, object], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> None:
        """Call the function on the first rank alone."""
        if self.first:
            function(*args, **kwargs)

    def share(self, count: int) -> slice:
        """Which of `count` rows are this rank's; the ranks' shares differ by one at most, and may be empty."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: Value) -> list[Value]:
        """What each rank has, in the order of the ranks: of plain values and tensors on the CPU."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        of_ranks = [value] * self.size
        dist.all_gather_object(of_ranks, value)
        return of_ranks

    def each(self, step: Callable[[], Value]) -> Value:
        """Take a step, and go on once all ranks have taken it.

        Raises:
            what the step raises, on the first rank where it does; SystemExit on the others.
        """
        if self.size == 1:
            return step()
        try:
            done = step()
        except Exception:
            if any(self.gather(True)[: self.rank]):
                raise SystemExit(1) from None
            raise
        if any(self.gather(False)):
            raise SystemExit(1)
        return done

    def from_first(self, step: Callable[[], Value]) -> Value:
        """What a step of the first rank gives, on all; raises as :meth:`each`."""
        given: list[Any] = [self.each(step if self.first else lambda: None)]
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(given, src=0)
        return given[0]

    def check_same(self, settings: Mapping[str, object]) -> None:
        """Raise ConfigError, on all ranks, unless all have the same settings."""
        of_ranks = self.gather(dict(settings))
        for rank, others in enumerate(of_ranks):
            for name, value in of_ranks[0].items():
                if others[name] != value:
                    raise ConfigError(
                        f"The ranks must work on the same run, but {name} is {value!r} on rank 0 and "
                        f"{others[name]!r} on rank {rank}. Give all of them the same options, and the same files."
                    )

    def joined(self, device: str, patience: timedelta = PATIENCE) -> AbstractContextManager[None]:
        """The ranks as PyTorch's default process group: of gloo on CPUs, and of NCCL on GPUs.

        Args:
            device: where they compute.
            patience: how long a rank may keep the others waiting in the block; one that ends is noticed at once.

        Raises:
            RunError: not all ranks have started within PATIENCE; or, from the block, a rank has ended, or has kept the
                others waiting.
        """
        return nullcontext() if self.size == 1 else _process_group(device, patience)


ALONE = Ranks()


def launched() -> Ranks:
    """The ranks that torchrun, or another launcher with its environment variables, has started; else this process.

    Raises:
        ConfigError: a variable is not a number that it can be.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return ALONE
    size = _number("WORLD_SIZE", 1, None)
    return Ranks(_number("RANK", 0, size), size, _number("LOCAL_RANK", 0, size))


def _number(variable: str, low: int, end: int | None) -> int:
    text = os.environ.get(variable, "0")
    if not text.isdecimal() or int(text) < low or (end is not None and int(text) >= end):
        raise ConfigError(f"The environment variable {variable} is {text!r}; torchrun sets it to a number that fits.")
    return int(text)


def _meet(device: str, patience: timedelta) -> None:
    """Make the default process group, once all ranks have started, which may take PATIENCE whatever `patience` is."""
    import torch.distributed as dist

    kind = device.partition(":")[0]
    # Plain Python values go by way of the CPU, whatever the tensors' device is.
    backends = "cpu:gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    try:
        dist.init_process_group(backends, timeout=PATIENCE)
    except ValueError as error:  # an environment variable is missing
        raise ConfigError(f"{error}; torchrun sets it.") from None
    except RuntimeError as error:
        raise RunError(
            f"The ranks do not meet: rank {os.environ['RANK']} waits {_minutes(PATIENCE)} at most for all "
            f"{os.environ['WORLD_SIZE']} (WORLD_SIZE). See whether each has started, with the same MASTER_ADDR and "
            f"MASTER_PORT, and what it said. ({_first_sentence(error)})"
        ) from error
    assert dist.group.WORLD is not None
    dist.group.WORLD.set_timeout(patience)


def _minutes(time: timedelta) -> str:
    return f"{time.total_seconds() / 60:g} minutes"


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split(". ")[0]


@contextmanager
def _process_group(device: str, patience: timedelta) -> Iterator[None]:
    import torch.distributed as dist

    _meet(device, patience)
    try:
        yield
    except SystemExit:  # all ranks end, see `Ranks.each`; Python may crash at its end if the group is still there
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        told = str(error).lower()
        if not (isinstance(error, dist.DistError) or any(word.lower() in told for word in _WORDS)):
            raise
        raise RunError(
            "the other ranks are lost: one of them has ended, or has kept the others waiting for "
            f"{_minutes(patience)}; see what it said. ({_first_sentence(error)})"
        ) from error
    dist.destroy_process_group()  # after an error the other ranks may never come to theirs
