"""Where a number comes from: the code, the machine, the seed and the time behind a stored result.

A result is only worth storing if one can tell whether it still belongs to the code. `code_hash` follows
the imports of a module inside the package and hashes what the code *does*: comments, docstrings and
formatting may change freely, a changed formula is seen.

Example
-------
>>> code_hash("ntkft.spectrum") == code_hash("ntkft.spectrum")
True
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import os
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ntkft import _WHERE

PACKAGE = Path(__file__).parent
# These hold no mathematics: where files lie, how errors read. Assets are pinned by their own hashes.
INERT = {"ntkft", "ntkft.errors", "ntkft.files", "ntkft.assets", "ntkft.catalogue", "ntkft.provenance", "ntkft.experiments"}

# The engine is exact by contract: its numbers are fixed by mathematics, tests hold it to plain autograd and to entries of
# the stored kernels. So a faster engine does not make a result stale; a wrong one fails those tests.
BY_CONTRACT = "ntkft.ntk"


def code_hash(module: str) -> str:
    """Return the SHA-256 of a module of the package and of all it imports from the package.

    The kernel engine (`BY_CONTRACT`) counts only for its own modules.

    Parameters
    ----------
    module : str
        Dotted name, such as ``"ntkft.experiments.stopping_rule"``.
    """
    seen: dict[str, str] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen or name in INERT:
            continue
        if name.startswith(BY_CONTRACT) and not module.startswith(BY_CONTRACT):
            continue
        seen[name], imports = _digest(_path(name))
        todo += imports
    return hashlib.sha256("".join(f"{k}:{seen[k]}\n" for k in sorted(seen)).encode()).hexdigest()


def _path(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _digest(path: Path) -> tuple[str, tuple[str, ...]]:
    """Hash one file's syntax tree without docstrings; list the modules of the package that it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ntkft":
            names = [_public(f"{node.module}.{alias.name}") for alias in node.names]
            imports += [n for n in names if _path(n).is_file()] or [node.module]
            imports.append(node.module)
        elif isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names if alias.name.split(".")[0] == "ntkft"]
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ntkft"
        ):
            name = _public(f"ntkft.{node.attr}")
            imports += [name] if _path(name).is_file() else []
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), tuple(imports)


def _public(name: str) -> str:
    """Return the module behind a name that the package loads on first use, such as ``ntkft.load_task``; others as they are."""
    top, _, rest = name.partition(".")
    return f"{top}.{_WHERE[rest]}" if rest in _WHERE else name


def peak_memory() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def manifest(module: str, *, seed: int) -> dict[str, Any]:
    """Describe a run that is about to start: seed, commit, code hash, versions, hardware, date.

    Taken before the run, so that it speaks of the code that ran, whatever is edited meanwhile.
    """
    packages = ("torch", "transformers", "numpy", "scipy")
    return {
        "module": module,
        "seed": seed,
        "code_sha256": code_hash(module),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "device": "cpu"},
    }


def _commit() -> str:
    """Return the commit of the checkout, marked if the tree has changes; 'unknown' outside a checkout."""
    try:
        run = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=12", "--match="]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
