"""Measure what `gpu_targets.py` asks for: python -m tools.gpu.measure --out DIR [--dry-run]

What is timed has two figures: NAME, the time of its kernels, and "NAME, call", that of a call as its caller sees it:
see `clocks.py`.  Of a training step the second one counts.  A dry run does the same work, smaller, by composite for the
CUDA kernels and by interpreted Triton: that it runs is all it tells, so its figures are kept apart and no target is
judged by them.  Writes measure.json after each figure and targets.md at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import fastvae
from fastvae._files import whole_file, write_json
from fastvae.benchmarks.inputs import MixtureInputs, diffuse, find_latents, from_file
from fastvae.benchmarks.memory import extra_peak
from fastvae.benchmarks.peers.expansion import log_prob as expansion

from ..experiments.triton_precision import tiles_alone
from . import ceilings, training
from .clocks import Run, Times, clocks
from .gpu_targets import D, K, M, clock_table, target_table

PRECISIONS = ("highest", "high", "medium")
PEERS = (("highest", "expansion"), ("high", "expansion tf32"))
CALLS_SECONDS = 0.02  # for so long calls in a row are timed
Figure = Callable[[], float | Times]


class Measurement:
    """The works on one device; seconds are medians of rounds."""

    def __init__(self, dry: bool) -> None:
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        self.clock, self.call_clock = clocks(self.device)
        self.large = (40, 70, 8) if dry else (M, K, D)
        self.wide = (40, 70, 8) if dry else (16_384, 1_000_000, 64)
        self.small_shape = (5, 9, 4) if dry else (100, 500, 40)
        self.cuda = "composite" if dry else "cuda"  # whose part composite plays where there is no GPU
        self.rows = (64, 16) if dry else (16_384, 256)
        self.rounds = 2 if dry else 15

    def times(self, run: Run) -> Times:
        for _ in range(2):
            run()
        calls = 1 if self.dry else max(1, round(CALLS_SECONDS / self.call_clock(run, 3)))
        return Times(
            median(self.clock(run, 1) for _ in range(self.rounds)),
            median(self.call_clock(run, calls) for _ in range(min(5, self.rounds))),
        )

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure by name, in the order in which they are to be measured."""
        small = {"steps": 2, "programs": 2} if self.dry else {}
        works = ((False, "forward"), (True, "both"))
        yield "multiply-add rate", lambda: ceilings.multiply_add_rate(self.clock, self.device, **small)
        yield "tf32 rate", lambda: ceilings.tf32_rate(self.clock, self.device, 64 if self.dry else 8192)
        yield "copy rate", lambda: ceilings.copy_rate(self.clock, self.device, 1 << (10 if self.dry else 29))
        for precision in PRECISIONS:
            yield f"error {precision}", partial(self.error, precision)
            yield f"forward {precision}", partial(self.ours, precision, backward=False)
            yield f"both {precision}", partial(self.ours, precision, backward=True)
        for setting, name in PEERS:
            yield f"forward {name}", partial(self.theirs, setting, backward=False)
            yield f"both {name}", partial(self.theirs, setting, backward=True)
        yield "rsample", lambda: self.times(self.sampler("triton"))
        yield "peak memory", self.peak_memory
        for impl, ending in (("triton", ""), (self.cuda, " cuda")):
            yield f"graph{ending}", partial(self.graph, self.density_step, impl)
            yield f"small{ending}", partial(self.small, impl)
            yield f"KL graph{ending}", partial(self.graph, self.kl_step, impl)
        for precision in PRECISIONS:
            name = "cuda" if precision == "highest" else f"cuda {precision}"
            yield f"error {name}", partial(self.error, precision, self.cuda)
            yield f"forward {name}", partial(self.ours, precision, backward=False, impl=self.cuda)
            yield f"both {name}", partial(self.ours, precision, backward=True, impl=self.cuda)
        for backward, name in works:
            yield f"{name} cuda difference", partial(self.by_difference, backward)
        many = diffuse(*((8, 20, 68) if self.dry else (4096, 50_000, 128)))
        yield "both cuda high, 128 dimensions", partial(self.ours, "high", True, self.cuda, many)
        yield "both cuda difference, 128 dimensions", partial(self.by_difference, True, many)
        for name, data in self.others():
            for backward, work in works:
                for setting, peer in PEERS:
                    yield f"{work} {peer}, {name}", partial(self.theirs, setting, backward, data)
                for precision in PRECISIONS:
                    ours = partial(self.ours, precision, backward, self.cuda, data)
                    yield f"{work} cuda {precision}, {name}", ours
                yield f"{work} cuda difference, {name}", partial(self.by_difference, backward, data)
        yield "rsample cuda", lambda: self.times(self.sampler(self.cuda))
        for components in (7,) if self.dry else (500, 5000):
            for prior in ("eager", "cuda", "triton", "composite"):
                yield f"step {prior} {components}", partial(self.step, prior, components)
            for prior in ("cuda", "triton"):
                yield f"step {prior} captured {components}", partial(self.step, prior, components, captured=True)

    def others(self) -> Iterator[tuple[str, MixtureInputs]]:
        """Other inputs than those of the large work."""
        shapes = ((8, 20, 4), (6, 10, 3)) if self.dry else ((1000, 50_000, 40), (1024, 25_000, 40))
        yield "diffuse", diffuse(*shapes[0])
        if (path := find_latents()) is not None:
            yield "mnist_latents", from_file(path, *shapes[1][:2])

    def arguments(self, shape: tuple[int, int, int], leaves: bool) -> list[Tensor]:
        return self.tensors(diffuse(*shape), leaves)

    def tensors(self, data: MixtureInputs, leaves: bool) -> list[Tensor]:
        there = data.to(self.device)
        return [t.requires_grad_(leaves) for t in (there.z, there.mu, there.logvar, there.log_weights)]

    def ours(self, precision: str, backward: bool, impl: str = "triton", data: MixtureInputs | None = None) -> Times:
        """The density."""
        arguments = self.arguments(self.large, backward) if data is None else self.tensors(data, backward)

        def density(*given: Tensor) -> Tensor:
            return fastvae.mixture_log_prob(*given, precision=precision, impl=impl)

        return self.times(self.work(density, arguments))

    def by_difference(self, backward: bool, data: MixtureInputs | None = None) -> Times:
        """The density at the highest precision, all pairs in the difference form."""
        with patch.dict(os.environ, FASTVAE_CERTIFICATE="0", FASTVAE_SCREEN="0"):
            return self.ours("highest", backward, self.cuda, data)

    def small(self, impl: str) -> Times:
        """Forward (100, 500, 40), launched by hand."""
        arguments = self.arguments(self.small_shape, False)
        return self.times(lambda: fastvae.mixture_log_prob(*arguments, impl=impl))

    def work(self, density: Callable[..., Tensor], arguments: list[Tensor]) -> Run:
        if not arguments[0].requires_grad:
            return lambda: density(*arguments)
        return lambda: torch.autograd.grad(density(*arguments).sum(), arguments)

    def theirs(self, setting: str, backward: bool, data: MixtureInputs | None = None) -> Times:
        """The compiled expansion; in a dry run not compiled."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(setting)
        torch.compiler.reset()
        try:
            density = expansion if self.dry else torch.compile(expansion, dynamic=False)
            arguments = self.arguments(self.large, backward) if data is None else self.tensors(data, backward)
            return self.times(self.work(density, arguments))
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

    def density_step(self, impl: str) -> Run:
        """Forward + backward, (100, 500, 40)."""
        arguments = self.arguments(self.small_shape, True)
        return self.work(lambda *given: fastvae.mixture_log_prob(*given, impl=impl), arguments)

    def kl_step(self, impl: str) -> Run:
        """The same of mixture_kl, for rows of q as many as these, sigma 1."""
        z, *prior = self.arguments(self.small_shape, True)
        logvar = torch.zeros_like(z).requires_grad_()
        return self.work(lambda *given: fastvae.mixture_kl(*given, impl=impl)[1], [z, logvar, *prior])

    def graph(self, make: Callable[[str], Run], impl: str) -> Times:
        """One replay; in a dry run the call itself."""
        run = make(impl)
        if self.dry:
            return self.times(run)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return self.times(graph.replay)

    def step(self, prior: str, components: int, captured: bool = False) -> Times:
        """A training step with a VampPrior, batch 100."""
        sizes = training.SMALL if self.dry else training.MNIST
        trained = training.Training(self.cuda if prior == "cuda" else prior, components, self.device, sizes)
        return self.times(trained.captured() if captured else trained.step)


def main(arguments: list[str]) -> int:
    """0 if every figure could be measured."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.measure", description=__doc__.split("\n")[0])
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
                found = measure()
            figures |= {name: found.kernel, f"{name}, call": found.call} if isinstance(found, Times) else {name: found}
            told = " ".join(f"{value:.4g}" for value in (found if isinstance(found, Times) else (found,)))
            print(f"{name}: {told} ({time.perf_counter() - start:.1f} s)", flush=True)
        except Exception as error:  # one figure's failure, of whatever kind, must not cost the others
            failed[name] = f"{type(error).__name__}: {error}"
            print(f"{name} failed: {failed[name]}", flush=True)
        if measurement.device == "cuda":
            torch.cuda.empty_cache()
        keep()
    table = target_table({} if options.dry_run else {"measured": figures}) + "\n\n" + clock_table(figures)
    with whole_file(options.out / "targets.md") as file:
        file.write((table + "\n").encode())
    print(table)
    print(f"{len(figures)} figures measured, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
