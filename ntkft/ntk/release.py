"""Give freed memory back to the operating system, where the C library would keep it for later."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from functools import cache


@cache
def _trim() -> Callable[[int], int] | None:
    library = ctypes.util.find_library("c")
    return getattr(ctypes.CDLL(library), "malloc_trim", None) if library else None


def release_memory() -> None:
    """Return unused heap pages to the system (glibc); does nothing elsewhere. A budget counts what the process holds."""
    trim = _trim()
    if trim is not None:
        trim(0)
