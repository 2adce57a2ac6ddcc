"""Which families of tasks the chapters on task vectors fine-tune, and where their runs are kept.

Not part of any hash: more families do not make stale what was computed from fewer.

    python -m ntkft.experiments.task_run_list minilm-0       # one family; all of them without a name
"""

from __future__ import annotations

import sys
import time

import numpy as np

from ntkft.experiments import task_runs
from ntkft.experiments.llm_kernels import DOMAINS
from ntkft.experiments.result import RESULTS
from ntkft.experiments.task_runs import KINDS, MEASURES, Family
from ntkft.files import atomic_path, read_json, write_json
from ntkft.provenance import code_hash, manifest

FAMILIES = [*(Family("minilm", seed) for seed in range(5)), Family("smollm2", 0)]
FOLDER = RESULTS / "task_vectors" / "runs"


def measures(family: Family) -> list[tuple[str, str]]:
    """Return what is measured on a family, (what, kind); planes on the first seed only, analogies need lengths.

    A score of SmolLM2 costs as much as ten of MiniLM, so merges are left out there, and planes but that of the early vectors.
    """
    left_out = {"analogy"} if not family.setting.lengths else set()
    if family.seed > 0:
        left_out.add("plane")
    dear = family.model == "smollm2"
    return [
        (what, kind)
        for kind in KINDS
        for what in MEASURES
        if what not in left_out and not (dear and (what == "merge" or (what == "plane" and kind != "early")))
    ]


def sums(family: Family) -> list[tuple[str, ...]]:
    """Return whose vectors are added together: the four domains, and all tasks."""
    return [DOMAINS] if family.setting.tasks == DOMAINS else [DOMAINS, family.setting.tasks]


def make(family: Family) -> None:
    """Make all runs of a family, one part after the other, and pack them into one file of the results."""
    target, began = FOLDER / f"{family.key}.npz", time.perf_counter()
    code = code_hash(task_runs.__name__)
    if target.is_file() and read_json(target.with_suffix(".json"))["code_sha256"] == code:
        return
    about = manifest(task_runs.__name__, seed=family.seed)
    parts: dict[str, np.ndarray] = {}

    def add(name: str, found: dict[str, np.ndarray]) -> None:
        parts.update({f"{name}/{key}": value for key, value in found.items()})
        print(f"{family.key} {name}: {float(found['seconds']):.0f} s", flush=True)

    add("start", task_runs.start(family))
    for label in family.labels:
        add(f"train-{label}", task_runs.training(family, label))
    for what, kind in measures(family):
        add(f"{what}-{kind}", task_runs.measure(family, what, kind))
    add(f"joint-{len(DOMAINS)}", task_runs.joint(family, DOMAINS))
    parts["start/kernel"] = parts["start/kernel"][np.triu_indices(len(family.texts))]
    small = {k: v.astype(np.float32) if k.endswith("scores") and k != "start/scores" else v for k, v in parts.items()}
    with atomic_path(target) as temporary:
        np.savez_compressed(temporary, **small)  # type: ignore[arg-type]
    seconds = {k.removesuffix("/seconds"): float(v) for k, v in parts.items() if k.endswith("/seconds")}
    write_json(target.with_suffix(".json"), about | {"seconds": seconds, "last_call_seconds": time.perf_counter() - began})


def load(family: Family) -> dict[str, np.ndarray] | None:
    """Return a family's packed runs, ``part/array`` by name, with the kernel whole again; None if they were not made."""
    path = FOLDER / f"{family.key}.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as data:
        found = {key: data[key].astype(np.float64) if data[key].dtype == np.float32 else data[key] for key in data.files}
    size = len(found["start/scores"])
    kernel = np.zeros((size, size))
    kernel[np.triu_indices(size)] = found["start/kernel"]
    found["start/kernel"] = kernel + np.triu(kernel, 1).T
    return found


if __name__ == "__main__":
    for one in FAMILIES:
        if not sys.argv[1:] or one.key in sys.argv[1:]:
            make(one)
