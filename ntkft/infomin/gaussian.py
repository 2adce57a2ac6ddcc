r"""Mutual information of Gaussian vectors: what a toy is judged by.

Claim: for jointly Gaussian Z and T with canonical correlations :math:`\rho_i`,
:math:`I(Z;T) = -\tfrac12\sum_i \log(1-\rho_i^2)`, in nats.

Source: the book's chapter "Adversaries", eq-av-gaussian; Hotelling 1936 for the correlations.

Example
-------
>>> c = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
>>> round(float(gaussian_information(c, 1)), 4)                              # -0.5 log(1 - 0.36)
0.2231
"""

from __future__ import annotations

import torch
from torch import Tensor

from ntkft.errors import InputError


def gaussian_information(covariance: Tensor, d: int) -> Tensor:
    """Return I(Z; T) in nats for the joint covariance (d + q, d + q) of (Z, T); differentiable.

    Directions of Z or T without variance carry no information and are left out.

    Raises
    ------
    InputError
        If the matrix is not square, d does not split it, or it is not positive semidefinite; infinite information gives ``inf``.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or not 0 < d < len(covariance):
        raise InputError(
            f"The covariance has shape {tuple(covariance.shape)} and Z {d} coordinates: pass the joint covariance of (Z, T)."
        )
    c = covariance.double()
    if not bool(torch.isfinite(c).all()) or float(torch.linalg.eigvalsh(c.detach())[0]) < -1e-9 * float(
        c.detach().abs().max()
    ):
        raise InputError(
            "The covariance has a negative eigenvalue or entries that are not finite: is it symmetric, and from one sample?"
        )
    basis = torch.block_diag(_range(c[:d, :d]), _range(c[d:, d:]))
    r = int((basis[:d].abs().sum(0) > 0).sum())
    c = basis.T @ c @ basis
    parts = torch.linalg.slogdet(c[:r, :r])[1] + torch.linalg.slogdet(c[r:, r:])[1]
    sign, whole = torch.linalg.slogdet(c)
    return 0.5 * (parts - whole) if float(sign.detach()) > 0 else torch.full((), float("inf"), dtype=c.dtype)


def _range(c: Tensor) -> Tensor:
    """Return orthonormal columns that span the directions with variance; a basis only, so nothing is differentiated."""
    values, vectors = torch.linalg.eigh(c.detach())
    return vectors[:, values > 1e-12 * max(float(values[-1]), 0.0)]
