r"""How much does z still tell about t? A judge that was not trained against.

Claim: whatever two functions are chosen on one part of the data, their correlation over the population is at most the
maximal correlation of z and t, and another part of the data estimates it; so a held-out correlation does not flatter. The judges
share nothing with `slice_dependence`: random Fourier features with canonical correlations, of z as it is and whitened, at
several widths and ridges, and pairs of networks trained until their validation correlation stops rising. The one with the best
validation score is looked at once on a test fold.

Source: the book's chapter "Adversaries"; Rahimi & Recht 2007 for the features.

Example
-------
>>> g = torch.Generator().manual_seed(0)
>>> z = torch.randn(900, 2, generator=g)
>>> report = audit(z, torch.sin(3 * z[:, 0]), networks=0)
>>> report.low > 0.6, audit(z, torch.randn(900, generator=g), networks=0).low < 0.05
(True, True)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from ntkft.errors import InputError
from ntkft.infomin.adversaries import MaximalCorrelation
from ntkft.infomin.cca import canonical, correlation
from ntkft.infomin.slices import as_pair, standardise, whitening

FREQUENCIES = 100  # random Fourier features of each side
BANDWIDTHS = (0.25, 1.0, 4.0)  # in units of the median distance
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 4
SMALLEST = 80  # samples; each fold has a quarter of them
BATCH = 512  # samples of a step of the networks


@dataclass(frozen=True)
class Audit:
    """What the best judge found.

    Attributes
    ----------
    dependence : float
        Correlation of the chosen functions on samples that did not choose them; about 0 if nothing is left.
    low, high : float
        Bootstrap interval over the test samples, for these two functions.
    judges : tuple of str
        Which judge it was, fold by fold.
    validation : float
        Its score where it was chosen; larger than `dependence`, as a chosen score is.
    """

    dependence: float
    low: float
    high: float
    judges: tuple[str, ...]
    validation: float


def audit(
    z: Tensor | ArrayLike,
    t: Tensor | ArrayLike,
    *,
    seed: int = 0,
    networks: int = 1,
    patience: int = 10,
    looks: int = 400,
    resamples: int = 1000,
    level: float = 0.95,
) -> Audit:
    """Report the dependence of t (n,) or (n, q) on z (n, d) that fresh judges find.

    The samples are cut into four folds. Each fold is the test part once: the next fold chooses among the judges, the other
    two train them. The scores on all test parts are standardised and put together: every sample is used once.

    Parameters
    ----------
    networks : int
        Pairs of networks to train in each fold, beside the judges in closed form.
    patience, looks : int
        A pair ends after so many looks (ten steps of Adam each) without a new best, at the latest after `looks`.
    resamples, level
        Of the bootstrap.

    Raises
    ------
    InputError
        As `slice_dependence`, or fewer than 80 samples.
    """
    first, second = as_pair(z, t)
    n = len(first)
    if n < SMALLEST:
        raise InputError(
            f"There are {n} samples and an audit needs {SMALLEST}, a quarter of them in each fold: pass more."
        )
    rng = torch.Generator().manual_seed(seed)
    folds = torch.randperm(n, generator=rng).chunk(FOLDS)
    a, white, b = normal_scores(first), normal_scores(whiten(first)), normal_scores(second)
    chosen, on_z, on_t = [], torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for k, test in enumerate(folds):
        choose = folds[(k + 1) % FOLDS]
        train = torch.cat([folds[(k + m) % FOLDS] for m in range(2, FOLDS)])
        judges = _closed_form(a, b, train, rng) + _closed_form(white, b, train, rng, "whitened, ")
        judges += _networks(a, b, train, choose, networks, patience, looks, seed + 100 * k)
        score, name, u, v = max(
            ((float(correlation(u[choose], v[choose])), name, u, v) for name, u, v in judges),
            key=lambda judge: judge[0],
        )
        chosen.append((score, name))
        on_z[test], on_t[test] = standardise(u[test, None])[:, 0], standardise(v[test, None])[:, 0]
    low, high = _bootstrap(on_z.numpy(), on_t.numpy(), resamples, level, seed)
    validation = float(np.mean([score for score, _ in chosen]))
    return Audit(float(correlation(on_z, on_t)), low, high, tuple(name for _, name in chosen), validation)


def normal_scores(x: Tensor) -> Tensor:
    """Return the normal quantiles of the ranks of each column (n, p), ties at their mean rank: no tail is heavy any more.

    Coordinate by coordinate this can be undone, so it neither adds dependence nor hides any.

    Example
    -------
    >>> normal_scores(torch.tensor([[1.0], [100.0], [2.0]])).flatten().round(decimals=2).tolist()
    [-0.67, 0.67, 0.0]
    """
    ranks = stats.rankdata(x.detach().cpu().numpy(), axis=0)
    return torch.as_tensor(stats.norm.ppf(ranks / (len(x) + 1)))


def whiten(x: Tensor) -> Tensor:
    """Rotate and scale (n, d) so that its columns are uncorrelated with variance 1; directions without variance are dropped.

    A leak that whispers, along a direction of small variance, then speaks as loudly as all others.

    Example
    -------
    >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.001], [3.0, 3.0], [4.0, 4.0]], dtype=torch.float64)
    >>> torch.cov(whiten(x).T, correction=0).round(decimals=6).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    centred = standardise(x.detach().cpu())
    return centred @ whitening(centred)


def _closed_form(
    a: Tensor, b: Tensor, train: Tensor, rng: torch.Generator, view: str = ""
) -> list[tuple[str, Tensor, Tensor]]:
    """Return the first canonical pair for each bandwidth and ridge: name, scores of z (n,), scores of t (n,)."""
    found = []
    for width in BANDWIDTHS:
        fa, fb = (standardise(torch.cat([x, _fourier(x, width, rng)], 1)) for x in (a, b))
        for ridge in RIDGES:
            best = canonical(fa[train], fb[train], ridge)
            found.append(
                (
                    f"Fourier features, {view}width {width}, ridge {ridge}",
                    fa @ best.w[:, 0],
                    fb @ best.v[:, 0],
                )
            )
    return found


def _fourier(x: Tensor, width: float, rng: torch.Generator) -> Tensor:
    distances = torch.pdist(x[torch.randperm(len(x), generator=rng)[:300]])
    positive = distances[distances > 0]
    scale = width * float(positive.median()) if len(positive) else 1.0
    omega = torch.randn(x.shape[1], FREQUENCIES, generator=rng, dtype=torch.float64) / scale
    phase = 2 * np.pi * torch.rand(FREQUENCIES, generator=rng, dtype=torch.float64)
    return torch.cos(x @ omega + phase)


def _networks(
    a: Tensor, b: Tensor, train: Tensor, choose: Tensor, networks: int, patience: int, looks: int, seed: int
) -> list[tuple[str, Tensor, Tensor]]:
    """Return the scores of each pair of networks at its best look."""
    found = []
    a32, b32, rng = a.float(), b.float(), torch.Generator().manual_seed(seed)
    for k in range(networks):
        pair = MaximalCorrelation(a.shape[1], b.shape[1], hidden=64, seed=seed + 2 * k)
        best, since, kept = -np.inf, 0, (a[:, 0], b[:, 0])
        for _ in range(looks):
            for _ in range(10):
                batch = train[torch.randperm(len(train), generator=rng)[:BATCH]]
                pair.step(a32[batch], b32[batch])
            with torch.no_grad():
                score = float(pair(a32[choose], b32[choose]))
                since = 0 if score > best else since + 1
                if since == 0:
                    best, kept = score, (pair.on_z(a32)[:, 0].double(), pair.on_t(b32)[:, 0].double())
            if since == patience:
                break
        found.append((f"networks, start {k}", *kept))
    return found


def _bootstrap(x: np.ndarray, y: np.ndarray, resamples: int, level: float, seed: int) -> tuple[float, float]:
    rows = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
    u, v = x[rows], y[rows]
    u, v = u - u.mean(1, keepdims=True), v - v.mean(1, keepdims=True)
    scale = np.sqrt((u**2).mean(1) * (v**2).mean(1))
    drawn = (u * v).mean(1) / np.where(scale > 0, scale, 1.0)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
