r"""What an adversary that stops early cannot see.

Claim: an adversary that learns t from z by gradient descent up to kernel time η passes the part of t along the eigenvector
:math:`u_j` by the share :math:`s_j = 1-(1-\varepsilon\lambda_j)^{\eta/\varepsilon}`. A leak of power :math:`a_j^2` there moves
its score :math:`Q_\eta = \langle t, h_\eta\rangle_n` by :math:`s_ja_j^2`, among noise of standard deviation
:math:`\frac{\sigma^2}{n}(2\sum_k s_k^2)^{1/2}`. So the smallest leak that it reports grows like :math:`1/s_j`, which in the tail
is
:math:`1/(\eta\lambda_j)`.

Source: the book's chapter "Adversaries", thm-av-blind and thm-av-seen.

Example
-------
>>> lam = np.arange(1, 101) ** -2.0
>>> early = blindness(lam, eta=10.0, sigma=1.0)
>>> bool(early.detectable[49] > 50 * early.detectable[0])                    # rank 50 must leak far more than rank 1
True
>>> round(early.power_curve(0, [0.0]).item(), 3)                             # no leak: the false alarms
0.05
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from ntkft.descent import Descent
from ntkft.errors import InputError
from ntkft.infomin.chisquare import critical_value, upper_tail
from ntkft.spectrum import Spectrum, require_positive


@dataclass(frozen=True)
class Blindness:
    """Sight of an adversary stopped at η, one entry for each eigenvector, largest eigenvalue first.

    Attributes
    ----------
    shares : (n,)
        s_j, the part of a leak along u_j that it passes.
    null_mean, null_sd : float
        Of its score Q when there is no leak.
    undetected : (n,)
        A leak with a_j² below this has power below `power`, proved; inf where s_j = 0.
    detectable : (n,)
        a_j² at which the normal approximation has power `power`.
    detected : (n,)
        A leak with a_j² above this has at least power `power`, proved (Cantelli's inequality), for a test of level at most
        `alpha`.
    sigma, alpha, power : float
        What was asked.
    """

    shares: np.ndarray
    null_mean: float
    null_sd: float
    undetected: np.ndarray
    detectable: np.ndarray
    detected: np.ndarray
    sigma: float
    alpha: float
    power: float

    @cached_property
    def threshold(self) -> float:
        """The critical value of Q, in units of σ²/n: without a leak Q is above it with probability `alpha`."""
        return critical_value(self.alpha, self.shares)

    def power_curve(self, j: int, a2: ArrayLike) -> np.ndarray:
        """Return the exact power of the test of Q against leaks of power `a2` (k,) along eigenvector `j` (from 0)."""
        leaks = np.atleast_1d(np.asarray(a2, float))
        n = len(self.shares)
        shifts = np.zeros((len(leaks), n))
        shifts[:, j] = np.sqrt(n * leaks) / self.sigma
        return np.array([upper_tail(self.threshold, self.shares, shift) for shift in shifts])

    def normal_power(self, j: int, a2: ArrayLike) -> np.ndarray:
        """Return the same power with Q taken as normal: good if many directions have been learned, rough if few."""
        leaks, s = np.atleast_1d(np.asarray(a2, float)), self.shares[j]
        sd = np.sqrt(self.null_sd**2 + 4 * self.sigma**2 * s**2 * leaks / len(self.shares))
        return norm.sf((norm.isf(self.alpha) * self.null_sd - s * leaks) / sd)


def blindness(
    eigenvalues: ArrayLike | Spectrum,
    eta: float,
    sigma: float,
    n: int | None = None,
    alpha: float = 0.05,
    power: float = 0.9,
    *,
    step_size: float | None = None,
) -> Blindness:
    """Return what an adversary stopped at kernel time `eta` sees along each eigenvector.

    Parameters
    ----------
    eigenvalues : (r,) array or Spectrum
        Of K/n.
    eta : float
        Kernel time ε·steps.
    sigma : float
        Standard deviation of the noise in t.
    n : int, optional
        Number of samples, if some zero eigenvalues were left out.
    alpha, power : float
        False alarms of the test, and the power from which a leak counts as detected.
    step_size : float, optional
        ε of discrete descent, at most 1/λ_1; flow if None.

    Raises
    ------
    InputError
        If a number is out of its range, or there are more eigenvalues than samples.

    Example
    -------
    >>> sight = blindness([1.0, 0.5, 0.0], eta=2.0, sigma=1.0)
    >>> sight.shares.round(2).tolist(), sight.detected[2].item()
    ([0.86, 0.63, 0.0], inf)
    """
    values = (eigenvalues if isinstance(eigenvalues, Spectrum) else Spectrum(eigenvalues)).eigenvalues
    n = len(values) if n is None else n
    if n < len(values):
        raise InputError(
            f"There are {len(values)} eigenvalues and n is {n}: K/n has one for each sample, no more."
        )
    values = np.pad(values, (0, n - len(values)))
    if not 0 < alpha < power < 1:
        raise InputError(f"alpha is {alpha} and power {power}: they must satisfy 0 < alpha < power < 1.")
    if step_size is not None and step_size * values[0] > 1 + 1e-12:
        raise InputError(
            f"step_size is {step_size:.4g} and the theorem needs at most 1/λ_1 = {1 / values[0]:.4g}: take a smaller one."
        )
    require_positive("sigma", sigma)
    shares = filter_shares(values, require_positive("eta", eta), step_size)
    unit = sigma**2 / n
    squares = (shares**2).sum()
    null_sd = unit * np.sqrt(2 * squares)
    with np.errstate(divide="ignore"):
        unseen = np.where(shares > 0, (power - alpha) * 2 * unit * noise_spread(shares) / shares, np.inf)
    seen = _reached(shares, null_sd, unit, norm.isf(alpha), norm.isf(1 - power))
    sure = _reached(shares, null_sd, unit, np.sqrt((1 - alpha) / alpha), np.sqrt(power / (1 - power)))
    return Blindness(
        shares, unit * float(shares.sum()), float(null_sd), unseen, seen, sure, float(sigma), alpha, power
    )


def filter_shares(eigenvalues: np.ndarray, eta: float, step_size: float | None = None) -> np.ndarray:
    """Return s_j(η) by the book's own filter; see `Descent.filter`.

    Example
    -------
    >>> filter_shares(np.array([1.0, 0.5]), 2.0, step_size=1.0).tolist()
    [1.0, 0.75]
    """
    n = len(eigenvalues)
    zero = np.zeros(n)
    return Descent(eigenvalues, np.broadcast_to(0.0, (n, n)), zero, zero, step_size).filter(eta)


def noise_spread(shares: np.ndarray) -> np.ndarray:
    """Return N_j (n,): n/(2σ²N_j) bounds the density of the noise that the other directions add to the score (lem-av-density).

    Example
    -------
    >>> noise_spread(np.array([0.9, 0.4, 0.1])).round(3).tolist()               # of the two others, the geometric mean
    [0.2, 0.3, 0.6]
    """
    top = np.argsort(shares)[::-1][:3]
    spread = np.zeros(len(shares))
    for j in range(len(shares)):
        others = shares[top[top != j]]
        if len(others) >= 2:
            rest = (shares**2).sum() - shares[j] ** 2
            spread[j] = np.sqrt(rest) if 4 * others[0] ** 2 <= rest else np.sqrt(others[0] * others[1])
    return spread


def score(path: Descent, eta: ArrayLike) -> np.ndarray:
    """Return Q_η = ⟨t, h_η⟩_n, what the adversary on `path` (labels t, start 0) explains at `eta`: a number or (k,).

    Example
    -------
    >>> from ntkft.descent import descend
    >>> score(descend(np.diag([2.0, 2.0]), [1.0, 1.0], step_size=1.0), 1.0).item()
    1.0
    """
    return path.fitted(eta) @ path.y / path.n


def _reached(shares: np.ndarray, null_sd: float, unit: float, above: float, below: float) -> np.ndarray:
    """Return the least a² with s a² = above·sd_0 + below·sd_1, where sd_1² = sd_0² + 4 unit s² a² grows with the leak."""
    shift, swing = above * null_sd, below**2 * unit
    # Squared: (x - shift)² = below² (sd_0² + 4 unit s x) for x = s a², whose larger root is wanted for below > 0.
    half = shift + 2 * swing * shares
    root = half + np.sign(below) * np.sqrt(np.maximum(half**2 - shift**2 + (below * null_sd) ** 2, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(shares > 0, np.maximum(root, 0.0) / shares, np.inf)
