"""Resolve `requirements.in` in a fresh environment and write the full lock, `requirements.txt`.

Usage: python tools/lock.py [the python to lock for]
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
# The full lock of the book: every package, one exact version. Made by `make lock` from requirements.in; do not edit.
# Without hashes, because torch has several builds of one version (CPU, CUDA) and the index decides which is installed.
"""


def main() -> int:
    """Write the lock; return the exit status."""
    python = sys.argv[1] if len(sys.argv) > 1 else sys.executable
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", "-r", str(ROOT / "requirements.in")], check=True)
        frozen = subprocess.run([*pip, "freeze", "--all"], check=True, capture_output=True, text=True).stdout
    write(frozen)
    return 0


def write(frozen: str) -> None:
    """Write the lines of `pip freeze --all` without pip itself and without local version labels such as `+cpu`."""
    pinned = [line for line in frozen.splitlines() if re.match(r"^(?!pip==|wheel==|ntkft==)[\w.-]+==", line)]
    lines = [re.sub(r"\+[\w.]+$", "", line) for line in pinned]
    (ROOT / "requirements.txt").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
