"""Which real fine-tuning runs the chapter "When the kernel drifts" uses.

A module of its own, so that more runs do not make stale what was computed from fewer.
"""

from __future__ import annotations

from typing import Literal

from ntkft.experiments.llm_classes import Classes
from ntkft.experiments.llm_kernels import TOPICS
from ntkft.experiments.llm_runs import Run

Method = Literal["gd", "sgd", "adamw"]
Kind = Literal["main", "twin", "holdout"]

SEEDS = (0, 1, 2, 3, 4)
ALL: tuple[tuple[Method, Kind], ...] = (
    ("sgd", "main"),
    ("sgd", "twin"),
    ("sgd", "holdout"),
    ("adamw", "main"),
    ("adamw", "twin"),
    ("gd", "main"),
)
RUNS = [
    Run("minilm", task, method, seed, kind)
    for seed in SEEDS
    for task in ("amazon", "movies", "nyt", "tweets")
    for method, kind in ALL
]
# Full batches would take SmolLM2 an hour a run on two cores, and tell what its small steps tell.
RUNS += [
    Run("smollm2", task, method, 0, kind)
    for method, kind in ALL
    if kind != "holdout" and method != "gd"
    for task in ("amazon", "tweets")
]
CLASSES = [Classes(task, 0.025, seed) for seed in (0, 1) for task in TOPICS]
CLASSES += [Classes(task, 0.1, 0) for task in TOPICS]
