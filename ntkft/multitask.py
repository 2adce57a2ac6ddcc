r"""Training on several tasks at once, and how far a sum of task vectors is from it.

Claim: gradient flow on :math:`\sum_a L_a`, each task's loss the mean over its own texts, is gradient flow with the kernel
:math:`\widetilde K = D^{1/2} k D^{1/2}` of all training texts, D = diag(1/n_a). Write :math:`\widetilde K = K_d + K_o`, the
blocks on and off the diagonal. The sum of the vectors trained one by one sees only :math:`K_d` while it trains, and

.. math:: \sqrt{\textstyle\sum_a \|f^S_a - f^J_a\|_{n_a}^2} \le
          \int_0^\eta \min(1, (\eta-s)\|\widetilde K\|)\, \|K_o\, e^{-sK_d}\tilde r_0\|\, ds .

η is each task's own kernel time: in joint training every task gets as much of it as it got alone.

Source: the book's chapter "Many tasks, one model" (`thm-mt-duhamel`, `thm-mt-joint`, `thm-mt-sharing`).

Example
-------
>>> import numpy as np
>>> from ntkft.arithmetic import FineTuning, TaskVectors
>>> tunings = [FineTuning([0], [1.0], eta=1.0), FineTuning([1], [1.0], eta=1.0)]
>>> both = Joint(TaskVectors(np.array([[1.0, 0.2], [0.2, 1.0]]), tunings))
>>> distance, bound = both.sum_against_joint(1.0)
>>> round(distance, 3), round(bound, 3)
(0.084, 0.12)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ntkft.arithmetic import TaskVectors
from ntkft.errors import InputError
from ntkft.interference import block
from ntkft.spectrum import Spectrum

__all__ = ["Joint"]

NODES, PANELS = 12, 40  # of the quadrature in the bound


class Joint:
    """Gradient flow on the sum of all tasks' losses, in closed form.

    Parameters
    ----------
    vectors : TaskVectors
        The tasks. Their own kernel times and step sizes are not used. Where a task has an intercept, joint training has
        one for that task, fitted outright.

    Attributes
    ----------
    kernel : (n, n)
        The kernel of all training texts, task after task, each row and column divided by √n_a.
    """

    def __init__(self, vectors: TaskVectors) -> None:
        self.vectors = vectors
        tasks = range(len(vectors))
        sizes = [rows.size for rows in vectors.rows]
        self._ends = np.cumsum(sizes)[:-1]
        self._root = np.sqrt(np.repeat(sizes, sizes))  # √n_a for every training text
        raw = np.block([[block(vectors, a, b) for b in tasks] for a in tasks])
        self.kernel = (raw + raw.T) / (2 * np.outer(self._root, self._root))
        own = np.repeat(list(tasks), sizes)
        self._off = np.where(own[:, None] == own, 0.0, self.kernel)
        self._start = np.concatenate([vectors.residual(a) for a in tasks]) / self._root
        self._values, self._vectors = np.linalg.eigh(self.kernel)
        self._values = np.clip(self._values, 0.0, None)

    def __repr__(self) -> str:
        return f"Joint({len(self.vectors)} tasks, {self._root.size} training texts)"

    @property
    def spectrum(self) -> Spectrum:
        r"""The spectrum for the stopping rule of `thm-mt-joint`: eigenvalues of K̃/M, on the clock of the mean loss.

        With equal n_a they are those of k/n, n all training texts. A time η̂ of this clock is η̂/M for each task.
        """
        return Spectrum(self._values / len(self.vectors))

    @property
    def separate_spectrum(self) -> Spectrum:
        """The same for tasks that share nothing: the blocks on the diagonal alone."""
        return Spectrum(np.linalg.eigvalsh(self.kernel - self._off) / len(self.vectors))

    def coefficients(self, eta: ArrayLike) -> list[np.ndarray]:
        """Return the coefficients α_a of each task's gradients in the joint displacement Σ_a Φ_aᵀα_a: M arrays (..., n_a)."""
        times = self._times(eta)[..., None]
        safe = np.where(self._values > 0, self._values, 1.0)
        weight = np.where(self._values > 0, -np.expm1(-times * self._values) / safe, times)
        total = (weight * (self._vectors.T @ self._start)) @ self._vectors.T / self._root
        return np.split(total, self._ends, axis=-1)  # they add up to zero where gradients are centred

    def move(self, eta: ArrayLike) -> np.ndarray:
        """Return what joint training up to η does to the scores of all N texts, less free constants: (N,) or (k, N)."""
        pairs = zip(self.coefficients(eta), self.vectors.rows, strict=True)
        return sum(alpha @ self.vectors.matrix[rows] for alpha, rows in pairs)  # type: ignore[return-value]

    def outputs(self, eta: ArrayLike, rows: ArrayLike, task: int | None = None) -> np.ndarray:
        """Return the jointly trained scores of texts, with the free constant of `task` if it has one: (m,) or (k, m)."""
        return self.vectors.after(self.move(eta), rows, task)

    def losses(self, eta: ArrayLike, *, held_out: bool = False) -> np.ndarray:
        """Return every task's ½ mean squared error after joint training: (M,) or (k, M)."""
        move = self.move(eta)
        return np.stack([self.vectors.loss(a, move, held_out) for a in range(len(self.vectors))], axis=-1)

    def residuals(self, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r"""Return what is left on the training texts, each divided by √n_a: joint, alone, and of the sum; three (n,).

        *Alone* is every task under its own vector, :math:`e^{-\eta K_d}\tilde r_0`; *the sum* is every task under all.
        """
        time = float(self._times(float(eta)))
        joint = self._vectors @ (np.exp(-time * self._values) * (self._vectors.T @ self._start))
        lam, vec = np.linalg.eigh(self.kernel - self._off)
        lam = np.clip(lam, 0.0, None)
        z, safe = vec.T @ self._start, np.where(lam > 0, lam, 1.0)
        alone = vec @ (np.exp(-time * lam) * z)
        travelled = vec @ (np.where(lam > 0, -np.expm1(-time * lam) / safe, time) * z)  # ∫ alone ds
        return joint, alone, alone - self._off @ travelled

    def sum_against_joint(self, eta: float) -> tuple[float, float]:
        r"""Return the distance of the sum of vectors from joint training at η, and its bound (`thm-mt-duhamel`).

        All tasks train alone for the same η by gradient flow, whatever their own settings are.

        Returns
        -------
        distance : float
            :math:`(\sum_a\|f^S_a - f^J_a\|_{n_a}^2)^{1/2}` on the training texts.
        bound : float
            The integral above, which needs no joint training, by quadrature.
        """
        joint, _, added = self.residuals(eta)
        lam, vec = np.linalg.eigh(self.kernel - self._off)
        lam, z, top = np.clip(lam, 0.0, None), vec.T @ self._start, float(self._values[-1])
        if eta == 0 or top == 0:
            return float(np.linalg.norm(added - joint)), 0.0
        # Panels that grow with s resolve the fast decay at the start; the integrand has a kink at η - 1/λ_1.
        kink = np.clip(eta - 1 / top, 0.0, eta)
        early = np.geomspace(min(0.1 / top, eta) / 10, eta, PANELS)
        edges = np.unique(np.concatenate([[0.0, kink], early, np.linspace(kink, eta, PANELS)]))
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        half = np.diff(edges)[:, None] / 2
        s = (edges[:-1, None] + half * (1 + nodes)).ravel()
        size = np.linalg.norm((np.exp(-np.outer(s, lam)) * z) @ vec.T @ self._off, axis=1)
        bound = (half * weights).ravel() @ (np.minimum(1.0, (eta - s) * top) * size)
        return float(np.linalg.norm(added - joint)), float(bound)

    @staticmethod
    def _times(eta: ArrayLike) -> np.ndarray:
        times = np.asarray(eta, dtype=np.float64)
        if not np.isfinite(times).all() or (times < 0).any():
            raise InputError(f"eta is {times} and kernel time is finite and not negative: check it.")
        return times
