"""Estimates and their intervals, against closed forms, enumeration and simulation."""

import itertools
import math

import numpy as np
import pytest

from trainer.estimates import Estimate, average, mean, paired_difference, pass_at_k, share

Z = 1.959963984540054


def bounds(estimate: Estimate | None) -> tuple[float, float]:
    assert estimate is not None and estimate.low is not None and estimate.high is not None
    return estimate.low, estimate.high


@pytest.mark.parametrize(("right", "trials"), [(0, 10), (1, 10), (7, 30), (30, 30)])
def test_share_of_one_sample_a_problem_solves_wilsons_equation(right: int, trials: int) -> None:
    estimate = share([[1.0]] * right + [[0.0]] * (trials - right))
    assert estimate is not None and estimate.value == pytest.approx(right / trials)
    for bound in bounds(estimate):
        if bound in (0.0, 1.0):
            assert estimate.value == bound
        # The bounds are where the distance from the value is z standard errors of the bound.
        distance = (estimate.value - bound) ** 2
        assert distance == pytest.approx(Z**2 * bound * (1 - bound) / trials, abs=1e-12)


def test_share_counts_identical_samples_once() -> None:
    problems = [[1.0] * 8] * 6 + [[0.0] * 8] * 14
    assert bounds(share(problems)) == pytest.approx(
        bounds(share([row[:1] for row in problems])), rel=1e-12
    )


def test_share_gains_from_samples_that_differ_within_problems() -> None:
    alike = share([[1.0, 1.0], [0.0, 0.0]] * 20)
    mixed = share([[1.0, 0.0], [0.0, 1.0]] * 20)
    (low, high), (mixed_low, mixed_high) = bounds(alike), bounds(mixed)
    assert mixed_high - mixed_low < high - low


def test_share_interval_covers_the_truth_of_clustered_samples() -> None:
    generator = np.random.Generator(np.random.PCG64(7))
    covered = 0
    for _ in range(600):
        rates = generator.beta(0.4, 1.6, size=60)
        samples = generator.random((60, 8)) < rates[:, None]
        low, high = bounds(share(samples.astype(float).tolist()))
        covered += low <= 0.2 <= high
    # 570 expected of 600, with a standard deviation of 5.3.
    assert 553 <= covered <= 587


def test_mean_weighs_samples_and_clusters_problems() -> None:
    estimate = mean([[10.0, 20.0], [60.0], []])
    assert estimate is not None and estimate.value == 30.0
    # Sums less the mean times the counts: 30 - 60 and 60 - 30; two clusters.
    half = Z * math.sqrt(2 * (30.0**2 + 30.0**2)) / 3
    assert bounds(estimate) == pytest.approx((30 - half, 30 + half))


def test_mean_interval_covers_the_truth_of_clustered_samples() -> None:
    generator = np.random.Generator(np.random.PCG64(8))
    covered = 0
    for _ in range(600):
        values = generator.normal(5.0, 2.0, size=(80, 1)) + generator.normal(0, 3.0, size=(80, 4))
        low, high = bounds(mean(values.tolist()))
        covered += low <= 5.0 <= high
    assert 553 <= covered <= 587


def test_one_problem_has_a_mean_without_an_interval() -> None:
    assert mean([[1.0, 3.0]]) == Estimate(value=2.0, low=None, high=None)


def test_no_sample_has_no_estimate() -> None:
    assert mean([[], []]) is None and share([]) is None


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k: int) -> None:
    rows = [[True, False, False, True, False], [False] * 5, [True] * 5, [False, True] + [False] * 3]
    by_counting = [
        np.mean([any(subset) for subset in itertools.combinations(row, k)]) for row in rows
    ]
    estimate = pass_at_k(rows, k)
    assert estimate is not None and estimate.value == pytest.approx(np.mean(by_counting))


def test_pass_at_1_is_the_share_of_right_samples() -> None:
    rows = [[True, False, False, True], [False] * 4, [True] * 4, [False, True, False, False]]
    assert pass_at_k(rows, 1) == share([[float(each) for each in row] for row in rows])


def test_pass_at_k_interval_covers_the_truth() -> None:
    generator = np.random.Generator(np.random.PCG64(10))
    rates = generator.beta(0.5, 2.0, size=200_000)
    truth = float((1 - (1 - rates) ** 4).mean())
    covered = 0
    for _ in range(600):
        drawn = generator.choice(rates, size=60)
        samples = generator.random((60, 16)) < drawn[:, None]
        low, high = bounds(pass_at_k(samples.tolist(), 4))
        covered += low <= truth <= high
    assert 553 <= covered <= 587


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_refuses_a_k_without_enough_samples(k: int) -> None:
    with pytest.raises(ValueError, match="k: expected 1 to 2, the samples of a problem"):
        pass_at_k([[True, False], [True, False, True]], k)


def test_average_of_equal_symmetric_estimates_shrinks_by_the_root_of_their_number() -> None:
    part = Estimate(value=0.5, low=0.4, high=0.6)
    whole = average([part] * 4)
    assert (whole.value, *bounds(whole)) == pytest.approx((0.5, 0.45, 0.55))


def test_average_keeps_the_asymmetry_of_its_parts() -> None:
    whole = average(
        [Estimate(value=0.0, low=0.0, high=0.2), Estimate(value=0.4, low=0.3, high=0.4)]
    )
    assert (whole.value, *bounds(whole)) == pytest.approx((0.2, 0.15, 0.3))


def test_average_refuses_no_estimates() -> None:
    with pytest.raises(ValueError, match="expected at least one, got none"):
        average([])


def test_paired_difference_counts_problems_and_tests_signs() -> None:
    compared = paired_difference([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.5], [0.0] * 5 + [1.0, 0.5])
    assert (compared.better, compared.worse) == (5, 1)
    # Of 64 ways for six signs, 7 have at most one on the rarer side, and as many the other way.
    assert compared.p_value == pytest.approx(14 / 64)
    assert compared.difference.value == pytest.approx(4 / 7)


def test_paired_difference_is_antisymmetric_and_without_ties_certain() -> None:
    first, second = [0.25, 0.5, 1.0, 0.0], [0.5, 0.25, 0.0, 0.0]
    one, other = paired_difference(first, second), paired_difference(second, first)
    low, high = bounds(one.difference)
    assert bounds(other.difference) == pytest.approx((-high, -low))
    assert paired_difference(first, first).p_value == 1.0
    assert bounds(paired_difference(first, first).difference) == (0.0, 0.0)


def test_paired_interval_is_that_of_the_mean_difference() -> None:
    generator = np.random.Generator(np.random.PCG64(9))
    first, second = generator.random(400), generator.random(400)
    compared = paired_difference(first.tolist(), second.tolist())
    differences = first - second
    half = Z * differences.std() / 20
    low, high = bounds(compared.difference)
    assert low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(differences.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 0.0])])
def test_paired_difference_refuses_other_problems(first: list[float], second: list[float]) -> None:
    with pytest.raises(ValueError, match="second_P: expected one value for each"):
        paired_difference(first, second)
