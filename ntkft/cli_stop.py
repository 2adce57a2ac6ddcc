"""The commands ``ntkft stop`` and ``ntkft spectrum``, and the options that all commands on a model and texts share.

`ntkft.cli` attaches them to its app. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import ntkft
from ntkft.errors import InputError
from ntkft.printed import plan_entry

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DATA_HELP = "amazon, movies, nyt, tweets, reuters, newsgroups, a CSV/JSONL path, or hf:ID."
Data = Annotated[str, typer.Option(help=DATA_HELP)]
Model = Annotated[str, typer.Option(help="minilm, smollm2, or any Hugging Face id or folder.")]
Texts = Annotated[int | None, typer.Option(help="Number of texts; all if not given.")]
Seed = Annotated[int, typer.Option(help="Seed of the draw of texts (and of the head, for pooled).")]
ReadoutName = Annotated[
    Literal["auto", "prompt", "pooled"], typer.Option(help="auto: prompt for causal models, pooled for encoders.")
]
Memory = Annotated[str, typer.Option(help="Working memory beside the model; what does not fit goes to disk.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the texts in your own data.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels in your own data.")]
Sigma = Annotated[
    float | None,
    typer.Option(help="Noise level σ of the labels: the standard deviation of one label about its true value."),
]
Norm = Annotated[float, typer.Option(help="R, the norm of the target in the kernel's Hilbert space (Rademacher rule only).")]
Plot = Annotated[Path | None, typer.Option(help="Also draw a figure: .png, .svg or .pdf.")]


def say(values: dict[str, Any], as_json: bool) -> None:
    """Print values in aligned lines, or as one JSON object."""
    if as_json:
        from ntkft.experiments.result import _plain

        typer.echo(json.dumps(_plain(values)))
        return
    width = max(map(len, values), default=0)
    for key, value in values.items():
        typer.echo(f"{key:<{width}}  {value:.6g}" if isinstance(value, float) else f"{key:<{width}}  {value}")


def make_readout(model: str, readout: str, seed: int) -> Any:
    """Load a model and return the read-out that the options name."""
    loaded = ntkft.load_model(model)
    if readout == "auto":
        readout = "pooled" if loaded.info["kind"] == "encoder" else "prompt"
    return ntkft.prompt_readout(loaded) if readout == "prompt" else ntkft.pooled_readout(loaded, seed=seed)


def inputs(
    data: str, model: str, n: int | None, seed: int, readout: str, text_column: str | None, label_column: str | None
) -> tuple[Any, Any]:
    """Return the read-out and the task that the options name."""
    task = ntkft.load_task(data, n=n, seed=seed, text_column=text_column, label_column=label_column)
    return make_readout(model, readout, seed), task


def check_output(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Refuse a file that could not be written, before any work is done."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{option} is {path.name!r} and must end in {', '.join(suffixes)}: name it {path.stem}{suffixes[0]}.")
    if not os.access(next(p for p in path.absolute().parents if p.exists()), os.W_OK):
        raise InputError(f"{option} is {path} and its folder cannot be written to: choose another place.")


def stop(
    data: Annotated[str, typer.Option(help=f"Your texts and labels: {DATA_HELP}")],
    model: Model = "minilm",
    sigma: Sigma = None,
    lr: Annotated[
        float | None, typer.Option(help="Your learning rate; a quarter of the largest stable one if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts a step, accumulated batches included.")] = 16,
    n: Annotated[int, typer.Option(help="Compute the kernel of at most so many texts, drawn at random.")] = 1024,
    rule: Annotated[
        Literal["rademacher", "sure", "gcv", "discrepancy"] | None,
        typer.Option(help="Rule to follow: discrepancy if σ is known and gcv if it is not, unless you choose. All are printed."),
    ] = None,
    norm: Norm = 1.0,
    loss: Annotated[
        Literal["mse", "half-mse"],
        typer.Option(help="Mean over the batch of (f - y)^2, as torch and transformers have it, or of half of it."),
    ] = "mse",
    optimizer: Annotated[
        Literal["sgd", "adamw"], typer.Option(help="adamw: the answer is the training error at which to stop.")
    ] = "sgd",
    centred_batches: Annotated[
        bool,
        typer.Option("--centred-batches", help="Your loss subtracts the batch's mean from f and y: larger steps are stable."),
    ] = False,
    check_drift: Annotated[
        bool, typer.Option("--check-drift", help="Train for a moment on 48 texts and measure how far the kernel moves.")
    ] = False,
    readout: ReadoutName = "auto",
    seed: Seed = 0,
    kernel: Annotated[
        Path | None, typer.Option(help="Use this kernel (of `ntkft kernel` or --save-kernel), compute none.")
    ] = None,
    save_kernel: Annotated[Path | None, typer.Option(help="Keep the kernel in this .npz file.")] = None,
    plot: Plot = None,
    memory: Memory = "2GB",
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    as_json: Json = False,
) -> None:
    """Tell for how many epochs to fine-tune a model on your texts and labels.

    First comes what the computation will take, then the answer by all
    rules of the book, then what looks wrong.

    Example:
      ntkft stop --data reviews.csv --sigma 0.8 --lr 0.003 --batch-size 16

    The file has a column of texts (text, sentence, review, ...) and one of
    labels (label, rating, stars, ...); name others with --text-column and
    --label-column.

    If you do not know σ, have some texts labelled twice: σ is the standard
    deviation of the differences divided by the square root of 2. Without
    --sigma it is measured from single ratings if the data has them, else
    estimated, which is unsure.

    Epochs are those of SGD with squared loss on the model's score. For
    AdamW the answer is the training error at which to stop.
    """
    from ntkft.advice import PLOTS, stopping_advice
    from ntkft.ntk import Kernel

    check_output("--plot", plot, PLOTS)
    check_output("--save-kernel", save_kernel, (".npz",))
    if n < 4:
        raise InputError(f"--n is {n} and a spectrum says nothing below 4 texts: give more.")
    task = ntkft.load_task(data, seed=seed, text_column=text_column, label_column=label_column)
    made = None if kernel is not None and not check_drift else make_readout(model, readout, seed)
    found, plan = None if kernel is None else Kernel.load(kernel), None
    if found is None:
        part = task.subset(range(min(n, len(task))))  # load_task has shuffled them
        plan = ntkft.empirical_ntk(made, part.texts, memory=memory, plan_only=True)
        if not as_json:
            typer.echo(plan_entry(f"{len(part):,} of {len(task):,}", plan))
        found = ntkft.empirical_ntk(made, part.texts, memory=memory, progress=sys.stderr.isatty())
        if save_kernel is not None:
            found.save(save_kernel)
    advice = stopping_advice(
        made, task, sigma=sigma, norm=norm, rule=rule, step_size=lr, batch_size=batch_size, loss=loss, optimizer=optimizer,
        kernel=found, seed=seed, centred_batches=centred_batches, check_drift=check_drift, memory=memory,
    )  # fmt: skip
    if plot is not None:
        advice.plot(plot)
    files = {"plot": plot and str(plot), "kernel": str(kernel or save_kernel) if kernel or save_kernel else None}
    if as_json:
        say(advice.to_dict() | {"plan": plan and plan.to_dict(), "seconds": found.info.get("seconds")} | files, True)
    else:
        typer.echo(str(advice))


def spectrum(
    file: Annotated[Path, typer.Argument(help="A kernel written by `ntkft kernel`.")],
    sigma: Sigma = None,
    norm: Norm = 1.0,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Print the eigenvalue decay of a kernel, and with --sigma the kernel time at which to stop.

    Raw is the kernel as it is; centred is that of the model minus its mean over the texts, as if a constant were free.
    """
    from ntkft.advice import PLOTS

    check_output("--plot", plot, PLOTS)
    found = ntkft.Kernel.load(file)
    raw, centred = found.spectrum(), found.spectrum(centre=True)
    values: dict[str, Any] = {
        "n": found.n,
        "lambda_1": float(raw.eigenvalues[0]),
        "lambda_1_centred": float(centred.eigenvalues[0]),
        "trace": float(raw.eigenvalues.sum()),
        "trace_centred": float(centred.eigenvalues.sum()),
    }
    if found.n >= 48 and raw.eigenvalues[found.n // 4 - 1] > 0:  # enough ranks to fit a decay
        decay = raw.decay()
        values |= {
            "decay_exponent": decay.exponent,
            "decay_ranks": f"{decay.first}-{decay.last}",
            "decay_r2": decay.r_squared,
        }
        values |= _law(found, as_json)
    for label, each in (("", raw), ("_centred", centred)) if sigma is not None else ():
        stopping = ntkft.stopping.rademacher_rule(each, float(sigma or 0), norm)
        values |= {
            f"critical_radius{label}": stopping.info["radius"],
            f"eta{label}": stopping.eta,
            f"steps_at_1/lambda_1{label}": stopping.steps(1 / float(each.eigenvalues[0])),
            f"effective_dimension{label}": float(each.effective_dimension(stopping.eta)),
        }
    if plot is not None:
        _draw(plot, raw, centred, {label: values[f"eta{label}"] for label in ("", "_centred") if f"eta{label}" in values})
    say(values, as_json)


def _law(kernel: Any, as_json: bool) -> dict[str, Any]:
    """Return the law that predicts the centred eigenvalues of other texts best, if there are enough of them."""
    from ntkft.decay import select_decay

    if kernel.n < 64 or kernel.spectrum(centre=True).eigenvalues[kernel.n // 2 - 2] <= 0:
        return {}
    try:
        found = select_decay(kernel)
    except InputError:  # half of the texts has too few positive eigenvalues
        return {}
    fit = found.fits[found.best]
    values: dict[str, Any] = {"law": found.best, "law_ranks": f"{fit.first}-{fit.last}"}
    for name, value in fit.parameters.items():
        low, high = found.interval[found.best][name]
        values[f"law_{name}"] = value if as_json else f"{value:.4g} (halves of the texts: {low:.4g} to {high:.4g})"
        if as_json:
            values[f"law_{name}_interval"] = [low, high]
    if as_json:
        values["law_scores"] = found.scores
    return values


def _draw(path: Path, raw: Any, centred: Any, stops: dict[str, float]) -> None:
    """Draw both spectra in log-log, with 1/η of the stops."""
    from matplotlib.figure import Figure

    from ntkft.files import atomic_path

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    for each, label, colour, key, style in ((raw, "raw", "#0072B2", "", "--"), (centred, "centred", "#D55E00", "_centred", ":")):
        shown = each.eigenvalues[each.eigenvalues > 1e-9 * each.eigenvalues[0]]
        ax.plot(range(1, len(shown) + 1), shown, ".-", ms=3, lw=0.8, color=colour, label=label)
        if key in stops:
            ax.axhline(1 / stops[key], color=colour, lw=0.9, ls=style, label=f"1/η, {label}")
    ax.set(xscale="log", yscale="log", xlabel="rank j", ylabel="eigenvalue of K/n (score² / weight²)")
    ax.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
