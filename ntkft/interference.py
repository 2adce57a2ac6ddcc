r"""What fine-tunings do to each other when their vectors are added, told before any training.

Claim: in the linear regime task b reaches task a through the cross-talk :math:`k(X_a, X_b)\,\alpha_b` and through nothing
else. Interference, disentanglement and the best weights of a sum are functions of it. How much there can be at most is in
the angle between the two sets of gradients, without any label.

With :math:`C_a = \frac1{n_a}\sum_i \nabla f(x_i)\nabla f(x_i)^\top` over the texts of task a (gradients less their mean if
a constant is free), :math:`\frac1{n_an_b}\|k(X_a,X_b)\|_F^2 = \operatorname{tr} C_aC_b`.

Source: the book's chapter "Many tasks, one model" (`prop-mt-crosstalk`, `prop-mt-xi`, `prop-mt-noise`); Ortiz-Jimenez et
al. 2023 for the disentanglement error; the chapter "Arithmetic with fine-tuned models" (`lem-tv-transfer`).

Example
-------
>>> import numpy as np
>>> tunings = [FineTuning([0], [1.0], eta=9.0), FineTuning([1], [1.0], eta=9.0)]
>>> apart, near = (TaskVectors(np.array([[1.0, k], [k, 1.0]]), tunings) for k in (0.0, 0.5))
>>> interference(apart)[0, 1], round(float(interference(near)[0, 1]), 3)
(np.float64(0.0), 0.25)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ntkft.arithmetic import FineTuning, TaskVectors
from ntkft.errors import InputError
from ntkft.spectrum import require_positive

__all__ = [
    "best_scales",
    "block",
    "cross_talk",
    "cross_talk_sizes",
    "disentanglement",
    "interference",
    "noise_gain",
    "overlap",
    "principal_cosine",
    "sign_disagreement",
    "transfer",
]


def block(vectors: TaskVectors, a: int, b: int) -> np.ndarray:
    """Return k(X_a, X_b), with the means of a task's gradients taken out where it has a free constant: (n_a, n_b)."""
    matrix = vectors.matrix[np.ix_(vectors.rows[a], vectors.rows[b])]
    if vectors.tunings[a].intercept:
        matrix = matrix - matrix.mean(0)
    return matrix - matrix.mean(1, keepdims=True) if vectors.tunings[b].intercept else matrix


def cross_talk(vectors: TaskVectors, a: int, b: int, *, held_out: bool = False) -> np.ndarray:
    """Return k(X_a, X_b) α_b, what b's vector does to the scores of a's texts: (n_a,) (`prop-mt-crosstalk`).

    Example
    -------
    >>> import numpy as np
    >>> tunings = [FineTuning([0], [1.0], eta=0.5), FineTuning([1], [1.0], eta=0.5)]
    >>> cross_talk(TaskVectors(np.array([[1.0, 0.5], [0.5, 1.0]]), tunings), 0, 1).round(3)
    array([0.197])
    """
    return vectors.seen(a, vectors.moves[b], held_out)


def cross_talk_sizes(vectors: TaskVectors, *, held_out: bool = False) -> np.ndarray:
    """Return the root mean squares ‖k(X_a, X_b)α_b‖ of all pairs, (M, M); the diagonal is what a vector does at home."""
    seen = [vectors.seen(a, vectors.moves, held_out) for a in range(len(vectors))]
    return np.array([np.sqrt((values**2).mean(-1)) for values in seen])


def interference(vectors: TaskVectors, *, held_out: bool = False) -> np.ndarray:
    """Return I_ab = [L_a(τ_a + τ_b) - L_a(τ_a)] / L_a(0), what adding b costs a: (M, M), with a zero diagonal.

    Negative entries are help. With `held_out`, losses are those of the held-out texts against their reference.

    Raises
    ------
    InputError
        If a task has no loss before training, or no held-out texts where they are asked for.
    """
    found = np.zeros((len(vectors), len(vectors)))
    for a, own in enumerate(vectors.moves):
        start = float(vectors.loss(a, np.zeros(len(vectors.matrix)), held_out))
        if start == 0:
            raise InputError(
                f"Task {a} has no loss before training, and shares of it mean nothing: leave it out."
            )
        together = vectors.loss(a, own + vectors.moves, held_out)
        found[a] = (together - vectors.loss(a, own, held_out)) / start
    np.fill_diagonal(found, 0.0)
    return found


def noise_gain(vectors: TaskVectors, a: int, b: int) -> float:
    r"""Return :math:`E\|k(X_a,X_b)\alpha_b\|_{n_a}^2` if the labels of b are pure noise of variance one (`prop-mt-noise`).

    For a = b it is the variance :math:`\frac1n\sum_j s_j^2` of `Descent.variance`, without the intercept's share.
    """
    descent, cross = vectors.descents[b], block(vectors, a, b)
    lam, share = descent.eigenvalues, descent.filter(vectors.tunings[b].eta)
    positive = lam > 1e-13 * lam[0]  # on null directions the block vanishes, up to rounding
    weight = np.where(positive, share / np.where(positive, lam, 1.0), 0.0)
    return float((((cross @ descent.vectors) * weight) ** 2).sum()) / (len(cross) * lam.size**2)


def overlap(vectors: TaskVectors) -> np.ndarray:
    r"""Return the alignment :math:`\|HK_{ab}H\|_F^2/(\|HK_aH\|_F\|HK_bH\|_F)` of all pairs, (M, M), without labels.

    It is the cosine of the covariances of the tasks' gradients, :math:`\operatorname{tr}C_aC_b/(\|C_a\|_F\|C_b\|_F)`, and
    lies between 0 and 1. Gradients are centred in every task, whether or not it has an intercept.
    """

    def centred(a: int, b: int) -> np.ndarray:
        matrix = vectors.matrix[np.ix_(vectors.rows[a], vectors.rows[b])]
        return matrix - matrix.mean(0) - matrix.mean(1, keepdims=True) + matrix.mean()

    tasks = range(len(vectors))
    size = np.array([np.sqrt((centred(a, a) ** 2).sum()) for a in tasks])
    if (size == 0).any():
        raise InputError(
            f"Task {int(np.argmin(size))} has one gradient for all texts, none after centring: leave it out."
        )
    return np.array([[(centred(a, b) ** 2).sum() / (size[a] * size[b]) for b in tasks] for a in tasks])


def principal_cosine(vectors: TaskVectors, a: int, b: int, floor: float = 1e-10) -> float:
    """Return cos θ, θ the smallest principal angle between the spans of the two tasks' gradients (`prop-mt-crosstalk`).

    Directions with an eigenvalue below `floor`·λ_1 do not count as spanned.

    Example
    -------
    >>> import numpy as np
    >>> tunings = [FineTuning([0], [1.0], eta=0.5), FineTuning([1], [1.0], eta=0.5)]
    >>> round(principal_cosine(TaskVectors(np.array([[1.0, 0.5], [0.5, 1.0]]), tunings), 0, 1), 3)
    0.5
    """
    sides = []
    for task in (a, b):
        lam, vec = vectors.descents[task].eigenvalues, vectors.descents[task].vectors
        real = lam > floor * lam[0]
        sides.append(
            vec[:, real] / np.sqrt(lam[real] * lam.size)
        )  # Φᵀ times this is an orthonormal basis of the span
    overlaps = sides[0].T @ block(vectors, a, b) @ sides[1]
    return min(float(np.linalg.norm(overlaps, 2)), 1.0) if overlaps.size else 0.0


def disentanglement(
    vectors: TaskVectors, a: int, b: int, c_a: ArrayLike, c_b: ArrayLike, *, held_out: bool = False
) -> np.ndarray:
    r"""Return the disentanglement error ξ(c_a, c_b) with squared distance, in the linear regime (`prop-mt-xi`).

    It is the sum over both tasks of the mean squared distance between the scores under the task's own vector,
    θ0 + c_a τ_a, and under both, θ0 + c_a τ_a + c_b τ_b; in closed form
    :math:`c_b^2\|k(X_a,X_b)\alpha_b\|^2 + c_a^2\|k(X_b,X_a)\alpha_a\|^2`. `c_a` and `c_b` broadcast.
    """
    size_a, size_b = (
        (cross_talk(vectors, *pair, held_out=held_out) ** 2).mean() for pair in ((a, b), (b, a))
    )
    return np.asarray(c_b, dtype=np.float64) ** 2 * size_a + np.asarray(c_a, dtype=np.float64) ** 2 * size_b


def sign_disagreement(
    vectors: TaskVectors, a: int, b: int, c_a: ArrayLike, c_b: ArrayLike, *, held_out: bool = False
) -> np.ndarray:
    """Return ξ with the distance "the signs differ": the shares of changed answers, added over both tasks (at most 2)."""
    left, right = np.broadcast_arrays(np.asarray(c_a, dtype=np.float64), np.asarray(c_b, dtype=np.float64))
    total = np.zeros(left.shape)
    for own, other, scale, other_scale in ((a, b, left, right), (b, a, right, left)):
        rows = vectors.held_out[own] if held_out else vectors.rows[own]
        alone = scale[..., None] * vectors.moves[own]
        both = alone + other_scale[..., None] * vectors.moves[other]
        changed = np.sign(vectors.after(alone, rows, own)) != np.sign(vectors.after(both, rows, own))
        total += changed.mean(-1)
    return total


def best_scales(
    vectors: TaskVectors, truth: Sequence[ArrayLike] | None = None, sigma: ArrayLike | None = None
) -> np.ndarray:
    """Return the weights c (M,) that minimise the sum of all tasks' losses at θ0 + Σ c_b τ_b, an M x M linear system.

    Parameters
    ----------
    vectors : TaskVectors
        The tasks.
    truth : M arrays (n_a,), optional
        True values of the training texts: then the *expected* error against them is minimised, over labels with
        independent noise, in the place of the error against the labels.
    sigma : float or (M,)
        Noise level of the labels, for `truth`.

    Raises
    ------
    InputError
        If one of truth and sigma is missing, or their lengths do not fit.

    Example
    -------
    >>> import numpy as np
    >>> tunings = [FineTuning([0], [1.0], eta=0.5), FineTuning([1], [1.0], eta=9.0)]
    >>> best_scales(TaskVectors(np.eye(2), tunings)).round(2)          # undo the early stop
    array([2.54, 1.  ])
    """
    tasks = range(len(vectors))
    noise = np.zeros(len(vectors))
    if (truth is None) != (sigma is None):
        raise InputError(
            "truth and sigma belong together: give both for the expected error, none for the training loss."
        )
    if truth is not None:
        if len(truth) != len(vectors):
            raise InputError(
                f"truth has {len(truth)} entries and there are {len(vectors)} tasks: one array for each."
            )
        level = np.asarray(sigma, dtype=np.float64)
        if level.shape not in ((), (len(vectors),)):
            raise InputError(
                f"sigma has shape {level.shape} and there are {len(vectors)} tasks: one number, or one for each."
            )
        gains = [sum(noise_gain(vectors, a, b) for a in tasks) for b in tasks]
        noise = (
            np.array([require_positive("sigma", s) for s in np.broadcast_to(level, len(vectors))]) ** 2
            * gains
        )
        clean = [
            FineTuning(t.rows, g, t.eta, t.step_size, t.intercept)
            for t, g in zip(vectors.tunings, truth, strict=True)
        ]
        vectors = TaskVectors(vectors.matrix, clean, vectors.scores)
    normal, right = np.diag(noise), np.zeros(len(vectors))
    for a in tasks:
        seen, gap = vectors.seen(a, vectors.moves), vectors.residual(a)
        normal, right = normal + seen @ seen.T / gap.size, right + seen @ gap / gap.size
    return np.linalg.lstsq(normal, right, rcond=None)[0]


def transfer(vectors: TaskVectors, a: int, rows: ArrayLike) -> float:
    r"""Return κ, the factor with which a stopped fit of task a is trusted on the texts `rows` (`lem-tv-transfer`).

    :math:`\kappa = \frac{\eta}{m}\lambda_1\bigl(k(Z,Z) - k(Z,X_a)(k(X_a,X_a) + \frac{n_a}{\eta}I)^{-1}k(X_a,Z)\bigr)` for m
    texts Z: η/m times the top eigenvalue of the posterior covariance of a Gaussian process that has seen X_a with noise
    n_a/η. On a's own texts it is below one. If a has an intercept, gradients are taken less their mean over X_a.

    Example
    -------
    >>> import numpy as np
    >>> vectors = TaskVectors(np.eye(2), [FineTuning([0], [1.0], eta=4.0)])
    >>> round(transfer(vectors, 0, [0]), 3), round(transfer(vectors, 0, [1]), 3)
    (0.8, 4.0)
    """
    picked, tuning, train = vectors.check_rows(rows), vectors.tunings[a], vectors.rows[a]
    if picked.size == 0:
        raise InputError("rows is empty and a transfer goes to at least one text: give some.")
    eta = require_positive(f"eta of task {a}", tuning.eta)
    near = np.concatenate([picked, train])
    matrix = vectors.matrix[np.ix_(near, near)]
    if tuning.intercept:
        means = matrix[picked.size :].mean(0)
        matrix = matrix - means - means[:, None] + means[picked.size :].mean()
    m = picked.size
    here, cross, home = matrix[:m, :m], matrix[:m, m:], matrix[m:, m:]
    left = here - cross @ np.linalg.solve(home + len(train) / eta * np.eye(len(train)), cross.T)
    return float(eta / m * np.linalg.eigvalsh((left + left.T) / 2)[-1])
