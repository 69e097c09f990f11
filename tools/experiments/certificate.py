"""How many pairs of a row and a component a bound lets the CUDA kernels compute by products in fp16, or leave out.

    FASTVAE_DATA=FOLDER python -m tools.experiments.certificate [--out FILE.json]

It makes the features of csrc/cuda/product.h and the bounds of csrc/cuda/certificate.cuh and screen.h in float64.  Of
the pairs that count in logsumexp it counts those that are certified; of all pairs, those that forward and backward
compute in the difference form.  Of the sums that the gradients are made of, it says how much of what the tests allow
their bounds take.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae import reference
from fastvae.benchmarks import formatting
from fastvae.benchmarks.inputs import MixtureInputs, concentrated, diffuse, find_latents, from_file

from . import command

ERROR, ROUNDOFF, MAX_ERROR = 24.0, 2.0**-24, 1.5e-4 * math.log(2)  # as in certificate.cuh, nats
SCREEN = 2.0**-10 * 1.02  # of |x| |y|, as in screen.h
ROWS = 512
SUMS, TOTAL, SPREAD = 28.0, 12.0, 2.0**-10 * 1.02  # as in certificate.cuh
TILE, ROW_TILE = 64, 128  # the components, and rows, that the difference form computes together
WIDTH, PANELS = 32, 12  # of forward: the components of a panel that a warp has, and the panels of a split


class Norms(NamedTuple):
    """Of the features of z' or mu' v, and of those of the squares."""

    linear: Tensor
    square: Tensor


class Centred(NamedTuple):
    """z' [M, D], mu' [K, D], v = 1 / sigma^2 [K, D], and the powers of two that scale features [D]."""

    z: Tensor
    mu: Tensor
    v: Tensor
    unit: Tensor
    square_unit: Tensor

    def features(self) -> tuple[Tensor, Tensor]:
        """|x| [M, 2 D] and |y| [K, 2 D]: those of z' and mu' v, then those of the squares."""
        scaled = self.z * self.unit
        x = torch.cat([scaled, scaled.square() * self.square_unit], -1)
        excess = 0.5 * (self.v - self.v.amin(0))
        y = torch.cat([self.mu * self.v / self.unit, excess / (self.unit.square() * self.square_unit)], -1)
        return x.abs(), y.abs()


def centred(z: Tensor, mu: Tensor, logvar: Tensor) -> Centred:
    """Of z [M, D], mu [K, D], and logvar [K, D] or what broadcasts to it, float64."""
    logvar = logvar.expand_as(mu)
    s = torch.exp(-0.5 * logvar)
    origin = (s * mu).sum(0) / s.sum(0)
    z, mu = z - origin, mu - origin
    unit = 2 ** torch.round(-0.5 * logvar.mean(0) / math.log(2))
    spread = (s * mu**2).sum(0) / s.sum(0) * unit**2
    return Centred(z, mu, torch.exp(-logvar), unit, 2 ** torch.round(-0.5 * torch.log2(3.5 * (spread + 1))))


def centred_inputs(inputs: MixtureInputs) -> Centred:
    return centred(inputs.z.double(), inputs.mu.double(), inputs.logvar.double())


def norms(inputs: MixtureInputs) -> tuple[Norms, Norms]:
    """Of the rows and of the components."""
    x, y = (Norms(*features.unflatten(1, (2, -1)).norm(dim=2).T) for features in centred_inputs(inputs).features())
    return x, y


def responsibilities(about: Centred, log_weights: Tensor) -> Tensor:
    """[M, K]."""
    z, mu, v, *_ = about
    c = log_weights + 0.5 * torch.log(v).sum(1) - 0.5 * (mu**2 * v).sum(1)
    return torch.softmax(c + z @ (mu * v).T - 0.5 * z**2 @ v.T, 1)


def count(inputs: MixtureInputs) -> dict[str, float]:
    """Shares of the pairs, or of what is named."""
    D, K = inputs.z.shape[1], len(inputs.mu)
    mu, logvar, log_weights = (t.double() for t in (inputs.mu, inputs.logvar, inputs.log_weights))
    rows_of_z = inputs.z.double().split(64)
    a = torch.cat([reference.component_log_prob(z, mu, logvar, log_weights) for z in rows_of_z])  # [M, K]
    c = log_weights - 0.5 * (logvar.sum(1) + D * math.log(2 * math.pi))
    size = log_weights.abs() + 0.5 * (logvar.abs().sum(1) + D * math.log(2 * math.pi))
    rows, components = norms(inputs)
    products = rows.linear[:, None] * components.linear + rows.square[:, None] * components.square
    allowed = ROUNDOFF * ((1 + math.sqrt(D)) * size + (5 + math.sqrt(D)) * (c - a))
    negligible = torch.logsumexp(a, 1, keepdim=True) - math.log(K) - 26 * math.log(2)
    bound = ERROR * ROUNDOFF * products
    counts, certified = a >= negligible, (bound <= allowed) & (bound <= MAX_ERROR)
    limit = torch.logsumexp(a, 1, keepdim=True) - math.log(K) - 24 * math.log(2)
    ratio = float(0.5 * (logvar.amax(0) - logvar).max())  # the largest log sigma ratio
    log_t = 0.5 * torch.log(3 * (c.max() - limit + ratio) + 1)
    at_most = a + SCREEN * products
    return {
        "counts": share(counts),
        "certified": float((counts & certified).sum() / counts.sum()),
        "forward": forward_share(a, bound, certified),
        "parameters": share(at_most >= limit),
        "z": share(at_most >= limit - log_t - ratio),
    }


def share(pairs: Tensor) -> float:
    return float(pairs.double().mean())


def repeated_share(certified: Tensor, size: int) -> float:
    """Of the whole tiles of so many items, those that hold one that is not certified."""
    return share(~certified[: len(certified) // size * size].view(-1, size).all(1))


def forward_share(a: Tensor, bound: Tensor, certified: Tensor) -> float:
    """Of all pairs, those that are not certified and not below the largest exponent that a warp knows of the row."""
    (M, K), computed = a.shape, 0
    known = a.new_full((M, 1), -math.inf)
    for begin in range(0, K, WIDTH):
        if begin % (WIDTH * PANELS) == 0:  # the next split, or the other half of this one
            known.fill_(-math.inf)
        here = slice(begin, min(K, begin + WIDTH))
        known = torch.maximum(known, (a - bound)[:, here].amax(1, keepdim=True))
        left = ((a + bound)[:, here] >= known - math.log(K) - 26 * math.log(2)) & ~certified[:, here]
        known = torch.maximum(known, a[:, here].where(left, -math.inf).amax(1, keepdim=True))
        computed += int(left.sum())
    return computed / (M * K)


def splits_of(own: int, others: int) -> int:
    """plan_splits of csrc/cuda/plan.h, for tiles of 64 others."""
    tiles, blocks = -(-others // 64), -(-own // 128)
    return min(
        range(1, min(tiles, max(1, 4 * 132 // blocks)) + 1),
        key=lambda splits: (-(-blocks * splits // 132) * -(-tiles // splits), splits),
    )


def each_loses(own: int, others: int) -> float:
    """(kSumsError + sqrt n + sqrt s) u."""
    splits = splits_of(own, others)
    return ROUNDOFF * (SUMS + math.sqrt(others / 32 / splits + 1) + math.sqrt(splits))


def floor_of(r: Tensor, features: Tensor) -> tuple[float, Tensor]:
    """What small features lose of a sum's weights r [own, others]; and what all sums of an item lose, over its weights.

    The weights are divided by the features' scales, and reach 2^14.
    """
    scale = 2 ** (torch.floor(torch.log2(features.amax(1))) - 13)
    largest = (r * scale).amax(1)  # becomes 2^14
    return float(scale.max()) * 2.0**-25, (2.0**-11 * len(features) + 4) * largest / 2.0**14 / r.sum(1)


def count_sums(inputs: MixtureInputs) -> dict[str, float]:
    """The largest share of what is allowed, for dmu and dlogvar; and how many tiles the difference form computes."""
    z, mu, v, unit, square_unit = about = centred_inputs(inputs)
    (M, D), K = z.shape, len(mu)
    log_weights = inputs.log_weights.double()
    w = responsibilities(about, log_weights).T
    s0, s1, s2 = w.sum(1), w @ z, w @ z**2
    small, lost = floor_of(w, about.features()[0])
    s0, each = s0[:, None], each_loses(K, M)
    floor = (small + lost[:, None]) * s0
    e0, e2 = TOTAL * ROUNDOFF * s0, each * s2 + floor / (unit**2 * square_unit)
    e1 = each * (s0 * (s2 + e2)).sqrt() + floor / unit
    wu = s1 - mu * s0
    wuu = s2 - mu * s1 - mu * wu
    error, square_error = e1 + mu.abs() * e0, e2 + mu.abs() * (2 * e1 + mu.abs() * e0)
    least = torch.maximum((wuu - square_error) / (z.abs().amax(0) + mu.abs()), wu.abs() - error)
    weights = 0.5 * ROUNDOFF * (1 + math.sqrt(D)) * (log_weights.abs() + D * math.log(2 * math.pi))[:, None]
    of_mean = error / ((weights + ROUNDOFF * (6 + math.sqrt(M))) * least)
    variance_error = v * square_error + e0
    far = ((v * wuu - s0).abs() - variance_error).clamp(min=0)
    rounded = ROUNDOFF * ((10 + math.sqrt(M)) * v * (wuu - square_error) + (4 + math.sqrt(M)) * s0)
    of_variance = variance_error / (weights * far + rounded)
    certified = (of_mean <= 1).all(1) & (of_variance <= 1).all(1)
    repeated = repeated_share(certified, TILE)
    return {"dmu": float(of_mean.max()), "dlogvar": float(of_variance.max()), "component_tiles": repeated}


def count_scores(inputs: MixtureInputs) -> dict[str, float]:
    """The largest share of what is allowed for the gradient in z; and how many tiles the difference form computes."""
    z, mu, v, unit, square_unit = about = centred_inputs(inputs)
    (M, D), K = z.shape, len(mu)
    r = responsibilities(about, inputs.log_weights.double())
    s0, s1, s2 = r @ v, r @ (mu * v), r @ (mu**2 * v)
    score, max_mean = s1 - z * s0, mu.abs().amax(0)
    small, lost = floor_of(r, about.features()[1])
    floor = small + lost[:, None]
    spread_unit = 2 ** (torch.floor(torch.log2(max_mean * unit)) + 1)
    each, total = each_loses(M, K), TOTAL * ROUNDOFF
    e2, e0 = SPREAD * s2 + floor * spread_unit, (each + total) * s0 + 2 * floor * unit**2 * square_unit
    e1 = each * ((s0 + e0) * (s2 + e2)).sqrt() + floor * unit + total * s1.abs()
    error = e1 + z.abs() * e0
    least_square = s2 - z * (s1 + score) - (e2 + z.abs() * (e1 + error))
    least = torch.maximum(least_square / (max_mean + z.abs()), score.abs() - error)
    weights = 0.5 * ROUNDOFF * (1 + math.sqrt(D)) * D * math.log(2 * math.pi)
    of_score = error / ((weights + ROUNDOFF * (8 + math.sqrt(K))) * least)
    certified = ((of_score <= 1) & (least > 0)).all(1)
    largest = of_score.where(least > 0, torch.inf).max()
    return {"dz": float(largest), "row_tiles": repeated_share(certified, ROW_TILE)}


def measure() -> dict[str, Any]:
    cases = {f"diffuse {(M, K, D)}": diffuse(M, K, D) for M, K, D in ((ROWS, 5000, d) for d in (16, 40, 64, 128))}
    cases[f"trained, made up {(ROWS, 12_500, 40)}"] = concentrated(ROWS, 12_500, 40)
    if (path := find_latents()) is not None:
        cases[f"mnist_latents {(ROWS, 12_500, 40)}"] = from_file(path, ROWS, 12_500)
    shapes = [(M, K, D) for D in (32, 40, 64) for M, K in ((1024, 4096), (4096, 4096), (4096, 16384))]
    sums = {f"diffuse {shape}": diffuse(*shape) for shape in shapes}
    return {
        "versions": {"torch": torch.__version__},
        "cases": {name: count(inputs) for name, inputs in cases.items()},
        "sums": {name: count_sums(inputs) | count_scores(inputs) for name, inputs in sums.items()},
    }


def markdown(content: dict[str, Any]) -> str:
    """Of pairs: a line for each case, in percent."""
    headings = [
        *("", "pairs that count", "of these, certified"),
        *("pairs that forward computes as differences", "backward, of the parameters", "backward, of z"),
    ]
    rows = [[name, *(f"{100 * share:.3g} %" for share in found.values())] for name, found in content["cases"].items()]
    return formatting.markdown(headings, rows)


def sums_markdown(content: dict[str, Any]) -> str:
    """A line for each case."""
    headings = [
        *(
            "",
            "of what dmu may be off, at most",
            "of what dlogvar may be off",
            "components' tiles computed as differences",
        ),
        *("of what dz may be off", "rows' tiles computed as differences"),
    ]
    rows = [
        [
            *(name, f"{found['dmu']:.2f}", f"{found['dlogvar']:.2f}", f"{100 * found['component_tiles']:.3g} %"),
            *(f"{found['dz']:.2f}", f"{100 * found['row_tiles']:.3g} %"),
        ]
        for name, found in content["sums"].items()
    ]
    return formatting.markdown(headings, rows)


if __name__ == "__main__":
    sys.exit(command.run("certificate", __doc__, measure, markdown))
