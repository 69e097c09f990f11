"""The processes of torchrun that share a job of `fastvae score`."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from fastvae.app.user_errors import RunError

T = TypeVar("T")

_AS_LONG_AS_IT_TAKES = datetime.timedelta(days=365)  # to score; a process that ends is noticed at once


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `size`; without torchrun it is the only one."""

    rank: int = 0
    size: int = 1
    group: Any = None

    def each(self, step: Callable[[], T]) -> T:
        """Take a step, and go on once all processes have taken it.

        Raises:
            what the step raises, in the first process where it does; SystemExit in the others.
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

    def first(self, step: Callable[[], T]) -> T:
        """What a step of the first process gives, on all; raises as :meth:`each`."""
        given: list[Any] = [self.each(step if self.rank == 0 else lambda: None)]
        if self.size > 1:
            with _told():
                dist.broadcast_object_list(given, src=0, group=self.group)
        return given[0]

    def gather(self, value: T) -> list[T]:
        """The value of each process, on all."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _told():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def device(self, name: str) -> str:
        """The process's own of the GPUs of a machine, where it is to take one and does not say which."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if self.size > 1 and name == "cuda" else name


@contextmanager
def ranks_of_torchrun() -> Iterator[Ranks]:
    """The processes that torchrun has started, which wait here for each other; or this one alone."""
    if not dist.is_available() or "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    with _told():
        dist.init_process_group("gloo")
        group = dist.new_group(timeout=_AS_LONG_AS_IT_TAKES)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of the communication library: in words of its own, about sockets
        raise RunError(
            f"Another of the processes has ended, or cannot be reached. The same command goes on from here. ({error})"
        ) from error
