"""What encoders that were trained to forget still tell, judged by auditors that took no part in the training.

The runs are made by `adversary_runs`. Each representation of held-out samples is audited once; the toy has its information in
closed form. The quick tier trains one encoder of the toy.
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
TOY += [("club", beta, inner) for inner in (1, 5) for beta in (0.01, 0.05, 0.2, 1.0)]
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
LIVE = Forget("toy", "slice", 5.0, 0)  # what the quick tier trains
NETWORKS = 2  # pairs of networks among the auditors of each fold
FORGOTTEN = (0.1, 0.01)  # nats
ROUNDS = {"quick": 1, "full": 5}  # in which the penalties take turns when a step is timed


def runs(data: str) -> list[list[Forget]]:
    """Return the runs on one kind of data: a list for each setting, with one run for each seed."""
    return [[Forget(data, *setting[:2], seed, setting[2]) for seed in SEEDS[data]] for setting in SETTINGS[data]]  # type: ignore[arg-type]


def judged(run: Forget) -> dict[str, np.ndarray]:
    """Return a run's leakage and utility, each the held-out dependence that an auditor finds, with intervals: (3,)."""
    found = outcome(run)
    z = torch.tensor(found["z"])
    t = one_hot(torch.tensor(found["t"])) if run.data == "minilm" else torch.tensor(found["t"])
    y = torch.tensor(found["truth"] if run.data == "minilm" else found["y"], dtype=torch.float64)
    leak, use = (audit(z, target, seed=run.seed, networks=NETWORKS) for target in (t, y))
    kept = {"spent": found["spent"], "task": found["task"]}
    if run.data == "adult":
        kept["right"] = found["right"]
    else:
        kept["error"] = np.array(((found["score"] - found["truth"]) ** 2).mean() / found["truth"].var())
    return kept | {
        "leakage": np.array([leak.dependence, leak.low, leak.high]),
        "utility": np.array([use.dependence, use.low, use.high]),
    }


def audited(run: Forget) -> dict[str, np.ndarray]:
    """Return `judged` of a run; made once, then read from disk."""
    return resumable(__name__, f"judged-{run.key}", lambda: judged(run))


def step_costs(rounds: int, steps: int = adversary_runs.TOY_EVERY) -> dict[str, float]:
    """Return the seconds that a step of the toy takes with each penalty: the median over rounds in which all take turns."""
    kinds = sorted({(penalty, inner) for penalty, _, inner in TOY})
    found: dict[str, list[float]] = {f"{penalty} x{inner}": [] for penalty, inner in kinds}
    for k in range(rounds):
        for penalty, inner in kinds:
            spent = adversary_runs.toy(Forget("toy", penalty, 1.0, k, inner), steps)["spent"]
            found[f"{penalty} x{inner}"].append(float(spent[-1]) / steps)
    return {name: float(np.median(values)) for name, values in found.items()}


def at_equal_time(information: np.ndarray, step: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Return the information (settings, seeds, looks) at the last look for which the budget of seconds suffices.

    One step costs `costs` (settings,) seconds; looks that a run did not reach are not numbers.
    """
    seconds = costs[:, None, None] * step
    last = np.where(np.isfinite(seconds) & (seconds <= budget * (1 + 1e-9)), np.arange(step.shape[-1]), -1).max(-1)
    return np.take_along_axis(information, last[..., None], -1)[..., 0]


def time_to(level: float, information: np.ndarray, step: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Return the seconds after which the information stays below a level (settings, seeds); infinite if it does not."""
    above = np.where(np.isfinite(information) & (information > level), np.arange(step.shape[-1]), -1).max(-1)
    first = np.pad(costs[:, None, None] * step, ((0, 0), (0, 0), (0, 1)), constant_values=np.inf)
    found = np.take_along_axis(first, above[..., None] + 1, -1)[..., 0]
    return np.where(np.isnan(found), np.inf, found)


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Train one encoder of the toy and time a step with each penalty; full tier: train and audit all of `SETTINGS`."""
    live = adversary_runs.toy(LIVE)
    arrays: dict[str, np.ndarray] = {"live_step": live["step"], "live_information": live["information"]}
    costs = step_costs(ROUNDS[tier])
    values: dict[str, Any] = {"step_costs": costs, "live": LIVE.key, "forgotten": FORGOTTEN}
    if tier != "full":
        return values, arrays
    for data in SETTINGS:
        values[f"{data}_runs"] = [list(setting) for setting in SETTINGS[data]]
        rows = [[(outcome if data == "toy" else audited)(one) for one in row] for row in runs(data)]
        for key in rows[0][0]:
            if key != "seconds":
                arrays[f"{data}_{key}"] = padded([[one[key] for one in row] for row in rows])
    cost = np.array([costs[f"{penalty} x{inner}"] for penalty, _, inner in TOY])
    values["toy_budget"] = costs["slice x1"] * adversary_runs.TOY_STEPS
    told = arrays["toy_information"], arrays["toy_step"], cost
    arrays["toy_at_equal_time"] = at_equal_time(*told, values["toy_budget"])
    arrays["toy_time_to"] = np.array([time_to(level, *told) for level in FORGOTTEN])
    return values, arrays


def padded(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Stack arrays of different lengths into one, (settings, seeds, ...); what is missing is not a number."""
    if np.ndim(rows[0][0]) == 0:
        return np.array(rows)
    longest = max(np.size(one) for row in rows for one in row)
    return np.array([[np.pad(np.asarray(o, float), (0, longest - len(o)), constant_values=np.nan) for o in row] for row in rows])
