r"""The reader's own data: a CSV, TSV or JSON-lines file, or a dataset of the Hugging Face hub.

One column holds the texts, one the labels. Numbers stay as they are; two words become -1 and +1. Nothing is
guessed about a label that is missing: the error says in which lines it is.

Example
-------
>>> import pathlib, tempfile
>>> path = pathlib.Path(tempfile.mkdtemp()) / "mine.csv"
>>> _ = path.write_text("text,stars\nsplendid,5\ndull,2\n")
>>> corpus = from_file(path)
>>> corpus.texts, corpus.y.tolist()
(['splendid', 'dull'], [5.0, 2.0])
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ntkft import assets
from ntkft.corpora import Corpus, decode, distinct
from ntkft.errors import InputError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
TEXT_COLUMNS = ("text", "sentence", "review", "content", "tweet")
LABEL_COLUMNS = ("label", "y", "rating", "score", "stars", "target")
_MISSING = {"", "nan", "na", "n/a", "null"}

Record = tuple[int, dict[str, Any]]  # line in the file, column -> value


def from_file(path: str | Path, text_column: str | None = None, label_column: str | None = None) -> Corpus:
    """Read texts and labels from a .csv, .tsv, .jsonl, .ndjson or .json file.

    Parameters
    ----------
    path : str or Path
        CSV and TSV have a header line; a .csv may also be separated by semicolons or tabs. JSON is one object
        in each line, or one list of objects. UTF-8, else Latin-1.
    text_column, label_column : str, optional
        Guessed from `TEXT_COLUMNS` and `LABEL_COLUMNS` if None.

    Returns
    -------
    Corpus
        Without ratings. `info` counts dropped empty and repeated texts and repeats with another label (the first
        one is kept), and says which word became which number in "classes".

    Raises
    ------
    InputError
        No such file or column; a line that cannot be read; missing, infinite or mixed labels; not two classes.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}: check the path of the data")
    content = decode(path.read_bytes())
    reader = _csv_records if path.suffix.lower() in (".csv", ".tsv") else _json_records
    columns, records = reader(content, path)
    return _corpus(str(path), columns, records, text_column, label_column)


def from_hub(spec: str, text_column: str | None = None, label_column: str | None = None) -> Corpus:
    """Read a dataset by `datasets`: "NAME", "NAME/CONFIG" or a folder of `save_to_disk`, then optionally "@SPLIT".

    Parameters
    ----------
    spec : str
        For example "glue/sst2", "imdb@test" or "some/folder". The split is "train" if none is given.
    text_column, label_column : str, optional
        As in `from_file`.

    Raises
    ------
    InputError
        `datasets` is not installed; no such dataset, split or column; labels as in `from_file`.
    """
    try:
        import datasets  # imported here because it is optional and slow to import
    except ImportError:
        raise InputError(
            f"reading 'hf:{spec}' needs the package datasets: pip install 'ntkft[hub]'"
        ) from None
    name, at, split = spec.rpartition("@")
    if not at or Path(spec).expanduser().is_dir():
        name, split = spec, "train"
    if assets.offline() and not Path(name).expanduser().is_dir():
        raise InputError(
            f"dataset {name!r} is no folder and NTKFT_OFFLINE forbids the network: unset NTKFT_OFFLINE, or give "
            "a folder of save_to_disk"
        )
    try:
        data = _open_dataset(datasets, name, split)
    except (OSError, ValueError, KeyError) as error:  # DatasetNotFoundError and network errors are OSErrors
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"dataset {name!r} with split {split!r} cannot be loaded ({why}): give a folder "
            "of save_to_disk, or check the name, the split and the network"
        ) from None
    columns = list(data.column_names)
    text, label = _choose(f"hf:{spec}", columns, text_column, label_column)
    order: Sequence[str] | None = getattr(data.features[label], "names", None)  # of a ClassLabel
    labels = list(data[label])
    if order is not None:
        labels = [
            None if value is None or value < 0 else order[value] for value in labels
        ]  # -1: not labelled
    records = [
        (row, {text: t, label: v}) for row, (t, v) in enumerate(zip(data[text], labels, strict=True), 1)
    ]
    return _corpus(f"hf:{spec}", columns, records, text, label, order)


def _open_dataset(datasets: Any, name: str, split: str) -> Any:
    folder = Path(name).expanduser()
    if folder.is_dir():
        data = datasets.load_from_disk(str(folder))
        return data[split] if isinstance(data, datasets.DatasetDict) else data
    parts = name.split("/")
    if len(parts) == 3:  # owner/name/config
        return datasets.load_dataset("/".join(parts[:2]), parts[2], split=split)
    try:
        return datasets.load_dataset(name, split=split)
    except datasets.exceptions.DatasetNotFoundError:
        if len(parts) != 2:
            raise
        return datasets.load_dataset(parts[0], parts[1], split=split)  # not owner/name but name/config


def _csv_records(content: str, path: Path) -> tuple[list[str], list[Record]]:
    """Split CSV into its columns and its records, each with the line in which it begins."""
    header = content.partition("\n")[0]
    separator = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    # A text may be longer than the csv module's limit, which is global: set it for this file only.
    limit = csv.field_size_limit(max(len(content) + 1, csv.field_size_limit()))
    try:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
        columns, records = next(reader, []), []
        line = reader.line_num
        for row in reader:
            line, start = reader.line_num, line + 1
            if not row:
                continue
            if len(row) != len(columns):
                raise InputError(
                    f"line {start} of {path} has {len(row)} fields and the header {len(columns)}: "
                    f"put texts that contain {separator!r} into double quotes"
                )
            records.append((start, dict(zip(columns, row, strict=True))))
    except csv.Error as error:
        raise InputError(f"line {reader.line_num} of {path} is not CSV ({error}): check its quotes") from None
    finally:
        csv.field_size_limit(limit)
    return columns, records


def _json_records(content: str, path: Path) -> tuple[list[str], list[Record]]:
    """Split JSON lines, or one JSON list, into columns and records."""
    records: list[Record] = []
    for line, value in _json_values(content, path):
        if not isinstance(value, dict):
            raise InputError(
                f"entry {line} of {path} is no JSON object: write {{'text': ..., 'label': ...}} for each"
            )
        records.append((line, value))
    return list(dict.fromkeys(column for _, record in records for column in record)), records


def _json_values(content: str, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        whole = json.loads(content)
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, list):
        yield from enumerate(whole, 1)
        return
    for line, text in enumerate(content.split("\n"), 1):
        if text.strip():
            try:
                yield line, json.loads(text)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"line {line} of {path} is not JSON ({error.msg}): write one object a line"
                ) from None


def _choose(
    source: str, columns: Sequence[str], text_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Return the names of the text and the label column, given or guessed."""

    def choose(given: str | None, usual: Sequence[str], option: str) -> str:
        lower = {column.lower().strip(): column for column in reversed(columns)}
        found = (
            [given]
            if given in columns
            else [lower[name] for name in usual if given is None and name in lower]
        )
        if not found:
            wanted = f"no column {given!r}" if given is not None else f"no column named {', '.join(usual)}"
            raise InputError(f"{source} has {wanted}; it has {', '.join(columns) or 'none'}: give {option}")
        return str(found[0])

    return (
        choose(text_column, TEXT_COLUMNS, "text_column"),
        choose(label_column, LABEL_COLUMNS, "label_column"),
    )


def _corpus(
    source: str,
    columns: Sequence[str],
    records: Sequence[Record],
    text_column: str | None,
    label_column: str | None,
    order: Sequence[str] | None = None,
) -> Corpus:
    """Turn records into a corpus: choose the columns, drop empty and repeated texts, read the labels."""
    text_column, label_column = _choose(source, columns, text_column, label_column)
    texts = ["" if row.get(text_column) is None else str(row[text_column]).strip() for _, row in records]
    keep, dropped = distinct(texts)
    if not keep:
        raise InputError(f"{source} has no text in column {text_column!r}: give another text_column")
    raw = ["" if row.get(label_column) is None else str(row[label_column]).strip() for _, row in records]
    first = {texts[i]: raw[i] for i in keep}
    conflicts = sum(first[text] != label for text, label in zip(texts, raw, strict=True) if text)
    y, classes = _labels(source, label_column, [(records[i][0], raw[i]) for i in keep], order)
    info = {
        "source": source,
        "text_column": text_column,
        "label_column": label_column,
        "conflicting_duplicates": conflicts,
        **dropped,
    }
    if classes is not None:
        info |= {"classes": classes, "class_counts": dict(Counter(raw[i] for i in keep))}
    return Corpus([texts[i] for i in keep], y, None, info)


def _labels(
    source: str, column: str, rows: Sequence[tuple[int, str]], order: Sequence[str] | None
) -> tuple[np.ndarray, dict[str, float] | None]:
    """Read (line, label) pairs as numbers, or as two classes -1 and +1 (in sorted order, or in `order`)."""

    def refuse(lines: list[int], what: str, remedy: str) -> InputError:
        where = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
        return InputError(
            f"{len(lines)} of {len(rows)} labels in column {column!r} of {source} {what} (line {where}): {remedy}"
        )

    missing = [line for line, label in rows if label.lower() in _MISSING]
    if missing:
        raise refuse(missing, "are missing", "fill them in or remove these lines")
    numbers = [_number(label) for _, label in rows]
    words = [line for (line, _), number in zip(rows, numbers, strict=True) if number is None]
    if order is None and not words:
        y = np.array(numbers, dtype=np.float64)
        infinite = [line for (line, _), number in zip(rows, y, strict=True) if not math.isfinite(number)]
        if infinite:
            raise refuse(infinite, "are infinite", "replace them by finite numbers or remove these lines")
        return y, None
    if order is None and len(words) < len(rows):
        raise refuse(words, "are words and the others numbers", "use numbers for all, or two words")
    names = list(order) if order is not None else sorted({label for _, label in rows})
    if len(names) != 2:
        raise InputError(
            f"column {column!r} of {source} has {len(names)} classes ({', '.join(names[:8])}"
            f"{', ...' if len(names) > 8 else ''}) and a task needs two classes or numbers: "
            "keep the rows of two classes"
        )
    classes = {names[0]: -1.0, names[1]: 1.0}
    return np.array([classes[label] for _, label in rows]), classes


def _number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None
