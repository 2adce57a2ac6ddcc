"""Each rule against its own definition, by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkft import Kernel, Spectrum, descend, stopping
from ntkft.errors import InputError
from tests.helpers import relabelled


def problem(n=40, sigma=0.5, seed=0, decay=1.5):
    """A kernel with polynomial spectrum, a target inside its unit ball, and noisy labels."""
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((n, n)))[0]
    values = np.arange(1, n + 1) ** -decay
    theta = rng.standard_normal(n) * np.sqrt(values)
    theta /= np.sqrt((theta**2 / values).sum())
    truth = vectors @ theta * np.sqrt(n)
    kernel = Kernel(n * (vectors * values) @ vectors.T, np.zeros(n))
    return kernel, truth, truth + sigma * rng.standard_normal(n)


@given(
    st.lists(st.floats(1e-4, 10), min_size=2, max_size=30),
    st.floats(0.05, 5),
    st.floats(0.1, 10),
    st.floats(0.05, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_rademacher_is_the_last_step_before_the_inequality_turns(values, sigma, norm, share):
    """T̂ = min{t : R̂(1/√η_t) > R/(2eση_t)} - 1, searched step by step."""
    spectrum = Spectrum(values)
    stop = stopping.rademacher_rule(spectrum, sigma, norm)
    step = max(share / max(values), stop.eta / 2000)  # keeps the search short

    def turned(t: int) -> bool:
        eta = t * step
        return spectrum.rademacher(eta**-0.5) > norm / (2 * np.e * sigma * eta)

    t = stop.steps(step)
    margin = abs(stop.eta / step - round(stop.eta / step))
    if margin > 1e-6:  # on a step exactly, rounding decides
        assert turned(t + 1)
        assert t == 0 or not turned(t)


def test_steps_and_epochs():
    stop = stopping.StoppingTime(0.3, "test")
    assert stop.steps(0.1) == 3  # although 0.3 / 0.1 < 3 in floating point
    assert stop.steps(0.11) == 2
    assert stop.epochs(0.1, batch_size=32, n=96) == 1.0


def test_sure_is_unbiased_for_the_risk():
    """The mean of SURE's curve over noise draws is the exact risk, within its Monte-Carlo error."""
    kernel, truth, _ = problem()
    rng, sigma, eta = np.random.default_rng(1), 0.5, 4.0
    exact = descend(kernel, truth)
    risk = float(exact.bias2(eta, truth) + exact.variance(eta, sigma))
    draws = []
    for _ in range(3000):
        d = relabelled(exact, truth + sigma * rng.standard_normal(kernel.n))
        draws.append(
            float(d.residual(eta)) - sigma**2 + 2 * sigma**2 * float(d.degrees_of_freedom(eta)) / kernel.n
        )
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws) - risk) < 4 * error and error < 0.05 * risk


def brute(objective, descent):
    grid = np.geomspace(1e-3, 1e6, 200_001)
    values = np.concatenate([objective(part) for part in np.array_split(grid, 50)])
    return grid[np.argmin(values)], values.min()


def gcv(d, eta):
    free = 1 - d.degrees_of_freedom(eta) / d.n
    return np.divide(d.residual(eta), free**2, out=np.full_like(eta, np.inf), where=free > 1e-3)


def test_sure_gcv_and_oracle_find_the_global_minimum():
    kernel, truth, y = problem(seed=3)
    d, n, s2 = descend(kernel, y), kernel.n, 0.25
    objectives = {
        "sure": (
            stopping.sure_rule(d, 0.5),
            lambda e: d.residual(e) - s2 + 2 * s2 * d.degrees_of_freedom(e) / n,
        ),
        "gcv": (stopping.gcv_rule(d), lambda e: gcv(d, e)),
        "oracle": (stopping.oracle_rule(d, truth), lambda e: ((d.fitted(e) - truth) ** 2).mean(-1)),
    }
    for name, (stop, objective) in objectives.items():
        eta, value = brute(objective, d)
        assert stop.rule == name
        assert stop.info["minimum"] <= value + 1e-12
        assert stop.eta == pytest.approx(eta, rel=0.02)


def test_gcv_does_not_fall_for_zero_over_zero():
    kernel, _, y = problem(seed=4, sigma=2.0)
    d = descend(kernel, y)
    end = stopping.time_grid(d)[-1]
    assert float(d.residual(end)) < 1e-12  # so GCV is 0/0 there
    assert stopping.gcv_rule(d).info.get("edge") != "end"


def test_discrepancy_stops_where_the_training_error_is_sigma_squared():
    kernel, _, y = problem(seed=5)
    d = descend(kernel, y)
    stop = stopping.discrepancy_rule(d, 0.5)
    assert float(d.residual(stop.eta)) == pytest.approx(0.25, rel=1e-9)
    step = 0.5 / d.eigenvalues[0]
    discrete = descend(kernel, y, step_size=step)
    t = stopping.discrepancy_rule(discrete, 0.5).steps(step)
    assert float(discrete.residual(t * step)) <= 0.25 < float(discrete.residual((t - 1) * step))


def test_discrepancy_says_when_there_is_nothing_to_do():
    kernel, _, y = problem(seed=5)
    assert stopping.discrepancy_rule(descend(kernel, y), 100.0).eta == 0.0
    singular = descend(np.diag([1.0, 0.0]), [0.0, 5.0])
    assert "never" in stopping.discrepancy_rule(singular, 0.1).info["note"]


def test_holdout_by_hand():
    """The same split, the same looks, but the descent is run step by step."""
    kernel, _, y = problem(seed=6, sigma=1.0)
    stop = stopping.holdout_rule(kernel, y, fraction=0.25, patience=2, seed=9)
    order = np.random.default_rng(9).permutation(40)
    out, kept = order[:10], order[10:]
    train = descend(kernel.block(kept), y[kept])
    best, best_eta, waited, look = np.inf, 0.0, 0, 0
    while waited < 2:
        eta = look / train.eigenvalues[0]
        error = ((train.predict(eta, kernel.matrix[np.ix_(out, kept)]) - y[out]) ** 2).mean()
        best, best_eta, waited = (error, eta, 0) if error < best else (best, best_eta, waited + 1)
        look += 1
    assert stop.eta == pytest.approx(best_eta)
    assert look > 3  # it did train


def test_holdout_seed_matters_and_is_reproducible():
    kernel, _, y = problem(seed=7, sigma=1.0)
    etas = [stopping.holdout_rule(kernel, y, seed=s).eta for s in range(5)]
    assert etas == [stopping.holdout_rule(kernel, y, seed=s).eta for s in range(5)]
    assert len(set(etas)) > 1


def test_rules_shift_with_the_noise():
    kernel, _, y = problem(seed=8)
    d = descend(kernel, y)
    assert stopping.sure_rule(d, 1.0).eta < stopping.sure_rule(d, 0.2).eta
    spectrum = kernel.spectrum()
    assert stopping.rademacher_rule(spectrum, 1.0).eta < stopping.rademacher_rule(spectrum, 0.2).eta


def test_errors():
    kernel, _, y = problem()
    d = descend(kernel, y)
    for bad in (0.0, -1.0, np.nan):
        for rule in (stopping.sure_rule, stopping.discrepancy_rule):
            with pytest.raises(InputError, match="sigma is"):
                rule(d, bad)
        with pytest.raises(InputError, match="sigma is"):
            stopping.rademacher_rule(kernel.spectrum(), bad)
    with pytest.raises(InputError, match="no training moves"):
        stopping.rademacher_rule(Spectrum([0.0, 0.0]), 1.0)
    with pytest.raises(InputError, match="holds out 0 of 40"):
        stopping.holdout_rule(kernel, y, fraction=0.0)
    with pytest.raises(InputError, match="reference has 3 labels"):
        stopping.oracle_rule(d, [1.0, 2.0, 3.0])
