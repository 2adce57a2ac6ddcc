"""The law of the adversary's score, and what of a leak it lets through."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ntkft.descent import descend
from ntkft.errors import InputError
from ntkft.infomin.blindness import blindness, noise_spread, score
from ntkft.infomin.chisquare import critical_value, moments, upper_tail

LAM = np.arange(1, 81) ** -1.5


# --- Weighted chi-squares -----------------------------------------------------------------------------------


@pytest.mark.parametrize("degrees", [2, 3, 10, 200])
@pytest.mark.parametrize("level", [0.9, 0.5, 0.05, 1e-4])
def test_equal_weights_are_chi_square(degrees, level):
    x = stats.chi2.isf(level, degrees)
    assert upper_tail(3 * x, np.full(degrees, 3.0)) == pytest.approx(level, abs=1e-6)


@pytest.mark.parametrize("level", [0.5, 0.05])
def test_a_single_weight(level):
    assert upper_tail(stats.chi2.isf(level, 1), [1.0]) == pytest.approx(level, abs=1e-4)


@pytest.mark.parametrize(("degrees", "shift"), [(4, 1.0), (12, 3.0)])
def test_a_shift_is_non_central(degrees, shift):
    shifts = np.zeros(degrees)
    shifts[0] = shift
    for level in (0.8, 0.1):
        x = stats.ncx2.isf(level, degrees, shift**2)
        assert upper_tail(x, np.ones(degrees), shifts) == pytest.approx(level, abs=1e-6)


def test_two_pairs_of_weights_in_closed_form():
    """w₁ and w₂ twice each: a sum of two exponentials with means 2w."""
    a, b, x = 2.0, 6.0, 11.0
    expected = (b * np.exp(-x / b) - a * np.exp(-x / a)) / (b - a)
    assert upper_tail(x, [1.0, 1.0, 3.0, 3.0]) == pytest.approx(expected, abs=1e-7)


def test_very_unequal_weights_against_simulation():
    w = np.r_[1.0, np.arange(2, 60) ** -2.0]
    q = (np.random.default_rng(0).standard_normal((200_000, len(w))) ** 2 @ w)[:, None]
    levels = np.array([0.3, 0.05, 0.005])
    points = np.array([critical_value(a, w) for a in levels])
    seen = (q > points).mean(0)
    assert (np.abs(seen - levels) < 4 * np.sqrt(levels * (1 - levels) / 200_000)).all()
    mean, sd = moments(w)
    assert q.mean() == pytest.approx(mean, abs=4 * sd / 447) and q.std() == pytest.approx(sd, rel=0.02)


def test_bad_weights():
    for w in ([0.0, 0.0], [1.0, -1.0], [np.nan]):
        with pytest.raises(InputError, match="must be >= 0, one of them positive"):
            upper_tail(1.0, w)
    with pytest.raises(InputError, match="alpha is 1"):
        critical_value(1.0, [1.0])


# --- The score ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [None, 0.5])
def test_the_score_is_the_filtered_sum(step):
    rng = np.random.default_rng(0)
    phi, t = rng.standard_normal((20, 7)), rng.standard_normal(20)
    path = descend(phi @ phi.T / 4, t, step_size=step)
    times = np.array([1.0, 4.0])
    coefficients = path.vectors.T @ t / np.sqrt(20)
    expected = [(path.filter(eta) * coefficients**2).sum() for eta in times]
    np.testing.assert_allclose(score(path, times), expected, rtol=1e-12)
    # What the fit takes off the training error is the score at twice the time.
    removed = (t**2).mean() - path.residual(times)
    np.testing.assert_allclose(removed, score(path, 2 * times), rtol=1e-10)


def test_shares_are_those_of_descent():
    sight = blindness(LAM, 5.0, 1.0, step_size=0.5)
    np.testing.assert_allclose(sight.shares, 1 - (1 - 0.5 * LAM) ** 10, rtol=1e-12)
    np.testing.assert_allclose(blindness(LAM, 5.0, 1.0).shares, 1 - np.exp(-5 * LAM), rtol=1e-12)


def test_null_moments_are_those_of_the_weighted_squares():
    sight = blindness(LAM, 5.0, 0.6)
    mean, sd = moments(0.36 / 80 * sight.shares)
    assert (sight.null_mean, sight.null_sd) == (pytest.approx(mean, rel=1e-12), pytest.approx(sd, rel=1e-12))


def test_detectable_and_power_are_inverse():
    """The leak at which the normal power is 0.9 has that normal power; proved bounds enclose it and hold for the exact power."""
    sight = blindness(LAM, 8.0, 0.7, alpha=0.05, power=0.9)
    for j in (0, 5, 40, 79):
        assert sight.normal_power(j, sight.detectable[j])[0] == pytest.approx(0.9, abs=1e-9)
        assert sight.detectable[j] < sight.detected[j]
        assert sight.power_curve(j, sight.detected[j])[0] >= 0.9
        assert sight.power_curve(j, 0.0)[0] == pytest.approx(0.05, abs=1e-6)
        assert sight.power_curve(j, sight.undetected[j])[0] <= 0.9
        assert 0 < sight.undetected[j] < sight.detectable[j]


@pytest.mark.parametrize("eta", [2.0, 20.0])
def test_power_curve_against_simulated_descent(eta):
    """A planted leak, kernel regression run for the time, and the share of alarms: within the binomial interval."""
    n, sigma, j, runs = 60, 0.8, 3, 4000
    rng = np.random.default_rng(1)
    phi = rng.standard_normal((n, n)) * np.arange(1, n + 1) ** -0.7
    path = descend(phi @ phi.T, np.zeros(n))
    sight = blindness(path.spectrum, eta, sigma)
    leak = sight.detectable[j] / 2
    c = sight.threshold * sigma**2 / n
    t = np.sqrt(n * leak) * path.vectors[:, j] + sigma * rng.standard_normal((runs, n))
    smoother = (path.vectors * path.filter(eta)) @ path.vectors.T
    q = np.einsum("ri,ij,rj->r", t, smoother, t) / n
    power = sight.power_curve(j, leak)[0]
    assert 0.2 < power < 0.9
    assert abs((q > c).mean() - power) < 3.5 * np.sqrt(power * (1 - power) / runs)
    mean = sight.null_mean + sight.shares[j] * leak
    assert q.mean() == pytest.approx(mean, abs=4 * q.std() / np.sqrt(runs))


@pytest.mark.parametrize("shares", [np.r_[1.0, 0.6, 0.1, 0.1, 0.1], np.linspace(0.2, 1, 12)])
def test_the_density_of_the_noise_is_bounded(shares):
    """The two cases of the lemma, against the steepest slope of the exact law of the other directions."""
    for j in (0, len(shares) - 1):
        rest = np.delete(shares, j)
        x = np.linspace(0.02, 3 * rest.sum(), 24)
        tail = np.array([upper_tail(point, rest) for point in x])
        bound = 1 / (2 * noise_spread(shares)[j])
        steepest = (-np.diff(tail) / np.diff(x)).max()
        assert bound / 3 < steepest <= bound


def test_zero_eigenvalues_are_never_seen_and_count_as_samples():
    sight = blindness([1.0, 0.5], 3.0, 1.0, n=10)
    full = blindness([1.0, 0.5] + 8 * [0.0], 3.0, 1.0)
    np.testing.assert_array_equal(sight.detectable, full.detectable)
    assert np.isinf(sight.detectable[2:]).all() and np.isinf(sight.detected[2:]).all()
    assert sight.null_mean == full.null_mean == pytest.approx(sight.shares.sum() / 10)


def test_bad_numbers():
    for options, words in (
        ({"eta": 0.0}, "eta is 0"),
        ({"sigma": -1.0}, "sigma is -1"),
        ({"n": 10}, "80 eigenvalues and n is 10"),
        ({"alpha": 0.95}, "alpha is 0.95 and power 0.9"),
        ({"step_size": 1.5}, r"step_size is 1.5 and the theorem needs at most 1/λ_1 = 1"),
    ):
        with pytest.raises(InputError, match=words):
            blindness(**({"eigenvalues": LAM, "eta": 1.0, "sigma": 1.0} | options))
