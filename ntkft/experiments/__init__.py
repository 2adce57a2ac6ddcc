"""One module per chapter, with the chapter's name: ``run(tier, seed) -> Result``.

The quick tier runs live in the book; the full tier is run by hand (``ntkft run CHAPTER --tier full``) and
stores its outcome in ``results/CHAPTER/``.

Example
-------
>>> import ntkft
>>> result = ntkft.experiments.run("stopping_rule", tier="quick")
>>> result.chapter, result.tier
('stopping_rule', 'quick')
"""

from __future__ import annotations

import importlib
import time

from ntkft.errors import InputError
from ntkft.experiments.result import RESULTS, Result
from ntkft.provenance import manifest, peak_memory

CHAPTERS = (
    "few_epochs",
    "kernel_descent",
    "stopping_rule",
    "rates",
    "random_ntk",
    "attention_ntk",
    "pretrained_ntk",
    "llm_spectra",
    "llm_stopping",
    "llm_training",
    "task_vectors",
    "many_tasks",
    "adversaries",
    "forgetting",
)
TIERS = ("quick", "full")

__all__ = ["CHAPTERS", "RESULTS", "TIERS", "Result", "run"]


def run(chapter: str, tier: str = "quick", seed: int = 0) -> Result:
    """Run a chapter's experiment and return its `Result`, with a manifest.

    Raises
    ------
    InputError
        If there is no such chapter or tier.
    """
    if chapter not in CHAPTERS:
        raise InputError(f"There is no chapter {chapter!r}: choose one of {', '.join(CHAPTERS)}.")
    if tier not in TIERS:
        raise InputError(f"There is no tier {tier!r}: choose quick or full.")
    name = f"ntkft.experiments.{chapter}"
    about, started = manifest(name, seed=seed), time.perf_counter()
    values, arrays = importlib.import_module(name).run(tier, seed=seed)
    about |= {"seconds": round(time.perf_counter() - started, 1), "peak_memory_bytes": peak_memory()}
    return Result(chapter, tier, values, arrays, about)
