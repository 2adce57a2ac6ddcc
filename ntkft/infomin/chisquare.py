r"""The law of a weighted sum of squared normal variables, by Davies' inversion of its characteristic function.

Claim: for :math:`Q = \sum_k w_k (Z_k + b_k)^2` with weights :math:`w_k \ge 0` and independent standard normal :math:`Z_k`,

.. math:: P(Q > x) = \tfrac12 + \sum_{m\ge0} \frac{\operatorname{Im}[\varphi(u_m) e^{-iu_mx}]}{\pi(m+\frac12)},
          \qquad u_m = (m+\tfrac12)\Delta,

up to the probability that Q differs from x by more than :math:`2\pi/\Delta`.

Source: Davies 1973, 1980. Imhof 1961 has the integral of which this is the sum.

Example
-------
>>> round(upper_tail(5.9915, np.array([1.0, 1.0])), 4)                       # chi-square with two degrees of freedom
0.05
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from ntkft.errors import InputError

TERMS = 400_000  # at most; one or two weights decay slowly
BLOCK = 1024  # of them at one time


def moments(weights: ArrayLike, shifts: ArrayLike = 0.0) -> tuple[float, float]:
    """Return mean and standard deviation, Σ w(1+b²) and (Σ 2w²(1+2b²))^{1/2}.

    Example
    -------
    >>> moments([1.0, 1.0])
    (2.0, 2.0)
    """
    w, b2 = np.asarray(weights, float), np.asarray(shifts, float) ** 2
    return float((w * (1 + b2)).sum()), float(np.sqrt((2 * w**2 * (1 + 2 * b2)).sum()))


def upper_tail(x: float, weights: ArrayLike, shifts: ArrayLike = 0.0, tolerance: float = 1e-7) -> float:
    """Return P(Σ w_k (Z_k + b_k)² > x), with an error of about `tolerance` (1e-4 if a single weight counts).

    Raises
    ------
    InputError
        If a weight is negative, not finite, or none is positive.
    """
    w, b2 = np.broadcast_arrays(np.atleast_1d(np.asarray(weights, float)), np.asarray(shifts, float) ** 2)
    if not np.isfinite(w).all() or (w < 0).any() or not (w > 0).any():
        raise InputError(
            f"The weights run from {w.min()} to {w.max()} and must be >= 0, one of them positive: has the adversary moved at all?"
        )
    keep = w > 1e-12 * w.max()
    scale = w.max()
    w, b2, x = w[keep] / scale, b2[keep], x / scale
    if x <= 0:
        return 1.0
    mean, sd = moments(w, np.sqrt(b2))
    # Beyond this distance from x there is no probability that counts: normal in the middle, exponential (rate 1/2) further out.
    reach = max(x, mean) + 12 * sd + 4 * np.log(1 / tolerance)
    delta = 2 * np.pi / reach
    total = 0.5
    for first in range(0, TERMS, BLOCK):
        m = np.arange(first, first + BLOCK) + 0.5
        wu = 2 * delta * m[:, None] * w
        log_size = -0.25 * np.log1p(wu**2).sum(1) - 0.5 * (b2 * wu**2 / (1 + wu**2)).sum(1)
        phase = 0.5 * (np.arctan(wu) + b2 * wu / (1 + wu**2)).sum(1) - delta * m * x
        terms = np.exp(log_size) / (np.pi * m)
        total += float((terms * np.sin(phase)).sum())
        if (
            terms[-1] * m[-1] < tolerance
        ):  # what is left is smaller: it falls faster than 1/m, and its signs change
            break
    return float(np.clip(total, 0.0, 1.0))


def critical_value(alpha: float, weights: ArrayLike) -> float:
    """Return c with P(Σ w_k Z_k² > c) = `alpha`.

    Example
    -------
    >>> round(critical_value(0.05, [1.0, 1.0]), 3)
    5.991
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha is {alpha} and must be between 0 and 1.")
    mean, sd = moments(weights)
    high = mean + 3 * sd
    while upper_tail(high, weights) > alpha:
        high += 3 * sd
    return float(
        optimize.brentq(lambda c: upper_tail(c, weights) - alpha, 0.0, high, xtol=1e-9 * sd, rtol=1e-10)
    )
