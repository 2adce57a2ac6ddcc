"""LoRA as a sketch of the full kernel: MiniLM with the adapters of `peft`, ranks 1 to 64.

The full kernel is that of the adapted weight matrices. For each rank and seed the adapters are attached before training (A
Gaussian, B zero), the kernel of their parameters is computed by the same engine, and the adapters are taken off again. With
``lora_alpha = r`` and the Gaussian initialization of `peft`, entries N(0, 1/r²), the expectation is k/r.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

import ntkft
from ntkft import stopping
from ntkft.experiments.result import resumable
from ntkft.ntk import Kernel
from ntkft.ntk.kernel import centred
from ntkft.readout import Readout
from ntkft.spectrum import Spectrum

LAYERS = ("query", "key", "value", "dense")
ADAPTED = ["*.self.query.weight", "*.self.key.weight", "*.self.value.weight", "*.dense.weight"]
# tier: (texts, ranks, seeds)
SIZES = {"quick": (16, (1, 8, 64), 2), "full": (64, (1, 2, 4, 8, 16, 32, 64), 10)}


@contextmanager
def adapters(readout: Readout, rank: int, seed: int, init: str | bool = "gaussian") -> Iterator[None]:
    """Attach LoRA adapters of `rank` to the read-out's model, with lora_alpha = rank; take them off at the end."""
    config = LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(LAYERS), init_lora_weights=init  # type: ignore[arg-type]
    )
    frozen = {name: p.requires_grad for name, p in readout.module.named_parameters()}
    with torch.random.fork_rng(devices=[]):  # peft draws from torch's global generator
        torch.manual_seed(seed)
        wrapped = get_peft_model(readout.model, config)
    try:
        yield
    finally:
        wrapped.unload()
        for name, p in readout.module.named_parameters():
            p.requires_grad_(frozen[name])  # peft has frozen the base weights


def lora_kernel(readout: Readout, texts: list[str], rank: int, seed: int, init: str | bool = "gaussian") -> np.ndarray:
    """Return the kernel of the adapters' parameters before training, (n, n)."""
    with adapters(readout, rank, seed, init):
        return ntkft.empirical_ntk(readout, texts, parameters="*lora_*", memory="1GB", progress=False).matrix


def full_kernel(readout: Readout, texts: list[str]) -> Kernel:
    """Return the kernel of the adapted weights, with a part for each width of their inputs."""
    widths = {name: str(p.shape[1]) for name, p in readout.parameters().items() if p.ndim == 2}
    return ntkft.empirical_ntk(
        readout, texts, parameters=ADAPTED, blocks=lambda name: widths[name], memory="1GB", progress=False
    )


def sketch_errors(n: int, ranks: tuple[int, ...], seeds: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Compare r times the adapters' kernel with the full one, after centring.

    Returns
    -------
    dict
        error (ranks, seeds): ‖K_LoRA - K‖_F / tr K; error_op, the same in operator norm relative to λ_1; nuclear, relative to
        tr K; scale: tr K_LoRA / tr K; stop: η̂ of the adapters' kernel over η̂ of the full kernel; change: the nuclear distance
        divided by n R̂(ε̂)², the relative change of `lem-perturbation`.
    """
    task = ntkft.load_task("tweets", n=n, seed=seed)
    sigma = float(np.sqrt(task.noise_variance or np.nan))
    readout = ntkft.pooled_readout(ntkft.load_model("minilm"), seed=0)
    full = centred(full_kernel(readout, task.texts).matrix) / n
    spectrum = Spectrum(np.linalg.eigvalsh(full))
    radius = spectrum.critical_radius(sigma)
    names = ("error", "error_op", "nuclear", "scale", "stop", "change")
    found = {name: np.empty((len(ranks), seeds)) for name in names}
    for i, rank in enumerate(ranks):
        for s in range(seeds):
            sketch = centred(lora_kernel(readout, task.texts, rank, 1000 * seed + s)) * rank / n
            gaps = np.abs(np.linalg.eigvalsh(sketch - full))
            shifts = np.abs(np.linalg.eigvalsh(sketch) - np.linalg.eigvalsh(full))
            found["error"][i, s] = np.sqrt((gaps**2).sum()) / np.trace(full)
            found["error_op"][i, s] = gaps.max() / spectrum.eigenvalues[0]
            found["nuclear"][i, s] = gaps.sum() / np.trace(full)
            found["scale"][i, s] = np.trace(sketch) / np.trace(full)
            eta = stopping.rademacher_rule(Spectrum(np.linalg.eigvalsh(sketch)), sigma).eta
            found["stop"][i, s] = eta * radius**2
            found["change"][i, s] = shifts.mean() / spectrum.rademacher(radius) ** 2
    return found | {"ranks": np.array(ranks), "eigenvalues": spectrum.eigenvalues, "eta_stop": np.array(radius**-2)}


def layer_gradients(readout: Readout, text: str) -> list[torch.Tensor]:
    """Return the gradient (q, p) of every adapted weight for one text."""
    chosen = [p for name, p in readout.parameters().items() if p.ndim == 2 and any(f"{k}.weight" in name for k in LAYERS)]
    return list(torch.autograd.grad(readout([text])[0], chosen))


def predicted_spread(readout: Readout, texts: list[str], rank: int) -> np.ndarray:
    """Return the standard deviation of each entry of the sketched kernel by `prop-sketch`, (n, n).

    It is [(2/r) Σ_layers ‖sym(GᵀG')‖_F²]^½, with ‖sym(GᵀG')‖_F² = (⟨GGᵀ, G'G'ᵀ⟩ + tr((G'Gᵀ)²))/2, so that only (q, q)
    matrices are formed.
    """
    rows = [layer_gradients(readout, text) for text in texts]
    variance = np.zeros((len(texts), len(texts)))
    for i, left in enumerate(rows):
        for j, right in enumerate(rows[: i + 1]):
            total = 0.0
            for G, G2 in zip(left, right, strict=True):
                product = G2 @ G.T  # (q, q)
                total += float(((G @ G.T) * (G2 @ G2.T)).sum() + (product * product.T).sum()) / 2
            variance[i, j] = variance[j, i] = 2 / rank * total
    return np.sqrt(variance)


def spread(n: int = 8, rank: int = 4, draws: int = 60) -> dict[str, np.ndarray]:
    """Measure mean and standard deviation of the sketched kernel over `draws` of the adapters, beside the prediction."""
    task = ntkft.load_task("tweets", n=n, seed=1)
    readout = ntkft.pooled_readout(ntkft.load_model("minilm"), seed=0)
    full = full_kernel(readout, task.texts).matrix
    predicted = predicted_spread(readout, task.texts, rank)
    sketches = np.stack([rank * lora_kernel(readout, task.texts, rank, 5000 + k) for k in range(draws)])
    return {"full": full, "predicted": predicted, "mean": sketches.mean(0), "measured": sketches.std(0, ddof=1)}


def default_initialization(n: int = 32, rank: int = 16, draws: int = 10) -> dict[str, np.ndarray]:
    """Compare peft's default adapters (uniform A, variance 1/(3p)) with the full kernel and with Σ_layers k_layer r/(3p)."""
    task = ntkft.load_task("tweets", n=n, seed=1)
    readout = ntkft.pooled_readout(ntkft.load_model("minilm"), seed=0)
    full = full_kernel(readout, task.texts)
    expected = sum(part * rank / (3 * int(width)) for width, part in full.parts.items())
    mean = np.mean([lora_kernel(readout, task.texts, rank, 9000 + k, init=True) for k in range(draws)], axis=0)
    plain = full.matrix * np.trace(mean) / np.trace(full.matrix)
    size = np.linalg.norm(mean)
    return {
        "to_reweighted": np.array(np.linalg.norm(mean - expected) / size),
        "to_full": np.array(np.linalg.norm(mean - plain) / size),
    }


def run_sketch(tier: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Return every array of the chapter's LoRA section."""
    keep = tier == "full"
    found = resumable(__name__, f"errors_{seed}", lambda: sketch_errors(*SIZES[tier], seed), keep=keep)
    if keep:
        found |= resumable(__name__, "spread", spread)
        found |= resumable(__name__, "default", default_initialization)
    return {f"lora_{key}": value for key, value in found.items() if key != "seconds"}
