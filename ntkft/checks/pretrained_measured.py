"""Checks of what was measured in the chapter "Pretrained beginnings"."""

from __future__ import annotations

import numpy as np

from ntkft import stability
from ntkft.checks import Claim, Verdict, full_result


def kernel_slopes(broken: bool = False) -> Verdict:
    """The interval of the adversarial exponent contains -0.5, that of Gaussian heads lies below -0.65."""
    values = full_result("pretrained_ntk").values
    slow, fast = values["adversarial_kernel_slope"], values["gaussian_kernel_slope"]
    if broken:
        slow, fast = fast, slow
    return Verdict(
        bool(slow[1] <= -0.5 <= slow[2] and fast[2] < -0.65),
        f"equal heads {slow[0]:.2f} [{slow[1]:.2f}, {slow[2]:.2f}], independent {fast[0]:.2f} [{fast[1]:.2f}, {fast[2]:.2f}]",
    )


def mixed_rate(broken: bool = False) -> Verdict:
    """The exponent's interval contains -1/2, and the measured deviation is within a tenth of the exact one for every H."""
    result = full_result("pretrained_ntk")
    slope, low, high = result.values["mixed_slope"]
    wanted = -1.0 if broken else -0.5
    rms = np.sqrt((result.arrays["mixed_rms"] ** 2).mean(1))
    worst = float(np.abs(rms / result.arrays["mixed_exact"] - 1).max())
    return Verdict(
        bool(low <= wanted <= high and worst < 0.1),
        f"exponent {slope:.3f} [{low:.3f}, {high:.3f}]; deviation within {100 * worst:.1f} % of the formula",
    )


def lora_in_a_real_model(broken: bool = False) -> Verdict:
    """Exponent near -1/2, spread of entries as computed to a fifth, stop within 10 % for ranks of at least 4; broken: 1 %."""
    result = full_result("pretrained_ntk")
    slope, low, high = result.values["lora_slope"]
    arrays = result.arrays
    spread = float(np.sqrt(((arrays["lora_measured"] / arrays["lora_predicted"]) ** 2).mean()))
    stops = np.abs(arrays["lora_stop"][arrays["lora_ranks"] >= 4] - 1)
    return Verdict(
        bool(abs(slope + 0.5) < 0.05 and abs(spread - 1) < 0.2 and stops.max() < (0.01 if broken else 0.1)),
        f"exponent {slope:.3f} [{low:.3f}, {high:.3f}]; spread {spread:.2f} of the formula; stops off by {stops.max():.3f}",
    )


def kernels_that_leave(broken: bool = False) -> Verdict:
    """In every stored run of MiniLM the kernel's change at the predicted stop exceeds λ_1; broken: ten times λ_1."""
    arrays = full_result("pretrained_ntk").arrays
    changes = [change for domain in ("amazon", "tweets") for change in _at_stop(arrays, f"minilm_{domain}")]
    limit = 10.0 if broken else 1.0
    return Verdict(
        bool(min(changes) > limit),
        f"{len(changes)} runs: ‖K_t - K‖/λ_1 at the stop from {min(changes):.2f} to {max(changes):.2f}",
    )


def short_paths(broken: bool = False) -> Verdict:
    """In every stored run the travel at the stop is below lem-travel's bound and twice the tangent's; broken: half as much."""
    arrays = full_result("pretrained_ntk").arrays
    ratios: list[float] = []
    names = [name.removesuffix("_distance") for name in arrays if name.startswith("drift_") and name.endswith("_distance")]
    for name in names:
        for i, eta in enumerate(arrays[f"{name}_eta"]):
            stop = float(arrays[f"{name}_eta_stop"][i])
            look = _look_at_stop(eta, stop)
            distance, losses = arrays[f"{name}_distance"][i, look], arrays[f"{name}_loss"][i]
            allowed = stability.travel(eta[look], losses[0], losses[look], descent=True)
            tangent = stability.tangent_travel(arrays[f"{name}_eigenvalues"][i], arrays[f"{name}_target"][i], stop)
            ratios.append(max(distance / allowed, distance / (2 * tangent)) * (2 if broken else 1))
    return Verdict(
        bool(len(ratios) >= 6 and max(ratios) < 1), f"{len(ratios)} runs: at most {max(ratios):.2f} of the smaller allowance"
    )


def the_larger_model_drifts_less(broken: bool = False) -> Verdict:
    """On tweets SmolLM2's kernel has changed less at its stop, relative to λ_1, than MiniLM's; broken: a fiftieth of it."""
    arrays = full_result("pretrained_ntk").arrays
    small, large = _at_stop(arrays, "minilm_tweets"), _at_stop(arrays, "smollm2_tweets")
    return Verdict(
        bool(max(large) < min(small) / (50 if broken else 1)), f"SmolLM2 {max(large):.2f}, MiniLM at least {min(small):.2f}"
    )


def _look_at_stop(eta: np.ndarray, stop: float) -> int:
    return int(np.abs(eta - stop).argmin())


def _at_stop(arrays: dict[str, np.ndarray], run: str) -> list[float]:
    """Return ‖K_t - K‖_op/λ_1 at the look nearest to the predicted stop, for each head."""
    found = []
    for i, eta in enumerate(arrays[f"drift_{run}_eta"]):
        look = _look_at_stop(eta, float(arrays[f"drift_{run}_eta_stop"][i]))
        found.append(float(arrays[f"drift_{run}_kernel_op"][i, look] / arrays[f"drift_{run}_eigenvalues"][i, 0]))
    return found


CHAPTER = "pretrained_ntk"


CLAIMS = (
    Claim(
        "obs-pn-slopes",
        CHAPTER,
        "The kernel's change falls like H^{-1/2} for equal heads, faster for independent Gaussian ones.",
        "stored",
        kernel_slopes,
    ),
    Claim(
        "obs-pn-mixed",
        CHAPTER,
        "The deviation of a mixed start's kernel falls with an exponent whose interval contains -1/2.",
        "stored",
        mixed_rate,
    ),
    Claim(
        "obs-pn-lora",
        CHAPTER,
        "On MiniLM LoRA's kernel error falls like r^{-1/2}, and its stop is within 10 % of the full kernel's from rank 4 on.",
        "stored",
        lora_in_a_real_model,
    ),
    Claim(
        "obs-pn-drift",
        CHAPTER,
        "In every stored run of MiniLM the kernel has changed by more than λ_1 at the predicted stop.",
        "stored",
        kernels_that_leave,
    ),
    Claim(
        "obs-pn-travel",
        CHAPTER,
        "In every stored run the travel at the stop is below the bound of lem-travel and below twice the tangent's.",
        "stored",
        short_paths,
    ),
    Claim(
        "obs-pn-size",
        CHAPTER,
        "On tweets SmolLM2's kernel has changed less at its stop, relative to λ_1, than MiniLM's in either of its runs.",
        "stored",
        the_larger_model_drifts_less,
    ),
)
