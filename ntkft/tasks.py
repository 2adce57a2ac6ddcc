"""A task: n texts, one noisy label for each, and what is known about the noise.

The theory of early stopping speaks of labels y_i = f*(x_i) + w_i with noise of known variance σ². Human ratings
give all three. N_i people rated text i; their mean is the reference f*(x_i); the label y_i is the mean of m of
them, drawn without replacement; so the variance of the label about the reference is known exactly::

    Var(y_i) = s_i² / m · (1 - m / N_i),     s_i² = Σ_j (r_ij - r̄_i)² / (N_i - 1)

(sampling from a finite population; for m = 1 it is the plain variance of the N_i ratings), and σ² is its mean over
the texts. Raising m is an experiment on the noise alone: texts and reference stay as they are.

Example
-------
>>> task = load_task("amazon", n=128, seed=0)
>>> task
Task('amazon', n=128, y in [-3, 4], raters=1, noise_variance=0.5629)
>>> task.redraw(raters=10, seed=0).noise_variance < task.noise_variance / 10
True
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ntkft import corpora, owndata
from ntkft.errors import InputError

KNOWN = (*corpora.RATED, *corpora.TOPICS, "election")


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """Texts with labels; the order of the texts is the order of every kernel and vector computed from them.

    Attributes
    ----------
    name : str
        As given to `load_task`.
    texts : list of str
        n distinct texts.
    y : numpy.ndarray, shape (n,), float64
        The labels to train on.
    reference : numpy.ndarray, shape (n,), float64
        Mean over all raters; equal to `y` where there are no single ratings.
    noise_variance : float or None
        Mean variance of `y` about `reference`, in squared units of the label; None if unknown.
    ratings : list of numpy.ndarray, or None
        Every single rating of each text, shape (N_i,).
    info : dict
        Source, seed, number of raters, classes, and what was dropped.
    """

    name: str
    texts: list[str]
    y: np.ndarray
    reference: np.ndarray
    noise_variance: float | None = None
    ratings: list[np.ndarray] | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {"y": self.y, "reference": self.reference, "ratings": self.ratings}
        for part, values in sizes.items():
            if values is not None and len(values) != len(self.texts):
                raise InputError(f"the task has {len(self.texts)} texts and {part} has {len(values)} entries")

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        span = f", y in [{self.y.min():g}, {self.y.max():g}]" if len(self) else ""
        raters = f", raters={self.info['raters']}" if self.ratings is not None else ""
        noise = "unknown" if self.noise_variance is None else f"{self.noise_variance:.4g}"
        return f"Task({self.name!r}, n={len(self)}{span}{raters}, noise_variance={noise})"

    def subset(self, indices: Sequence[int] | np.ndarray) -> Task:
        """Return the task of the texts at `indices`, in that order; a measured noise variance is that of the subset.

        Raises
        ------
        InputError
            An index outside 0 .. n-1.
        """
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)  # (k,)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise InputError(
                f"indices go from {chosen.min()} to {chosen.max()} and the task has {len(self)} texts"
            )
        ratings = None if self.ratings is None else [self.ratings[i] for i in chosen]
        noise = self.noise_variance
        if ratings:
            noise = sampling_variance(ratings, self.info["raters"])
        return replace(
            self,
            texts=[self.texts[i] for i in chosen],
            y=self.y[chosen],
            reference=self.reference[chosen],
            noise_variance=noise,
            ratings=ratings,
        )

    def redraw(self, raters: int, seed: int) -> Task:
        """Return the same texts and reference with labels drawn anew: the mean of `raters` ratings of each text.

        The order in which a text's raters are taken depends on the seed and the text alone. So the labels of
        `load_task(..., seed=s, raters=m)` and of `redraw(m, s)` agree, in any subset, and the m raters of a text are
        among its m + 1.

        Raises
        ------
        InputError
            The task has no single ratings, or a text has fewer than `raters`.
        """
        if self.ratings is None:
            raise InputError(
                f"task {self.name!r} has no single ratings to redraw; {', '.join(corpora.RATED)} have them"
            )
        _check_raters(self.name, self.ratings, raters)
        y = [_draw(text, r, raters, seed) for text, r in zip(self.texts, self.ratings, strict=True)]
        return replace(
            self,
            y=np.array(y, dtype=np.float64),
            noise_variance=sampling_variance(self.ratings, raters),
            info={**self.info, "raters": raters, "rating_seed": seed},
        )

    def split(self, test: int | float, seed: int = 0) -> tuple[Task, Task]:
        """Return (train, test), a random partition.

        Parameters
        ----------
        test : int or float
            Number of test texts, or, as a float between 0 and 1, their fraction.
        seed : int
            Seed of the partition.

        Raises
        ------
        InputError
            Train or test would be empty.

        Example
        -------
        >>> train, test = load_task("nyt", n=100).split(0.2)
        >>> len(train), len(test)
        (80, 20)
        """
        size = round(test * len(self)) if isinstance(test, float) else test
        if not 0 < size < len(self):
            raise InputError(
                f"test={test} puts {size} of {len(self)} texts into the test set: give a whole number from 1 to "
                f"{len(self) - 1}, or a fraction between 0 and 1"
            )
        order = np.random.default_rng(seed).permutation(len(self))  # (n,)
        return self.subset(order[size:]), self.subset(order[:size])


def load_task(
    name: str | Path,
    n: int | None = None,
    seed: int = 0,
    raters: int = 1,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    noise_variance: float | None = None,
) -> Task:
    """Load a task.

    Parameters
    ----------
    name : str or Path
        - "amazon", "movies", "nyt", "tweets": sentences with human ratings from -4 to 4;
        - "reuters", "newsgroups": documents of two classes, +1 and -1; "reuters:gold/sugar" chooses the classes;
        - "election": who wrote the tweet, Clinton (+1) or Trump (-1);
        - a path to a .csv, .tsv, .jsonl or .json file of your own (`ntkft.owndata.from_file`);
        - "hf:glue/sst2", "hf:imdb@test", "hf:some/folder": a dataset of the hub or of `save_to_disk`.
    n : int, optional
        Number of texts; all if None. The texts are the first n of one permutation of the corpus by `seed`, so a
        smaller task is a prefix of a larger one.
    seed : int
        Seed of the permutation and, independently, of the ratings drawn.
    raters : int
        How many ratings are averaged into a label; rated corpora only.
    text_column, label_column : str, optional
        For your own data; guessed from the usual names if None.
    noise_variance : float, optional
        What you know about the noise of labels without single ratings, in squared units of the label.

    Raises
    ------
    InputError
        Unknown name, class or column; more texts or raters than there are; an option that does not apply; labels that
        cannot be read.
    AssetError
        A packaged corpus is not in the cache and cannot be downloaded.

    Example
    -------
    >>> load_task("reuters:gold/sugar", n=50)
    Task('reuters:gold/sugar', n=50, y in [-1, 1], noise_variance=unknown)
    """
    name = str(name)
    if noise_variance is not None and not (np.isfinite(noise_variance) and noise_variance > 0):
        raise InputError(
            f"noise_variance is {noise_variance} and must be positive and finite; leave it out if unknown"
        )
    corpus, own = _corpus(name, text_column, label_column)
    if not own and (text_column is not None or label_column is not None):
        raise InputError(
            f"text_column and label_column are for your own data and {name!r} is a packaged corpus"
        )
    if corpus.ratings is None and raters != 1:
        raise InputError(
            f"raters is {raters} and task {name!r} has one label for each text: leave raters out"
        )
    if corpus.ratings is not None:
        _check_raters(name, corpus.ratings, raters)
        if noise_variance is not None:
            raise InputError(f"task {name!r} measures its noise from the ratings: leave noise_variance out")
    total = len(corpus.texts)
    if n is not None and not 1 <= n <= total:
        raise InputError(f"n is {n} and task {name!r} has {total} distinct texts: give n from 1 to {total}")
    # Stream 0 of the seed orders the texts, stream 1 (in `_draw`) the raters: neither knows of the other.
    stream = np.random.SeedSequence(seed, spawn_key=(0,))
    rows = np.random.default_rng(stream).permutation(total)[:n]  # (n,)
    task = Task(
        name=name,
        texts=[corpus.texts[i] for i in rows],
        y=corpus.y[rows],
        reference=corpus.y[rows],
        noise_variance=noise_variance,
        ratings=None if corpus.ratings is None else [corpus.ratings[i] for i in rows],
        info={**corpus.info, "corpus_size": total, "seed": seed},
    )
    return task if task.ratings is None else task.redraw(raters, seed)


def sampling_variance(ratings: Sequence[np.ndarray], raters: int) -> float:
    """Return the mean over the texts of s_i²/m · (1 - m/N_i), the exact variance of a mean of m of N_i ratings.

    Example
    -------
    >>> sampling_variance([np.array([0.0, 2.0])], raters=1)
    1.0
    """
    sizes = np.array([len(r) for r in ratings], dtype=np.float64)  # (n,)
    # A single rating has no spread to estimate; as the whole population it is also the reference: variance 0.
    spread = np.array([r.var(ddof=1) if len(r) > 1 else 0.0 for r in ratings])  # (n,)
    return float(np.mean(spread / raters * (1 - raters / sizes)))


def _check_raters(name: str, ratings: Sequence[np.ndarray], raters: int) -> None:
    fewest = min((len(r) for r in ratings), default=raters)
    if not 1 <= raters <= fewest:
        raise InputError(
            f"raters is {raters} and some texts of task {name!r} have only {fewest} ratings: give 1 to {fewest}"
        )


def _draw(text: str, ratings: np.ndarray, raters: int, seed: int) -> float:
    """Mean of the first `raters` ratings in an order that depends on the seed and the text alone."""
    words = np.frombuffer(hashlib.sha256(text.encode("utf-8")).digest()[:16], dtype="<u4")  # (4,)
    stream = np.random.SeedSequence(seed, spawn_key=(1, *map(int, words)))
    order = np.random.default_rng(stream).permutation(len(ratings))  # (N_i,)
    return float(ratings[order[:raters]].mean())


def _corpus(name: str, text_column: str | None, label_column: str | None) -> tuple[corpora.Corpus, bool]:
    """Return the corpus that `name` means, and whether it is the caller's own data."""
    base, colon, rest = name.partition(":")
    if name in corpora.RATED:
        return corpora.rated(name), False
    if name == "election":
        return corpora.election(), False
    if base in corpora.TOPICS:
        return corpora.topics(base, rest.split("/") if colon else corpora.TOPICS[base]), False
    if base == "hf" and rest:
        return owndata.from_hub(rest, text_column, label_column), True
    if Path(name).suffix.lower() in owndata.SUFFIXES:
        return owndata.from_file(name, text_column, label_column), True
    close = difflib.get_close_matches(base, KNOWN, n=1)
    raise InputError(
        f"no task is named {name!r}{f'; did you mean {close[0]!r}?' if close else ''}: the tasks are {', '.join(KNOWN)}; "
        f"a path to a file ({', '.join(owndata.SUFFIXES)}) or 'hf:NAME' works too"
    )
