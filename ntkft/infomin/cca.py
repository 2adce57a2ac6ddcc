r"""Canonical correlations with a ridge: the largest correlation of linear functions of two feature vectors, in closed form.

Claim: :math:`\max_{w,v} w^\top C_{ab} v` subject to :math:`w^\top(C_{aa}+\kappa I)w = v^\top(C_{bb}+\kappa I)v = 1` is the
largest singular value of :math:`(C_{aa}+\kappa I)^{-1/2} C_{ab} (C_{bb}+\kappa I)^{-1/2}`. Where that value is simple, its
gradient is that of the correlation with the best weights held fixed.

Source: the book's chapter "Adversaries", prop-av-cca and prop-av-envelope; Hotelling 1936.

Example
-------
>>> a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
>>> canonical(a, a[:, :1] + a[:, 1:], ridge=1e-9).correlations.round(decimals=6).tolist()
[1.0]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntkft.errors import InputError


@dataclass(frozen=True)
class Canonical:
    """Ridge correlations (k,), descending, and their weights w (p, k) and v (q, k), with k = min(p, q)."""

    correlations: Tensor
    w: Tensor
    v: Tensor


def covariances(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return C_aa (p, p), C_ab (p, q) and C_bb (q, q) of samples (n, p) and (n, q), divided by n."""
    a, b = a - a.mean(0), b - b.mean(0)
    return a.T @ a / len(a), a.T @ b / len(a), b.T @ b / len(a)


def canonical(a: Tensor, b: Tensor, ridge: float) -> Canonical:
    """Return all ridge canonical correlations of features (n, p) and (n, q) with their weights; float64, differentiable.

    Raises
    ------
    InputError
        If `ridge` is negative, or so small that a covariance is singular.

    Example
    -------
    >>> x = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    >>> float(canonical(x, -x, ridge=0.0).correlations.round(decimals=6))
    1.0
    """
    if not ridge >= 0 or ridge == float("inf"):
        raise InputError(f"ridge is {ridge} and must be a finite number >= 0.")
    c_aa, c_ab, c_bb = covariances(a.double(), b.double())
    root_a, root_b = _root(c_aa, ridge), _root(c_bb, ridge)
    # L_a^{-1} C_ab L_b^{-T} has the singular values of the symmetric form: the two differ by rotations.
    white = torch.linalg.solve_triangular(root_a, c_ab, upper=False)
    white = torch.linalg.solve_triangular(root_b, white.T, upper=False).T
    left, values, right = torch.linalg.svd(white, full_matrices=False)
    w = torch.linalg.solve_triangular(root_a.T, left, upper=True)
    v = torch.linalg.solve_triangular(root_b.T, right.T, upper=True)
    return Canonical(values, w, v)


def _root(covariance: Tensor, ridge: float) -> Tensor:
    identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    root, failed = torch.linalg.cholesky_ex(covariance + ridge * identity)
    # Rounding can leave a singular matrix barely positive: its smallest pivot is then about machine precision.
    pivots, sizes = root.detach().diagonal() ** 2, covariance.detach().diagonal() + ridge
    if int(failed) or float(pivots.min()) < 1e-13 * float(sizes.max()):
        raise InputError(
            f"A covariance of {len(covariance)} features is singular with ridge {ridge:.2g} (constant, doubled, or more "
            "features than samples): raise the ridge."
        )
    return root


def correlation(x: Tensor, y: Tensor, ridge_x: Tensor | float = 0.0, ridge_y: Tensor | float = 0.0) -> Tensor:
    """Return the correlation of two samples (n,), the variances increased by the ridges; 0 if one is constant. Differentiable.

    Example
    -------
    >>> float(correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])))
    -1.0
    """
    x, y = x - x.mean(), y - y.mean()
    scale = ((x**2).mean() + ridge_x) * ((y**2).mean() + ridge_y)
    if float(scale.detach()) <= 0:
        return 0.0 * ((x * y).mean())  # stays in the graph
    return (x * y).mean() / scale.sqrt()


def top_correlation(a: Tensor, b: Tensor, ridge: float, *, fixed_weights: bool = True) -> Tensor:
    r"""Return the largest ridge correlation of features (n, p), (n, q) as a scalar that can be differentiated.

    Parameters
    ----------
    fixed_weights : bool
        Differentiate with the best weights held fixed (the envelope; cheap and defined even where two correlations are equal), or
        through the whole decomposition. Where the largest correlation is simple, the two gradients are equal.
    """
    if not fixed_weights:
        return canonical(a, b, ridge).correlations[0]
    with torch.no_grad():
        best = canonical(a, b, ridge)
        w, v = best.w[:, 0], best.v[:, 0]
    return correlation(a @ w, b @ v, ridge * (w @ w), ridge * (v @ v))
