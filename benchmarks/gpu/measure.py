"""Measure what `targets.py` asks for: python -m benchmarks.gpu.measure --out DIR [--dry-run]

A dry run does the same work by the same kernels, smaller and interpreted on the CPU: that it runs is all it tells, so
its figures are kept apart and no target is judged by them.  Writes measure.json after each figure and targets.md at
the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae.app.data.whole_file import whole_file, write_json

from ..inputs import diffuse
from ..memory import extra_peak
from ..peers.expansion import log_prob as expansion
from ..precision import tiles_alone
from ..timing import CudaClock, cpu_clock
from . import ceilings, targets

PRECISIONS = ("highest", "high", "medium")
Run = Callable[[], object]


class Measurement:
    """The works on one device; seconds are medians of calls timed one by one, the L2 cache overwritten before each."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.clock = cpu_clock if dry else CudaClock()
        self.large = (40, 70, 8) if dry else (targets.M, targets.K, targets.D)
        self.wide = (40, 70, 8) if dry else (16_384, 1_000_000, 64)
        self.rows = (64, 16) if dry else (16_384, 256)
        self.rounds = 2 if dry else 15

    def median(self, run: Run) -> float:
        for _ in range(2):
            run()
        return sorted(self.clock(run, 1) for _ in range(self.rounds))[self.rounds // 2]

    def figures(self) -> Iterator[tuple[str, Callable[[], float]]]:
        """Every figure by name, in the order in which they are to be measured."""
        small = {"steps": 2, "programs": 2} if self.dry else {}
        yield "multiply-add rate", lambda: ceilings.multiply_add_rate(self.clock, self.device, **small)
        yield "tf32 rate", lambda: ceilings.tf32_rate(self.clock, self.device, 64 if self.dry else 8192)
        yield "copy rate", lambda: ceilings.copy_rate(self.clock, self.device, 1 << (10 if self.dry else 29))
        for precision in PRECISIONS:
            yield f"error {precision}", partial(self.error, precision)
            yield f"forward {precision}", partial(self.ours, precision, backward=False)
            yield f"both {precision}", partial(self.ours, precision, backward=True)
        for name, setting in (("expansion", "highest"), ("expansion tf32", "high")):
            yield f"forward {name}", partial(self.theirs, setting, backward=False)
            yield f"both {name}", partial(self.theirs, setting, backward=True)
        yield "rsample", lambda: self.median(self.sampler("triton"))
        yield "peak memory", self.peak_memory
        if not self.dry:
            yield "graph", lambda: self.graph(self.density_step())
            yield "small", partial(self.small, "triton")
            yield "KL graph", lambda: self.graph(self.kl_step())
            yield "error cuda", partial(self.error, "highest", "cuda")
            yield "forward cuda", partial(self.ours, "highest", backward=False, impl="cuda")
            yield "both cuda", partial(self.ours, "highest", backward=True, impl="cuda")
            yield "rsample cuda", lambda: self.median(self.sampler("cuda"))
            yield "small cuda", partial(self.small, "cuda")

    def arguments(self, shape: tuple[int, int, int], leaves: bool) -> list[Tensor]:
        data = diffuse(*shape).to(self.device)
        return [t.requires_grad_(leaves) for t in (data.z, data.mu, data.logvar, data.log_weights)]

    def ours(self, precision: str, backward: bool, impl: str = "triton") -> float:
        """The density."""
        arguments = self.arguments(self.large, backward)

        def density(*given: Tensor) -> Tensor:
            return fastvae.mixture_log_prob(*given, precision=precision, impl=impl)

        return self.median(self.work(density, arguments))

    def small(self, impl: str) -> float:
        """Forward (100, 500, 40), launched by hand."""
        arguments = self.arguments((100, 500, 40), False)
        return self.median(lambda: fastvae.mixture_log_prob(*arguments, impl=impl))

    def work(self, density: Callable[..., Tensor], arguments: list[Tensor]) -> Run:
        if not arguments[0].requires_grad:
            return lambda: density(*arguments)
        return lambda: torch.autograd.grad(density(*arguments).sum(), arguments)

    def theirs(self, setting: str, backward: bool) -> float:
        """The compiled expansion; in a dry run not compiled."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(setting)
        torch.compiler.reset()
        try:
            density = expansion if self.dry else torch.compile(expansion, dynamic=False)
            return self.median(self.work(density, self.arguments(self.large, backward)))
        finally:
            torch.set_float32_matmul_precision(before)

    def error(self, precision: str, impl: str = "triton") -> float:
        """The largest error of log p on some rows, nats."""
        arguments = self.arguments(self.large, False)
        got = fastvae.mixture_log_prob(*arguments, precision=precision, impl=impl)[:4].double()
        exact = [t.double() for t in arguments]
        want = fastvae.reference.mixture_log_prob(exact[0][:4], *exact[1:])
        return float((got - want).abs().max())

    def sampler(self, impl: str) -> Run:
        mu, logvar = torch.randn(2, *self.rows, device=self.device)
        return lambda: fastvae.gaussian_rsample(mu, logvar, impl=impl)

    def peak_memory(self) -> float:
        """Bytes beyond the arguments."""
        arguments = self.arguments(self.wide, False)

        def run() -> Tensor:
            return fastvae.mixture_log_prob(*arguments, precision="high", impl="triton")

        run()
        return float(extra_peak(run, self.device) or 0)

    def density_step(self) -> Run:
        """Forward + backward, (100, 500, 40)."""
        arguments = self.arguments((100, 500, 40), True)
        return self.work(lambda *given: fastvae.mixture_log_prob(*given, impl="triton"), arguments)

    def kl_step(self) -> Run:
        """The same of mixture_kl, for rows of q as many as these, sigma 1."""
        z, *prior = self.arguments((100, 500, 40), True)
        logvar = torch.zeros_like(z).requires_grad_()
        return self.work(lambda *given: fastvae.mixture_kl(*given, impl="triton")[1], [z, logvar, *prior])

    def graph(self, run: Run) -> float:
        """Seconds of one replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return self.median(graph.replay)


def main(arguments: list[str]) -> int:
    """0 if every figure could be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--dry-run", action="store_true", help="small problems, interpreted on the CPU")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    measurement = Measurement(options.dry_run)
    figures: dict[str, float] = {}
    failed: dict[str, str] = {}

    def keep() -> None:
        content: dict[str, Any] = {"dry": options.dry_run, "figures": figures, "failed": failed}
        write_json(options.out / "measure.json", content)

    for name, measure in measurement.figures():
        start = time.perf_counter()
        try:
            with tiles_alone() if options.dry_run else nullcontext():
                figures[name] = measure()
            print(f"{name}: {figures[name]:.4g} ({time.perf_counter() - start:.1f} s)", flush=True)
        except Exception as error:  # one figure's failure, of whatever kind, must not cost the others
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name} failed: {failed[name]}", flush=True)
        if measurement.device == "cuda":
            torch.cuda.empty_cache()
        keep()
    table = targets.table({} if options.dry_run else figures)
    with whole_file(options.out / "targets.md") as file:
        file.write((table + "\n").encode())
    print(table)
    print(f"{len(figures)} figures measured, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
