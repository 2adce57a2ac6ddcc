"""The closed-form path, against gradient descent that is really run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkft import Kernel, descend
from ntkft.errors import InputError
from tests.helpers import relabelled


def features(n: int, p: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, p))


def run_gradient_descent(phi, y, f0, step_size, steps):
    """Gradient descent on θ in f0 + Φθ with loss 1/(2n) Σ (f-y)²: no kernel, no eigenvector."""
    theta = np.zeros(phi.shape[1])
    for _ in range(steps):
        theta -= step_size * phi.T @ (f0 + phi @ theta - y) / len(y)
    return theta


@pytest.mark.parametrize(
    "p", [3, 8, 20]
)  # fewer, as many, and more parameters than texts: K is singular for p=3
@pytest.mark.parametrize("share", [0.3, 1.0, 1.7])  # of 1/λ_1; 1.7 overshoots along the first eigenvector
def test_discrete_path_is_gradient_descent(p, share):
    phi, new = features(8, p, 0), features(5, p, 1)
    rng = np.random.default_rng(2)
    y, f0, f0_new = rng.standard_normal(8), rng.standard_normal(8), rng.standard_normal(5)
    step = share / np.linalg.eigvalsh(phi @ phi.T / 8)[-1]
    descent = descend(phi @ phi.T, y, f0, step_size=step)
    for t in (0, 1, 2, 7, 100):
        theta = run_gradient_descent(phi, y, f0, step, t)
        np.testing.assert_allclose(descent.fitted(t * step), f0 + phi @ theta, atol=1e-8)
        np.testing.assert_allclose(
            descent.predict(t * step, new @ phi.T, f0_new), f0_new + new @ theta, atol=1e-8
        )


def test_flow_is_the_limit_of_small_steps():
    phi = features(6, 4, 3)
    y = features(6, 1, 4).ravel()
    flow = descend(phi @ phi.T, y)
    gaps = []
    for step in (1e-2, 1e-3):
        gaps.append(np.abs(descend(phi @ phi.T, y, step_size=step).fitted(0.5) - flow.fitted(0.5)).max())
    assert gaps[1] < 0.15 * gaps[0] and gaps[1] < 1e-3  # first order in the step


@given(
    st.lists(st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-6, 1e3)), min_size=2, max_size=12).filter(
        lambda v: max(v) > 0
    ),
    st.floats(0, 1e3),
    st.floats(0, 1e3),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
)
@settings(max_examples=200, deadline=None)
def test_filter_is_a_share_and_grows_with_time_and_eigenvalue(values, eta1, eta2, share):
    """Zero and repeated eigenvalues are among the examples."""
    n = len(values)
    step = None if share is None else share / max(values)
    descent = descend(n * np.diag(values), np.ones(n), step_size=step)
    early, late = descent.filter(min(eta1, eta2)), descent.filter(max(eta1, eta2))
    assert (early >= 0).all() and (late <= 1).all()
    assert (early <= late + 1e-12).all()
    assert (np.diff(late) <= 1e-12).all()  # eigenvalues descend, so do the shares
    assert (late[descent.eigenvalues == 0] == 0).all()


def test_two_bounds_of_the_theory():
    """max_λ λ(1-ελ)^{2t} <= 1/(2eη) and filter <= min(1, ηλ), on a fine grid of λ."""
    lam = np.linspace(0, 1, 2001)
    for t in (1, 2, 5, 50, 500):
        descent = descend(len(lam) * np.diag(lam), np.ones(len(lam)), step_size=1.0)
        left = 1 - descent.filter(float(t))
        assert (descent.eigenvalues * left**2).max() <= 1 / (2 * np.e * t)
        assert (descent.filter(float(t)) <= np.minimum(1, t * descent.eigenvalues) + 1e-12).all()


@given(st.floats(1e-3, 1e3), st.floats(0.01, 100))
@settings(max_examples=50, deadline=None)
def test_scale_law(c, eta):
    """K -> cK runs the same path c times faster."""
    phi = features(5, 3, 5)
    y = np.arange(5.0)
    slow, fast = descend(phi @ phi.T, y), descend(c * phi @ phi.T, y)
    np.testing.assert_allclose(fast.fitted(eta / c), slow.fitted(eta), atol=1e-9)


def test_coefficients_at_a_zero_eigenvalue_take_the_limit():
    descent = descend(np.diag([2.0, 0.0]), [1.0, 3.0])
    np.testing.assert_allclose(descent.coefficients(0.7), [(1 - np.exp(-0.7)) / 2, 0.7 * 3 / 2])
    tiny = descend(np.diag([2.0, 1e-14]), [1.0, 3.0])  # no cancellation on the way to the limit
    np.testing.assert_allclose(tiny.coefficients(0.7), descent.coefficients(0.7), rtol=1e-6)


def test_arrays_of_times_agree_with_single_times():
    phi = features(6, 4, 6)
    descent = descend(phi @ phi.T, np.arange(6.0), f0=np.ones(6))
    times = np.array([0.0, 0.1, 5.0])
    cross = features(3, 6, 7)
    for k, eta in enumerate(times):
        np.testing.assert_allclose(descent.fitted(times)[k], descent.fitted(eta))
        np.testing.assert_allclose(descent.predict(times, cross)[k], descent.predict(eta, cross))
        np.testing.assert_allclose(
            descent.residual(times)[k], ((6 * [0] + np.arange(6) - descent.fitted(eta)) ** 2).mean()
        )
    np.testing.assert_allclose(descent.fitted(0.0), 1.0)


def test_bias_and_variance_add_up_to_the_simulated_risk():
    rng = np.random.default_rng(8)
    phi = features(10, 30, 9)
    truth, f0, sigma, eta = phi[:, 0], rng.standard_normal(10), 0.7, 0.05
    exact = descend(phi @ phi.T, truth, f0)
    risk = float(exact.bias2(eta, truth) + exact.variance(eta, sigma))
    draws = []
    for _ in range(4000):
        noisy = relabelled(exact, truth + sigma * rng.standard_normal(10))
        draws.append(((noisy.fitted(eta) - truth) ** 2).mean())
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - risk) < 4 * error
    assert error < 0.02 * risk  # the check is sharp enough to mean something


def test_hilbert_norm():
    phi = features(6, 10, 10)
    theta = np.random.default_rng(11).standard_normal(6)
    theta = phi.T @ theta  # in the span of the features, so it is the smallest solution
    assert descend(phi @ phi.T, np.zeros(6)).hilbert_norm(phi @ theta) == pytest.approx(np.linalg.norm(theta))
    assert descend(np.diag([1.0, 0.0]), np.zeros(2)).hilbert_norm([0.0, 1.0]) == np.inf


def test_errors_name_both_sides():
    kernel = Kernel(np.eye(4), np.zeros(4))
    with pytest.raises(InputError, match="kernel is for 4 texts and y has 3 labels"):
        descend(kernel, [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="1 of 4 entries of y are not finite, first at index 2"):
        descend(kernel, [1.0, 2.0, np.nan, 1.0])
    with pytest.raises(InputError, match="diverges from 2/λ_1"):
        descend(kernel, np.ones(4), step_size=8.0)
    with pytest.raises(InputError, match="square kernel"):
        descend(kernel.block([0], [1, 2]), [1.0])
    with pytest.raises(InputError, match="4 training texts"):
        descend(kernel, np.ones(4)).predict(1.0, np.ones((2, 3)))
    with pytest.raises(InputError, match="eta is -1"):
        descend(kernel, np.ones(4)).fitted(-1.0)


@pytest.mark.parametrize("p", [3, 20])
def test_a_free_intercept_is_gradient_descent_on_the_centred_loss(p):
    """Descent on θ in f0 + Φθ + b, where b always fits the mean residual; no kernel, no eigenvector."""
    phi, new = features(9, p, 12) + 2.0, features(4, p, 13) + 2.0  # a common part: the constant mode is large
    rng = np.random.default_rng(14)
    y, f0, f0_new = rng.standard_normal(9), rng.standard_normal(9), rng.standard_normal(4)
    centred = phi - phi.mean(0)
    step = 1.0 / np.linalg.eigvalsh(centred @ centred.T / 9)[-1]
    descent = descend(phi @ phi.T, y, f0, step_size=step, intercept=True)
    theta = np.zeros(p)
    for t in range(1, 41):
        left = f0 + phi @ theta - y
        theta -= step * phi.T @ (left - left.mean()) / 9
        b = (y - f0 - phi @ theta).mean()
        np.testing.assert_allclose(descent.fitted(t * step), f0 + phi @ theta + b, atol=1e-9)
        np.testing.assert_allclose(
            descent.predict(t * step, new @ phi.T, f0_new), f0_new + new @ theta + b, atol=1e-9
        )
    assert descent.degrees_of_freedom(0.0) == 1.0


def test_risk_with_an_intercept_is_the_simulated_risk():
    rng = np.random.default_rng(15)
    phi = features(10, 30, 16) + 1.0
    truth, sigma, eta = phi[:, 0] + 3.0, 0.7, 0.05
    exact = descend(phi @ phi.T, truth, intercept=True)
    risk = float(exact.bias2(eta, truth) + exact.variance(eta, sigma))
    draws = [
        ((relabelled(exact, truth + sigma * rng.standard_normal(10)).fitted(eta) - truth) ** 2).mean()
        for _ in range(3000)
    ]
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - risk) < 4 * error and error < 0.02 * risk
