"""The logistic path against explicit descent on explicit features, its limits, and its one-line refusals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from ntkft.descent import descend
from ntkft.errors import InputError
from ntkft.logistic import best_intercept, cross_entropy, logistic_path
from ntkft.ntk import Kernel

TIMES = np.array([0.0, 0.5, 2.0, 10.0])


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return features of 12 training texts and 5 new ones (17, 30), labels, and scores before training of all."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((17, 30)) / 4, rng.choice([-1.0, 1.0], 12), rng.standard_normal(17) / 2


def explicit(phi: np.ndarray, y: np.ndarray, f0: np.ndarray, eta: float, constant: bool) -> np.ndarray:
    """Descend with tiny steps on the weights of an explicit model; a constant is set to its best value at each step."""
    n, steps = len(y), 10_000
    w, b, t = np.zeros(phi.shape[1]), 0.0, (1 + y) / 2
    for _ in range(steps if eta else 0):
        f = f0[:n] + phi[:n] @ w
        b = best_intercept(f, t, b) if constant else 0.0
        w -= eta / steps * phi[:n].T @ (expit(f + b) - t) / n
    f = f0 + phi @ w
    return f + (best_intercept(f[:n], t, b) if constant else 0.0)


@pytest.mark.parametrize("constant", [False, True])
def test_it_is_descent_with_small_steps(problem: tuple[np.ndarray, ...], constant: bool) -> None:
    phi, y, f0 = problem
    kernel = phi @ phi.T
    path = logistic_path(kernel[:12, :12], y, TIMES, f0=f0[:12], intercept=constant)
    new = path.predict(kernel[12:, :12], f0[12:])
    for k in (0, 3):
        wanted = explicit(phi, y, f0, TIMES[k], constant)
        assert np.allclose(path.fitted[k], wanted[:12], atol=2e-4)
        assert np.allclose(new[k], wanted[12:], atol=2e-4)


def test_small_scores_follow_the_square_loss_four_times_slower(problem: tuple[np.ndarray, ...]) -> None:
    phi, y, _ = problem
    kernel = phi[:12] @ phi[:12].T
    gaps = []
    for eta in (0.02, 0.2):
        square = descend(kernel, 2 * y).fitted(eta / 4)
        gaps.append(
            np.abs(logistic_path(kernel, y, [0.0, eta]).fitted[1] - square).max() / np.abs(square).max()
        )
    assert gaps[0] < 1e-4 and gaps[0] < gaps[1] < 1e-2


def test_the_loss_falls_and_the_intercept_keeps_the_mean(problem: tuple[np.ndarray, ...]) -> None:
    phi, y, f0 = problem
    path = logistic_path(
        Kernel(phi[:12] @ phi[:12].T, f0[:12]), y, np.geomspace(0.01, 1e4, 40), intercept=True
    )
    assert (np.diff(path.loss) < 0).all() and path.loss[-1] < 0.01  # separable: it goes to zero
    assert np.allclose(expit(path.fitted).mean(1), (y > 0).mean(), atol=1e-10)


def test_soft_labels_end_at_the_probability() -> None:
    p = np.array([0.2, 0.7])
    path = logistic_path(np.eye(2), 2 * p - 1, [0.0, 1e3])
    assert np.allclose(expit(path.fitted[1]), p, atol=1e-5)
    assert np.isclose(cross_entropy(np.array([3.0]), np.array([-1.0])), np.log1p(np.exp(3.0)))


def test_it_computes_at_the_start_only() -> None:
    assert (logistic_path(np.eye(3), [1, -1, 1], [0.0]).fitted == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [1.0, -1.0]}, "2 labels"),
        ({"y": [1.0, -1.0, 2.0]}, "must lie in"),
        ({"times": [1.0, 0.5]}, "do not decrease"),
        ({"times": []}, "times has shape"),
        ({"y": [1.0, 1.0, 1.0], "intercept": True}, "one class"),
        ({"kernel": np.ones((3, 2))}, "must be square"),
        ({"kernel": Kernel(np.ones((3, 2)), np.zeros(3), np.zeros(2))}, "square kernel"),
    ],
)
def test_it_refuses_in_one_line(change: dict, message: str) -> None:
    arguments = {"kernel": np.eye(3), "y": [1.0, -1.0, 1.0], "times": [0.0, 1.0]} | change
    with pytest.raises(InputError, match=message):
        logistic_path(**arguments)


def test_predict_refuses_a_wrong_shape() -> None:
    with pytest.raises(InputError, match="rows are new texts"):
        logistic_path(np.eye(3), [1.0, -1.0, 1.0], [0.0, 1.0]).predict(np.eye(2))
