"""Checks of what was measured in the chapter "Stopping language models"."""

from __future__ import annotations

import numpy as np

from ntkft.checks import Claim, Verdict, full_result
from ntkft.experiments.llm_stopping import DOMAINS, RATERS
from ntkft.experiments.result import Result


def _parts(result: Result, models: tuple[str, ...], n: int = 128, raters: int = 1) -> list[str]:
    """Return where the results of each rated domain lie that has a stored kernel (MiniLM: its first head)."""
    names = [f"{model}-{d}" + ("-0" if model == "minilm" else "") for model in models for d in DOMAINS]
    return [f"{k}/{n}/{raters}" for k in names if f"{k}/{n}/{raters}/sure" in result.values]


BOTH = ("smollm2", "minilm")


def raters_lengthen_training(broken: bool = False) -> Verdict:
    """Stored draws: the power of the variance ratio with which the rule's time grows, and the median growth of the best times."""
    result = full_result("llm_stopping")
    data, powers, growth, holds = result.arrays, [], [], True
    for first in _parts(result, BOTH):
        for m in RATERS[1:]:
            other = f"{first[:-2]}/{m}"
            ratio = (data[f"{first}/sigma"] / data[f"{other}/sigma"]) ** 2
            power = np.log(data[f"{other}/eta_rademacher"] / data[f"{first}/eta_rademacher"]) / np.log(ratio)
            powers += [float(power.min()), float(power.max())]
        best = float(np.median(data[f"{other}/eta_oracle"] / data[f"{first}/eta_oracle"]))
        growth.append(best)
        own = float(np.median(data[f"{other}/eta_oracle_sample"] / data[f"{first}/eta_oracle_sample"]))
        low, high = np.median(ratio) ** 0.5, np.median(ratio)
        holds &= bool(1 < best < low and low <= own <= high)
    holds &= min(powers) > (0.7 if broken else 0.499) and max(powers) < 1.001
    told = f"powers {min(powers):.3f} to {max(powers):.3f}; best time grows {min(growth):.2f} to {max(growth):.2f} times"
    return Verdict(bool(holds), told)


def a_few_epochs(broken: bool = False) -> Verdict:
    """Stored draws: median epochs of the best time and of the rule, centred, B = 16, c = 1/2, 128 texts."""
    result = full_result("llm_stopping")
    data = result.arrays
    count = {
        rule: [
            float(np.median(data[f"{w}/eta_{rule}"] * data[f"{w}/lambda_1"])) / 0.5 * 16 / 128
            for w in _parts(result, BOTH)
        ]
        for rule in ("oracle", "rademacher")
    }
    best, ours = count["oracle"], count["rademacher"]
    holds = min(best) >= 1 and max(best) <= (1 if broken else 10) and max(ours) < 10
    return Verdict(
        bool(holds),
        f"best {min(best):.1f} to {max(best):.1f} epochs, rule {min(ours):.1f} to {max(ours):.1f}",
    )


def _paired(result: Result, where: str, rule: str, other: str) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean excess of `rule` less that of `other`, draw by draw."""
    data = result.arrays
    gap = (data[f"{where}/test_{rule}"] - data[f"{where}/test_{other}"]) / data[f"{where}/test_oracle"]
    means = np.random.default_rng(0).choice(gap, (2000, len(gap))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def rule_on_smollm2(broken: bool = False) -> Verdict:
    """Stored draws: R = 1 costs at most 2 % but once, always less than hold-out, and is within 3 points of three epochs."""
    result = full_result("llm_stopping")
    medians: list[float] = []
    gap, away = np.inf, 0.0
    for n in (64, 128, 256):
        for w in _parts(result, ("smollm2",), n):
            ours, habit = (result.values[f"{w}/{rule}"]["median"] for rule in ("rademacher", "epochs3"))
            medians, away = sorted([*medians, ours]), max(away, abs(ours - habit))
            gap = min(gap, _paired(result, w, "holdout", "rademacher")[0])
    usual, worst = medians[-2:]
    holds = len(medians) == 12 and usual <= (0.001 if broken else 0.02) and worst <= 0.04 and gap > 0 and away < 0.03
    told = f"all but one <= {100 * usual:.1f} %, that one {100 * worst:.1f} %, hold-out at least {100 * gap:.1f} points worse"
    return Verdict(bool(holds), f"{told}, three epochs within {100 * away:.1f} points")


def rule_on_minilm(broken: bool = False) -> Verdict:
    """Stored draws: R = 1 is above 5 % in each domain, and paired differences from three rules exclude zero."""
    result = full_result("llm_stopping")
    least, medians = np.inf, []
    for w in _parts(result, ("minilm",)):
        medians.append(result.values[f"{w}/rademacher"]["median"])
        least = min(
            least, *(_paired(result, w, "rademacher", rule)[0] for rule in ("epochs3", "sure", "evidence"))
        )
    holds = len(medians) == 4 and min(medians) > 0.05 and (least < 0 if broken else least > 0)
    return Verdict(
        bool(holds),
        f"medians {100 * min(medians):.1f} to {100 * max(medians):.1f} %; lowest end {100 * least:.1f} %",
    )


def size_of_the_target(broken: bool = False) -> Verdict:
    """Stored draws: SURE <= 2 %, evidence <= 5 %, true norm above both, plug-in, truncated and prior norm above 10 %."""
    result = full_result("llm_stopping")
    holds, most, least = True, 0.0, np.inf
    for w in _parts(result, BOTH):
        v = {r: result.values[f"{w}/{r}"]["median"] for r in ("sure", "evidence", "true_norm")}
        bad = min(result.values[f"{w}/{r}"]["median"] for r in ("plug_in", "truncated", "prior_norm"))
        holds &= v["sure"] <= (0.0 if broken else 0.02) and v["evidence"] <= 0.05
        holds &= v["true_norm"] > max(v["sure"], v["evidence"]) and bad > 0.1
        most, least = max(most, v["sure"], v["evidence"]), min(least, bad)
    return Verdict(
        bool(holds),
        f"SURE and evidence at most {100 * most:.1f} %, estimated norms at least {100 * least:.1f} %",
    )


def without_pretraining(broken: bool = False) -> Verdict:
    """Stored draws, random MiniLM: SURE's excess on new texts is 3 times that on training texts; R = 1 has less on average."""
    values = full_result("llm_stopping").values
    names = [name for name in values["kernels"] if name.startswith("random-")]
    cases = [
        tuple(values[f"{name}/128/1/{rule}"]["median"] for rule in ("sure", "sample_sure", "rademacher"))
        for name in names
    ]
    apart = min(new / own for new, own, _ in cases)
    sure, _, clock = np.mean(cases, axis=0)
    holds = len(cases) == 4 and apart >= (10 if broken else 3) and clock < sure
    told = "; ".join(f"{100 * new:.1f}, {100 * own:.1f}, {100 * ours:.1f}" for new, own, ours in cases)
    return Verdict(bool(holds), f"SURE new and own, R = 1 new, in %: {told}")


def two_classes(broken: bool = False) -> Verdict:
    """Stored draws: opinions punish never stopping by 0.1 nats and forgive the deviance rule; newsgroups do not punish."""
    result = full_result("llm_stopping")
    opinions = [k for k in result.values["two_class"] if k.split("-")[1] in DOMAINS]
    never = min(result.values[f"{k}/logistic/never"]["median"] for k in opinions)
    deviance = max(result.values[f"{k}/logistic/deviance"]["median"] for k in opinions)
    topic = result.values["minilm-newsgroups-0/logistic/never"]["median"]
    holds = never >= (1.0 if broken else 0.1) and deviance <= 0.02 and topic < 0.01
    return Verdict(
        bool(holds),
        f"never {never:.2f} at least, deviance {deviance:.3f} at most, newsgroups {topic:.4f} nats",
    )


CHAPTER = "llm_stopping"


CLAIMS = (
    Claim(
        "obs-lp-raters",
        CHAPTER,
        "The rule's time grows within the theorem's limits; the best time does on training texts, and less on new ones.",
        "stored",
        raters_lengthen_training,
    ),
    Claim(
        "obs-lp-epochs",
        CHAPTER,
        "On pretrained kernels the best time is between 1 and 10 epochs.",
        "stored",
        a_few_epochs,
    ),
    Claim(
        "obs-lp-smollm2",
        CHAPTER,
        "On SmolLM2 the Rademacher rule costs at most 2 % in 11 of 12 cases, less than hold-out, about as much as three epochs.",
        "stored",
        rule_on_smollm2,
    ),
    Claim(
        "obs-lp-minilm",
        CHAPTER,
        "On MiniLM the Rademacher rule with R = 1 costs more than 5 % and is worse than three epochs, SURE and evidence.",
        "stored",
        rule_on_minilm,
    ),
    Claim(
        "obs-lp-size",
        CHAPTER,
        "SURE costs at most 2 %, the evidence rule 5 %, the true norm more, estimated norms more than 10 %.",
        "stored",
        size_of_the_target,
    ),
    Claim(
        "obs-lp-twins",
        CHAPTER,
        "On MiniLM's random twin SURE serves the training texts; on new ones the Rademacher rule is better on average.",
        "stored",
        without_pretraining,
    ),
    Claim(
        "obs-lp-two-class",
        CHAPTER,
        "Never stopping costs at least 0.1 nats on opinions, the deviance rule at most 0.02, and newsgroups forgive both.",
        "stored",
        two_classes,
    ),
)
