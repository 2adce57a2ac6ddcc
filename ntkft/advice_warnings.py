"""What looks wrong with an advice, in plain sentences with a remedy each.

Source: the book's pages "Stopping on your own data" and "When the kernel drifts".

Example
-------
>>> short_number(12.34), short_number(0.1234)
('12.3', '0.12')
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ntkft.advice_path import WholePath
from ntkft.tasks import Task

if TYPE_CHECKING:  # the advice imports this module
    from ntkft.advice import Advice

__all__ = ["advice_warnings", "short_number"]

MOVES = 0.2  # a relative change from which the first kernel's clock is not trusted
TWIN = (
    "If you can train twice, ntkft.train_with_twin stops where the estimated risk is least: in the book's real runs of MiniLM it"
    " stopped best."
)


def advice_warnings(advice: Advice, task: Task, path: WholePath, raw: float, centre: float) -> list[str]:
    """Return what looks wrong, in plain sentences with a remedy each."""
    found: list[str] = []
    y, sgd = task.y, advice.optimizer == "sgd"
    spread, values = float(y.std()), np.unique(y)
    if len(values) == 1:
        found.append(f"All labels are {values[0]:g}: there is nothing to learn but a constant.")
    elif len(values) == 2:
        found.append(
            "The labels have two values and the advice is for squared loss on them. With cross-entropy the first steps are"
            " those of squared loss (half-mse) towards 2y with a quarter of the step, for y = ±1: plan four times the time."
        )
    if advice.sigma_from == "estimated":
        free = max(advice.used - float(path.degrees_of_freedom(advice.rules["gcv"]["eta"])), 1)
        found.append(
            f"σ is unknown and was estimated from the training error (±{100 / np.sqrt(2 * free):.0f}\u00a0% by chance alone, and"
            " too high where the model cannot yet explain the labels): label some texts twice and give σ."
        )
    if advice.sigma > spread > 0:
        found.append(
            f"σ = {advice.sigma:.3g} is larger than the labels' own standard deviation {spread:.3g}: check its unit; it is"
            " a standard deviation, no variance."
        )
    if float(path.residual(0.0)) <= advice.sigma**2 and len(values) > 1:
        found.append("The model fits the labels to within σ before training: there is little to gain.")
    if sgd and advice.step_size >= advice.largest_step:
        what = " (unless each batch is centred)" if advice.step_size < advice.largest_step_centred else ""
        found.append(
            f"The learning rate {advice.step_size:.3g} is beyond {advice.largest_step:.3g} and descent diverges{what}: lower it."
        )
    elif sgd and advice.step_size >= advice.largest_step / 2:
        found.append(
            f"The learning rate {advice.step_size:.3g} is above {advice.largest_step / 2:.3g} and the strongest direction swings:"
            f" {advice.largest_step / 4:.3g} is comfortable."
        )
    if sgd and raw > 3 * centre and advice.largest_step < advice.largest_step_centred:
        found.append(
            f"The constant direction limits the step (λ_1 = {raw:.3g}, without it {centre:.3g}): centring f and y in each batch"
            f" allows steps {raw / centre:.0f} times as large, and as many fewer epochs (--centred-batches)."
        )
    if sgd and advice.epochs < 1:
        found.append(
            f"The stop is after {short_number(advice.epochs)} epochs and not all texts are seen: take a smaller learning rate."
        )
    elif sgd and advice.epochs > 20:
        found.append(
            f"The stop is after {short_number(advice.epochs)} epochs: "
            + (
                f"the learning rate is small, up to {advice.largest_step / 4:.3g} is comfortable."
                if advice.step_size < advice.largest_step / 8
                else "that is long; check that σ is not too small."
            )
        )
    times = np.array([row["eta"] for row in advice.rules.values()])
    if times.max() > 4 * times.min():
        low, high = times.min(), times.max()
        found.append(
            f"The rules disagree ({low:.3g} to {high:.3g}): R = {advice.norm:g} or σ is unsure. Look at the figure: where the"
            " estimated risk is flat, the choice matters little."
        )
    real = path.eigenvalues[path.eigenvalues > 1e-9 * path.eigenvalues[0]]
    clock = 1 / max(float(advice.rules["rademacher"]["eta"]), 1e-300)
    if real[-1] >= clock and len(real) >= len(path.eigenvalues) - 1:
        found.append(
            "All eigenvalues are above 1/η of the Rademacher rule: it sees σ, R and the number of texts, and not the kernel."
        )
    elif real[0] < clock:
        found.append(
            "The Rademacher rule stops before the strongest direction is learned: R is small, or σ large, for this kernel."
        )
    if not sgd:
        found.append("With AdamW stop by the training error (KernelStoppingCallback, rule 'discrepancy' or 'clock').")
    moves = advice.drift is not None and _change(advice.drift) > MOVES
    return found + _drift_words(advice) + ([TWIN] if moves or not sgd else [])


def _change(drift: Mapping[str, float]) -> float:
    return max(abs(drift["lambda_1"]), abs(drift["trace"]))


def _drift_words(advice: Advice) -> list[str]:
    if advice.drift is None:
        return []
    d = advice.drift
    measured = (
        f"After kernel time {d['eta']:.3g} of {advice.eta:.3g} on {d['texts']:.0f} texts, λ_1 has changed by"
        f" {100 * d['lambda_1']:+.0f}\u00a0% and the trace by {100 * d['trace']:+.0f}\u00a0%"
    )
    if _change(d) <= MOVES:
        return [f"{measured}: the kernel hardly moves, and the clock can be trusted."]
    pace = "faster" if d["trace"] > 0 else "slower"
    return [
        f"{measured}: the kernel moves, and the network learns {pace} than its first kernel says. Stop by the training error"
        f" (about {advice.stop_error:.3g}; KernelStoppingCallback, rule 'discrepancy' or 'clock') and not by the epochs."
    ]


def short_number(value: float) -> str:
    """Return a number of epochs as people write it."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"
