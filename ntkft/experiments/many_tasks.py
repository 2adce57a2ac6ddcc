"""Several task vectors in one model: what they do to each other, foretold before training and measured.

Reads the runs of `task_runs` through `task_vectors.FamilyRuns`; the quick tier repeats the whole analysis of what is stored.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from scipy.stats import rankdata

from ntkft.arithmetic import TaskVectors
from ntkft.experiments.task_runs import KINDS, MERGES, SCALES
from ntkft.experiments.task_vectors import FamilyRuns
from ntkft.interference import cross_talk_sizes, disentanglement, interference, overlap
from ntkft.multitask import Joint


def planes(runs: FamilyRuns, kind: str) -> np.ndarray:
    """Return ξ on the grid, told and found: (2, pairs, grid, grid), mean squared distance, less the mean over the texts."""
    family, vectors = runs.family, runs.vectors[kind]
    n, grid, out = family.setting.n, np.array(family.setting.plane), []
    zero, m = int(np.flatnonzero(grid == 0)[0]), family.setting.test
    for (a, b), scores in zip(family.setting.pairs, runs.data[f"plane-{kind}/scores"], strict=True):
        found = np.zeros((len(grid), len(grid)))
        told = np.zeros_like(found)
        for side, part in ((0, scores[..., :m]), (1, scores[..., m:])):
            alone = part[:, zero : zero + 1] if side == 0 else part[zero : zero + 1]
            found += (part - alone).var(-1)  # a constant is free: the mean over the texts does not count
            label, other = (a, b)[side], (b, a)[side]
            cross = vectors.moves[family.labels.index(other)][family.rows(label)[n:]].var()
            told += (grid[None, :] if side == 0 else grid[:, None]) ** 2 * cross
        out.append([told, found])
    return np.moveaxis(np.array(out), 1, 0)


def before(runs: FamilyRuns) -> np.ndarray:
    """Return every task's held-out loss before training: (tasks,); it is the same for all kinds of vectors."""
    vectors, zero = runs.vectors["early"], np.zeros(len(runs.family.texts))
    return np.array([float(vectors.loss(a, zero, held_out=True)) for a in range(len(runs.family.setting.tasks))])


def losses(runs: FamilyRuns, move: np.ndarray, kind: str) -> np.ndarray:
    """Return every task's held-out loss after a change of the scores, in shares of that before training: (..., tasks)."""
    vectors, start = runs.vectors[kind], before(runs)
    return np.stack([vectors.loss(a, move, held_out=True) / start[a] for a in range(len(start))], axis=-1)


def constant_losses(runs: FamilyRuns) -> np.ndarray:
    """Return each task's held-out loss if its mean were told for every text, in shares of that before training: (tasks,)."""
    tunings, start = runs.vectors["early"].tunings, before(runs)
    return np.array([np.var(np.asarray(tunings[a].reference)) / 2 / start[a] for a in range(len(start))])


def accuracies(runs: FamilyRuns, move: np.ndarray, kind: str) -> np.ndarray:
    """Return the share of held-out texts on the right side of zero: (..., tasks), not a number for ratings."""
    vectors, out = runs.vectors[kind], []
    for a in range(len(runs.family.setting.tasks)):
        rows, truth = vectors.held_out[a], np.asarray(vectors.tunings[a].reference)
        two = set(np.unique(truth)) == {-1.0, 1.0}
        right = np.sign(vectors.after(move, rows, a)) == truth
        out.append(right.mean(-1) if two else np.full(move.shape[:-1], np.nan))
    return np.stack(out, axis=-1)


def linear_losses(runs: FamilyRuns, kind: str) -> np.ndarray:
    """Return what the kernel says of the domains' sums: (scales, tasks); for tangent vectors, what the linearised model does."""
    domains = np.arange(len(runs.vectors[kind])) < 4
    return losses(runs, np.array([c * domains @ runs.vectors[kind].moves for c in SCALES]), kind)


def pair_losses(runs: FamilyRuns, kind: str) -> dict[str, np.ndarray]:
    """Return, for each ordered pair (a, b) of tasks, what adding b costs a: told and found, and two guesses without labels.

    The cost is the change of a's held-out loss in shares of its loss before training.
    """
    family, vectors = runs.family, runs.vectors[kind]
    names, alone = family.setting.tasks, runs.moved(f"single-{kind}")
    told, seen, size = interference(vectors, held_out=True), overlap(vectors), cross_talk_sizes(vectors, held_out=True)
    rows: list[list[float]] = []
    for k, pair in enumerate(itertools.combinations(range(len(names)), 2)):
        texts = np.concatenate([family.rows(names[t]) for t in pair])
        both = runs.moved_at(f"pairs-{kind}/scores", texts)[k]
        for own, other in ((pair[0], pair[1]), (pair[1], pair[0])):
            start = float(vectors.loss(own, np.zeros(len(both)), held_out=True))
            cost = float(vectors.loss(own, both, True) - vectors.loss(own, alone[own], True)) / start
            rows.append([told[own, other], cost, seen[own, other], size[own, other] ** 2 / (2 * start), own, other])
    columns = np.array(rows).T
    return dict(zip(("told", "found", "overlap", "size", "own", "other"), columns, strict=True))


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each row: all rows at once, which `scipy.stats.spearmanr` cannot."""
    ranks = np.stack([rankdata(a, axis=-1), rankdata(b, axis=-1)])
    ranks -= ranks.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a constant row has none
        return (ranks[0] * ranks[1]).sum(-1) / np.sqrt((ranks**2).sum(-1).prod(0))


def rank_correlation(told: np.ndarray, found: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """Return Spearman's correlation, the mean over families (rows), and its 95 % interval over families and pairs resampled."""
    rng = np.random.default_rng(seed)
    families, pairs = told.shape
    value = np.mean(_spearman(told, found))
    picks, again = np.empty((draws, pairs), int), np.empty((draws, families), int)
    for k in range(draws):
        picks[k], again[k] = rng.integers(0, pairs, pairs), rng.integers(0, families, families)
    each = np.stack([_spearman(t[picks], f[picks]) for t, f in zip(told, found, strict=True)], axis=1)  # draws, families
    drawn = np.take_along_axis(each, again, axis=1).mean(1)
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(value), float(low), float(high)


def joint_training(runs: FamilyRuns) -> dict[str, np.ndarray]:
    """Return held-out losses after joint training of the domains: (4,) each.

    `joint` is measured. `joint_told` is foretold at the mean time of the tasks' own stops, `joint_clock` at the kernel time that
    joint training really took; it needs to know the number of epochs.
    """
    domains = runs.vectors["early"]
    four = Joint(TaskVectors(domains.matrix, domains.tunings[:4], domains.scores))
    real = losses(runs, runs.moved("joint-4"), "early")[0, :4]
    eta = float(np.mean([t.eta for t in domains.tunings[:4]]))
    clock = float(runs.data["joint-4/epochs"][0]) * runs.epoch_time
    told, by_clock = (losses(runs, four.move(time), "early")[:4] for time in (eta, clock))
    return {"joint": real, "joint_told": told, "joint_clock": by_clock}


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Analyse the stored runs; `task_vectors` makes them."""
    from ntkft.experiments.task_run_list import FAMILIES, make

    if tier == "full":
        for family in FAMILIES:
            make(family)
    values: dict[str, Any] = {"kinds": list(KINDS), "scales": list(SCALES), "merges": list(MERGES)}
    arrays: dict[str, np.ndarray] = {}
    for model in ("minilm", "smollm2"):
        chosen = [runs for f in FAMILIES if f.model == model and (runs := FamilyRuns.load(f)) is not None]
        if not chosen:
            continue
        first = chosen[0]
        values |= {f"{model}_labels": list(first.family.labels), f"{model}_families": len(chosen)}
        values[f"{model}_pairs"] = [list(pair) for pair in first.family.setting.pairs]
        drawn = [kind for kind in KINDS if f"plane-{kind}/scores" in first.data]  # of SmolLM2 only early
        arrays[f"{model}_plane"] = np.array([planes(first, kind) for kind in drawn])
        arrays[f"{model}_grid"] = np.array(first.family.setting.plane)

        def each(what: Any, runs: list[FamilyRuns] = chosen) -> np.ndarray:
            return np.array([[what(r, kind) for kind in KINDS] for r in runs])

        arrays[f"{model}_constant"] = np.array([constant_losses(r) for r in chosen])
        arrays[f"{model}_right"] = each(lambda r, k: accuracies(r, r.moved(f"sum-{k}"), k))
        arrays[f"{model}_right_alone"] = each(lambda r, k: np.diagonal(accuracies(r, r.moved(f"single-{k}"), k)))
        arrays[f"{model}_alone"] = each(lambda r, k: np.diagonal(losses(r, r.moved(f"single-{k}"), k)))
        arrays[f"{model}_sum"] = each(lambda r, k: losses(r, r.moved(f"sum-{k}"), k))
        if f"merge-{KINDS[0]}/scores" in first.data:
            arrays[f"{model}_merge"] = each(lambda r, k: losses(r, r.moved(f"merge-{k}"), k))
        arrays[f"{model}_linear"] = each(linear_losses)
        arrays[f"{model}_length"] = each(lambda r, k: np.sqrt(np.diag(r.data[f"single-{k}/gram"])))
        pairs = [[pair_losses(r, kind) for kind in KINDS] for r in chosen]
        for key in pairs[0][0]:
            arrays[f"{model}_pair_{key}"] = np.array([[one[key] for one in row] for row in pairs])
        for k, kind in enumerate(KINDS):
            found = arrays[f"{model}_pair_found"][:, k]
            for guess in ("told", "overlap", "size"):
                values[f"{model}_{kind}_rank_{guess}"] = rank_correlation(arrays[f"{model}_pair_{guess}"][:, k], found, seed)
        together = [joint_training(r) for r in chosen]
        arrays |= {f"{model}_{key}": np.array([one[key] for one in together]) for key in together[0]}
        a, b = (first.family.labels.index(name) for name in first.family.setting.pairs[0])
        values[f"{model}_unit_error"] = float(disentanglement(first.vectors["early"], a, b, 1.0, 1.0, held_out=True))
    return values, arrays
