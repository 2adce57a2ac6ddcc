r"""Stopping rules for networks whose kernel moves while they are trained.

Claim: the residual of gradient flow obeys :math:`r' = -K_t r` with the kernel of the moment, so up to commutators training for a
time t is training for a time t with one fixed kernel, the average :math:`\bar K_t = \frac1t\int_0^t K_s\,ds`. Three rules follow:
a clock that reads kernel time off the training error, a radius that is measured again on the way, and an estimate of the risk
from a twin run on labels that differ by a known small vector.

Source: the book's chapter "When the kernel drifts"; Ramani, Blu & Unser 2008 for the twin.

Example
-------
>>> import numpy as np, ntkft
>>> descent = ntkft.descend(np.diag([2.0, 0.2]), y=[1.0, 1.0])
>>> round(residual_clock(descent, float(descent.residual(3.0))), 9)
3.0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.integrate import cumulative_trapezoid
from scipy.optimize import brentq

from ntkft.descent import Descent
from ntkft.errors import InputError
from ntkft.spectrum import Spectrum, require_positive
from ntkft.stopping import StoppingTime, rademacher_rule, time_grid

__all__ = [
    "averaged_kernels",
    "commutator_bound",
    "drift_aware_rule",
    "residual_clock",
    "twin_degrees_of_freedom",
    "twin_risk",
]


def residual_clock(descent: Descent, residual: float) -> float:
    """Return the kernel time at which the fixed kernel's path has this training error: time as the function feels it.

    It needs no step size, so it reads the progress of any optimiser in the kernel's unit.

    Parameters
    ----------
    descent : Descent
        Gradient flow on the training labels, with the kernel before training.
    residual : float
        Observed ‖y - f‖_n² (with an intercept: of the centred model).

    Returns
    -------
    float
        η; 0.0 if the error is not below that before training, infinity if the path never gets there.

    Example
    -------
    >>> import numpy as np, ntkft
    >>> residual_clock(ntkft.descend(np.eye(2), y=[1.0, 1.0]), residual=2.0)
    0.0
    """
    if descent.step_size is not None:
        raise InputError(f"The clock reads gradient flow and got {descent!r}: leave step_size out.")
    if not np.isfinite(residual) or residual < 0:
        raise InputError(f"residual is {residual} and a mean of squares is finite and not negative.")
    if residual >= float(descent.residual(0.0)):
        return 0.0
    last = float(time_grid(descent)[-1])
    if residual <= float(descent.residual(last)):
        return float("inf")
    precise = {"xtol": 1e-15 / float(descent.eigenvalues[0]), "rtol": 1e-14}
    return float(brentq(lambda eta: float(descent.residual(eta)) - residual, 0.0, last, **precise))


def averaged_kernels(times: ArrayLike, matrices: ArrayLike) -> np.ndarray:
    r"""Return :math:`\bar K_t = \frac1t\int_0^t K_s\,ds` at each time, by the trapezoidal rule: (k, n, n).

    Parameters
    ----------
    times : (k,)
        Kernel times, increasing from 0.
    matrices : (k, n, n)
        The kernel at those times; only scale and order of the rows must agree among them.
    """
    eta, stack = _path(times, matrices)
    total = cumulative_trapezoid(stack, eta, axis=0, initial=0.0)
    average = stack.copy()
    average[1:] = total[1:] / eta[1:, None, None]
    return average


def drift_aware_rule(
    times: ArrayLike, spectra: Sequence[Spectrum], sigma: float, norm: ArrayLike = 1.0
) -> StoppingTime:
    r"""Stop at the first time η with :math:`\eta \ge 1/\hat\varepsilon_n^2(\bar K_\eta)`, the radius of the averaged kernel.

    With a kernel that does not move it is `rademacher_rule`. Between two looks the predicted stop is interpolated linearly.

    Parameters
    ----------
    times : (k,)
        Kernel times of the looks, increasing from 0.
    spectra : k Spectrum
        Eigenvalues of the averaged kernels (`averaged_kernels`) at those times.
    sigma : float
        Noise level of the labels.
    norm : float or (k,)
        R, one for all looks or one for each: a kernel c times as large has a target 1/√c times as large in norm.

    Returns
    -------
    StoppingTime
        ``info["reached"]`` says whether the looks go far enough; if not, η is the last prediction.

    Example
    -------
    >>> fixed = Spectrum([1.0, 0.1])
    >>> stop = drift_aware_rule([0.0, 50.0], [fixed, fixed], sigma=1.0)
    >>> round(stop.eta / rademacher_rule(fixed, sigma=1.0).eta, 9)
    1.0
    """
    eta = np.asarray(times, dtype=np.float64)
    if eta.shape != (len(spectra),) or len(eta) == 0 or eta[0] != 0 or (np.diff(eta) <= 0).any():
        raise InputError(
            f"times is {eta} and there are {len(spectra)} spectra: give one increasing time for each, the first one 0."
        )
    norms = np.broadcast_to(np.asarray(norm, dtype=np.float64), eta.shape)
    predicted = np.array([rademacher_rule(s, sigma, float(r)).eta for s, r in zip(spectra, norms, strict=True)])
    info = {"predicted": predicted.tolist(), "times": eta.tolist(), "sigma": float(sigma), "norm": norms.tolist()}
    ahead = eta >= predicted
    if not ahead.any():
        return StoppingTime(float(predicted[-1]), "drift_aware", info | {"reached": False})
    k = int(np.argmax(ahead))
    gap0, gap1 = predicted[k - 1] - eta[k - 1], predicted[k] - eta[k]  # positive, then not
    stop = eta[k - 1] + (eta[k] - eta[k - 1]) * gap0 / (gap0 - gap1)
    return StoppingTime(float(stop), "drift_aware", info | {"reached": True})


def commutator_bound(times: ArrayLike, matrices: ArrayLike) -> np.ndarray:
    r"""Return :math:`\frac12\int_0^t\|[K_s, A_s]\|_{op}\,ds` with :math:`A_s=\int_0^s K`, at each time: (k,).

    It bounds how far the propagator of r' = -K_t r is from exp(-A_t), in operator norm; zero if the kernels commute.

    Parameters
    ----------
    times : (k,)
        Kernel times, increasing from 0.
    matrices : (k, n, n)
        K_t, normalised (the matrix divided by n), symmetric.
    """
    eta, stack = _path(times, matrices)
    total = cumulative_trapezoid(stack, eta, axis=0, initial=0.0)
    size = [np.linalg.norm(k @ a - a @ k, 2) for k, a in zip(stack, total, strict=True)]
    return 0.5 * cumulative_trapezoid(size, eta, initial=0.0)


def twin_degrees_of_freedom(fitted: ArrayLike, twin: ArrayLike, probe: ArrayLike, delta: float) -> np.ndarray:
    r"""Return :math:`\langle b, f(y+\delta b) - f(y)\rangle/\delta`, the degrees of freedom of any training, from a twin run.

    Parameters
    ----------
    fitted, twin : (k, n)
        Fitted values along the run on y, and along the twin on y + δb with the same seed.
    probe : (n,)
        b, random signs.
    delta : float
        δ.

    Example
    -------
    >>> y, b = np.ones(3), np.array([1.0, -1.0, 1.0])
    >>> float(twin_degrees_of_freedom(y / 2, (y + 0.1 * b) / 2, b, 0.1).round(9))    # shrinks all by half: 3/2
    1.5
    """
    one, other, b = (np.asarray(v, dtype=np.float64) for v in (fitted, twin, probe))
    if one.shape != other.shape or one.shape[-1:] != b.shape:
        raise InputError(f"fitted is {one.shape}, its twin {other.shape} and the probe {b.shape}: looks and texts must agree.")
    return (other - one) @ b / require_positive("delta", delta)


def twin_risk(residual: ArrayLike, degrees_of_freedom: ArrayLike, sigma: float, n: int) -> np.ndarray:
    r"""Return :math:`\|y-f\|_n^2 - \sigma^2 + 2\sigma^2\,\mathrm{df}/n`, Stein's estimate of the in-sample risk: (k,)."""
    s2 = require_positive("sigma", sigma) ** 2
    free = np.asarray(degrees_of_freedom, dtype=np.float64)
    return np.asarray(residual, dtype=np.float64) - s2 + 2 * s2 * free / require_positive("n", n)


def _path(times: ArrayLike, matrices: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    eta, stack = np.asarray(times, dtype=np.float64), np.asarray(matrices, dtype=np.float64)
    if stack.ndim != 3 or eta.shape != stack.shape[:1] or eta[0] != 0 or (np.diff(eta) <= 0).any():
        raise InputError(
            f"times is {eta} and the kernels have shape {stack.shape}: give k increasing times from 0 and (k, n, n) kernels."
        )
    return eta, stack
