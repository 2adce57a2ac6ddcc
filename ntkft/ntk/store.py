r"""Where captured factors wait for their turn: in memory as far as the budget goes, and on disk.

A batch is captured once and read site by site. Batches stay in memory while there is room. The others, and all of them if
the computation is to survive a crash, are one safetensors file each, written whole or not at all and read through
a memory map. The sums over finished products are kept beside them.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ntkft.errors import InputError
from ntkft.files import atomic_path, read_json, write_json
from ntkft.ntk.factors import Chunk, Factor, Outer, Rows, Vector, tensors_of

KINDS: dict[str, type] = {"Outer": Outer, "Rows": Rows, "Vector": Vector}
PATIENCE = 20  # sums are saved once twenty times the time that saving took has passed


class Store:
    """Captured batches by key, in memory or in a folder; a context manager that removes what was only temporary.

    Parameters
    ----------
    folder : Path or None
        Where to keep the batches, so that an interrupted computation can go on. Kept after an interrupt, removed by `close`.
    room : float
        Bytes of batches to hold in memory; without a folder, what goes beyond lies in a temporary one.
    job : dict
        What is computed. A folder that holds another job is refused.

    Raises
    ------
    InputError
        If the folder belongs to another computation, or is no folder of ours.
    """

    def __init__(self, folder: Path | None, *, room: float, job: Mapping[str, Any]) -> None:
        self.lasting = folder is not None
        self.folder = folder
        self.spilled = 0  # bytes written because they did not fit
        self._room = room
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._pause, self._saved = 0.0, 0.0
        if folder is not None:
            _claim(folder, dict(job))

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self.lasting:
            self.close()

    def close(self) -> None:
        """The kernel is done: remove what was kept."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, key: str) -> bool:
        """Whether a batch was captured already."""
        return key in self._memory or (self.folder is not None and self._path(key).is_file())

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep one batch's tensors."""
        distinct = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
        size = sum(distinct.values())
        fits = size <= self._room
        if fits:
            self._room -= size
            self._memory[key] = dict(tensors)
        if fits and not self.lasting:
            return
        self.spilled += 0 if fits else size
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="ntkft-"))
        own: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, t in tensors.items():  # sites in different blocks may hold the same tensor; a file may not
            own[name] = t.contiguous().cpu() if t.data_ptr() not in seen else t.cpu().clone()
            seen.add(t.data_ptr())
        with atomic_path(self._path(key)) as temporary:
            save_file(own, temporary)

    def get(self, key: str, prefix: str) -> dict[str, Tensor]:
        """Return the tensors of one batch whose name starts with `prefix`, by the rest of the name."""
        if key in self._memory:
            return {k.removeprefix(prefix): t for k, t in self._memory[key].items() if k.startswith(prefix)}
        with safe_open(self._path(key), "pt") as file:
            return {k.removeprefix(prefix): file.get_tensor(k) for k in file.keys() if k.startswith(prefix)}  # noqa: SIM118

    def drop(self, key: str, prefix: str) -> None:
        """Free memory that is needed no more; files stay until the end."""
        for name in [k for k in self._memory.get(key, ()) if k.startswith(prefix)]:
            del self._memory[key][name]

    def save_sums(self, sums: Mapping[str, Tensor], finished: int) -> None:
        """Write the sums over the first `finished` products, if they are to last and saving has not just taken long."""
        started = time.monotonic()
        if not self.lasting or started < self._saved + PATIENCE * self._pause:
            return
        with atomic_path(self._path("sums")) as temporary:
            save_file({**{k: t.cpu() for k, t in sums.items()}, "finished": torch.tensor(finished)}, temporary)
        self._saved = time.monotonic()
        self._pause = self._saved - started

    def load_sums(self) -> tuple[dict[str, Tensor], int]:
        """Return the sums and the number of finished products; empty and 0 at the start."""
        if not self.lasting or not self._path("sums").is_file():
            return {}, 0
        with safe_open(self._path("sums"), "pt") as file:
            sums = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        return sums, int(sums.pop("finished"))

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Take a folder for a job, or go on with the same job; refuse any other."""
    note = folder / "job.json"
    if note.is_file():
        there = read_json(note)
        different = sorted(k for k in there.keys() | job.keys() if there.get(k) != job.get(k))
        if different:
            raise InputError(
                f"{folder} holds the start of another kernel (it differs in {', '.join(different)}): "
                "give another folder, or delete this one."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there and holds no kernel that was begun: give the name of a new folder.")
    else:
        write_json(note, job)


def pack(chunk: Chunk, prefix: str) -> dict[str, Tensor]:
    """Return a chunk's tensors by name, to be put into a store."""
    named: dict[str, Tensor] = {}
    for factor in chunk:
        start = f"{prefix}{type(factor).__name__}."
        named |= {start + k: t for k, t in tensors_of(factor).items()}
        if isinstance(factor, Rows):
            named[start + "texts"] = torch.tensor(factor.texts)
    return named


def unpack(named: Mapping[str, Tensor], device: torch.device) -> Chunk:
    """Return the chunk of `pack`, with the prefix taken off the names, on a device."""
    chunk: list[Factor] = []
    for kind in ("Outer", "Rows", "Vector"):
        values: dict[str, Any] = {k.split(".")[1]: t.to(device) for k, t in named.items() if k.startswith(kind + ".")}
        if "texts" in values:
            values["texts"] = int(values["texts"])
        if values:
            chunk.append(KINDS[kind](**values))
    return tuple(chunk)
