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
RANKS, STEPS, SIGMA, SNR = (1, 5, 20, 80), (1, 3, 10, 30, 100, 300, 1000), 1.0, 20.0
DRAWS = {"quick": 200, "full": 2000}
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
    """Plant a leak along one eigenvector of a language model's kernel, and train adversaries step by step on what leaks.

    An adversary is descent on the kernel, one for each draw of the noise; it pauses at each of `STEPS` and is asked for its score.
    The prediction uses the eigenvalues alone.

    Returns
    -------
    dict
        detected and predicted (ranks, looks), the power of the test; false (looks,), alarms without a leak; passed (ranks, looks),
        the share s_j that the filter passes.
    """
    kernel, _ = stored(KERNEL)
    block = kernel.matrix[:TEXTS, :TEXTS]
    whole = (block - block.mean(0) - block.mean(1)[:, None] + block.mean()) / TEXTS
    lam, u = (part[..., :0:-1] for part in np.linalg.eigh(whole))  # the last one, 0, belongs to the constant
    n, step = len(lam), 1 / lam[0]
    leak = SNR * SIGMA**2 / n
    rng = np.random.default_rng(seed)
    sights = [blindness(lam, steps * step, SIGMA, step_size=step) for steps in STEPS]
    detected: list[list[float]] = []
    for rank in (None, *RANKS):
        t = u @ (SIGMA * rng.standard_normal((n, draws)))  # noise along all eigenvectors, none along the constant
        if rank is not None:
            t += np.sqrt(n * leak) * u[:, [rank - 1]]
        answer, done = np.zeros_like(t), 0
        alarms: list[float] = []
        for sight, steps in zip(sights, STEPS, strict=True):
            for _ in range(steps - done):
                answer += step * (whole @ (t - answer))
            done = steps
            score = (t * answer).sum(0) / n  # Q, in units of the threshold times σ²/n
            alarms.append(float((score > sight.threshold * SIGMA**2 / n).mean()))
        detected.append(alarms)
    return {
        "false": np.array(detected[0]),
        "detected": np.array(detected[1:]),
        "predicted": np.array([[float(sight.power_curve(rank - 1, leak)[0]) for sight in sights] for rank in RANKS]),
        "passed": np.array([[sight.shares[rank - 1] for sight in sights] for rank in RANKS]),
    }


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
