"""Checks of the chapter "How many epochs?": what the stored fine-tuning runs say."""

from __future__ import annotations

import numpy as np

from ntkft.checks import Claim, Verdict, full_result
from ntkft.experiments.few_epochs import DOMAINS


def a_few_epochs_are_best(broken: bool = False) -> Verdict:
    """Every stored MiniLM run: the best of twelve epochs is among 2..8."""
    arrays, last = full_result("few_epochs").arrays, 4 if broken else 8
    best = np.concatenate([arrays[f"minilm_{d}_error"].argmin(1) for d in DOMAINS])
    return Verdict(
        bool((best >= 2).all() and (best <= last).all()),
        f"{len(best)} runs, best epochs from {best.min()} to {best.max()}",
    )


def training_on_leaves_the_truth(broken: bool = False) -> Verdict:
    """MiniLM on tweets and editorials: at the end the error is more than 30 % above its minimum, for every seed."""
    arrays = full_result("few_epochs").arrays
    error = np.concatenate([arrays[f"minilm_{d}_error"] for d in ("tweets", "nyt")])
    rise = error[:, -1] / error.min(1) - 1
    return Verdict(
        bool((rise > (2.0 if broken else 0.3)).all()),
        f"rise of {rise.min():.0%} to {rise.max():.0%} over {len(rise)} runs",
    )


def prediction_is_early_and_of_the_right_size(broken: bool = False) -> Verdict:
    """Every stored MiniLM run: best epoch / predicted epoch lies between 1 and 3."""
    arrays = full_result("few_epochs").arrays
    best = np.concatenate([arrays[f"minilm_{d}_error"].argmin(1) for d in DOMAINS])
    ratio = best / np.concatenate([arrays[f"minilm_{d}_predicted"] for d in DOMAINS])
    low, high = (1.0, 1.5) if broken else (1.0, 3.0)
    holds = (ratio >= low).all() and (ratio <= high).all()
    return Verdict(bool(holds), f"best / predicted from {ratio.min():.2f} to {ratio.max():.2f}")


CHAPTER = "few_epochs"
CLAIMS = (
    Claim(
        "obs-u-shape",
        CHAPTER,
        "MiniLM on tweets and editorials ends more than 30 % above its least error, for every seed.",
        "stored",
        training_on_leaves_the_truth,
    ),
    Claim(
        "obs-few-epochs",
        CHAPTER,
        "In every stored MiniLM run, with steps of 0.1/λ_1, the best of twelve epochs is among epochs 2 to 8.",
        "stored",
        a_few_epochs_are_best,
    ),
    Claim(
        "obs-prediction",
        CHAPTER,
        "In every stored MiniLM run the predicted epoch comes before the best one, by at most a factor of three.",
        "stored",
        prediction_is_early_and_of_the_right_size,
    ),
)
