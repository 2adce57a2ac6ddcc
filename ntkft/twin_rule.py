r"""The twin rule itself: perturbed labels, and the look of least estimated risk, for any training loop.

With random signs b and a small δ, :math:`\mathrm{df} = \langle b, f(y+\delta b) - f(y)\rangle/\delta` estimates the degrees of
freedom that training has used, and :math:`\|y - f\|_n^2 - \sigma^2 + 2\sigma^2\,\mathrm{df}/n` the risk on the training texts.

Source: the book's page "When the kernel drifts", propositions on degrees of freedom from a twin and on the risk of any training.

Example
-------
>>> labels, probe = twin_labels([1.0, 2.0], delta=0.1)                     # train on these, and on [1.0, 2.0]
>>> bool(np.allclose(labels - 0.1 * probe, [1.0, 2.0]))
True
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ntkft.errors import InputError
from ntkft.monitor import twin_degrees_of_freedom, twin_risk
from ntkft.spectrum import require_positive

__all__ = ["TwinStop", "twin_labels", "twin_stop"]


def twin_labels(y: ArrayLike, delta: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels y + δb of the twin's training, and the random signs b: (n,) each.

    Raises
    ------
    InputError
        y is not a vector of finite numbers, or δ not positive.

    Example
    -------
    >>> labels, probe = twin_labels([1.0, 2.0, 3.0], 0.1)
    >>> sorted(set(np.abs(probe))), (labels - 0.1 * probe).round(9).tolist()
    ([np.float64(1.0)], [1.0, 2.0, 3.0])
    """
    values = np.asarray(y, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise InputError(f"y has shape {values.shape} and the twin needs one finite number a text: pass a vector without gaps.")
    probe = np.random.default_rng(seed).choice([-1.0, 1.0], len(values))
    return values + require_positive("delta", delta) * probe, probe


class TwinStop(NamedTuple):
    """The look of least estimated risk, and what led to it: risk, degrees of freedom and training error, (k,) each."""

    best: int
    risk: np.ndarray
    degrees_of_freedom: np.ndarray
    residual: np.ndarray


def twin_stop(fitted: ArrayLike, twin: ArrayLike, y: ArrayLike, probe: ArrayLike, delta: float, sigma: float) -> TwinStop:
    """Choose among k looks of a run that is over: for your own training loop.

    Parameters
    ----------
    fitted, twin : (k, n)
        Fitted values of the training texts at the same steps of the run on y and of the twin on y + δb.
    y, probe : (n,)
        The labels, and b of `twin_labels`.
    delta, sigma : float
        δ, and the noise level of the labels.

    Raises
    ------
    InputError
        Numbers of looks or texts disagree; δ or σ is not positive.

    Example
    -------
    >>> y, b = np.array([2.0, -1.0]), np.array([1.0, 1.0])
    >>> shares = np.array([[0.0], [0.5], [1.0]])                 # three looks: nothing, half, all of the labels is fitted
    >>> stop = twin_stop(shares * y, shares * (y + 0.1 * b), y, b, delta=0.1, sigma=1.0)
    >>> stop.best, stop.degrees_of_freedom.round(9).tolist(), stop.risk.round(9).tolist()
    (1, [0.0, 1.0, 2.0], [1.5, 0.625, 1.0])
    """
    labels, one = np.asarray(y, dtype=np.float64), np.asarray(fitted, dtype=np.float64)
    if one.ndim != 2 or one.shape[1:] != labels.shape or not len(one):
        raise InputError(f"fitted is {one.shape} and y {labels.shape}: give (k, n) fitted values and n labels, k at least 1.")
    free = twin_degrees_of_freedom(one, twin, probe, delta)
    residual = ((labels - one) ** 2).mean(-1)
    risk = twin_risk(residual, free, sigma, len(labels))
    return TwinStop(int(np.argmin(risk)), risk, free, residual)
