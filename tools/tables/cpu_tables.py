"""Tables of the records of `fastvae bench` on CPUs."""

from __future__ import annotations

from fastvae.benchmarks import formatting
from fastvae.benchmarks.cpu_targets import target_table
from fastvae.benchmarks.ratios import OURS, Result, best_peer, copy_fraction, rate_fraction, seconds, times_faster
from fastvae.benchmarks.record import Record

from .registry import Results, table


@table("cpu-targets", "cpu.json")
def cpu_targets(results: Results) -> str:
    """Every target, and whether it is met."""
    records = ("cpu", "gaussian/cpu", "train-step/cpu")
    cases = {key: case for name in records for key, case in results.bench(name).cases.items()}
    return target_table(cases, results.bench("alone/cpu").cases)


@table("speed", "cpu.json")
def speed(results: Results) -> str:
    """The large cases in short: a random mixture, and the one of a trained model."""
    rows = []
    for result in results.bench("cpu").cases.values():
        if result["suite"] != "mixture" or "series" in result:
            continue
        shape = (result["M"], result["K"], result["D"])
        if shape not in ((1024, 10000, 40), (1024, 25000, 40)):
            continue
        peer = best_peer(result)
        faster = (formatting.ratio(times_faster(result, than)) for than in (peer, "keops", "mixture-same-family"))
        rows.append([f"{result['work']}, {result['inputs']}", str(shape), *faster])
    return formatting.markdown(
        ["", "(M, K, D)", "than the best peer", "than KeOps", "than MixtureSameFamily"], rows, left=2
    )


@table("avx2-targets", "avx2/cpu.json")
def avx2_targets(results: Results) -> str:
    """The targets on a machine whose widest vectors are those of AVX2."""
    return target_table(results.bench("avx2/cpu").cases)


@table("avx2-mixture", "avx2/cpu.json")
def avx2_mixture(results: Results) -> str:
    """As cpu-mixture, there."""
    return _mixture(results.bench("avx2/cpu"))


@table("cpu-mixture", "cpu.json")
def cpu_mixture(results: Results) -> str:
    """How many times faster fastvae is than the best peer and three others, how near the limit, how exact."""
    return _mixture(results.bench("cpu"))


def _mixture(record: Record) -> str:
    rows = []
    for result in record.cases.values():
        if result["suite"] != "mixture" or "series" in result or "shared" in result["inputs"]:
            continue
        peer = best_peer(result)
        rows.append(
            [
                f"{result['work']}, {result['inputs']}",
                f"({result['M']}, {result['K']}, {result['D']})",
                peer or formatting.NOTHING,
                formatting.ratio(times_faster(result, peer)),
                *(formatting.ratio(times_faster(result, than)) for than in ("keops", "mixture-same-family", "eager")),
                formatting.percent(rate_fraction(result)),
                _error(result, OURS),
                _error(result, peer),
            ]
        )
    headings = ["", "(M, K, D)", "best peer", "faster than it", "than KeOps", "than MixtureSameFamily", "than eager"]
    return formatting.markdown([*headings, "of the FMA rate", "error, nats", "best peer's"], rows, left=3)


def _error(result: Result, name: str | None) -> str:
    entry = result["contenders"].get(name) if name else None
    return formatting.error(entry["errors"]["log_prob"] if entry and entry["status"] == "measured" else None)


@table("cpu-isa", "cpu.json")
def cpu_isa(results: Results) -> str:
    """Each instruction set: against the best peer, and against what that instruction set can do."""
    rows = []
    for result in results.bench("cpu").cases.values():
        isas = [name for name in result["contenders"] if name in _ISAS]
        for name in isas:
            meter = f"multiply_add_{name.removeprefix(f'{OURS}-')}"
            rows.append(
                [
                    f"{result['work']}, {result['inputs']}, ({result['M']}, {result['K']}, {result['D']})",
                    name.removeprefix(f"{OURS}-"),
                    formatting.ratio(times_faster(result, best_peer(result), ours=name)),
                    formatting.percent(rate_fraction(result, name, meter)),
                    _error(result, name),
                ]
            )
    return formatting.markdown(
        ["", "instruction set", "faster than the best peer", "of its own FMA rate", "error, nats"], rows, left=2
    )


_ISAS = tuple(f"{OURS}-{isa}" for isa in ("avx512", "avx2", "baseline"))


@table("cpu-gaussian", "gaussian/cpu.json")
def cpu_gaussian(results: Results) -> str:
    """Sampling and KL."""
    rows = []
    for result in results.bench("gaussian/cpu").cases.values():
        if result["suite"] == "gaussian":
            rows.append(
                [
                    result["work"],
                    f"{result['M']} x {result['D']}",
                    formatting.ratio(times_faster(result, "eager")),
                    formatting.ratio(times_faster(result, "torch-distributions")),
                    formatting.percent(copy_fraction(result)),
                ]
            )
    headings = ["", "M x D", "faster than eager", "than torch.distributions", "of the copy bandwidth"]
    return formatting.markdown(headings, rows, left=2)


@table("cpu-train-step", "train-step/cpu.json")
def cpu_train_step(results: Results) -> str:
    """A training step, and what part of it each piece takes."""
    rows = []
    for result in results.bench("train-step/cpu").cases.values():
        for name in (OURS, "eager"):
            whole = seconds(result, name)
            parts = [seconds(result, f"{name}: {part}") for part in _PARTS]
            shares = [part / whole if part and whole else None for part in parts]
            known = [share for share in shares if share is not None]
            rows.append(
                [
                    f"K = {result['K']}, {name}",
                    formatting.ratio(times_faster(result, "eager") if name == OURS else None),
                    *map(formatting.percent, shares),
                    formatting.percent(sum(known) if len(known) == len(shares) else None),
                ]
            )
    return formatting.markdown(["", "faster than eager", *_PARTS, "sum of the parts"], rows)


_PARTS = (
    "encoder of pseudo-inputs",
    "encoder of images",
    "sampling and density",
    "decoder and likelihood",
    "optimiser",
)
