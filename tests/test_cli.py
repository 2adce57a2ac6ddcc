"""The command line as its users meet it: help, JSON, one line for an error, no traceback for Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import ntkft
from ntkft import assets, cli, experiments
from ntkft.catalogue import ASSETS

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
# What the book and the README tell readers to type. A new command or option need not be here; one that goes breaks a promise.
PROMISED = {
    "fetch": {"--list", "--json"},
    "kernel": {
        "--data",
        "--model",
        "--n",
        "--out",
        "--seed",
        "--readout",
        "--parameters",
        "--memory",
        "--blocks",
        "--precision",
        "--checkpoint",
        "--text-column",
        "--label-column",
        "--json",
    },
    "plan": {"--data", "--model", "--n", "--precision", "--memory", "--json"},
    "spectrum": {"--sigma", "--norm", "--plot", "--json"},
    "stop": {
        "--data",
        "--model",
        "--sigma",
        "--lr",
        "--batch-size",
        "--n",
        "--rule",
        "--norm",
        "--loss",
        "--optimizer",
        "--centred-batches",
        "--check-drift",
        "--kernel",
        "--save-kernel",
        "--plot",
        "--memory",
        "--text-column",
        "--label-column",
        "--json",
    },
    "tasks": {"--model", "--n", "--sigma", "--held-out", "--vector", "--readout", "--seed", "--plot", "--memory", "--json"},
    "run": {"--tier", "--seed", "--out", "--json"},
}
TEXTS = [
    "A quiet triumph, start to finish.",
    "The battery died twice.",
    "Overpriced!",
    "Good value, slow delivery.",
]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run ``ntkft ARGUMENTS`` in this process, through `main`; return exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ntkft", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        code = stop.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return run


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    code, out, err = result
    assert code == 1 and out == "", result
    assert err.startswith("ntkft: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, err


# --- Help ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_mentions_every_option(name):
    result = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 0, result.output
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    shown = set(re.findall(r"--[a-z][a-z-]*", text))
    options = {option for p in COMMANDS[name].params for option in p.opts if option.startswith("--")}
    assert options <= shown and PROMISED.get(name, set()) <= shown, (
        options | PROMISED.get(name, set())
    ) - shown
    assert "--json" in shown  # each command speaks to scripts
    for parameter in COMMANDS[name].params:
        if parameter.name != "help":
            assert getattr(parameter, "help", ""), f"{name}: {parameter.name} has no help"
    assert COMMANDS[name].help and " ".join(COMMANDS[name].help.split())[:60] in " ".join(text.split())


def test_the_promised_commands_are_there(call):
    code, out, _ = call("--help")
    assert code == 0
    for name in PROMISED:
        assert name in COMMANDS and re.search(rf"\b{name}\b", out)


def test_version(call):
    assert call("--version") == (0, f"ntkft {ntkft.__version__}\n", "")


def test_the_installed_command():
    """One real process each: the entry point, its exit status, and that an error has no traceback."""
    command = [sys.executable, "-m", "ntkft.cli"]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"ntkft {ntkft.__version__}\n" and version.stderr == ""
    wrong = subprocess.run([*command, "run", "no_such_chapter"], capture_output=True, text=True)
    assert_one_line((wrong.returncode, wrong.stdout, wrong.stderr), "There is no chapter 'no_such_chapter'")


# --- fetch --------------------------------------------------------------------------------------------------


def test_fetch_list(call):
    code, out, _ = call("fetch", "--list", "--json")
    rows = json.loads(out)
    assert code == 0 and {row["name"] for row in rows} == set(ASSETS)
    assert all(row["licence"] and row["size_mb"] > 0 for row in rows)
    code, out, _ = call("fetch", "--list")
    assert code == 0 and all(any(line.startswith(name) for line in out.splitlines()) for name in ASSETS)


def test_fetch_says_where(call, monkeypatch, tmp_path):
    asked = []

    def fetch(name):
        asked.append(name)
        return tmp_path / name

    monkeypatch.setattr(assets, "fetch", fetch)
    assert json.loads(call("fetch", "minilm", "--json")[1]) == {"minilm": str(tmp_path / "minilm")}
    assert call("fetch", "minilm")[1] == f"minilm: {tmp_path / 'minilm'}\n"
    asked.clear()
    assert call("fetch")[0] == 0 and asked == list(ASSETS)


def test_fetch_of_an_unknown_asset(call):
    assert_one_line(call("fetch", "no-such-asset"), "no-such-asset", *ASSETS)


# --- kernel, spectrum ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel_file(tmp_path_factory):
    """The kernel of MiniLM on four texts of a CSV file, made on the command line, and what the command printed."""
    folder = tmp_path_factory.mktemp("kernel")
    lines = "\n".join(f'"{text}",{k % 2}' for k, text in enumerate(TEXTS))
    (folder / "own.csv").write_text(f"what,verdict\n{lines}\n")
    result = CliRunner().invoke(
        cli.app,
        [
            "kernel",
            "--data",
            str(folder / "own.csv"),
            "--text-column",
            "what",
            "--label-column",
            "verdict",
            "--out",
            str(folder / "k.npz"),
            "--seed",
            "3",
            "--json",
        ],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    return folder / "k.npz", json.loads(result.stdout)


def test_kernel_of_own_data(kernel_file):
    path, printed = kernel_file
    kernel = ntkft.Kernel.load(path)
    assert (
        printed["texts"] == 4 and printed["file"] == str(path) and printed["parameters"] == 22_565_376 + 384
    )
    assert kernel.info["model"]["name"] == "minilm" and kernel.info["readout"]["readout"] == "pooled"
    assert kernel.info["readout"]["seed"] == 3
    assert printed["lambda_1"] == pytest.approx(kernel.spectrum().eigenvalues[0])
    task = ntkft.load_task(str(path.parent / "own.csv"), seed=3, text_column="what", label_column="verdict")
    assert sorted(task.texts) == sorted(TEXTS) and kernel.matches(task.texts)
    readout = ntkft.pooled_readout(ntkft.load_model("minilm"), seed=3)
    np.testing.assert_allclose(kernel.scores, readout.scores(task.texts), atol=1e-5)


def test_plan_prints_what_the_kernel_would_take_and_computes_nothing(kernel_file, call):
    path, _ = kernel_file
    own = ("--data", path.parent / "own.csv", "--text-column", "what", "--label-column", "verdict")
    before = sorted(path.parent.iterdir())
    code, out, _ = call("plan", *own, "--json")
    values = json.loads(out)
    assert code == 0 and values["texts"] == [4, 4] and values["parameters"] == 22_565_376 + 384
    assert 0 < values["seconds"] < 60 and values["budget"] == 2_000_000_000
    code, out, _ = call("plan", *own, "--parameters", "*query*", "--memory", "1GB")
    assert code == 0 and "4 x 4 texts" in out and "of 1,000 MB" in out and "key" not in out
    assert sorted(path.parent.iterdir()) == before


def test_kernel_with_parts(kernel_file, call, tmp_path):
    path, _ = kernel_file
    own = ("--data", path.parent / "own.csv", "--text-column", "what", "--label-column", "verdict", "--seed", 3)
    code, out, _ = call("kernel", *own, "--blocks", "kind", "--out", tmp_path / "parts.npz", "--json")
    shares = {k: v for k, v in json.loads(out).items() if k.startswith("trace ")}
    assert code == 0 and sum(shares.values()) == pytest.approx(1) and "trace attention.q" in shares
    kernel = ntkft.Kernel.load(tmp_path / "parts.npz")
    np.testing.assert_allclose(sum(kernel.parts.values()), ntkft.Kernel.load(path).matrix, rtol=1e-4)


def test_spectrum_agrees_with_the_library(kernel_file, call):
    path, _ = kernel_file
    code, out, err = call("spectrum", path, "--sigma", "0.7", "--norm", "2", "--json")
    values = json.loads(out)
    raw, centred = (ntkft.Kernel.load(path).spectrum(centre=flag) for flag in (False, True))
    assert (code, err) == (0, "")
    expected = {
        "n": 4,
        "lambda_1": pytest.approx(raw.eigenvalues[0]),
        "lambda_1_centred": pytest.approx(centred.eigenvalues[0]),
        "trace": pytest.approx(np.trace(ntkft.Kernel.load(path).matrix) / 4),
        "critical_radius": pytest.approx(raw.critical_radius(0.7, 2.0)),
        "eta": pytest.approx(raw.critical_radius(0.7, 2.0) ** -2),
        "steps_at_1/lambda_1": int(raw.critical_radius(0.7, 2.0) ** -2 * raw.eigenvalues[0]),
        "trace_centred": pytest.approx(centred.eigenvalues.sum()),
        "critical_radius_centred": pytest.approx(centred.critical_radius(0.7, 2.0)),
        "eta_centred": pytest.approx(centred.critical_radius(0.7, 2.0) ** -2),
        "effective_dimension": pytest.approx(raw.effective_dimension(values["eta"])),
    }
    assert {key: values[key] for key in expected} == expected
    assert "critical_radius" not in json.loads(call("spectrum", path, "--json")[1])
    text = call("spectrum", path)[1]
    assert re.search(r"^lambda_1 +[0-9.e+]+$", text, re.MULTILINE)


def test_spectrum_of_many_texts_prints_the_decay(call, tmp_path):
    eigenvalues = 1.0 / np.arange(1, 101) ** 2
    path = ntkft.Kernel(np.diag(100 * eigenvalues), np.zeros(100)).save(tmp_path / "k.npz")
    values = json.loads(call("spectrum", path, "--json")[1])
    assert values["decay_exponent"] == pytest.approx(2) and values["decay_ranks"] == "10-25"
    assert values["decay_r2"] == pytest.approx(1)
    few = ntkft.Kernel(np.diag([1.0] * 5 + [0.0] * 59), np.zeros(64)).save(tmp_path / "few.npz")
    code, out, _ = call("spectrum", few, "--json")  # five ranks have no decay to fit, and the rest is printed
    assert code == 0 and json.loads(out)["trace"] == pytest.approx(5 / 64) and "decay_exponent" not in out


def test_spectrum_names_the_law_and_draws(call, tmp_path):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 400)) * np.arange(1, 401) ** -0.75
    path = ntkft.Kernel(features @ features.T, np.zeros(200)).save(tmp_path / "k.npz")
    code, out, _ = call("spectrum", path, "--sigma", "0.5", "--plot", tmp_path / "s.svg", "--json")
    values = json.loads(out)
    assert code == 0 and (tmp_path / "s.svg").read_text().lstrip().startswith("<?xml")
    assert values["law"] in ("polynomial", "exponential", "stretched", "broken") and values["law_ranks"] == "5-50"
    low, high = next(v for k, v in values.items() if k.endswith("_interval"))
    assert low < high and set(values["law_scores"]) == {"polynomial", "exponential", "stretched", "broken"}
    assert re.search(r"^law +\w+$", call("spectrum", path)[1], re.MULTILINE)
    assert_one_line(call("spectrum", path, "--plot", tmp_path / "s.txt"), "--plot is 's.txt'", ".png")


# --- stop -----------------------------------------------------------------------------------------------------


def own_data(path):
    return ("--data", path.parent / "own.csv", "--text-column", "what", "--label-column", "verdict")


def test_stop_with_a_stored_kernel(kernel_file, call, tmp_path):
    """The answer is that of the library; no model is loaded."""
    path, _ = kernel_file
    options = ("--kernel", path, "--sigma", 0.3, "--lr", 0.01, "--batch-size", 2)
    code, out, err = call("stop", *own_data(path), *options, "--json")
    values = json.loads(out)
    task = ntkft.load_task(str(path.parent / "own.csv"), seed=0, text_column="what", label_column="verdict")
    advice = ntkft.stopping_advice(
        None, task, sigma=0.3, step_size=0.01, batch_size=2, kernel=ntkft.Kernel.load(path), progress=False
    )
    assert (code, err) == (0, "") and values["plan"] is None
    assert values["steps"] == advice.steps and values["epochs"] == advice.epochs and values["rule"] == "discrepancy"
    assert values["rules"]["rademacher"]["eta"] == pytest.approx(advice.rules["rademacher"]["eta"])
    assert any("two values" in text for text in values["warnings"])
    code, out, _ = call("stop", *own_data(path), *options, "--plot", tmp_path / "stop.png", "--rule", "sure")
    assert code == 0 and out.startswith("stop ") and out.splitlines()[2].startswith("rule           sure, kernel time ")
    assert (tmp_path / "stop.png").read_bytes().startswith(b"\x89PNG")
    adam = call("stop", *own_data(path), *options, "--optimizer", "adamw")[1]
    assert "when the training error (mean square) has fallen to" in adam
    half = json.loads(call("stop", *own_data(path), *options, "--loss", "half-mse", "--json")[1])
    assert half["steps"] in (2 * values["steps"], 2 * values["steps"] + 1)


def test_stop_computes_a_kernel_with_the_plan_first(kernel_file, call, tmp_path):
    path, _ = kernel_file
    code, out, _ = call("stop", *own_data(path), "--save-kernel", tmp_path / "k.npz", "--check-drift")
    lines = out.splitlines()
    assert code == 0 and re.match(r"plan +kernel of 4 of 4 texts, 22,565,760 parameters: about \d+ s", lines[0])
    assert lines[2].startswith("stop ") and "(estimated)" in out and "After kernel time" in out
    assert ntkft.Kernel.load(tmp_path / "k.npz").n == 4
    again = call("stop", *own_data(path), "--kernel", tmp_path / "k.npz")[1]
    assert again.splitlines()[0] == lines[2]


def test_stop_refuses_in_one_line_before_it_computes(kernel_file, call, tmp_path):
    path, _ = kernel_file
    own = own_data(path)
    assert_one_line(call("stop", *own, "--plot", tmp_path / "x.txt"), "--plot is 'x.txt'", "x.png")
    assert_one_line(call("stop", *own, "--save-kernel", tmp_path / "x.pkl"), "--save-kernel", "x.npz")
    assert_one_line(call("stop", *own, "--n", 2), "--n is 2")
    assert_one_line(call("stop", *own, "--kernel", tmp_path / "none.npz"), "There is no kernel at")
    assert_one_line(call("stop", "--data", tmp_path / "none.csv"), "none.csv")
    assert_one_line(call("stop", *own, "--kernel", path, "--sigma", "-1"), "sigma is -1.0")
    (tmp_path / "other.csv").write_text("text,label\n" + "".join(f"Number {k}.,{k}\n" for k in range(5)))
    assert_one_line(call("stop", "--data", tmp_path / "other.csv", "--kernel", path), "are not among the task's 5")


def test_what_does_not_fit_is_one_line(call, kernel_file, tmp_path):
    path, _ = kernel_file
    own = path.parent / "own.csv"
    assert_one_line(call("kernel", "--data", own, "--out", tmp_path / "k.pkl"), ".npz", "k.pkl")
    assert_one_line(call("kernel", "--data", tmp_path / "none.csv", "--out", tmp_path / "k.npz"), "none.csv")
    assert_one_line(
        call(
            "kernel",
            "--data",
            own,
            "--out",
            tmp_path / "k.npz",
            "--text-column",
            "what",
            "--label-column",
            "nope",
        ),
        "nope",
    )
    assert_one_line(call("spectrum", tmp_path / "none.npz"), "There is no kernel at")
    assert_one_line(call("spectrum", own), "is no ntkft kernel")
    assert_one_line(call("spectrum", path, "--sigma", "-1"), "sigma is -1.0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [("spectrum",), ("stop",), ("kernel", "--data", "x"), ("nonsense",), ("run", "x", "--tier", "huge")]
)
def test_wrong_usage_is_status_2_without_a_traceback(call, arguments):
    code, out, err = call(*arguments)
    assert code == 2 and "Usage" in err and "Traceback" not in err and out == ""


# --- run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    def experiment(chapter, tier, seed):
        values = {
            "gap": np.float64(0.25),
            "count": np.int64(7),
            "flag": np.bool_(True),
            "small": np.float32(0.5),
            "none": np.nan,
            "nested": {"x": np.arange(2)},
            "tier": tier,
            "seed": seed,
        }
        about = {"module": "ntkft.spectrum", "seconds": 1.5, "peak_memory_bytes": 2 * 10**9}
        return experiments.Result(chapter, tier, values, {"curve": np.arange(3)}, about)

    monkeypatch.setattr(experiments, "run", experiment)


def test_run_prints_json_that_keeps_its_types(call, toy):
    code, out, _ = call("run", "stopping_rule", "--seed", "5", "--json")
    values = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert code == 0
    assert values == {
        "gap": 0.25,
        "count": 7,
        "flag": True,
        "small": 0.5,
        "none": "nan",
        "nested": {"x": [0, 1]},
        "tier": "quick",
        "seed": 5,
        "seconds": 1.5,
        "peak_memory_gb": 2.0,
    }


def test_run_stores_only_what_is_asked_for(call, toy, tmp_path, monkeypatch):
    monkeypatch.setattr("ntkft.experiments.result.RESULTS", tmp_path)
    code, out, _ = call("run", "stopping_rule")
    assert code == 0 and "gap" in out and "nested" not in out and list(tmp_path.iterdir()) == []
    code, out, _ = call("run", "stopping_rule", "--tier", "full", "--json")
    assert json.loads(out)["folder"] == str(tmp_path / "stopping_rule")
    assert experiments.Result.load(tmp_path / "stopping_rule", "full").values["count"] == 7
    call("run", "stopping_rule", "--out", tmp_path / "mine")
    assert experiments.Result.load(tmp_path / "mine", "quick").values["tier"] == "quick"


def test_run_of_an_unknown_chapter(call):
    assert_one_line(
        call("run", "no_such_chapter"), "There is no chapter 'no_such_chapter'", *experiments.CHAPTERS
    )


# --- Ctrl-C -------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_a_command_quietly(call, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "fetch", interrupt)
    code, _, err = call("fetch", "minilm")
    assert code == 130 and "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a process on Windows")
def test_ctrl_c_in_a_real_process(tmp_path):
    """A kernel of many texts is interrupted while it is computed: status 130, no traceback, no file."""
    (tmp_path / "own.csv").write_text(
        "text,label\n" + "".join(f"Film number {k} was long.,{k}\n" for k in range(400))
    )
    program = (
        # A background shell may have switched the signal off for all its children.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from ntkft.ntk import engine; from ntkft import cli; real = engine.capture\n"
        "def capture(*arguments): print('ready', flush=True); return real(*arguments)\n"
        "engine.capture = capture; cli.main()"
    )
    arguments = ["kernel", "--data", str(tmp_path / "own.csv"), "--out", str(tmp_path / "k.npz")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["own.csv"]
