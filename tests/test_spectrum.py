"""The spectrum and its critical radius, against a closed form that shares no code with the bisection."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkft import Spectrum
from ntkft.errors import InputError

positive = st.floats(1e-3, 1e3)
eigenvalue_lists = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e4)), min_size=1, max_size=40).filter(
    lambda v: max(v) > 0
)


def exact_radius(eigenvalues: np.ndarray, sigma: float, norm: float) -> float:
    """With k eigenvalues above u = ε², (k u + tail)/n = c² u² is a quadratic in u: try every k."""
    values = np.sort(eigenvalues)[::-1]
    n, c2 = len(values), (norm / (2 * np.e * sigma)) ** 2
    for k in range(n + 1):
        tail = values[k:].sum()
        if k == 0 and tail == 0:
            continue
        u = (k + np.sqrt(k**2 + 4 * n * c2 * tail)) / (2 * n * c2)
        if (k == 0 or values[k - 1] >= u * (1 - 1e-12)) and (k == n or values[k] <= u * (1 + 1e-12)):
            return float(np.sqrt(u))
    raise AssertionError("no piece contains its own root")


@given(eigenvalue_lists, positive, positive)
@settings(max_examples=300, deadline=None)
def test_bisection_agrees_with_the_piecewise_quadratic(values, sigma, norm):
    radius = Spectrum(values).critical_radius(sigma, norm)
    assert radius == pytest.approx(exact_radius(np.array(values), sigma, norm), rel=1e-9)


@given(eigenvalue_lists, positive, positive)
@settings(max_examples=200, deadline=None)
def test_defining_inequality_holds_at_the_radius_and_fails_below(values, sigma, norm):
    spectrum = Spectrum(values)
    radius = spectrum.critical_radius(sigma, norm)
    c = norm / (2 * np.e * sigma)
    assert spectrum.rademacher(radius) <= c * radius**2 * (1 + 1e-12)
    below = radius * (1 - 1e-6)
    assert spectrum.rademacher(below) > c * below**2


@given(eigenvalue_lists, positive, st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_scale_law(values, sigma, c):
    """K -> cK with norm -> norm/√c describes the same function class: ε̂² -> c ε̂² (so η -> η/c)."""
    one = Spectrum(values).critical_radius(sigma, 1.0)
    other = Spectrum(c * np.array(values)).critical_radius(sigma, c**-0.5)
    assert other**2 == pytest.approx(c * one**2, rel=1e-9)


@given(eigenvalue_lists, positive)
@settings(max_examples=100, deadline=None)
def test_radius_grows_with_noise_and_falls_with_the_target(values, sigma):
    spectrum = Spectrum(values)
    assert spectrum.critical_radius(2 * sigma) > spectrum.critical_radius(sigma)
    assert spectrum.critical_radius(sigma, 2.0) < spectrum.critical_radius(sigma, 1.0)


def test_rademacher_by_hand_and_vectorised():
    spectrum = Spectrum([4.0, 1.0, 0.0])
    assert spectrum.rademacher(1.0) == pytest.approx(np.sqrt((1 + 1 + 0) / 3))
    assert spectrum.rademacher(3.0) == pytest.approx(np.sqrt(5 / 3))
    both = spectrum.rademacher(np.array([1.0, 3.0]))
    assert both.shape == (2,) and both[1] == pytest.approx(np.sqrt(5 / 3))


def test_extreme_scales_do_not_underflow():
    for scale in (1e-200, 1e200):
        values = scale * np.array([1.0, 0.1])
        norm = scale**-0.5
        expected = exact_radius(np.array([1.0, 0.1]), 1.0, 1.0) * scale**0.5
        assert Spectrum(values).critical_radius(1.0, norm) == pytest.approx(expected, rel=1e-9)


def test_zero_kernel_has_radius_zero():
    assert Spectrum([0.0, 0.0]).critical_radius(1.0) == 0.0


def test_effective_dimension_limits():
    spectrum = Spectrum([2.0, 1.0, 0.0])
    assert spectrum.effective_dimension(0.0) == 0.0
    assert spectrum.effective_dimension(1.0) == pytest.approx(2 / 3 + 1 / 2)
    assert spectrum.effective_dimension(1e12) == pytest.approx(2.0, rel=1e-9)


def test_decay_recovers_a_power_law():
    rank = np.arange(1, 401)
    fit = Spectrum(3.0 * rank**-1.5).decay(first=5, last=200)
    assert (
        fit.exponent == pytest.approx(1.5)
        and fit.scale == pytest.approx(3.0)
        and fit.r_squared == pytest.approx(1.0)
    )


def test_rounding_is_clipped_and_real_negatives_are_refused():
    assert Spectrum([1.0, -1e-9]).eigenvalues[-1] == 0.0
    with pytest.raises(InputError, match=r"smallest eigenvalue is -0\.1"):
        Spectrum([1.0, -0.1])


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf])
def test_bad_sigma(sigma):
    with pytest.raises(InputError, match="sigma is"):
        Spectrum([1.0]).critical_radius(sigma)


@pytest.mark.parametrize("values", [[], [np.nan, 1.0], [np.inf]])
def test_bad_eigenvalues(values):
    with pytest.raises(InputError, match="at least one eigenvalue, all finite"):
        Spectrum(values)


def test_decay_needs_ranks_that_exist():
    with pytest.raises(InputError, match="positive eigenvalues"):
        Spectrum([1.0, 0.5, 0.25]).decay(first=1, last=30)
