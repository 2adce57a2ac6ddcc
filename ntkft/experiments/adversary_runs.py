r"""Encoders that learn to forget: a Gaussian toy and the census table. One run is one penalty, one weight β and one seed.

An adversary takes `inner` steps of its own for each step of the encoder: the fewer, the earlier it stops.
Each run ends with its representation of held-out samples, so that whoever reads it can audit it; nothing that was trained
against is asked again. Encoders, heads and adversaries are trained by Adam with its defaults, learning rate 0.001, as in Chen
et al. 2022. MiniLM is in `text_encoders`.

Example
-------
>>> Forget("toy", "renyi", 20.0, seed=0, inner=5).key
'toy-renyi-20-x5-0'
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ntkft.experiments.audits import judged
from ntkft.experiments.result import resumable
from ntkft.infomin import Club, MaximalCorrelation, SliceDependence, gaussian_information
from ntkft.infomin.adversaries import network
from ntkft.tabular import load_adult

PENALTIES = ("none", "slice", "whitened", "renyi", "club")  # "whitened": slices drawn after whitening
SLICES = ("slice", "whitened")
RATE = 1e-3

# --- Toy: X ~ N(0, I), T = X_1 + noise, the task wants 0.7 X_1 + 0.714 X_2
TOY_INPUTS, TOY_WIDTH, TOY_NOISE, TOY_BATCH, TOY_STEPS, TOY_EVERY = 10, 2, 0.0452, 2048, 1400, 100
# --- Census
ADULT_WIDTH, ADULT_HIDDEN, ADULT_BATCH, ADULT_EPOCHS, ADULT_AUDITED = 8, 64, 512, 20, 4000


@dataclass(frozen=True)
class Forget:
    """One run."""

    data: Literal["toy", "adult", "minilm"]
    penalty: str
    beta: float
    seed: int
    inner: int = 1

    @property
    def key(self) -> str:
        """Name of the stored part."""
        return f"{self.data}-{self.penalty}-{self.beta:g}-x{self.inner}-{self.seed}"


def outcome(run: Forget) -> dict[str, np.ndarray]:
    """Return what a run measured; made once, then read from disk."""
    return resumable(__name__, run.key, lambda: {"toy": toy, "adult": adult}[run.data](run))


def audited(run: Forget) -> dict[str, np.ndarray]:
    """Return what an auditor says of a census encoder; made once, then read from disk."""

    def judge() -> dict[str, np.ndarray]:
        found = outcome(run)
        return judged(found, found["t"], found["y"], run.seed)

    return resumable(__name__, f"judged-{run.key}", judge)


def penalty(run: Forget, width: int, attributes: int) -> nn.Module | None:
    """Return the penalty of a run for a representation of `width` numbers, or None."""
    if run.penalty == "none":
        return None
    if run.penalty in SLICES:
        return SliceDependence(slices=20, degree=3, seed=run.seed, squared=False, whiten=run.penalty == "whitened")
    kind = {"renyi": MaximalCorrelation, "club": Club}[run.penalty]
    return kind(width, attributes, seed=run.seed)


def train_step(run: Forget, task: Tensor, z: Tensor, t: Tensor, against: nn.Module | None, adam: torch.optim.Adam) -> None:
    """Train the adversary on this batch, if there is one, and take one step of the encoder on task + β·penalty."""
    loss = task
    if against is not None:
        if isinstance(against, MaximalCorrelation | Club):
            against.step(z, t, run.inner)
        value = against(z, t)
        # A correlation is a penalty in absolute value; CLUB's bound is one only where it is positive.
        loss = task + run.beta * (value.abs() if isinstance(against, MaximalCorrelation) else value)
    adam.zero_grad()
    loss.backward()
    adam.step()


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return what `make` makes with torch's global generator at `seed`, and put the generator back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def toy(run: Forget, last: int | None = None) -> dict[str, np.ndarray]:
    """Run the toy to step `last`; at every look the information in closed form, the task's loss and the seconds spent.

    One step with an adversary is cheaper than one with slices, so by default an adversary gets more of them.
    """
    if last is None:
        last = TOY_STEPS if run.penalty in SLICES or run.inner > 1 else 2 * TOY_STEPS
    generator = torch.Generator().manual_seed(run.seed)
    toward_t, toward_y = torch.zeros(TOY_INPUTS), torch.zeros(TOY_INPUTS)
    toward_t[0], toward_y[0], toward_y[1] = 1.0, 0.7, 0.51**0.5
    covariance = torch.eye(TOY_INPUTS + 1, dtype=torch.float64)
    covariance[:-1, -1] = covariance[-1, :-1] = toward_t.double()
    covariance[-1, -1] = 1 + TOY_NOISE
    encoder, head = nn.Linear(TOY_INPUTS, TOY_WIDTH, bias=False), nn.Linear(TOY_WIDTH, 1)
    with torch.no_grad():  # at the start the first two coordinates are copied
        encoder.weight.copy_(torch.eye(TOY_INPUTS)[:TOY_WIDTH])
        head.weight.zero_()
        head.bias.zero_()
    against = penalty(run, TOY_WIDTH, 1)
    adam = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=RATE)
    steps, information, losses, seconds = [], [], [], []
    spent = 0.0
    for step in range(last + 1):
        x = torch.randn(TOY_BATCH, TOY_INPUTS, generator=generator)
        t = x @ toward_t + TOY_NOISE**0.5 * torch.randn(TOY_BATCH, generator=generator)
        began = time.perf_counter()
        z = encoder(x)
        task = ((head(z)[:, 0] - x @ toward_y) ** 2).mean()
        if step % TOY_EVERY == 0:
            both = torch.block_diag(encoder.weight.detach().double(), torch.eye(1, dtype=torch.float64))
            steps.append(step)
            information.append(float(gaussian_information(both @ covariance @ both.T, TOY_WIDTH)))
            losses.append(task.item())
            seconds.append(spent)
        train_step(run, task, z, t, against, adam)
        spent += time.perf_counter() - began
    return {"step": np.array(steps), "information": np.array(information), "task": np.array(losses), "spent": np.array(seconds)}


def adult(run: Forget) -> dict[str, np.ndarray]:
    """Train one encoder of the census; return its representation of held-out people with all that an audit needs."""
    people = load_adult()
    x, y, t = (torch.tensor(values) for values in (people.x, people.y, people.t))
    encoder = network(x.shape[1], ADULT_WIDTH, ADULT_HIDDEN, run.seed)
    head = seeded(lambda: nn.Linear(ADULT_WIDTH, 1), run.seed + 1)
    against = penalty(run, ADULT_WIDTH, 1)
    adam = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=RATE)
    generator = torch.Generator().manual_seed(run.seed)
    began, looks = time.perf_counter(), []
    for _ in range(ADULT_EPOCHS):
        for part in torch.randperm(people.train, generator=generator).split(ADULT_BATCH)[:-1]:
            z = encoder(x[part])
            task = nn.functional.binary_cross_entropy_with_logits(head(z)[:, 0], y[part])
            train_step(run, task, z, t[part], against, adam)
        looks.append(task.item())
    spent = time.perf_counter() - began
    with torch.no_grad():
        z = encoder(x[people.train :])
        score = head(z)[:, 0]
    keep = torch.randperm(len(z), generator=torch.Generator().manual_seed(7))[:ADULT_AUDITED]
    test = slice(people.train, None)
    return {
        "z": z[keep].numpy(),
        "t": t[test][keep].numpy(),
        "y": y[test][keep].numpy(),
        "score": score[keep].numpy(),
        "right": np.array(((score > 0) == (y[test] > 0.5)).float().mean().item()),
        "task": np.array(looks),
        "spent": np.array(spent),
    }
