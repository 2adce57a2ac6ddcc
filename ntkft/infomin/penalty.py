r"""The dependence of a representation on an attribute, from random slices; as a number and as a term of a loss.

Claim: the largest correlation between linear functions of all features of z and all features of t is at least the largest over
pairs of slices, is zero exactly if all these features are uncorrelated, and needs one decomposition instead of an adversary.

Source: the book's chapter "Adversaries", prop-av-joint; Chen, Sun, Li & Weller 2022.

Example
-------
>>> g = torch.Generator().manual_seed(0)
>>> x, t = torch.randn(256, 2, generator=g), torch.randn(256, generator=g)
>>> encoder = torch.nn.Linear(2, 2)
>>> loss = SliceDependence(slices=10, degree=3)(encoder(x), t)               # add it, times beta, to the loss of the task
>>> loss.backward()
"""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ntkft.errors import InputError
from ntkft.infomin import slices as sl
from ntkft.infomin.cca import canonical, correlation, top_correlation

SMALLEST_PART = 4  # samples in each half; a correlation of fewer says nothing


def slice_dependence(
    z: Tensor | ArrayLike,
    t: Tensor | ArrayLike,
    slices: int = 100,
    degree: int = 5,
    ridge: float = 1e-2,
    seed: int = 0,
    *,
    heldout: bool = False,
    fixed_weights: bool = True,
    whiten: bool = False,
) -> Tensor:
    """Return the largest correlation between the slice features of z (n, d) and of t (n,) or (n, q): a scalar tensor.

    Parameters
    ----------
    slices, degree, seed : int
        Random slices of each side, powers of each, and the seed of slices and split.
    ridge : float
        κ, in the unit of the features' variance, which is 1.
    heldout : bool
        Find the weights on a random half and report the correlation on the other one: the mean is 0 for independent samples.
        Without it the sample is used twice, and p features give a dependence of about (p/n)^(1/2) to nothing at all.
    fixed_weights : bool
        How the gradient with respect to z is taken; see `cca.top_correlation`.
    whiten : bool
        Draw the slices of z uniformly after whitening it, so that a coordinate of small variance is heard like any other.

    Raises
    ------
    InputError
        Bad shapes, entries that are not finite, integer classes that are not one-hot, too few samples.

    Example
    -------
    >>> z = torch.linspace(-2, 2, 80, dtype=torch.float64)
    >>> round(float(slice_dependence(z, z**2, slices=5, degree=1)), 3)       # a parabola has no linear part
    0.0
    >>> round(float(slice_dependence(z, z**2, slices=5, degree=2)), 1)
    1.0
    """
    first, second = sl.as_pair(z, t)
    a = sl.features(first, sl.draw(first, slices, seed, whiten=whiten), degree)
    b = sl.features(second, sl.directions(second.shape[1], slices, seed + 1), degree)
    if not heldout:
        return top_correlation(a, b, ridge, fixed_weights=fixed_weights)
    one, two = halves(len(a), seed)
    if fixed_weights:
        with torch.no_grad():
            best = canonical(a[one], b[one], ridge)
    else:
        best = canonical(a[one], b[one], ridge)
    return correlation(a[two] @ best.w[:, 0], b[two] @ best.v[:, 0])


def halves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split n samples at random into two halves of indices; `InputError` if they are too small to correlate anything.

    Example
    -------
    >>> [len(part) for part in halves(11, seed=0)]
    [5, 6]
    """
    if n < 2 * SMALLEST_PART:
        raise InputError(
            f"There are {n} samples and two halves need {2 * SMALLEST_PART}: pass more, or heldout=False."
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: n // 2], order[n // 2 :]


class SliceDependence(nn.Module):
    """A term of a loss that makes z forget t: the squared dependence of the slices.

    ``forward(z, t)`` splits the batch, finds the weights on one part and returns the squared correlation on the other, with a
    gradient for z. After ``fit(z, t)`` the weights stay as they are until the next fit, and forward uses the whole batch: for
    loops that find the weights on one batch and take steps on others. Squared, because a held-out correlation changes sign when
    there is nothing left to find, and its square is smooth there.

    Parameters
    ----------
    slices, degree, ridge, seed
        As in `slice_dependence`. Split by split the seed advances, so that no half is always the one that is fitted.
    redraw : bool
        Draw new slices at each fit or unfitted forward: over many steps the encoder then meets all of them.
    whiten : bool
        As in `slice_dependence`: then the encoder cannot hide a coordinate by shrinking it beside the others.
    squared : bool
        Return ρ² or the absolute value of ρ, which pushes as hard near zero as far from it and reaches smaller dependence.

    Example
    -------
    >>> g = torch.Generator().manual_seed(0)
    >>> z = torch.randn(400, 2, generator=g)
    >>> penalty = SliceDependence(slices=10, degree=3).fit(z[:200], z[:200, 0])
    >>> bool(penalty(z[200:], z[200:, 0]) > 0.9)
    True
    """

    def __init__(
        self,
        slices: int = 100,
        degree: int = 5,
        ridge: float = 1e-2,
        seed: int = 0,
        *,
        redraw: bool = True,
        squared: bool = True,
        whiten: bool = False,
    ) -> None:
        super().__init__()
        self.slices, self.degree, self.ridge, self.seed, self.redraw = slices, degree, ridge, seed, redraw
        self.squared, self.whiten, self.calls = squared, whiten, 0
        self._fitted: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # directions of z, of t, w, v

    def fit(self, z: Tensor, t: Tensor) -> SliceDependence:
        """Draw slices, find the best weights on (z, t), and keep both; nothing is differentiated."""
        first, second = sl.as_pair(z, t)
        at = self._advance()
        with torch.no_grad():
            on_z = sl.draw(first, self.slices, at, whiten=self.whiten)
            on_t = sl.directions(second.shape[1], self.slices, at + 1)
            best = canonical(
                sl.features(first, on_z, self.degree), sl.features(second, on_t, self.degree), self.ridge
            )
        self._fitted = on_z, on_t, best.w[:, 0], best.v[:, 0]
        return self

    def forget(self) -> SliceDependence:
        """Drop the fitted weights: from now on each forward finds its own."""
        self._fitted = None
        return self

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the squared dependence of z (n, d) on t (n,) or (n, q), a scalar in the dtype of z."""
        first, second = sl.as_pair(z, t)
        if self._fitted is not None:
            on_z, on_t, w, v = self._fitted
            rho = correlation(
                sl.features(first, on_z, self.degree) @ w, sl.features(second, on_t, self.degree) @ v
            )
        else:
            at = self._advance()
            rho = slice_dependence(
                first, second, self.slices, self.degree, self.ridge, at, heldout=True, whiten=self.whiten
            )
        return (rho**2 if self.squared else rho.abs()).to(z.dtype if z.is_floating_point() else torch.float64)

    def _advance(self) -> int:
        if self.redraw:
            self.calls += 1
        return self.seed + 2 * self.calls
