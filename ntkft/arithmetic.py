r"""Task arithmetic in closed form: what adding, scaling and subtracting fine-tuned models does, told before any training.

Claim: a fine-tuning of the linearised model for kernel time η moves the weights by a *task vector*
:math:`\tau = \Phi^\top\alpha_\eta`, with the coefficients of `ntkft.descent`. So everything about vectors of several tasks,

.. math:: f(x;\theta_0 + \textstyle\sum_b c_b\tau_b) = f_0(x) + \sum_b c_b\, k(x, X_b)\,\alpha_b, \qquad
          \langle\tau_a, \tau_b\rangle = \alpha_a^\top k(X_a, X_b)\,\alpha_b,

is in one kernel of all texts. Losses along a vector are exact quadratics. What the tasks do to each other is in
`ntkft.interference`, and joint training, with which a sum of vectors competes, in `ntkft.multitask`.

Tasks are numbered from 0 in the order of `tunings`, and ``moves[b]`` is :math:`k(\cdot, X_b)\alpha_b`, what task b's vector
does to the score of every text. Where a task has an intercept, its training and its evaluation use a free constant: the
one for which the mean score of its training texts is their mean label.

Source: the book's chapter "Arithmetic with fine-tuned models" (`thm-tv-expansion`, `thm-tv-arithmetic`); Ilharco et al. 2023
and Ortiz-Jimenez et al. 2023 for task arithmetic and its tangent.

Example
-------
>>> import numpy as np
>>> vectors = TaskVectors(np.diag([2.0, 2.0]), [FineTuning([0], [1.0], eta=1.0), FineTuning([1], [-1.0], eta=1.0)])
>>> vectors.outputs([1.0, 0.5], rows=[0, 1]).round(3)
array([ 0.865, -0.432])
>>> vectors.cosines()[0, 1]
np.float64(0.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from ntkft.descent import Descent, check_labels, descend
from ntkft.errors import InputError
from ntkft.ntk import Kernel
from ntkft.spectrum import require_positive

__all__ = ["FineTuning", "Quadratic", "TaskVectors"]


@dataclass(frozen=True, eq=False)
class FineTuning:
    """One fine-tuning: its texts as rows of the joint kernel, its labels, and how long it trains.

    Attributes
    ----------
    rows : (n,) int
        Training texts.
    y : (n,) float
        Their labels.
    eta : float
        Kernel time.
    step_size : float or None
        ε of gradient descent; gradient flow if None.
    intercept : bool
        Fit a free constant beside the model.
    held_out : (m,) int
        Texts of the task that it does not train on.
    reference : (m,) float or None
        What the score of the held-out texts should be.
    """

    rows: ArrayLike
    y: ArrayLike
    eta: float
    step_size: float | None = None
    intercept: bool = False
    held_out: ArrayLike = field(default_factory=lambda: np.zeros(0, int))
    reference: ArrayLike | None = None


@dataclass(frozen=True)
class Quadratic:
    """A loss along a vector, ``constant + slope·c + curvature·c²``, exactly.

    Example
    -------
    >>> Quadratic(0.5, -1.0, 0.5).best
    1.0
    """

    constant: float
    slope: float
    curvature: float

    def __call__(self, c: ArrayLike) -> np.ndarray:
        """Return the loss at the scale(s) c."""
        scale = np.asarray(c, dtype=np.float64)
        return self.constant + scale * (self.slope + scale * self.curvature)

    @property
    def best(self) -> float:
        """The scale of least loss; 0.0 if the vector does not move these texts."""
        return -self.slope / (2 * self.curvature) if self.curvature > 0 else 0.0


class TaskVectors:
    """The task vectors of several fine-tunings that start at the same weights.

    Parameters
    ----------
    kernel : Kernel or (N, N) array
        Unnormalised kernel of all texts, training and held-out, at the common start.
    tunings : sequence of FineTuning
        One for each of the M tasks.
    scores : (N,) array, optional
        Scores before training; by default the kernel's own, and zero for a bare array.

    Raises
    ------
    InputError
        If rows are not texts of the kernel, come twice in one task, or labels do not fit.

    Example
    -------
    >>> import numpy as np
    >>> one = FineTuning([0, 1], [1.0, 1.0], eta=2.0)
    >>> vectors = TaskVectors(np.diag([2.0, 0.2, 1.0]), [one])
    >>> round(float(vectors.loss_along(0, 0).best), 3)           # more than what was trained
    1.34
    """

    def __init__(
        self,
        kernel: Kernel | np.ndarray,
        tunings: Sequence[FineTuning],
        scores: ArrayLike | None = None,
    ) -> None:
        if isinstance(kernel, Kernel):
            if not kernel.square:
                raise InputError(
                    f"Task vectors need one square kernel of all texts and got {kernel!r}: compute it jointly."
                )
            self.matrix, start = kernel.matrix, kernel.scores if scores is None else scores
        else:
            self.matrix = np.asarray(kernel, dtype=np.float64)
            if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
                raise InputError(
                    f"The kernel matrix has shape {self.matrix.shape} and must be square: pass k of all texts."
                )
            start = np.zeros(len(self.matrix)) if scores is None else scores
        self.scores = check_labels(start, len(self.matrix), "scores")
        if not tunings:
            raise InputError(
                "tunings is empty and there is one task vector for each: give at least one FineTuning."
            )
        self.tunings = tuple(tunings)
        self.rows = [self.check_rows(t.rows, f"rows of task {a}") for a, t in enumerate(self.tunings)]
        self.held_out = [
            self.check_rows(t.held_out, f"held_out of task {a}") for a, t in enumerate(self.tunings)
        ]
        for a, (train, test) in enumerate(zip(self.rows, self.held_out, strict=True)):
            if train.size == 0 or np.intersect1d(train, test).size:
                raise InputError(
                    f"Task {a} has {train.size} training texts, {np.intersect1d(train, test).size} of them held out: "
                    "train on at least one text, and hold out others."
                )
        self.descents = [self._descent(a) for a in range(len(self))]
        self.coefficients = [d.coefficients(t.eta) for d, t in zip(self.descents, self.tunings, strict=True)]
        self.moves = np.array(
            [self.matrix[:, r] @ alpha for r, alpha in zip(self.rows, self.coefficients, strict=True)]
        )

    def __len__(self) -> int:
        return len(self.tunings)

    def __repr__(self) -> str:
        return f"TaskVectors({len(self)} tasks of {[r.size for r in self.rows]} texts, {len(self.matrix)} texts in all)"

    def check_rows(self, rows: ArrayLike, name: str = "rows") -> np.ndarray:
        """Return `rows` as int array, or raise `InputError` unless they are different texts of the kernel."""
        index = np.asarray(rows)
        if index.size == 0:
            return np.zeros(0, dtype=int)
        wrong = index.ndim != 1 or index.dtype.kind not in "iu"
        if wrong or index.min() < 0 or index.max() >= len(self.matrix) or np.unique(index).size < index.size:
            raise InputError(
                f"{name} must be different whole numbers from 0 to {len(self.matrix) - 1}, the rows of the kernel: "
                f"got {index.size} entries of type {index.dtype}."
            )
        return index

    def _descent(self, task: int) -> Descent:
        tuning, rows = self.tunings[task], self.rows[task]
        if not np.isfinite(tuning.eta) or tuning.eta < 0:
            raise InputError(
                f"eta of task {task} is {tuning.eta} and kernel time is finite and not negative: check it."
            )
        block = self.matrix[np.ix_(rows, rows)]
        return descend(
            block, tuning.y, self.scores[rows], step_size=tuning.step_size, intercept=tuning.intercept
        )

    # --- The vectors -----------------------------------------------------------------------------------------------

    def gram(self) -> np.ndarray:
        r"""Return the inner products :math:`\langle\tau_a,\tau_b\rangle = \alpha_a^\top k(X_a,X_b)\alpha_b`: (M, M).

        The raw kernel serves with intercepts, too: there the coefficients add up to zero (`thm-tv-expansion`).
        """
        gram = np.array(
            [self.moves[:, r] @ alpha for r, alpha in zip(self.rows, self.coefficients, strict=True)]
        )
        return (gram + gram.T) / 2

    @property
    def norms(self) -> np.ndarray:
        """Lengths ‖τ_a‖, (M,)."""
        return np.sqrt(np.clip(np.diag(self.gram()), 0, None))

    def cosines(self) -> np.ndarray:
        """Return the cosines of the angles between the vectors, (M, M); 0 where a vector has no length."""
        size = np.where(self.norms > 0, self.norms, np.inf)
        return self.gram() / np.outer(size, size)

    def noise_length(self, task: int, sigma: float) -> float:
        r"""Return :math:`\frac{\sigma^2}{n}\sum_j s_j^2/\lambda_j`, what label noise adds to E‖τ‖² (`prop-tv-noise`)."""
        lam, share = self.descents[task].eigenvalues, self.descents[task].filter(self.tunings[task].eta)
        parts = np.where(lam > 0, share**2 / np.where(lam > 0, lam, 1.0), 0.0)
        return require_positive("sigma", sigma) ** 2 * float(parts.sum()) / lam.size

    # --- Adding them -----------------------------------------------------------------------------------------------

    def weights(self, c: ArrayLike) -> np.ndarray:
        """Return c as weights (..., M): a task's number stands for its vector alone."""
        if isinstance(c, int | np.integer):
            if not 0 <= c < len(self):
                raise InputError(f"There is no task {c}: tasks are numbered from 0 to {len(self) - 1}.")
            return np.eye(len(self))[c]
        weights = np.asarray(c, dtype=np.float64)
        if weights.ndim == 0 or weights.shape[-1] != len(self) or not np.isfinite(weights).all():
            raise InputError(
                f"c has shape {weights.shape} and there are {len(self)} tasks: give one finite weight for each, "
                "or one task's number."
            )
        return weights

    def outputs(self, c: ArrayLike, rows: ArrayLike, task: int | None = None) -> np.ndarray:
        """Return f(x; θ0 + Σ c_b τ_b) in the linear regime: (m,), or (..., m) for weights (..., M).

        Parameters
        ----------
        c : int or (..., M)
            One task's number, or a weight for each vector.
        rows : (m,) int
            Texts.
        task : int, optional
            Whose scores these are: if that task has an intercept, its free constant is added.
        """
        return self.after(self.weights(c) @ self.moves, rows, task)

    def after(self, move: np.ndarray, rows: ArrayLike, task: int | None = None) -> np.ndarray:
        """Return the scores of `rows` when training has changed those of all N texts by `move` (..., N)."""
        values = self.scores + np.asarray(move, dtype=np.float64)
        picked = values[..., self.check_rows(rows)]
        if task is None or not self.tunings[task].intercept:
            return picked
        return picked + (np.asarray(self.tunings[task].y) - values[..., self.rows[task]]).mean(
            -1, keepdims=True
        )

    def analogy(self, a: int, b: int, c: int, rows: ArrayLike, task: int | None = None) -> np.ndarray:
        """Return the scores of `rows` under τ_c + τ_b - τ_a: c, changed as a changes into b (`thm-tv-analogy`).

        Example
        -------
        >>> import numpy as np
        >>> tunings = [FineTuning([i], [float(i)], eta=50.0) for i in range(3)]
        >>> TaskVectors(np.eye(3), tunings).analogy(0, 1, 2, rows=[0, 1, 2]).round(2)
        array([0., 1., 2.])
        """
        weights = np.zeros(len(self))
        for number, sign in ((a, -1.0), (b, 1.0), (c, 1.0)):
            weights += sign * self.weights(number)
        return self.outputs(weights, rows, task)

    # --- Losses ----------------------------------------------------------------------------------------------------

    def seen(self, task: int, move: np.ndarray, held_out: bool = False) -> np.ndarray:
        """Return what task `task` sees of a change `move` (..., N): on its texts, less the mean if a constant is free."""
        rows = self.held_out[task] if held_out else self.rows[task]
        picked = move[..., rows]
        return (
            picked - move[..., self.rows[task]].mean(-1, keepdims=True)
            if self.tunings[task].intercept
            else picked
        )

    def residual(self, task: int, held_out: bool = False) -> np.ndarray:
        """Return what is to be learned, y - f0 (less its mean over the training texts if a constant is free)."""
        tuning, train = self.tunings[task], self.rows[task]
        gap = np.asarray(tuning.y, dtype=np.float64) - self.scores[train]
        offset = gap.mean() if tuning.intercept else 0.0
        if not held_out:
            return gap - offset
        rows = self.held_out[task]
        if rows.size == 0 or tuning.reference is None:
            raise InputError(
                f"Task {task} has {rows.size} held-out texts and needs some, with their reference: give both."
            )
        reference = np.asarray(tuning.reference, dtype=np.float64)
        if reference.shape != rows.shape:
            raise InputError(
                f"Task {task} holds out {rows.size} texts and reference has shape {reference.shape}: one for each."
            )
        return reference - self.scores[rows] - offset

    def loss(self, task: int, move: np.ndarray, held_out: bool = False) -> np.ndarray:
        """Return ½ the mean squared error of a task after a change `move` (..., N) of all scores: (...)."""
        return 0.5 * ((self.residual(task, held_out) - self.seen(task, move, held_out)) ** 2).mean(-1)

    def loss_along(self, task: int, direction: ArrayLike, held_out: bool = False) -> Quadratic:
        """Return the loss of `task` at θ0 + c·(direction), a `Quadratic` in c; c = -1 is negation (`prop-tv-line`).

        Parameters
        ----------
        task : int
            Whose loss.
        direction : int or (M,)
            Along whose vector, or along which combination.
        held_out : bool
            On held-out texts against their reference, not on training labels.
        """
        gap = self.residual(task, held_out)
        move = self.seen(task, self.weights(direction) @ self.moves, held_out)
        return Quadratic(float((gap**2).mean() / 2), -float((gap * move).mean()), float((move**2).mean() / 2))
