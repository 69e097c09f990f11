"""The density of a mixture where the points, the components or both are too many for memory.

Rows and components are read in blocks.  For one block of rows, each block of components gives a partial l_b [rows], and

    l = m + log s,   m = max_b l_b,   s = sum_b exp(l_b - m)

is kept online in float64: a larger maximum rescales s.  m is one of the l_b and has no rounding of its own, so that a
merge of B blocks adds B 2^-53 nats to what the kernels lose.  The score is the mean of the blocks' scores, weighted by
exp(l_b - l), and is kept the same way.

Bytes read, of R bytes of rows and C bytes of components: R + C where either of them stays in memory, else
R + ceil(M / rows of a block) C.  With a memory of S bytes that is about R + C R / S.  Streaming rows past resident
components instead would read C + R C / S, and would write and read a state for all rows at each pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastvae import _checks
from fastvae.backends.choice import choose
from fastvae.backends.registry import PRECISIONS, check_name
from fastvae.functional import mixture_log_prob, mixture_log_prob_and_score

DEFAULT_MEMORY = 2**28
_ENOUGH_WORK = 2**40  # flops of a block of rows, seconds of a core, where components stay in memory
_FEWEST_ROWS = 4096  # of such a block: packing K components costs as much as a few rows

T = TypeVar("T")


class Blocks(NamedTuple):
    """How many rows, and how many components, are in memory at a time."""

    rows: int
    components: int

    def bytes_read(self, M: int, K: int, row_bytes: int, component_bytes: int) -> int:
        """What scoring M rows reads, of files that hold so many bytes for a row and for a component."""
        passes = 1 if self.components >= K else math.ceil(M / self.rows)
        return M * row_bytes + passes * K * component_bytes

    def bytes_held(self, D: int, *, itemsize: int = 4, score: bool = False) -> int:
        """Memory for the blocks in use and those that are read ahead."""
        of_row, of_component = _bytes_held(D, itemsize, score)
        return self.rows * of_row + self.components * of_component


def blocks(M: int, K: int, D: int, *, itemsize: int = 4, score: bool = False, memory: int = DEFAULT_MEMORY) -> Blocks:
    """The blocks that read least within `memory` bytes.

    Components stay in memory if they fit into half of it.  Otherwise they get what all rows leave, an eighth at least,
    and the rows get the rest: the larger a block of rows, the fewer times all components are read.

    Args:
        M, K, D: rows, components, dimensions.
        itemsize: bytes of a number in the computation, 4 or 8.
        score: whether the score is computed.
        memory: bytes.
    """
    of_row, of_component = _bytes_held(D, itemsize, score)
    resident = K * of_component <= memory // 2
    share = K * of_component if resident else max(memory // 8, memory - M * of_row)
    rows = (memory - share) // of_row
    if resident:
        rows = min(rows, max(_FEWEST_ROWS, _ENOUGH_WORK // (4 * K * D)))
    return Blocks(max(1, min(M, rows)), max(1, min(K, share // of_component)))


def _bytes_held(D: int, itemsize: int, score: bool) -> tuple[int, int]:
    """Of a row and of a component: in the block in use and the next one, in float64 sums, and packed by the kernels."""
    return 2 * D * itemsize + 64 + (D * (2 * itemsize + 24) if score else 0), 3 * (2 * D + 1) * itemsize


class RowScores(NamedTuple):
    """The rows start ... stop - 1: log_prob [stop - start] and score [stop - start, D], or None; on the CPU."""

    start: int
    stop: int
    log_prob: Tensor
    score: Tensor | None


def streamed_log_prob(
    z: Any,
    mu: Any,
    logvar: Any,
    log_weights: Any = None,
    *,
    exclude: Any = None,
    score: bool = False,
    memory: int = DEFAULT_MEMORY,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`mixture_log_prob` of points and components that are read block by block, and may be larger than memory.

    Each argument is a tensor, a `numpy.memmap`, a slice of a safetensors file (`file.get_slice("mu")`), or anything
    else that has a shape and gives rows as an array or a tensor for `[start:stop]`.  While one block is computed, a
    thread reads the next.

    Args:
        z: [M, D], the points.
        mu: [K, D], the means.
        logvar: broadcastable to [K, D], the log variances, see :func:`mixture_log_prob`.
        log_weights: [K], used as given; None means -log K each.
        exclude: int64 [M], for each row the index of a component to leave out, or -1 for none.
        score: also return d log p(z) / dz.
        memory: bytes that the blocks may take, beside the result.  It decides where rows and components are cut, and
            with that the last bits of the result; see docs/guides/out-of-core.md.
        device: where blocks are computed.  To a CUDA device they are copied from pinned memory, beside the kernels.
        dtype: float32 or float64, what is computed with; None is what the arguments promote to, float32 at least.
        precision, impl: as for :func:`mixture_log_prob`.

    Returns:
        log_prob [M] on the CPU, nats; with `score`, (log_prob [M], score [M, D]).  No gradient flows through them.

    Raises:
        TypeError: an argument has no shape or no rows, or is not floating (`exclude`: not int64).
        ValueError: shapes that do not fit, K = 0, `exclude` out of range, an unknown name, no memory.
        RuntimeError: the named backend is not built, or there is no such device.

    Equals::

        mixture_log_prob(z[:], mu[:], logvar[:], log_weights[:])
    """
    parts = StreamedScores(
        z, mu, logvar, log_weights, exclude=exclude, score=score, memory=memory, device=device, dtype=dtype,
        precision=precision, impl=impl,
    )  # fmt: skip
    log_prob, scores = torch.empty(parts.M, dtype=parts.dtype), None
    if score:
        scores = torch.empty(parts.M, parts.D, dtype=parts.dtype)
    for part in parts:
        log_prob[part.start : part.stop] = part.log_prob
        if scores is not None and part.score is not None:
            scores[part.start : part.stop] = part.score
    return log_prob if scores is None else (log_prob, scores)


class StreamedScores:
    """The blocks of :func:`streamed_log_prob` one after the other, for results that are too many for memory as well.

    Args, Raises: as :func:`streamed_log_prob`.

    Iterating gives a :class:`RowScores` for each block of rows, in order.

    Attributes:
        M, K, D: the sizes.
        dtype: of the results.
        blocks: rows and components of a block.
        row_blocks: (start, stop) of each block of rows, in order; may be replaced before the iteration, as where some
            are done already, or others do some.
        bytes_read: what reading for these takes in all, in bytes of the arguments.
        on_pairs: is called with the number of pairs of a row and a component that were done since the last call.
    """

    def __init__(
        self,
        z: Any,
        mu: Any,
        logvar: Any,
        log_weights: Any = None,
        *,
        exclude: Any = None,
        score: bool = False,
        memory: int = DEFAULT_MEMORY,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        precision: str | None = None,
        impl: str | None = None,
    ) -> None:
        if isinstance(memory, bool) or not isinstance(memory, int):
            raise TypeError(f"memory must be a number of bytes, not {type(memory).__name__}")
        if memory < 1:
            raise ValueError(f"memory must be at least 1 byte, not {memory}")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32, torch.float64 or None, not {dtype}")
        self._z, self._mu, self._logvar = _Source("z", z), _Source("mu", mu), _Source("logvar", logvar)
        self._log_weights = None if log_weights is None else _Source("log_weights", log_weights)
        self._exclude = None if exclude is None else _Source("exclude", exclude)
        if len(self._z.shape) != 2:
            raise ValueError(f"z must be [M, D], not {list(self._z.shape)}")
        # What mixture_log_prob would say of shapes and dtypes, said before anything is read.
        weights = None if self._log_weights is None else self._log_weights.like()
        of_z, *_ = _checks.mixture(self._z.like(), self._mu.like(), self._logvar.like(), weights, None)
        if self._exclude is not None:
            _checks.excluded(self._exclude.like(), self._z.shape, of_z.device, self._mu.shape[0])
        self.dtype = of_z.dtype if dtype is None else dtype
        self.M, (self.K, self.D) = self._z.shape[0], self._mu.shape
        self.blocks = blocks(self.M, self.K, self.D, itemsize=self.dtype.itemsize, score=score, memory=memory)
        self.row_blocks = _cut(0, self.M, self.blocks.rows)
        self.on_pairs: Callable[[int], None] | None = None
        # logvar has a row for each component, or is the same for all and small.
        self._shared_logvar = len(self._logvar.shape) < 2 or self._logvar.shape[0] == 1
        self._with_score, self._options = score, {"precision": precision, "impl": impl}
        self._device = torch.device(device)
        if self._device.type == "meta" or (self._device.type == "cuda" and not torch.cuda.is_available()):
            raise RuntimeError(f"device={str(device)!r} cannot compute here; device='cpu' can")
        check_name("precision", precision, PRECISIONS)
        choose(impl, self._device, self.dtype, precision)

    @property
    def bytes_read(self) -> int:
        of_rows = [self._z] if self._exclude is None else [self._z, self._exclude]
        of_components = [self._mu] if self._shared_logvar else [self._mu, self._logvar]
        of_components += [] if self._log_weights is None else [self._log_weights]
        row_bytes, component_bytes = (sum(s.row_bytes for s in sources) for sources in (of_rows, of_components))
        passes = min(1, len(self.row_blocks)) if self.blocks.components >= self.K else len(self.row_blocks)
        return sum(stop - start for start, stop in self.row_blocks) * row_bytes + passes * self.K * component_bytes

    def __iter__(self) -> Iterator[RowScores]:
        rows = self.row_blocks
        components = _cut(0, self.K, self.blocks.components)
        if not rows:
            return
        resident = len(components) == 1
        logvar = self._logvar.whole(self.dtype) if self._shared_logvar else None

        def read_all() -> Iterator[Callable[[], _Read]]:
            """In the order in which the loops below take them."""
            if resident:
                yield lambda: self._read_components(*components[0], logvar)
            for start, stop in rows:
                yield lambda start=start, stop=stop: self._read_rows(start, stop)  # type: ignore[misc]
                if not resident:
                    for k, end in components:
                        yield lambda k=k, end=end: self._read_components(k, end, logvar)  # type: ignore[misc]

        reads = _read_ahead(read_all())
        whole = next(reads).arrived() if resident else None
        for start, stop in rows:
            z, exclude = next(reads).arrived()
            merged = Merged(z, self._with_score)
            for k, end in components:
                mu, block_logvar, log_weights = whole if whole is not None else next(reads).arrived()
                self._add(merged, z, mu, block_logvar, log_weights, exclude, k, end)
                if self.on_pairs is not None:
                    self.on_pairs((stop - start) * (end - k))
            log_prob, score = merged.result(self.dtype)
            found = RowScores(start, stop, log_prob.cpu(), None if score is None else score.cpu())
            # while the caller has the result, and until the next block is there
            del z, exclude, merged, log_prob, score
            yield found
            del found

    @torch.no_grad()
    def _add(
        self,
        merged: Merged,
        z: Tensor,
        mu: Tensor,
        logvar: Tensor,
        log_weights: Tensor | None,
        exclude: Tensor | None,
        start: int,
        stop: int,
    ) -> None:
        if exclude is not None:
            inside = (exclude >= start) & (exclude < stop)
            exclude = torch.where(inside, exclude - start, -1)
        arguments: dict[str, Any] = {"log_weights": log_weights, "exclude": exclude, **self._options}
        if self._with_score:
            merged.add(*mixture_log_prob_and_score(z, mu, logvar, **arguments))
        else:
            merged.add(mixture_log_prob(z, mu, logvar, **arguments))

    def _read_rows(self, start: int, stop: int) -> _Read:
        exclude = None
        if self._exclude is not None:
            exclude = self._exclude.rows(start, stop)
            _checks.excluded(exclude, (stop - start, self.D), exclude.device, self.K)
        return _Read(self._device, self._z.rows(start, stop, self.dtype), exclude)

    def _read_components(self, start: int, stop: int, logvar: Tensor | None) -> _Read:
        mu = self._mu.rows(start, stop, self.dtype)
        if logvar is None:
            logvar = self._logvar.rows(start, stop, self.dtype)
        log_weights = None
        if self._log_weights is not None:
            log_weights = self._log_weights.rows(start, stop, self.dtype)
        elif stop - start < self.K:
            log_weights = mu.new_full((stop - start,), -math.log(self.K))
        return _Read(self._device, mu, logvar, log_weights)


class _Source:
    """An argument that is read by rows."""

    def __init__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            _checks.tensor(name, value)
        shape = value.get_shape() if hasattr(value, "get_shape") else getattr(value, "shape", None)
        if shape is None or not hasattr(value, "__getitem__"):
            raise TypeError(
                f"{name} must be a tensor, a numpy.memmap or another array that gives rows for {name}[start:stop], "
                f"not {type(value).__name__}"
            )
        self.name, self._value = name, value
        self.shape: tuple[int, ...] = tuple(shape)
        # Of the first row, since some files give nothing for an empty slice.
        self.dtype = self.rows(0, min(1, *self.shape[:1])).dtype if self.shape else self.whole().dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def like(self) -> Tensor:
        """A tensor of this shape and dtype that takes no memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def rows(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        block = self._tensor(self._value[start:stop], dtype)
        if block.shape != (stop - start, *self.shape[1:]):
            raise ValueError(
                f"{self.name}[{start}:{stop}] must be {[stop - start, *self.shape[1:]]}, not {list(block.shape)}"
            )
        return block

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._tensor(self._value[...] if not isinstance(self._value, Tensor) else self._value, dtype)

    def _tensor(self, value: Any, dtype: torch.dtype | None) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(device="cpu", dtype=dtype)
        try:
            block = torch.tensor(value)  # a copy: a view of a memmap would be read while it is computed with
        except (TypeError, ValueError) as error:
            raise TypeError(f"{self.name} cannot be read as a tensor: {error}") from error
        return block if dtype is None else block.to(dtype)


class _Read:
    """Tensors that were read, on their way to a device."""

    def __init__(self, device: torch.device, *tensors: Tensor | None) -> None:
        self._tensors, self._copied = tensors, None
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            with torch.cuda.stream(stream):
                self._tensors = tuple(
                    None if t is None else t.pin_memory().to(device, non_blocking=True) for t in tensors
                )
            self._copied = stream.record_event()
        elif device.type != "cpu":
            self._tensors = tuple(None if t is None else t.to(device) for t in tensors)

    def arrived(self) -> Any:
        """The tensors, which what is launched from here on may use."""
        if self._copied is not None:
            for tensor in self._tensors:
                if tensor is not None:
                    stream = torch.cuda.current_stream(tensor.device)
                    stream.wait_event(self._copied)
                    tensor.record_stream(stream)
        return self._tensors


class Merged:
    """The logsumexp, and the score, of the blocks of components so far."""

    def __init__(self, z: Tensor, with_score: bool) -> None:
        M = z.shape[0]
        self._largest = z.new_full((M,), -math.inf, dtype=torch.float64)
        self._sum = z.new_zeros((M,), dtype=torch.float64)
        self._weighted = z.new_zeros(z.shape, dtype=torch.float64) if with_score else None

    def add(self, log_prob: Tensor, score: Tensor | None = None) -> None:
        now = log_prob.double()
        largest = torch.maximum(self._largest, now)
        finite = largest.masked_fill(largest.isinf(), 0.0)  # two infinities must not make NaN
        before, now = self._largest.sub_(finite).exp_(), now.sub(finite).exp_()
        self._largest = largest
        self._sum.mul_(before).add_(now)
        if self._weighted is not None and score is not None:
            # A block that holds nothing of a row may have an infinite score there.
            before, now = before[:, None], now[:, None]
            self._weighted.mul_(before).masked_fill_(before == 0, 0.0)
            self._weighted.addcmul_(now, score.masked_fill(now == 0, 0.0))

    def result(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        log_prob = torch.where(self._largest.isinf(), self._largest, self._largest + self._sum.log())
        score = None
        if self._weighted is not None:
            score = self._weighted.div_(self._sum.masked_fill(self._sum == 0, 1.0)[:, None]).to(dtype)
        return log_prob.to(dtype), score


def _cut(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(i, min(i + size, stop)) for i in range(start, stop, size)]


def _read_ahead(reads: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results in order; a thread computes the next one while the caller uses this one."""
    with ThreadPoolExecutor(1, "fastvae-read") as thread:
        current: Future[T] | None = None
        for read in reads:
            following = thread.submit(read)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()
