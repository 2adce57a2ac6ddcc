"""Every stopping rule on the same real fine-tuning runs, and what the kernel did meanwhile.

The runs are made by `llm_runs` and kept, packed, in ``results/llm_training/runs``: which rule stops where is computed from them
here, so the quick tier repeats the whole analysis and adds one short run of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import ntkft
from ntkft import stopping
from ntkft.descent import Descent, descend
from ntkft.experiments import llm_classes, llm_runs
from ntkft.experiments.llm_classes import Classes
from ntkft.experiments.llm_runs import BATCH, DELTA, Run, kept, probe, run_path
from ntkft.experiments.llm_stopping import PATIENCE, patient
from ntkft.experiments.result import RESULTS, resumable
from ntkft.files import atomic_path, read_json, write_json
from ntkft.logistic import cross_entropy, logistic_path
from ntkft.monitor import (
    averaged_kernels,
    commutator_bound,
    drift_aware_rule,
    residual_clock,
)
from ntkft.ntk.kernel import centred
from ntkft.provenance import code_hash
from ntkft.spectrum import Spectrum
from ntkft.twin_rule import twin_stop

FOLDER = RESULTS / "llm_training" / "runs"
DOMAINS = ("amazon", "movies", "nyt", "tweets")
RULES = (
    "radius",
    "clock",
    "drift_aware",
    "drift_scaled",
    "discrepancy",
    "sure",
    "twin",
    "holdout",
    "three_epochs",
    "end",
)
FLAT = 0.10  # the flat bottom: where the error is within this share of its least value


def code(run: Run | Classes) -> str:
    """Return the hash of the code that makes a run."""
    return code_hash(llm_runs.__name__ if isinstance(run, Run) else llm_classes.__name__)


def pack(run: Run | Classes) -> None:
    """Make a run unless the results hold it, and keep it there: symmetric matrices as one float32 triangle."""
    index = read_json(FOLDER / "index.json") if (FOLDER / "index.json").is_file() else {}
    if index.get(run.key, {}).get("code_sha256") == code(run) and (FOLDER / f"{run.key}.npz").is_file():
        return
    if isinstance(run, Run):
        first = replace(run, method="sgd", kind="main")
        # A run begins with the prediction of that one: spare making it again.
        if first != run and (known := load(first)) is not None:
            resumable(llm_runs.__name__, first.key, lambda: known)
        found = llm_runs.outcome(run)
    else:
        found = llm_classes.outcome(run)
    small = {k: v for k, v in found.items() if k not in ("kernel", "kernels", "scores", "seconds")}
    small["scores"] = found["scores"].astype(np.float32)
    for key in ("kernel", "kernels"):
        if key in found and found[key].size:
            upper = np.triu_indices(found[key].shape[-1])
            small[key] = found[key][..., *upper]
    with atomic_path(FOLDER / f"{run.key}.npz") as temporary:
        np.savez_compressed(temporary, **small)  # type: ignore[arg-type]
    index[run.key] = {"seconds": float(found["seconds"]), "code_sha256": code(run)}
    write_json(FOLDER / "index.json", index)


def load(run: Run | Classes) -> dict[str, np.ndarray] | None:
    """Return a packed run with its matrices whole again, or None if it has not been made."""
    path = FOLDER / f"{run.key}.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as data:
        found = {key: data[key].astype(np.float64) if data[key].dtype == np.float32 else data[key] for key in data.files}
    for key, n in (("kernel", found["scores"].shape[1]), ("kernels", len(found["rows"]))):
        if key in found and found[key].size:
            full = np.zeros((*found[key].shape[:-1], n, n))
            full[..., *np.triu_indices(n)] = found[key]
            found[key] = full + np.swapaxes(np.triu(full, 1), -1, -2)
    return found


def fitted(run: dict[str, np.ndarray], y: np.ndarray) -> np.ndarray:
    """Return the centred model's values on all texts at each look, (k, N): raw scores with the training mean set right."""
    return run["scores"] + (y.mean() - run["scores"][:, run["rows"]].mean(1))[:, None]


def path_errors(run: dict[str, np.ndarray], y: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the in-sample and the test error against the mean of all raters, (k,) each."""
    square = (fitted(run, y) - run["reference"]) ** 2
    return square[:, :n].mean(1), square[:, n:].mean(1)


def crossing(when: np.ndarray, values: np.ndarray, level: float) -> float:
    """Return the first time at which `values`, joined by lines, have come down to `level`; the last time if never."""
    below = values <= level
    if not below.any():
        return float(when[-1])
    k = int(np.argmax(below))
    if k == 0:
        return float(when[0])
    share = (values[k - 1] - level) / (values[k - 1] - values[k])
    return float(when[k - 1] + share * (when[k] - when[k - 1]))


def closed_form(main: dict[str, np.ndarray], n: int) -> Descent:
    """Return gradient flow with the kernel before training on this run's labels, with an intercept."""
    return descend(main["kernel"][:n, :n], main["y"], main["scores"][0, :n], intercept=True)


def kernel_path(run: dict[str, np.ndarray], first: dict[str, np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return kernel times (q,) and centred, normalised kernels (q, n, n), that before training included."""
    eta = np.concatenate([[0], run["kernel_step"]]) * float(run["step_size"])
    matrices = [first["kernel"][:n, :n], *run["kernels"]]
    return eta, np.array([centred(m) / n for m in matrices])


def stops(run: Run, first: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """Return, for one main run, the step at which each rule stops, the errors there, and the paths.

    Parameters
    ----------
    run : Run
        Of kind "main" and square loss.
    first : dict
        The SGD run of the same model, task and seed: it holds the kernel before training.
    """
    main = load(run)
    if main is None:
        return None
    y, n, sigma, step = main["y"], len(main["y"]), float(main["sigma"]), float(main["step_size"])
    when, eta_hat = main["step"].astype(float), float(first["eta"])
    path = closed_form(first, n)
    residual = ((fitted(main, y)[:, :n] - y) ** 2).mean(1)
    inside, test = path_errors(main, y, n)
    clock = np.array([residual_clock(path, float(r)) for r in residual])
    at: dict[str, float] = {
        "clock": crossing(when, -np.minimum(clock, 1e6 * eta_hat), -eta_hat),
        "discrepancy": crossing(when, residual, sigma**2),
        "three_epochs": 3 * n / (BATCH if run.method != "gd" else n),
        "end": when[-1],
    }
    found: dict[str, Any] = {
        "step": when,
        "residual": residual,
        "inside": inside,
        "test": test,
        "clock": clock,
    }
    found |= {"eta_hat": eta_hat, "sigma": sigma, "step_size": step}
    times, matrices = kernel_path(main, first, n)
    found |= {
        "trace": np.trace(matrices, axis1=1, axis2=2),
        "top": np.array([np.linalg.norm(m, 2) for m in matrices]),
    }
    found["kernel_step"] = np.concatenate([[0], main["kernel_step"]])
    if run.method != "adamw":
        eta = when * step
        outside = path.predict(eta, first["kernel"][n:, :n], first["scores"][0, n:])
        found |= {
            "eta": eta,
            "kernel_residual": path.residual(eta),
            "kernel_inside": ((path.fitted(eta) - main["reference"][:n]) ** 2).mean(1),
            "kernel_test": ((outside - main["reference"][n:]) ** 2).mean(1),
        }
        average = averaged_kernels(times, matrices)
        spectra = [Spectrum(np.linalg.eigvalsh(m)) for m in average]
        at["radius"] = eta_hat / step
        at["drift_aware"] = drift_aware_rule(times, spectra, sigma).eta / step
        # A kernel c times as large makes the target's norm √c times as small: R² shrinks as the trace grows.
        trace = np.trace(average, axis1=1, axis2=2)
        at["drift_scaled"] = drift_aware_rule(times, spectra, sigma, np.sqrt(trace[0] / trace)).eta / step
        at["sure"] = stopping.sure_rule(path, sigma).eta / step
        found |= {
            "averaged_gap": _averaged_gap(main, y, times, average),
            "commutator": commutator_bound(times, matrices),
        }
    twin = load(Run(run.model, run.task, run.method, run.seed, "twin"))
    if twin is not None:
        b = probe(run.seed, n)
        twin_at = twin_stop(fitted(main, y)[:, :n], fitted(twin, y + DELTA * b)[:, :n], y, b, DELTA, sigma)
        found |= {"freedom": twin_at.degrees_of_freedom, "twin_risk": twin_at.risk}
        if run.method != "adamw":
            found["kernel_freedom"] = path.degrees_of_freedom(when * step)
        at["twin"] = float(when[twin_at.best])
    excess = {}
    for rule, s in at.items():
        s = min(s, when[-1])
        excess[rule] = (
            np.interp(s, when, inside) / inside.min() - 1,
            np.interp(s, when, test) / test.min() - 1,
        )
    held = load(Run(run.model, run.task, run.method, run.seed, "holdout"))
    if held is not None:
        stop = _patience(held, y, kept(run.seed, n))
        ours = path_errors(held, y[held["rows"]], n)
        at["holdout"] = float(held["step"][stop])
        excess["holdout"] = (ours[0][stop] / inside.min() - 1, ours[1][stop] / test.min() - 1)
    return found | {"at": at, "excess": excess, "flat": _flat(when, inside), "flat_test": _flat(when, test)}


def classes(run: Classes) -> dict[str, np.ndarray] | None:
    """Return the paths of a logistic run and of the kernel: log-losses and share of right answers at each look; λ_1 along it."""
    main = load(run)
    if main is None:
        return None
    y, n = main["y"], len(main["y"])
    real = main["scores"] - main["scores"][:, :n].mean(1)[:, None]
    kernel, cross = main["kernel"][:n, :n], main["kernel"][n:, :n]
    across = cross - cross.mean(1)[:, None] - kernel.mean(0) + kernel.mean()
    eta = main["step"] * float(main["step_size"])
    path = logistic_path(centred(kernel), y, eta, f0=real[0, :n])
    found = {"step": main["step"], "eta": eta, "eta_hat": main["eta"], "unit": main["step_size"]}
    for name, train, test in (
        ("real", real[:, :n], real[:, n:]),
        ("kernel", path.fitted, path.predict(across, real[0, n:])),
    ):
        found[f"{name}_train_loss"] = np.array([cross_entropy(f, y) for f in train])
        found[f"{name}_loss"] = np.array([cross_entropy(f, main["reference"][n:]) for f in test])
        found[f"{name}_right"] = (np.sign(test) == main["reference"][n:]).mean(1)
    found["kernel_step"] = np.concatenate([[0], main["kernel_step"]])
    stack = [kernel, *main["kernels"]]
    found["lambda_1"] = np.array([np.linalg.eigvalsh(centred(k) / n)[-1] for k in stack])
    return found


def _patience(held: dict[str, np.ndarray], y: np.ndarray, rows: np.ndarray) -> int:
    """Return the look that hold-out with patience keeps: the best error on the labels left out before it waited in vain."""
    out = np.setdiff1d(np.arange(len(y)), rows)
    error = ((fitted(held, y[rows])[:, out] - y[out]) ** 2).mean(1)
    return patient(error)


def _flat(when: np.ndarray, error: np.ndarray) -> tuple[float, float]:
    """Return first and last step of the stretch around the least error that stays within `FLAT` of it."""
    good = error <= (1 + FLAT) * error.min()
    k = int(error.argmin())
    low, high = k, k
    while low > 0 and good[low - 1]:
        low -= 1
    while high < len(good) - 1 and good[high + 1]:
        high += 1
    return float(when[low]), float(when[high])


def _averaged_gap(main: dict[str, np.ndarray], y: np.ndarray, times: np.ndarray, average: np.ndarray) -> np.ndarray:
    """Return ‖r_t - e^{-t K̄_t} r_0‖_n / ‖r_0‖_n, and the same with the kernel before training, at the kernels' times: (2, q)."""
    n = len(y)
    looks = np.searchsorted(main["step"], times / float(main["step_size"]) - 1e-6)
    r = fitted(main, y)[looks][:, :n] - y
    gaps = []
    for kernels in (average, np.repeat(average[:1], len(average), 0)):
        row = []
        for k, t in enumerate(times):
            lam, u = np.linalg.eigh(kernels[k])
            row.append(np.linalg.norm(r[k] - (u * np.exp(-t * lam)) @ (u.T @ r[0])) / np.linalg.norm(r[0]))
        gaps.append(row)
    return np.array(gaps)


def interval(values: np.ndarray, seed: int = 0, draws: int = 4000) -> tuple[float, float, float]:
    """Return the median and its 95 % bootstrap interval over runs."""
    rng = np.random.default_rng(seed)
    resampled = np.median(values[rng.integers(0, len(values), (draws, len(values)))], axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def live(seed: int = 0) -> dict[str, np.ndarray]:
    """Return a short real run that a page can afford: MiniLM, 24 tweets, twelve steps, its kernel before and after."""
    task = ntkft.load_task("tweets", n=32, seed=0).redraw(1, seed=seed)
    readout = ntkft.pooled_readout(ntkft.load_model("minilm"), seed=0)
    n = 24
    kernel = ntkft.empirical_ntk(readout, task.texts, memory="300MB", progress=False)
    path = descend(kernel.block(np.arange(n)), task.y[:n], intercept=True)
    step = 0.25 / path.eigenvalues[0]
    how = {"step_size": step, "steps": 12, "batch_size": n, "every": 3, "kernels": (12,), "memory": "300MB"}
    run = run_path(readout, task.texts, task.y[:n], np.arange(n), method="sgd", **how)  # type: ignore[arg-type]
    run |= {"rows": np.arange(n), "reference": task.reference, "step_size": np.array(step)}
    residual = ((fitted(run, task.y[:n])[:, :n] - task.y[:n]) ** 2).mean(1)
    eta = run["step"] * step
    clock = np.array([residual_clock(path, float(r)) for r in residual])
    growth = np.trace(centred(run["kernels"][0].astype(float))) / np.trace(centred(kernel.block(np.arange(n)).matrix))
    return {
        "eta": eta,
        "residual": residual,
        "kernel_residual": path.residual(eta),
        "clock": clock,
        "growth": np.array(growth),
    }


def run(tier: str, seed: int = 0) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Analyse the stored runs (full tier: make what is missing first); see the module docstring."""
    from ntkft.experiments.llm_run_list import CLASSES, RUNS

    if tier == "full":
        for wanted in (RUNS, CLASSES):
            for one in wanted:
                pack(one)
    values: dict[str, Any] = {"rules": list(RULES), "delta": DELTA, "flat": FLAT, "patience": PATIENCE}
    arrays: dict[str, np.ndarray] = {}
    for model in ("minilm", "smollm2"):
        for method in ("sgd", "gd", "adamw"):
            chosen = [r for r in RUNS if (r.model, r.method, r.kind, r.loss) == (model, method, "main", "square")]
            found = [(r, stops(r, first)) for r in chosen if (first := load(Run(model, r.task, "sgd", r.seed))) is not None]
            _collect(f"{model}_{method}", [(r, s) for r, s in found if s is not None], values, arrays, seed)
    topics = {r.key: c for r in CLASSES if (c := classes(r)) is not None}
    if topics:
        values["classes_runs"] = list(topics)
        arrays |= {f"classes_{key}": np.stack([c[key] for c in topics.values()]) for key in next(iter(topics.values()))}
    if tier == "quick":
        arrays |= {f"live_{key}": value for key, value in live(seed).items()}
    return values, arrays


def _collect(
    name: str,
    runs: list[tuple[Run, dict[str, Any]]],
    values: dict[str, Any],
    arrays: dict[str, np.ndarray],
    seed: int,
) -> None:
    """Put the outcomes of one model and optimiser side by side: `name`_excess (runs, rules, 2), medians with intervals, paths."""
    if not runs:
        return
    values[f"{name}_runs"] = [f"{r.task}-{r.seed}" for r, _ in runs]
    table = np.array([[s["excess"].get(rule, (np.nan, np.nan)) for rule in RULES] for _, s in runs], dtype=float)
    when = np.array([[s["at"].get(rule, np.nan) for rule in RULES] for _, s in runs], dtype=float)
    arrays |= {f"{name}_excess": table, f"{name}_at": when}
    for k, rule in enumerate(RULES):
        if not np.isnan(table[:, k]).any():
            values[f"{name}_{rule}_inside"] = interval(table[:, k, 0], seed)
            values[f"{name}_{rule}_test"] = interval(table[:, k, 1], seed)
    lengths = {len(s["step"]) for _, s in runs}
    for key in runs[0][1]:
        if key not in ("at", "excess"):
            column = [np.asarray(s[key]) for _, s in runs if key in s]
            if len({c.shape for c in column}) == 1 and len(column) == len(runs):
                arrays[f"{name}_{key}"] = np.stack(column)
    if len(lengths) > 1:  # gradient descent runs to a multiple of its own predicted stop: paths on a common scale
        share = np.linspace(0, 1, 25)
        for key in (
            "residual",
            "inside",
            "test",
            "kernel_residual",
            "kernel_inside",
            "kernel_test",
            "clock",
            "eta",
        ):
            rows = [np.interp(share, s["step"] / s["step"][-1], s[key]) for _, s in runs if key in s]
            arrays |= {f"{name}_{key}": np.array(rows), f"{name}_share": share}
