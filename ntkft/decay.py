r"""How fast the eigenvalues fall: four laws, and which of them holds on texts that it was not fitted to.

Claim: residuals of log λ_j about a smooth curve are strongly dependent from rank to rank, so information criteria that count
them as independent are too sure of themselves. Here the texts are split into two random halves instead; a law is fitted to the
spectrum of one half and scored on that of the other. The floor of this score is what the two spectra differ by without any law.

==============  =================================================  ==========================================
law             log λ_j                                            parameters
==============  =================================================  ==========================================
polynomial      α - a log j                                        ``exponent`` a
exponential     α - c j                                            ``rate`` c
stretched       α - c j^γ, 0 < γ < 1                               ``rate`` c, ``power`` γ
broken          α - a log j, from rank b on with slope a' instead  ``exponent`` a, ``tail`` a', ``at`` b
==============  =================================================  ==========================================

Source: the book's chapter "The spectra of language models".

Example
-------
>>> import numpy as np
>>> fit = fit_decay(1.0 / np.arange(1, 101) ** 1.5, first=5, last=50)
>>> round(fit.parameters["exponent"], 6)
1.5
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ntkft.errors import InputError
from ntkft.ntk import Kernel
from ntkft.spectrum import Spectrum

Model = Literal["polynomial", "exponential", "stretched", "broken"]
MODELS: tuple[Model, ...] = ("polynomial", "exponential", "stretched", "broken")
POWERS = np.arange(0.02, 1.0, 0.02)  # γ of the stretched law
ENOUGH = 4  # ranks on either side of a break


@dataclass(frozen=True)
class DecayFit:
    """A law fitted by least squares to log λ_j over ranks first..last.

    Attributes
    ----------
    model : str
        Name of the law.
    parameters : dict of str to float
        See the table of the module; and ``scale``, e^α.
    first, last : int
        Ranks that were used, counted from 1.
    predicted : (last - first + 1,) array
        The law's eigenvalues at these ranks.
    residual : float
        Mean squared residual of log λ_j.
    """

    model: str
    parameters: dict[str, float]
    first: int
    last: int
    predicted: np.ndarray
    residual: float

    @property
    def break_rank(self) -> int | None:
        """The rank at which the slope changes; None for a law without a break."""
        return int(self.parameters["at"]) if "at" in self.parameters else None


@dataclass(frozen=True)
class DecaySelection:
    """Which law predicts the spectrum of other texts best.

    Attributes
    ----------
    best : str
        The law with the least score.
    fits : dict of str to DecayFit
        Each law, fitted to the spectrum of all texts.
    scores : dict of str to float
        Mean squared error of log λ_j on the half that was not fitted, mean over the splits.
    floor : float
        The same score for the other half's own eigenvalues, no law between: what sampling alone costs.
    difference : dict of str to (float, float, float)
        Score minus the best law's score: mean, and the 2.5 % and 97.5 % quantile over the splits. Splits overlap, so this is the
        spread over re-splittings of these texts, not a confidence interval for new ones.
    interval : dict of str to dict of str to (float, float)
        For each law and parameter the 2.5 % and 97.5 % quantiles over the fits to half of the texts.
    halves : dict of str to dict of str to ndarray
        The parameters themselves, one for each half.
    """

    best: str
    fits: dict[str, DecayFit]
    scores: dict[str, float]
    floor: float
    difference: dict[str, tuple[float, float, float]]
    interval: dict[str, dict[str, tuple[float, float]]]
    halves: dict[str, dict[str, np.ndarray]] = field(repr=False)


def ranks(n: int, first: int | None, last: int | None) -> tuple[int, int]:
    """Return the ranks to fit, by default 5..n/4 for n texts: beyond them a half of the texts shows little but its own size."""
    return 5 if first is None else first, max(n // 4, 16) if last is None else last


def fit_decay(
    spectrum: Spectrum | ArrayLike,
    model: Model = "polynomial",
    *,
    first: int | None = None,
    last: int | None = None,
) -> DecayFit:
    """Fit one law to the eigenvalues of ranks `first`..`last` (by default 5..n/4).

    Parameters
    ----------
    spectrum : Spectrum or (n,) array
        Eigenvalues of K/n.
    model : str
        "polynomial", "exponential", "stretched" or "broken". A broken law is continuous; its break is searched over the ranks.
    first, last : int
        First and last rank, counted from 1.

    Raises
    ------
    InputError
        If there is no such law, or fewer than 12 ranks, or an eigenvalue among them is not positive.

    Example
    -------
    >>> j = np.arange(1, 201)
    >>> fit_decay(np.where(j < 30, 1.0 / j, 30.0 / j**2), "broken", first=5, last=150).break_rank
    30
    """
    spectrum = spectrum if isinstance(spectrum, Spectrum) else Spectrum(spectrum)
    if model not in MODELS:
        raise InputError(f"There is no law {model!r}: choose one of {', '.join(MODELS)}.")
    first, last = ranks(len(spectrum), first, last)
    positive = int((spectrum.eigenvalues > 0).sum())
    if not (first >= 1 and last - first >= 11 and last <= positive):
        raise InputError(
            f"Ranks {first}..{last} are asked for and there are {positive} positive eigenvalues: "
            "choose at least twelve ranks among them."
        )
    j = np.arange(first, last + 1, dtype=np.float64)
    target = np.log(spectrum.eigenvalues[first - 1 : last])
    columns, value = _best_columns(model, j, target)
    weights = np.linalg.lstsq(columns, target, rcond=None)[0]
    line = columns @ weights
    left = float(((target - line) ** 2).mean())
    return DecayFit(model, _named(model, weights, value), first, last, np.exp(line), left)


def _best_columns(model: str, j: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the design matrix of a law, and its non-linear parameter (0 if it has none) found on a grid."""
    one, log_j = np.ones_like(j), np.log(j)
    if model == "polynomial":
        return np.stack([one, -log_j], 1), 0.0
    if model == "exponential":
        return np.stack([one, -j], 1), 0.0
    if model == "stretched":
        grid = POWERS
        designs = [np.stack([one, -(j**power)], 1) for power in grid]
    else:
        grid = j[ENOUGH - 1 : -ENOUGH]
        designs = [np.stack([one, -log_j, -np.maximum(log_j - np.log(at), 0.0)], 1) for at in grid]
    stack = np.stack(designs)  # (g, ranks, columns)
    basis = np.linalg.qr(stack)[0]
    left = target @ target - ((np.swapaxes(basis, 1, 2) @ target) ** 2).sum(1)
    best = int(np.argmin(left))
    return stack[best], float(grid[best])


def _named(model: str, weights: np.ndarray, value: float) -> dict[str, float]:
    scale = {"scale": float(np.exp(weights[0]))}
    if model == "polynomial":
        return scale | {"exponent": float(weights[1])}
    if model == "exponential":
        return scale | {"rate": float(weights[1])}
    if model == "stretched":
        return scale | {"rate": float(weights[1]), "power": value}
    return scale | {"exponent": float(weights[1]), "tail": float(weights[1] + weights[2]), "at": value}


def select_decay(
    kernel: Kernel,
    *,
    splits: int = 20,
    seed: int = 0,
    first: int | None = None,
    last: int | None = None,
    centre: bool = True,
) -> DecaySelection:
    """Choose among the laws by how well they predict the spectrum of texts that they were not fitted to.

    Parameters
    ----------
    kernel : Kernel
        Square.
    splits : int
        Random splits into two halves; each gives two fits and two scores.
    seed : int
        Seed of the splits.
    first, last : int
        Ranks, by default 5..n/4 for n texts. The halves have n/2 texts, and the same ranks are used in them.
    centre : bool
        Use the centred kernels (each half by its own mean), as training with a free intercept does.

    Raises
    ------
    InputError
        If the kernel is not square, there is no split, or the ranks do not fit into half of the texts.

    Example
    -------
    >>> features = np.random.default_rng(0).standard_normal((200, 400)) * np.arange(1, 401) ** -0.75
    >>> select_decay(Kernel(features @ features.T, np.zeros(200)), splits=4).best in ("polynomial", "stretched", "broken")
    True
    """
    if not kernel.square:
        raise InputError(f"select_decay needs a square kernel and got {kernel!r}: pass kernel.block(rows).")
    if splits < 1:
        raise InputError(f"splits is {splits} and must be at least 1: ask for some.")
    n = kernel.n
    first, last = ranks(n, first, last)
    if last > n // 2 - 1:
        raise InputError(
            f"Ranks up to {last} are asked for and half of {n} texts has {n // 2}: choose a smaller last rank, or more texts."
        )
    rng = np.random.default_rng(seed)
    found: dict[str, list[dict[str, float]]] = {model: [] for model in MODELS}
    scores: dict[str, list[float]] = {model: [] for model in MODELS}
    floors: list[float] = []
    for _ in range(splits):
        order = rng.permutation(n)
        pair = [
            kernel.block(rows).spectrum(centre=centre)
            for rows in (order[: n // 2], order[n // 2 : 2 * (n // 2)])
        ]
        logs = [np.log(spectrum.eigenvalues[first - 1 : last]) for spectrum in pair]
        floors.append(float(((logs[0] - logs[1]) ** 2).mean()))
        for model in MODELS:
            fits = [fit_decay(spectrum, model, first=first, last=last) for spectrum in pair]
            found[model] += [fit.parameters for fit in fits]
            errors = [((np.log(fits[i].predicted) - logs[1 - i]) ** 2).mean() for i in (0, 1)]
            scores[model].append(float(np.mean(errors)))
    means: dict[str, float] = {model: float(np.mean(scores[model])) for model in MODELS}
    best = min(means, key=lambda model: means[model])
    halves = {
        model: {key: np.array([p[key] for p in each]) for key in each[0]} for model, each in found.items()
    }
    apart = {model: np.array(each) - np.array(scores[best]) for model, each in scores.items()}
    whole = kernel.spectrum(centre=centre)
    return DecaySelection(
        best=best,
        fits={model: fit_decay(whole, model, first=first, last=last) for model in MODELS},
        scores=means,
        floor=float(np.mean(floors)),
        difference={m: (float(d.mean()), *_middle(d)) for m, d in apart.items()},
        interval={m: {key: _middle(v) for key, v in each.items()} for m, each in halves.items()},
        halves=halves,
    )


def _middle(values: np.ndarray) -> tuple[float, float]:
    """Return the 2.5 % and the 97.5 % quantile."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
