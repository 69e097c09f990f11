"""fastvae.audit on many right priors, and on two mistakes at once; single ones are in test_audit.py."""

from __future__ import annotations

import pytest

import fastvae
from core.test_audit import PAIRS, PICKS, SPREADS, check_pair, check_sampler, right_priors


def test_many_right_priors_have_no_finding() -> None:
    for seed in range(100, 120):
        for prior in right_priors(seed):
            report = fastvae.audit(prior, seed=seed)
            assert report, f"{seed}: {report}"


@pytest.mark.parametrize("part", range(8))
def test_pairs_of_mistakes_are_found(part: int) -> None:
    for pair in PAIRS[2 * part :: 16]:
        check_pair(pair)


@pytest.mark.parametrize("pick", [name for name in PICKS if name != "right"])
@pytest.mark.parametrize("spread", [name for name in SPREADS if name not in ("right", "samples-unexplained")])
def test_two_mistakes_of_a_sampler_are_found(pick: str, spread: str) -> None:
    check_sampler(pick, spread)
