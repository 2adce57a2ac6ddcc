r"""The path on n texts as told by a kernel of m of them, and what the rules need beside it.

With :math:`s_j` the filter and :math:`q = \frac1m\sum_j(1-s_j)^2`, the training error on n texts is in expectation
:math:`\|y-f_\eta\|_m^2 + \sigma^2 (1-\tfrac mn)(1-q)`, if bias and filter are the same on n texts as on m.

Source: the book's page "Stopping on your own data", section "A part of the texts speaks for all" (eq-pr-part).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkft.descent import Descent
from ntkft.errors import InputError
from ntkft.files import sha256_text
from ntkft.ntk import Kernel
from ntkft.spectrum import require_positive
from ntkft.stopping import StoppingTime, gcv_rule, time_grid
from ntkft.tasks import Task

__all__ = ["WholePath", "guarded_gcv", "kernel_rows", "noise_level"]


class WholePath(Descent):
    """The path on n texts, as the m texts of its kernel tell it (equation in the module's docstring): a Descent for the rules."""

    def __init__(self, part: Descent, n: int, sigma: float) -> None:
        super().__init__(part.eigenvalues, part.vectors, part.y, part.f0, part.step_size, part.kernel_means)
        self._whole, self._s2 = n, sigma**2

    @property
    def n(self) -> int:
        """Number of texts that will be trained on."""
        return self._whole

    def residual(self, eta: Any) -> np.ndarray:
        """Return the expected training error on all n texts."""
        m = len(self.y)
        left = ((1 - self.filter(eta)) ** 2).sum(-1) - (self.kernel_means is not None)  # the constant is fitted
        return super().residual(eta) + self._s2 * (1 - m / self._whole) * (1 - left / m)


def kernel_rows(kernel: Kernel, task: Task) -> np.ndarray:
    """Return which texts of the task the kernel's rows are."""
    where = {sha256_text(text): i for i, text in enumerate(task.texts)}
    if not kernel.square or kernel.scores.ndim != 1:
        raise InputError(f"The kernel is {kernel!r} with scores {kernel.scores.shape}: give the square kernel of one output.")
    if not kernel.texts and kernel.n == len(task):
        return np.arange(kernel.n)  # made by hand: the order is the caller's word
    missing = sum(sha not in where for sha in kernel.texts) if kernel.texts else kernel.n
    if missing:
        raise InputError(
            f"{missing} of the kernel's {kernel.n} texts are not among the task's {len(task)}: compute the task's own kernel."
        )
    return np.array([where[sha] for sha in kernel.texts])


def guarded_gcv(descent: Descent) -> StoppingTime:
    """GCV among the times that spend at most half of the degrees of freedom: beyond, its quotient tends to 0/0."""
    stop = gcv_rule(descent)
    if descent.degrees_of_freedom(stop.eta) <= descent.n / 2:
        return stop
    grid = np.concatenate([[0.0], time_grid(descent)])
    share = descent.degrees_of_freedom(grid) / descent.n
    score = np.where(share <= 0.5, descent.residual(grid) / np.maximum(1 - share, 0.5) ** 2, np.inf)
    return StoppingTime(float(grid[np.argmin(score)]), "gcv", {"edge": "half of the degrees of freedom"})


def noise_level(descent: Descent, task: Task, sigma: float | None) -> tuple[float, str]:
    """Return the noise level and where it is from."""
    if sigma is not None:
        return require_positive("sigma", sigma), "given"
    if task.noise_variance is not None and task.noise_variance > 0:
        return task.noise_variance**0.5, "given" if task.ratings is None else "measured from single ratings"
    eta = guarded_gcv(descent).eta
    variance = float(descent.residual(eta)) / (1 - float(descent.degrees_of_freedom(eta)) / descent.n)
    return max(variance, 1e-300) ** 0.5, "estimated"
