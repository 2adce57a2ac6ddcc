"""What an early adversary does not see, and what encoders trained against one keep: planted leaks, a toy, a table, MiniLM.

Encoders are trained by `adversary_runs`; here their representations are audited by judges that took no part in training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ntkft.experiments.adversary_runs import PENALTIES, Forget, outcome
from ntkft.experiments.llm_kernels import stored
from ntkft.experiments.result import resumable
from ntkft.infomin import audit, blindness, one_hot, slice_dependence
from ntkft.infomin.adversaries import MaximalCorrelation

KERNEL, TEXTS = "minilm-tweets-0", 256
RANKS, TIMES, SIGMA, SNR = (1, 5, 20, 80), np.geomspace(0.3, 3000, 9), 1.0, 20.0
DRAWS = {"quick": 1000, "full": 20_000}
NETWORK_STEPS = (0, 20, 50, 100, 200, 400, 800, 1600, 3200)
FREQUENCIES = (0.5, 1.0, 2.0, 4.0)
TOY = {"slice": 20.0, "renyi": 20.0, "club": 0.01}
ADULT = {"none": (0.0,), "slice": (0.1, 0.3, 1.0), "renyi": (0.1, 0.3, 1.0), "club": (0.1, 0.3, 1.0)}
MINILM = {"none": (0.0,), "slice": (0.3, 1.0), "renyi": (0.3, 1.0), "club": (0.3, 1.0)}
SEEDS = {"toy": range(5), "adult": range(5), "minilm": range(3)}
RUNS = [
    *(Forget("toy", kind, beta, seed) for seed in SEEDS["toy"] for kind, beta in TOY.items()),
    *(Forget("adult", kind, beta, seed) for seed in SEEDS["adult"] for kind in PENALTIES for beta in ADULT[kind]),
    *(Forget("minilm", kind, beta, seed) for seed in SEEDS["minilm"] for kind in PENALTIES for beta in MINILM[kind]),
]


def planted(draws: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Plant a leak along one eigenvector of a language model's kernel; alarms of adversaries that stop at different times.

    Returns
    -------
    dict
        eta (k,), detected and predicted (ranks, k), and the share s_j that the filter passes.
    """
    kernel, _ = stored(KERNEL)
    spectrum = kernel.block(np.arange(TEXTS)).spectrum(centre=True)
    lam = spectrum.eigenvalues[: TEXTS - 1]
    eta = TIMES / lam[0]
    rng = np.random.default_rng(seed)
    found: list[list[float]] = []
    told: list[list[float]] = []
    passed: list[list[float]] = []
    leak = SNR * SIGMA**2 / len(lam)
    sights = [blindness(lam, time, SIGMA, n=len(lam)) for time in eta]
    for rank in RANKS:
        rows: list[list[float]] = [[], [], []]
        for sight in sights:
            noise = rng.standard_normal((draws, len(lam)))  # in units of σ/√n, as the threshold is in units of σ²/n
            noise[:, rank - 1] += np.sqrt(SNR)
            rows[0].append(float((noise**2 @ sight.shares > sight.threshold).mean()))
            rows[1].append(float(sight.power_curve(rank - 1, leak)[0]))
            rows[2].append(float(sight.shares[rank - 1]))
        for target, row in zip((found, told, passed), rows, strict=True):
            target.append(row)
    return {"eta": TIMES, "detected": np.array(found), "predicted": np.array(told), "passed": np.array(passed)}


def network_adversary(frequency: float, seed: int, n: int = 2000) -> dict[str, np.ndarray]:
    """Train an adversary of two networks on T = sin(π·frequency·Z_1) + noise, and look at what it reports on fresh samples."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.randn(n, 2, generator=generator)
        return z, torch.sin(np.pi * frequency * z[:, 0]) + 0.5 * torch.randn(n, generator=generator)

    (z, t), (fresh_z, fresh_t) = draw(), draw()
    adversary, reports, done = MaximalCorrelation(2, 1, seed=seed), [], 0
    for steps in NETWORK_STEPS:
        adversary.step(z, t, steps - done)
        done = steps
        with torch.no_grad():
            reports.append(abs(float(adversary(fresh_z, fresh_t))))
    return {"reports": np.array(reports), "slice": np.array(float(slice_dependence(z, t, heldout=True, seed=seed)))}


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
    """Plant leaks in both tiers; train and audit encoders in the full one."""
    full = tier == "full"
    arrays = {f"planted_{k}": v for k, v in planted(DRAWS[tier], seed).items()}
    values: dict[str, Any] = {"ranks": list(RANKS), "snr": SNR, "draws": DRAWS[tier], "network_steps": list(NETWORK_STEPS)}
    seeds = range(10) if full else range(1)
    for frequency in FREQUENCIES:
        parts = [
            resumable(__name__, f"network-{frequency}-{s}", lambda f=frequency, s=s: network_adversary(f, s), keep=full)  # type: ignore[misc]
            for s in seeds
        ]
        arrays |= {f"network_{frequency}_{k}": np.array([p[k] for p in parts]) for k in ("reports", "slice")}
    if not full:
        return values, arrays
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
