"""Checks of the chapter "The spectra of language models"."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from ntkft import stopping
from ntkft.checks import Claim, Verdict, full_result
from ntkft.descent import descend
from ntkft.experiments.llm_spectra import NOISES, slope
from ntkft.experiments.result import Result
from ntkft.ntk.kernel import centred
from ntkft.spectrum import Spectrum

E = np.e


def _problems(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Eigenvalues and powers θ_j²: laws, equal eigenvalues, and targets in the head, in the tail, anywhere."""
    rng, j = np.random.default_rng(seed), np.arange(1, 61, dtype=np.float64)
    for eigenvalues in (j**-0.8, j**-2.0, np.exp(-0.3 * j), np.ones(60), np.where(j == 1, 50.0, 0.1 / j)):
        for power in (j**-1.3, np.where(j > 30, 1.0, 0.0), rng.exponential(size=60), np.ones(60)):
            yield eigenvalues, power


def head_bound(broken: bool = False) -> Verdict:
    """bias² (by `Descent.bias2`) <= e^{-2ηλ_k} head + tail; random directions have mean share k/n in the first k vectors."""
    holds, tightest = True, 0.0
    for lam, power in _problems(0):
        target = np.sqrt(len(lam) * power)
        path = descend(len(lam) * np.diag(lam), np.zeros(len(lam)))
        head = np.cumsum(power)
        for eta in np.geomspace(0.1, 100, 12):
            bias = float(path.bias2(eta, target))
            bound = np.exp((-4 if broken else -2) * eta * lam) * head + power.sum() - head
            holds &= bool((bias <= bound * (1 + 1e-9) + 1e-12).all())
            tightest = max(tightest, float((bias / np.maximum(bound, 1e-6)).max()))
    rng = np.random.default_rng(1)
    basis, directions = np.linalg.qr(rng.standard_normal((30, 30)))[0], rng.standard_normal((20_000, 30))
    parts = (directions @ basis) ** 2 / (directions**2).sum(1)[:, None]
    gap = float(np.abs(np.cumsum(parts.mean(0)) - np.arange(1, 31) / 30).max())
    return Verdict(
        bool(holds and gap < 0.005), f"bias/bound at most {tightest:.3f}; mean share off k/n by {gap:.4f}"
    )


def best_cut(broken: bool = False) -> Verdict:
    """Flow, descent and ridge at every time: risk >= ½ min_k (power beyond k + σ²k/n)."""
    least, sharp = np.inf, 0.6 if broken else 0.5
    for lam, power in _problems(2):
        tail = np.r_[power.sum(), power.sum() - np.cumsum(power)]
        for variance in (0.003, 0.1, 1.0, 20.0):
            cut = float((tail + variance * np.arange(len(tail))).min())
            for eta in np.geomspace(1e-3, 1e4, 60):
                steps = np.floor(eta * lam[0])
                filters = (
                    -np.expm1(-eta * lam),
                    eta * lam / (1 + eta * lam),
                    1 - (1 - lam / lam[0]) ** steps,
                )
                for share in filters:
                    risk = float(((1 - share) ** 2 * power + variance * share**2).sum())
                    least = min(least, risk / cut)
    return Verdict(least >= sharp - 1e-9, f"the least risk is {least:.3f} of the best cut")


def _law(n: int, a: float, s: float, low: float, high: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and powers that obey the two laws with constants low and high, otherwise rough."""
    rng, j = np.random.default_rng(seed), np.arange(1, n + 1, dtype=np.float64)
    eigenvalues = np.sort(np.exp(rng.uniform(np.log(low), np.log(high), n)) * j**-a)[::-1]
    tail = high * np.r_[1.0, j[:-1] ** -s, 0.0]  # τ_0, ..., τ_n
    return eigenvalues, -np.diff(tail)


def two_exponents(broken: bool = False) -> Verdict:
    """At η = x^a: both constants of the lemma for bias and variance, exact sums against closed forms."""
    holds, widest = True, 0.0
    for a, s in ((0.8, 0.2), (1.5, 0.5), (2.0, 1.5), (1.2, 3.0)):
        for low, high in ((1.0, 1.0), (0.5, 2.0)):
            n = 4000
            lam, power = _law(n, a, s, low, high)
            i = np.arange(60)
            blocks = 2.0 ** ((i + 1) * s) * np.exp(-2 * low * 2.0 ** np.minimum(i * a, 60))
            upper_b = 2**s * high * (1 + blocks.sum())
            lower_b = (1 if broken else E**-2) * low * high ** (-s / a)
            upper_v, lower_v = 1 + 2 * a * high**2 / (2 * a - 1), (1 - np.exp(-low)) ** 2 / 2
            for x in np.geomspace(1, n / (2 * high ** (1 / a)), 20):
                left = np.exp(-(x**a) * lam)
                bias, variance = float(left**2 @ power) * x**s, float(((1 - left) ** 2).sum()) / x
                holds &= lower_b <= bias * (1 + 1e-9) <= upper_b * (1 + 2e-9)
                holds &= lower_v <= variance <= upper_v
                widest = max(widest, upper_b / bias, upper_v / variance)
    return Verdict(bool(holds), f"upper constants are at most {widest:.1f} times the exact sums")


def learning_curve(broken: bool = False) -> Verdict:
    """Oracle and rule, exact sums: both between their constants; slopes of the oracle, and of the rule where bias rules it."""
    holds, gap, told = True, 0.0, []
    for a, s in ((2.0, 0.5), (1.5, 1.0), (1.5, 3.0)):
        sizes, oracle, rule = np.array([1_250, 5_000, 20_000]), [], []
        i = np.arange(60)
        blocks = 2.0 ** ((i + 1) * s) * np.exp(-2 * 2.0 ** np.minimum(i * a, 60))
        upper_b, upper_v = 2**s * (1 + blocks.sum()), 1 + 2 * a / (2 * a - 1)
        lower_b, lower_v = E**-2, (1 - 1 / E) ** 2 / 2
        for n in sizes:
            lam, power = _law(n, a, s, 1.0, 1.0)
            eta = np.geomspace(0.1, float(n) ** a, 100)
            left = np.exp(-eta[:, None] * lam)
            oracle.append(float((left**2 @ power + ((1 - left) ** 2).sum(1) / n).min()))
            left = np.exp(-stopping.rademacher_rule(Spectrum(lam), 1.0).eta * lam)
            rule.append(float(left**2 @ power + ((1 - left) ** 2).sum() / n))
            rho = 4 * E**2 / n
            late, early = (rho / 2) ** (-1 / (a + 1)), (a / (a - 1) * rho) ** (-1 / (a + 1))
            holds &= (
                lower_b * late**-s + lower_v * early / n
                <= rule[-1]
                <= upper_b * early**-s + upper_v * late / n
            )
        exponent = a / (a + 1) if broken else s / (s + 1)
        ratios = np.array(oracle) * sizes**exponent
        holds &= bool((ratios >= 0.5).all() and (ratios <= upper_b + upper_v).all())
        slopes = [-float(np.polyfit(np.log(sizes), np.log(e), 1)[0]) for e in (oracle, rule)]
        gap = max(gap, abs(slopes[0] - exponent), abs(slopes[1] - s / (a + 1)) if s < a else 0.0)
        told.append(f"{slopes[0]:.2f}/{slopes[1]:.2f}")
    return Verdict(
        bool(holds and gap < 0.06), f"slopes oracle/rule {', '.join(told)}, off by at most {gap:.3f}"
    )


def subsample(broken: bool = False) -> Verdict:
    """All subsets of a small sample: mean of the k largest sums, of Σ min(λ, u), of effective dimensions, centred and not."""
    rng, holds, least = np.random.default_rng(0), True, np.inf
    for n, m in ((8, 3), (7, 5), (9, 4)):
        phi = rng.standard_normal((n, 6)) + 1.5 * rng.standard_normal(6)
        gram = phi @ phi.T
        for centre, factor in ((False, 1.0), (True, (1 if broken else (1 - 1 / m) / (1 - 1 / n)))):
            sums, whole = [], np.zeros(n)
            for rows in combinations(range(n), m):
                block = gram[np.ix_(rows, rows)]
                values = np.linalg.eigvalsh(centred(block) if centre else block)[::-1] / m
                sums.append(np.r_[values, np.zeros(n - m)])
            whole = np.linalg.eigvalsh(centred(gram) if centre else gram)[::-1] / n
            mean = np.cumsum(sums, axis=1).mean(0)
            holds &= bool((mean >= factor * np.cumsum(whole) - 1e-9).all()) and np.isclose(
                mean[-1], factor * whole.sum()
            )
            least = min(least, float((mean[: m - 1] / np.cumsum(whole)[: m - 1] / factor).min()))
            for u in (0.1, 1.0, 5.0):
                holds &= (
                    np.minimum(sums, u).sum(1).mean() <= factor * np.minimum(whole, u / factor).sum() + 1e-9
                )
                shares = [(v / (u + v)).sum() for v in sums]
                holds &= np.mean(shares) <= (factor * whole / (u + factor * whole)).sum() + 1e-9
    return Verdict(bool(holds), f"mean sums of small samples are at least {least:.3f} of those of all texts")


def _drawn(result: Result) -> list[str]:
    """Names of the kernels that have a learning curve."""
    return [key.removesuffix("_draws") for key in result.arrays if key.endswith("_draws")]


def _column(result: Result, name: str, stat: str) -> np.ndarray:
    """One quantity of all draws of a kernel, (draws, sizes)."""
    return result.arrays[f"{name}_draws"][:, :, result.values["stats"].index(stat)]


def decay_laws(broken: bool = False) -> Verdict:
    """Scores of the four laws on held-out halves against the floor, and the exponents, on all stored kernels."""
    values = full_result(CHAPTER).values
    found = [values[name] for name in values["kernels"]]
    laws = ("polynomial", "stretched", "broken")
    ratio = max(min(v[f"score_{law}"] for law in laws) / v["floor"] for v in found)
    told = [values[name] for name in values["kernels"] if not name.startswith("smollm2random")]
    worst = min(v["score_exponential"] / max(v[f"score_{law}"] for law in laws) for v in told)
    large = {name: values[name] for name in values["kernels"] if values[name]["n"] == 1024}
    straight = [name for name in large if name.startswith("smollm2")]
    pure = {name: v["score_polynomial"] / v["floor"] for name, v in large.items()}
    bent, level = min(pure[name] for name in large if name not in straight), max(pure[name] for name in straight)
    exponents = [v["polynomial_exponent"] for v in found]
    holds = (
        ratio < (0.5 if broken else 1.15)
        and worst > 1
        and bent > 1.5
        and level < 1
        and min(large[name]["polynomial_exponent"] for name in straight) > 0.9
        and 0.35 < min(exponents) <= max(exponents) < 1.05
    )
    return Verdict(
        bool(holds),
        f"best law at most {ratio:.2f} of the floor, exponential at least {worst:.1f} of the next; power law at n = 1024: "
        f"MiniLM at least {bent:.2f}, SmolLM2 at most {level:.2f}; exponents {min(exponents):.2f} to {max(exponents):.2f}",
    )


def slow_clock(broken: bool = False) -> Verdict:
    """Growth of the rule's time with n, refitted from the draws."""
    result = full_result(CHAPTER)
    growth = {
        name: slope(result.arrays[f"{name}_sizes"], _column(result, name, "eta_rule"))[0]
        for name in _drawn(result)
    }
    encoder = [b for name, b in growth.items() if name.startswith("minilm")]
    prompted = [b for name, b in growth.items() if name.startswith("smollm2")]
    low, high = (0.7, 0.8) if broken else (0.45, 0.55)
    holds = low < min(encoder) <= max(encoder) < high and max(prompted) < 0.35
    return Verdict(bool(holds), ", ".join(f"{name} {b:.2f}" for name, b in growth.items()))


def flat_in_sample(broken: bool = False) -> Verdict:
    """Slope of the best in-sample error, with interval, against the three forecasts."""
    result, holds, told = full_result(CHAPTER), True, []
    for name in _drawn(result):
        v, sizes = result.values[name], result.arrays[f"{name}_sizes"]
        middle, low, _ = slope(sizes, _column(result, name, "sample"))
        exact = float(
            np.polyfit(np.log(sizes), np.log(result.arrays[f"{name}_foretold"][0][: len(sizes)]), 1)[0]
        )
        a, s = v["polynomial_exponent"], v["s"]
        forecasts = (-a / (a + 1), -s / (s + 1), exact)
        holds &= (-0.4 < middle < -0.2) if broken else -0.15 < middle < 0.1
        holds &= max(forecasts) < low
        told.append(f"{name} {middle:.2f} (from {low:.2f}) against {max(forecasts):.2f}")
    return Verdict(bool(holds), "; ".join(told))


def noise_brings_the_curves_together(broken: bool = False) -> Verdict:
    """Slopes of the closed-form risk of subsets against those of the large kernel, at 1 and at 64 times the noise."""
    result, near, far = full_result(CHAPTER), 0.0, np.inf
    for name in _drawn(result):
        sizes, told = result.arrays[f"{name}_sizes"], result.arrays[f"{name}_foretold"]
        gaps = []
        for factor in (NOISES[0], NOISES[-1]):
            own = slope(sizes, _column(result, name, f"expected_{factor}"))[0]
            line = np.log(told[NOISES.index(factor)][: len(sizes)])
            gaps.append(abs(own - float(np.polyfit(np.log(sizes), line, 1)[0])))
        near, far = max(near, gaps[1]), min(far, gaps[0])
    near = far if broken else near
    return Verdict(
        bool(near < 0.05 and far > 0.1),
        f"slopes apart by at most {near:.3f} at 64 σ², at least {far:.3f} at σ²",
    )


def test_error_foretold(broken: bool = False) -> Verdict:
    """The extrapolated deterministic equivalent against the mean measured test error, every kernel and n <= N/4."""
    result, worst = full_result(CHAPTER), 0.0
    for name in _drawn(result):
        limit = result.arrays[f"{name}_off" if broken else f"{name}_off_limit"]
        limit = limit if broken else limit.mean(0)
        measured = _column(result, name, "test").mean(0)[: len(limit)]
        worst = max(worst, float(np.abs(limit / measured - 1).max()))
    return Verdict(worst < 0.1, f"at most {100 * worst:.1f} % off")


CHAPTER = "llm_spectra"
CLAIMS = (
    Claim(
        "lem-ls-head",
        CHAPTER,
        "Squared bias is at most e^{-2ηλ_k} times the head power plus the tail power; a random direction has E C(k) = k/n.",
        "numeric",
        head_bound,
    ),
    Claim(
        "prop-ls-cut",
        CHAPTER,
        "Filters with shares that fall along the spectrum have risk at least half of the best cut, min_k (τ_k + σ²k/n).",
        "numeric",
        best_cut,
    ),
    Claim(
        "lem-ls-two-exponents",
        CHAPTER,
        "If λ_j ≍ j^-a and τ_k ≍ k^-s, flow at η = x^a has squared bias ≍ x^-s and variance ≍ σ²x/n, with explicit constants.",
        "numeric",
        two_exponents,
    ),
    Claim(
        "thm-ls-curve",
        CHAPTER,
        "The oracle's risk has the exponent s/(s+1), that of the Rademacher rule with fixed R has min(a, s)/(a+1).",
        "numeric",
        learning_curve,
    ),
    Claim(
        "lem-ls-subsample",
        CHAPTER,
        "Small random subsets overstate the head of the spectrum and understate R̂ and effective dimension, in the mean.",
        "numeric",
        subsample,
    ),
    Claim(
        "obs-ls-decay",
        CHAPTER,
        "Held-out spectra refute the exponential law (SmolLM2's twin excepted); at n = 1024 MiniLM's refute the power law "
        "and SmolLM2's follow it.",
        "stored",
        decay_laws,
    ),
    Claim(
        "obs-ls-clock",
        CHAPTER,
        "The rule's time grows like √n on MiniLM's kernels and hardly at all on SmolLM2's.",
        "stored",
        slow_clock,
    ),
    Claim(
        "obs-ls-flat",
        CHAPTER,
        "The best error on the training texts hardly depends on n, and all three forecasts lie below its interval.",
        "stored",
        flat_in_sample,
    ),
    Claim(
        "obs-ls-noise",
        CHAPTER,
        "At 64 times the noise the slopes foretold from the large kernel and those of subsets agree to 0.05.",
        "stored",
        noise_brings_the_curves_together,
    ),
    Claim(
        "obs-ls-foretold",
        CHAPTER,
        "The test error at the best time is foretold within 10 % from a larger kernel, without training.",
        "stored",
        test_error_foretold,
    ),
)
