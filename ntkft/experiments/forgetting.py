"""What encoders that were trained to forget still tell, judged by auditors that took no part in the training.

The runs are made by `adversary_runs`. Each representation of held-out samples is audited once; the toy has its information in
closed form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ntkft.experiments import adversary_runs
from ntkft.experiments.adversary_runs import Forget, outcome
from ntkft.experiments.result import resumable
from ntkft.infomin import audit, one_hot

# (penalty, β, steps of the adversary for each step of the encoder)
TOY = [("slice", beta, 1) for beta in (5.0, 20.0)]
TOY += [("renyi", beta, inner) for inner in (1, 5) for beta in (5.0, 20.0)]
TOY += [("club", beta, inner) for inner in (1, 5) for beta in (0.005, 0.01, 0.02)]
ADULT = [("none", 0.0, 1)]
ADULT += [(kind, beta, 1) for kind in ("slice", "whitened") for beta in (0.1, 0.3, 1.0)]
ADULT += [("renyi", beta, inner) for inner in (1, 5) for beta in (0.1, 0.3, 1.0)]
ADULT += [("club", beta, 1) for beta in (0.03, 0.1, 0.3)]
MINILM = [("none", 0.0, 1)]
MINILM += [(kind, beta, 1) for kind in ("slice", "whitened") for beta in (0.3, 1.0)]
MINILM += [("renyi", beta, 5) for beta in (0.3, 1.0)]
MINILM += [("club", beta, 5) for beta in (0.1, 0.3)]
SETTINGS = {"toy": TOY, "adult": ADULT, "minilm": MINILM}
SEEDS = {"toy": range(5), "adult": range(5), "minilm": range(3)}
RUNS = [
    Forget(data, penalty, beta, seed, inner)  # type: ignore[arg-type]
    for data, settings in SETTINGS.items()
    for seed in SEEDS[data]
    for penalty, beta, inner in settings
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


def step_costs(rounds: int = 5, steps: int = adversary_runs.TOY_EVERY) -> dict[str, float]:
    """Return the seconds that a step of the toy takes with each penalty: the median over rounds in which all take turns."""
    kinds = sorted({(penalty, inner) for penalty, _, inner in TOY})
    found: dict[str, list[float]] = {f"{penalty} x{inner}": [] for penalty, inner in kinds}
    for k in range(rounds):
        for penalty, inner in kinds:
            spent = adversary_runs.toy(Forget("toy", penalty, 1.0, k, inner), steps)["spent"]
            found[f"{penalty} x{inner}"].append(float(spent[-1]) / steps)
    return {name: float(np.median(values)) for name, values in found.items()}


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train and audit all encoders of `RUNS` (full tier only)."""
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    if tier != "full":
        return values, arrays
    values["step_costs"] = step_costs()
    for data, settings in SETTINGS.items():
        values[f"{data}_runs"] = [f"{penalty} {beta:g} x{inner}" for penalty, beta, inner in settings]
        rows = []
        for penalty, beta, inner in settings:
            chosen = [Forget(data, penalty, beta, s, inner) for s in SEEDS[data]]  # type: ignore[arg-type]
            what = outcome if data == "toy" else audited
            rows.append([what(one) for one in chosen])
        for key in rows[0][0]:
            if key != "seconds":
                arrays[f"{data}_{key}"] = padded([[one[key] for one in row] for row in rows])
    return values, arrays


def audited(run: Forget) -> dict[str, np.ndarray]:
    """Return `judged` of a run; made once, then read from disk."""
    return resumable(__name__, f"judged-{run.key}", lambda: judged(run))


def padded(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Stack arrays of different lengths into one, (settings, seeds, ...); what is missing is not a number."""
    longest = max(np.size(one) for row in rows for one in row)
    if np.ndim(rows[0][0]) == 0:
        return np.array(rows)
    return np.array([[np.pad(np.asarray(o, float), (0, longest - len(o)), constant_values=np.nan) for o in row] for row in rows])
