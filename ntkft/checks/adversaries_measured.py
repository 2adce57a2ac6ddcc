"""Checks of what was measured in the chapter "Adversaries" (its theorems are in `adversaries`)."""

from __future__ import annotations

import numpy as np

from ntkft.checks import Claim, Verdict, full_result

CHAPTER, FORGETTING = "adversaries", "forgetting"


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


def toy_at_equal_time(broken: bool = False) -> Verdict:
    """Information left in the toy when slices have taken 1400 steps; CLUB and slices exchanged fail."""
    result = full_result(FORGETTING)
    settings, left = result.values["toy_runs"], result.arrays["toy_information_at_equal_time"]

    def of(penalty: str, inner: int) -> np.ndarray:
        return left[[k for k, setting in enumerate(settings) if setting[::2] == [penalty, inner]]]

    slices, club = of("slice", 1), of("club", 1)
    if broken:
        slices, club = club, slices
    least = np.median([*club, *of("club", 5)], axis=1).min()
    holds = slices.max() < 1 / 200 and of("renyi", 1).max() < 1e-3 and of("renyi", 5).max() < 1 / 20
    holds &= least > 1 / 100
    evidence = f"slices at most {slices.max():.4f} nats, CLUB's medians at least {least:.3f}"
    return Verdict(bool(holds), evidence)


def census_encoders(broken: bool = False) -> Verdict:
    """Leakage of census encoders; networks of five steps in the place of those of one do not raise it and fail."""
    result = full_result(FORGETTING)
    settings = [tuple(setting) for setting in result.values["adult_runs"]]
    leak, use = (result.arrays[f"adult_{what}"][..., 0] for what in ("leakage", "utility"))  # settings, seeds
    mean, at, weights = leak.mean(1), settings.index, (0.1, 0.3, 1.0, 3.0)
    none, free, often = at(("none", 0.0, 1)), at(("slice", 0.1, 1)), 5 if broken else 1
    raised = float((leak[at(("renyi", 0.3, often))] - leak[none]).min())
    kept = float(min(mean[at(("renyi", beta, often))] for beta in weights) / mean[none])
    behind = float(min(min(mean[at(("renyi", b, k))] for k in (1, 5)) - mean[at(("slice", b, 1))] for b in weights))
    cheap = abs(float(use[free].mean() - use[none].mean()))
    holds = mean[free] < 2 / 3 * mean[none] and cheap < 0.01 and raised > 0 and kept > 5 / 6 and behind > 0
    return Verdict(
        bool(holds),
        f"leakage {mean[none]:.2f}, slices {mean[free]:.2f}; networks with one step raise it by {raised:.3f} at least, leave "
        f"{kept:.2f} of it at best, and are behind slices by {behind:.2f}",
    )


def text_encoders(broken: bool = False) -> Verdict:
    """Leakage of MiniLM's bottleneck in every seed: slices lower it, networks raise it; exchanged, both fail."""
    result = full_result(FORGETTING)
    settings = [tuple(setting) for setting in result.values["minilm_runs"]]
    leak, use = (result.arrays[f"minilm_{what}"][..., 0] for what in ("leakage", "utility"))
    none = settings.index(("none", 0.0, 1))
    lower, higher = ("renyi", "slice") if broken else ("slice", "renyi")
    less = [leak[k] / leak[none] for k, setting in enumerate(settings) if setting[0] == lower]
    more = [leak[k] / leak[none] for k, setting in enumerate(settings) if setting[0] == higher and setting[2] < 20]
    late = float((leak[settings.index(("renyi", 0.3, 100))] / leak[none]).max())
    cost = float((use[none] - use[settings.index(("slice", 0.3, 1))]).max())
    holds = np.max(less) < 2 / 3 and np.min(more) > 1 and late < 3 / 4 and cost < 0.05
    return Verdict(
        bool(holds),
        f"slices leave at most {np.max(less):.2f} of the leakage, networks with five steps at least {np.min(more):.2f}, with a "
        f"hundred at most {late:.2f}",
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
    Claim(
        "obs-av-toy",
        CHAPTER,
        "At equal time slices and networks have forgotten in the toy, and CLUB has not in the median.",
        "stored",
        toy_at_equal_time,
    ),
    Claim(
        "obs-av-census",
        CHAPTER,
        "On the census slices forget most for the least, and an adversary of one step can be worse than none.",
        "stored",
        census_encoders,
    ),
    Claim(
        "obs-av-minilm",
        CHAPTER,
        "In MiniLM slices make a bottleneck forget the domain, networks of five steps make it tell more, of a hundred less.",
        "stored",
        text_encoders,
    ),
)
