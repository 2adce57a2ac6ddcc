"""Checks of the page "Computing the kernel"."""

from __future__ import annotations

import numpy as np
import torch

from ntkft.checks import Claim, Verdict
from ntkft.experiments import kernel_engine
from ntkft.ntk.contract import contract
from ntkft.ntk.factors import Outer


def two_contractions(broken: bool = False) -> Verdict:
    """The engine's contraction, whichever way it takes, against gradients written out by autograd."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    worst, ways = 0.0, 0
    for length in (1, 3, 40):  # ghost is cheaper for the first two, explicit for the last
        weight, inputs = draw(9, 6).requires_grad_(), draw(5, length, 6)
        rows, backs = [], []
        for text in inputs:
            out = text @ weight.T  # (T, 9)
            score = torch.tanh(out).sum()
            g_out, g_weight = torch.autograd.grad(score, [out, weight])
            rows.append(g_weight.flatten())
            backs.append(g_out)
        back = torch.stack(backs)
        if broken:
            back = back.flip(1) if length > 1 else -2 * back  # tokens paired with the wrong gradients
        kernel = torch.zeros(5, 5, dtype=torch.float64)
        contract([(Outer(inputs, back),)], None, kernel, 2**20)
        truth = torch.stack(rows) @ torch.stack(rows).T
        worst = max(worst, float((kernel - truth).tril().abs().max() / truth.abs().max()))
        ways += 1
    return Verdict(worst < 1e-12, f"{ways} lengths of text: largest relative gap {worst:.1e}")


def shifted_products(broken: bool = False) -> Verdict:
    """The identity behind fast products, for vectors that have nothing to do with the mean."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(20):
        g, h, v = rng.standard_normal(30), rng.standard_normal(30), 5 * rng.standard_normal(30)
        half = 1.0 if broken else 0.5
        c_g, c_h = g @ v - half * v @ v, h @ v - half * v @ v
        worst = max(worst, float(abs(g @ h - ((g - v) @ (h - v) + c_g + c_h))))
    return Verdict(worst < 1e-10, f"20 triples of vectors: largest gap {worst:.1e}")


def faster_than_peers(broken: bool = False) -> Verdict:
    """In the stored run, every peer that finished took longer and more memory, and found the same kernel."""
    times: list[float] = []
    memory: list[float] = []
    gaps: list[float] = []
    count = 0
    for case in kernel_engine.load()["cases"]:
        found = kernel_engine.finished(case)
        for name, one in found.items():
            if name.startswith("ours") or name == "prototype":
                continue
            count += 1
            a, b = (one, found["ours"]) if not broken else (found["ours"], one)
            times.append(a["seconds"] / b["seconds"])
            memory.append(a["peak_bytes"] / b["peak_bytes"])
            gaps.append(one["difference"])
    holds = count >= 4 and min(times) > 1 and min(memory) > 1 and max(gaps) < 1e-4
    return Verdict(
        holds,
        f"{count} measurements of peers: at least {min(times):.1f} times our seconds and {min(memory):.1f} times our memory, "
        f"kernels equal to {max(gaps):.0e}",
    )


def scaling_exponent(broken: bool = False) -> Verdict:
    """The measured exponent of time in n lies between that of the passes (1) and that of the products (2)."""
    n, seconds = kernel_engine.scaling()
    if broken:
        seconds = seconds * n
    slope = float(np.polyfit(np.log(n), np.log(seconds), 1)[0])
    local = np.diff(np.log(seconds)) / np.diff(np.log(n))
    return Verdict(
        1 < slope < 2 and len(n) >= 4,
        f"n = {n[0]} to {n[-1]}: exponent {slope:.2f}, from one n to the next {', '.join(f'{x:.2f}' for x in local)}",
    )


CHAPTER = "kernel_engine"
CLAIMS = (
    Claim(
        "prop-contractions",
        CHAPTER,
        "⟨G_i, G_j⟩ = Σ_{s,t} ⟨a_is, a_jt⟩⟨g_is, g_jt⟩ for a linear layer.",
        "numeric",
        two_contractions,
    ),
    Claim(
        "prop-shift",
        CHAPTER,
        "⟨g, h⟩ = ⟨g-v, h-v⟩ + c_g + c_h with c_g = ⟨g, v⟩ - ‖v‖²/2.",
        "numeric",
        shifted_products,
    ),
    Claim(
        "obs-engine-peers",
        CHAPTER,
        "In the stored run every other method that finished took more time and more memory, and found the same kernel.",
        "stored",
        faster_than_peers,
    ),
    Claim(
        "obs-engine-exponent",
        CHAPTER,
        "Between 256 and 2048 reviews the exponent of time in n lies between 1 and 2.",
        "stored",
        scaling_exponent,
    ),
)
