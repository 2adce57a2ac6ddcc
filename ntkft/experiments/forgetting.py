"""What encoders that were trained to forget still tell, judged by auditors that took no part in the training.

The runs are made by `adversary_runs`. Each representation of held-out samples is audited once; the toy has its information in
closed form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ntkft.experiments.adversary_runs import PENALTIES, Forget, outcome
from ntkft.experiments.result import resumable
from ntkft.infomin import audit, one_hot

TOY = {"slice": 20.0, "renyi": 20.0, "club": 0.01}
ADULT = {"none": (0.0,), "slice": (0.1, 0.3, 1.0), "renyi": (0.1, 0.3, 1.0), "club": (0.1, 0.3, 1.0)}
MINILM = {"none": (0.0,), "slice": (0.3, 1.0), "renyi": (0.3, 1.0), "club": (0.3, 1.0)}
SEEDS = {"toy": range(5), "adult": range(5), "minilm": range(3)}
RUNS = [
    *(Forget("toy", kind, beta, seed) for seed in SEEDS["toy"] for kind, beta in TOY.items()),
    *(Forget("adult", kind, beta, seed) for seed in SEEDS["adult"] for kind in PENALTIES for beta in ADULT[kind]),
    *(Forget("minilm", kind, beta, seed) for seed in SEEDS["minilm"] for kind in PENALTIES for beta in MINILM[kind]),
]


def judged(run: Forget) -> dict[str, np.ndarray]:
    """Return a run's leakage and utility, each the held-out dependence that an auditor finds, with intervals: (3,)."""
    found = outcome(run)
    z = torch.tensor(found["z"])
    t = one_hot(torch.tensor(found["t"])) if run.data == "minilm" else torch.tensor(found["t"])
    y = torch.tensor(found["truth"] if run.data == "minilm" else found["y"], dtype=torch.float64)
    leak, use = audit(z, t, seed=run.seed), audit(z, y, seed=run.seed)
    kept = {"spent": found["spent"], "task": found["task"]}
    if run.data == "adult":
        kept["right"] = found["right"]
    else:
        kept["error"] = np.array(((found["score"] - found["truth"]) ** 2).mean() / found["truth"].var())
    return kept | {
        "leakage": np.array([leak.dependence, leak.low, leak.high]),
        "utility": np.array([use.dependence, use.low, use.high]),
    }


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train and audit all encoders of `RUNS` (full tier only)."""
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for data in ("toy", "adult", "minilm"):
        kinds = sorted({(r.penalty, r.beta) for r in RUNS if r.data == data}, key=lambda kb: (PENALTIES.index(kb[0]), kb[1]))
        values[f"{data}_runs"] = [f"{kind} {beta:g}" for kind, beta in kinds]
        rows = []
        for kind, beta in kinds:
            chosen = [r for r in RUNS if (r.data, r.penalty, r.beta) == (data, kind, beta)]
            if data == "toy":
                rows.append([outcome(r) for r in chosen])
            else:
                rows.append([resumable(__name__, f"judged-{r.key}", lambda r=r: judged(r)) for r in chosen])  # type: ignore[misc]
        for key in rows[0][0]:
            if key != "seconds":
                arrays[f"{data}_{key}"] = np.array([[one[key] for one in row] for row in rows])
    return values, arrays
