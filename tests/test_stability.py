"""Bounds on how far a network leaves its tangent, and the small model on which the book tests them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkft import heads, stability
from ntkft.errors import InputError
from ntkft.heads import Shape
from ntkft.spectrum import Spectrum
from ntkft.stopping import rademacher_rule

SHAPE = Shape(d=3, k=2, T=4)


def test_a_head_is_softmax_attention_written_out() -> None:
    x, theta = heads.tokens(2, SHAPE, 0), heads.gaussian_heads(3, SHAPE, 0)
    for i, tokens in enumerate(x.numpy()):
        for h, row in enumerate(theta.numpy()):
            query, key, value = (row[6 * j : 6 * j + 6].reshape(2, 3) for j in range(3))
            scores = np.array([(query @ tokens[0]) @ (key @ token) for token in tokens]) / 2**0.5
            p = np.exp(scores) / np.exp(scores).sum()
            expected = row[18:] @ (value @ (p @ tokens))
            assert np.isclose(float(heads.each_head(theta, x, SHAPE)[i, h]), expected, rtol=1e-12)


def test_the_model_is_the_scaled_sum_of_heads_and_so_are_its_gradients() -> None:
    x, theta = heads.tokens(4, SHAPE, 1), heads.gaussian_heads(5, SHAPE, 1)
    assert torch.allclose(heads.model(theta, x, SHAPE), heads.each_head(theta, x, SHAPE).sum(1) / 5**0.5)
    jacobian = torch.func.jacrev(lambda th: heads.model(th, x, SHAPE))(theta).flatten(1)
    assert torch.allclose(heads.gradients(theta, x, SHAPE), jacobian, atol=1e-13)


def test_runge_kutta_flow_agrees_with_the_closed_form_on_the_tangent() -> None:
    matrix = np.diag([1.0, 0.3])
    path = heads.descend_heads(torch.ones(2), lambda v: torch.tensor(matrix).float() @ v, 0.1, 30, flow=True)
    assert np.allclose(path[-1].numpy(), np.exp(-3 * np.diag(matrix)), atol=1e-5)
    steps = heads.descend_heads(torch.ones(1), lambda v: 0.5 * v, 0.1, 3, flow=False)
    assert np.allclose([float(v) for v in steps], 0.95 ** np.arange(4))


def test_tangent_travel_is_the_length_of_the_displacement() -> None:
    rng = np.random.default_rng(0)
    phi, y, eta = rng.standard_normal((4, 9)), rng.standard_normal(4), 0.7
    lam, vectors = np.linalg.eigh(phi @ phi.T / 4)
    delta, step = np.zeros(9), eta / 20_000
    for _ in range(20_000):  # small steps of gradient descent on the weights themselves
        delta -= step / 4 * phi.T @ (phi @ delta - y)
    travel = stability.tangent_travel(lam, vectors.T @ y / 2, eta)
    assert np.isclose(travel, np.linalg.norm(delta), rtol=1e-3)
    assert stability.tangent_travel(np.array([0.0]), np.array([1.0]), 5.0) == 0.0


def test_the_heads_that_a_theorem_asks_for_meet_its_condition_exactly() -> None:
    L1, L2, L0, radius, r = 1.3, 0.7, 0.9, 0.4, 1.1
    needed = stability.heads_needed(L1, L2, L0, radius)
    beta = stability.head_curvature(L2, needed)
    assert np.isclose(stability.dynamics_gap(L1, beta, L0, radius**-2), radius / 2**0.5)
    beta = stability.head_curvature(L2, stability.heads_needed_short(L1, L2, L0, radius, r))
    certificate, bound = stability.short_path(L1, beta, L0, radius**-2, r)
    assert certificate <= 0.5 + 1e-12 and bound <= radius / 2**0.5 + 1e-12
    assert max(certificate / 0.5, bound / (radius / 2**0.5)) == pytest.approx(1)


def test_safe_step_and_descent_constants() -> None:
    assert stability.safe_step(2.0, 0.5, 2.0) == pytest.approx(1 / (4 + 0.5 * 2))
    flow = stability.dynamics_gap(1.0, 1.0, 1.0, 4.0)
    descent = stability.dynamics_gap(1.0, 1.0, 1.0, 4.0, step_size=0.1)
    assert descent == pytest.approx(2**0.5 * flow + 0.1)
    assert stability.travel(2.0, 3.0, 1.0, descent=True) == pytest.approx(stability.travel(4.0, 2.0))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1e-3, 1.0), min_size=5, max_size=30),
    st.lists(st.floats(-0.5, 0.5), min_size=30, max_size=30),
    st.floats(0.05, 2.0),
)
def test_the_stop_of_a_changed_spectrum_is_in_the_interval(
    eigenvalues: list[float], changes: list[float], sigma: float
) -> None:
    lam = np.sort(eigenvalues)[::-1]
    shift = np.array(changes[: len(lam)])
    spectrum = Spectrum(lam)
    factor = 1 + shift
    stop = rademacher_rule(Spectrum(lam * factor), sigma).eta
    low, high = stability.stopping_interval(spectrum, sigma, ratio=float(np.abs(shift).max()))
    assert low * (1 - 1e-9) <= stop <= high * (1 + 1e-9)
    other = np.sort(np.maximum(lam + 0.1 * shift, 0) + 1e-6)[::-1]
    stop = rademacher_rule(Spectrum(other), sigma).eta
    low, high = stability.stopping_interval(spectrum, sigma, change=float(np.abs(other - lam).mean()))
    assert low * (1 - 1e-9) <= stop <= high * (1 + 1e-9)


def test_bad_input_is_one_clear_error() -> None:
    spectrum = Spectrum([1.0, 0.1])
    for options in ({}, {"change": 0.1, "ratio": 0.1}):
        with pytest.raises(InputError, match="one of change= and ratio="):
            stability.stopping_interval(spectrum, 0.5, **options)
    with pytest.raises(InputError, match=r"ratio is 1\.0"):
        stability.stopping_interval(spectrum, 0.5, ratio=1.0)
    with pytest.raises(InputError, match="change is -1"):
        stability.stopping_interval(spectrum, 0.5, change=-1)
