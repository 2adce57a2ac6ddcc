"""Seconds for a plan: two seconds of the very work it lists, timed on the machine at hand.

One batch is captured; one block of explicit gradients is formed and multiplied; two batches are contracted by ghost; and, if
the factors go to disk, some are written there. Everything else is proportion.

Example
-------
>>> plan = estimate(plan, readout, work, want, rows)                          # doctest: +SKIP
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ntkft.ntk.capture import Wanted, capture
from ntkft.ntk.contract import _ghost, _gradients, _speed
from ntkft.ntk.factors import Outer
from ntkft.ntk.layout import assemble
from ntkft.ntk.plan import Plan, Workload
from ntkft.ntk.precision import EXACT, SAMPLE, Precision
from ntkft.readout import Readout

SECONDS = 2.0  # of measurement, roughly
CHECKED = 2  # texts whose gradients are also computed by autograd


def estimate(
    plan: Plan, readout: Readout, work: Workload, want: Wanted, rows: list[list[int]], precision: Precision
) -> Plan:
    """Return the plan with its seconds."""
    pass_seconds = _passes(plan, readout, work, want, rows)
    if precision.mode != "exact":  # the sample that tells the error
        pass_seconds *= 1 + min(1.0, SAMPLE / plan.texts[0])
    if work.disk_bytes:  # written once, read about once
        pass_seconds += 1.5 * work.disk_bytes / _disk_rate()
    explicit, forming, ghost = _rates(work, next(readout.module.parameters()))
    product = plan.cost.slowness / explicit + plan.cost.forming / forming + plan.cost.ghost / ghost
    return replace(plan, pass_seconds=pass_seconds, product_seconds=product)


def _timed(run: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Return the median time of one run, from as many as fit into `seconds`; at least one after a first that is not counted."""

    def once() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    end = time.perf_counter() + seconds
    once()
    times = [once()]
    while time.perf_counter() + times[-1] < end:
        times.append(once())
    return float(np.median(times))


def _passes(plan: Plan, readout: Readout, work: Workload, want: Wanted, rows: list[list[int]]) -> float:
    """Estimate all forward and backward passes from a short batch and one of usual size: seconds = a + b x tokens."""
    device = next(readout.module.parameters()).device
    order = sorted(range(len(work.rows)), key=lambda k: work.row_shapes[k][0] * work.row_shapes[k][1])
    usual = work.rows[order[len(order) // 2]]
    longest = max(len(rows[i]) for i in usual)

    def run(batch: list[list[int]]) -> None:
        uses = capture(readout, batch, want).uses
        for site in work.sites:
            for one in uses:
                assemble(site, one)

    few = [rows[usual[-1]]] * (2 if work.apart and len(usual) > 1 else 1)
    small = _timed(lambda: run(few), 0.15 * SECONDS, device)
    batches, per_batch = len(work.rows) + len(work.columns or ()), small
    if not work.apart or len(usual) <= len(few):
        texts = plan.texts[0] + (plan.texts[1] if work.columns is not None else 0)
        return small * (texts / len(few) + 3 * CHECKED)
    # A batch that would take long is measured in part.
    part = usual if small * len(usual) / len(few) < 1.5 * SECONDS else usual[: max(2, len(usual) // 2)]
    big = _timed(lambda: run([rows[i] for i in part]), 0.2 * SECONDS, device)
    slope = max(0.0, (big - small) / ((len(part) - len(few)) * longest))
    per_batch = max(0.0, small - slope * len(few) * longest)
    return per_batch * batches + slope * plan.tokens + 3 * CHECKED * small


def _rates(work: Workload, like: torch.Tensor) -> tuple[float, float, float]:
    """Measure multiply-adds a second of explicit products (of many texts), of forming gradients, and of ghost products."""
    outer = [k for k, site in enumerate(work.sites) if site.kinds[0] == "Outer"]
    if not outer:
        return (1e10,) * 3
    device, dtype = like.device, like.dtype
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype).to(device)

    shapes = sorted(work.row_shapes, key=lambda x: x[0] * x[1])
    b, t = shapes[len(shapes) // 2]
    middle = sorted(outer, key=lambda k: work.widths[k][0] * work.widths[k][1])[len(outer) // 2]
    p, q = work.widths[middle]
    factor = Outer(random(b, t, p), random(b, t, q))

    texts = min(sum(b for b, _ in work.row_shapes), 512)
    entries = max(64, min(work.scratch // (texts * like.element_size()), 16384))
    block, out = random(texts, entries), torch.zeros(texts, texts, dtype=torch.float64, device=device)

    buffers: dict[str, torch.Tensor] = {}

    def explicit() -> None:
        for piece in EXACT.slices(block, None, buffers):
            out.add_(piece.product(slice(None), slice(None)))

    window = (slice(0, max(1, min(p, 16384 // min(q, 512)))), slice(0, min(q, 512)))
    buffer = random(b * window[0].stop * window[1].stop)
    pair = out.new_zeros(b, b)

    def ghost() -> None:
        _ghost(factor, factor, pair, buffers)

    share = 0.15 * SECONDS
    return (
        texts**2 * entries / (_timed(explicit, share, device) * _speed(texts)),
        b * t * window[0].stop * window[1].stop / _timed(lambda: _gradients([factor], window, buffer), share, device),
        (b * t) ** 2 * (p + q) / _timed(ghost, share, device),
    )


def _disk_rate() -> float:
    """Measure bytes a second of writing to the temporary folder."""
    block = bytes(8 * 2**20)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with open(Path(folder) / "block", "wb") as file:
            for _ in range(8):
                file.write(block)
        return 8 * len(block) / (time.perf_counter() - started)
