"""What a trained model is worth: its log-likelihood by importance sampling, its bound, its prior, its active units."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastvae import VAE, use_backend
from fastvae._files import write_json
from fastvae.app.run.evaluation_plan import EvaluationPlan
from fastvae.app.run.gap import Gap, measure_gap
from fastvae.app.run.measuring import VALIDATION_BATCH, batches, measure, with_fixed_prior
from fastvae.app.run.randomness import Stream, reseed
from fastvae.app.run.ranks import ALONE, Ranks
from fastvae.app.run.trained import TrainedRun
from fastvae.app.user_errors import RunError
from fastvae.contracts import encode

ACTIVE = 0.01  # Burda, Grosse and Salakhutdinov (2016): a unit is active if Var_x(E[z|x]) is above this
BATCH = 50  # images whose log-likelihood is measured at once
KEEP_EVERY = 60  # seconds between two writes of what an evaluation has done, for a process that is killed
BOUND_SAMPLES = 10  # of z for each image: the sampling noise of the bound is then small beside its spread over images

OnImages = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """Means over the images of a set, in nats. `standard_error` is that of the mean log-likelihood.

    One image tells neither a standard error nor which units are active: both are None then. `gap` is about the
    training images: how far the prior is from what the encoder makes of them all. `precision` is the plan's; None in
    files of versions that did not keep it.
    """

    split: str
    images: int
    importance_samples: int
    log_likelihood: float
    standard_error: float | None
    elbo: float
    reconstruction: float
    kl: float
    active_units: int | None
    latent: int
    gap: Gap
    seconds: float
    precision: str | None = None


def evaluate(
    run: TrainedRun, plan: EvaluationPlan, on_images: OnImages = lambda count: None, ranks: Ranks = ALONE
) -> Evaluation:
    """Measure a run's best model.

    Args:
        run: the run.
        plan: what to measure on, and how closely.
        on_images: told how many images have been done, after each batch of them.
        ranks: those that measure together; the first one calls this function, and the others `log_likelihoods`.

    An evaluation that was stopped goes on where it was: the run's folder keeps what was done, until the caller has
    written the result and deletes it.

    Raises:
        RunError: an image's log-likelihood is no finite number.
    """
    started = time.perf_counter()
    x, y = _images(run, plan)
    log_likelihood = log_likelihoods(run, plan, on_images, ranks)
    reseed(run.config.seed, Stream.EVALUATE)
    several = len(x) > 1
    with use_backend(precision=plan.precision):
        measures = measure(run.vae, x, num_samples=BOUND_SAMPLES, y=y)
        means = posterior_means(run.vae, x, y)
        gap = measure_gap(run)
    return Evaluation(
        split=plan.split,
        images=len(x),
        importance_samples=plan.samples,
        log_likelihood=float(log_likelihood.mean()),
        standard_error=float(log_likelihood.std()) / len(x) ** 0.5 if several else None,
        elbo=measures["elbo"],
        reconstruction=measures["reconstruction"],
        kl=measures["kl"],
        active_units=int((means.var(0, correction=0) > ACTIVE).sum()) if several else None,
        latent=means.shape[1],
        gap=gap,
        seconds=time.perf_counter() - started,
        precision=plan.precision,
    )


def _images(run: TrainedRun, plan: EvaluationPlan) -> tuple[Tensor, Tensor | None]:
    """(x [N, pixels], y [N] or None) to measure on."""
    x, y = plan.images(run.dataset).to(run.device), run.y(plan.whole_set(run.dataset))
    return x, None if y is None else y[plan.rows(run.dataset)]


def log_likelihoods(
    run: TrainedRun, plan: EvaluationPlan, on_images: OnImages = lambda count: None, ranks: Ranks = ALONE
) -> Tensor:
    """log p(x), or log p(x|y), of each image, float64 [N]; arguments as of `evaluate`.

    It takes minutes or hours, so what is done is kept for a later call.  Each rank measures a batch at a time.
    """
    (x, y), vae, unfinished = _images(run, plan), with_fixed_prior(run.vae), unfinished_evaluation(run, plan)
    identity = {
        "best_epoch": run.checkpoint["best_epoch"],
        "best_bound": run.checkpoint["best_bound"],
        "samples": plan.samples,
        "images": len(x),
        "precision": plan.precision,
    }
    ranks.check_same(identity)
    done = ranks.gather(_read_unfinished(unfinished, identity))[0]
    on_images(len(done))
    kept = time.monotonic()
    try:
        while len(done) < len(x):
            start = len(done) + BATCH * ranks.rank  # of the rank's batch, which may lie behind the last image
            reseed(run.config.seed, Stream.EVALUATE, 1 + start)  # an image's noise is the same whenever it is measured
            some = slice(start, start + BATCH)
            with use_backend(precision=plan.precision):
                values = vae.log_likelihood(x[some], plan.samples, y=None if y is None else y[some])
            together = torch.cat(ranks.gather(values.cpu()))
            if not bool(together.isfinite().all()):
                number = int(together.isfinite().logical_not().nonzero()[0])
                raise RunError(
                    f"{run.folder.path}: the log-likelihood of {plan.split} image "
                    f"{plan.rows(run.dataset)[len(done) + number]} is "
                    f"{float(together[number])}, no finite number; the model has diverged or is damaged."
                )
            done += together.tolist()
            on_images(len(done))
            if time.monotonic() - kept > KEEP_EVERY:
                ranks.on_first(write_json, unfinished, {**identity, "log_likelihood": done})
                kept = time.monotonic()
    finally:  # at the end too: what follows may be stopped as well
        ranks.on_first(write_json, unfinished, {**identity, "log_likelihood": done})
    return torch.tensor(done, dtype=torch.float64)


def unfinished_evaluation(run: TrainedRun, plan: EvaluationPlan) -> Path:
    """The file that keeps what an evaluation by this plan has done."""
    return run.folder.unfinished_evaluation(plan.part(run.dataset), plan.samples, plan.precision)


def _read_unfinished(path: Path, identity: dict[str, object]) -> list[float]:
    """The log-likelihoods of the first images that an earlier evaluation of this identity kept."""
    try:
        content = json.loads(path.read_bytes())
        done = content.pop("log_likelihood")
        return [float(value) for value in done] if content == identity else []
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []  # there is none, or it is damaged


@torch.no_grad()
def posterior_means(vae: VAE, x: Tensor, y: Tensor | None = None) -> Tensor:
    """E[z|x] of images x [N, pixels], or E[z|x,y]: [N, latent]."""
    return torch.cat([encode(vae.encoder, *batch)[0] for batch in batches(x, y, VALIDATION_BATCH)])
