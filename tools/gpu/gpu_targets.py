"""What the GPU kernels are to reach on an H200, and whether figures show it: met, missed, or never run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastvae.benchmarks import formatting

MET, MISSED, NEVER_RUN = "met", "missed", "never run"
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        work: what is done.
        bar: what it is to reach, in formatting.
        needs: the figures it is made from.
        value: the quantity, of those figures.
        bound: the minimum of that quantity, or its maximum.
        is_max: whether the bound is a maximum.
        written: the quantity in formatting.
    """

    work: str
    bar: str
    needs: tuple[str, ...]
    value: Callable[[Figures], float]
    bound: float
    is_max: bool = False
    written: Callable[[float], str] = formatting.ratio

    def verdict(self, figures: Figures) -> tuple[str, str]:
        """(the quantity as text, MET, MISSED or NEVER_RUN)."""
        if any(name not in figures for name in self.needs):
            return formatting.NOTHING, NEVER_RUN
        value = self.value(figures)
        return self.written(value), MET if (value <= self.bound if self.is_max else value >= self.bound) else MISSED

    def call(self, figures: Figures) -> str:
        """What a call takes by the host's clock, if that was recorded."""
        seconds = figures.get(f"{self.needs[0]}, call")
        return formatting.NOTHING if seconds is None else formatting.duration(seconds)


Made = tuple[tuple[str, str], Callable[[Figures], float]]


def _faster(ours: str, theirs: str) -> Made:
    return (ours, theirs), lambda figures: figures[theirs] / figures[ours]


def _share(ours: str, amount: float, rate: str, parts: float = 1.0) -> Made:
    """amount / seconds as a fraction of rate / parts."""
    return (ours, rate), lambda figures: amount / figures[ours] / (figures[rate] / parts)


M, K, D = 4096, 50_000, 64
STEP = "step cuda captured 500, call"
PAIRS = M * K
FORWARD = f"forward, ({M}, {K}, {D})"
BOTH = f"forward + backward, ({M}, {K}, {D})"

TARGETS = (
    Target(f"{FORWARD}, high", "2.5 x the compiled expansion in fp32",
           *_faster("forward high", "forward expansion"), 2.5),
    Target(f"{FORWARD}, high", "half of a third of the measured TF32 rate",
           *_share("forward high", 4 * PAIRS * D, "tf32 rate", 3), 0.5, written=formatting.percent),
    Target(f"{FORWARD}, medium", "2.5 x the compiled expansion in TF32",
           *_faster("forward medium", "forward expansion tf32"), 2.5),
    Target(f"{FORWARD}, highest", "60 % of the measured fp32 multiply-add rate, at 4 flops an element",
           *_share("forward highest", 4 * PAIRS * D, "multiply-add rate"), 0.6, written=formatting.percent),
    Target(f"{BOTH}, high", "3 x the compiled expansion in fp32", *_faster("both high", "both expansion"), 3.0),
    Target("peak memory of the forward, (16384, 1000000, 64), high", "2 GB",
           ("peak memory",), lambda figures: figures["peak memory"], 2e9, is_max=True,
           written=lambda value: formatting.size(int(value))),
    Target("gaussian_rsample, 16384 x 256", "85 % of the measured copy bandwidth",
           *_share("rsample", 4 * 3 * 16_384 * 256, "copy rate"), 0.85, written=formatting.percent),
    Target("forward + backward, (100, 500, 40), in a CUDA graph", "40 us",
           ("graph",), lambda figures: figures["graph"], 40e-6, is_max=True, written=formatting.duration),
    Target("forward, (100, 500, 40)", "8 us",
           ("small",), lambda figures: figures["small"], 8e-6, is_max=True, written=formatting.duration),
    Target("mixture_kl, forward + backward, (100, 500, 40), in a CUDA graph", "20 us",
           ("KL graph",), lambda figures: figures["KL graph"], 20e-6, is_max=True, written=formatting.duration),
    Target(f"{FORWARD}, CUDA C++", "70 % of the measured fp32 multiply-add rate, at 4 flops an element",
           *_share("forward cuda", 4 * PAIRS * D, "multiply-add rate"), 0.7, written=formatting.percent),
    Target(f"{FORWARD}, CUDA C++", "Triton's highest", *_faster("forward cuda", "forward highest"), 1.0),
    Target(f"{BOTH}, CUDA C++", "55 % of the measured fp32 multiply-add rate, at 26 flops an element",
           *_share("both cuda", 26 * PAIRS * D, "multiply-add rate"), 0.55, written=formatting.percent),
    Target(f"{FORWARD}, CUDA C++", "2.3 x the compiled expansion in fp32",
           *_faster("forward cuda", "forward expansion"), 2.3),
    Target(f"{BOTH}, CUDA C++", "1.7 x the compiled expansion in fp32", *_faster("both cuda", "both expansion"), 1.7),
    Target(f"{FORWARD}, high, CUDA C++", "6 x the compiled expansion in fp32",
           *_faster("forward cuda high", "forward expansion"), 6.0),
    Target(f"{BOTH}, high, CUDA C++", "3.5 x the compiled expansion in fp32",
           *_faster("both cuda high", "both expansion"), 3.5),
    Target("forward + backward, diffuse (1000, 50000, 40), highest, CUDA C++", "the compiled expansion in fp32",
           *_faster("both cuda highest, diffuse", "both expansion, diffuse"), 1.0),
    Target("forward + backward, diffuse (1000, 50000, 40), high, CUDA C++", "the compiled expansion in TF32",
           *_faster("both cuda high, diffuse", "both expansion tf32, diffuse"), 1.0),
    Target("forward, mnist_latents (1024, 25000, 40), highest, CUDA C++", "3.5 x the compiled expansion in fp32",
           *_faster("forward cuda highest, mnist_latents", "forward expansion, mnist_latents"), 3.5),
    Target("forward + backward, mnist_latents (1024, 25000, 40), highest, CUDA C++",
           "5 x the compiled expansion in fp32",
           *_faster("both cuda highest, mnist_latents", "both expansion, mnist_latents"), 5.0),
    Target("gaussian_rsample, 16384 x 256, CUDA C++", "85 % of the measured copy bandwidth",
           *_share("rsample cuda", 4 * 3 * 16_384 * 256, "copy rate"), 0.85, written=formatting.percent),
    Target("forward, (100, 500, 40), CUDA C++", "8 us",
           ("small cuda",), lambda figures: figures["small cuda"], 8e-6, is_max=True, written=formatting.duration),
    Target("training step, VampPrior of K = 500, batch 100, CUDA C++ in a CUDA graph", "1.0 ms a step",
           (STEP,), lambda figures: figures[STEP], 1e-3, is_max=True, written=formatting.duration),
    Target("training step, VampPrior of K = 500, batch 100, CUDA C++", "the same with an eager prior",
           *_faster("step cuda 500, call", "step eager 500, call"), 1.0),
)  # fmt: skip


def target_table(measured: Mapping[str, Figures]) -> str:
    """All targets as Markdown, with each machine's figures, whether they meet the target, and the time of a call."""
    rows = []
    for target in TARGETS:
        verdicts = [cell for figures in measured.values() for cell in (*target.verdict(figures), target.call(figures))]
        rows.append([target.work, target.bar, *(verdicts or (formatting.NOTHING, NEVER_RUN, formatting.NOTHING))])
    machines = [cell for machine in measured or ["measured"] for cell in (machine, "", "a call")]
    return formatting.markdown(["work", "min (or max)", *machines], rows, left=2)


def clock_table(figures: Figures) -> str:
    """Whatever was timed, by both clocks, as Markdown."""
    timed = [name for name in figures if f"{name}, call" in figures]
    rows = [[name, *(formatting.duration(figures[each]) for each in (name, f"{name}, call"))] for name in timed]
    return formatting.markdown(["figure", "kernels", "a call"], rows, left=1)
