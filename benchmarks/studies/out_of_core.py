"""What scoring points from files costs: time beside the call in memory, bytes read, the memory of a large job."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import fastvae
from fastvae.streaming import StreamedScores

from ..record import machine

BESIDE = (65_536, 20_000, 16)  # rows, components, dimensions
LARGE = (10_000_000, 100_000, 16)
MEMORIES = (2**28, 2**23, 2**22)  # components stay in memory; neither they nor the rows do
ROUNDS = 7
SAMPLES = 10  # of the memory of the large job
_WRITTEN_ROWS = 1_000_000


def study() -> dict[str, Any]:
    """Both parts; the large job takes minutes on a core of its own."""
    return {"machine": machine("cpu"), "beside": beside(*BESIDE), "large": large(*LARGE)}


def beside(M: int, K: int, D: int) -> list[dict[str, Any]]:
    """Streaming from files beside the call in memory, in turn: with components that stay in memory, and without."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = _write(Path(folder), M, K, D)
        z, mu, logvar = (np.load(path, mmap_mode="r") for path in paths)
        in_memory = [torch.from_numpy(np.array(a)) for a in (z, mu, logvar)]
        for memory in MEMORIES:
            parts = StreamedScores(z, mu, logvar, memory=memory)

            def call() -> torch.Tensor:
                return fastvae.mixture_log_prob(*in_memory)

            def stream(parts: StreamedScores = parts) -> torch.Tensor:
                return torch.cat([part.log_prob for part in parts])

            difference = float((call() - stream()).abs().max())
            times = [(*_times(call), *_times(stream)) for _ in range(ROUNDS)]
            rows.append(
                {
                    **{"M": M, "K": K, "D": D, "memory": memory},
                    **{"block_rows": parts.blocks.rows, "block_components": parts.blocks.components},
                    **{"bytes_read": parts.bytes_read, "input_bytes": 4 * D * (M + 2 * K)},
                    "call_seconds": median(call for call, *_ in times),
                    "streamed_seconds": median(streamed for *_, streamed, _ in times),
                    "ratio": median(streamed / call for call, _, streamed, _ in times),
                    "cpu_ratio": median(streamed / call for _, call, _, streamed in times),
                    "largest_difference": difference,
                }
            )
            print(rows[-1], flush=True)
    return rows


def large(M: int, K: int, D: int) -> dict[str, Any]:
    """`fastvae score` of files: seconds, processor seconds, and resident memory over the time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        z, *mixture = _write(folder, M, K, D)
        parts = StreamedScores(*(np.load(path, mmap_mode="r") for path in (z, *mixture)))
        (folder / "mixture").mkdir()
        for path in mixture:
            path.rename(folder / "mixture" / path.name)
        out = folder / "log_prob.npy"
        command = [sys.executable, "-m", "fastvae.app.cli", "score", "--points", str(z), "--mixture"]
        command += [str(folder / "mixture"), "--out", str(out), "--threads", str(torch.get_num_threads())]
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        memory = []
        with subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                memory.append(_resident(process.pid))
                time.sleep(1.0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            raise RuntimeError(f"fastvae score ended with {process.returncode}")
        seconds = time.perf_counter() - started
        written = np.load(out, mmap_mode="r")
        assert written.shape == (M,) and bool(np.isfinite(written).all())
    half = len(memory) // 2
    return {
        **{"M": M, "K": K, "D": D, "bytes_read": parts.bytes_read, "input_bytes": 4 * D * (M + 2 * K)},
        **{"seconds": seconds, "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime},
        "peak_bytes": max(memory),
        "peak_bytes_of_each_half": [max(memory[:half]), max(memory[half:])],
        "resident_bytes": memory[:: max(1, len(memory) // SAMPLES)],
    }


def _write(folder: Path, M: int, K: int, D: int) -> list[Path]:
    """z, mu and logvar as .npy files, no more than a block of which is in memory."""
    rng, paths = np.random.default_rng(0), []
    for name, rows, spread in (("z", M, 1.0), ("mu", K, 1.0), ("logvar", K, 0.1)):
        paths.append(folder / f"{name}.npy")
        file = np.lib.format.open_memmap(paths[-1], "w+", np.float32, (rows, D))
        for start in range(0, rows, _WRITTEN_ROWS):
            block = file[start : start + _WRITTEN_ROWS]
            block[:] = spread * rng.standard_normal(block.shape, dtype=np.float32)
        file.flush()
    return paths


def _times(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock, and of the processor in all threads."""
    started, before = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - before


def _resident(process: int) -> int:
    """Bytes that a process has in memory; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)
