r"""Two classical measures of dependence to compare with: correlation, and correlation of distances.

Claim: correlations of the coordinates miss every dependence that is not linear; distance correlation is zero, for the whole
population, only under independence, and costs n² distances.

Source: Székely, Rizzo & Bakirov 2007 for the second.

Example
-------
>>> z = torch.linspace(-1, 1, 101, dtype=torch.float64)
>>> round(abs(float(pearson(z, z**2))), 6), bool(distance_correlation(z, z**2) > 0.4)
(0.0, True)
"""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ntkft.infomin.slices import as_pair, standardise


def pearson(z: Tensor | ArrayLike, t: Tensor | ArrayLike) -> Tensor:
    """Return the largest absolute correlation between a coordinate of z (n, d) and one of t (n,) or (n, q); differentiable."""
    a, b = as_pair(z, t)
    return (standardise(a).T @ standardise(b) / len(a)).abs().max()


def distance_correlation(z: Tensor | ArrayLike, t: Tensor | ArrayLike) -> Tensor:
    r"""Return the distance correlation of z (n, d) and t (n,) or (n, q), between 0 and 1; differentiable.

    With A, B the matrices of pairwise distances, centred in rows and columns, it is
    :math:`[\langle A,B\rangle/(\norm{A}\norm{B})]^{1/2}`; 0 if one of the two is constant.
    """
    a, b = (_centred_distances(x) for x in as_pair(z, t))
    scale = (a**2).mean() * (b**2).mean()
    if float(scale.detach()) <= 0:
        return 0.0 * (a * b).mean()
    # Σ AB >= 0 (a V-statistic of a squared norm); the clamp only removes rounding.
    return ((a * b).mean().clamp(min=1e-300) / scale.sqrt()).sqrt()


def _centred_distances(x: Tensor) -> Tensor:
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    same = squared == 0
    distance = torch.where(same, 0.0, torch.where(same, 1.0, squared).sqrt())  # the root has no slope at 0
    return distance - distance.mean(0) - distance.mean(1, keepdim=True) + distance.mean()
