"""Checks of the chapter "Stopping language models": the rules on stored kernels, and the cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import expit

from ntkft import stopping
from ntkft.checks import Claim, Verdict, full_result
from ntkft.descent import descend
from ntkft.experiments.llm_stopping import DOMAINS, RATERS
from ntkft.experiments.result import Result
from ntkft.logistic import logistic_path
from ntkft.spectrum import Spectrum

E = np.e


def _spectra() -> Iterator[np.ndarray]:
    """Eigenvalues of many kinds: power laws, exponential, finite rank, flat, one dominant mode."""
    j = np.arange(1, 101)
    yield from (j**-0.7, j**-1.5, j**-4.0, np.exp(-0.2 * j), np.where(j <= 5, 1.0, 0.0), np.full(100, 0.01))
    yield np.where(j == 1, 50.0, 0.1 / j)


def better_raters(broken: bool = False) -> Verdict:
    """σ² -> σ²/m moves η̂ by a factor between √m and m, with slope 1/(1+s); the rule is solved by bisection."""
    holds, low, high, worst = True, np.inf, 0.0, 0.0
    for lam in _spectra():
        for sigma in np.geomspace(0.01, 10, 13):
            first = stopping.rademacher_rule(Spectrum(lam), sigma).eta
            for m in (2.0, 10.0):
                power = np.log(stopping.rademacher_rule(Spectrum(lam), sigma / m**0.5).eta / first) / np.log(
                    m
                )
                low, high = min(low, power), max(high, power)
            active = first * lam
            if np.abs(active - 1).min() > 1e-3:  # away from a kink
                s = active[active < 1].sum() / np.minimum(active, 1).sum()
                near = stopping.rademacher_rule(Spectrum(lam), sigma * np.exp(-5e-6)).eta
                worst = max(worst, abs(np.log(near / first) / 1e-5 - 1 / (1 + s)))
    bottom = 0.6 if broken else 0.5
    holds = low >= bottom - 1e-9 and high <= 1 + 1e-9 and worst < 1e-4
    return Verdict(
        bool(holds), f"η̂ grows as m to a power from {low:.3f} to {high:.3f}; slopes agree to {worst:.1e}"
    )


def power_law_slope(broken: bool = False) -> Verdict:
    """λ_j = A j^(-a): the tail's share of the dimension goes to 1/a, and the slope to a/(1+a)."""
    gaps = []
    for a in (1.5, 2.0, 3.0):
        lam = 3.0 * np.arange(1, 1_000_001) ** -a
        for eta in (1e3, 1e5 if a > 1.5 else 1e4):
            active = eta * lam
            # what the million ranks leave out is an integral
            rest = eta * 3.0 * 1_000_000.5 ** (1 - a) / (a - 1)
            s = (active[active < 1].sum() + rest) / (np.minimum(active, 1).sum() + rest)
            gaps.append(abs(1 / (1 + s) - (a - 1 if broken else a) / (1 + a)))
    return Verdict(bool(max(gaps[1::2]) < 0.01), f"the slope misses a/(1+a) by at most {max(gaps[1::2]):.4f}")


def number_of_epochs(broken: bool = False) -> Verdict:
    """η̂ λ_1 B/(cn) against B λ_1 R²/(4e² c σ² N): bisection against the identity, and the bound without N."""
    worst, holds = 0.0, True
    for lam in _spectra():
        for sigma in (0.1, 1.0):
            for norm in (0.5, 2.0):
                stop = stopping.rademacher_rule(Spectrum(lam), sigma, norm)
                epochs = stop.eta * lam[0] / 0.5 * 16 / len(lam)
                ratio = 16 * lam[0] * norm**2 / (4 * E**2 * 0.5 * sigma**2)
                count = np.minimum(stop.eta * lam, 1).sum()
                worst = max(worst, abs(epochs * count / ratio - 1))
                if stop.eta * lam[0] >= 1:
                    holds &= epochs <= ratio / (count if not broken else 10 * count) * (1 + 1e-9)
    return Verdict(bool(holds and worst < 1e-9), f"the identity holds to {worst:.1e}")


def mini_batches(broken: bool = False) -> Verdict:
    """Independent batches: mean of 4000 runs against full descent, and the mean square deviation against its bound."""
    rng = np.random.default_rng(0)
    n, size, runs, steps = 20, 4, 4000, 30
    phi = rng.standard_normal((n + 1, 30)) / 5
    kernel, y = phi @ phi.T, rng.standard_normal(n)
    b = kernel.diagonal()[:n].max()
    step = 0.5 / b
    # all runs at once; the last entry is a new text
    f, full = np.zeros((runs, n + 1)), np.zeros(n + 1)
    for _ in range(steps):
        chosen = rng.random((runs, n)).argsort(1) < size  # a uniform subset of `size` texts for each run
        f = f - step / size * ((f[:, :n] - y) * chosen) @ kernel[:n]
        full = full - step / n * (full[:n] - y) @ kernel[:n]
    deviation = ((f - full) ** 2).mean(0)
    scores = np.abs(f.mean(0) - full) / (f.std(0) / runs**0.5)
    bound = kernel.diagonal() * step * steps * step * b / size * (n - size) / (n - 1) * (y**2).mean()
    reach = float((deviation / bound).max())
    holds = scores.max() < 4.5 and reach < (0.02 if broken else 1)
    return Verdict(
        bool(holds),
        f"means within {scores.max():.1f} standard errors; deviation reaches {reach:.2f} of the bound",
    )


def norm_of_a_prior(broken: bool = False) -> Verdict:
    """R² = τ²N(η̂) in the rule gives η̂ = nτ²/(4e²σ²), 4e² before ridge's best time; and E‖Π_k g‖² = τ²k by simulation."""
    worst, holds, rng = 0.0, True, np.random.default_rng(1)
    for lam in _spectra():
        n, tau2, sigma = len(lam), 0.7, 0.4
        claimed = n * tau2 / ((2 if broken else 4) * E**2 * sigma**2)
        norm = np.sqrt(tau2 * np.minimum(claimed * lam, 1).sum())
        worst = max(worst, abs(stopping.rademacher_rule(Spectrum(lam), sigma, norm).eta / claimed - 1))
        # the best ridge penalty for the prior, among many: exact risk τ²λν²/(λ+ν)² + σ²/n λ²/(λ+ν)²
        factors = np.geomspace(0.2, 5, 201)
        nu = factors[:, None] * sigma**2 / (n * tau2)
        risk = ((tau2 * lam * nu**2 + sigma**2 / n * lam**2) / (lam + nu) ** 2).sum(1)
        holds &= abs(np.log(factors[np.argmin(risk)])) < 0.02
    lam = np.arange(1, 31) ** -1.5
    theta = np.sqrt(0.7 * lam) * rng.standard_normal((20_000, 30))
    norms = (theta[:, :8] ** 2 / lam[:8]).sum(1)
    holds &= abs(norms.mean() - 0.7 * 8) < 4 * norms.std() / 20_000**0.5
    return Verdict(
        bool(holds and worst < 1e-9), f"the rule stops there to {worst:.1e}; ridge is best at nτ²/σ²"
    )


def _two_class(n: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a kernel (n, n), labels ±1 and scores before training."""
    rng = np.random.default_rng(seed)
    phi = rng.standard_normal((n, 40)) * np.arange(1, 41) ** -0.7
    return phi @ phi.T, rng.choice([-1.0, 1.0], n), rng.standard_normal(n) / 3


def logistic_flow(broken: bool = False) -> Verdict:
    """The loss falls, and two paths with the same labels approach each other in the Hilbert norm."""
    kernel, y, start = _two_class()
    times = np.concatenate([[0.0], np.geomspace(0.01, 1e3, 40)])
    shifted = start + kernel @ np.random.default_rng(1).standard_normal(24) / 24
    first, second = (logistic_path(kernel, y, times, f0=f0) for f0 in (start, shifted))
    if broken:  # other labels: nothing keeps the paths together
        second = logistic_path(kernel, -y, times, f0=shifted)
    gap = first.fitted - second.fitted
    distance = (gap * np.linalg.solve(kernel, gap.T).T).sum(1)
    rises = float(np.diff(distance).max() / distance[0])
    holds = (np.diff(first.loss) < 0).all() and rises < 1e-6
    return Verdict(bool(holds), f"loss {first.loss[0]:.3f} to {first.loss[-1]:.3f}; largest rise {rises:.1e}")


def logistic_clock(broken: bool = False) -> Verdict:
    """‖f_η - φ_{η/4}‖_n <= max ‖f³‖_n/48 · G(η): the solver against the closed form, at many times and scales."""
    kernel, y, start = _two_class()
    reach, holds = 0.0, True
    for scale in (0.01, 1.0):
        top = np.linalg.eigvalsh(scale * kernel / 24)[-1]
        times = np.concatenate([[0.0], np.geomspace(0.01, 300, 50) / top])
        path = logistic_path(scale * kernel, y, times, f0=start)
        square = descend(scale * kernel, 2 * y, start).fitted(times if broken else times / 4)
        cubes = np.maximum.accumulate(np.sqrt((path.fitted**6).mean(1))) / 48
        u = top * times
        growth = np.where(u <= 4 / E, u, 4 / E * (1 + np.log(np.maximum(E * u / 4, 1))))
        gap = np.sqrt(((path.fitted - square) ** 2).mean(1))
        holds &= bool((gap <= cubes * growth + 1e-6).all())
        reach = max(reach, float((gap[1:] / (cubes * growth)[1:]).max()))
    u = np.linspace(-30, 30, 100_001)
    holds &= bool((np.abs(expit(u) - 0.5 - u / 4) <= np.abs(u) ** 3 / 48 + 1e-15).all())
    return Verdict(holds, f"the gap reaches {reach:.2f} of the bound")


def two_class_rule(broken: bool = False) -> Verdict:
    """Coin-flip labels with known p: the mean error of the linearised flow at 4η̂(2, R) is below 0.22 R²/η̂."""
    rng = np.random.default_rng(2)
    kernel, _, _ = _two_class(40)
    path = descend(kernel, np.zeros(40))
    spread = (path.vectors * path.eigenvalues) @ path.vectors.T @ rng.standard_normal(40)
    target = 2 * np.tanh(spread / np.abs(spread).max())
    p = (1 + target / 2) / 2
    norm = path.hilbert_norm(target)
    stop = stopping.rademacher_rule(path.spectrum, 2.0, norm)
    labels = 2 * np.where(rng.random((4000, 40)) < p, 1.0, -1.0)
    share = (path.vectors * path.filter(stop.eta)) @ path.vectors.T
    errors = ((labels @ share - target) ** 2).mean(1)
    bound = (1 / (2 * E) + 1 / (4 * E**2)) * norm**2 / stop.eta
    variance = float(labels.var(0).max())
    holds = errors.mean() <= bound * (0.05 if broken else 1) and variance <= 4 + 1e-12
    return Verdict(
        bool(holds), f"mean error {errors.mean():.3f}, bound {bound:.3f}, noise at most {variance:.2f}"
    )


def separable(broken: bool = False) -> Verdict:
    """Bounds on loss and norm along a path that never ends, and the margins that the loss forces."""
    kernel, y, start = _two_class(12)
    n = len(y)
    times = np.geomspace(1, 1e5, 40)
    path = logistic_path(kernel, y, np.concatenate([[0.0], times]), f0=start)
    size2 = float(y @ np.linalg.solve(kernel, y))  # yᵀK⁻¹y/n with K = kernel/n
    before = float(np.exp(-y * start).mean())
    loss, moved = path.loss[1:], path.fitted[1:] - start
    norm = np.sqrt((moved * np.linalg.solve(kernel, moved.T).T).sum(1))
    low = (before + size2 * np.log(times) ** 2 / 2) / times * (0.01 if broken else 1)
    high = 2 * np.sqrt(size2) * np.log(times) + np.sqrt(2 * before)
    margins = (path.fitted[1:] * y).min(1)
    forced = -np.log(np.expm1(n * loss))
    holds = (loss <= low).all() and (norm <= high).all() and (margins >= forced - 1e-9).all()
    return Verdict(
        bool(holds), f"loss {loss[-1]:.1e} (bound {low[-1]:.1e}), norm {norm[-1]:.2f} (bound {high[-1]:.2f})"
    )


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
        "thm-lp-raters",
        CHAPTER,
        "Dividing σ² by m lengthens training by a factor between √m and m, with slope 1/(1+s).",
        "numeric",
        better_raters,
    ),
    Claim(
        "cor-lp-power",
        CHAPTER,
        "For λ_j = A j^(-a) the tail's share goes to 1/a and the slope to a/(1+a).",
        "numeric",
        power_law_slope,
    ),
    Claim(
        "prop-lp-epochs",
        CHAPTER,
        "The rule stops after B λ_1 R²/(4e² c σ² N) epochs.",
        "numeric",
        number_of_epochs,
    ),
    Claim(
        "prop-lp-batches",
        CHAPTER,
        "Independent batches have full descent as their mean path, and a mean square deviation of order ε.",
        "numeric",
        mini_batches,
    ),
    Claim(
        "prop-lp-prior",
        CHAPTER,
        "With the norm of a typical target the rule stops 4e² times before ridge's best.",
        "numeric",
        norm_of_a_prior,
    ),
    Claim(
        "lem-lp-flow",
        CHAPTER,
        "The logistic flow lowers the loss and brings two paths with the same labels closer.",
        "numeric",
        logistic_flow,
    ),
    Claim(
        "lem-lp-clock",
        CHAPTER,
        "The logistic flow is the square-loss flow towards 2y at a quarter of the time, up to max ‖f³‖/48 times G(λ_1 η).",
        "numeric",
        logistic_clock,
    ),
    Claim(
        "prop-lp-two-class",
        CHAPTER,
        "At 4η̂(2, R) the linearised logistic flow has expected error below 0.22 R²/η̂, whatever the noise of two-class labels.",
        "numeric",
        two_class_rule,
    ),
    Claim(
        "prop-lp-separable",
        CHAPTER,
        "On separable data the loss falls at least like log²η/η and the norm grows at most like log η.",
        "numeric",
        separable,
    ),
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
        "On SmolLM2 the Rademacher rule costs at most 2 % in 11 of 12 cases, and always less than hold-out; so do three epochs.",
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
