r"""The kernel path of logistic regression: gradient flow on the cross-entropy of two classes.

Claim: flow on :math:`\frac1n\sum_i [\log(1+e^{f_i}) - t_if_i]`, with :math:`t_i = (1+y_i)/2`, moves the scores of the linearised
model by

.. math:: \dot f = -K\,(\operatorname{sig}(f) - t), \qquad f_\eta = f_0 + k(\cdot, X)\,\alpha_\eta, \quad
    \dot\alpha = \tfrac1n (t - \operatorname{sig}(f)),

with K the kernel matrix over n. There is no closed form; the equation for α is solved numerically, so that nothing is divided
by small eigenvalues. Near f = 0 it is the flow of the square loss towards 2y, four times slower.

Source: the book's chapter "Stopping language models".

Example
-------
>>> path = logistic_path(np.eye(2), y=[1.0, -1.0], times=[0.0, 2.0])
>>> path.fitted.round(3)
array([[ 0.   ,  0.   ],
       [ 0.443, -0.443]])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from scipy.special import expit, logit

from ntkft.descent import check_labels
from ntkft.errors import InputError
from ntkft.ntk import Kernel

STEPS = 200  # Newton steps for the intercept; it needs about five


@dataclass(frozen=True, eq=False)
class LogisticPath:
    """Scores along the flow, and what is needed to predict new texts; made by `logistic_path`.

    Attributes
    ----------
    times : (k,)
        Kernel times.
    fitted : (k, n)
        Scores (logits) of the training texts.
    coefficients : (k, n)
        α with f(x) = f0(x) + Σ_i k(x, x_i) α_i + intercept.
    intercept : (k,)
        Zeros if none is fitted.
    y : (n,)
        Labels from -1 to 1.
    """

    times: np.ndarray
    fitted: np.ndarray
    coefficients: np.ndarray
    intercept: np.ndarray
    y: np.ndarray

    @property
    def loss(self) -> np.ndarray:
        """The training loss at each time, (k,)."""
        return cross_entropy(self.fitted, self.y)

    def predict(self, cross: Kernel | np.ndarray, f0: ArrayLike | None = None) -> np.ndarray:
        """Return the scores of new texts at each time, (k, m).

        Parameters
        ----------
        cross : Kernel or (m, n) array
            k(new texts, training texts), unnormalised.
        f0 : (m,) array, optional
            Scores of the new texts before training; by default those of `cross`, and zero for a bare array.
        """
        matrix = cross.matrix if isinstance(cross, Kernel) else np.asarray(cross, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[1] != len(self.y):
            raise InputError(
                f"cross has shape {matrix.shape} and the path has {len(self.y)} training texts: "
                "rows are new texts, columns the training texts in order."
            )
        if f0 is None:
            f0 = cross.scores if isinstance(cross, Kernel) else np.zeros(len(matrix))
        return check_labels(f0, len(matrix), "f0") + self.coefficients @ matrix.T + self.intercept[:, None]


def cross_entropy(scores: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the mean of log(1 + e^f) - t f over the last axis, t = (1+y)/2; for y = ±1 it is log(1 + e^(-yf)).

    Example
    -------
    >>> float(cross_entropy(np.array([0.0]), np.array([1.0])).round(4))
    0.6931
    """
    return (np.logaddexp(0, scores) - (1 + y) / 2 * scores).mean(-1)


def best_intercept(scores: np.ndarray, t: np.ndarray, guess: float = 0.0) -> float:
    """Return b with mean sig(scores + b) = mean t: Newton, kept inside a bracket that always holds the root."""
    share = float(t.mean())
    low, high = logit(share) - scores.max(), logit(share) - scores.min()  # sig is monotone
    b = float(np.clip(guess, low, high))
    for _ in range(STEPS):
        p = expit(scores + b)
        gap = float(p.mean()) - share
        low, high = (low, b) if gap > 0 else (b, high)
        step = b - gap / max(float((p * (1 - p)).mean()), 1e-300)
        new = step if low <= step <= high else 0.5 * (low + high)
        if abs(new - b) <= 1e-13 * (1 + abs(b)):
            return float(new)
        b = new
    return b


def logistic_path(
    kernel: Kernel | np.ndarray,
    y: ArrayLike,
    times: ArrayLike,
    *,
    f0: ArrayLike | None = None,
    intercept: bool = False,
    tolerance: float = 1e-7,
) -> LogisticPath:
    """Solve the flow of the logistic loss.

    Parameters
    ----------
    kernel : Kernel or (n, n) array
        Unnormalised kernel between the training texts.
    y : (n,) array
        Labels -1 and 1, or between: y = 2p - 1 trains towards the probability p.
    times : (k,) array
        Kernel times, not decreasing, from 0 on.
    f0 : (n,) array, optional
        Scores before training; by default the kernel's own, and zero for a bare array.
    intercept : bool
        Fit a free constant beside the model, at each time the best one: the mean probability is then that of the labels.
    tolerance : float
        Error of the solver, relative, and absolute in the unit of a score.

    Raises
    ------
    InputError
        If counts differ, labels leave [-1, 1], times decrease, or the intercept would be infinite (one class only).
    """
    if isinstance(kernel, Kernel) and not kernel.square:
        raise InputError(f"logistic_path needs the square kernel of the training texts and got {kernel!r}.")
    matrix = kernel.matrix if isinstance(kernel, Kernel) else np.asarray(kernel, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"The kernel matrix has shape {matrix.shape} and must be square: pass k(X, X).")
    n = len(matrix)
    if f0 is None:
        f0 = kernel.scores if isinstance(kernel, Kernel) else np.zeros(n)
    labels, start = check_labels(y, n), check_labels(f0, n, "f0")
    eta = np.asarray(times, dtype=np.float64)
    if (np.abs(labels) > 1).any():
        raise InputError(
            f"Labels go up to {np.abs(labels).max():g} and must lie in [-1, 1]: pass ±1, or 2p - 1."
        )
    if eta.ndim != 1 or not eta.size or not np.isfinite(eta).all() or eta[0] < 0 or (np.diff(eta) < 0).any():
        raise InputError(
            f"times has shape {eta.shape} and must be a list of finite times >= 0 that do not decrease."
        )
    t = (1 + labels) / 2
    if intercept and not 0 < t.mean() < 1:
        raise InputError(
            f"All {n} labels are of one class and the best intercept is infinite: leave intercept out."
        )

    last = [0.0]  # the intercept moves slowly: the last one starts the next search

    def scores(alpha: np.ndarray) -> np.ndarray:
        f = start + matrix @ alpha
        if intercept:
            last[0] = best_intercept(f, t, last[0])
        return f + last[0]

    def slope(_: float, alpha: np.ndarray) -> np.ndarray:
        return (t - expit(scores(alpha))) / n

    def jacobian(_: float, alpha: np.ndarray) -> np.ndarray:
        p = expit(scores(alpha))
        w = p * (1 - p)
        inner = matrix - (w @ matrix) / max(w.sum(), 1e-300) if intercept else matrix
        return -w[:, None] * inner / n

    # α has the unit of a score over a kernel entry. This makes `tolerance` an error in the scores.
    scale = max(float(np.trace(matrix)), 1e-300)
    if eta[-1] == 0:
        alphas = np.zeros((len(eta), n))
    else:
        solved = solve_ivp(
            slope,
            (0.0, eta[-1]),
            np.zeros(n),
            "BDF",
            t_eval=eta,
            jac=jacobian,
            rtol=tolerance,
            atol=tolerance / scale,
        )
        alphas = solved.y.T
    fitted = np.array([scores(alpha) for alpha in alphas])
    constants = fitted - start - alphas @ matrix.T
    return LogisticPath(eta, fitted, alphas, constants.mean(1), labels)
