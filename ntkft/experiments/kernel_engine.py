"""The stored benchmark of the engine, as the book tells it: rows for its tables, and the ratios that were asked for.

The benchmark itself is ``benchmarks/ntk.py``, which wants an idle machine and other packages; it writes
``results/kernel_engine/benchmark.json``. This module only reads.

Example
-------
>>> 1 < exponent() < 2
True
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ntkft.errors import InputError
from ntkft.experiments.result import RESULTS
from ntkft.files import read_json

FILE = RESULTS / "kernel_engine" / "benchmark.json"
METHODS = {
    "ours": "`empirical_ntk`",
    "ours_fast": "`empirical_ntk`, fast",
    "loop": "loop of `autograd.grad`",
    "loop_lean": "the same loop, in place",
    "torch_func": "torch.func, `vmap(grad)`",
    "nngeometry": "nngeometry",
    "neural_tangents": "neural-tangents",
    "prototype": "prototype, layer by layer",
}


def load() -> dict[str, Any]:
    """Return the stored benchmark.

    Raises
    ------
    InputError
        If it is not there.
    """
    if not FILE.is_file():
        raise InputError(f"There is no benchmark at {FILE}: make it with `python benchmarks/ntk.py`.")
    return read_json(FILE)


def methods(case: str) -> dict[str, dict[str, Any]]:
    """Return what was measured of each method in a case."""
    return load()["cases"][case]["methods"]


def finished(case: str) -> dict[str, dict[str, Any]]:
    """Return the methods that gave a kernel."""
    return {name: found for name, found in methods(case).items() if "failed" not in found}


def title(case: str) -> str:
    """Return how the page calls a case.

    >>> title("minilm-equal-64")
    'MiniLM, 64 texts'
    """
    model, kind, n = case.split("-")
    names = {"minilm": "MiniLM", "smollm2": "SmolLM2"}
    return f"{names[model]}, {n} {'texts' if kind == 'equal' else kind}"


def rows(case: str) -> list[list[str]]:
    """Return the lines of a table: method, seconds, peak memory, times as long as ours, agreement or failure.

    Methods that were not tried, because they had failed on fewer texts, are left out.
    """
    found = methods(case)
    reference = found["ours"]["seconds"]
    lines = []
    for name in (name for name in METHODS if name in found):
        one = found[name]
        if "failed" in one:
            reason = one["failed"].removeprefix("RuntimeError: ")
            if not reason.startswith("not "):
                lines.append([METHODS[name], "–", "–", "–", f"failed: {_short(reason)}"])
            continue
        agrees = f"{one['difference']:.0e}" if "difference" in one else "–"
        if "without" in one:
            agrees = f"leaves out {one['without']}"
        ratio = one["seconds"] / reference
        lines.append([METHODS[name], f"{one['seconds']:.2f}", f"{one['peak_bytes'] / 1e9:.2f}", f"{ratio:.1f}", agrees])
    return lines


def _short(message: str) -> str:
    """Return an error's last words without what concerns only its author."""
    if "can't allocate memory" in message or "MemoryError" in message or "RESOURCE_EXHAUSTED" in message:
        return f"out of memory ({load()['manifest']['memory_limit'] / 1e9:.0f} GB allowed)"
    if "ended with status -" in message:
        return f"crashed (signal {message.rsplit('-', 1)[-1]}) within the memory allowed"
    return message.replace("|", "/")[:110]


def scaling() -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of reviews and the seconds of the exact MiniLM kernels."""
    cases = [c for k, c in load()["cases"].items() if k.startswith("minilm-reviews")]
    pairs = sorted((c["n"], c["methods"]["ours"]["seconds"]) for c in cases)
    return np.array([n for n, _ in pairs]), np.array([s for _, s in pairs])


def exponent() -> float:
    """Return the slope of log seconds on log n."""
    n, seconds = scaling()
    return float(np.polyfit(np.log(n), np.log(seconds), 1)[0])


@dataclass(frozen=True)
class Bar:
    """A promise that was made before the measurement: what, the bound, the value, and whether more is better."""

    what: str
    bound: float
    value: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the promise is kept."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def bars() -> list[Bar]:
    """Return every bar that was set for the engine, with what was measured."""
    small, large, llm = (methods(c) for c in ("minilm-equal-64", "minilm-reviews-1024", "smollm2-reviews-256"))
    ours = small["ours"]

    def ratio(a: dict[str, Any], b: dict[str, Any], key: str) -> float:
        return a[key] / b[key]

    rivals = [one["seconds"] / ours["seconds"] for name, one in finished("minilm-equal-64").items() if name != "ours"]
    every = [one for case in load()["cases"] for name, one in finished(case).items() if name.startswith("ours")]
    off = [max(one["planned_seconds"] / one["seconds"], one["seconds"] / one["planned_seconds"]) for one in every]
    return [
        Bar("MiniLM, 64 texts: times faster than the loop", 20, ratio(small["loop"], ours, "seconds"), True),
        Bar("MiniLM, 64 texts: times faster than torch.func", 5, ratio(small["torch_func"], ours, "seconds"), True),
        Bar("MiniLM, 64 texts: memory, as a share of the loop's", 1 / 6, ratio(ours, small["loop"], "peak_bytes")),
        Bar("MiniLM, 64 texts: memory, as a share of torch.func's", 1 / 6, ratio(ours, small["torch_func"], "peak_bytes")),
        Bar("MiniLM, 64 texts: times faster than the fastest peer", 1, min(rivals), True),
        Bar("MiniLM, 1024 reviews: time over passes + n²P/2", 1.5,
            large["ours"]["seconds"] / large["ours"]["limit_seconds"]),
        Bar("the same, fast", 1.0, large["ours_fast"]["seconds"] / large["ours_fast"]["limit_seconds"]),
        Bar("SmolLM2, 256 reviews: peak memory in GB", 4, llm["ours"]["peak_bytes"] / 1e9),
        Bar("SmolLM2, 256 reviews: time over the prototype's", 0.5, ratio(llm["ours"], llm["prototype"], "seconds")),
        Bar("the plan's seconds, off by a factor of at most", 1.5, max(off)),
    ]  # fmt: skip
