"""A process group, and the handshake by which its ranks find out whether they have made the same call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastvae import _torch_compat

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

Checked = TypeVar("Checked")


class Link(NamedTuple):
    """A process group, as the rank sees it for the time of one call."""

    what: str  # the function that was called, for messages
    group: ProcessGroup | None
    rank: int
    size: int

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # of the communication library: in words of its own, about sockets
            raise RuntimeError(
                f"{self.what}: rank {self.rank} of {self.size} lost the other ranks. One of them has ended, or did not "
                f"make the same call within the group's time-out: {error}"
            ) from error

    def all_gather(self, value: Tensor) -> Tensor:
        """What each rank holds, [R, *shape], in the order of the ranks; the shape is the same on all."""
        value = value.detach().contiguous()
        of_ranks = value.new_empty(self.size, *value.shape)
        with self._told():
            dist.all_gather(list(of_ranks.unbind(0)), value, group=self.group)
        return of_ranks

    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over the ranks."""
        total = value.detach().clone(memory_format=torch.contiguous_format)
        with self._told():
            dist.all_reduce(total, group=self.group)
        return total

    def from_first(self, value: Tensor) -> Tensor:
        """What the first rank holds."""
        with self._told():
            dist.broadcast(value, group_src=0, group=self.group)
        return value

    def all_rows(self, value: Tensor, rows: list[int]) -> Tensor:
        """The rows of all ranks, [sum of rows, ...], in the order of the ranks; rows: how many each rank has."""
        padded = value.new_zeros(max(rows), *value.shape[1:])
        padded[: len(value)] = value.detach()
        of_ranks = self.all_gather(padded)
        return torch.cat([part[:count] for part, count in zip(of_ranks, rows, strict=True)])

    def start_shift(self, sent: Tensor, received: Tensor) -> list[Work]:
        """Begin to send to the next rank and to receive from the one before, in a ring; see :meth:`finish`.

        Until then, `sent` must not be changed, nor `received` be looked at.  What has no elements does not travel.
        """
        if self.size == 1:
            received.copy_(sent)
            return []
        ways = (dist.isend, sent, (self.rank + 1) % self.size), (dist.irecv, received, (self.rank - 1) % self.size)
        with self._told():
            operations = [dist.P2POp(way, v, group=self.group, group_peer=peer) for way, v, peer in ways if v.numel()]
            return dist.batch_isend_irecv(operations) if operations else []

    def finish(self, underway: list[Work]) -> None:
        """Wait until what was sent and received has arrived."""
        with self._told():
            for work in underway:
                work.wait()

    def own_rows(self, value: Tensor, rows: list[int]) -> Tensor:
        """Those of the rows of all ranks that are this rank's."""
        start = sum(rows[: self.rank])
        return value[start : start + rows[self.rank]]


def link_to(what: str, group: ProcessGroup | None) -> Link:
    """The group for a call of the function `what`.

    Raises:
        RuntimeError: there is no process group.
        ValueError: this process is not in the group.
        NotImplementedError: within a transform of torch.func, which has no rules for communication.
    """
    if _torch_compat.in_functorch_transform():
        raise NotImplementedError(f"{what} cannot be called within a transform of torch.func, such as grad or vmap")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{what} needs torch.distributed.init_process_group() to have been called")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{what}: this process is not in the group; only the group's own ranks may call")
    return Link(what, group, rank, dist.get_world_size(group))


# Every call begins with a handshake of a fixed size, so that ranks that disagree hear of it before they send each other
# tensors that do not fit.  It also tells how many components and rows the others have, which a call needs anyway.  No
# handshake is left out because the same shapes were seen before: a rank cannot know that the others still have them.
_TEXT = 512  # bytes


class Told(NamedTuple):
    """The numbers in a rank's part of the handshake; two ranks need not have the same but for the last two."""

    failed: int  # whether the rank's arguments are wrong; the text is the error then
    K: int = 0
    M: int = 0
    logvar_rows: int = -1  # -1 where logvar has fewer than two dimensions
    exclude_low: int = -1
    exclude_high: int = -1
    same: int = 0  # of z and exclude, to be the same on all ranks where the rows are replicated; 0 where not looked at
    logvar: int = 0  # of one that is [], [D] or [1, D], to be the same on all ranks where all components share it


def agree(link: Link, check: Callable[[], tuple[str, Told, Checked]]) -> tuple[list[Told], Checked]:
    """Check the arguments on every rank, and that the ranks have made the same call.

    Args:
        check: gives what has to be the same on all ranks, in words, the numbers that may differ, and what the caller
            wants of it.  It raises where the rank's own arguments are wrong.

    Returns:
        The numbers of every rank, and what `check` gave.

    Raises:
        The error of `check`, on a rank where it was raised; ValueError on the others, and where the words differ.
    """
    failure, checked = None, None
    try:
        text, told, checked = check()
    except Exception as error:  # whatever it is: the other ranks are waiting
        failure, told, text = error, Told(failed=1), f"{type(error).__name__}: {error}"
    encoded = text.encode()[:_TEXT].ljust(_TEXT, b"\0")
    own = torch.cat([torch.tensor(told), torch.frombuffer(bytearray(encoded), dtype=torch.int64)])
    of_ranks = link.all_gather(own.to(_device_of_handshake(link.group))).cpu()
    if failure is not None:
        raise failure
    assert checked is not None

    def words(rank: int) -> str:
        text = bytes(of_ranks[rank, len(Told._fields) :].view(torch.uint8).tolist())
        return text.rstrip(b"\0").decode("utf-8", "ignore")

    everyone = [Told(*numbers) for numbers in of_ranks[:, : len(Told._fields)].tolist()]
    for rank, other in enumerate(everyone):
        if other.failed:
            raise ValueError(f"{link.what}: the arguments of rank {rank} are wrong: {words(rank)}")
    differing = (of_ranks != of_ranks[0])[:, len(Told._fields) :].any(1).nonzero().flatten().tolist()
    if differing:
        raise ValueError(
            f"{link.what}: the ranks must make the same call, but rank 0 made {words(0)}, "
            f"and rank {differing[0]} made {words(differing[0])}"
        )
    return everyone, checked


def _device_of_handshake(group: ProcessGroup | None) -> torch.device:
    """The CPU if the group can communicate there, as then nothing waits for another device."""
    backends = dist.get_backend_config(group)  # such as "cpu:gloo,cuda:nccl"
    if "cpu" in backends:
        return torch.device("cpu")
    return torch.device(backends.partition(":")[0], torch.accelerator.current_device_index())
