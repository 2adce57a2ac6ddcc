"""Which real fine-tuning runs the chapter "When the kernel drifts" uses.

A module of its own, so that more runs do not make stale what was computed from fewer.
"""

from __future__ import annotations

from typing import Literal

from ntkft.experiments.llm_runs import Run

Method = Literal["gd", "sgd", "adamw"]
Kind = Literal["main", "twin", "holdout"]

SEEDS = (0, 1)
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
    if method != "gd" or seed == 0
]
RUNS += [Run("minilm", "newsgroups", "sgd", 0)]
RUNS += [Run("smollm2", task, "sgd", 0) for task in ("amazon", "tweets")]
