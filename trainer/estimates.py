"""What an evaluation states: values with 95 % intervals, and differences of two models.

Samples of one problem are alike, so every interval takes the problem as the unit that was drawn at
random (a cluster), never the sample. Pure functions of numbers.

Shapes: P problems, K samples of a problem, which may be of another number for each problem.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_Z = NormalDist().inv_cdf(0.975)
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float | None
    """None, as `high`, where a single problem says nothing about others."""
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """How much better the first of two models is, on the same problems."""

    difference: Estimate
    """Mean over problems of the first's value less the second's."""
    better: int
    """Problems on which the first is better; `worse` likewise, all others are ties."""
    worse: int
    p_value: float
    """Of the exact two-sided sign test."""


def share(values_PK: Sequence[Sequence[float]]) -> Estimate | None:
    """Mean of values from 0 to 1 over all samples; None when there is no sample.

    Interval: Wilson's score interval with the effective sample size n p (1 - p) / (n v), v the
    variance of the mean with problems as clusters (linearised, as for a ratio). One sample a
    problem gives Wilson's interval of P trials; it has a width at 0 % and 100 % too, where P
    trials are counted. Sources: Wilson 1927; Korn and Graubard 1998, Survey Methodology 24(2), for
    the effective sample size.
    """
    sums_P, counts_P = _sums_and_counts(values_PK)
    return _score_interval(sums_P, counts_P, float(counts_P.sum()))


def mean(values_PK: Sequence[Sequence[float]]) -> Estimate | None:
    """Mean of any numbers over all samples; None when there is no sample.

    Interval: the value plus and minus 1.96 standard errors, problems as clusters (linearised, with
    P / (P - 1)).
    """
    sums_P, counts_P = _sums_and_counts(values_PK)
    total, clusters = counts_P.sum(), int((counts_P > 0).sum())
    if not total:
        return None
    value = float(sums_P.sum() / total)
    if clusters == 1:
        return Estimate(value=value, low=None, high=None)
    squares = float(((sums_P - value * counts_P) ** 2).sum())
    half = _Z * math.sqrt(clusters / (clusters - 1) * squares) / float(total)
    return Estimate(value=value, low=value - half, high=value + half)


def pass_at_k(correct_PK: Sequence[Sequence[bool]], k: int) -> Estimate | None:
    """Probability that of k samples of a problem at least one is right, averaged over problems.

    Unbiased: 1 - C(n - c, k) / C(n, k) of n samples with c right. Interval: as of `share`, with
    that one value a problem; n samples count as at most n / k trials. Source: Chen et al. 2021,
    arXiv 2107.03374, equation 1.

    Raises:
        ValueError: k is not from 1 to the number of samples of every problem.
    """
    fewest = min(map(len, correct_PK), default=k)
    if not 1 <= k <= fewest:
        raise ValueError(f"k: expected 1 to {fewest}, the samples of a problem, got {k}")
    values_P = np.array(
        [1 - math.comb(len(row) - sum(row), k) / math.comb(len(row), k) for row in correct_PK]
    )
    most = sum(len(row) // k for row in correct_PK)
    return _score_interval(values_P, np.ones(len(values_P)), float(most))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The unweighted mean of independent estimates, as over the suites of a protocol.

    Interval: recovered from those of the parts, asymmetric where they are. Source: Zou and Donner
    2008, Statistics in Medicine 27(10), equation 3.

    Raises:
        ValueError: there is none.
    """
    if not estimates:
        raise ValueError("estimates: expected at least one, got none")
    value = sum(each.value for each in estimates) / len(estimates)
    below, above = 0.0, 0.0
    for each in estimates:
        if each.low is None or each.high is None:
            return Estimate(value=value, low=None, high=None)
        below += (each.value - each.low) ** 2
        above += (each.high - each.value) ** 2
    low, high = (math.sqrt(squares) / len(estimates) for squares in (below, above))
    return Estimate(value=value, low=value - low, high=value + high)


def paired_difference(first_P: Sequence[float], second_P: Sequence[float]) -> PairedDifference:
    """Compares two models by their values (such as the share of right samples) on each problem.

    Interval: percentiles of 10,000 bootstrap samples of the problems, drawn with a fixed seed. The
    sign test counts on how many problems either is better; ties are left out.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if not first_P or len(first_P) != len(second_P):
        raise ValueError(
            f"second_P: expected one value for each of the {len(first_P)} problems (at least 1) of "
            f"first_P, got {len(second_P)}"
        )
    differences_P = np.asarray(first_P, dtype=np.float64) - np.asarray(second_P, dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(0))
    means = [
        differences_P[generator.integers(len(differences_P), size=len(differences_P))].mean()
        for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    better, worse = int((differences_P > 0).sum()), int((differences_P < 0).sum())
    return PairedDifference(
        difference=Estimate(value=float(differences_P.mean()), low=float(low), high=float(high)),
        better=better,
        worse=worse,
        p_value=_sign_test(better, worse),
    )


def _score_interval(sums_P: np.ndarray, counts_P: np.ndarray, most: float) -> Estimate | None:
    """See `share`; the effective sample size is at most `most`."""
    total = counts_P.sum()
    if not total:
        return None
    value = float(sums_P.sum() / total)
    spread = value * (1 - value)
    variance = float(((sums_P - value * counts_P) ** 2).sum() / total**2)
    if spread <= 0:
        effective = float((counts_P > 0).sum())
    else:
        effective = most if variance == 0 else min(most, spread / variance)
    scale = 1 + _Z**2 / effective
    centre = (value + _Z**2 / (2 * effective)) / scale
    half = _Z / scale * math.sqrt(spread / effective + _Z**2 / (4 * effective**2))
    # At 0 and 1 the bound is the value itself, which rounding would miss.
    low = 0.0 if value == 0 else centre - half
    high = 1.0 if value == 1 else centre + half
    return Estimate(value=value, low=low, high=high)


def _sign_test(better: int, worse: int) -> float:
    trials, fewer = better + worse, min(better, worse)
    tail = sum(math.comb(trials, successes) for successes in range(fewer + 1))
    return min(1.0, 2 * tail / 2**trials)


def _sums_and_counts(values_PK: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Of each problem, in float64."""
    sums_P = np.array([math.fsum(values_K) for values_K in values_PK], dtype=np.float64)
    return sums_P, np.array([len(values_K) for values_K in values_PK], dtype=np.float64)
