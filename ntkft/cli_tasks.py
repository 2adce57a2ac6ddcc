"""The command ``ntkft tasks``: which fine-tunings add up, before any training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import ntkft
from ntkft.cli_stop import (
    DATA_HELP,
    Json,
    LabelColumn,
    Memory,
    Model,
    Plot,
    ReadoutName,
    Seed,
    TextColumn,
    check_output,
    make_readout,
    say,
)
from ntkft.errors import InputError
from ntkft.printed import plan_entry


def tasks(
    data: Annotated[list[str], typer.Argument(help=f"Two or more data sets with texts and labels: {DATA_HELP}")],
    model: Model = "minilm",
    n: Annotated[int, typer.Option(help="Texts of each task, drawn at random.")] = 96,
    sigma: Annotated[
        list[float] | None,
        typer.Option(
            help="Noise level of the labels: once for all tasks, or once for each in their order. Estimated if not given."
        ),
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of the texts on which losses are told.")] = 0.25,
    vector: Annotated[
        list[str] | None,
        typer.Option(
            help="Fine-tuned model (folder or .safetensors) of each task, in order: interference is then measured too."
        ),
    ] = None,
    readout: ReadoutName = "auto",
    seed: Seed = 0,
    plot: Plot = None,
    memory: Memory = "2GB",
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    as_json: Json = False,
) -> None:
    """Tell which fine-tunings of a model would help or harm each other, before any training.

    From one kernel of all texts come what adding each task's vector costs
    each other task on held-out texts, how well the sum of all would do
    against training on all together, and a recommendation.

    Example:
      ntkft tasks reviews.csv tickets.csv --model minilm --plot heat.png

    If the models are already fine-tuned, add them in the order of the data:
      ntkft tasks a.csv b.csv --model smollm2 --vector tuned-a/ --vector tuned-b/
    """
    from ntkft.advice import PLOTS
    from ntkft.reports import task_report

    check_output("--plot", plot, PLOTS)
    if len(data) < 2:
        raise InputError(f"There is {len(data)} data set and interference needs two: give more.")
    for option, given in (("--sigma", sigma), ("--vector", vector)):
        if given and len(given) not in ((1, len(data)) if option == "--sigma" else (len(data),)):
            raise InputError(f"{option} is given {len(given)} times and there are {len(data)} data sets: once for each.")
    loaded = [ntkft.load_task(name, seed=seed, text_column=text_column, label_column=label_column) for name in data]
    loaded = [task.subset(range(min(n, len(task)))) for task in loaded]  # load_task has shuffled them
    made = make_readout(model, readout, seed)
    texts = [text for task in loaded for text in task.texts]
    plan = ntkft.empirical_ntk(made, texts, memory=memory, plan_only=True)
    if not as_json:
        typer.echo(plan_entry(f"{len(texts):,}", plan) + "\n")
    vectors = [_vector(each, made) for each in vector] if vector else None
    levels: Any = None if not sigma else (sigma[0] if len(sigma) == 1 else sigma)
    report = task_report(
        made, loaded, vectors=vectors, sigma=levels, held_out=held_out, seed=seed, memory=memory, progress=sys.stderr.isatty()
    )
    if plot is not None:
        report.plot(plot)
    if as_json:
        say(report.to_dict() | {"plan": plan.to_dict(), "plot": plot and str(plot)}, True)
    else:
        typer.echo(str(report))


def _vector(path: str, readout: Any) -> Any:
    """Read a task vector, or make it of a fine-tuned causal model; other models were tuned through a head that we do not have."""
    from ntkft.task_vectors import TaskVector

    if path.endswith(".safetensors"):
        return TaskVector.load(path)
    if readout.info["readout"] != "prompt":
        raise InputError(
            f"--vector is the folder {path!r}, tuned through a head of its own, and the read-out here has another: in Python, "
            "give task_report the tuned function, sequence_readout(model, tokenizer), or save a TaskVector of the read-out."
        )
    return TaskVector(readout.loaded, Path(path))
