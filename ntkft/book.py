"""Small helpers for the chapters: glued numbers, the plot style, stored results.

Nothing here computes anything; a chapter works without it, only less prettily.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
from scipy import stats

from ntkft.errors import InputError
from ntkft.experiments.result import RESULTS, Result


def use_style() -> None:
    """Use the book's plot style: white ground (legible on light and dark pages), colours safe for all eyes."""
    import matplotlib.pyplot as plt

    plt.style.use(str(files("ntkft") / "book.mplstyle"))


def glue(name: str, value: Any) -> None:
    """Make a number available to the prose under `name`; does nothing where MyST-NB is not installed (Colab)."""
    try:
        from myst_nb import glue as myst_glue
    except ImportError:
        return
    # numpy 2 prints np.float64(0.1), which the glue role cannot format
    myst_glue(name, value.item() if isinstance(value, np.generic) else value, display=False)


def stored(chapter: str) -> Result:
    """Return the stored full-tier result of a chapter, and print a warning on the page if its code has changed since."""
    try:
        result = Result.load(RESULTS / chapter, "full")
    except InputError as error:
        raise InputError(
            f"{error} Stored results come with the repository, not with the package: clone it."
        ) from None
    if result.stale:
        print(
            f"Note: the code behind this stored result has changed since {result.manifest['date']}; rerun it with "
            f"`ntkft run {chapter} --tier full`."
        )
    return result


def table(header: list[str], rows: list[list[str]]) -> Any:
    """Show a table on the page, from strings; cells may hold Markdown."""
    from IPython.display import Markdown

    lines = [header, ["---"] * len(header), *rows]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def band(ax: Any, x: np.ndarray, y: np.ndarray, color: str, label: str, style: str = "-") -> None:
    """Draw the mean of the runs `y` (runs, k) against `x` (k,), with its 95 % bootstrap band over runs."""
    rows = np.random.default_rng(0).integers(0, len(y), (2000, len(y)))
    low, high = np.quantile(y[rows].mean(1), [0.025, 0.975], axis=0)
    ax.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
    ax.plot(x, y.mean(0), style, color=color, label=label)


def with_interval(y: np.ndarray, digits: int = 2) -> str:
    """Return the mean of the runs `y` (runs,) as text, ± half its 95 % interval by Student's t if there are three or more."""
    y = np.asarray(y, float)
    text = f"{np.round(y.mean(), digits) + 0.0:.{digits}f}".replace("-", "−")  # a true minus, and none before zero
    if len(y) < 3:
        return text
    half = stats.t.ppf(0.975, len(y) - 1) * y.std(ddof=1) / len(y) ** 0.5
    return f"{text} ± {half:.{digits}f}"


def glue_all(prefix: str, values: dict[str, Any]) -> None:
    """Glue each entry as ``prefix_key``."""
    for key, value in values.items():
        glue(f"{prefix}_{key}", value)


# What the tables and legends call the domains and the rules, and what each rule needs.
DOMAINS = {"amazon": "product reviews", "tweets": "tweets", "movies": "film reviews", "nyt": "editorials"}
RULES = {
    "rademacher": ("Rademacher, R = 1", "σ, R"),
    "sure": ("SURE", "labels, σ"),
    "gcv": ("GCV", "labels"),
    "discrepancy": ("discrepancy", "labels, σ"),
    "holdout": ("hold-out, patience 3", "labels, a fifth of them"),
    "holdout_refit": ("hold-out, then retrained on all", "labels, a second run"),
    "never": ("never stop", "–"),
}
