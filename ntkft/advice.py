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

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ntkft.advice_path import WholePath, guarded_gcv, kernel_rows, noise_level
from ntkft.advice_warnings import advice_warnings, short_number
from ntkft.descent import descend
from ntkft.drift_probe import drift_probe
from ntkft.errors import InputError
from ntkft.files import atomic_path
from ntkft.monitor import twin_risk
from ntkft.ntk import Kernel, empirical_ntk
from ntkft.printed import KEY, entry, sentence
from ntkft.readout import Readout
from ntkft.spectrum import Spectrum, require_positive
from ntkft.stopping import discrepancy_rule, rademacher_rule, sure_rule, time_grid
from ntkft.tasks import Task

__all__ = ["LOSSES", "RULES", "Advice", "WholePath", "drift_probe", "stopping_advice"]

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
            answer = f"after {short_number(self.epochs)} epochs = {self.steps:,} steps of {self.batch_size} texts"
            more = f"or, if it comes first, at a training error (mean square) of {self.stop_error:.4g}"
        lr = f"{self.step_size:.4g} ({'suggested' if self.suggested else 'given'}) on {torch_name}"
        head = [
            ("stop", answer),
            ("", more),
            ("rule", f"{self.rule}, kernel time {self.eta:.4g}, with noise level σ = {self.sigma:.4g} ({self.sigma_from})"),
            ("learning rate", f"{lr}; SGD diverges from {self.largest_step:.4g} on"),
            ("texts", f"{self.n:,}" + ("" if self.used == self.n else f", {self.used:,} of them in the kernel")),
        ]
        lines = [entry(key, value) for key, value in head]
        lines += ["", f"{'rule':<{KEY}}{'kernel time':>12}{'steps':>12}{'epochs':>12}"]
        for name, row in self.rules.items():
            label = f"{name}, R={self.norm:g}" if name == "rademacher" else name
            lines.append(f"{label:<{KEY}}{row['eta']:>12.4g}{row['steps']:>12,}{short_number(row['epochs']):>12}")
        return "\n".join([*lines, *("\n" + sentence(f"Note: {text}", 6) for text in self.warnings)])

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
        rows = kernel_rows(kernel, task)
    part, n = task.subset(rows), len(task)
    descent = descend(kernel, part.y, intercept=intercept)
    level, source = noise_level(descent, task, sigma)
    path = WholePath(descent, n, level)
    whole = Spectrum(np.concatenate([descent.eigenvalues, np.zeros(n - len(rows))]))
    found = {
        "rademacher": rademacher_rule(whole, level, norm),
        "sure": sure_rule(path, level),
        "gcv": guarded_gcv(path),
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
    failed: list[str] = []
    if check_drift and readout is not None:
        try:
            advice = replace(advice, drift=drift_probe(readout, part, eta, seed=seed, memory=memory))
        except InputError as error:  # the probe diverged: that is an answer too
            failed.append(f"The drift probe failed: {error}")
    return replace(advice, warnings=(*advice_warnings(advice, task, path, raw, centre), *failed))
