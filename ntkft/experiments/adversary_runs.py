r"""Encoders that learn to forget: a Gaussian toy, the census table, MiniLM. One run is one penalty, one weight β and one seed.

An adversary takes `inner` steps of its own for each step of the encoder: the fewer, the earlier it stops.
Each run ends with its representation of held-out samples, so that whoever reads it can audit it; nothing that was trained
against is asked again. Encoders, heads and adversaries are trained by Adam with its defaults, learning rate 0.001, as in Chen
et al. 2022; the weights of MiniLM's body at a smaller rate, since 0.001 would undo its pretraining.

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

import ntkft
from ntkft.experiments.llm_kernels import DOMAINS
from ntkft.experiments.result import resumable
from ntkft.infomin import Club, MaximalCorrelation, SliceDependence, gaussian_information, one_hot
from ntkft.infomin.adversaries import network
from ntkft.tabular import load_adult

PENALTIES = ("none", "slice", "whitened", "renyi", "club")  # "whitened": slices drawn after whitening
SLICES = ("slice", "whitened")
RATE, BODY_RATE = 1e-3, 5e-5

# --- Toy: X ~ N(0, I), T = X_1 + noise, the task wants 0.7 X_1 + 0.714 X_2
TOY_INPUTS, TOY_WIDTH, TOY_NOISE, TOY_BATCH, TOY_STEPS, TOY_EVERY = 10, 2, 0.0452, 2048, 1400, 100
# --- Census
ADULT_WIDTH, ADULT_HIDDEN, ADULT_BATCH, ADULT_EPOCHS, ADULT_AUDITED = 8, 64, 512, 20, 4000
# --- MiniLM: a bottleneck on its pooled states
TEXT_TRAIN, TEXT_TEST, TEXT_WIDTH, TEXT_BATCH, TEXT_EPOCHS, TEXT_TOKENS = 96, 160, 8, 64, 12, 48


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
    return resumable(__name__, run.key, lambda: {"toy": toy, "adult": _adult, "minilm": _minilm}[run.data](run))


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


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
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


def _adult(run: Forget) -> dict[str, np.ndarray]:
    people = load_adult()
    x, y, t = (torch.tensor(values) for values in (people.x, people.y, people.t))
    encoder = network(x.shape[1], ADULT_WIDTH, ADULT_HIDDEN, run.seed)
    head = _seeded(lambda: nn.Linear(ADULT_WIDTH, 1), run.seed + 1)
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


def texts(seed: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Return texts of the four domains, single ratings less their domain's mean, the raters' means likewise, and domains."""
    every, y, truth, domain = [], [], [], []
    for k, name in enumerate(DOMAINS):
        task = ntkft.load_task(name, n=TEXT_TRAIN + TEXT_TEST, seed=seed).redraw(1, seed=seed)
        every += task.texts
        y.append(task.y - task.y[:TEXT_TRAIN].mean())
        truth.append(task.reference - task.reference[:TEXT_TRAIN].mean())
        domain += [k] * len(task)
    return every, np.concatenate(y), np.concatenate(truth), np.array(domain)


def _minilm(run: Forget) -> dict[str, np.ndarray]:
    loaded = ntkft.load_model("minilm")
    every, y, truth, domain = texts(run.seed)
    target = one_hot(torch.tensor(domain)).float()
    size = TEXT_TRAIN + TEXT_TEST
    rows = np.concatenate([np.arange(k * size, k * size + TEXT_TRAIN) for k in range(len(DOMAINS))])
    left = np.setdiff1d(np.arange(len(every)), rows)
    body = loaded.model
    neck = _seeded(lambda: nn.Linear(body.config.hidden_size, TEXT_WIDTH), run.seed)
    head = _seeded(lambda: nn.Linear(TEXT_WIDTH, 1), run.seed + 1)
    against = penalty(run, TEXT_WIDTH, len(DOMAINS))
    groups = [
        {"params": [*neck.parameters(), *head.parameters()], "lr": RATE},
        {"params": list(body.parameters()), "lr": BODY_RATE},
    ]
    adam = torch.optim.Adam(groups)

    def represent(part: np.ndarray) -> Tensor:
        batch = loaded.tokenizer(
            [every[i] for i in part], truncation=True, max_length=TEXT_TOKENS, padding=True, return_tensors="pt"
        )
        hidden = body(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return neck((hidden * mask).sum(1) / mask.sum(1))

    generator, began, losses = np.random.default_rng(run.seed), time.perf_counter(), []
    for _ in range(TEXT_EPOCHS):
        order = generator.permutation(rows)
        for part in np.split(order, len(order) // TEXT_BATCH):
            z = represent(part)
            task = ((head(z)[:, 0] - torch.tensor(y[part], dtype=torch.float32)) ** 2).mean()
            train_step(run, task, z, target[part], against, adam)
        losses.append(task.item())
    spent = time.perf_counter() - began
    with torch.no_grad():
        z = torch.cat([represent(part) for part in np.array_split(left, len(left) // 32)])
        score = head(z)[:, 0]
    return {
        "z": z.numpy(),
        "t": domain[left],
        "truth": truth[left],
        "score": score.numpy(),
        "task": np.array(losses),
        "spent": np.array(spent),
    }
