r"""How long to fine-tune on these texts and labels: the book's rules together, in steps and epochs, with plain warnings.

Two conversions stand between a rule and a training script. The loss: one step of size ε on the book's
:math:`\frac{1}{2n}\sum_i(f(x_i)-y_i)^2` moves kernel time by ε, and torch's ``MSELoss`` is twice that loss, so a learning
rate counts double. And the sample: the kernel may be that of m of the n texts. Its eigenvalues are nearly those of all texts,
but the noise is averaged over n. With :math:`s_j` the filter and :math:`q = \frac1m\sum_j(1-s_j)^2`, the training error on n
texts is in expectation

.. math:: \|y-f_\eta\|_m^2 + \sigma^2 (1-\tfrac mn)(1-q),

if bias and filter are the same on n texts as on m. The rules read that path, with df/n in the place of df/m. Source: the
book's pages "When to stop" and "Stopping on your own data".

Example
-------
>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> task = Task("toy", [f"text {i}" for i in range(40)], y := rng.standard_normal(40), y)
>>> advice = stopping_advice(None, task, sigma=0.5, kernel=Kernel(np.diag(1.0 + np.arange(40.0)), np.zeros(40)))
>>> advice.rule, advice.steps == int(advice.eta / (2 * advice.step_size))
('discrepancy', True)
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ntkft.descent import Descent, descend
from ntkft.errors import InputError
from ntkft.files import atomic_path, sha256_text
from ntkft.finetune import preserved_weights, train
from ntkft.monitor import twin_risk
from ntkft.ntk import Kernel, empirical_ntk
from ntkft.readout import Readout
from ntkft.spectrum import Spectrum, require_positive
from ntkft.stopping import StoppingTime, discrepancy_rule, gcv_rule, rademacher_rule, sure_rule, time_grid
from ntkft.tasks import Task

__all__ = ["LOSSES", "RULES", "Advice", "drift_probe", "stopping_advice"]

LOSSES = {"mse": 2.0, "half-mse": 1.0}  # kernel time of one step of learning rate 1
RULES = ("rademacher", "sure", "gcv", "discrepancy")
PLOTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Advice:
    """When to stop, why, and what may be wrong with it. `print` shows it.

    Attributes
    ----------
    rule, eta, steps, epochs : the answer
        Name of the rule that is followed; its kernel time; steps and passes over all n texts.
    rules : dict of dict
        "eta", "steps" and "epochs" of each of `RULES`.
    stop_error : float
        Training error (mean of squares) at `eta`: the stop of an optimiser that has no kernel time.
    step_size, suggested : float, bool
        Learning rate on `loss`; whether it is the suggested one, a quarter of `largest_step`.
    largest_step, largest_step_centred : float
        Learning rates from which descent diverges: 2/λ_1 of the kernel, and of the centred kernel, over the factor of the loss.
    sigma, sigma_from : float, str
        Noise level, and "given", "measured from single ratings" or "estimated".
    norm, loss, optimizer, batch_size : the settings
    n, used : int
        Texts, and texts in the kernel.
    drift : dict or None
        What `drift_probe` measured.
    warnings : tuple of str
        Plain sentences.
    curves : dict of arrays
        "eta", "residual", "risk" for the figure.
    """

    rule: str
    eta: float
    steps: int
    epochs: float
    rules: Mapping[str, Mapping[str, float]]
    stop_error: float
    step_size: float
    suggested: bool
    largest_step: float
    largest_step_centred: float
    sigma: float
    sigma_from: str
    norm: float
    loss: str
    optimizer: str
    batch_size: int
    n: int
    used: int
    drift: Mapping[str, float] | None = None
    warnings: tuple[str, ...] = ()
    curves: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the curves as JSON-serialisable values."""
        values = {k: v for k, v in vars(self).items() if k != "curves"}
        rules = {k: dict(v) for k, v in self.rules.items()}
        return values | {"rules": rules, "warnings": list(self.warnings), "drift": self.drift and dict(self.drift)}

    def __str__(self) -> str:
        torch_name = {"mse": "torch's MSELoss", "half-mse": "half the mean square"}[self.loss]
        if self.optimizer == "adamw":
            answer = f"when the training error (mean square) has fallen to {self.stop_error:.4g}"
            more = "AdamW has no kernel time before it trains; for plain SGD the epochs are below"
        else:
            answer = f"after {_number(self.epochs)} epochs = {self.steps:,} steps of {self.batch_size} texts"
            more = f"or, if it comes first, when the training error (mean square) has fallen to {self.stop_error:.4g}"
        lr = f"{self.step_size:.4g} ({'suggested' if self.suggested else 'given'}) on {torch_name}"
        head = [
            ("stop", answer),
            ("", more),
            ("rule", f"{self.rule}, kernel time {self.eta:.4g}, with noise level σ = {self.sigma:.4g} ({self.sigma_from})"),
            ("learning rate", f"{lr}; SGD diverges from {self.largest_step:.4g} on"),
            ("texts", f"{self.n:,}" + ("" if self.used == self.n else f", {self.used:,} of them in the kernel")),
        ]
        lines = [f"{key:<15}{value}" for key, value in head]
        lines += ["", f"{'rule':<15}{'kernel time':>12}{'steps':>12}{'epochs':>12}"]
        for name, row in self.rules.items():
            label = f"{name}, R={self.norm:g}" if name == "rademacher" else name
            lines.append(f"{label:<15}{row['eta']:>12.4g}{row['steps']:>12,}{_number(row['epochs']):>12}")
        notes = (textwrap.fill(f"Note: {text}", 98, subsequent_indent="      ") for text in self.warnings)
        return "\n".join([*lines, *(f"\n{note}" for note in notes)])

    def plot(self, path: str | Path | None = None, *, ax: Any = None) -> Any:
        """Draw training error and estimated risk against kernel time, with the stops; write it to `path` if given.

        Returns the matplotlib figure: a new one, or that of `ax`. The format follows the suffix: .png, .svg or .pdf.
        """
        if path is not None and Path(path).suffix.lower() not in PLOTS:
            raise InputError(f"The figure is {Path(path).name!r} and must be one of {', '.join(PLOTS)}: change its suffix.")
        from matplotlib.figure import Figure

        # Not pyplot: no window, and nothing of the caller's figures is touched.
        figure = Figure(figsize=(7, 4.2), layout="constrained") if ax is None else ax.figure
        ax = figure.subplots() if ax is None else ax
        eta = self.curves["eta"]
        ax.plot(eta, self.curves["residual"], label="training error", color="#0072B2")
        ax.plot(eta, np.maximum(self.curves["risk"], 0), label="estimated risk (SURE)", color="#D55E00")
        ax.axhline(self.sigma**2, lw=0.8, color="#0072B2", ls=":", label="noise σ²")
        styles: dict[str, Any] = dict(zip(RULES, ("-.", "-", ":", "--"), strict=True))
        for name, row in self.rules.items():
            if row["eta"] > 0:
                wide = 1.8 if name == self.rule else 0.9
                ax.axvline(row["eta"], color="black", lw=wide, ls=styles[name], label=f"stop: {name}")
        ax.set(xscale="log", xlabel="kernel time η (1 / kernel)", ylabel="mean square (label²)", xlim=(eta[0], eta[-1]))
        per_epoch = LOSSES[self.loss] * self.step_size * self.n / self.batch_size
        there: Any = lambda x: x / per_epoch  # noqa: E731
        back: Any = lambda x: x * per_epoch  # noqa: E731
        top = ax.secondary_xaxis("top", functions=(there, back))
        top.set_xlabel(f"epochs of SGD at learning rate {self.step_size:.3g}, {self.batch_size} texts a step")
        ax.legend(fontsize=8, framealpha=0.9)
        if path is not None:
            with atomic_path(path) as temporary:
                figure.savefig(temporary, dpi=150)
        return figure


class WholePath(Descent):
    """The path on n texts, as the m texts of its kernel tell it (equation in the module's docstring): a Descent for the rules."""

    def __init__(self, part: Descent, n: int, sigma: float) -> None:
        super().__init__(part.eigenvalues, part.vectors, part.y, part.f0, part.step_size, part.kernel_means)
        self._whole, self._s2 = n, sigma**2

    @property
    def n(self) -> int:
        """Number of texts that will be trained on."""
        return self._whole

    def residual(self, eta: Any) -> np.ndarray:
        """Return the expected training error on all n texts."""
        m = len(self.y)
        left = ((1 - self.filter(eta)) ** 2).sum(-1) - (self.kernel_means is not None)  # the constant is fitted
        return super().residual(eta) + self._s2 * (1 - m / self._whole) * (1 - left / m)


def stopping_advice(
    readout: Readout | None,
    task: Task,
    *,
    sigma: float | None = None,
    norm: float = 1.0,
    rule: Literal["rademacher", "sure", "gcv", "discrepancy"] | None = None,
    step_size: float | None = None,
    batch_size: int = 16,
    loss: Literal["mse", "half-mse"] = "mse",
    optimizer: Literal["sgd", "adamw"] = "sgd",
    kernel: Kernel | None = None,
    max_texts: int = 1024,
    seed: int = 0,
    intercept: bool = True,
    centred_batches: bool = False,
    check_drift: bool = False,
    memory: str | int = "2GB",
    progress: bool = True,
) -> Advice:
    r"""Say how many epochs to fine-tune, by all rules of the book, with warnings where their assumptions look violated.

    Parameters
    ----------
    readout : Readout or None
        The function to be trained; not needed if `kernel` is given and `check_drift` is not.
    task : Task
        All n texts that will be trained on, with their labels.
    sigma : float, optional
        Noise level of the labels. By default that of the task, and if it knows none, estimated at the time of GCV.
    norm : float
        R of the Rademacher rule.
    rule : str, optional
        The rule to follow: by default "discrepancy" if σ is known, because its training error holds for a network whose
        kernel moves too, and "gcv" if it is not.
    step_size, batch_size : float, int
        Learning rate, by default a quarter of the largest stable one; texts a step.
    loss : "mse" or "half-mse"
        What is averaged over a batch: (f - y)² as torch's MSELoss does, or half of it as the book does.
    optimizer : "sgd" or "adamw"
        With AdamW the answer is a training error.
    kernel : Kernel, optional
        Of all texts of the task, or of some of them; else it is computed.
    max_texts, seed : int
        A longer task is represented by a random part of this size.
    intercept : bool
        Let the rules treat a constant as free. The constant is what a network learns first, so the stop hardly differs.
    centred_batches : bool
        Training subtracts the mean from f and y in each batch, so that the centred kernel limits the step.
    check_drift : bool
        Train for a moment and measure how far the kernel moves (`drift_probe`).
    memory, progress
        As in `empirical_ntk`.

    Raises
    ------
    InputError
        An option is unknown or not positive; the kernel is for other texts; nothing is given to compute it from.
    """
    options = (("loss", loss, LOSSES), ("rule", rule or "gcv", RULES), ("optimizer", optimizer, ("sgd", "adamw")))
    for name, value, known in options:
        if value not in known:
            raise InputError(f"{name} is {value!r}: choose one of {', '.join(known)}.")
    require_positive("norm", norm)
    if batch_size != int(require_positive("batch_size", batch_size)):
        raise InputError(f"batch_size is {batch_size} and must be a whole number: it counts texts.")
    if len(task) < 4:
        raise InputError(f"The task has {len(task)} texts and a spectrum says nothing below 4: give more texts.")
    if readout is None and (kernel is None or check_drift):
        raise InputError("readout is None and is needed: give a read-out, or a kernel without check_drift.")
    if kernel is None:
        assert readout is not None
        rows = np.sort(np.random.default_rng(seed).permutation(len(task))[:max_texts])
        kernel = empirical_ntk(readout, [task.texts[i] for i in rows], memory=memory, progress=progress)
    else:
        rows = _rows(kernel, task)
    part, n = task.subset(rows), len(task)
    descent = descend(kernel, part.y, intercept=intercept)
    level, source = _sigma(descent, task, sigma)
    path = WholePath(descent, n, level)
    whole = Spectrum(np.concatenate([descent.eigenvalues, np.zeros(n - len(rows))]))
    found = {
        "rademacher": rademacher_rule(whole, level, norm),
        "sure": sure_rule(path, level),
        "gcv": _gcv(path),
        "discrepancy": discrepancy_rule(path, level),
    }
    factor = LOSSES[loss]
    raw, centre = (float(kernel.spectrum(centre=flag).eigenvalues[0]) for flag in (False, True))
    top, top_centred = (2 / (factor * max(value, 1e-300)) for value in (raw, centre))
    bound = top_centred if centred_batches else top
    lr = bound / 4 if step_size is None else require_positive("step_size", step_size)
    table = {
        k: {"eta": v.eta, "steps": v.steps(factor * lr), "epochs": v.epochs(factor * lr, batch_size, n)} for k, v in found.items()
    }
    chosen = rule or ("gcv" if source == "estimated" else "discrepancy")
    grid = time_grid(descent)
    free = path.degrees_of_freedom(grid)
    shown = slice(max(int(np.searchsorted(free, 0.98 * free[-1])), 2))  # beyond, nothing happens
    curves = {"eta": grid[shown], "residual": path.residual(grid[shown])}
    curves["risk"] = twin_risk(curves["residual"], free[shown], level, n)
    eta = found[chosen].eta
    advice = Advice(
        chosen, eta, int(table[chosen]["steps"]), table[chosen]["epochs"], table, float(path.residual(eta)), lr,
        step_size is None, bound, top_centred, level, source, float(norm), loss, optimizer, int(batch_size), n, len(rows),
        curves=curves,
    )  # fmt: skip
    if check_drift and readout is not None:
        try:
            measured = drift_probe(readout, part, eta, seed=seed, memory=memory)
        except InputError as error:  # the probe diverged: that is an answer too
            return replace(advice, warnings=(*_warnings(advice, task, path, raw, centre), f"The drift probe failed: {error}"))
        advice = replace(advice, drift=measured)
    return replace(advice, warnings=tuple(_warnings(advice, task, path, raw, centre)))


def drift_probe(
    readout: Readout, task: Task, eta: float, *, size: int = 48, seed: int = 0, most: int = 16, memory: str | int = "2GB"
) -> dict[str, float]:
    """Train on a few texts for a quarter of `eta`, and measure how far their kernel moves; the weights are put back.

    Parameters
    ----------
    readout, task
        The function, and texts with labels; at most `size` of them are used, drawn by `seed`.
    eta : float
        The kernel time that is planned.
    most : int
        At most so many steps; on a kernel with a large λ_1 they may not reach eta/4.

    Returns
    -------
    dict
        "texts", "eta" (kernel time of the probe), "lambda_1" and "trace" (relative changes).
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(task))[:size])
    few = task.subset(rows)
    before = empirical_ntk(readout, few.texts, memory=memory, progress=False)
    top = float(before.spectrum().eigenvalues[0])
    steps = int(np.clip(np.ceil(eta / 4 * top), 4, most))
    step = min(eta / 4 / steps, 1 / top)
    if step <= 0:
        return {"texts": len(few), "eta": 0.0, "lambda_1": 0.0, "trace": 0.0}
    with preserved_weights(readout):
        train(readout, few.texts, few.y, step_size=step, epochs=steps, progress=False)
        after = empirical_ntk(readout, few.texts, memory=memory, progress=False)
    change = {
        "lambda_1": float(after.spectrum().eigenvalues[0]) / top - 1,
        "trace": float(after.matrix.trace() / before.matrix.trace()) - 1,
    }
    return {"texts": len(few), "eta": steps * step} | change


def _rows(kernel: Kernel, task: Task) -> np.ndarray:
    """Return which texts of the task the kernel's rows are."""
    where = {sha256_text(text): i for i, text in enumerate(task.texts)}
    if not kernel.square or kernel.scores.ndim != 1:
        raise InputError(f"The kernel is {kernel!r} with scores {kernel.scores.shape}: give the square kernel of one output.")
    if not kernel.texts and kernel.n == len(task):
        return np.arange(kernel.n)  # made by hand: the order is the caller's word
    missing = sum(sha not in where for sha in kernel.texts) if kernel.texts else kernel.n
    if missing:
        raise InputError(
            f"{missing} of the kernel's {kernel.n} texts are not among the task's {len(task)}: compute the task's own kernel."
        )
    return np.array([where[sha] for sha in kernel.texts])


def _gcv(descent: Descent) -> StoppingTime:
    """GCV among the times that spend at most half of the degrees of freedom: beyond, its quotient tends to 0/0."""
    stop = gcv_rule(descent)
    if descent.degrees_of_freedom(stop.eta) <= descent.n / 2:
        return stop
    grid = np.concatenate([[0.0], time_grid(descent)])
    share = descent.degrees_of_freedom(grid) / descent.n
    score = np.where(share <= 0.5, descent.residual(grid) / np.maximum(1 - share, 0.5) ** 2, np.inf)
    return StoppingTime(float(grid[np.argmin(score)]), "gcv", {"edge": "half of the degrees of freedom"})


def _sigma(descent: Descent, task: Task, sigma: float | None) -> tuple[float, str]:
    """Return the noise level and where it is from."""
    if sigma is not None:
        return require_positive("sigma", sigma), "given"
    if task.noise_variance is not None and task.noise_variance > 0:
        return task.noise_variance**0.5, "given" if task.ratings is None else "measured from single ratings"
    eta = _gcv(descent).eta
    variance = float(descent.residual(eta)) / (1 - float(descent.degrees_of_freedom(eta)) / descent.n)
    return max(variance, 1e-300) ** 0.5, "estimated"


def _warnings(advice: Advice, task: Task, path: WholePath, raw: float, centre: float) -> list[str]:
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
            f"The stop is after {_number(advice.epochs)} epochs and not all texts are seen: take a smaller learning rate."
        )
    elif sgd and advice.epochs > 20:
        found.append(
            f"The stop is after {_number(advice.epochs)} epochs: "
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
    return found + _drift_words(advice)


def _drift_words(advice: Advice) -> list[str]:
    if advice.drift is None:
        return []
    d = advice.drift
    largest = max(abs(d["lambda_1"]), abs(d["trace"]))
    measured = (
        f"After kernel time {d['eta']:.3g} of {advice.eta:.3g} on {d['texts']:.0f} texts, λ_1 has changed by"
        f" {100 * d['lambda_1']:+.0f}\u00a0% and the trace by {100 * d['trace']:+.0f}\u00a0%"
    )
    if largest <= 0.2:
        return [f"{measured}: the kernel hardly moves, and the clock can be trusted."]
    pace = "faster" if d["trace"] > 0 else "slower"
    return [
        f"{measured}: the kernel moves, and the network learns {pace} than its first kernel says. Stop by the training error"
        f" (about {advice.stop_error:.3g}; KernelStoppingCallback, rule 'discrepancy' or 'clock') and not by the epochs."
    ]


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"
