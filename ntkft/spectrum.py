r"""The eigenvalues of K/n, and everything that the theory reads off them alone.

Claim: the eigenvalues :math:`\lambda_1 \ge \dots \ge \lambda_n \ge 0`, the noise level σ and the size R of the
target fix a critical radius :math:`\hat\varepsilon_n`, and with it the time to stop,
:math:`\hat\eta = 1/\hat\varepsilon_n^2`. No labels are needed.

Source: Raskutti, Wainwright & Yu 2014 for the local empirical Rademacher complexity and the critical radius; the
book's chapter "When to stop" for the proofs.

Example
-------
>>> import numpy as np
>>> spectrum = Spectrum(1.0 / np.arange(1, 101) ** 2)
>>> radius = spectrum.critical_radius(sigma=0.5)
>>> bool(np.isclose(spectrum.rademacher(radius), radius**2 / (2 * np.e * 0.5)))
True
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ntkft.errors import InputError

NEGATIVE = 1e-6  # eigenvalues down to -NEGATIVE * λ_1 are rounding; below that the matrix is no kernel


def require_positive(name: str, value: float) -> float:
    """Return `value` as float, or raise `InputError` unless it is positive and finite."""
    if not np.isfinite(value) or value <= 0:
        raise InputError(
            f"{name} is {value} and must be a positive finite number: check its unit and its sign."
        )
    return float(value)


@dataclass(frozen=True)
class Decay:
    """A power law λ_j ≈ scale · j^(-exponent), fitted by least squares in log-log over ranks first..last."""

    exponent: float
    scale: float
    first: int
    last: int
    r_squared: float


class Spectrum:
    """The n eigenvalues of K/n, in descending order, as a function of which the stopping theory is written.

    Parameters
    ----------
    eigenvalues : (n,) array
        In any order. Tiny negative values (rounding) count as zero. All n of them: the zeros matter,
        because R̂ averages over n.

    Raises
    ------
    InputError
        If there is none, one is not finite, or one is clearly negative.
    """

    def __init__(self, eigenvalues: ArrayLike) -> None:
        values = np.sort(np.asarray(eigenvalues, dtype=np.float64).ravel())[::-1]
        if values.size == 0 or not np.isfinite(values).all():
            raise InputError(
                f"A spectrum needs at least one eigenvalue, all finite, and got {values.size} with "
                f"{int((~np.isfinite(values)).sum())} not finite: check the kernel."
            )
        if values[-1] < -NEGATIVE * max(values[0], 0.0) and values[-1] < 0:
            raise InputError(
                f"The smallest eigenvalue is {values[-1]:.3g} beside a largest of {values[0]:.3g}, and a kernel has "
                "none below zero: check that the matrix is a symmetric kernel."
            )
        self.eigenvalues = np.clip(values, 0.0, None)
        self.eigenvalues.flags.writeable = False

    def __len__(self) -> int:
        return self.eigenvalues.size

    def __repr__(self) -> str:
        return f"Spectrum(n={len(self)}, λ_1={self.eigenvalues[0]:.4g}, trace={self.eigenvalues.sum():.4g})"

    def rademacher(self, eps: ArrayLike) -> np.ndarray | float:
        r"""Local empirical Rademacher complexity.

        It is :math:`\hat R(\varepsilon) = [\frac1n\sum_j \min(\lambda_j, \varepsilon^2)]^{1/2}`.
        `eps` may be a number or an array; the result has its shape.
        """
        eps = np.asarray(eps, dtype=np.float64)
        value = np.sqrt(np.minimum(self.eigenvalues, eps[..., None] ** 2).mean(-1))
        return float(value) if value.ndim == 0 else value

    def critical_radius(self, sigma: float, norm: float = 1.0) -> float:
        r"""Return :math:`\hat\varepsilon_n`, the smallest ε > 0 with :math:`\hat R(\varepsilon) \le \varepsilon^2 R/(2e\sigma)`.

        R̂(ε)/ε² falls strictly in ε, so there is one crossing; it is found by bisection, until the bracket holds no
        further floating-point number.

        Parameters
        ----------
        sigma : float
            Noise level (standard deviation of y about f*), in the unit of y.
        norm : float
            R, a bound on the norm of the target g* in the kernel's Hilbert space.

        Returns
        -------
        float
            The radius; 0.0 if all eigenvalues are zero.
        """
        c = require_positive("norm", norm) / (2 * np.e * require_positive("sigma", sigma))
        top = float(self.eigenvalues[0])
        if top == 0:
            return 0.0

        # In logarithms, so that spectra of any scale work. R̂² ≤ min(ε², mean λ) gives an upper bracket.
        log_c, mean = np.log(c), float(self.eigenvalues.mean())
        high = 0.5 * (0.5 * np.log(mean) - log_c)  # from R̂ ≤ √mean
        low = high
        while self._log_rademacher(low) - 2 * low <= log_c:
            low -= 1.0
        while True:
            middle = 0.5 * (low + high)
            if not low < middle < high:
                return float(np.exp(high))
            if self._log_rademacher(middle) - 2 * middle <= log_c:
                high = middle
            else:
                low = middle

    def _log_rademacher(self, log_eps: float) -> float:
        """Return log R̂(e^log_eps), scaled by ε² so that a tiny ε does not underflow."""
        ratio = np.exp(np.minimum(np.log(np.maximum(self.eigenvalues, 1e-300)) - 2 * log_eps, 0.0))
        return log_eps + 0.5 * float(np.log(np.where(self.eigenvalues > 0, ratio, 0.0).mean()))

    def effective_dimension(self, eta: ArrayLike) -> np.ndarray | float:
        r"""Return :math:`\sum_j \eta\lambda_j/(1+\eta\lambda_j)`, the degrees of freedom of ridge with ν = 1/η.

        Gradient flow at kernel time η has between 1 and 1.30 times as many; see the chapter on kernel descent.
        """
        eta = np.asarray(eta, dtype=np.float64)
        product = eta[..., None] * self.eigenvalues
        value = (product / (1 + product)).sum(-1)
        return float(value) if value.ndim == 0 else value

    def decay(self, first: int = 10, last: int | None = None) -> Decay:
        """Fit a power law to the eigenvalues of ranks `first`..`last` (by default 10..n/4, at least 3 ranks)."""
        last = max(len(self) // 4, first + 2) if last is None else last
        positive = int((self.eigenvalues > 0).sum())
        if not 1 <= first < last - 1 <= positive - 1:
            raise InputError(
                f"Ranks {first}..{last} are asked for and there are {positive} positive eigenvalues: "
                "choose at least three ranks among them."
            )
        rank = np.arange(first, last + 1)
        x, y = np.log(rank), np.log(self.eigenvalues[first - 1 : last])
        slope, intercept = np.polyfit(x, y, 1)
        left = y - (slope * x + intercept)
        r_squared = 1 - float(left @ left) / max(float(((y - y.mean()) ** 2).sum()), 1e-300)
        return Decay(-float(slope), float(np.exp(intercept)), first, last, r_squared)
