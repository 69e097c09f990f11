"""Tables of what was measured on GPUs, and of what the Triton kernels lose by their precision."""

from __future__ import annotations

from ..experiments import certificate, triton_precision
from ..gpu.gpu_targets import target_table
from .gpu_records import gpu_records
from .registry import Results, table


@table("triton-precision", "triton-precision.json")
def precision(results: Results) -> str:
    """What each precision of the Triton kernels loses."""
    return triton_precision.markdown(results.read("triton-precision.json"))


@table("certificate", "certificate.json")
def certified(results: Results) -> str:
    """How many pairs the CUDA kernels may compute by products and be exact."""
    return certificate.markdown(results.read("certificate.json"))


@table("certified-sums", "certificate.json")
def certified_sums(results: Results) -> str:
    """How much of what may be lost the CUDA kernels' sums of products take."""
    return certificate.sums_markdown(results.read("certificate.json"))


@table("triton-targets", "*")  # also where nothing is recorded, which is what it then says
def targets(results: Results) -> str:
    """The targets on an H200: met, missed, or never run, on each GPU that has a record."""
    return target_table({gpu.name: gpu.figures for gpu in gpu_records(results) if gpu.figures})
