"""Why a few epochs suffice: the neural tangent kernel of a pretrained language model, and what follows from it.

The public names are loaded on first use, so that ``import ntkft`` and the command line start at once.

Example
-------
>>> import ntkft
>>> task = ntkft.load_task("amazon", n=64, seed=0)                      # doctest: +SKIP
>>> readout = ntkft.prompt_readout(ntkft.load_model("smollm2"))         # doctest: +SKIP
>>> kernel = ntkft.empirical_ntk(readout, task.texts)                   # doctest: +SKIP
>>> sigma = task.noise_variance ** 0.5                                  # doctest: +SKIP
>>> ntkft.stopping.rademacher_rule(kernel.spectrum(), sigma).eta        # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "load_model": "models",
    "LoadedModel": "models",
    "load_task": "tasks",
    "Task": "tasks",
    "Readout": "readout",
    "prompt_readout": "readout",
    "pooled_readout": "readout",
    "words_readout": "outputs",
    "empirical_ntk": "ntk",
    "ntk_diagonal": "ntk",
    "Kernel": "ntk",
    "Spectrum": "spectrum",
    "StoppingTime": "stopping",
    "descend": "descent",
    "Descent": "descent",
    "Advice": "advice",
    "stopping_advice": "advice",
    "KernelStoppingCallback": "callback",
    "sequence_readout": "callback",
    "train_with_twin": "twin",
    "TwinCallback": "twin",
    "TwinResult": "twin",
    "TaskVector": "task_vectors",
    "linearise": "tangent",
    "merge": "merging",
    "TaskReport": "reports",
    "task_report": "reports",
}
_MODULES = (
    "analytic",
    "arithmetic",
    "assets",
    "attention",
    "claims",
    "descent",
    "experiments",
    "finetune",
    "heads",
    "infomin",
    "interference",
    "models",
    "multitask",
    "ntk",
    "outputs",
    "readout",
    "spectrum",
    "stability",
    "stopping",
    "tasks",
)

__all__ = [*_WHERE, "errors", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"ntkft.{_WHERE[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"ntkft.{name}")
    raise AttributeError(f"module 'ntkft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
