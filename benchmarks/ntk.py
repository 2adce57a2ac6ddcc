"""Our kernel against the other ways to compute it: seconds, peak memory, and whether the numbers agree, in one run.

    python benchmarks/ntk.py --jax-python jaxenv/bin/python        # all cases, about 35 minutes on two cores
    python benchmarks/ntk.py --only minilm-equal-64                # one case

Each measurement is a process of its own, started on an idle machine: it loads the model, warms up on two texts, and
counts seconds and peak memory of the kernel alone. A process may hold at most --memory-limit bytes; what it says when it fails
is reported as it is. A method that failed is not tried on more texts. Results go to results/kernel_engine/benchmark.json, after
each measurement; a run that was interrupted goes on with --resume.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "kernel_engine" / "benchmark.json"
PEERS = ("loop", "loop_lean", "torch_func", "nngeometry", "neural_tangents")

# case -> (model, texts, equal length, methods)
CASES: dict[str, tuple[str, int, bool, tuple[str, ...]]] = {
    "minilm-equal-16": ("minilm", 16, True, ("ours", *PEERS)),
    "minilm-equal-64": ("minilm", 64, True, ("ours", *PEERS)),
    "minilm-equal-256": ("minilm", 256, True, ("ours", *PEERS)),
    "minilm-equal-1024": ("minilm", 1024, True, ("ours", *PEERS)),
    "smollm2-equal-64": ("smollm2", 64, True, ("ours", *PEERS)),
    "smollm2-reviews-256": ("smollm2", 256, False, ("prototype", "ours", "ours_fast")),
    "minilm-reviews-256": ("minilm", 256, False, ("ours", "ours_fast")),
    "minilm-reviews-512": ("minilm", 512, False, ("ours",)),
    "minilm-reviews-1024": ("minilm", 1024, False, ("ours", "ours_fast")),
    "minilm-reviews-2048": ("minilm", 2048, False, ("ours",)),
}
MEMORY = {"minilm": "6GB", "smollm2": "2.8GB"}  # given to ours
LENGTH = 24  # tokens of a text in the cases of equal length


def status(key: str) -> int:
    """Return a field of this process's status, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def inputs(model: str, n: int, equal: bool) -> tuple[Any, list[list[int]]]:
    """Return the read-out and the token ids: product reviews, or their tokens repeated and cut to one length."""
    import methods

    import ntkft

    task = ntkft.load_task("amazon", n=n, seed=0)
    loaded = ntkft.load_model(model)
    plain = ntkft.pooled_readout(loaded) if model == "minilm" else ntkft.prompt_readout(loaded)
    ids = plain.encode(task.texts)
    if equal:
        ids = [[row[0], *(row[1:-1] * LENGTH)[: LENGTH - 2], row[-1]] if len(row) > 2 else row * (LENGTH // 2) for row in ids]
    return methods.TokenReadout(plain), ids


def gemm_rate() -> float:
    """Measure float32 multiply-adds a second of a large product."""
    import torch

    a = torch.randn(1024, 8192, generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ a.T
        best = min(best, time.perf_counter() - started)
    return 1024 * 1024 * 8192 / best


def child(method: str, case: str, out: str) -> dict[str, Any]:
    """Measure one method on one case in this process; the matrix goes to `out`."""
    import methods
    import torch

    from ntkft.ntk.plan import TOKENS, token_batches
    from ntkft.ntk.release import release_memory

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, n, equal, _ = CASES[case]
    readout, ids = inputs(model, n, equal)
    found: dict[str, Any] = {"tokens": int(sum(map(len, ids)))}
    options: dict[str, Any] = {}
    if method.startswith("ours"):
        options = {"memory": MEMORY[model], "precision": "fast" if method == "ours_fast" else "exact"}
    run = getattr(methods, "ours" if method.startswith("ours") else method)
    run(readout, ids[:2], **(options | {"precision": "exact"} if options else {}))  # warm up
    if method.startswith("ours"):
        import ntkft

        plan = ntkft.empirical_ntk(readout, methods.as_texts(ids), plan_only=True, **options)
        found["planned_seconds"], found["planned_peak"] = plan.seconds, plan.peak_bytes
        batches = [[ids[i] for i in batch] for batch in token_batches(ids, TOKENS)]
        methods.passes(readout, batches[:1])
        found["passes_seconds"] = methods.passes(readout, batches)
        body = [p.numel() for k, p in readout.module.named_parameters() if "embed" not in k]
        found["parameters"] = sum(body)
        found["gemm_rate"] = gemm_rate()
    release_memory()
    base = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # peaks count from here
    started = time.perf_counter()
    matrix, extra = run(readout, ids, **options)
    found["seconds"] = time.perf_counter() - started
    found["peak_bytes"], found["above_model"] = status("VmHWM"), status("VmHWM") - base
    if method.startswith("ours"):
        found["gemm_rate"] = (found["gemm_rate"] + gemm_rate()) / 2
        found["limit_seconds"] = found["passes_seconds"] + n**2 * found["parameters"] / 2 / found["gemm_rate"]
    np.save(out, matrix)
    return found | extra


def child_jax(python: str, case: str, out: str) -> dict[str, Any]:
    """Measure neural-tangents in its own environment."""
    model, n, equal, _ = CASES[case]
    if model != "minilm":
        raise RuntimeError("not measured: the model is not carried to JAX")
    readout, ids = inputs(model, n, equal)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        tensors = {k: p.detach().numpy() for k, p in readout.module.named_parameters()}
        np.savez(weights, ids=np.array(ids), **tensors)
        del readout, tensors
        run = subprocess.run(
            [python, str(ROOT / "benchmarks" / "jax_minilm.py"), str(weights), out], capture_output=True, text=True
        )
    if run.returncode:
        noise = ("E0000", "W0000", "WARNING", "I0000")  # its libraries look for a GPU
        words = [line for line in run.stderr.strip().splitlines() if line.strip() and not line.startswith(noise)]
        raise RuntimeError((words or [f"ended with status {run.returncode}"])[-1])
    return json.loads(run.stdout.strip().splitlines()[-1])


def measure(method: str, case: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Run one measurement in a process of its own; return its numbers or its last words."""
    out = str(Path(folder) / f"{case}-{method}.npy")
    command = [sys.executable, __file__, "--child", method, case, out]
    if method == "neural_tangents":
        if not options.jax_python:
            return {"failed": "not measured: no --jax-python was given"}
        command += ["--jax-python", options.jax_python]
    limit = int(options.memory_limit)
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=options.timeout,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {options.timeout:.0f} s"}
    if run.returncode:
        last = [line for line in run.stderr.strip().splitlines() if line.strip()] or [f"ended by signal {-run.returncode}"]
        return {"failed": last[-1][:300]}
    return json.loads(run.stdout.strip().splitlines()[-1])


def agreement(folder: str, case: str, method: str) -> dict[str, float]:
    """Compare a method's matrix with ours (exact): largest relative difference, and eigenvalues down to rank n/2."""
    exact, other = (np.load(Path(folder) / f"{case}-{m}.npy") for m in ("ours", method))
    n = len(exact)
    a, b = (np.linalg.eigvalsh(m / n)[::-1][: n // 2] for m in (exact, other))
    return {
        "difference": float(np.abs(other - exact).max() / np.abs(exact).max()),
        "eigenvalue_difference": float(np.abs(b / a - 1).max()),
    }


def main() -> None:
    """Run what the options name and write the results after each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, help="cases to run (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help="where the results go")
    parser.add_argument("--resume", action="store_true", help="keep the measurements that are in --out already")
    parser.add_argument("--jax-python", help="interpreter of an environment with neural-tangents 0.6.5")
    parser.add_argument("--memory-limit", type=float, default=21e9, help="bytes that one process may hold")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one measurement may take")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        method, case, out = options.child
        sys.path.insert(0, str(ROOT))
        result = child_jax(options.jax_python, case, out) if method == "neural_tangents" else child(method, case, out)
        print(json.dumps(result))
        return

    sys.path.insert(0, str(ROOT))
    from ntkft.files import read_json, write_json
    from ntkft.provenance import manifest

    results = read_json(options.out) if options.resume and options.out.is_file() else {"cases": {}}
    results["manifest"] = manifest("ntkft.ntk.engine", seed=0) | {"memory_limit": options.memory_limit}
    failed: set[tuple[str, str]] = set()
    with tempfile.TemporaryDirectory() as folder:
        for case in options.only or CASES:
            model, n, equal, methods = CASES[case]
            entry = results["cases"].setdefault(case, {"model": model, "n": n, "equal": equal, "methods": {}})
            for method in methods:
                known = entry["methods"].get(method)
                if known and (method != "ours" or set(methods) <= set(entry["methods"])):
                    found = known  # ours is measured anew where others are still to be compared with it
                elif (model, method) in failed:
                    found = {"failed": "not tried: it failed on fewer texts"}
                else:
                    found = measure(method, case, options, folder)
                if "failed" in found:
                    failed.add((model, method))
                elif method != "ours" and not {"without", "difference"} & set(found):
                    found |= agreement(folder, case, method)
                entry["methods"][method] = found
                write_json(options.out, results)
                said = found.get("failed") or f"{found['seconds']:.2f} s, {found['peak_bytes'] / 1e9:.2f} GB"
                print(case, method, said, flush=True)


if __name__ == "__main__":
    main()
