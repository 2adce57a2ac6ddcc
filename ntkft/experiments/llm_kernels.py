"""The kernels behind the chapters on language models, stored once and used by every experiment that is spectral.

A name says what a kernel is: ``minilm-amazon-0`` is MiniLM with head seed 0 on Amazon snippets, ``random-…`` its twin of the
same architecture with random weights, ``smollm2-…`` SmolLM2 read through a prompt, ``smollm2random-…`` its twin. The texts are
the first n of the task with seed 0, so a smaller kernel of the same task is a corner of a larger one.

Example
-------
>>> kernel, task = stored("smollm2-tweets")
>>> kernel.matches(task.texts)
True
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import ntkft
from ntkft.experiments.result import RESULTS
from ntkft.ntk import Kernel
from ntkft.provenance import manifest, peak_memory
from ntkft.readout import Readout
from ntkft.tasks import Task

FOLDER = RESULTS / "llm_spectra"
DOMAINS = ("amazon", "movies", "nyt", "tweets")
# name: (task, two words, prompt); documents are cut after TOPIC_TOKENS tokens
TOPICS = {
    "newsgroups": ("newsgroups:rec.autos/sci.space", (" cars", " space"), "{text}\nThis is about"),
    "reuters": ("reuters:earn/acq", (" profit", " takeover"), "{text}\nThis is about"),
}
TOPIC_TOKENS = 64


MODELS = {  # first word of a name: (model, weights)
    "minilm": ("minilm", "pretrained"),
    "random": ("minilm", "random"),
    "smollm2": ("smollm2", "pretrained"),
    "smollm2random": ("smollm2", "random"),
}


@dataclass(frozen=True)
class Wanted:
    """One kernel: which model and weights, which task, how many texts, which head."""

    model: str
    weights: str
    task: str
    n: int
    head: int = 0

    @property
    def name(self) -> str:
        """Name of the file, without suffix."""
        model = next(word for word, meaning in MODELS.items() if meaning == (self.model, self.weights))
        return f"{model}-{self.task}" + (f"-{self.head}" if self.model == "minilm" else "")

    def texts(self) -> Task:
        """Return the task."""
        name = TOPICS[self.task][0] if self.task in TOPICS else self.task
        return ntkft.load_task(name, n=self.n, seed=0)

    def readout(self) -> Readout:
        """Return the read-out, model and all."""
        loaded = ntkft.load_model(self.model, weights=self.weights)  # type: ignore[arg-type]
        tokens = {"max_tokens": TOPIC_TOKENS} if self.task in TOPICS else {}
        if self.model == "minilm":
            return ntkft.pooled_readout(loaded, seed=self.head, **tokens)
        if self.task not in TOPICS:
            return ntkft.prompt_readout(loaded)
        _, (positive, negative), template = TOPICS[self.task]
        return ntkft.prompt_readout(loaded, template, positive, negative, **tokens)


def path(name: str) -> Path:
    """Return where a kernel is stored."""
    return FOLDER / f"{name}.npz"


def stored(name: str) -> tuple[Kernel, Task]:
    """Return a stored kernel and the task whose texts are its rows.

    Raises
    ------
    InputError
        If there is no such kernel, or it is for other texts.
    """
    kernel = Kernel.load(path(name))
    word, task_name, *head = name.split("-")
    model, weights = MODELS[word]
    task = Wanted(model, weights, task_name, kernel.n, *map(int, head)).texts()
    if not kernel.matches(task.texts):
        raise ntkft.errors.InputError(
            f"{path(name)} is not for the {len(task)} texts of {task.name}: delete it and run the full tier."
        )
    return kernel, task


def make(wanted: Wanted, memory: str = "8GB") -> Kernel:
    """Compute and store a kernel unless it is there; its `info` holds the manifest of the run."""
    target = path(wanted.name)
    if target.is_file():
        return Kernel.load(target)
    about, started = manifest(__name__, seed=0), time.perf_counter()
    kernel = ntkft.empirical_ntk(wanted.readout(), wanted.texts().texts, memory=memory, progress=False)
    about |= {"seconds": round(time.perf_counter() - started, 1), "peak_memory_bytes": peak_memory()}
    kernel.info["manifest"] = about
    kernel.save(target, compact=True)
    return Kernel.load(target)
