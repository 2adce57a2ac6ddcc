"""The command line, ``ntkft``: fetch assets, plan and compute kernels, read their spectrum, say when to stop, run a chapter.

Every command prints for people, or one JSON object with ``--json``. An error that `ntkft` raises on purpose is one
line on stderr and exit status 1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import ntkft
from ntkft import cli_stop, cli_tasks
from ntkft.cli_stop import (
    Data,
    Json,
    LabelColumn,
    Memory,
    Model,
    ReadoutName,
    Seed,
    TextColumn,
    Texts,
    inputs,
    say,
)
from ntkft.errors import InputError, NtkftError

app = typer.Typer(
    name="ntkft",
    help="Why a few epochs suffice: the kernel of a pretrained language model, and when to stop fine-tuning it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def fetch(
    names: Annotated[
        list[str] | None, typer.Argument(help="Assets to fetch; all of them if none is named.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--list", help="List the assets with licence and size, fetch nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Download models and corpora into the cache (NTKFT_HOME), checked against their pinned hashes."""
    from ntkft import assets

    table = assets.table()
    if show:
        if as_json:
            typer.echo(json.dumps(table))
        else:
            for row in table:
                typer.echo(
                    f"{row['name']:<14}{row['size_mb']:>5.0f} MB  {row['licence']:<14}  {row['title']}"
                )
        return
    found = {}
    for name in names or [row["name"] for row in table]:
        found[name] = str(assets.fetch(name))
        if not as_json:
            typer.echo(f"{name}: {found[name]}")
    if as_json:
        typer.echo(json.dumps(found))


# Options of `kernel` and `plan`, beside those of ntkft.cli_stop.
Parameters = Annotated[str | None, typer.Option(help="Shell pattern of the parameters that count, such as '*attention*'.")]
Blocks = Annotated[
    Literal["kind", "layer"] | None,
    typer.Option(help="Also keep the kernel of each block: kind (attention.q, mlp, ...) or layer."),
]
Precision = Annotated[
    Literal["exact", "fast"],
    typer.Option(help="fast: the machine's bf16 units, with a measured error; refused where that is too large."),
]


@app.command()
def kernel(
    data: Data,
    out: Annotated[Path, typer.Option(help="Where to write the kernel (.npz).")],
    model: Model = "minilm",
    n: Texts = None,
    seed: Seed = 0,
    readout: ReadoutName = "auto",
    parameters: Parameters = None,
    blocks: Blocks = None,
    precision: Precision = "exact",
    memory: Memory = "2GB",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder for what is done so far: the same command goes on after a crash.")
    ] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    as_json: Json = False,
) -> None:
    """Compute the exact empirical NTK of a model on some texts (`ntkft plan` tells what that takes)."""
    if out.suffix != ".npz":
        raise InputError(f"A kernel is stored as .npz and --out is {out.name!r}: name it {out.stem}.npz.")
    if not os.access(next(p for p in out.absolute().parents if p.exists()), os.W_OK):
        raise InputError(f"--out is {out} and its folder cannot be written to: choose another place.")
    made, task = inputs(data, model, n, seed, readout, text_column, label_column)
    result = ntkft.empirical_ntk(
        made,
        task.texts,
        parameters=parameters,
        blocks=blocks,
        precision=precision,
        memory=memory,
        checkpoint=checkpoint,
        progress=sys.stderr.isatty(),
    )
    result.save(out)
    values = {
        "texts": len(task),
        "parameters": result.info["parameters"]["count"],
        "seconds": result.info["seconds"],
        "lambda_1": float(result.spectrum().eigenvalues[0]),
        "file": str(out),
    }
    if "fast" in result.info:
        values["eigenvalue_error"] = result.info["fast"]["eigenvalue_error"]
    if result.parts:
        trace = float(result.matrix.trace())
        values |= {f"trace {name}": float(part.trace()) / trace for name, part in result.parts.items()}
    say(values, as_json)


@app.command()
def plan(
    data: Data,
    model: Model = "minilm",
    n: Texts = None,
    seed: Seed = 0,
    readout: ReadoutName = "auto",
    parameters: Parameters = None,
    precision: Precision = "exact",
    memory: Memory = "2GB",
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    as_json: Json = False,
) -> None:
    """Tell the time and memory that `ntkft kernel` would take, and how each layer is done, from a few seconds of measurement."""
    made, task = inputs(data, model, n, seed, readout, text_column, label_column)
    found = ntkft.empirical_ntk(
        made, task.texts, parameters=parameters, precision=precision, memory=memory, plan_only=True
    )
    typer.echo(json.dumps(found.to_dict()) if as_json else str(found))


app.command()(cli_stop.spectrum)
app.command()(cli_stop.stop)
app.command()(cli_tasks.tasks)


@app.command()
def run(
    chapter: Annotated[str, typer.Argument(help="Chapter by file name, such as stopping_rule.")],
    tier: Annotated[
        Literal["quick", "full"], typer.Option(help="quick: seconds, as in the book; full: stored.")
    ] = "quick",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to store the result in; by default results/CHAPTER for the full tier, none for quick."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a chapter's experiment and print what it found."""
    result = ntkft.experiments.run(chapter, tier, seed)
    folder = result.save(out) if out is not None or tier == "full" else None
    values = {k: v for k, v in result.values.items() if as_json or not isinstance(v, list | dict)}
    values |= {
        "seconds": result.manifest["seconds"],
        "peak_memory_gb": result.manifest["peak_memory_bytes"] / 1e9,
    }
    say(values | ({"folder": str(folder)} if folder else {}), as_json)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"ntkft {ntkft.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; errors raised on purpose become one line."""
    try:
        app()
    except NtkftError as error:
        print(f"ntkft: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
