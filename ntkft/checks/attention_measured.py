"""Checks of what was measured in the chapter "The kernel of attention"."""

from __future__ import annotations

import numpy as np

from ntkft.checks import Claim, Verdict, full_result


def stored_agreement(broken: bool = False) -> Verdict:
    """Stored gaps between formulas and engine, all layers and blocks of both models."""
    values = full_result("attention_ntk").values
    gaps = {model: values[f"gap_{model}"] for model in ("minilm", "smollm2")}
    limit = 1e-15 if broken else 1e-10
    told = ", ".join(f"{model} {gap:.0e}" for model, gap in gaps.items())
    return Verdict(max(gaps.values()) < limit, f"largest relative gap: {told}")


def stored_temperature(broken: bool = False) -> Verdict:
    """Stored toy heads: the median head's share of q and k falls below a thousandth, the mean kernel's does not."""
    arrays = full_result("attention_ntk").arrays
    cold = int(np.flatnonzero(arrays["taus"] == 64)[0])
    median = arrays["temperature_median" if not broken else "temperature_share"][cold]
    low = arrays["temperature_share_interval"][cold, 0]
    return Verdict(
        bool(median < 1e-3 and low > 0.5), f"at τ = 64: median {median:.0e}, mean kernel at least {low:.2f}"
    )


def stored_slope(broken: bool = False) -> Verdict:
    """Stored sweep: the interval of the slope holds -1/2 and is short."""
    values, wanted = full_result("attention_ntk").values, -1.0 if broken else -0.5
    low, high = values["slope_low"], values["slope_high"]
    return Verdict(
        bool(low <= wanted <= high and high - low < 0.05),
        f"slope {values['slope']:.3f}, {low:.3f} to {high:.3f}",
    )


def stored_shares(broken: bool = False) -> Verdict:
    """Stored shares of queries and keys: trace, centred trace and aligned part, differences beyond both half-widths."""
    result, holds, told = full_result("attention_ntk"), True, []
    kinds = result.values["kinds"]
    qk, vo = ([kinds.index(f"attention.{b}") for b in pair] for pair in ("qk", "vo"))
    cases = [
        f"minilm_{w}_{d}_0" for w in ("pretrained", "random") for d in ("amazon", "movies", "nyt", "tweets")
    ]
    cases += [f"smollm2_pretrained_{d}_0" for d in ("amazon", "tweets")]
    for case in cases:
        share, width = result.arrays[f"share_{case}"], result.arrays[f"width_{case}"]
        holds &= bool(share[0, qk].sum() < share[0, vo].sum())
        surplus = float(share[2, qk].sum() - share[1, qk].sum())
        error = float(width[1:, qk].sum())
        if case.startswith("minilm_pretrained"):
            holds &= (surplus if broken else -surplus) > error
            told.append(f"{100 * surplus:+.2f} (± {100 * error:.2f})")
        if case == "smollm2_pretrained_amazon_0":
            holds &= surplus > error
            told.append(f"SmolLM2, reviews {100 * surplus:+.2f} (± {100 * error:.2f})")
    return Verdict(bool(holds), "aligned minus centred share in per cent, MiniLM " + ", ".join(told))


CHAPTER = "attention_ntk"


CLAIMS = (
    Claim(
        "obs-at-temperature",
        CHAPTER,
        "At τ = 64 the share of queries and keys is below 0.001 in the median head and above a half in the mean kernel.",
        "stored",
        stored_temperature,
    ),
    Claim(
        "obs-at-agreement",
        CHAPTER,
        "Formulas and kernel engine agree to 1e-10 on six layers of MiniLM and on three of SmolLM2.",
        "stored",
        stored_agreement,
    ),
    Claim(
        "obs-at-slope",
        CHAPTER,
        "The measured distance from the many-head limit has a slope whose 95 % interval holds -1/2.",
        "stored",
        stored_slope,
    ),
    Claim(
        "obs-at-shares",
        CHAPTER,
        "Queries and keys have less of the trace than values and outputs in ten kernels of MiniLM, its twin and SmolLM2; "
        "aligned below centred share in MiniLM, above it in SmolLM2 on reviews.",
        "stored",
        stored_shares,
    ),
)
