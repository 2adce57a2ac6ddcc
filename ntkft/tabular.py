"""The census table on which fair representations are usually tried: who earns more than 50,000 dollars, and who is a woman.

UCI Adult (Kohavi 1996): 48,842 people of the 1994 census, with the original split into training and test. Categories become
indicators, numbers are standardised by the training part, a missing entry is a category of its own.

Example
-------
>>> people = load_adult()                                                                          # doctest: +SKIP
>>> people.x.shape, people.train                                                                   # doctest: +SKIP
((48842, 89), 32561)
"""

from __future__ import annotations

import csv
from dataclasses import dataclass

import numpy as np

from ntkft import assets

COLUMNS = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship",
    "race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
)  # fmt: skip
NUMBERS = ("age", "education-num", "capital-gain", "capital-loss", "hours-per-week")
# fnlwgt says how many people a row stands for; education repeats education-num in words.
LEFT_OUT = ("fnlwgt", "education", "sex", "income")


@dataclass(frozen=True, eq=False)
class Table:
    """A table with a target and an attribute.

    Attributes
    ----------
    x : (N, d) float32
        Inputs; the attribute is not among them.
    y, t : (N,) float32
        Target (income above 50,000) and attribute (female), 0 or 1.
    train : int
        The first so many rows are the training part.
    names : tuple of str
        Columns of x.
    """

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    train: int
    names: tuple[str, ...]


def load_adult() -> Table:
    """Return UCI Adult, fetched on first use; training rows first, in the order of the files."""
    folder = assets.fetch("adult")
    rows, sizes = [], []
    for name in ("adult.data", "adult.test"):
        with open(folder / name, newline="", encoding="utf-8") as file:
            part = [row for row in csv.reader(file, skipinitialspace=True) if len(row) == len(COLUMNS)]
        rows += part
        sizes.append(len(part))
    columns = dict(zip(COLUMNS, np.array(rows).T, strict=True))
    parts, names = [], []
    for name in COLUMNS:
        if name in LEFT_OUT:
            continue
        values = columns[name]
        if name in NUMBERS:
            number = values.astype(np.float64)
            if name.startswith("capital"):
                number = np.log1p(number)  # most are zero, some are 99,999
            fit = number[: sizes[0]]
            parts.append(((number - fit.mean()) / fit.std())[:, None])
            names.append(name)
        else:
            kinds = sorted(set(values))
            parts.append((values[:, None] == np.array(kinds)).astype(np.float64))
            names += [f"{name}={kind}" for kind in kinds]
    return Table(
        np.concatenate(parts, axis=1).astype(np.float32),
        (np.char.rstrip(columns["income"], ".") == ">50K").astype(np.float32),
        (columns["sex"] == "Female").astype(np.float32),
        sizes[0],
        tuple(names),
    )
