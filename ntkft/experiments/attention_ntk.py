"""The kernel of attention: formulas against the engine, temperature, many heads, and the blocks of real models.

Four parts. *Agreement*: the formulas' blocks of single layers of MiniLM and SmolLM2, in float64, against the engine's.
*Temperature*: shares of the trace in random toy heads from uniform to one-hot attention. *Heads*: how far the kernel of M
random heads is from its limit. *Shares*: each kind of parameter's share of the trace, of the centred trace, and of
the initial rate of learning r'K_b r / r'K r of a centred read-out, r the centred residual of human ratings.

Predictions written down before the first run: (1) queries and keys have a smaller share of the trace than values and
outputs in every model and domain; (2) in the random twin of MiniLM their share is below that of the pretrained model, in
every domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import ntkft
from ntkft.attention import Heads, attend, head_blocks, layer_blocks, layer_patterns, scores_only
from ntkft.experiments.result import resumable

MODULE = "ntkft.experiments.attention_ntk"
D, D_K, TOKENS = 8, 4, 6  # of the toy heads
TAUS = 2.0 ** np.arange(-4, 9)  # inverse temperatures
COUNTS = 2 ** np.arange(2, 13)  # heads, 4 to 4096
KINDS = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "mlp",
    "norm",
    "embedding",
    "head",
)
# tier: (toy heads of the temperature sweep, kernels of 4096 heads, heads behind the limit)
TOY = {"quick": (300, 24, 200_000), "full": (2000, 256, 4_000_000)}
# model, weights, domain, texts, seed (of the head; of the weights too where they are random)
MINILM = ("amazon", "movies", "nyt", "tweets")
CASES = {
    "quick": [("minilm", "pretrained", "amazon", 48, 0)],
    "full": [
        *(("minilm", w, d, 256, 0) for d in MINILM for w in ("pretrained", "random")),
        *(("minilm", w, "amazon", 256, s) for s in (1, 2) for w in ("pretrained", "random")),
        *(("smollm2", "pretrained", d, 128, 0) for d in ("amazon", "tweets")),
    ],
}
LAYERS = {"quick": {"minilm": [3]}, "full": {"minilm": [0, 1, 2, 3, 4, 5], "smollm2": [0, 14, 29]}}
DRAWS = 1000  # of the bootstrap


def toy_inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return two token sequences (T, d), the second a noisy copy of the first so that they resemble each other."""
    rng = np.random.default_rng((seed, 10))
    x = rng.standard_normal((TOKENS, D))
    return x, 0.8 * x + 0.6 * rng.standard_normal((TOKENS, D))


def agreement(model: str, layers: Sequence[int], texts: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the largest relative (Frobenius) gap of each block q, k, v, o: (layers, 4).

    Everything in float64. Softmax is that of torch: the eager code of Llama rounds it to float32 on the way.
    """
    loaded = ntkft.load_model(model, dtype=torch.float64)
    loaded.model.set_attn_implementation("sdpa")
    readout = ntkft.pooled_readout(loaded) if model == "minilm" else ntkft.prompt_readout(loaded)
    chosen = sorted(ntkft.load_task("amazon", n=256, seed=seed).texts, key=len)[
        8 : 8 + texts
    ]  # short, not tiny
    gaps = []
    for index in layers:
        patterns = layer_patterns(readout, index)
        engine = ntkft.empirical_ntk(
            readout, chosen, parameters=list(patterns.values()), blocks=patterns, memory="1GB", progress=False
        )
        ours = layer_blocks(readout, chosen, index)
        gaps.append(
            [np.linalg.norm(ours[b] - engine.parts[b]) / np.linalg.norm(engine.parts[b]) for b in "qkvo"]
        )
    return {"gap": np.array(gaps)}


def temperature(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return, by temperature, the mean blocks o, v, q, k (taus, 4), and the share of q and k with 95 % intervals.

    The share twice: of the mean kernel (ratio of means over heads), and of the median head.
    """
    rng = np.random.default_rng((seed, 20))
    heads, x = Heads.draw(rng, count, D, D_K), toy_inputs(seed)[0]
    found = [head_blocks(heads, x, 0, x, 0, tau) for tau in TAUS]
    blocks = np.array([[f[b] for b in "ovqk"] for f in found])  # (taus, 4, N)
    each = blocks[:, 2:].sum(1) / blocks.sum(1)  # (taus, N)
    picks = rng.integers(count, size=(DRAWS, count))
    means = np.stack([blocks[:, :, pick].mean(2) for pick in picks])  # (DRAWS, taus, 4)
    medians = np.stack([np.median(each[:, pick], axis=1) for pick in picks])  # (DRAWS, taus)
    mean = blocks.mean(2)
    level = [0.025, 0.975]
    return {
        "temperature_blocks": mean,
        "temperature_share": mean[:, 2:].sum(1) / mean.sum(1),
        "temperature_share_interval": np.quantile(means[:, :, 2:].sum(2) / means.sum(2), level, axis=0).T,
        "temperature_median": np.median(each, axis=1),
        "temperature_median_interval": np.quantile(medians, level, axis=0).T,
        "temperature_largest_p": np.array([attend(heads, x, 0, tau)[0].max(1).mean() for tau in TAUS]),
    }


def many_heads(kernels: int, behind: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the RMS distance of the kernel of M heads from its limit (counts,), and bootstrap copies of that curve.

    One pool of heads serves all M: a kernel of 4096 heads is also two of 2048. The bootstrap draws whole pools of 4096
    heads, which are independent, and the limit comes from other heads, with w_O and W_V integrated out.
    """
    rng = np.random.default_rng((seed, 30))
    x, x2 = toy_inputs(seed)
    top, chunk = int(COUNTS[-1]), 50_000
    totals = [
        sum(scores_only(Heads.draw(rng, chunk, D, D_K), x, 0, x2, 0, 1 / D, 1 / D_K).values()).mean()  # type: ignore[union-attr]
        for _ in range(behind // chunk)
    ]
    limit = float(np.mean(totals))
    pool = np.stack(
        [sum(head_blocks(Heads.draw(rng, top, D, D_K), x, 0, x2, 0).values()) for _ in range(kernels)]
    )  # (kernels, 4096)
    squares = np.stack(
        [((pool.reshape(kernels, -1, M).mean(2) - limit) ** 2).mean(1) for M in COUNTS], 1
    )  # (kernels, counts)
    picks = rng.integers(kernels, size=(DRAWS, kernels))
    copies = np.sqrt(squares[picks].mean(1))  # (DRAWS, counts)
    slopes = np.polyfit(np.log(COUNTS), np.log(copies.T), 1)[0]
    rms = np.sqrt(squares.mean(0))
    return {
        "heads_limit": np.array(limit),
        "heads_limit_error": np.array(np.std(totals) / len(totals) ** 0.5),
        "heads_variance": np.array(pool.var()),
        "heads_rms": rms,
        "heads_interval": np.quantile(copies, [0.025, 0.975], axis=0).T,
        "heads_slope": np.array(
            [np.polyfit(np.log(COUNTS), np.log(rms), 1)[0], *np.quantile(slopes, [0.025, 0.975])]
        ),
    }


def block_shares(
    parts: dict[str, np.ndarray], residual: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares (3, blocks) of trace, centred trace and r'Kr, r the centred residual, and their 95 % half-widths.

    The trace of HKH is the mean of r'Kr over labels that are pure noise: what a block would do for no task at all.

    The half-width is 1.96 standard errors of a bootstrap over texts. (A repeated text counts its diagonal twice, which
    shifts the bootstrap's centre; its spread is used, not its centre.)
    """
    stack = np.stack(list(parts.values()))  # (blocks, n, n)
    diagonal = np.einsum("bii->bi", stack)
    n = len(residual)

    def shares(weights: np.ndarray) -> np.ndarray:  # (draws, n) -> (draws, 3, blocks)
        centred = weights * (residual - (weights @ residual / n)[:, None])  # (draws, n)
        aligned = np.stack([((centred @ part) * centred).sum(1) for part in stack], 1)
        trace = weights @ diagonal.T
        common = np.stack([((weights @ part) * weights).sum(1) for part in stack], 1) / n
        every = np.stack([trace, trace - common, aligned], 1)
        return every / every.sum(2, keepdims=True)

    weights = np.random.default_rng((seed, 40)).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(float)
    return shares(np.ones((1, n)))[0], 1.96 * shares(weights).std(0)


def model_shares(model: str, weights: str, domain: str, n: int, seed: int) -> dict[str, np.ndarray]:
    """Compute one model's kernel by kind on one domain and reduce it to shares, (3, kinds) in the order of KINDS."""
    source: dict[str, Any] = {"weights": weights, "seed": seed} if weights == "random" else {}
    loaded = ntkft.load_model(model, **source)
    readout = ntkft.pooled_readout(loaded, seed=seed) if model == "minilm" else ntkft.prompt_readout(loaded)
    task = ntkft.load_task(domain, n=n, seed=0)
    kernel = ntkft.empirical_ntk(
        readout, task.texts, blocks="kind", memory="1GB" if model == "minilm" else "2GB", progress=False
    )
    # SmolLM2's output layer is its embedding, one tied parameter: the engine counts it as embedding.
    parts = {kind: kernel.parts.get(kind, np.zeros((n, n))) for kind in KINDS}
    if not np.allclose(sum(parts.values()), kernel.matrix):
        raise ntkft.errors.InputError(f"{model} has the kinds {sorted(kernel.parts)}, not those of {KINDS}.")
    share, width = block_shares(parts, task.reference - kernel.scores, seed)
    return {"share": share, "width": width}


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Run all four parts; see the module docstring."""
    full = tier == "full"
    count, kernels, behind = TOY[tier]
    arrays: dict[str, np.ndarray] = {"taus": TAUS, "counts": COUNTS}
    arrays |= temperature(count, seed)
    arrays |= resumable(MODULE, f"heads-{seed}", lambda: many_heads(kernels, behind, seed), keep=full)
    arrays.pop("seconds", None)
    values: dict[str, Any] = {"toy_heads": count, "kernels": kernels, "kinds": list(KINDS)}
    for model, layers in LAYERS[tier].items():
        texts = 12 if model == "minilm" else 6
        compare = partial(agreement, model, layers, texts, seed)
        gap = resumable(MODULE, f"agreement-{model}-{seed}", compare, keep=full)["gap"]
        arrays[f"gap_{model}"] = gap  # (layers, 4)
        values |= {f"gap_{model}": float(gap.max()), f"layers_{model}": layers, f"texts_{model}": texts}
    for case in CASES[tier]:
        model, weights, domain, n, k = case
        name = f"{model}_{weights}_{domain}_{k}"
        part = resumable(MODULE, name, partial(model_shares, *case), keep=full)
        arrays |= {
            f"share_{name}": part["share"],
            f"width_{name}": part["width"],
        }  # (3, kinds)
        values[f"n_{model}"] = n
    slope, low, high = arrays["heads_slope"]
    values |= {"slope": slope, "slope_low": low, "slope_high": high}
    return values, arrays
