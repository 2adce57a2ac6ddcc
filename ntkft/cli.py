"""The command line, ``ntkft``: fetch assets, plan and compute kernels, read their spectrum, run a chapter.

Every command prints for people, or one JSON object with ``--json``. An error that `ntkft` raises on purpose is one
line on stderr and exit status 1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import ntkft
from ntkft.errors import InputError, NtkftError

app = typer.Typer(
    name="ntkft",
    help="Why a few epochs suffice: the kernel of a pretrained language model, and when to stop fine-tuning it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _say(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        from ntkft.experiments.result import _plain

        typer.echo(json.dumps(_plain(values)))
        return
    width = max(map(len, values), default=0)
    for key, value in values.items():
        typer.echo(f"{key:<{width}}  {value:.6g}" if isinstance(value, float) else f"{key:<{width}}  {value}")


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


# The options of `kernel` and `plan`, which differ in nothing but whether the kernel is computed.
Data = Annotated[str, typer.Option(help="amazon, movies, nyt, tweets, reuters, newsgroups, a CSV/JSONL path, or hf:ID.")]
Model = Annotated[str, typer.Option(help="minilm, smollm2, or any Hugging Face id or folder.")]
Texts = Annotated[int | None, typer.Option(help="Number of texts; all if not given.")]
Seed = Annotated[int, typer.Option(help="Seed of the draw of texts (and of the head, for pooled).")]
ReadoutName = Annotated[
    Literal["auto", "prompt", "pooled"], typer.Option(help="auto: prompt for causal models, pooled for encoders.")
]
Parameters = Annotated[str | None, typer.Option(help="Shell pattern of the parameters that count, such as '*attention*'.")]
Blocks = Annotated[
    Literal["kind", "layer"] | None,
    typer.Option(help="Also keep the kernel of each block: kind (attention.q, mlp, ...) or layer."),
]
Precision = Annotated[
    Literal["exact", "fast"],
    typer.Option(help="fast: the machine's bf16 units, with a measured error; refused where that is too large."),
]
Memory = Annotated[str, typer.Option(help="Working memory beside the model; what does not fit goes to disk.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the texts in your own data.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the labels in your own data.")]


def _inputs(
    data: str,
    model: str,
    n: int | None,
    seed: int,
    readout: str,
    text_column: str | None,
    label_column: str | None,
) -> tuple[Any, Any]:
    """Return the read-out and the task that the options name."""
    task = ntkft.load_task(data, n=n, seed=seed, text_column=text_column, label_column=label_column)
    loaded = ntkft.load_model(model)
    if readout == "auto":
        readout = "pooled" if loaded.info["kind"] == "encoder" else "prompt"
    return (ntkft.prompt_readout(loaded) if readout == "prompt" else ntkft.pooled_readout(loaded, seed=seed)), task


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
    made, task = _inputs(data, model, n, seed, readout, text_column, label_column)
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
    _say(values, as_json)


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
    made, task = _inputs(data, model, n, seed, readout, text_column, label_column)
    found = ntkft.empirical_ntk(
        made, task.texts, parameters=parameters, precision=precision, memory=memory, plan_only=True
    )
    typer.echo(json.dumps(found.to_dict()) if as_json else str(found))


@app.command()
def spectrum(
    file: Annotated[Path, typer.Argument(help="A kernel written by `ntkft kernel`.")],
    sigma: Annotated[
        float | None, typer.Option(help="Noise level of the labels: also print the radius and the stop.")
    ] = None,
    norm: Annotated[
        float, typer.Option(help="R, the norm of the target in the kernel's Hilbert space.")
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Print the eigenvalue decay of a kernel, and with --sigma the kernel time at which to stop."""
    found = ntkft.Kernel.load(file)
    raw, centred = found.spectrum(), found.spectrum(centre=True)
    values: dict[str, Any] = {
        "n": found.n,
        "lambda_1": float(raw.eigenvalues[0]),
        "lambda_1_centred": float(centred.eigenvalues[0]),
        "trace": float(raw.eigenvalues.sum()),
    }
    if found.n >= 48 and raw.eigenvalues[found.n // 4 - 1] > 0:  # enough ranks to fit a decay
        decay = raw.decay()
        values |= {
            "decay_exponent": decay.exponent,
            "decay_ranks": f"{decay.first}-{decay.last}",
            "decay_r2": decay.r_squared,
        }
    if sigma is not None:
        stop = ntkft.stopping.rademacher_rule(raw, sigma, norm)
        values |= {
            "critical_radius": stop.info["radius"],
            "eta": stop.eta,
            "steps_at_1/lambda_1": stop.steps(1 / float(raw.eigenvalues[0])),
        }
    _say(values, as_json)


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
    _say(values | ({"folder": str(folder)} if folder else {}), as_json)


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
