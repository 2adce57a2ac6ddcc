r"""When to stop: rules that turn a kernel into a training time.

All rules speak kernel time η, the sum of the step sizes. `StoppingTime` converts it to steps, and to epochs.

==================  ==============================  ===========================================
rule                needs                           idea
==================  ==============================  ===========================================
`rademacher_rule`   spectrum, σ, R                  bias bound meets variance bound (before any label)
`sure_rule`         labels, σ                       unbiased estimate of the risk curve
`gcv_rule`          labels                          the same without σ
`discrepancy_rule`  labels, σ                       stop when the training error reaches σ²
`holdout_rule`      labels, some of them given up   what practitioners do
`oracle_rule`       the truth                       the best time there is; for comparison only
==================  ==============================  ===========================================

Source: Raskutti, Wainwright & Yu 2014; Stein 1981; Craven & Wahba 1979; the book's chapter "When to stop".

Example
-------
>>> import numpy as np, ntkft
>>> spectrum = ntkft.Spectrum(1.0 / np.arange(1, 101) ** 2)
>>> stop = rademacher_rule(spectrum, sigma=0.5)
>>> stop.steps(step_size=0.5), round(stop.epochs(step_size=0.5, batch_size=16, n=100), 2)
(7, 1.12)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq, minimize_scalar

from ntkft.descent import Descent, check_labels, descend
from ntkft.errors import InputError
from ntkft.ntk import Kernel
from ntkft.spectrum import Spectrum, require_positive


@dataclass(frozen=True)
class StoppingTime:
    """A time to stop, in kernel time η, and what the rule knew.

    Example
    -------
    >>> StoppingTime(0.3, "by hand").epochs(step_size=0.01, batch_size=20, n=200)
    3.0
    """

    eta: float
    rule: str
    info: dict[str, Any] = field(default_factory=dict)

    def steps(self, step_size: float) -> int:
        """Return the number of gradient steps of size ε that fit into η: the last t with εt ≤ η."""
        # The tiny factor keeps 0.3/0.1 at 3 steps although it is 2.999... in floating point.
        return int(np.floor(self.eta / require_positive("step_size", step_size) * (1 + 1e-12)))

    def epochs(self, step_size: float, batch_size: int, n: int) -> float:
        """Return the number of passes over n texts in batches of `batch_size`: steps · B / n."""
        require_positive("batch_size", batch_size)
        require_positive("n", n)
        return self.steps(step_size) * batch_size / n


def rademacher_rule(spectrum: Spectrum, sigma: float, norm: float = 1.0) -> StoppingTime:
    r"""Stop at :math:`\hat\eta = 1/\hat\varepsilon_n^2`, the last time with :math:`\hat R(1/\sqrt\eta) \le R/(2e\sigma\eta)`.

    Parameters
    ----------
    spectrum : Spectrum
        Eigenvalues of K/n.
    sigma : float
        Noise level of the labels.
    norm : float
        R, a bound on the Hilbert norm of g* = f* - f0. The rule is as good as this guess.

    Raises
    ------
    InputError
        If sigma or norm is not positive, or the kernel is zero.

    Example
    -------
    >>> rademacher_rule(Spectrum([1.0, 0.1]), sigma=1.0).eta > 0
    True
    """
    radius = spectrum.critical_radius(sigma, norm)
    if radius == 0:
        raise InputError(
            f"All {len(spectrum)} eigenvalues are zero and no training moves this model: check the read-out."
        )
    return StoppingTime(
        radius**-2, "rademacher", {"radius": radius, "sigma": float(sigma), "norm": float(norm)}
    )


def sure_rule(descent: Descent, sigma: float) -> StoppingTime:
    r"""Minimise Stein's unbiased risk estimate, :math:`\|y-f_\eta\|_n^2 - \sigma^2 + 2\sigma^2\,\mathrm{tr}(I-S^t)/n`."""
    s2 = require_positive("sigma", sigma) ** 2

    def risk(eta: np.ndarray) -> np.ndarray:
        return descent.residual(eta) - s2 + 2 * s2 * descent.degrees_of_freedom(eta) / descent.n

    return _minimise(risk, descent, "sure", {"sigma": float(sigma)})


def gcv_rule(descent: Descent) -> StoppingTime:
    r"""Minimise generalised cross-validation, :math:`\|y-f_\eta\|_n^2 / (1-\mathrm{tr}(I-S^t)/n)^2`; σ is not needed."""

    def score(eta: np.ndarray) -> np.ndarray:
        free = 1 - descent.degrees_of_freedom(eta) / descent.n
        # Both sides vanish when everything is interpolated; there GCV says nothing, and must not win by 0/0.
        return np.where(free > 1e-3, descent.residual(eta) / np.maximum(free, 1e-3) ** 2, np.inf)

    return _minimise(score, descent, "gcv", {})


def discrepancy_rule(descent: Descent, sigma: float) -> StoppingTime:
    """Stop when the training error ‖y-f_η‖_n² has fallen to σ²: the rest is noise."""
    s2 = require_positive("sigma", sigma) ** 2
    grid = time_grid(descent)
    info: dict[str, Any] = {"sigma": float(sigma)}
    if float(descent.residual(0.0)) <= s2:
        return StoppingTime(
            0.0, "discrepancy", info | {"note": "the model fits to within σ² before training"}
        )
    if float(descent.residual(grid[-1])) > s2:
        return StoppingTime(
            float(grid[-1]), "discrepancy", info | {"note": "the training error never falls to σ²"}
        )
    excess = descent.residual(grid) - s2
    first = int(np.argmax(excess <= 0))
    low = float(grid[first - 1]) if first else 0.0
    if descent.step_size is not None:  # the path is a staircase: the first whole step below σ²
        steps = np.arange(np.floor(low / descent.step_size), np.ceil(grid[first] / descent.step_size) + 1)
        times = steps * descent.step_size
        return StoppingTime(float(times[np.argmax(descent.residual(times) <= s2)]), "discrepancy", info)
    eta = brentq(lambda e: float(descent.residual(e)) - s2, low, float(grid[first]), xtol=1e-14 * grid[first])
    return StoppingTime(float(eta), "discrepancy", info)


def holdout_rule(
    kernel: Kernel,
    y: ArrayLike,
    fraction: float = 0.2,
    patience: int = 3,
    *,
    every: float | None = None,
    seed: int = 0,
) -> StoppingTime:
    """Train on part of the texts, watch the rest, stop when it has not improved for `patience` looks.

    Parameters
    ----------
    kernel : Kernel
        Square, of all n texts.
    y : (n,)
        Labels.
    fraction : float
        Share of texts that are held out, and so not trained on.
    patience : int
        Looks without improvement before stopping; the best time so far is returned.
    every : float, optional
        Kernel time between two looks; by default 1/λ_1, one step of the largest comfortable size.
    seed : int
        Seed of the split.

    Returns
    -------
    StoppingTime
        ``info["kept"]`` are the indices trained on.
    """
    n = kernel.n
    labels = check_labels(y, n)
    held = round(fraction * n)
    if not 0 < held < n or patience < 1:
        raise InputError(
            f"fraction={fraction} holds out {held} of {n} texts with patience={patience}: hold out some, keep some."
        )
    order = np.random.default_rng(seed).permutation(n)
    out, kept = order[:held], order[held:]
    descent = descend(kernel.block(kept), labels[kept])
    cross = kernel.block(out, kept)
    gap = 1 / descent.eigenvalues[0] if every is None else require_positive("every", every)
    best, best_eta, waited, look, chunk = np.inf, 0.0, 0, 0, 64
    limit = time_grid(descent)[-1]
    while waited < patience and look * gap <= limit:
        times = np.arange(look, look + chunk) * gap
        errors = ((descent.predict(times, cross) - labels[out]) ** 2).mean(-1)
        for eta, error in zip(times, errors, strict=True):
            if error < best:
                best, best_eta, waited = float(error), float(eta), 0
            else:
                waited += 1
            if waited >= patience:
                break
        look, chunk = look + chunk, min(2 * chunk, 4096)
    return StoppingTime(
        best_eta,
        "holdout",
        {"held_out": held, "kept": kept.tolist(), "patience": patience, "every": gap, "seed": seed},
    )


def oracle_rule(
    descent: Descent,
    reference: ArrayLike,
    cross: Kernel | np.ndarray | None = None,
    f0: ArrayLike | None = None,
) -> StoppingTime:
    """Return the time of least error against the truth: on the training texts, or on those of `cross` if given."""
    count = descent.n if cross is None else len(cross.matrix if isinstance(cross, Kernel) else cross)
    truth = check_labels(reference, count, "reference")

    def error(eta: np.ndarray) -> np.ndarray:
        values = descent.fitted(eta) if cross is None else descent.predict(eta, cross, f0)
        return ((values - truth) ** 2).mean(-1)

    return _minimise(error, descent, "oracle", {})


def time_grid(descent: Descent, points: int = 400) -> np.ndarray:
    """Return geometrically spaced times from before anything is fitted to after everything is."""
    top = descent.eigenvalues[0]
    if top == 0:
        raise InputError("All eigenvalues are zero and no training moves this model: check the read-out.")
    smallest = descent.eigenvalues[descent.eigenvalues > 1e-9 * top][-1]
    return np.geomspace(1e-3 / top, 40 / smallest, points)


def _minimise(
    objective: Callable[[np.ndarray], np.ndarray], descent: Descent, rule: str, info: dict[str, Any]
) -> StoppingTime:
    """Minimise over η: a grid for the global shape, then Brent between the neighbours of its best point."""
    grid = np.concatenate([[0.0], time_grid(descent)])
    values = objective(grid)
    k = int(np.argmin(values))
    eta, value = float(grid[k]), float(values[k])
    if 0 < k < len(grid) - 1 and descent.step_size is None:
        fine = minimize_scalar(
            lambda u: float(objective(np.exp(u))),
            bounds=(np.log(max(grid[k - 1], grid[1] / 10)), np.log(grid[k + 1])),
            method="bounded",
            options={"xatol": 1e-8},
        )
        if fine.fun <= value:
            eta, value = float(np.exp(fine.x)), float(fine.fun)
    edge = {0: "start", len(grid) - 1: "end"}.get(k)
    return StoppingTime(eta, rule, info | {"minimum": value} | ({"edge": edge} if edge else {}))
