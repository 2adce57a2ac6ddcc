"""Checks of what was measured in the chapter "Adversaries" (its theorems are in `adversaries`)."""

from __future__ import annotations

import numpy as np

from ntkft.checks import Claim, Verdict, full_result

CHAPTER = "adversaries"


def planted_leaks(broken: bool = False) -> Verdict:
    """Alarms of trained adversaries against the predicted power; the prediction for the next rank fails."""
    result = full_result(CHAPTER)
    told, found = result.arrays["planted_predicted"], result.arrays["planted_detected"]
    if broken:
        told = np.roll(told, 1, axis=0)
    worst = float(np.abs((found - told) / np.sqrt(told * (1 - told) / result.values["draws"])).max())
    loud, quiet = found[0], float(found[-1].max())
    holds = worst < 3.4 and loud[0] == loud.max() and loud[-1] < loud[0] / 3 and quiet < 0.3
    return Verdict(
        bool(holds), f"at most {worst:.1f} standard errors off; rank 1: {loud[0]:.2f} to {loud[-1]:.2f}; rank 80 <= {quiet:.2f}"
    )


def slow_waves_first(broken: bool = False) -> Verdict:
    """Reports of neural adversaries, by frequency of the wave; the waves in opposite order fail."""
    result = full_result(CHAPTER)
    reports, steps = result.arrays["network_reports"], np.array(result.values["network_steps"])
    if broken:
        reports = reports[::-1]
    after = reports[:, :, steps >= 20]
    rise = float((after[1:] - after[:-1]).max())
    first, last = after[:, :, 0], float(after[3, :, -1].max())
    holds = rise < 0.05 and first[0].min() > 0.4 and first[2:].max() < 0.1 and last < 0.6
    return Verdict(
        bool(holds), f"largest rise {rise:.2f}; after 20 steps {first.mean(1).round(2).tolist()}; f = 4 at most {last:.2f}"
    )


CLAIMS = (
    Claim(
        "obs-av-planted",
        CHAPTER,
        "Leaks planted in a language model's kernel are reported as often as the law of the score says.",
        "stored",
        planted_leaks,
    ),
    Claim(
        "obs-av-network",
        CHAPTER,
        "A neural adversary reports slow waves before fast ones.",
        "stored",
        slow_waves_first,
    ),
)
