"""Checks of the chapter "The question": what the stored fine-tuning runs say."""

from __future__ import annotations

import numpy as np

from ntkft.checks import Verdict
from ntkft.experiments.result import RESULTS, Result

MINILM = ("tweets", "amazon", "movies", "nyt")


def _stored() -> Result:
    return Result.load(RESULTS / "few_epochs", "full")


def a_few_epochs_are_best(broken: bool = False) -> Verdict:
    """In every stored run the error to the truth has its minimum inside the run, within ten epochs."""
    result, limit = _stored(), 1 if broken else 10
    best = {}
    for name in (*(f"minilm_{d}" for d in MINILM), "smollm2_amazon", "smollm2_tweets"):
        epoch, error = result.arrays[f"{name}_epoch"], result.arrays[f"{name}_error"]
        best[name] = [int(e[r.argmin()]) for e, r in zip(epoch, error, strict=True)]
    worst = max(max(v) for v in best.values())
    return Verdict(worst <= limit, f"best epochs from {min(min(v) for v in best.values())} to {worst}")


def memorising_unlearns(broken: bool = False) -> Verdict:
    """MiniLM on tweets: at the end of training the error is above its minimum in every seed."""
    error = _stored().arrays["minilm_tweets_error"]
    rise = error[:, -1] / error.min(1) - 1
    return Verdict(
        bool((rise > (2.0 if broken else 0.1)).all()),
        f"rise of {rise.min():.0%} to {rise.max():.0%} over {len(rise)} seeds",
    )


def prediction_beats_the_end(broken: bool = False) -> Verdict:
    """MiniLM on tweets: stopping at the predicted epoch has less error than training to the end, in every seed."""
    arrays = _stored().arrays
    at_stop, end = [], []
    for predicted, epoch, error in zip(
        *(arrays[f"minilm_tweets_{k}"] for k in ("predicted", "epoch", "error")), strict=True
    ):
        at_stop.append(np.interp(0.0 if broken else predicted, epoch, error))
        end.append(error[-1])
    wins = int((np.array(at_stop) < np.array(end)).sum())
    return Verdict(wins == len(end), f"{wins} of {len(end)} seeds")
