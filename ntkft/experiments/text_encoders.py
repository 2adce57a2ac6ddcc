r"""MiniLM's last block learns how people rate a text while a bottleneck behind it forgets the domain.

The five blocks below stay as they are, so what they say of a text is computed once, and batches can be large: a penalty that
correlates many features needs many samples. Penalties, heads and runs are those of `adversary_runs`.

Example
-------
>>> Forget("minilm", "slice", 1.0, seed=0).key
'minilm-slice-1-x1-0'
"""

from __future__ import annotations

import copy
import time
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

import ntkft
from ntkft.experiments.adversary_runs import RATE, Forget, penalty, seeded, train_step
from ntkft.experiments.audits import judged
from ntkft.experiments.llm_kernels import DOMAINS
from ntkft.experiments.result import resumable
from ntkft.infomin import one_hot

TRAIN, TEST, TOKENS = 256, 200, 48  # texts of each domain
WIDTH, BATCH, EPOCHS = 8, 256, 20
BLOCK_RATE = 5e-5  # the rate of the heads would undo the pretraining


def outcome(run: Forget) -> dict[str, np.ndarray]:
    """Return what a run measured; made once, then read from disk."""
    return resumable(__name__, run.key, lambda: encoder(run))


def audited(run: Forget) -> dict[str, np.ndarray]:
    """Return what an auditor says of an encoder of texts, and its error in shares of the variance; made once."""

    def judge() -> dict[str, np.ndarray]:
        found = outcome(run)
        error = ((found["score"] - found["truth"]) ** 2).mean() / found["truth"].var()
        domains = one_hot(torch.tensor(found["t"])).numpy()
        return judged(found, domains, found["truth"], run.seed) | {"error": np.array(error)}

    return resumable(__name__, f"judged-{run.key}", judge)


class Block(nn.Module):
    """The last block of a BERT and a bottleneck on the mean of its states: (B, T, h) and the mask (B, T) to (B, d)."""

    def __init__(self, block: nn.Module, hidden: int, seed: int) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)
        self.neck = seeded(lambda: nn.Linear(hidden, WIDTH), seed)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the representation."""
        kept = mask.to(states.dtype)
        hidden = self.block(states, attention_mask=(1 - kept[:, None, None]) * torch.finfo(states.dtype).min)
        return self.neck((hidden * kept[..., None]).sum(1) / kept.sum(1, keepdim=True))


@lru_cache(maxsize=1)
def texts(seed: int) -> dict[str, np.ndarray | list[str]]:
    """Return texts of the four domains, single ratings less their domain's mean, the raters' means likewise, and domains."""
    every: list[str] = []
    y, truth, domain = [], [], []
    for k, name in enumerate(DOMAINS):
        task = ntkft.load_task(name, n=TRAIN + TEST, seed=seed).redraw(1, seed=seed)
        every += task.texts
        y.append(task.y - task.y[:TRAIN].mean())
        truth.append(task.reference - task.reference[:TRAIN].mean())
        domain += [k] * len(task)
    return {"texts": every, "y": np.concatenate(y), "truth": np.concatenate(truth), "domain": np.array(domain)}


@lru_cache(maxsize=1)
def below(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the last block, and what the blocks below it make of all texts: states (N, T, h) and the mask (N, T)."""
    loaded = ntkft.load_model("minilm")
    batch = loaded.tokenizer(texts(seed)["texts"], truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
    states = []
    with torch.no_grad():
        for rows in torch.arange(len(batch["input_ids"])).split(64):
            part = {key: value[rows] for key, value in batch.items()}
            states.append(loaded.model(**part, output_hidden_states=True).hidden_states[-2])
    return loaded.model.encoder.layer[-1], torch.cat(states), batch["attention_mask"]


def encoder(run: Forget) -> dict[str, np.ndarray]:
    """Train one encoder; return its representation of the held-out texts with all that an audit needs."""
    about = texts(run.seed)
    y, truth, domain = (np.asarray(about[key]) for key in ("y", "truth", "domain"))
    block, states, mask = below(run.seed)
    target = one_hot(torch.tensor(domain)).float()
    size = TRAIN + TEST
    rows = np.concatenate([np.arange(k * size, k * size + TRAIN) for k in range(len(DOMAINS))])
    left = np.setdiff1d(np.arange(len(y)), rows)
    represent = Block(block, states.shape[-1], run.seed)
    head = seeded(lambda: nn.Linear(WIDTH, 1), run.seed + 1)
    against = penalty(run, WIDTH, len(DOMAINS))
    adam = torch.optim.Adam(
        [
            {"params": [*represent.neck.parameters(), *head.parameters()], "lr": RATE},
            {"params": list(represent.block.parameters()), "lr": BLOCK_RATE},
        ]
    )
    generator, began, losses = np.random.default_rng(run.seed), time.perf_counter(), []
    for _ in range(EPOCHS):
        order = generator.permutation(rows)
        for part in np.split(order, len(order) // BATCH):
            z = represent(states[part], mask[part])
            task = ((head(z)[:, 0] - torch.tensor(y[part], dtype=torch.float32)) ** 2).mean()
            train_step(run, task, z, target[part], against, adam)
        losses.append(task.item())
    spent = time.perf_counter() - began
    with torch.no_grad():
        z = torch.cat([represent(states[part], mask[part]) for part in np.array_split(left, 8)])
        score = head(z)[:, 0]
    return {
        "z": z.numpy(),
        "t": domain[left],
        "truth": truth[left],
        "score": score.numpy(),
        "task": np.array(losses),
        "spent": np.array(spent),
    }
