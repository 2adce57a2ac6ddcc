"""What encoders that were trained to forget still tell, judged by auditors that took no part in the training.

The runs are made and judged by `adversary_runs` and `text_encoders`; the toy has its information in closed form. The quick
tier trains one encoder of the toy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ntkft.experiments import adversary_runs, text_encoders
from ntkft.experiments.adversary_runs import Forget
from ntkft.experiments.llm_kernels import DOMAINS
from ntkft.tabular import load_adult

# (penalty, β, steps of the adversary for each step of the encoder)
TOY = [("slice", beta, 1) for beta in (5.0, 20.0)]
TOY += [("renyi", beta, inner) for inner in (1, 5) for beta in (5.0, 20.0)]
TOY += [("club", beta, inner) for inner in (1, 5) for beta in (0.01, 0.05, 0.2, 1.0, 5.0, 20.0)]
ADULT = [("none", 0.0, 1)]
ADULT += [(kind, beta, 1) for kind in ("slice", "whitened") for beta in (0.1, 0.3, 1.0, 3.0)]
ADULT += [("renyi", beta, inner) for inner in (1, 5) for beta in (0.1, 0.3, 1.0, 3.0)]
ADULT += [("renyi", beta, 20) for beta in (0.3, 1.0)]
ADULT += [("club", beta, inner) for inner in (1, 5) for beta in (0.03, 0.1, 0.3)]
MINILM = [("none", 0.0, 1)]
MINILM += [(kind, beta, 1) for kind in ("slice", "whitened") for beta in (0.3, 1.0)]
MINILM += [("renyi", beta, 5) for beta in (0.3, 1.0)]
MINILM += [("renyi", 0.3, inner) for inner in (20, 100)]
MINILM += [("club", beta, 5) for beta in (0.1, 0.3)]
SETTINGS = {"toy": TOY, "adult": ADULT, "minilm": MINILM}
OUTCOMES = {"toy": adversary_runs.outcome, "adult": adversary_runs.audited, "minilm": text_encoders.audited}
SEEDS = {"toy": range(5), "adult": range(5), "minilm": range(3)}
LIVE = Forget("toy", "slice", 5.0, 0)  # what the quick tier trains
FORGOTTEN = (0.1, 0.01)  # nats
ROUNDS = {"quick": 1, "full": 15}  # in which the penalties take turns when a step is timed


def runs(data: str) -> list[list[Forget]]:
    """Return the runs on one kind of data: a list for each setting, with one run for each seed."""
    return [[Forget(data, *setting[:2], seed, setting[2]) for seed in SEEDS[data]] for setting in SETTINGS[data]]  # type: ignore[arg-type]


def census() -> dict[str, float]:
    """Return how many people the census has, and what is known of the test part's incomes before any encoder looks."""
    people = load_adult()
    y, t = people.y[people.train :], people.t[people.train :]
    return {
        "train": people.train,
        "test": len(y),
        "batches": adversary_runs.ADULT_EPOCHS * (people.train // adversary_runs.ADULT_BATCH),
        "base": float(1 - y.mean()),
        "income_and_sex": float(abs(np.corrcoef(y, t)[0, 1])),
    }


def step_seconds(rounds: int, steps: int = adversary_runs.TOY_EVERY) -> dict[str, np.ndarray]:
    """Return the seconds that a step of the toy takes with each penalty, in rounds in which all take turns: (rounds,) each."""
    kinds = sorted({(penalty, inner) for penalty, _, inner in TOY})
    found: dict[str, list[float]] = {f"{penalty} x{inner}": [] for penalty, inner in kinds}
    for k in range(rounds):
        for penalty, inner in kinds:
            spent = adversary_runs.toy(Forget("toy", penalty, 1.0, k, inner), steps)["spent"]
            found[f"{penalty} x{inner}"].append(float(spent[-1]) / steps)
    return {name: np.array(seconds) for name, seconds in found.items()}


def at_equal_time(seen: np.ndarray, step: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Return what was seen (settings, seeds, looks) at the last look for which the budget of seconds suffices.

    One step costs `costs` (settings,) seconds; looks that a run did not reach are not numbers.
    """
    seconds = costs[:, None, None] * step
    last = np.where(np.isfinite(seconds) & (seconds <= budget * (1 + 1e-9)), np.arange(step.shape[-1]), -1).max(-1)
    return np.take_along_axis(seen, last[..., None], -1)[..., 0]


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
    seconds = step_seconds(ROUNDS[tier])
    costs = {name: float(rounds.min()) for name, rounds in seconds.items()}  # a busy machine only adds
    values: dict[str, Any] = {"step_costs": costs}
    arrays["toy_step_seconds"] = np.array(list(seconds.values()))
    if tier != "full":
        return values, arrays
    values["adult"] = census()
    sizes = {"train": text_encoders.TRAIN, "test": text_encoders.TEST}
    values["minilm"] = {part: len(DOMAINS) * size for part, size in sizes.items()}
    for data in SETTINGS:
        values[f"{data}_runs"] = [list(setting) for setting in SETTINGS[data]]
        rows = [[OUTCOMES[data](one) for one in row] for row in runs(data)]
        for key in rows[0][0]:
            if key != "seconds":
                arrays[f"{data}_{key}"] = padded([[one[key] for one in row] for row in rows])
    cost = np.array([costs[f"{penalty} x{inner}"] for penalty, _, inner in TOY])
    values["toy_budget"] = costs["slice x1"] * adversary_runs.TOY_STEPS
    step = arrays["toy_step"]
    for what in ("information", "task"):
        arrays[f"toy_{what}_at_equal_time"] = at_equal_time(arrays[f"toy_{what}"], step, cost, values["toy_budget"])
    arrays["toy_time_to"] = np.array([time_to(level, arrays["toy_information"], step, cost) for level in FORGOTTEN])
    return values, arrays


def padded(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Stack arrays of different lengths into one, (settings, seeds, ...); what is missing is not a number."""
    if np.ndim(rows[0][0]) == 0:
        return np.array(rows)
    longest = max(np.size(one) for row in rows for one in row)
    return np.array([[np.pad(np.asarray(o, float), (0, longest - len(o)), constant_values=np.nan) for o in row] for row in rows])
