r"""What a kernel will take, before it is computed: batches, steps, memory, multiply-adds, the way of each layer, seconds.

A probe of the longest text shows how large the factors are and whether the model keeps the texts of a batch apart. From
there `divide` shares out the memory budget: part for one forward and backward pass, part for captured factors (on disk, if
they do not fit), part for products. `Workload.steps` lists the products in the order in which they are made; `describe`
adds up what they cost, and `measure` times two seconds of such work on the machine at hand.

Example
-------
>>> print(ntkft.empirical_ntk(readout, task.texts, plan_only=True))          # doctest: +SKIP
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ntkft.errors import InputError
from ntkft.ntk.capture import Captured, MixedBatch, Wanted, capture
from ntkft.ntk.contract import Cost, Shape, choose_way
from ntkft.ntk.factors import Outer, nbytes
from ntkft.ntk.layout import Site, assemble, find_sites
from ntkft.ntk.precision import EXACT, Precision
from ntkft.readout import Readout

TOKENS = 384  # of a batch: more do not make the pass faster on a few cores, and finer batches are cut more closely
SCRATCH = 128 * 2**20  # bytes of explicit gradients at a time: long products are fast ones


@dataclass(frozen=True)
class Step:
    """One product: a site, two outputs, and the batches of both sides; columns None for a symmetric block."""

    site: int
    k: int
    l: int  # noqa: E741
    rows: range
    columns: range | None


@dataclass(frozen=True)
class Workload:
    """How the work is cut.

    sizes : (bytes a text, bytes a token) of each site's factors. held : bytes of factors that stay in memory; the rest goes
    to disk, or all of it if `keep`. limit : bytes of one site's factors that are loaded together. apart : whether the
    model keeps the texts of a batch apart. trace : only equal outputs are multiplied.
    """

    sites: list[Site]
    rows: list[np.ndarray]
    columns: list[np.ndarray] | None
    row_shapes: list[Shape]
    column_shapes: list[Shape] | None
    outputs: int
    trace: bool
    apart: bool
    held: float
    keep: bool
    scratch: int
    limit: int
    sizes: list[tuple[float, float]]
    widths: list[tuple[int, int]]  # (p, q) of each site, (0, q) where there is no outer product
    token_bytes: int  # of one forward and backward pass
    fixed_bytes: int  # matrices of the kernel and its blocks
    check_bytes: int  # gradients of the check against autograd

    def bytes(self, site: int, shape: Shape) -> float:
        """Return the bytes of one output's factors of one batch."""
        per_text, per_token = self.sizes[site]
        return shape[0] * (per_text + shape[1] * per_token)

    @property
    def factor_bytes(self) -> float:
        """Bytes of everything captured."""
        shapes = self.row_shapes + (self.column_shapes or [])
        return self.outputs * sum(self.bytes(k, shape) for k in range(len(self.sites)) for shape in shapes)

    @property
    def disk_bytes(self) -> float:
        """Bytes of factors that are written to disk."""
        total = self.factor_bytes
        return total if self.keep else max(0.0, total - self.held)

    def segments(self, site: int, shapes: Sequence[Shape]) -> list[range]:
        """Cut the batches of one side into runs of which two fit into memory together; one run if all do."""
        sizes = [self.bytes(site, shape) for shape in shapes]
        if self.disk_bytes == 0 or sum(sizes) <= self.limit / 2:
            return [range(len(shapes))]
        runs, start, filled = [], 0, 0.0
        for k, size in enumerate(sizes):
            if k > start and filled + size > self.limit / 2:
                runs.append(range(start, k))
                start, filled = k, 0.0
            filled += size
        return [*runs, range(start, len(shapes))]

    def steps(self, sites: Sequence[int] | None = None) -> Iterator[Step]:
        """Yield the products, in order."""
        c = self.outputs
        for site in range(len(self.sites)) if sites is None else sites:
            left = self.segments(site, self.row_shapes)
            right = left if self.column_shapes is None else self.segments(site, self.column_shapes)
            for k in range(c):
                for l in (k,) if self.trace else range(k + 1 if self.columns is None else c):  # noqa: E741
                    symmetric = self.columns is None and k == l
                    for a, rows in enumerate(left):
                        for b, columns in enumerate(right[: a + 1] if symmetric else right):
                            yield Step(site, k, l, rows, None if symmetric and a == b else columns)

    def cost(self, step: Step, precision: Precision) -> tuple[Cost, set[str]]:
        """Return the multiply-adds of a step, and the ways it is done."""
        p, q = self.widths[step.site]
        rows = [self.row_shapes[i] for i in step.rows]
        other = self.row_shapes if self.column_shapes is None else self.column_shapes
        columns = None if step.columns is None else [other[j] for j in step.columns]
        kinds = self.sites[step.site].kinds
        n, m = sum(b for b, _ in rows), sum(b for b, _ in columns or rows)
        if kinds[0] != "Outer":
            # A table's rows meet where two texts share a word: few. Written-out gradients are one float64 product.
            way = "by row" if kinds[0] == "Rows" else "direct"
            adds = 2.0 * n * m * q  # as float64 runs at half the speed
            return Cost(adds, slowness=adds), {way}
        if not self.sizes[step.site][1]:  # only one token of each text matters
            rows, columns = [(b, 1) for b, _ in rows], None if columns is None else [(b, 1) for b, _ in columns]
        pieces, how, cost = choose_way(rows, columns, p, q, precision)
        names = {"ghost": "ghost", "explicit": "explicit" if how.mode == "exact" else f"explicit ({how.mode})"}
        return cost, {names[x.way] for x in pieces} | set(kinds[1:] and ("by row",))

    def worth(self, precision: Precision) -> bool:
        """Whether fast products save at least a fifth of all of them: they also need a sample computed exactly."""
        fast, exact = (sum(self.cost(step, how)[0].total for step in self.steps()) for how in (precision, EXACT))
        return fast < 0.8 * exact


def parse_memory(memory: str | int) -> int:
    """Return bytes for ``"2GB"``, ``"500 MB"`` or a plain number of bytes.

    >>> parse_memory("2GB")
    2000000000
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*", str(memory))
    if match is None or match[2].upper() not in units or float(match[1]) <= 0:
        raise InputError(f"memory is {memory!r}, which is no size: write it as '2GB' or '500MB'.")
    return int(float(match[1]) * units[match[2].upper()])


def probe(readout: Readout, ids: list[int], want: Wanted) -> tuple[Captured, bool, int]:
    """Capture one text twice; return that, whether batches keep texts apart, and bytes a token of the pass."""
    saved: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in readout.module.parameters()}

    def note(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    try:
        found, apart, texts = capture(readout, [ids, ids], want, note), True, 2
    except MixedBatch:
        saved.clear()
        found, apart, texts = capture(readout, [ids], want, note), False, 1
    # The gradients live beside what was saved, and are joined site by site: half of them twice for a moment.
    factors = sum(nbytes(u.factor) for uses in found.uses for name in uses.values() for u in name)
    return found, apart, int((sum(saved.values()) + 1.5 * factors) / (texts * len(ids))) + 1


def divide(
    readout: Readout,
    want: Wanted,
    rows: list[list[int]],
    columns: list[list[int]] | None,
    label: Callable[[str], str],
    budget: int,
    *,
    keep: bool = False,
    trace: bool = False,
) -> Workload:
    """Cut the work so that it stays within `budget` bytes beside the model; `keep` puts the factors on disk in any case.

    Raises
    ------
    InputError
        If one text, or the kernel's own matrices, do not fit; it says how much is needed.
    """
    longest = max(rows + (columns or []), key=len)
    found, apart, token_bytes = probe(readout, longest, want)
    c, sites = len(found.uses), find_sites(found.uses[0], label)
    every = readout.parameters()
    check_bytes = int(2.2 * max(every[name].nbytes for name in want.names) + token_bytes * len(longest))
    items = 1 if trace else c
    # One matrix for each block, and the sum and its mirror image at the end.
    fixed = 8 * items**2 * len(rows) * len(columns or rows) * (2 + len({s.label for s in sites}))
    room = budget - fixed - min(64 * 10**6, budget // 10)  # libraries take some memory of their own
    least = max(2 * token_bytes * len(longest), check_bytes)
    if room < least:
        raise InputError(
            f"memory is {budget / 1e6:,.1f} MB and this kernel needs at least {(fixed + least) / 0.9e6:,.1f} MB "
            f"({fixed / 1e6:,.1f} MB for matrices, the rest for a text of {len(longest)} tokens): raise memory."
        )
    tokens = max(len(longest), min(TOKENS, int(room * 0.5 / token_bytes)))
    row_batches = token_batches(rows, tokens)
    column_batches = None if columns is None else token_batches(columns, tokens)
    measured = [_sizes(site, found, len(longest), 2 if apart else 1) for site in sites]
    work = Workload(
        sites,
        row_batches,
        column_batches,
        shapes(row_batches, rows),
        None if columns is None or column_batches is None else shapes(column_batches, columns),
        c,
        trace,
        apart,
        held=0.0,
        keep=keep,
        scratch=SCRATCH,
        limit=0,
        sizes=[size for size, _ in measured],
        widths=[width for _, width in measured],
        token_bytes=token_bytes,
        fixed_bytes=fixed,
        check_bytes=check_bytes,
    )
    # What one pass does not need may hold factors. If they do not all fit, the products must load the others.
    total, free = work.factor_bytes, room - max(in_pass(work), check_bytes)
    scratch = int(min(SCRATCH, 0.15 * room))
    if total * 1.05 <= min(free, room - 3 * scratch):
        return replace(work, held=float("inf"), scratch=scratch, limit=room)
    limit = int(0.3 * room)
    held = max(0.0, min(free, room - limit - 3 * scratch) * 0.95)
    return replace(work, held=held, scratch=scratch, limit=limit)


def in_pass(work: Workload) -> float:
    """Return the bytes of the largest forward and backward pass."""
    batches = work.row_shapes + (work.column_shapes or [])
    return work.token_bytes * max(b * t if work.apart else t for b, t in batches)


def _sizes(site: Site, found: Captured, tokens: int, texts: int) -> tuple[tuple[float, float], tuple[int, int]]:
    """Return ((bytes a text, bytes a token), (p, q)) of a site's factors in the probe."""
    chunk, _ = assemble(site, found.uses[0])
    per_text = per_token = 0.0
    widths = (0, sum(site.widths))
    for f in chunk:
        if isinstance(f, Outer):
            widths = (f.left.shape[-1], f.right.shape[-1])
        if site.kinds[0] == "Vector" or (isinstance(f, Outer) and f.right.shape[1] == 1):
            per_text += nbytes(f) / texts
        else:
            per_token += nbytes(f) / (texts * tokens)
    return (per_text, per_token), widths


def token_batches(token_ids: list[list[int]], tokens: int) -> list[np.ndarray]:
    """Split 0..n-1 into batches of similar length with about `tokens` tokens each, padding included.

    >>> [b.tolist() for b in token_batches([[1] * 4, [1], [1, 1], [1]], 4)]
    [[1, 3], [2], [0]]
    """
    order = np.argsort([len(row) for row in token_ids], kind="stable")
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(token_ids[i]) > tokens:
            batches.append([])
        batches[-1].append(int(i))
    return [np.array(batch) for batch in batches]


def shapes(batches: Sequence[np.ndarray], token_ids: list[list[int]]) -> list[Shape]:
    """Return (texts, longest) of each batch."""
    return [(len(batch), max(len(token_ids[i]) for i in batch)) for batch in batches]


@dataclass(frozen=True)
class SitePlan:
    """One line of the plan: parameters that are contracted together."""

    name: str
    parameters: int
    shape: str
    way: str
    multiply_adds: float
    bytes: float


@dataclass(frozen=True)
class Plan:
    """What a kernel takes. `print` shows it; `to_dict` gives it for ``--json``.

    seconds : estimated; `pass_seconds` (forward and backward, check, disk) and `product_seconds`.
    pass_flops, product_flops : two for each multiply-add.
    factor_bytes : captured factors, of which disk_bytes go to disk. peak_bytes : estimated, beside the model.
    """

    texts: tuple[int, int]
    outputs: int
    parameters: int
    tokens: int
    batches: int
    disk_bytes: float
    factor_bytes: float
    peak_bytes: float
    budget: int
    pass_flops: float
    product_flops: float
    sites: list[SitePlan] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    pass_seconds: float = float("nan")
    product_seconds: float = float("nan")

    @property
    def seconds(self) -> float:
        """Estimated seconds in all."""
        return self.pass_seconds + self.product_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-serialisable values."""
        values = {k: v for k, v in vars(self).items() if k not in ("sites", "cost", "texts")}
        return values | {"texts": list(self.texts), "seconds": self.seconds, "sites": [vars(s) for s in self.sites]}

    def __str__(self) -> str:
        n, m = self.texts
        head = [
            ("kernel", f"{n} x {m} texts" + (f", {self.outputs} outputs" if self.outputs > 1 else "")),
            ("parameters", f"{self.parameters:,}"),
            ("tokens", f"{self.tokens:,} with padding, in {self.batches} batches"),
            ("passes", f"{self.pass_flops / 1e9:,.0f} GFLOP, about {self.pass_seconds:.1f} s"),
            ("products", f"{self.product_flops / 1e9:,.0f} GFLOP, about {self.product_seconds:.1f} s"),
            ("captured", f"{self.factor_bytes / 1e6:,.0f} MB, {self.disk_bytes / 1e6:,.0f} MB of it on disk"),
            ("memory", f"about {self.peak_bytes / 1e6:,.0f} MB of {self.budget / 1e6:,.0f} MB beside the model"),
            ("time", f"about {self.seconds:.1f} s"),
        ]
        lines = [
            (s.name, f"{s.parameters:,}", s.shape, s.way, f"{2 * s.multiply_adds / 1e9:,.1f}", f"{s.bytes / 1e6:,.1f}")
            for s in self.sites
        ]
        titles = ("layer", "parameters", "shape", "contraction", "GFLOP", "MB")
        width = [max(len(row[i]) for row in [titles, *lines]) for i in range(len(titles))]
        align = "<><<>>"
        table = ["  ".join(f"{x:{a}{w}}" for x, a, w in zip(row, align, width, strict=True)).rstrip() for row in [titles, *lines]]
        return "\n".join([*(f"{k:<12}{v}" for k, v in head), "", *table])


def describe(readout: Readout, work: Workload, budget: int, precision: Precision) -> Plan:
    """Write the plan down: sizes, multiply-adds and ways, without times (see `measure`)."""
    every = readout.parameters()
    batches = work.row_shapes + (work.column_shapes or [])
    lines, total = [], Cost()
    for k, site in enumerate(work.sites):
        cost, ways = Cost(), set[str]()
        for step in work.steps([k]):
            one, found = work.cost(step, precision)
            cost, ways = cost + one, ways | found
        p, q = work.widths[k]
        name = site.names[0] + (f" + {len(site.names) - 1} more" if len(site.names) > 1 else "")
        held = work.outputs * sum(work.bytes(k, shape) for shape in batches)
        count = sum(every[name].numel() for name in site.names)
        lines.append(SitePlan(name, count, f"{p} x {q}" if p else f"{q}", " + ".join(sorted(ways)), cost.multiply_adds, held))
        total = total + cost
    # Forward: one multiply-add a weight and token. Backward to the inputs: one more for each output.
    dense = sum(x.parameters for x, s in zip(lines, work.sites, strict=True) if s.kinds[0] == "Outer")
    tokens = sum(b * t for b, t in batches)
    held = min(work.held, work.factor_bytes)
    loaded = 0.0
    if work.disk_bytes:
        loaded = min(work.limit, max(x.bytes for x in lines) / work.outputs * min(2, work.outputs))
    rows, columns = (sum(b for b, _ in s) for s in (work.row_shapes, work.column_shapes or work.row_shapes))
    return Plan(
        texts=(rows, columns),
        outputs=work.outputs,
        parameters=sum(x.parameters for x in lines),
        tokens=tokens,
        batches=len(batches),
        disk_bytes=work.disk_bytes,
        factor_bytes=work.factor_bytes,
        peak_bytes=work.fixed_bytes + max(work.check_bytes, held + in_pass(work), held + loaded + 2 * work.scratch),
        budget=budget,
        pass_flops=2.0 * dense * tokens * (1 + work.outputs),
        product_flops=2 * total.multiply_adds,
        sites=lines,
        cost=total,
    )
