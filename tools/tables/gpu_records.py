"""The records of runs on GPUs: the folders gpu-NAME that `python -m tools.gpu` filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvae.benchmarks.record import Record

from .registry import Results


@dataclass(frozen=True)
class GpuRecord:
    """One GPU's folder.

    Attributes:
        folder: its name.
        machine: device, driver, versions, commit.
        stages: what became of each stage.
        figures: seconds, bytes, nats and rates by name, see `tools/gpu/measure.py`.
        tests: what pytest said: "runs", and "reasons" of failures where somebody looked for them.
        bench: records of `fastvae bench`.
    """

    folder: str
    machine: Mapping[str, str]
    stages: Sequence[Mapping[str, Any]]
    figures: Mapping[str, float]
    tests: Mapping[str, Any]
    bench: Sequence[Record]

    @property
    def name(self) -> str:
        """H200, of "NVIDIA H200, sm_90, 132 multiprocessors"."""
        return self.machine["device"].removeprefix("NVIDIA ").split(",")[0].split()[0]


def gpu_records(results: Results) -> list[GpuRecord]:
    """Every run on a GPU; a dry run is none."""
    found = []
    for path in sorted(results.folder.glob("gpu-*/gpu.json")):
        run = results.read(f"{path.parent.name}/gpu.json")
        if run["dry"]:
            continue
        folder = path.parent.name
        files = {other: results.read(f"{folder}/{other.name}") for other in sorted(path.parent.glob("*.json"))}
        named = {other.name: content for other, content in files.items()}
        found.append(
            GpuRecord(
                folder,
                run["machine"],
                run["stages"],
                named.get("measure.json", {}).get("figures", {}),
                named.get("tests.json", {}),
                [Record(other, content) for other, content in files.items() if "cases" in content],
            )
        )
    return found
