"""The outcome of an experiment: numbers, arrays, and the manifest that says where they come from.

Example
-------
>>> import tempfile, numpy as np
>>> result = Result("demo", "quick", {"eta": 0.3}, {"curve": np.arange(3.0)}, {"seed": 0})
>>> folder = result.save(tempfile.mkdtemp())
>>> Result.load(folder).values["eta"]
0.3
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ntkft.assets import home
from ntkft.errors import InputError
from ntkft.files import atomic_path, read_json, sha256_file, write_json
from ntkft.provenance import PACKAGE, code_hash

RESULTS = PACKAGE.parent / "results"


@dataclass(frozen=True)
class Result:
    """What one experiment found.

    Attributes
    ----------
    chapter, tier : str
        Which experiment, quick or full.
    values : dict
        Numbers, strings and short lists (JSON).
    arrays : dict of ndarray
        Curves and matrices.
    manifest : dict
        Seed, commit, code hash, versions, hardware, seconds, peak memory.
    """

    chapter: str
    tier: str
    values: dict[str, Any]
    arrays: dict[str, np.ndarray]
    manifest: dict[str, Any]

    def save(self, folder: str | Path | None = None) -> Path:
        """Write values, arrays and manifest to `folder` (default ``results/<chapter>``); return the folder.

        The manifest is written last and holds the hashes of the other two, so a half-written result is noticed.
        """
        folder = RESULTS / self.chapter if folder is None else Path(folder)
        values, arrays = folder / f"{self.tier}.json", folder / f"{self.tier}.npz"
        write_json(values, _plain(self.values))
        with atomic_path(arrays) as temporary:
            np.savez_compressed(temporary, **self.arrays)  # type: ignore[arg-type]
        hashes = {path.name: sha256_file(path) for path in (values, arrays)}
        about = self.manifest | {"chapter": self.chapter, "tier": self.tier, "sha256": hashes}
        write_json(folder / f"{self.tier}.manifest.json", _plain(about))
        return folder

    @classmethod
    def load(cls, folder: str | Path, tier: str | None = None) -> Result:
        """Read what `save` wrote; `tier` may be left out when the folder holds one tier.

        Raises
        ------
        InputError
            If there is no result, or a file does not match the manifest's hash.
        """
        folder = Path(folder)
        found = sorted(folder.glob(f"{tier or '*'}.manifest.json"))
        if len(found) != 1:
            raise InputError(
                f"{folder} holds {len(found)} results of tier {tier or 'any'} and one is needed: "
                f"make it with `ntkft run {folder.name} --tier full`."
            )
        about = read_json(found[0])
        for name, digest in about["sha256"].items():
            if not (folder / name).is_file() or sha256_file(folder / name) != digest:
                raise InputError(
                    f"{folder / name} does not match its manifest: "
                    f"run `ntkft run {about['chapter']} --tier {about['tier']}` again."
                )
        with np.load(folder / f"{about['tier']}.npz", allow_pickle=False) as data:
            arrays = {key: data[key] for key in data.files}
        values = _restored(read_json(folder / f"{about['tier']}.json"))
        return cls(about["chapter"], about["tier"], values, arrays, about)

    @property
    def stale(self) -> bool:
        """Whether the code behind the result has changed since it was run."""
        return self.manifest.get("code_sha256") != code_hash(self.manifest["module"])


def resumable(
    module: str, key: str, compute: Callable[[], dict[str, np.ndarray]], *, keep: bool = True
) -> dict[str, np.ndarray]:
    """Return ``compute()``, kept on disk so that an interrupted full run goes on where it stopped.

    Parameters
    ----------
    module : str
        The experiment; parts made by other code (`code_hash`) are not used.
    key : str
        Name of the part.
    compute : callable
        Gives the part, a dict of arrays. Its seconds are stored with it.
    keep : bool
        False: always compute, store nothing (quick tier).
    """
    if not keep:
        return compute()
    path = home() / "runs" / module.rsplit(".", 1)[-1] / code_hash(module)[:16] / f"{key}.npz"
    if not path.is_file():
        started = time.perf_counter()
        part = compute()
        part["seconds"] = np.array(time.perf_counter() - started)
        with atomic_path(path) as temporary:
            np.savez(temporary, **part)  # type: ignore[arg-type]
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


def _plain(value: Any) -> Any:
    """Turn numpy numbers and arrays into JSON; infinities into strings, since JSON has none."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _restored(value: Any) -> Any:
    """Undo `_plain`'s way of writing numbers that are not finite."""
    if isinstance(value, dict):
        return {k: _restored(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_restored(v) for v in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
