"""Tables of what was found on models: runs of the command line, studies of bounds and priors, groups of cells."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any

from fastvae.app.run.protocol import protocol_names, read_protocol
from fastvae.benchmarks import formatting

from ..experiments import anchor, anchor_training, exemplar, labels, smaller_steps
from .registry import Results, table

FREYFACES_PIXELS = 28 * 20


@table("demo", "demo-digits.json")
def demo(results: Results) -> str:
    """What `fastvae compare` found on the digits: means over seeds +- their standard deviation."""
    found = results.read("demo-digits.json")
    rows = [
        [row["prior"], *(_mean(row[name]) for name in ("log_likelihood", "elbo", "kl")), _mean(row["active_units"], 1)]
        for row in found["priors"]
    ]
    written = formatting.markdown(["prior", "test log-likelihood", "ELBO", "KL", "active units"], rows)
    return f"{written}\n\n{found['verdict']['sentence']}"


@table("labels", "labels.json")
def of_labels(results: Results) -> str:
    """What a call with labels costs beside one without, on the CPU."""
    return labels.markdown(results.read("labels.json"))


def _mean(values: list[float], digits: int = 2) -> str:
    spread = f" +- {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


@table("static-mnist", "static-mnist-*.json")
def static_mnist(results: Results) -> str:
    """What `fastvae evaluate` found on static MNIST, one file for each prior."""
    rows = []
    for path in sorted(results.folder.glob("static-mnist-*.json")):
        found = results.read(path.name)
        rows.append(
            [
                path.stem.removeprefix("static-mnist-").replace("-", ", "),
                f"{found['log_likelihood']:.2f} +- {found['standard_error']:.2f}",
                f"{found['elbo']:.2f}",
                f"{found['kl']:.2f}",
                f"{found['active_units']} of {found['latent']}",
            ]
        )
    return formatting.markdown(["", "test log-likelihood +- standard error", "ELBO", "KL", "active units"], rows)


@table("reproductions", "reproductions/*.json")
def reproductions(results: Results) -> str:
    """The runs of `fastvae reproduce` that went to their end, beside the published figures."""
    rows = []
    for found in _reproductions(results, finished=True):
        value, published = found["evaluation"]["log_likelihood"], _first_published(found)
        rows.append(
            [
                f"`{found['protocol']['name']}`",
                str(found["seed"]),
                formatting.NOTHING if published is None else f"{published:.2f}",
                f"{value:.2f} +- {found['evaluation']['standard_error']:.2f}",
                formatting.NOTHING if published is None else f"{value - published:+.2f}",
                str(found["epochs"]),
                _hours(found["seconds"]),
                _place(found["machine"]),
            ]
        )
    if not rows:
        return "*No run has gone to its end yet.*"
    headings = ["", "seed", "published", "found +- standard error", "better by", "epochs", "training", "on"]
    return formatting.markdown(headings, rows)


@table("unfinished-reproductions", "reproductions/*.json")
def unfinished_reproductions(results: Results) -> str:
    """The runs of `fastvae reproduce` that were measured on their way, and the protocols that have no run."""
    run = {found["protocol"]["name"] for found in _reproductions(results)}
    missing = ", ".join(f"`{name}`" for name in protocol_names() if name not in run)
    not_run = f"No run is recorded of {missing}." if missing else "All protocols have a recorded run."
    rows = [
        [
            f"`{found['protocol']['name']}`",
            str(found["seed"]),
            formatting.NOTHING if _first_published(found) is None else f"{_first_published(found):.2f}",
            f"{found['evaluation']['log_likelihood']:.2f} +- {found['evaluation']['standard_error']:.2f}",
            f"{found['evaluation']['images']:,}",
            str(found["epochs"]),
            _hours(found["seconds"]),
            _place(found["machine"]),
        ]
        for found in _reproductions(results, finished=False)
    ]
    if not rows:
        return f"Every recorded run went to its end. {not_run}"
    headings = [
        "",
        "seed",
        "published",
        "so far +- standard error",
        "test images",
        "epochs so far",
        "training so far",
        "on",
    ]
    return f"{formatting.markdown(headings, rows)}\n\n{not_run}"


@table("freyfaces", "reproductions/*-freyfaces*.json")
def freyfaces(results: Results) -> str:
    """The runs on Frey faces in nats per image and in bits per pixel, as papers have either."""
    rows = []
    for found in _reproductions(results, "*-freyfaces*"):
        name, value, published = (
            found["protocol"]["name"],
            found["evaluation"]["log_likelihood"],
            _first_published(found),
        )
        prior, _, truncated = name.partition("-freyfaces")
        rows.append(
            [
                prior,
                "truncated, as in the paper's code" if truncated else "discretised logistic",
                str(found["seed"]),
                formatting.NOTHING if published is None else f"{_bits(published):.2f}",
                f"{_bits(value):.3f}",
                f"{value:.1f} +- {found['evaluation']['standard_error']:.1f}",
                str(found["epochs"]) if found["finished"] else f"{found['epochs']}, not finished",
            ]
        )
    headings = [
        "prior",
        "likelihood",
        "seed",
        "published, bits",
        "found, bits",
        "found +- standard error, nats",
        "epochs",
    ]
    return formatting.markdown(headings, rows, left=2)


def _bits(log_likelihood: float) -> float:
    """Nats per image of Frey faces as bits per pixel."""
    return -log_likelihood / FREYFACES_PIXELS / math.log(2)


def _reproductions(results: Results, names: str = "*", finished: bool | None = None) -> list[dict[str, Any]]:
    """The records of reproductions, in the order of their files' names."""
    paths = sorted(results.folder.glob(f"reproductions/{names}.json"))
    records = [results.read(f"reproductions/{path.name}") for path in paths]
    return [record for record in records if finished in (None, record["finished"])]


def _first_published(found: dict[str, Any]) -> float | None:
    """The figure that a run is to meet, None where there is none."""
    published = found["protocol"]["published"]
    return published[0]["log_likelihood"] if published else None


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _place(machine: dict[str, Any]) -> str:
    threads = machine["threads"]
    return machine.get("gpu") or f"{threads} CPU thread{'' if threads == 1 else 's'}"


@table("published", "*")
def published(_: Results) -> str:
    """Where the published figures of the reproductions are from."""
    rows = []
    for name in protocol_names():
        protocol = read_protocol(name)
        for figure in protocol.published:
            seen = figure.looked_up or "from memory"
            rows.append([f"`{name}`", figure.source, seen, f"{figure.log_likelihood:.2f}"])
    return formatting.markdown(["", "source", "looked up in", "log-likelihood"], rows, left=3)


@table("differences", "*")
def differences(_: Results) -> str:
    """In what the protocols differ from what was published, each difference with its protocols, the widest first."""
    every = protocol_names()
    of: dict[str, list[str]] = {}
    for name in every:
        for difference in read_protocol(name).differences:
            of.setdefault(difference, []).append(name)
    lines = []
    for difference, names in sorted(of.items(), key=lambda item: -len(item[1])):
        others = [name for name in every if name not in names]
        few, start = (others, "all but ") if len(others) < len(names) else (names, "")
        where = f"{start}{', '.join(f'`{name}`' for name in few)}" if others else "all"
        lines.append(f"- {difference} ({where})")
    return "\n".join(lines)


@table("anchor", "anchor.json")
def beside_the_published_code(results: Results) -> str:
    """Loss, gradients and steps of training beside the published code."""
    return anchor.markdown(results.read("anchor.json"))


@table("anchor-training", "anchor-training.json")
def training_beside_the_published_code(results: Results) -> str:
    """Validation bounds of the published code's training beside ours."""
    return anchor_training.markdown(results.read("anchor-training.json"))


@table("smaller-steps", "smaller-steps.json")
def at_a_smaller_learning_rate(results: Results) -> str:
    """What runs gained when they went on at a smaller learning rate."""
    return smaller_steps.markdown(results.read("smaller-steps.json"))


@table("groups", "groups.json")
def groups(results: Results) -> str:
    """One call for all groups against the loop over them."""
    found = results.read("groups.json")
    rows = [
        [
            f"{found['cells']:,} cells x {found['groups']} groups, D = {found['latent']}",
            str(found["threads"]),
            f"{found['loop_seconds']:.0f} s",
            f"{found['call_seconds']:.2f} s",
            formatting.ratio(found["loop_seconds"] / found["call_seconds"]),
            formatting.ratio(found["loop_cpu_seconds"] / found["call_cpu_seconds"]),
            f"{found['largest_difference']:.0e}",
        ]
    ]
    headings = ["", "threads", "loop", "one call", "faster", "by CPU time", "largest difference, nats"]
    return formatting.markdown(headings, rows)


@table("mixture-samples", "mixture-samples.json")
def mixture_samples(results: Results) -> str:
    """Samples of a mixture with their gradients, beside Pyro's."""
    found = results.read("mixture-samples.json")
    rows = [
        [
            f"K = {row['K']:,}, D = {found['latent']}",
            str(row["samples"]),
            formatting.ratio(row["pyro_seconds"] / row["seconds"]),
        ]
        for row in found["rows"]
    ]
    return formatting.markdown(["", "samples", "faster than Pyro's"], rows)


@table("bounds-estimators", "bounds-estimators.json")
def bounds_estimators(results: Results) -> str:
    """The variance and the bias of the encoder's gradient."""
    rows = [
        [
            row["gradient"],
            str(row["samples"]),
            f"{row['variance']:.3f}",
            "" if row["gradient"] == "plain" else f"{row['bias']:.2f} ({row['bias_error']:.2f})",
        ]
        for row in results.read("bounds-estimators.json")["rows"]
    ]
    headings = ["gradient", "S", "variance / plain's", "distance from plain's mean / its norm (by chance alone)"]
    return formatting.markdown(headings, rows)


@table("bounds-backward-samples", "bounds-backward-samples.json")
def bounds_backward_samples(results: Results) -> str:
    """What a backward pass of few samples saves, and the noise that it adds."""
    rows = results.read("bounds-backward-samples.json")["rows"]
    return formatting.markdown(
        ["samples in backward", "time of a step / all samples'", "variance of a batch's gradient", "over batches"],
        [
            [
                str(row["backward_samples"]),
                f"{row['seconds'] / rows[0]['seconds']:.2f}",
                f"{row['variance_of_a_batch']:.2f}",
                f"{row['variance_over_batches']:.2f}",
            ]
            for row in rows
        ],
    )


def _percent(share: float) -> str:
    return "< 0.01 %" if share < 1e-4 else f"{100 * share:.2g} %"


@table("bounds-backward-components", "bounds-backward-components.json")
def bounds_backward_components(results: Results) -> str:
    """What a backward pass of few components saves, and the noise that it adds."""
    rows = results.read("bounds-backward-components.json")["rows"]
    return formatting.markdown(
        ["components", "in backward", "time of forward and backward / all components'", "added variance"],
        [
            [
                f"{row['components']:,} {row['case']}",
                str(row["backward_components"]),
                f"{row['seconds'] / row['seconds_of_all']:.2f}",
                _percent(row["added_variance"]),
            ]
            for row in rows
        ],
    )


@table("bounds-refresh", "bounds-refresh.json")
def bounds_refresh(results: Results) -> str:
    """What training with fewer exemplars encoded in a step costs."""
    rows = [
        [row["way"], f"{row['encoded_in_a_step']:.0f}", f"{row['log_likelihood']:.2f}"]
        for row in results.read("bounds-refresh.json")["rows"]
    ]
    return formatting.markdown(["in a step of training", "exemplars encoded", "log-likelihood, nats"], rows)


@table("exemplar-ways", "exemplar.json")
def exemplar_ways(results: Results) -> str:
    """An exemplar prior by the way in which it is trained."""
    return exemplar.markdown(results.read("exemplar.json"))


@table("exemplar-terms", "exemplar.json")
def exemplar_terms(results: Results) -> str:
    """What the ELBO is made of, by the way in which an exemplar prior is trained."""
    return exemplar.term_table(results.read("exemplar.json"))


@table("exemplar-gradients", "exemplar.json")
def exemplar_gradients(results: Results) -> str:
    """What a step that encodes a part of the exemplars leaves of the gradient."""
    return exemplar.gradient_table(results.read("exemplar.json"))


@table("bounds-memory", "bounds-memory.json")
def bounds_memory(results: Results) -> str:
    """The peak of a process that trains with K pseudo-inputs."""
    rows = [
        [
            f"{row['K']:,}",
            f"in chunks of {row['chunk_size']:,}" if row["chunk_size"] else "at once",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
        ]
        for row in results.read("bounds-memory.json")["rows"]
    ]
    return formatting.markdown(["K", "encoded", "peak of the process"], rows, left=2)


@table("bounds-total-correlation", "bounds-total-correlation.json")
def bounds_total_correlation(results: Results) -> str:
    """Total correlation where it is known, over the whole data set and by minibatches."""
    rows = [
        [
            str(row["D"]),
            f"{row['known']:.2f}",
            f"{row['whole']:.2f} +- {row['standard_error']:.2f}",
            *(f"{row[name]:.2f}" for name in ("batch", "weighted", "stratified")),
            f"{row['cost']:.1f} x",
        ]
        for row in results.read("bounds-total-correlation.json")["rows"]
    ]
    headings = ["D", "known", "over all N", "the batch alone", "weighted", "stratified", "marginals / joint, time"]
    return formatting.markdown(headings, rows)


@table("bounds-annealing", "bounds-annealing.json")
def bounds_annealing(results: Results) -> str:
    """Log-likelihood by importance sampling and by annealing, with encoders of three kinds."""
    rows = [
        [
            row["encoder"],
            f"{row['importance']:.2f}",
            *(f"{row[start]:.2f} +- {row[start + '_error']:.2f}" for start in ("posterior", "prior")),
            f"{row['gap']:.2f}",
        ]
        for row in results.read("bounds-annealing.json")["rows"]
    ]
    starts = ["annealing from q", "annealing from p(z)"]
    headings = ["encoder", "importance sampling", *starts, "upper - lower bound"]
    return formatting.markdown(headings, rows)
