r"""Learning that forgets: make a representation Z carry as little as possible about an attribute T.

Claim: :math:`I(Z;T) = 0` exactly if every slice :math:`\theta^\top Z` is independent of every slice
:math:`\varphi^\top T`. So a few random slices, some powers of each, and the top canonical correlation of the two feature vectors
make a penalty that needs no adversary, and hence no decision when to stop training one.

One idea a file: `slices` (random slices and their features), `cca` (ridge canonical correlations, differentiable), `penalty`
(`slice_dependence` and the regulariser `SliceDependence`), `baselines` (Pearson, distance correlation), `adversaries` (what is
trained against the encoder: neural maximal correlation, CLUB), `audit` (a judge that took no part in training), `blindness`
(what an adversary stopped early cannot see), `chisquare` (the law of its score), `gaussian` (information of Gaussian variables).

Source: Chen, Sun, Li & Weller 2022; the book's chapter "Adversaries".

Example
-------
>>> import torch
>>> g = torch.Generator().manual_seed(0)
>>> z = torch.randn(500, 3, generator=g, dtype=torch.float64)
>>> t = z[:, 0] ** 2 + 0.1 * torch.randn(500, generator=g, dtype=torch.float64)          # uncorrelated with z, not independent
>>> bool(slice_dependence(z, t, slices=20, degree=3, heldout=True) > 0.9)
True
"""

from __future__ import annotations

from ntkft.infomin.adversaries import Club, MaximalCorrelation
from ntkft.infomin.audit import Audit, audit
from ntkft.infomin.baselines import distance_correlation, pearson
from ntkft.infomin.blindness import Blindness, blindness
from ntkft.infomin.gaussian import gaussian_information
from ntkft.infomin.penalty import SliceDependence, slice_dependence
from ntkft.infomin.slices import one_hot

__all__ = [
    "Audit",
    "Blindness",
    "Club",
    "MaximalCorrelation",
    "SliceDependence",
    "audit",
    "blindness",
    "distance_correlation",
    "gaussian_information",
    "one_hot",
    "pearson",
    "slice_dependence",
]
