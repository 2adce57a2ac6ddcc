"""Rules for moving kernels: where the kernel does not move they are the old rules, and where it does they see it."""

from __future__ import annotations

import numpy as np
import pytest

import ntkft
from ntkft.errors import InputError
from ntkft.monitor import (
    averaged_kernels,
    commutator_bound,
    drift_aware_rule,
    residual_clock,
    twin_degrees_of_freedom,
    twin_risk,
)
from ntkft.spectrum import Spectrum
from ntkft.stopping import rademacher_rule

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((20, 12)) * np.arange(1, 13) ** -0.8
KERNEL = FEATURES @ FEATURES.T
Y = RNG.standard_normal(20)


@pytest.fixture(params=[False, True], ids=["plain", "intercept"])
def descent(request):
    return ntkft.descend(KERNEL, Y, intercept=request.param)


# --- The clock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1e-3, 0.4, 7.0])
def test_clock_inverts_the_path(descent, eta):
    assert residual_clock(descent, float(descent.residual(eta))) == pytest.approx(eta, rel=1e-9)


def test_clock_outside_the_path(descent):
    start = float(descent.residual(0.0))
    assert residual_clock(descent, 2 * start) == 0.0
    # twenty texts and twelve features: some of the labels can never be fitted
    assert residual_clock(descent, 1e-3 * start) == np.inf


def test_clock_refuses_what_it_cannot_read(descent):
    with pytest.raises(InputError, match="reads gradient flow"):
        residual_clock(ntkft.descend(KERNEL, Y, step_size=0.01), 0.1)
    for value in (np.nan, -1.0):
        with pytest.raises(InputError, match="finite and not negative"):
            residual_clock(descent, value)


# --- Averages -----------------------------------------------------------------------------------------------


def test_average_of_a_linear_path_is_exact():
    times = np.array([0.0, 0.5, 2.0])
    path = KERNEL + times[:, None, None] * np.eye(20)
    average = averaged_kernels(times, path)
    np.testing.assert_allclose(average, KERNEL + times[:, None, None] / 2 * np.eye(20), atol=1e-12)


def test_commuting_kernels_have_no_gap_and_others_do():
    times = np.linspace(0, 1, 5)
    growing = (1 + times)[:, None, None] * KERNEL
    assert commutator_bound(times, growing).max() < 1e-9
    turning = KERNEL + times[:, None, None] * np.diag(np.arange(20.0))
    bound = commutator_bound(times, turning)
    assert bound[0] == 0 and (np.diff(bound) > 0).all()


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.5, 1.0, 2.0], [0.0, 1.0, 1.0]])
def test_times_and_kernels_must_agree(times):
    with pytest.raises(InputError, match="increasing times from 0"):
        averaged_kernels(times, np.stack([KERNEL] * 3))


# --- The drift-aware rule -----------------------------------------------------------------------------------


def test_without_drift_it_is_the_rule():
    spectrum = ntkft.descend(KERNEL, Y).spectrum
    eta = rademacher_rule(spectrum, 0.8).eta
    stop = drift_aware_rule([0.0, 0.4 * eta, 3 * eta], [spectrum] * 3, 0.8)
    assert stop.info["reached"] and stop.eta == pytest.approx(eta, rel=1e-9)


def test_looks_that_end_too_early_are_reported():
    spectrum = ntkft.descend(KERNEL, Y).spectrum
    eta = rademacher_rule(spectrum, 0.8).eta
    stop = drift_aware_rule([0.0, 0.5 * eta], [spectrum] * 2, 0.8)
    assert not stop.info["reached"] and stop.eta == pytest.approx(eta, rel=1e-9)


def test_scaled_norm_gives_the_clock_of_a_growing_kernel():
    """K_t = (1 + t) K: with R² / c the stop is where t + t²/2 has reached the stop of K."""
    spectrum = ntkft.descend(KERNEL, Y).spectrum
    eta = rademacher_rule(spectrum, 0.8).eta
    times = np.linspace(0, 2 * eta, 400)
    growth = 1 + times / 2  # of the average
    spectra = [Spectrum(c * spectrum.eigenvalues) for c in growth]
    stop = drift_aware_rule(times, spectra, 0.8, growth**-0.5)
    assert stop.eta == pytest.approx(np.sqrt(1 + 2 * eta) - 1, rel=1e-3)
    assert drift_aware_rule(times, spectra, 0.8).eta > stop.eta  # a fixed R trains longer


def test_rule_wants_one_time_for_each_spectrum():
    spectrum = Spectrum([1.0])
    for times in ([0.0], [1.0, 2.0], [0.0, 0.0]):
        with pytest.raises(InputError, match="the first one 0"):
            drift_aware_rule(times, [spectrum] * 2, 1.0)


# --- The twin -----------------------------------------------------------------------------------------------


def test_twin_of_the_closed_form_has_the_filter_as_its_mean(descent):
    signs = np.random.default_rng(1).choice([-1.0, 1.0], (4000, 20))
    eta = 0.7
    found = []
    for b in signs:
        twin = ntkft.descend(KERNEL, Y + 0.1 * b, intercept=descent.kernel_means is not None)
        found.append(twin_degrees_of_freedom(descent.fitted(eta), twin.fitted(eta), b, 0.1))
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - float(descent.degrees_of_freedom(eta))) < 4 * error


def test_risk_is_sure_where_the_degrees_of_freedom_are_known(descent):
    etas = np.array([0.1, 1.0])
    risk = twin_risk(descent.residual(etas), descent.degrees_of_freedom(etas), 0.5, 20)
    by_hand = descent.residual(etas) - 0.25 + 0.5 * descent.degrees_of_freedom(etas) / 20
    np.testing.assert_allclose(risk, by_hand)


def test_twin_of_another_shape_is_refused():
    with pytest.raises(InputError, match="looks and texts must agree"):
        twin_degrees_of_freedom(np.zeros((3, 4)), np.zeros((2, 4)), np.ones(4), 0.1)
