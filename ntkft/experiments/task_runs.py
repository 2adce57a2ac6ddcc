r"""Real fine-tuning for the chapters on task vectors: one model, several tasks, each trained alone from the same weights.

A `Family` is a model with its tasks: human ratings of four domains, two pairs of topics and the author of a tweet for MiniLM,
the four domains for SmolLM2. Beside the ratings each domain has a second label, the length of its texts, for analogies.
`start` holds the kernel of all texts and everything that is predicted from it, and is stored before any training. Then each task
is trained twice as one run: *early* to the training error that the discrepancy principle asks for, *over* four times as long.
The third vector of a task, *tangent*, is :math:`\nabla_\theta\sum_i\alpha_i f(x_i;\theta_0)`, that of the linearised model.
`measure` applies vectors to the weights and keeps the scores.

All models have a free constant: training is on centred batches, and whoever reads the scores sets the constant of a task so
that its training texts have the right mean.

Example
-------
>>> family = Family("minilm", 0)
>>> [label for label in family.labels if label.startswith("length")]
['length-amazon', 'length-movies', 'length-nyt', 'length-tweets']
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

import ntkft
from ntkft import stopping
from ntkft.advice_path import guarded_gcv
from ntkft.assets import home
from ntkft.descent import descend
from ntkft.experiments.llm_kernels import DOMAINS, TOPICS
from ntkft.experiments.result import resumable
from ntkft.finetune import preserved_weights, train
from ntkft.merging import merge
from ntkft.provenance import code_hash
from ntkft.readout import Readout
from ntkft.task_vectors import TaskVector
from ntkft.tasks import Task

MAX_TOKENS = 64
BATCH = 16
OVER = 4  # the over-trained vector's training time, in units of the early one's
MOST = 40  # epochs at most until the early stop
KINDS = ("early", "over", "tangent")
SCALES = (0.2, 0.3, 0.5, 0.7, 1.0)
LINE = (-2.0, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0)
PLANE = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
PAIRS = (("amazon", "movies"), ("tweets", "election"), ("newsgroups", "reuters"))  # of the planes, chosen beforehand
MERGES = ("ties", "dare_linear")


@dataclass(frozen=True)
class Setting:
    """Tasks of a model, texts for training and held out for each, the step in units of 1/λ_1, whether lengths are learned."""

    tasks: tuple[str, ...]
    n: int
    test: int
    step: float
    lengths: bool
    pairs: tuple[tuple[str, str], ...]
    plane: tuple[float, ...]


SETTINGS = {
    "minilm": Setting((*DOMAINS, *TOPICS, "election"), 64, 48, 0.1, True, PAIRS, PLANE),
    "smollm2": Setting(DOMAINS, 48, 32, 0.5, False, (("amazon", "tweets"),), PLANE[::2]),
}


@dataclass(frozen=True)
class Family:
    """A model and the seed of its head, of the texts, of the raters and of the batches."""

    model: str
    seed: int

    @property
    def setting(self) -> Setting:
        """Sizes and steps."""
        return SETTINGS[self.model]

    @property
    def key(self) -> str:
        """Name of the stored parts."""
        return f"{self.model}-{self.seed}"

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of all things that are learned: the tasks, and the length of each domain's texts."""
        return (*self.setting.tasks, *(f"length-{domain}" for domain in DOMAINS if self.setting.lengths))

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The tasks, training texts first; a rating is that of one random person."""
        found = {}
        for name in self.setting.tasks:
            task = ntkft.load_task(TOPICS.get(name, (name,))[0], n=self.setting.n + self.setting.test, seed=self.seed)
            found[name] = task if task.ratings is None else task.redraw(1, seed=self.seed)
        return found

    @cached_property
    def texts(self) -> list[str]:
        """All texts, task by task."""
        return [text for task in self.tasks.values() for text in task.texts]

    def rows(self, label: str) -> np.ndarray:
        """Return where the texts of a label are among all, training texts first: (n + test,)."""
        k, size = self.setting.tasks.index(label.removeprefix("length-")), self.setting.n + self.setting.test
        return np.arange(k * size, (k + 1) * size)

    def values(self, label: str) -> tuple[np.ndarray, np.ndarray]:
        """Return what is trained on and what is true, (n + test,) each."""
        task = self.tasks[label.removeprefix("length-")]
        if label in self.tasks:
            return task.y, task.reference
        words = np.log([len(text.split()) for text in task.texts])
        words = (words - words.mean()) / words.std()
        return words, words

    def sigma(self, label: str) -> float:
        """Return the noise level of a rated task; nan where it is not known."""
        task = self.tasks.get(label)
        known = task is not None and task.ratings is not None
        return float(np.sqrt(task.noise_variance or np.nan)) if task is not None and known else float("nan")

    def readout(self) -> Readout:
        """Return the read-out, model and all."""
        loaded = ntkft.load_model(self.model)
        if self.model == "minilm":
            return ntkft.pooled_readout(loaded, seed=self.seed, max_tokens=MAX_TOKENS)
        return ntkft.prompt_readout(loaded, max_tokens=MAX_TOKENS)


def start(family: Family) -> dict[str, np.ndarray]:
    """Return the kernel before training and what it says: for each label λ_1, the level of the stop, its kernel time, α.

    The level is σ² where σ is known, else the training error at the time of generalised cross-validation, taken among the times
    that spend at most half of the degrees of freedom.
    """
    return resumable(__name__, f"{family.key}-start", lambda: _start(family))


def _start(family: Family) -> dict[str, np.ndarray]:
    kernel = ntkft.empirical_ntk(family.readout(), family.texts, memory="4GB", progress=False)
    n = family.setting.n
    top, level, eta, alpha = [], [], [], []
    for label in family.labels:
        rows = family.rows(label)[:n]
        path = descend(kernel.block(rows), family.values(label)[0][:n], intercept=True)
        sigma = family.sigma(label)
        if np.isnan(sigma):
            stop = guarded_gcv(path)  # topics: the kernel can fit them to the end, where the plain rule is 0/0
            level.append(float(path.residual(stop.eta)))
        else:
            stop = stopping.discrepancy_rule(path, sigma)
            level.append(sigma**2)
        top.append(path.eigenvalues[0])
        eta.append(stop.eta)
        alpha.append(path.coefficients(stop.eta))
    return {
        "kernel": kernel.matrix.astype(np.float32),
        "scores": kernel.scores,
        "lambda_1": np.array(top),
        "level": np.array(level),
        "eta": np.array(eta),
        "alpha": np.array(alpha),
        # one step for all, so that kernel time is the same for all: the largest eigenvalue of a task sets it
        "step_size": np.array(family.setting.step / max(top[: len(family.setting.tasks)])),
    }


@lru_cache(maxsize=4)
def vector(family: Family, label: str, kind: str) -> TaskVector:
    """Return a task vector, trained if it is not on disk."""
    path = _file(family, label, kind)
    if not path.is_file():
        if kind == "tangent":
            _tangent(family, label).save(path)
        else:
            training(family, label)
    return TaskVector.load(path)


def _file(family: Family, label: str, kind: str) -> Path:
    return home() / "runs" / "task_runs" / code_hash(__name__)[:16] / f"{family.key}-{label}-{kind}.safetensors"


def _tangent(family: Family, label: str) -> TaskVector:
    alpha = start(family)["alpha"][family.labels.index(label)]
    texts = [family.texts[i] for i in family.rows(label)[: family.setting.n]]
    vector = expansion(_readout(family), texts, alpha)
    vector.info |= {"family": family.key, "label": label, "kind": "tangent"}
    return vector


def expansion(readout: Readout, texts: list[str], alpha: np.ndarray) -> TaskVector:
    """Return Φᵀα, the task vector of the linearised model, by one backward pass over the texts in parts."""
    weights = torch.tensor(alpha, dtype=torch.float32)
    readout.module.zero_grad(set_to_none=True)
    for part in range(0, len(texts), BATCH):
        (readout(texts[part : part + BATCH]) * weights[part : part + BATCH]).sum().backward()
    moved = {name: p.grad.detach().clone() for name, p in readout.parameters().items() if p.grad is not None}
    readout.module.zero_grad(set_to_none=True)
    return TaskVector.from_tensors(moved)


def training(family: Family, label: str) -> dict[str, np.ndarray]:
    """Train one label, save its early and its over-trained vector; return the training error after each epoch and the stop."""
    return resumable(__name__, f"{family.key}-train-{label}", lambda: _train(family, label))


def _train(family: Family, label: str) -> dict[str, np.ndarray]:
    about, readout, n = start(family), _readout(family), family.setting.n
    level, k = float(about["level"][family.labels.index(label)]), family.labels.index(label)
    texts, y = [family.texts[i] for i in family.rows(label)[:n]], family.values(label)[0][:n]
    before = {name: p.detach().clone() for name, p in readout.parameters().items()}
    errors: list[float] = []
    with preserved_weights(readout):
        for epoch in itertools.count(1):
            done = train(
                readout,
                texts,
                y,
                step_size=float(about["step_size"]),
                epochs=1,
                batch_size=BATCH,
                intercept=True,
                seed=1000 * family.seed + 50 * k + epoch,
                progress=False,
            )
            errors += list(done.residual[0 if epoch == 1 else 1 :])
            if "early" not in about and (errors[-1] <= level or epoch == MOST):
                about["early"] = np.array(epoch)
                _keep(family, label, "early", before, readout, epoch)
            if "early" in about and epoch == OVER * int(about["early"]):
                _keep(family, label, "over", before, readout, epoch)
                break
    return {"residual": np.array(errors), "early": about["early"], "level": np.array(level)}


def _keep(family: Family, label: str, kind: str, before: dict[str, torch.Tensor], readout: Readout, epoch: int) -> None:
    info = {"family": family.key, "label": label, "kind": kind, "epochs": epoch}
    TaskVector(before, readout.parameters(), info=info).save(_file(family, label, kind))


def joint(family: Family, chosen: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Train several tasks together, batches of one task in turn; scores of all texts after as many epochs as tasks alone took.

    The number of epochs is the mean of the tasks' own, each task being seen as often.
    """
    return resumable(__name__, f"{family.key}-joint-{len(chosen)}", lambda: _joint(family, chosen))


def _joint(family: Family, chosen: tuple[str, ...]) -> dict[str, np.ndarray]:
    about, readout, n = start(family), _readout(family), family.setting.n
    epochs = round(np.mean([int(training(family, label)["early"]) for label in chosen]))
    generator = np.random.default_rng((family.seed, 11))
    optimiser = torch.optim.SGD(readout.parameters().values(), lr=float(about["step_size"]))
    scores = []
    with preserved_weights(readout):
        looks = (epochs, OVER * epochs) if family.model == "minilm" else (epochs,)
        for epoch in range(1, looks[-1] + 1):
            parts = [(k, p) for k, label in enumerate(chosen) for p in np.split(generator.permutation(n), n // BATCH)]
            for pick in generator.permutation(len(parts)):
                k, part = parts[pick]
                rows, y = family.rows(chosen[k])[part], torch.tensor(family.values(chosen[k])[0][part], dtype=torch.float32)
                optimiser.zero_grad(set_to_none=True)
                left = readout([family.texts[i] for i in rows]) - y
                ((left - left.mean()) ** 2).mean().div(2).backward()
                optimiser.step()
            if epoch in looks:
                scores.append(readout.scores(family.texts))
    return {"epochs": np.array(looks), "scores": np.array(scores)}


_LAST: dict[Family, Readout] = {}


def _readout(family: Family) -> Readout:
    """Return the read-out at its first weights, loaded once for a family after the other."""
    if family not in _LAST:
        _LAST.clear()
        _LAST[family] = family.readout()
    return _LAST[family]


@contextmanager
def moved(family: Family, parts: dict[str, float], kind: str) -> Iterator[Readout]:
    """Give the read-out at θ0 + Σ c_k τ_k; afterwards every bit of θ0 is back."""
    readout = _readout(family)
    with preserved_weights(readout):
        for label, scale in parts.items():
            if scale:
                vector(family, label, kind).apply(readout, scale)
        yield readout


def scores(family: Family, parts: dict[str, float], kind: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Return the scores of the texts in `rows` (all if None) at θ0 + Σ c_k τ_k."""
    texts = family.texts if rows is None else [family.texts[i] for i in rows]
    with moved(family, parts, kind) as readout:
        return readout.scores(texts)


def measure(family: Family, what: str, kind: str) -> dict[str, np.ndarray]:
    """Return the scores that one of `MEASURES` asks for; made once."""
    return resumable(__name__, f"{family.key}-{what}-{kind}", lambda: MEASURES[what](family, kind))


def _single(family: Family, kind: str) -> dict[str, np.ndarray]:
    """Return each vector alone, at all texts: (labels, N); lengths and inner products of the vectors."""
    found = np.array([scores(family, {label: 1.0}, kind) for label in family.labels])
    vectors = [vector(family, label, kind) for label in family.setting.tasks]
    return {"scores": found, "gram": np.array([[a.dot(b) for b in vectors] for a in vectors])}


def _sum(family: Family, kind: str) -> dict[str, np.ndarray]:
    """Return c times the sum of the domains' vectors, and of all tasks' vectors, at all texts: (sums, scales, N)."""
    sums = [DOMAINS, family.setting.tasks] if family.setting.tasks != DOMAINS else [DOMAINS]
    readout, found = _readout(family), []
    for names in sums:
        total = merge([vector(family, label, kind) for label in names], "sum")
        for c in SCALES:
            with total.applied(readout, c):
                found.append(readout.scores(family.texts))
    return {"scores": np.array(found).reshape(len(sums), len(SCALES), -1)}


def _merge(family: Family, kind: str) -> dict[str, np.ndarray]:
    """Return c times the domains' vectors merged with loss of entries, at all texts: (methods, scales, N)."""
    vectors = [vector(family, label, kind) for label in DOMAINS]
    readout, found = _readout(family), []
    for method in MERGES:
        merged = merge(vectors, method, seed=family.seed)
        for c in SCALES:
            with merged.applied(readout, c):
                found.append(readout.scores(family.texts))
    return {"scores": np.array(found).reshape(len(MERGES), len(SCALES), -1)}


def _pairs(family: Family, kind: str) -> dict[str, np.ndarray]:
    """Return the sum of each two vectors at the texts of both tasks: (pairs, texts)."""
    found = [
        scores(family, {a: 1.0, b: 1.0}, kind, np.concatenate([family.rows(a), family.rows(b)]))
        for a, b in itertools.combinations(family.setting.tasks, 2)
    ]
    return {"scores": np.array(found)}


def _line(family: Family, kind: str) -> dict[str, np.ndarray]:
    """Return c times each vector at its own texts and at those of the next task: (tasks, scales, texts)."""
    names, found = family.setting.tasks, []
    for k, label in enumerate(names):
        rows = np.concatenate([family.rows(label), family.rows(names[(k + 1) % len(names)])])
        found.append([scores(family, {label: c}, kind, rows) for c in LINE])
    return {"scores": np.array(found)}


def _plane(family: Family, kind: str) -> dict[str, np.ndarray]:
    """Return α_1 τ_1 + α_2 τ_2 at the held-out texts of both tasks: (pairs, α_1, α_2, texts)."""
    n, grid, found = family.setting.n, family.setting.plane, []
    for a, b in family.setting.pairs:
        rows = np.concatenate([family.rows(a)[n:], family.rows(b)[n:]])
        found.append([[scores(family, {a: one, b: two}, kind, rows) for two in grid] for one in grid])
    return {"scores": np.array(found)}


def _analogy(family: Family, kind: str) -> dict[str, np.ndarray]:
    """Return rating of d by analogy, rating(s) - length(s) + length(d), at the texts of d: (pairs of domains, texts)."""
    found = [
        scores(family, {s: 1.0, f"length-{s}": -1.0, f"length-{d}": 1.0}, kind, family.rows(d))
        for s, d in itertools.permutations(DOMAINS, 2)
    ]
    return {"scores": np.array(found)}


MEASURES: dict[str, Callable[[Family, str], dict[str, np.ndarray]]] = {
    "single": _single,
    "sum": _sum,
    "merge": _merge,
    "pairs": _pairs,
    "line": _line,
    "plane": _plane,
    "analogy": _analogy,
}
