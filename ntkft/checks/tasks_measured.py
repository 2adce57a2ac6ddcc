"""Checks of what was measured on real fine-tunings in the chapters "Task vectors" and "Many tasks"."""

from __future__ import annotations

import numpy as np

from ntkft.checks import Claim, Verdict, full_result

ARITHMETIC, MANY = "task_vectors", "many_tasks"
KINDS = ("early", "over", "tangent")


def foretold_changes(broken: bool = False) -> Verdict:
    """Correlation of foretold and measured change on a vector's own task and on others; relative errors in its place fail."""
    one = full_result(ARITHMETIC).arrays["minilm_single"][:, :, :7, :, 1 if broken else 0]
    own = np.eye(7, dtype=bool)
    home, abroad = one[..., own].mean(-1), one[..., ~own].mean(-1)  # seeds, kinds
    means = home.mean(0)
    holds = home.min() > 0.75 and abroad.min() > 0.6 and means[0] > means[1] and (home > abroad).all()
    others = abroad.mean(0).round(2).tolist()
    return Verdict(bool(holds), f"own {means.round(2).tolist()}, others {others}, least {home.min():.2f}, {abroad.min():.2f}")


def short_sums_add_up(broken: bool = False) -> Verdict:
    """Sums of four domains: what vectors do alone adds up at small scales, less at larger ones; the scales reversed fail."""
    result = full_result(ARITHMETIC)
    scales = np.array(result.values["scales"])
    found = result.arrays["minilm_sum"][:, :, 0, :, :4, :, 0].mean((0, 3))  # kinds, scales, (kernel, single vectors)
    if broken:
        found = found[:, ::-1]
    small, large = found[:, scales == 0.3][:, 0], found[:, scales == 1.0][:, 0]
    holds = (small[:2, 1] > 0.9).all() and (small > large).all()
    return Verdict(bool(holds), f"kernel, single vectors: c = 0.3 {small.round(2).tolist()}, c = 1 {large.round(2).tolist()}")


def parabola_of_negation(broken: bool = False) -> Verdict:
    """Refuted: the loss along negated vectors follows the parabola. The check finds it far below; at c = 1/2 it does not."""
    result = full_result(ARITHMETIC)
    at = result.arrays["line_scales"] == (0.5 if broken else -1.0)
    told, found = (result.arrays["minilm_line"][:, :, k, :, 0][..., at][..., 0].mean(-1) for k in (0, 1))  # seeds, kinds
    ratio = (found / told)[:, :2]
    return Verdict(bool(ratio.max() < 0.65), f"found/told at most {ratio.max():.2f}, mean {ratio.mean(0).round(2).tolist()}")


def smollm2_is_near_its_tangent(broken: bool = False) -> Verdict:
    """SmolLM2, one seed: correlations, and negated early vectors against the parabola; over-trained ones in their place fail."""
    result = full_result(ARITHMETIC)
    one, own = result.arrays["smollm2_single"][0, ..., 0], np.eye(4, dtype=bool)
    least = min(one[:, own].mean(1).min(), one[:, ~own].mean(1).min())
    at = result.arrays["line_scales"] == -1.0
    told, found = result.arrays["smollm2_line"][0, 1 if broken else 0, :, :, 0][..., at].mean((1, 2))
    holds = least > 0.75 and found / told > 0.8
    return Verdict(bool(holds), f"least correlation {least:.2f}; at c = -1 {found:.2f}, foretold {told:.2f}")


def analogies_help(broken: bool = False) -> Verdict:
    """Refuted: an analogy through lengths beats the other domain's rating vector. The domain's own vector does."""
    analogy = full_result(ARITHMETIC).arrays["minilm_analogy"].mean((0, 2))  # kinds, (analogy, source, own, both told)
    gain = analogy[:, 1] - analogy[:, 2 if broken else 0]
    return Verdict(bool((gain < 0.005).all()), f"loss less by {gain.round(3).tolist()}")


def cost_of_a_neighbour(broken: bool = False) -> Verdict:
    """Rank correlation of foretold and measured cost; the overlap of the gradients in its place fails."""
    values = full_result(MANY).values
    told = [values[f"minilm_{kind}_rank_{'overlap' if broken else 'told'}"] for kind in KINDS]
    other = [values[f"minilm_{kind}_rank_overlap"][0] for kind in KINDS]
    holds = all(low > 0 and value > rival for (value, low, _), rival in zip(told, other, strict=True))
    texts = [f"{kind} {value:.2f} [{low:.2f}, {high:.2f}]" for kind, (value, low, high) in zip(KINDS, told, strict=True)]
    return Verdict(bool(holds), ", ".join(texts))


def who_composes(broken: bool = False) -> Verdict:
    """Sums of four domains: at c = 1 only the tangent's help, before that over-trained ones lose most; kinds reversed fail."""
    result = full_result(MANY)
    scales = np.array(result.values["scales"])
    loss = result.arrays["minilm_sum"][:, :, 0, :, :4].mean(-1)  # seeds, kinds, scales
    if broken:
        loss = loss[:, ::-1]
    early, over, tangent = np.moveaxis(loss, 1, 0)
    middle = np.isin(scales, (0.5, 0.7))
    whole = loss[:, :, -1].mean(0)
    holds = tangent[:, -1].max() < 1 < min(early[:, -1].min(), over[:, -1].min()) and (over > early)[:, middle].all()
    gap = (over - early)[:, middle].min()
    return Verdict(bool(holds), f"at c = 1 {whole.round(2).tolist()}; over-trained lose more by {gap:.2f} at least before")


CLAIMS = (
    Claim(
        "obs-tv-foretold",
        ARITHMETIC,
        "What a real task vector does to held-out scores is foretold by the kernel before training.",
        "stored",
        foretold_changes,
    ),
    Claim(
        "obs-tv-sums",
        ARITHMETIC,
        "Small multiples of real vectors add up; at scale one they do so less.",
        "stored",
        short_sums_add_up,
    ),
    Claim(
        "obs-tv-negation",
        ARITHMETIC,
        "The loss along a negated real vector of MiniLM follows the parabola of the tangent.",
        "stored",
        parabola_of_negation,
        refuted=True,
    ),
    Claim(
        "obs-tv-smollm2",
        ARITHMETIC,
        "SmolLM2's vectors do what the kernel foretold, negated early ones included.",
        "stored",
        smollm2_is_near_its_tangent,
    ),
    Claim(
        "obs-tv-analogy",
        ARITHMETIC,
        "An analogy through the lengths of texts is better than the other domain's rating vector as it is.",
        "stored",
        analogies_help,
        refuted=True,
    ),
    Claim(
        "obs-mt-pairs",
        MANY,
        "The kernel foretells which task vectors disturb each other, better than the overlap of gradients.",
        "stored",
        cost_of_a_neighbour,
    ),
    Claim(
        "obs-mt-compose",
        MANY,
        "Only the tangent's vectors can be added with weight one; over-trained ones compose worse than early-stopped ones.",
        "stored",
        who_composes,
    ),
)
