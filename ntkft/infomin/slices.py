r"""Random slices of a vector, and polynomial features of each.

Claim: Z and T are independent exactly if all slices :math:`\theta^\top Z`, :math:`\varphi^\top T` are, and two bounded variables
are independent exactly if all their powers are uncorrelated. So a slice is standardised, squashed into (-1, 1) by tanh and
raised to the powers 1 to the degree.

Source: the book's chapter "Adversaries", thm-av-slices and prop-av-powers; Chen, Sun, Li & Weller 2022.

Example
-------
>>> z = as_samples(torch.arange(6.0), "z")
>>> features(z, directions(1, 10, seed=0), degree=2).shape               # one number has one slice
torch.Size([6, 2])
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ntkft.errors import InputError

NOTHING = 1e-12  # an eigenvalue below this share of the largest is rounding
TINY = 1e-9  # a column whose spread is below TINY times its size is constant up to rounding


def as_samples(x: Tensor | ArrayLike, name: str) -> Tensor:
    """Return `x` as (n, d) float64 tensor, still attached to its graph.

    Raises
    ------
    InputError
        If there are fewer than two rows, an entry is not finite, there are more than two axes, or the entries are integers with
        more than two values: then it is not clear whether they are classes or amounts.

    Example
    -------
    >>> as_samples([0.5, 1.5, 2.5], "t").shape
    torch.Size([3, 1])
    """
    values = x if isinstance(x, Tensor) else torch.as_tensor(np.asarray(x))
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim != 2 or values.shape[1] == 0:
        raise InputError(
            f"{name} has shape {tuple(values.shape)} and must be (n,) or (n, d): flatten what one sample has."
        )
    if len(values) < 2:
        raise InputError(
            f"{name} has {len(values)} sample and dependence needs at least two: pass the whole batch."
        )
    whole = not values.is_floating_point() and values.dtype != torch.bool
    if whole and any(len(column.unique()) > 2 for column in values.T):
        raise InputError(
            f"{name} has integers of more than two values ({values.dtype}): pass one_hot({name}) if they are classes, "
            f"{name}.float() if they are amounts."
        )
    bad = int((~torch.isfinite(values)).any(1).sum())
    if bad:
        raise InputError(f"{bad} of {len(values)} rows of {name} are not finite: drop those samples.")
    return values.double()


def as_pair(z: Tensor | ArrayLike, t: Tensor | ArrayLike) -> tuple[Tensor, Tensor]:
    """Return both as (n, d) and (n, q) float64, on one device; `InputError` if the numbers of samples differ."""
    first, second = as_samples(z, "z"), as_samples(t, "t")
    if len(first) != len(second):
        raise InputError(
            f"z has {len(first)} samples and t has {len(second)}: pass the same samples in the same order."
        )
    return first, second.to(first.device)


def one_hot(t: Tensor | ArrayLike) -> Tensor:
    """Return classes as indicator columns, (n, number of classes), in the order of the sorted class names.

    Example
    -------
    >>> one_hot([3, 7, 3]).tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    values = t.detach().cpu().numpy() if isinstance(t, Tensor) else np.asarray(t)
    if values.ndim != 1:
        raise InputError(f"Classes have shape {values.shape} and must be (n,): pass one class a sample.")
    names, code = np.unique(values, return_inverse=True)
    device = t.device if isinstance(t, Tensor) else None
    return torch.eye(len(names), dtype=torch.float64, device=device)[torch.as_tensor(code, device=device)]


def directions(d: int, slices: int, seed: int) -> Tensor:
    """Draw `slices` unit vectors, uniform on the sphere of R^d: (slices, d), or (1, 1) if d = 1, where all slices are the same.

    Example
    -------
    >>> directions(4, 3, seed=1).norm(dim=1).round(decimals=6).tolist()
    [1.0, 1.0, 1.0]
    """
    if slices < 1:
        raise InputError(f"slices is {slices} and must be at least 1.")
    if d == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device has the same slices
    normal = torch.randn(slices, d, generator=generator, dtype=torch.float64)
    return normal / normal.norm(dim=1, keepdim=True)


def standardise(x: Tensor) -> Tensor:
    """Centre each column of (n, p) and divide it by its standard deviation; a constant column becomes zero.

    Example
    -------
    >>> standardise(torch.tensor([[1.0, 5.0], [3.0, 5.0]], dtype=torch.float64)).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """
    centred = x - x.mean(0)
    variance = (centred**2).mean(0)
    constant = variance.detach() <= (TINY * x.detach().abs().amax(0)) ** 2
    # Not variance.sqrt() first: its gradient at 0 is infinite, and infinite times zero is no number.
    return centred * torch.where(constant, 0.0, torch.where(constant, 1.0, variance).rsqrt())


def whitening(x: Tensor) -> Tensor:
    """Return W (d, k), for which the columns of (x - mean) W are uncorrelated with variance 1; a constant for the gradient.

    Directions without variance are dropped, so k is the rank of x (n, d); at least one column is kept.

    Example
    -------
    >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 8.0], [2.0, 8.0]], dtype=torch.float64)
    >>> (x @ whitening(x)).std(0, correction=0).round(decimals=6).tolist()
    [1.0, 1.0]
    """
    with torch.no_grad():
        size = x.std(0, correction=0)
        size = torch.where(size > 0, size, 1.0)  # eigenvalues of correlations are easier to tell from rounding
        centred = (x - x.mean(0)) / size
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        keep = values > NOTHING * values[-1]
        keep[-1] = True
        return vectors[:, keep] * torch.where(values[keep] > 0, values[keep], 1.0).rsqrt() / size[:, None]


def draw(z: Tensor, slices: int, seed: int, *, whiten: bool = False) -> Tensor:
    """Return directions for z (n, d), (slices, d): uniform on the sphere, or on that of the whitened z and then seen from z.

    The law of slices of the second kind is the same for z and for z mapped by an invertible matrix: no coordinate can hide by
    being small.

    Example
    -------
    >>> z = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / torch.tensor([1.0, 1000.0])
    >>> weight = draw(z, 50, seed=0, whiten=True).abs().mean(0)
    >>> bool(weight[1] > 500 * weight[0])
    True
    """
    if not whiten:
        return directions(z.shape[1], slices, seed)
    axes = whitening(z)
    return directions(axes.shape[1], slices, seed).to(axes.device) @ axes.T


def features(z: Tensor, directions: Tensor, degree: int) -> Tensor:
    r"""Return the powers 1..degree of tanh of each standardised slice, standardised: (n, slices * degree).

    Parameters
    ----------
    z : (n, d) float64
    directions : (slices, d)
    degree : int
        At least 1. The columns of one slice stand together, lowest power first.

    The result does not depend on the scale or the origin of z: a representation gains nothing by shrinking.
    """
    if degree < 1:
        raise InputError(f"degree is {degree} and must be at least 1.")
    if directions.shape[1] != z.shape[1]:
        raise InputError(
            f"The slices are for {directions.shape[1]} coordinates and z has {z.shape[1]}: draw them anew."
        )
    squashed = torch.tanh(standardise(z @ directions.to(z.device).T))  # (n, slices)
    powers = torch.stack([squashed**k for k in range(1, degree + 1)], dim=2)
    return standardise(powers.flatten(1))
