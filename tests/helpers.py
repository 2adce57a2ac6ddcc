"""Small things that several tests need."""

from __future__ import annotations

import numpy as np

from ntkft import Descent


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Frobenius norm of the difference, relative to `b`."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def relabelled(descent: Descent, y: np.ndarray) -> Descent:
    """The same kernel with other labels, without a second eigendecomposition."""
    return Descent(
        descent.eigenvalues, descent.vectors, y, descent.f0, descent.step_size, descent.kernel_means
    )
