"""Real processes on this machine, which are the ranks of a process group over loopback and run what they are told."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from .patience import PATIENCE


class Failure(NamedTuple):
    """What a rank raised instead of an answer."""

    message: str  # "ValueError: ..."
    trace: str


def _serve(rank: int, size: int, folder: str, orders: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=PATIENCE / 2),
    )
    while (order := pickle.loads(orders.recv_bytes())) is not None:
        function, arguments = order
        try:
            answer = function(rank, *arguments)
        except Exception as error:
            answer = Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        orders.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class Ranks:
    """`size` processes with a gloo group of all of them."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")  # it imports PyTorch once, before it forks the ranks
        context.set_forkserver_preload(["support.sharded"])
        self.orders, self.processes = [], []
        # Before Python 3.12.4 that process does not have sys.path, and passes over what it does not find.
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = rank, size, self._folder.name, theirs
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.orders.append(ours)
                self.processes.append(process)

    def start(self, function: Callable[..., Any], *arguments: Any, on: list[int] | None = None) -> None:
        """Let the ranks, all or those named, run function(rank, *arguments), which they import by its name."""
        for rank in range(len(self.orders)) if on is None else on:
            self.orders[rank].send_bytes(pickle.dumps((function, arguments)))

    def answers(self, on: list[int] | None = None) -> list[Any]:
        """What the ranks returned, in order; a `Failure` where one raised."""
        told = []
        for rank in range(len(self.orders)) if on is None else on:
            waited = 0
            while not self.orders[rank].poll(1):
                waited += 1
                if waited >= PATIENCE:
                    raise TimeoutError(f"rank {rank} hangs")
                if not self.processes[rank].is_alive():
                    raise EOFError(f"rank {rank} ended with exit code {self.processes[rank].exitcode}")
            told.append(pickle.loads(self.orders[rank].recv_bytes()))
        return told

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returned; raises what one of them raised."""
        self.start(function, *arguments)
        told = self.answers()
        for rank, answer in enumerate(told):
            if isinstance(answer, Failure):
                raise AssertionError(f"rank {rank} failed: {answer.trace}")
        return told

    def close(self) -> None:
        for orders, process in zip(self.orders, self.processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):
                    orders.send_bytes(pickle.dumps(None))
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            orders.close()
        self._folder.cleanup()
