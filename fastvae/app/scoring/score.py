"""The steps of `fastvae score`: look through the inputs, go on where an earlier run stopped, write block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console

import fastvae
from fastvae._files import FileError
from fastvae.app.scoring.arrays import Arrays, fingerprint, open_mixture, open_points, size_in_bytes
from fastvae.app.scoring.resumable import ResumableArrays
from fastvae.app.show.progress import counting_progress
from fastvae.app.user_errors import DataError, RunError
from fastvae.streaming import StreamedScores


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
    """What was done: rows and components, the rows that an earlier run had done, the bytes read for the others."""

    rows: int
    components: int
    resumed_rows: int
    bytes_read: int


def score_files(console: Console, job: Job, device: str, *, overwrite: bool) -> Done:
    """Write the densities, and perhaps the scores, of all points.

    Raises:
        DataError: the inputs are not what they should be, or were changed meanwhile.
        RunError: the output exists, belongs to another job, or is being written by another process.
        FileError: it cannot be written.
    """
    outputs = [job.out] if job.score is None else [job.out, job.score]
    with ExitStack() as locks:
        for path in outputs:
            locks.enter_context(_locked(path))
        points, mixture = open_points(job.points), open_mixture(job.mixture)
        stamps = points.stamps(), mixture.stamps()
        parts = _stream(job, points, mixture, device)
        shapes = [(parts.M,), (parts.M, parts.D)][: len(outputs)]
        results = ResumableArrays(outputs, shapes, str(parts.dtype).removeprefix("torch."))
        if not overwrite:
            results.refuse_result()
        identity = _identity(console, job, points, mixture)
        results.open(identity, overwrite=overwrite)
        parts.first_row = resumed = results.finished_rows
        bytes_read = parts.bytes_read if resumed < parts.M else 0

        def require_same_inputs(console: Console) -> None:
            nonlocal stamps
            now = points.stamps(), mixture.stamps()
            if now == stamps:
                return
            if _identity(console, job, open_points(job.points), open_mixture(job.mixture)) != identity:
                results.discard()
                raise DataError(f"{job.points} or {job.mixture} was changed while it was read; nothing was written.")
            stamps = now

        with counting_progress(console, "scoring", parts.M, "rows") as on_rows:
            parts.on_pairs = _counter(lambda pairs: on_rows(resumed + pairs // parts.K))
            for part in parts:
                # Before each block: after a stop, the journal's rows are those of the inputs that it names.
                require_same_inputs(Console(quiet=True))  # a console shows one bar at a time
                blocks = [part.log_prob] if part.score is None else [part.log_prob, part.score]
                results.write(part.start, [block.numpy() for block in blocks])
        require_same_inputs(console)
        results.finish()
    return Done(parts.M, parts.K, resumed, bytes_read)


def _stream(job: Job, points: Arrays, mixture: Arrays, device: str) -> StreamedScores:
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
    except (TypeError, ValueError) as error:
        raise DataError(f"{job.points} and {job.mixture}: {error}.") from error


def _identity(console: Console, job: Job, points: Arrays, mixture: Arrays) -> dict[str, str]:
    """What decides the result."""
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
