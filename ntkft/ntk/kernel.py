"""The kernel as a portable artifact: a matrix, the scores it belongs to, and where both come from.

A `Kernel` file is a plain ``.npz`` without pickled objects. It holds no texts, only their hashes: who has
the corpus can match them, who has not can still do everything spectral.

Example
-------
>>> import numpy as np
>>> kernel = Kernel(np.array([[2.0, 1.0], [1.0, 2.0]]), scores=np.zeros(2))
>>> kernel.spectrum().eigenvalues          # of K/n
array([1.5, 0.5])
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkft.errors import InputError
from ntkft.files import atomic_path, sha256_text

if TYPE_CHECKING:
    from ntkft.spectrum import Spectrum

FORMAT = "ntkft-kernel-1"


def centred(matrix: np.ndarray) -> np.ndarray:
    """Return H M H with H = I - 11'/n, the kernel of the model minus its mean over the texts."""
    return matrix - matrix.mean(0) - matrix.mean(1)[:, None] + matrix.mean()


@dataclass(frozen=True, eq=False)
class Kernel:
    """The matrix of k(x_i, x'_j), with the scores f0(x_i) of the same read-out at the same weights.

    Parameters
    ----------
    matrix : (n, m) float64
        Unnormalised inner products of gradients; (n, n) and symmetric when both text lists are the same.
    scores : (n,) float64
        f0 at the row texts; (n, c) for the trace kernel of a read-out with c outputs.
    other_scores : (m,) float64 or None
        f0 at the column texts; None for a square kernel.
    info : dict
        Model, read-out, parameters, seconds, versions and hashes of code and data.
    texts, other_texts : tuple of str
        SHA-256 of the text of each row and column, not the text.
    parts : dict of str to (n, m) float64
        The kernel of each block of parameters, if ``blocks=`` was given; they add up to `matrix`.

    Raises
    ------
    InputError
        If shapes do not match or the matrix has entries that are not finite.
    """

    matrix: np.ndarray
    scores: np.ndarray
    other_scores: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    other_texts: tuple[str, ...] = ()
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        matrix = np.asarray(self.matrix, dtype=np.float64)
        scores = np.asarray(self.scores, dtype=np.float64)
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "scores", scores)
        if matrix.ndim != 2 or scores.shape[:1] != (matrix.shape[0],):
            raise InputError(
                f"The kernel matrix has shape {matrix.shape} and the scores have shape {scores.shape}: "
                "rows and scores must be as many."
            )
        if self.other_scores is None and matrix.shape[0] != matrix.shape[1]:
            raise InputError(
                f"A {matrix.shape} kernel is rectangular and other_scores is None: pass f0 of the columns."
            )
        if self.other_scores is not None and len(self.other_scores) != matrix.shape[1]:
            raise InputError(
                f"The kernel matrix has {matrix.shape[1]} columns and other_scores has {len(self.other_scores)} entries: "
                "columns and other_scores must be as many."
            )
        for label, part in self.parts.items():
            if part.shape != matrix.shape:
                raise InputError(f"Part {label!r} has shape {part.shape} and the kernel {matrix.shape}: they must agree.")
        if not np.isfinite(matrix).all() or not np.isfinite(scores).all():
            raise InputError(
                f"{int((~np.isfinite(matrix)).sum())} kernel entries and {int((~np.isfinite(scores)).sum())} scores "
                "are not finite: look for texts on which the model overflows."
            )

    def __repr__(self) -> str:
        n, m = self.matrix.shape
        source = self.info.get("model", {}).get("name", "unknown model")
        return (
            f"Kernel({n} x {m}, {source}, {self.info.get('readout', {}).get('readout', 'unknown')} read-out)"
        )

    @property
    def n(self) -> int:
        """Number of row texts."""
        return self.matrix.shape[0]

    @property
    def square(self) -> bool:
        """Whether rows and columns are the same texts."""
        return self.other_scores is None

    def part(self, label: str) -> Kernel:
        """Return the kernel of one block of parameters.

        Example
        -------
        >>> whole = Kernel(np.eye(2), np.zeros(2), parts={"mlp": np.eye(2) / 4, "norm": np.eye(2) * 3 / 4})
        >>> whole.part("mlp").matrix[0, 0]
        np.float64(0.25)
        """
        if label not in self.parts:
            known = ", ".join(self.parts) or "none: compute the kernel with blocks="
            raise InputError(f"This kernel has no part {label!r}; its parts are {known}.")
        return replace(self, matrix=self.parts[label], info=self.info | {"part": label}, parts={})

    def block(
        self, rows: Sequence[int] | np.ndarray, columns: Sequence[int] | np.ndarray | None = None
    ) -> Kernel:
        """Return the kernel between some texts (rows) and others (columns; the rows again if None).

        Example
        -------
        >>> kernel = Kernel(np.eye(4), np.arange(4.0))
        >>> kernel.block([0, 1, 2]).matrix.shape, kernel.block([3], [0, 1, 2]).matrix.shape
        ((3, 3), (1, 3))
        """
        rows = np.asarray(rows)
        pick = [self.texts[i] for i in rows] if self.texts else []
        if columns is None:
            if not self.square:
                raise InputError("A rectangular kernel has no square block: give columns too.")
            index = np.ix_(rows, rows)
            parts = {k: part[index] for k, part in self.parts.items()}
            return Kernel(self.matrix[index], self.scores[rows], None, self.info, tuple(pick), (), parts)
        columns = np.asarray(columns)
        column_scores = self.scores if self.other_scores is None else self.other_scores
        column_texts = self.texts if self.square else self.other_texts
        index = np.ix_(rows, columns)
        return Kernel(
            self.matrix[index],
            self.scores[rows],
            column_scores[columns],
            self.info,
            tuple(pick),
            tuple(column_texts[j] for j in columns) if column_texts else (),
            {k: part[index] for k, part in self.parts.items()},
        )

    def spectrum(self, centre: bool = False) -> Spectrum:
        """Return the eigenvalues of K/n, of the centred HKH/n if `centre` (H = I - 11'/n)."""
        from ntkft.spectrum import Spectrum

        if not self.square:
            raise InputError(
                f"A {self.matrix.shape} kernel is rectangular and has no eigenvalues: use a square one."
            )
        matrix = centred(self.matrix) if centre else self.matrix
        return Spectrum(np.linalg.eigvalsh((matrix + matrix.T) / (2 * self.n)))

    def matches(self, texts: Sequence[str]) -> bool:
        """Whether the rows belong to exactly these texts, in this order (each once for each output)."""
        outputs = len(self.texts) // len(texts) if texts else 0
        return self.texts == tuple(sha for sha in map(sha256_text, texts) for _ in range(outputs))

    def save(self, path: str | Path, *, compact: bool = False) -> Path:
        """Write the kernel to a ``.npz`` file, atomically and without pickle. Returns the path.

        Parameters
        ----------
        path : str or Path
            Ends in ``.npz``.
        compact : bool
            Keep one triangle, in float32: a quarter of the size, each entry to a relative 6e-8. Square kernels only.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise InputError(
                f"A kernel is stored as .npz and the path is {path.name!r}: name it {path.stem}.npz."
            )
        header = {"format": FORMAT, "info": self.info, "texts": self.texts, "other_texts": self.other_texts}
        if compact and not self.square:
            raise InputError(f"compact=True keeps one triangle and this kernel is {self.matrix.shape}: save it whole.")

        def stored(matrix: np.ndarray) -> np.ndarray:
            return matrix[np.triu_indices(self.n)].astype(np.float32) if compact else matrix

        arrays = {"matrix": stored(self.matrix), "scores": self.scores, "header": np.array(json.dumps(header))}
        if self.other_scores is not None:
            arrays["other_scores"] = np.asarray(self.other_scores, dtype=np.float64)
        arrays |= {f"part:{label}": stored(part) for label, part in self.parts.items()}
        with atomic_path(path) as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
        return path

    @classmethod
    def load(cls, path: str | Path) -> Kernel:
        """Read a kernel written by `save`.

        Raises
        ------
        InputError
            If the file is missing, is no kernel, or is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(
                f"There is no kernel at {path}: compute it with empirical_ntk and save it there."
            )
        remedy = "write kernels with Kernel.save"
        try:
            with np.load(path, allow_pickle=False) as data:
                missing = {"matrix", "scores", "header"} - set(data.files)
                if missing:
                    raise InputError(f"{path} is no ntkft kernel, it has no {sorted(missing)}: {remedy}.")
                header = json.loads(str(data["header"]))
                if header.get("format") != FORMAT:
                    raise InputError(
                        f"{path} has format {header.get('format')!r}, this ntkft reads {FORMAT!r}: {remedy}."
                    )
                other = data["other_scores"] if "other_scores" in data.files else None
                n = len(data["scores"])
                return cls(
                    _whole(data["matrix"], n),
                    data["scores"],
                    other,
                    header["info"],
                    tuple(header["texts"]),
                    tuple(header["other_texts"]),
                    {k.removeprefix("part:"): _whole(data[k], n) for k in data.files if k.startswith("part:")},
                )
        except (ValueError, OSError, AttributeError, EOFError, KeyError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} is no ntkft kernel ({type(error).__name__} while reading): {remedy}."
            ) from None


def _whole(matrix: np.ndarray, n: int) -> np.ndarray:
    """Return a matrix as `Kernel.save` was given it: one triangle (n(n+1)/2,) becomes the symmetric (n, n)."""
    if matrix.ndim != 1:
        return matrix
    full = np.zeros((n, n))
    full[np.triu_indices(n)] = matrix  # raises ValueError if the length does not fit
    return full + np.triu(full, 1).T
