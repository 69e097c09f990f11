"""The steps of `fastvae score`: look through the inputs, go on where an earlier run stopped, write block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console

import fastvae
from fastvae._files import FileError
from fastvae.app.run.ranks import ALONE, Ranks
from fastvae.app.scoring.arrays import Arrays, fingerprint, open_mixture, open_points, size_in_bytes
from fastvae.app.scoring.resumable import ResumableArrays
from fastvae.app.show.progress import counting_progress
from fastvae.app.user_errors import DataError, RunError
from fastvae.streaming import StreamedScores

PATIENCE = timedelta(days=365)  # of ranks that are done, for those that are not: the work takes as long as it takes


@dataclass(frozen=True)
class Job:
    """What the command line asks for; memory in bytes, score None where no scores are wanted."""

    points: Path
    mixture: Path
    out: Path
    score: Path | None
    dtype: str | None
    memory: int
    precision: str | None
    impl: str | None


@dataclass(frozen=True)
class Done:
    """What was done.

    Attributes:
        rows, components: M, K.
        resumed_rows: those that an earlier run had done.
        bytes_read: for the others, by all processes.
    """

    rows: int
    components: int
    resumed_rows: int
    bytes_read: int


def score_files(console: Console, job: Job, device: str, *, overwrite: bool, ranks: Ranks = ALONE) -> Done:
    """Write the densities, and perhaps the scores, of all points; each of several ranks a share of them.

    Raises:
        DataError: the inputs are not what they should be, or were changed meanwhile.
        RunError: the output exists, belongs to another job, or is being written by another process; another rank has
            ended.
        FileError: it cannot be written.
        SystemExit: another rank has failed, and says why.
    """
    with ranks.joined(device, PATIENCE), ExitStack() as locks:
        inputs = ranks.each(lambda: _Inputs(job))
        parts = ranks.each(lambda: _stream(job, inputs, device))
        outputs = [job.out] if job.score is None else [job.out, job.score]
        shapes = [(parts.M,), (parts.M, parts.D)][: len(outputs)]
        results = ResumableArrays(outputs, shapes, str(parts.dtype).removeprefix("torch."), ranks.rank)
        locks.callback(results.close)

        def begin() -> tuple[dict[str, str], list[tuple[int, ...]], list[tuple[int, int]]]:
            for path in outputs:
                locks.enter_context(_locked(path))
            if not overwrite:
                results.refuse_result()
            inputs.identify(console)
            results.open(inputs.identity, overwrite=overwrite)
            return inputs.identity, inputs.stamps, results.finished

        identity, stamps, finished = ranks.from_first(begin)

        def join() -> None:
            if stamps == inputs.stamps:  # the very files of the first process, or else a copy of them
                inputs.identity = identity
            else:
                inputs.identify(console)
                if inputs.identity != identity:
                    raise DataError(f"{job.points} or {job.mixture} is not the same for all processes.")
            results.join(finished)

        ranks.each(join)
        resumed, parts.row_blocks = results.finished_rows, _share(results.unfinished(), parts.blocks.rows, ranks)
        bytes_read = sum(ranks.gather(parts.bytes_read))

        def require_same_inputs(console: Console) -> None:
            if inputs.have_changed(console):
                results.discard()
                raise DataError(f"{job.points} or {job.mixture} was changed while it was read; nothing was written.")

        own = sum(stop - start for start, stop in parts.row_blocks)
        what = "scoring" if ranks.size == 1 else f"scoring, process 0 of {ranks.size}"
        done_before = resumed if ranks.size == 1 else 0
        with counting_progress(console, what, done_before + own, "rows") as on_rows:
            parts.on_pairs = _counter(lambda pairs: on_rows(done_before + pairs // parts.K))
            for part in parts:
                # Before each block: after a stop, the journal's rows are those of the inputs that it names.
                require_same_inputs(Console(quiet=True))  # a console shows one bar at a time
                blocks = [part.log_prob] if part.score is None else [part.log_prob, part.score]
                results.write(part.start, [block.numpy() for block in blocks])
        ranks.each(lambda: require_same_inputs(console))
        ranks.from_first(results.finish)
    return Done(parts.M, parts.K, resumed, bytes_read)


class _Inputs:
    """The files of a job, and what they held when they were looked at."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.points, self.mixture = open_points(job.points), open_mixture(job.mixture)
        self.stamps = self._stamps()
        self.identity: dict[str, str] = {}  # what decides the result

    def identify(self, console: Console) -> None:
        self.identity = _identity(console, self._job, self.points, self.mixture)

    def have_changed(self, console: Console) -> bool:
        """Since they were identified; a file that was written anew with the same content has not."""
        now = self._stamps()
        if now != self.stamps:
            opened = open_points(self._job.points), open_mixture(self._job.mixture)
            if _identity(console, self._job, *opened) != self.identity:
                return True
            self.stamps = now
        return False

    def _stamps(self) -> list[tuple[int, ...]]:
        return self.points.stamps() + self.mixture.stamps()


def _share(unfinished: list[tuple[int, int]], most: int, ranks: Ranks) -> list[tuple[int, int]]:
    """The blocks of rows of one process, of at most so many rows; all processes have about as many rows to do."""
    if ranks.size > 1:
        rows = sum(stop - start for start, stop in unfinished)
        rounds = ceil(rows / (ranks.size * most))
        most = max(1, ceil(rows / (ranks.size * max(1, rounds))))
    blocks = [(i, min(i + most, stop)) for start, stop in unfinished for i in range(start, stop, most)]
    return blocks[ranks.rank :: ranks.size]


def _stream(job: Job, inputs: _Inputs, device: str) -> StreamedScores:
    points, mixture = inputs.points, inputs.mixture
    try:
        return StreamedScores(
            points.arrays["z"],
            mixture.arrays["mu"],
            mixture.arrays["logvar"],
            mixture.arrays.get("log_weights"),
            score=job.score is not None,
            memory=job.memory,
            device=device,
            dtype=None if job.dtype is None else getattr(torch, job.dtype),
            precision=job.precision,
            impl=job.impl,
        )
    except DataError:  # names its file
        raise
    except (TypeError, ValueError) as error:
        raise DataError(f"{job.points} and {job.mixture}: {error}.") from error


def _identity(console: Console, job: Job, points: Arrays, mixture: Arrays) -> dict[str, str]:
    with counting_progress(console, "looking through the inputs", _bytes(points, mixture), "bytes") as on_bytes:
        counter = _counter(on_bytes)
        inputs = {"points": fingerprint(points, counter), "mixture": fingerprint(mixture, counter)}
    return {
        **inputs,
        "--dtype": job.dtype or "of the inputs",
        "--score": "yes" if job.score else "no",
        "--memory": f"{job.memory >> 20}",
        "--precision": job.precision or "default",
        "--impl": job.impl or "default",
        "fastvae": fastvae.__version__,
    }


def _bytes(*opened: Arrays) -> int:
    return sum(map(size_in_bytes, opened))


def _counter(on_total: Callable[[int], None]) -> Callable[[int], None]:
    """Adds up what it is called with, and tells the sum."""
    total = 0

    def add(count: int) -> None:
        nonlocal total
        total += count
        on_total(total)

    return add


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep an output for this process alone; the operating system gives the lock up however the process ends."""
    lock = FileLock(out.with_name(f".{out.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        if not Path(lock.lock_file).exists():  # the file system takes none
            raise FileError(f"{out}: cannot be written; name a file in another folder.") from None
        raise RunError(f"{out}: is being written by another process. Wait for it, or name another file.") from None
    except OSError as error:
        raise FileError(f"{out}: cannot be written ({error.strerror}).") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is still held
        lock.release()
