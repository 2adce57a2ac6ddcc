r"""Which fine-tunings add up, told before any training: one kernel of all tasks' texts, and what follows from it.

For each pair of tasks the report has the *interference* :math:`I_{ab} = [L_a(\tau_a+\tau_b) - L_a(\tau_a)]/L_a(0)`, what adding
the vector of b costs a on texts that were held out. Negative entries are help. With task vectors of a real fine-tuning the same
numbers are also measured. Source: the book's chapter "Many tasks, one model".

Example
-------
>>> readout = ntkft.pooled_readout(ntkft.load_model("minilm"))                                   # doctest: +SKIP
>>> tasks = [ntkft.load_task(name, n=96) for name in ("amazon", "movies", "tweets")]             # doctest: +SKIP
>>> print(task_report(readout, tasks))                                                           # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ntkft.advice import PLOTS, stopping_advice
from ntkft.arithmetic import FineTuning, TaskVectors
from ntkft.errors import InputError
from ntkft.files import atomic_path
from ntkft.interference import interference, overlap
from ntkft.multitask import Joint
from ntkft.ntk import Kernel, empirical_ntk
from ntkft.printed import sentence
from ntkft.readout import Readout
from ntkft.task_vectors import TaskVector
from ntkft.tasks import Task

__all__ = ["TaskReport", "task_report"]

SCALES = (1.0, 0.7, 0.5, 0.4, 0.3, 0.2)
HARM, HELP = 0.02, -0.02  # shares of the loss before training that are worth a word


@dataclass(frozen=True)
class TaskReport:
    """What adding fine-tunings does, on held-out texts. Losses are shares of each task's loss before training.

    Attributes
    ----------
    names : list of str
    train, held_out : list of int
        Texts of each task.
    eta : (M,)
        Kernel time of each fine-tuning.
    overlap : (M, M)
        Alignment of the tasks' gradients, between 0 and 1; it needs no label.
    interference : (M, M)
        I_ab, what adding b costs a.
    alone, joint : (M,)
        Losses under the task's own vector, and after training on all tasks together.
    sums : dict of float to (M,)
        Losses at θ0 + c Σ τ, for a few c.
    cosines : (M, M)
        Of the vectors.
    measured : dict or None
        "interference", "alone", "sums" and "cosines" of real task vectors, if some were given.
    """

    names: list[str]
    train: list[int]
    held_out: list[int]
    eta: np.ndarray
    overlap: np.ndarray
    interference: np.ndarray
    alone: np.ndarray
    joint: np.ndarray
    sums: Mapping[float, np.ndarray]
    cosines: np.ndarray
    measured: Mapping[str, Any] | None = None

    @property
    def best_scale(self) -> float:
        """The c of least mean loss of the sum."""
        return min(self.sums, key=lambda c: float(self.sums[c].mean()))

    def recommendation(self) -> list[str]:
        """Return plain sentences: who helps and who harms whom, and whether to add, to train jointly or to keep apart."""
        found = []
        source = self.interference if self.measured is None else self.measured["interference"]
        for a, name in enumerate(self.names):
            others = [b for b in range(len(self.names)) if b != a]
            harm = [self.names[b] for b in others if source[a, b] > HARM]
            aid = [self.names[b] for b in others if source[a, b] < HELP]
            words = [f"is harmed by {_list(harm)}"] * bool(harm) + [f"is helped by {_list(aid)}"] * bool(aid)
            found.append(f"{name} {' and '.join(words) or 'does not care about the others'}.")
        alone, joint, c = self.alone.mean(), self.joint.mean(), self.best_scale
        added = self.sums[c].mean()
        least = min(alone, joint, added)
        what = {
            "keep one model for each task": alone,
            f"add the vectors with weight {c:g} each": added,
            "train on all tasks together": joint,
        }
        best = next(text for text, value in what.items() if value == least)
        rest = "; ".join(f"{text}: {100 * value:.0f} %" for text, value in what.items())
        return [*found, f"Best: {best}. Mean held-out loss, in shares of that before training: {rest}."]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        values: dict[str, Any] = {"names": self.names, "train": self.train, "held_out": self.held_out}
        for key in ("eta", "overlap", "interference", "alone", "joint", "cosines"):
            values[key] = getattr(self, key).tolist()
        values |= {"sums": {str(c): v.tolist() for c, v in self.sums.items()}, "best_scale": self.best_scale}
        values["recommendation"] = self.recommendation()
        if self.measured is not None:
            values["measured"] = {
                k: {str(c): x.tolist() for c, x in v.items()} if k == "sums" else np.asarray(v).tolist()
                for k, v in self.measured.items()
            }
        return values

    def __str__(self) -> str:
        width = max(8, *(len(name) + 2 for name in self.names))
        lines = ["what adding the column's vector costs the row's task (% of its loss before training)"]
        lines += _matrix(self.names, 100 * self.interference, width)
        if self.measured is not None:
            lines += ["", "the same, measured with the given vectors"]
            lines += _matrix(self.names, 100 * self.measured["interference"], width)
        lines += ["", "overlap of the tasks' gradients (%), from texts alone", *_matrix(self.names, 100 * self.overlap, width)]
        return "\n".join([*lines, "", *(sentence(line, 2) for line in self.recommendation())])

    def plot(self, path: str | Path | None = None, ax: Any = None) -> Any:
        """Draw the interference as a heat map; write it to `path` (.png, .svg, .pdf) if given, and return the axes.

        Raises
        ------
        InputError
            If the path has another ending.
        """
        if path is not None and Path(path).suffix.lower() not in PLOTS:
            raise InputError(f"The path is {str(path)!r} and must end in {', '.join(PLOTS)}: choose one of them.")
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(1.8 + 0.8 * len(self.names), 1.2 + 0.7 * len(self.names)), layout="constrained").subplots()
        source = 100 * (self.interference if self.measured is None else self.measured["interference"])
        size = max(float(np.abs(source).max()), 1e-9)
        picture = ax.imshow(source, cmap="PuOr_r", vmin=-size, vmax=size)
        for (a, b), value in np.ndenumerate(source):
            dark = abs(value) > 0.6 * size
            ax.text(b, a, f"{value:.0f}", ha="center", va="center", color="white" if dark else "black", fontsize=8)
        ax.set_xticks(range(len(self.names)), self.names, rotation=45, ha="right")
        ax.set_yticks(range(len(self.names)), self.names)
        ax.set(xlabel="vector that is added", ylabel="task that pays")
        ax.figure.colorbar(picture, ax=ax, label="cost (% of the loss before training)")
        if path is not None:
            with atomic_path(path) as temporary:
                ax.figure.savefig(temporary, dpi=150)
        return ax


def task_report(
    readout: Readout | None,
    tasks: Sequence[Task],
    *,
    vectors: Sequence[TaskVector] | None = None,
    kernel: Kernel | None = None,
    sigma: float | Sequence[float | None] | None = None,
    eta: ArrayLike | None = None,
    held_out: float = 0.25,
    seed: int = 0,
    memory: str | int = "2GB",
    progress: bool = True,
) -> TaskReport:
    """Predict what fine-tunings of one model on several tasks do to each other; measure it too if their vectors are given.

    Parameters
    ----------
    readout : Readout
        The model as it is before fine-tuning, as one function for all tasks. Not needed with `kernel` and without `vectors`.
    tasks : M tasks, at least two
        Texts with labels; some of each are held out.
    vectors : M task vectors, optional
        Of real fine-tunings: then the same interference is measured with them. The read-out's weights are left as they are.
    kernel : Kernel, optional
        Of all texts, task after task; else it is computed.
    sigma : float, or one for each task, optional
        Noise level of the labels, for the time to stop; by default each task's own, or estimated.
    eta : float or (M,), optional
        Kernel times; by default each task stops by `stopping_advice`.
    held_out : float
        Share of the texts that is not trained on, drawn by `seed`.

    Raises
    ------
    InputError
        If there are fewer than two tasks, too few texts, or things do not fit together.
    """
    names = _names(tasks)
    if not 0 < held_out < 1:
        raise InputError(f"held_out is {held_out} and is a share of the texts: give a number between 0 and 1.")
    if vectors is not None and len(vectors) != len(tasks):
        raise InputError(f"There are {len(tasks)} tasks and {len(vectors)} task vectors: give one for each, in the same order.")
    if readout is None and (kernel is None or vectors is not None):
        raise InputError("readout is None and is needed: it computes the kernel, and what given vectors do.")
    texts = [text for task in tasks for text in task.texts]
    if kernel is None:
        assert readout is not None
        kernel = empirical_ntk(readout, texts, memory=memory, progress=progress)
    elif kernel.n != len(texts) or (kernel.texts and not kernel.matches(texts)):
        raise InputError(
            f"The kernel is for {kernel.n} texts and the tasks have {len(texts)}, or others: compute it of all texts."
        )
    closed = _closed_form(kernel, tasks, sigma, eta, held_out, seed)
    zero = np.zeros(kernel.n)
    start = np.array([float(closed.loss(a, zero, True)) for a in range(len(tasks))])
    times = np.array([t.eta for t in closed.tunings])
    total = closed.moves.sum(0)

    def shares(moves: np.ndarray) -> np.ndarray:
        """Return each task's loss under its own row of `moves` (M, N), or under one for all (N,)."""
        rows = np.broadcast_to(moves, (len(tasks), kernel.n))
        return np.array([float(closed.loss(a, row, True)) for a, row in enumerate(rows)]) / start

    measured = None
    if vectors is not None:
        assert readout is not None
        measured = _measured(readout, texts, vectors, closed, shares)
    return TaskReport(
        names,
        [len(rows) for rows in closed.rows],
        [len(rows) for rows in closed.held_out],
        times,
        overlap(closed),
        interference(closed, held_out=True),
        shares(closed.moves),
        shares(Joint(closed).move(float(times.mean()))),
        {c: shares(c * total) for c in SCALES},
        closed.cosines(),
        measured,
    )


def _names(tasks: Sequence[Task]) -> list[str]:
    if len(tasks) < 2:
        raise InputError(f"There are {len(tasks)} tasks and interference needs two: give more.")
    for task in tasks:
        if len(task) < 8:
            raise InputError(f"{task.name} has {len(task)} texts and too few to hold some out: give at least 8.")
    seen: dict[str, int] = {}
    names = []
    for task in tasks:  # files of one name in two folders
        short = Path(task.name).stem if Path(task.name).suffix else task.name
        seen[short] = seen.get(short, 0) + 1
        names.append(short if seen[short] == 1 else f"{short} {seen[short]}")
    return names


def _closed_form(
    kernel: Kernel,
    tasks: Sequence[Task],
    sigma: float | Sequence[float | None] | None,
    eta: ArrayLike | None,
    held_out: float,
    seed: int,
) -> TaskVectors:
    levels = sigma if isinstance(sigma, Sequence) else [sigma] * len(tasks)
    times = None if eta is None else np.broadcast_to(np.asarray(eta, dtype=np.float64), len(tasks))
    if len(levels) != len(tasks):
        raise InputError(f"sigma has {len(levels)} entries and there are {len(tasks)} tasks: one number, or one for each.")
    tunings, first = [], 0
    for k, task in enumerate(tasks):
        order = np.random.default_rng((seed, k)).permutation(len(task))
        test, train = np.split(order, [max(round(held_out * len(task)), 2)])
        part = task.subset(np.sort(train))
        block = kernel.block(first + np.sort(train))
        time = stopping_advice(None, part, kernel=block, sigma=levels[k]).eta if times is None else float(times[k])
        rows = first + np.sort(train), first + np.sort(test)
        tunings.append(
            FineTuning(rows[0], part.y, time, intercept=True, held_out=rows[1], reference=task.reference[np.sort(test)])
        )
        first += len(task)
    return TaskVectors(kernel, tunings)


def _measured(
    readout: Readout, texts: list[str], vectors: Sequence[TaskVector], closed: TaskVectors, shares: Any
) -> dict[str, Any]:
    """Return what real vectors do to each other, as the report has it of predicted ones."""
    start = readout.scores(texts)

    def moved(vector: TaskVector, scale: float = 1.0) -> np.ndarray:
        with vector.applied(readout, scale):
            return readout.scores(texts) - start

    size = len(vectors)
    alone = shares(np.array([moved(vector) for vector in vectors]))
    cost = np.zeros((size, size))
    for a in range(size):
        for b in range(a + 1, size):
            both = shares(moved(vectors[a] + vectors[b]))
            cost[a, b], cost[b, a] = both[a] - alone[a], both[b] - alone[b]
    total = sum(vectors[1:], vectors[0])
    norms = np.array([[a.cosine(b) for b in vectors] for a in vectors])
    sums = {c: shares(moved(total, c)) for c in SCALES}
    return {"interference": cost, "alone": alone, "sums": sums, "cosines": norms}


def _matrix(names: Sequence[str], values: np.ndarray, width: int) -> list[str]:
    head = " " * width + "".join(f"{name:>{width}}" for name in names)
    return [head] + [f"{n:<{width}}" + "".join(f"{v:>{width}.1f}" for v in row) for n, row in zip(names, values, strict=True)]


def _list(words: Sequence[str]) -> str:
    return "".join(words) if len(words) < 2 else f"{', '.join(words[:-1])} and {words[-1]}"
