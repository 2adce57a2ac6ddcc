r"""Gradient descent on the linearised model, in closed form.

Claim: gradient descent on :math:`\frac1{2n}\sum_i (f(x_i)-y_i)^2` with step size ε passes the labels through a filter,

.. math:: f_t = f_0 + U(I - S^t)U^\top (y - f_0), \qquad S^t = \mathrm{diag}((1-\varepsilon\lambda_j)^t),

with :math:`K/n = U\Lambda U^\top`. In kernel time η = εt its limit for small steps, gradient flow, has
:math:`1 - e^{-\eta\lambda_j}`. So a whole training run, at any time, costs one eigendecomposition.

Source: the book's chapter "Gradient descent is a filter"; Yao, Rosasco & Caponnetto 2007.

Example
-------
>>> import numpy as np
>>> descent = descend(np.diag([2.0, 0.2]), y=[1.0, 1.0])     # K/n has eigenvalues 1 and 0.1
>>> descent.fitted(1.0).round(3)
array([0.632, 0.095])
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ntkft.errors import InputError
from ntkft.ntk import Kernel
from ntkft.spectrum import Spectrum, require_positive


def descend(
    kernel: Kernel | np.ndarray,
    y: ArrayLike,
    f0: ArrayLike | None = None,
    *,
    step_size: float | None = None,
    intercept: bool = False,
) -> Descent:
    """Prepare the closed-form path of gradient descent on labels `y`.

    Parameters
    ----------
    kernel : Kernel or (n, n) array
        Unnormalised kernel between the training texts.
    y : (n,) array
        Labels, in the kernel's order.
    f0 : (n,) array, optional
        Scores before training; by default the kernel's own, and zero for a bare array.
    step_size : float, optional
        ε of discrete gradient descent, below 2/λ_1; gradient flow if None.
    intercept : bool
        Fit a free constant beside the model: the path of the centred kernel HKH/n, H = I - 11'/n, with the mean
        residual fitted outright. The constant mode, often λ_1, is then out of the way of the step size.

    Returns
    -------
    Descent

    Raises
    ------
    InputError
        If counts differ, labels are not finite, the kernel is not square, or the step size makes descent diverge.
    """
    if isinstance(kernel, Kernel):
        if not kernel.square:
            raise InputError(
                f"descend needs the square kernel of the training texts and got {kernel!r}: pass kernel.block(rows)."
            )
        matrix = kernel.matrix
        start = kernel.scores if f0 is None else f0
    else:
        matrix = np.asarray(kernel, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"The kernel matrix has shape {matrix.shape} and must be square: pass k(X, X).")
        start = np.zeros(len(matrix)) if f0 is None else f0
    n = matrix.shape[0]
    labels, scores = check_labels(y, n), check_labels(start, n, "f0")
    means = matrix.mean(0) if intercept else None
    if means is not None:
        matrix = matrix - means - means[:, None] + means.mean()
    values, vectors = np.linalg.eigh((matrix + matrix.T) / (2 * n))
    eigenvalues = Spectrum(values).eigenvalues  # descending, checked, clipped
    if step_size is not None:
        require_positive("step_size", step_size)
        if step_size * eigenvalues[0] >= 2:
            raise InputError(
                f"step_size is {step_size:.4g} and descent diverges from 2/λ_1 = {2 / eigenvalues[0]:.4g} on: take a smaller one."
            )
    return Descent(eigenvalues, vectors[:, ::-1], labels, scores, step_size, means)


def check_labels(y: ArrayLike, n: int, name: str = "y") -> np.ndarray:
    """Return `y` as (n,) float64, or raise `InputError` naming both counts or the bad entries."""
    labels = np.asarray(y, dtype=np.float64)
    if labels.shape != (n,):
        count = f"{labels.size} labels" if labels.ndim == 1 else f"shape {labels.shape}"
        raise InputError(
            f"The kernel is for {n} texts and {name} has {count}: pass one number per text, in the kernel's order."
        )
    bad = np.flatnonzero(~np.isfinite(labels))
    if bad.size:
        raise InputError(
            f"{bad.size} of {n} entries of {name} are not finite, first at index {bad[0]}: drop those texts."
        )
    return labels


class Descent:
    """The path of gradient descent from f0 towards y; made by `descend`.

    Times are kernel time η (a number, or an array of k numbers; results then have a leading axis k).

    Attributes
    ----------
    eigenvalues : (n,)
        λ_j of K/n, descending.
    vectors : (n, n)
        U, one eigenvector per column.
    y, f0 : (n,)
        Labels, and scores before training.
    step_size : float or None
        ε; None for gradient flow.
    kernel_means : (n,) or None
        Column means of the kernel matrix if a free intercept is fitted, else None.
    """

    def __init__(
        self,
        eigenvalues: np.ndarray,
        vectors: np.ndarray,
        y: np.ndarray,
        f0: np.ndarray,
        step_size: float | None = None,
        kernel_means: np.ndarray | None = None,
    ) -> None:
        self.eigenvalues, self.vectors, self.y, self.f0, self.step_size = (
            eigenvalues,
            vectors,
            y,
            f0,
            step_size,
        )
        self.kernel_means = kernel_means
        self._offset = 0.0 if kernel_means is None else float((y - f0).mean())
        self._z = vectors.T @ (y - f0 - self._offset)  # (n,) the target in the eigenbasis

    def __repr__(self) -> str:
        return (
            f"Descent(n={self.n}, {'flow' if self.step_size is None else f'step_size={self.step_size:.4g}'})"
        )

    @property
    def n(self) -> int:
        """Number of training texts."""
        return len(self.y)

    @property
    def spectrum(self) -> Spectrum:
        """The eigenvalues of K/n."""
        return Spectrum(self.eigenvalues)

    def _log_survival(self, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log|1-ελ|^t and its sign, (..., n): what is left of each eigenvector's residual at time η."""
        if self.step_size is None:
            exponent = -eta[..., None] * self.eigenvalues
            return exponent, np.ones_like(exponent)
        t = np.floor(eta / self.step_size * (1 + 1e-12))[..., None]  # only whole steps exist
        factor = 1 - self.step_size * self.eigenvalues
        with np.errstate(divide="ignore"):  # 1-ελ = 0: all is fitted in one step
            log_factor = np.where(
                factor > 0,
                np.log1p(-np.minimum(self.step_size * self.eigenvalues, 1.0)),
                np.log(np.abs(factor)),
            )
        exponent = np.where(t > 0, t * np.where(t > 0, log_factor, 0.0), 0.0)
        return exponent, np.where((factor < 0) & (t % 2 == 1), -1.0, 1.0)

    def filter(self, eta: ArrayLike) -> np.ndarray:
        """Return the share of each eigenvector fitted at η, 1-(1-ελ_j)^t or 1-exp(-ηλ_j): (n,) or (k, n)."""
        exponent, sign = self._log_survival(_times(eta))
        return np.where(sign > 0, -np.expm1(exponent), 1 + np.exp(exponent))

    def fitted(self, eta: ArrayLike) -> np.ndarray:
        """Return the fitted values f_η(x_i) on the training texts: (n,) or (k, n)."""
        return self.f0 + self._offset + (self.filter(eta) * self._z) @ self.vectors.T

    def residual(self, eta: ArrayLike) -> np.ndarray:
        """Return the training error ‖y - f_η‖_n² (mean of squares): a number or (k,)."""
        left = 1 - self.filter(eta)
        return ((left * self._z) ** 2).mean(-1)

    def degrees_of_freedom(self, eta: ArrayLike) -> np.ndarray:
        """Return tr(I - S^t) = Σ_j filter_j, and one more for an intercept: a number or (k,)."""
        return self.filter(eta).sum(-1) + (self.kernel_means is not None)

    def coefficients(self, eta: ArrayLike) -> np.ndarray:
        r"""Return α_η (n,) or (k, n) with f_η(x) = f0(x) + Σ_i k(x, x_i) α_i.

        The weights are (1-(1-ελ_j)^t)/λ_j, with the limit η at λ_j = 0: nothing is divided by zero.
        """
        times = _times(eta)
        if self.step_size is not None:
            times = np.floor(times / self.step_size * (1 + 1e-12)) * self.step_size
        share = self.filter(eta)
        safe = np.where(self.eigenvalues > 0, self.eigenvalues, 1.0)
        weights = np.where(self.eigenvalues > 0, share / safe, times[..., None])
        return (weights * self._z) @ self.vectors.T / self.n

    def predict(self, eta: ArrayLike, cross: Kernel | np.ndarray, f0: ArrayLike | None = None) -> np.ndarray:
        """Return f_η on new texts: (m,) or (k, m).

        Parameters
        ----------
        eta : float or (k,)
            Kernel time.
        cross : Kernel or (m, n) array
            k(new texts, training texts), unnormalised.
        f0 : (m,) array, optional
            Scores of the new texts before training; by default those of `cross`, and zero for a bare array.
        """
        matrix = cross.matrix if isinstance(cross, Kernel) else np.asarray(cross, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[1] != self.n:
            raise InputError(
                f"cross has shape {matrix.shape} and the descent has {self.n} training texts: "
                "rows are new texts, columns the training texts in order."
            )
        if f0 is None:
            f0 = cross.scores if isinstance(cross, Kernel) else np.zeros(len(matrix))
        start = check_labels(f0, len(matrix), "f0")
        alpha = self.coefficients(eta)  # (n,) or (k, n)
        if self.kernel_means is None:
            return start + alpha @ matrix.T
        # The intercept makes the fit's mean over the training texts that of y, at every time.
        return start + self._offset + alpha @ matrix.T - (alpha @ self.kernel_means)[..., None]

    def bias2(self, eta: ArrayLike, target: ArrayLike) -> np.ndarray:
        """Return the squared bias ‖E f_η - f*‖_n² for the true values `target` (n,): a number or (k,)."""
        g = check_labels(target, self.n, "target") - self.f0
        if self.kernel_means is not None:
            g = g - g.mean()
        g = self.vectors.T @ g
        return (((1 - self.filter(eta)) * g) ** 2).mean(-1)

    def variance(self, eta: ArrayLike, sigma: float) -> np.ndarray:
        """Return E‖f_η - E f_η‖_n² = σ²/n Σ_j filter_j² for labels with noise level `sigma`: a number or (k,)."""
        free = (self.filter(eta) ** 2).sum(-1) + (self.kernel_means is not None)
        return require_positive("sigma", sigma) ** 2 * free / self.n

    def hilbert_norm(self, values: ArrayLike, floor: float = 1e-10) -> float:
        """Return the norm of the smallest function of the kernel's Hilbert space through `values` (n,).

        It is [Σ_j θ_j²/λ_j]^{1/2} with θ = Uᵀ values/√n. Directions with λ_j below `floor`·λ_1 count as null; values
        with a part there belong to no function of the space, and the result is infinite.
        """
        checked = check_labels(values, self.n, "values")
        if self.kernel_means is not None:  # the intercept takes the mean, at no cost
            checked = checked - checked.mean()
        theta2 = (self.vectors.T @ checked) ** 2 / self.n
        real = self.eigenvalues > floor * self.eigenvalues[0]
        if theta2[~real].sum() > 1e-12 * max(theta2.sum(), 1e-300):
            return float("inf")
        return float(np.sqrt((theta2[real] / self.eigenvalues[real]).sum()))


def _times(eta: ArrayLike) -> np.ndarray:
    times = np.asarray(eta, dtype=np.float64)
    if np.isnan(times).any() or (times < 0).any():
        raise InputError(f"eta is {times} and kernel time runs from 0: pass a number >= 0.")
    return times
