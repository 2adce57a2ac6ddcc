"""Task arithmetic foretold by the kernel and measured on fine-tuned models: adding, negating, analogies.

The runs are made by `task_runs` and kept, packed, in ``results/task_vectors/runs``; what the kernel predicts was stored with each
before it trained. Comparing the two is done here, so the quick tier repeats the whole analysis, and adds one vector of its own.
`FamilyRuns` joins predictions and measurements of one family and is also used by `many_tasks`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

import ntkft
from ntkft.arithmetic import FineTuning, TaskVectors
from ntkft.descent import descend
from ntkft.experiments.llm_kernels import DOMAINS
from ntkft.experiments.result import resumable
from ntkft.experiments.task_runs import BATCH, KINDS, LINE, OVER, SCALES, Family, expansion
from ntkft.readout import Readout
from ntkft.tangent import linearise


@dataclass(frozen=True)
class FamilyRuns:
    """A family's stored scores, and the closed form of the same vectors for each kind.

    Attributes
    ----------
    family : Family
    data : dict of ndarray
        ``part/array``, as `task_run_list.load` gives it.
    vectors : dict of TaskVectors
        For each kind, what the kernel before training says; tasks in the order of `Family.labels`.
    """

    family: Family
    data: dict[str, np.ndarray]
    vectors: dict[str, TaskVectors]

    @classmethod
    def load(cls, family: Family) -> FamilyRuns | None:
        """Read a family from the results; None if it was not made."""
        from ntkft.experiments.task_run_list import load

        data = load(family)
        if data is None:
            return None
        return cls(family, data, {kind: predicted(family, data, kind) for kind in KINDS})

    @property
    def trained_time(self) -> np.ndarray:
        """Kernel time of each label's early training, epochs times steps times step size: (labels,)."""
        epochs = np.array([self.data[f"train-{label}/early"] for label in self.family.labels])
        return epochs * self.epoch_time

    @property
    def epoch_time(self) -> float:
        """Kernel time of one epoch of a task."""
        return float(self.data["start/step_size"]) * math.ceil(self.family.setting.n / BATCH)

    def moved(self, name: str) -> np.ndarray:
        """Return what a measurement changed in the scores of all texts, (..., N)."""
        return self.data[f"{name}/scores"] - self.data["start/scores"]

    def moved_at(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return what a measurement at some texts changed there: (..., N), not a number elsewhere."""
        part = self.data[name]
        whole = np.full((*part.shape[:-1], len(self.data["start/scores"])), np.nan)
        whole[..., rows] = part - self.data["start/scores"][rows]
        return whole


def predicted(family: Family, data: dict[str, np.ndarray], kind: str, times: np.ndarray | None = None) -> TaskVectors:
    """Return the vectors that the kernel predicts: at `times` (its own early stops if None), or at `OVER` times them."""
    n, tunings = family.setting.n, []
    for label, eta in zip(family.labels, data["start/eta"] if times is None else times, strict=True):
        rows, (y, truth) = family.rows(label), family.values(label)
        time = float(eta) * (OVER if kind == "over" else 1)
        tunings.append(FineTuning(rows[:n], y[:n], time, intercept=True, held_out=rows[n:], reference=truth[n:]))
    return TaskVectors(data["start/kernel"], tunings, data["start/scores"])


def agreement(vectors: TaskVectors, task: int, told: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Return correlation and relative error of a predicted change of a task's held-out scores, constants apart."""
    one, two = (vectors.seen(task, move, held_out=True) for move in (told, found))
    return float(np.corrcoef(one, two)[0, 1]), float(np.linalg.norm(one - two) / np.linalg.norm(two))


def singles(runs: FamilyRuns, kind: str) -> np.ndarray:
    """Return correlation and error of each vector's effect on each task's held-out texts: (labels, tasks, 2)."""
    return _agreements(runs, runs.vectors[kind], kind)


def singles_by_clock(runs: FamilyRuns, kind: str) -> np.ndarray:
    """Return the same for another prediction, at the kernel time that was trained; it needs to know the number of epochs."""
    return _agreements(runs, predicted(runs.family, runs.data, kind, runs.trained_time), kind)


def _agreements(runs: FamilyRuns, vectors: TaskVectors, kind: str) -> np.ndarray:
    found, tasks = runs.moved(f"single-{kind}"), len(runs.family.setting.tasks)
    return np.array(
        [[agreement(vectors, a, vectors.moves[k], found[k]) for a in range(tasks)] for k in range(len(vectors))]
    )


def sums(runs: FamilyRuns, kind: str) -> np.ndarray:
    """Return correlation and error for sums of vectors: (sums, scales, tasks, 2 predictions, 2).

    The first prediction is the kernel's. The second adds up what the vectors were measured to do alone, so it fails only where
    the network is not linear along its vectors.
    """
    from ntkft.experiments.task_run_list import sums as summed

    vectors, alone, found = runs.vectors[kind], runs.moved(f"single-{kind}"), runs.moved(f"sum-{kind}")
    out = []
    for names, row in zip(summed(runs.family), found, strict=True):
        c = np.isin(runs.family.labels, names).astype(float)
        for scale, move in zip(SCALES, row, strict=True):
            told = (scale * c @ vectors.moves, scale * c @ alone)
            tasks = [runs.family.labels.index(name) for name in names]
            part = np.full((len(runs.family.setting.tasks), 2, 2), np.nan)
            part[tasks] = [[agreement(vectors, a, t, move) for t in told] for a in tasks]
            out.append(part)
    return np.array(out).reshape(len(found), len(SCALES), -1, 2, 2)


def lines(runs: FamilyRuns, kind: str) -> dict[str, np.ndarray]:
    """Return losses along each vector, told and found: own training texts, own held-out texts, and the next task's held-out.

    Each is (2, tasks, places, scales), in shares of the loss before training; scales are `LINE` with 0 put in.
    """
    vectors, family = runs.vectors[kind], runs.family
    tasks, out = len(family.setting.tasks), []
    for k in range(tasks):
        other = (k + 1) % tasks
        rows = np.concatenate([family.rows(family.labels[t]) for t in (k, other)])
        move = runs.moved_at(f"line-{kind}/scores", rows)[k]
        row = []
        for task, held_out in ((k, False), (k, True), (other, True)):
            told = vectors.loss_along(task, k, held_out)
            start = float(told(0.0))
            found = vectors.loss(task, move, held_out)
            row.append([told(np.array(LINE)) / start, found / start])
        out.append(row)
    values = np.moveaxis(np.array(out), 2, 0)  # (2, tasks, places, scales)
    zero = int(np.searchsorted(LINE, 0.0))
    return {"scales": np.insert(LINE, zero, 0.0), "losses": np.insert(values, zero, 1.0, axis=-1)}


def analogies(runs: FamilyRuns, kind: str) -> np.ndarray:
    """Return the held-out loss on d of rating(s) - length(s) + length(d), in shares of that before training.

    For each ordered pair of domains: (pairs, 5), by analogy, with the source's rating vector alone, and with d's own rating
    vector; then the first two as told.
    """
    vectors, family, label = runs.vectors[kind], runs.family, runs.family.labels.index
    alone, out = runs.moved(f"single-{kind}"), []
    for k, (s, d) in enumerate(itertools.permutations(DOMAINS, 2)):
        found = runs.moved_at(f"analogy-{kind}/scores", family.rows(d))[k]
        told = vectors.moves[label(s)] - vectors.moves[label(f"length-{s}")] + vectors.moves[label(f"length-{d}")]
        moves = (found, alone[label(s)], alone[label(d)], told, vectors.moves[label(s)])
        start = float(vectors.loss(label(d), np.zeros(len(told)), held_out=True))
        out.append([float(vectors.loss(label(d), move, held_out=True)) / start for move in moves])
    return np.array(out)


def tangent_check(readout: Readout, texts: list[str], y: np.ndarray, n: int, scales: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Compare f0 + Σ c_k k(x, X_k)α_k with the linearised network at θ0 + Σ c_k τ_k, for two tasks of n texts each.

    Returns
    -------
    dict
        told, found (scales, texts) changes of the scores, and the largest relative error of a scale.
    """
    kernel = ntkft.empirical_ntk(readout, texts, memory="300MB", progress=False)
    eta = 4 / float(kernel.block(np.arange(n)).spectrum().eigenvalues[0])
    rows = [np.arange(n), np.arange(n, 2 * n)]
    alphas = [descend(kernel.block(r), y[r], intercept=True).coefficients(eta) for r in rows]
    line = linearise(readout)
    taus = [expansion(readout, [texts[i] for i in r], alpha) for r, alpha in zip(rows, alphas, strict=True)]
    told, found = [], []
    for c in scales:
        told.append(c * kernel.matrix[:, rows[0]] @ alphas[0] - kernel.matrix[:, rows[1]] @ alphas[1])
        with (c * taus[0] - taus[1]).applied(line):
            found.append(line.scores(texts) - kernel.scores)
    one, two = np.array(told), np.array(found)
    return {"told": one, "found": two, "error": np.linalg.norm(one - two, axis=1) / np.linalg.norm(two, axis=1)}


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Analyse the stored runs (full tier: make what is missing first); see the module docstring."""
    from ntkft.experiments.task_run_list import FAMILIES, make

    values: dict[str, Any] = {"kinds": list(KINDS), "scales": list(SCALES)}
    arrays: dict[str, np.ndarray] = {}
    if tier == "full":
        for family in FAMILIES:
            make(family)
    for model in ("minilm", "smollm2"):
        chosen = [runs for f in FAMILIES if f.model == model and (runs := FamilyRuns.load(f)) is not None]
        if not chosen:
            continue
        values |= {f"{model}_labels": list(chosen[0].family.labels), f"{model}_families": len(chosen)}
        arrays[f"{model}_single"] = np.array([[singles(r, kind) for kind in KINDS] for r in chosen])
        arrays[f"{model}_single_clock"] = np.array([[singles_by_clock(r, kind) for kind in KINDS[:2]] for r in chosen])
        arrays[f"{model}_clock"] = np.array([[r.data["start/eta"], r.trained_time] for r in chosen])
        arrays[f"{model}_sum"] = np.array([[sums(r, kind) for kind in KINDS] for r in chosen])
        along = [[lines(r, kind) for kind in KINDS] for r in chosen]
        arrays[f"{model}_line"] = np.array([[one["losses"] for one in row] for row in along])
        arrays["line_scales"] = along[0][0]["scales"]
        if chosen[0].family.setting.lengths:
            arrays[f"{model}_analogy"] = np.array([[analogies(r, kind) for kind in KINDS] for r in chosen])
        told = [[r.vectors[kind].gram()[:4, :4] for kind in KINDS] for r in chosen]
        found = [[r.data[f"single-{kind}/gram"][:4, :4] for kind in KINDS] for r in chosen]
        arrays |= {f"{model}_gram_told": np.array(told), f"{model}_gram": np.array(found)}
    size = 12 if tier == "quick" else 32
    checked = resumable(__name__, f"tangent-{seed}", lambda: live(size, seed), keep=tier == "full")
    arrays |= {f"tangent_{key}": value for key, value in checked.items() if key != "seconds"}
    return values, arrays


def live(size: int, seed: int) -> dict[str, np.ndarray]:
    """Return `tangent_check` of MiniLM on reviews and tweets."""
    tasks = [ntkft.load_task(name, n=size, seed=seed).redraw(1, seed=seed) for name in ("amazon", "tweets")]
    readout = ntkft.pooled_readout(ntkft.load_model("minilm"), seed=seed, max_tokens=48)
    texts = [text for task in tasks for text in task.texts]
    return tangent_check(readout, texts, np.concatenate([t.y for t in tasks]), size, (0.5, 1.0, 2.0))
