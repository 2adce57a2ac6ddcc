"""Plans, budgets that are kept, and computations that are killed and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import ntkft
from ntkft.errors import InputError
from ntkft.ntk.plan import Plan
from tests import tiny
from tests.test_ntk import READOUTS

ROOT = Path(__file__).resolve().parents[1]


def kernel(readout, texts=tiny.TEXTS, other=None, **options):
    return ntkft.empirical_ntk(readout, texts, other, progress=False, **options)


# ---------------------------------------------------------------- plans


def test_a_plan_says_what_will_happen():
    readout = READOUTS["bert"]()
    plan = kernel(readout, plan_only=True)
    assert isinstance(plan, Plan)
    assert plan.texts == (9, 9) and plan.parameters == sum(p.numel() for p in readout.parameters().values())
    assert 0 < plan.pass_seconds < plan.seconds < 5 and plan.peak_bytes < plan.budget and plan.disk_bytes == 0
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["seconds"] == pytest.approx(plan.seconds) and len(values["sites"]) == len(plan.sites)
    shown = str(plan)
    assert "9 x 9 texts" in shown and "query" in shown and ("ghost" in shown or "explicit" in shown)
    spilled = kernel(readout, tiny.TEXTS * 3, plan_only=True, memory="450kB")
    assert spilled.disk_bytes > 0 and spilled.batches > plan.batches


def test_the_plan_counts_the_multiply_adds_of_a_known_case():
    """Texts of one length, all by ghost: n² T² (p + q) / 2 for each site, and a little for the diagonal tiles."""
    readout = READOUTS["bert"]()
    texts = ["good film good"] * 40
    plan = kernel(readout, texts, parameters="*intermediate*weight", plan_only=True)
    (first, second) = plan.sites
    assert first.shape == second.shape == "16 x 24" and first.way == "ghost"
    at_least = 40**2 * 3**2 * (16 + 24) / 2
    assert at_least <= first.multiply_adds <= 1.4 * at_least


# ---------------------------------------------------------------- checkpoints

SCRIPT = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have switched it off
    import ntkft
    from ntkft.ntk import engine
    from tests import tiny
    from tests.test_ntk import READOUTS

    slow = float(sys.argv[2])
    inner = engine.contract
    def contract(*args):
        time.sleep(slow)
        inner(*args)
    engine.contract = contract
    readout = READOUTS["gpt2"]()
    kernel = ntkft.empirical_ntk(readout, tiny.TEXTS * 3, checkpoint=sys.argv[1], memory="450kB", progress=False)
    kernel.save(sys.argv[3])
"""


def start(folder: Path, slow: float, out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(slow), str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_computation_goes_on_and_gives_the_same_bits(tmp_path, how):
    whole, resumed = tmp_path / "whole.npz", tmp_path / "resumed.npz"
    assert start(tmp_path / "a", 0, whole).wait(120) == 0
    folder = tmp_path / "b"
    process = start(folder, 0.3, resumed)
    end = time.monotonic() + 60
    while not (folder / "sums.safetensors").is_file():  # some products are done, others are not
        assert process.poll() is None and time.monotonic() < end, process.stderr.read().decode()
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(how)
    assert process.wait(60) != 0 and not resumed.exists()
    if how == signal.SIGINT:  # nothing half-written is left
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    second = start(folder, 0.0, resumed)
    assert second.wait(120) == 0, second.stderr.read().decode()
    a, b = ntkft.Kernel.load(whole), ntkft.Kernel.load(resumed)
    assert a.matrix.tobytes() == b.matrix.tobytes() and a.scores.tobytes() == b.scores.tobytes()
    assert not folder.exists()


def test_finished_products_are_not_made_again(tmp_path, monkeypatch):
    from ntkft.ntk import engine

    readout, calls = READOUTS["bert"](), []
    original = engine.contract

    def stop_after(limit):
        def counted(*args):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(1)
            original(*args)

        return counted

    monkeypatch.setattr("ntkft.ntk.store.PATIENCE", 0)  # save after every product
    monkeypatch.setattr(engine, "contract", stop_after(5))
    with pytest.raises(KeyboardInterrupt):
        kernel(readout, checkpoint=tmp_path / "k")
    first = len(calls)
    monkeypatch.setattr(engine, "contract", stop_after(-1))
    captured = []
    monkeypatch.setattr(engine, "capture", lambda *a: captured.append(1))
    resumed = kernel(readout, checkpoint=tmp_path / "k")
    monkeypatch.undo()
    np.testing.assert_array_equal(resumed.matrix, kernel(readout).matrix)
    monkeypatch.setattr(engine, "contract", stop_after(-1))
    total = len(calls)
    kernel(readout)
    assert first == 5 and total == len(calls) - total and not captured


def test_a_checkpoint_belongs_to_one_kernel(tmp_path, monkeypatch):
    from ntkft.ntk import engine

    def interrupted(*args):
        raise KeyboardInterrupt

    readout = READOUTS["bert"]()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "contract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            kernel(readout, checkpoint=tmp_path / "k")
    for change, word in (
        ({"texts": tiny.TEXTS[1:]}, "texts"),
        ({"parameters": "*LayerNorm*"}, "parameters"),
        ({"blocks": "kind"}, "parameters"),
    ):
        with pytest.raises(InputError, match=rf"start of another kernel \(it differs in .*{word}"):
            kernel(readout, **{"texts": tiny.TEXTS} | change, checkpoint=tmp_path / "k")
    readout.module.head.weight.data[0, 0] += 1.0
    with pytest.raises(InputError, match="differs in weights"):
        kernel(readout, checkpoint=tmp_path / "k")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no kernel that was begun"):
        kernel(readout, checkpoint=tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_an_interrupt_leaves_no_temporary_folder(tmp_path, monkeypatch):
    from ntkft.ntk import engine

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def interrupted(*args):
        assert any(tmp_path.iterdir())  # factors are on disk
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "contract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kernel(READOUTS["gpt2"](), tiny.TEXTS * 3, memory="450kB")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- memory

MEASURE = """
    import sys
    import ntkft
    from ntkft.ntk.release import release_memory

    def status(key):
        line = next(l for l in open("/proc/self/status") if l.startswith(key))
        return int(line.split()[1]) * 1024

    task = ntkft.load_task("amazon", n=160, seed=0)
    readout = ntkft.pooled_readout(ntkft.load_model("minilm"))
    readout.scores(task.texts[:16])
    ntkft.empirical_ntk(readout, task.texts[:2], progress=False)   # libraries are loaded, weights are touched
    release_memory()
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")                  # the peak counts from here
    kernel = ntkft.empirical_ntk(readout, task.texts, memory=sys.argv[1], progress=False)
    print(status("VmHWM") - before, kernel.info["spilled_bytes"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory counter")
@pytest.mark.parametrize(("memory", "spills"), [("250MB", True), ("500MB", True), ("1.5GB", False)])
def test_the_memory_budget_is_kept(memory, spills):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), memory],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    peak, spilled = map(int, run.stdout.split())
    assert (spilled > 0) == spills
    assert peak <= 1.1 * ntkft.ntk.plan.parse_memory(memory)
