"""What an adversary that stops early does not see: leaks planted along the eigenvectors of a language model's kernel, and waves.

The encoders that are trained against adversaries are in `forgetting`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ntkft.experiments.llm_kernels import stored
from ntkft.experiments.result import resumable
from ntkft.infomin import blindness, slice_dependence
from ntkft.infomin.adversaries import MaximalCorrelation
from ntkft.ntk.kernel import centred

KERNEL, TEXTS = "minilm-tweets-0", 256
RANKS, STEPS, SIGMA, SNR = (1, 5, 20, 80), (1, 3, 10, 30, 100, 300, 1000), 1.0, 20.0
DRAWS = {"quick": 100, "full": 2000}
NETWORK_STEPS = {"quick": (0, 20, 100, 400), "full": (0, 20, 50, 100, 200, 400, 800, 1600, 3200)}
FREQUENCIES = (0.5, 1.0, 2.0, 4.0)


def planted(draws: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Plant a leak along one eigenvector of a language model's kernel, and train adversaries step by step on what leaks.

    An adversary is descent on the kernel, one for each draw of the noise; it pauses at each of `STEPS` and is asked for its
    score. The prediction uses the eigenvalues alone.

    Returns
    -------
    dict
        detected and predicted (ranks, looks), the power of the test; false (looks,), alarms without a leak; passed (ranks,
        looks), the share s_j that the filter passes.
    """
    kernel, _ = stored(KERNEL)
    whole = centred(kernel.matrix[:TEXTS, :TEXTS]) / TEXTS
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


def network_adversary(frequency: float, seed: int, looks: tuple[int, ...], n: int = 2000) -> dict[str, np.ndarray]:
    """Train an adversary of two networks on T = sin(π·frequency·Z_1) + noise, and look at what it reports on fresh samples."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.randn(n, 2, generator=generator)
        return z, torch.sin(np.pi * frequency * z[:, 0]) + 0.5 * torch.randn(n, generator=generator)

    (z, t), (fresh_z, fresh_t) = draw(), draw()
    adversary, reports, done = MaximalCorrelation(2, 1, seed=seed), [], 0
    for steps in looks:
        adversary.step(z, t, steps - done)
        done = steps
        with torch.no_grad():
            reports.append(abs(float(adversary(fresh_z, fresh_t))))
    return {"reports": np.array(reports), "slice": np.array(float(slice_dependence(z, t, heldout=True, seed=seed)))}


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Plant leaks and train the adversaries; more draws and more seeds in the full tier."""
    full = tier == "full"
    arrays = {f"planted_{k}": v for k, v in planted(DRAWS[tier], seed).items()}
    values: dict[str, Any] = {"ranks": list(RANKS), "steps": list(STEPS), "snr": SNR, "draws": DRAWS[tier]}
    values |= {"network_steps": list(NETWORK_STEPS[tier]), "frequencies": list(FREQUENCIES)}
    seeds = range(5) if full else range(1)
    parts = [
        [
            resumable(
                __name__,
                f"network-{frequency}-{s}",
                lambda f=frequency, s=s: network_adversary(f, s, NETWORK_STEPS[tier]),  # type: ignore[misc]
                keep=full,
            )
            for s in seeds
        ]
        for frequency in FREQUENCIES
    ]
    for key in ("reports", "slice"):
        arrays[f"network_{key}"] = np.array([[part[key] for part in row] for row in parts])
    return values, arrays
