"""Stored results: does the hash see what matters and nothing else, is a damaged file noticed, is everything stored up to date."""

from __future__ import annotations

import ast
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ntkft
from ntkft import files, provenance
from ntkft.errors import InputError
from ntkft.experiments.result import RESULTS, Result
from ntkft.files import atomic_path, read_json, sha256_file, sha256_text, write_json
from ntkft.ntk import Kernel
from ntkft.provenance import code_hash, manifest, peak_memory

# --- The hash of code ---------------------------------------------------------------------------------------


class Copy:
    """A copy of the package whose files can be edited."""

    def __init__(self, folder: Path):
        self.folder = folder

    def edit(self, module: str, old: str, new: str) -> None:
        path = self.folder / f"{module}.py"
        text = path.read_text()
        assert old in text, f"{module} has no {old!r} any more: choose another line for this test"
        self.write(module, text.replace(old, new, 1))

    def write(self, module: str, text: str) -> None:
        (self.folder / f"{module}.py").write_text(text)
        provenance._digest.cache_clear()

    def text(self, module: str) -> str:
        return (self.folder / f"{module}.py").read_text()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    folder = tmp_path / "ntkft"
    shutil.copytree(provenance.PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", folder)
    provenance._digest.cache_clear()
    yield Copy(folder)
    provenance._digest.cache_clear()


def test_where_the_package_lies_does_not_matter(copy, monkeypatch):
    there = code_hash("ntkft.ntk.engine")
    monkeypatch.undo()
    assert code_hash("ntkft.ntk.engine") == there


def test_comments_docstrings_and_formatting_do_not_matter(copy):
    before = code_hash("ntkft.ntk.engine")
    copy.edit("spectrum", "NEGATIVE = 1e-6", "# A remark.\nNEGATIVE  =  (1e-6)")
    copy.edit("spectrum", 'r"""The eigenvalues of K/n', 'r"""Those eigenvalues of K/n')  # module
    copy.edit("spectrum", '"""A power law', '"""Some power law')  # class
    copy.edit("spectrum", '"""Return `value` as float', '"""Give `value` as float')  # function
    copy.write("readout", ast.unparse(ast.parse(copy.text("readout"))))  # all layout and comments gone
    assert code_hash("ntkft.ntk.engine") == before


def test_adding_a_docstring_does_not_matter(copy):
    copy.write("extra", "def f():\n    return 1\n\nclass C:\n    '''Doc.'''\n")
    before = code_hash("ntkft.extra")
    copy.write("extra", "'''Doc.'''\ndef f():\n    '''Doc.'''\n    return 1\n\nclass C:\n    pass\n")
    assert code_hash("ntkft.extra") == before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("NEGATIVE = 1e-6", "NEGATIVE = 1e-5"),
        ("def require_positive(name: str", "def require_positive(label: str"),
        ("norm: float = 1.0", "norm: float = 2.0"),
        ("np.log(mean) - log_c", "np.log(mean) + log_c"),
    ],
)
def test_a_changed_formula_is_seen_by_all_that_import_it(copy, old, new):
    users = ("ntkft.spectrum", "ntkft.stopping", "ntkft.ntk.engine", "ntkft.experiments.stopping_rule")
    others = ("ntkft.corpora", "ntkft.owndata")
    before = {name: code_hash(name) for name in users + others}
    copy.edit("spectrum", old, new)
    assert all(code_hash(name) != before[name] for name in users)
    assert all(code_hash(name) == before[name] for name in others)


@pytest.mark.parametrize(
    "statement",
    [
        "from ntkft.leaf import x",
        "from ntkft import leaf",
        "import ntkft.leaf",
        "def f():\n    from ntkft import leaf",
        "import ntkft.leaf as other",
        "from ntkft.middle import x",
    ],
)
def test_imports_are_followed(copy, statement):
    copy.write("leaf", "x = 1\n")
    copy.write("middle", "from ntkft.leaf import x\n")
    copy.write("top", statement + "\n")
    before = code_hash("ntkft.top")
    copy.write("leaf", "x = 2\n")
    assert code_hash("ntkft.top") != before


@pytest.mark.parametrize(
    ("use", "module", "old", "new"),
    [
        ("ntkft.load_task('amazon')", "tasks", "def load_task(", "def load_task2("),
        ("ntkft.descend(k, y)", "descent", "def descend(", "def descend2("),
        ("ntkft.stopping.sure_rule(d, 1.0)", "stopping", "def sure_rule(", "def sure_rule2("),
        ("from ntkft import load_task", "tasks", "def load_task(", "def load_task2("),
        ("from ntkft import Task, tasks", "tasks", "def load_task(", "def load_task2("),
    ],
)
def test_names_that_the_package_loads_on_first_use_are_followed(copy, use, module, old, new):
    copy.write("top", f"import ntkft\n{use}\n")
    before = code_hash("ntkft.top")
    copy.edit(module, old, new)
    assert code_hash("ntkft.top") != before


def test_the_engine_counts_for_itself_alone(copy):
    """Its numbers are held by the oracle and by the stored kernels (tests/test_stored_kernels.py), not by its text."""
    names = ("ntkft.ntk.engine", "ntkft.experiments.few_epochs", "ntkft.experiments.kernel_descent")
    before = {name: code_hash(name) for name in names}
    copy.edit("ntk/contract", "def contract(", "def contract2(")
    assert [code_hash(name) != before[name] for name in names] == [True, False, False]


def test_every_experiment_depends_on_the_corpora_it_loads(copy):
    names = [
        f"ntkft.experiments.{p.stem}"
        for p in (copy.folder / "experiments").glob("*.py")
        if "load_task" in p.read_text()
    ]
    assert names
    before = {name: code_hash(name) for name in names}
    copy.edit("corpora", "def distinct(", "def distinct2(")
    assert [name for name in names if code_hash(name) == before[name]] == []


def test_modules_without_mathematics_do_not_count(copy):
    before = code_hash("ntkft.ntk.engine")
    for module in ("errors", "files", "assets", "catalogue", "provenance", "__init__"):
        copy.write(module, copy.text(module) + "\nADDED = 1\n")
    assert code_hash("ntkft.ntk.engine") == before


def test_a_manifest_says_where_a_run_comes_from():
    about = manifest("ntkft.spectrum", seed=3)
    assert about["seed"] == 3 and about["code_sha256"] == code_hash("ntkft.spectrum")
    assert set(about["versions"]) == {"python", "torch", "transformers", "numpy", "scipy"}
    assert about["hardware"]["cores"] >= 1 and about["hardware"]["processor"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])


def test_the_commit_is_that_of_the_checkout_or_unknown(copy):
    """The copy lies outside any checkout, until one is made around it."""
    folder = copy.folder.parent
    assert manifest("ntkft.spectrum", seed=0)["commit"] == "unknown"
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "ntkft/spectrum.py"], ["commit", "-q", "-m", "one"]):
        subprocess.run(git + command, check=True)
    clean = manifest("ntkft.spectrum", seed=0)["commit"]
    assert re.fullmatch("[0-9a-f]{12}", clean)
    copy.edit("spectrum", "NEGATIVE = 1e-6", "NEGATIVE = 1e-5")
    assert manifest("ntkft.spectrum", seed=0)["commit"] == f"{clean}-dirty"


def test_a_run_tells_its_seconds_and_its_peak_memory():
    about = ntkft.experiments.run("stopping_rule", tier="quick").manifest
    assert 0 < about["seconds"] < 600
    assert 10**7 < about["peak_memory_bytes"] <= peak_memory()


# --- Results ------------------------------------------------------------------------------------------------


def made(tier: str = "quick", **values: Any) -> Result:
    about = {"module": "ntkft.spectrum", "seed": np.int64(4), "code_sha256": code_hash("ntkft.spectrum")}
    return Result(
        "demo", tier, values, {"curve": np.array([[1.5, np.nan], [np.inf, 0.1]]), "k": np.arange(3)}, about
    )


def test_a_result_round_trip(tmp_path):
    values: dict[str, Any] = {
        "f": 0.1 + 0.2, "i": 7, "text": "η ≤ 1", "none": None, "flag": True, "list": [1, 2.5],
        "np32": np.float32(0.5), "np64": np.float64(1 / 3), "npi": np.int64(2**40), "npb": np.bool_(True),
        "array": np.arange(4.0).reshape(2, 2), "deep": {3: (np.float64(1.0), {"x": np.int32(2)})},
        "nan": math.nan, "inf": math.inf, "minus": np.float64(-math.inf), "inner": [np.nan],
    }  # fmt: skip
    result = made(**values)
    assert result.save(tmp_path / "demo") == tmp_path / "demo"
    back = Result.load(tmp_path / "demo")
    assert math.isnan(back.values.pop("nan")) and math.isnan(back.values.pop("inner")[0])
    assert back.values == {
        "f": 0.1 + 0.2, "i": 7, "text": "η ≤ 1", "none": None, "flag": True, "list": [1, 2.5],
        "np32": 0.5, "np64": 1 / 3, "npi": 2**40, "npb": True,
        "array": [[0.0, 1.0], [2.0, 3.0]], "deep": {"3": [1.0, {"x": 2}]},
        "inf": math.inf, "minus": -math.inf,
    }  # fmt: skip
    assert "NaN" not in (tmp_path / "demo" / "quick.json").read_text()  # which is no JSON
    assert back.arrays.keys() == result.arrays.keys()
    for key, array in result.arrays.items():
        np.testing.assert_array_equal(back.arrays[key], array)
        assert back.arrays[key].dtype == array.dtype
    assert (back.chapter, back.tier, back.manifest["seed"]) == ("demo", "quick", 4)
    assert not back.stale and not result.stale
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == [
        "quick.json",
        "quick.manifest.json",
        "quick.npz",
    ]


def test_the_files_are_strict_json(tmp_path):
    made(bad=math.nan, worse=[-math.inf]).save(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert not re.search(r"\b(NaN|Infinity)\b", path.read_text()), path.name


def test_two_tiers_in_one_folder(tmp_path):
    made("quick", a=1).save(tmp_path)
    made("full", a=2).save(tmp_path)
    assert Result.load(tmp_path, "quick").values["a"] == 1 and Result.load(tmp_path, "full").values["a"] == 2
    with pytest.raises(InputError, match="holds 2 results of tier any and one is needed"):
        Result.load(tmp_path)


def test_a_missing_result_is_an_error_that_names_the_command(tmp_path):
    with pytest.raises(
        InputError, match=r"holds 0 results of tier full .* `ntkft run stopping_rule --tier full`"
    ):
        Result.load(tmp_path / "stopping_rule", "full")


@pytest.mark.parametrize("name", ["quick.json", "quick.npz"])
@pytest.mark.parametrize("damage", ["tamper", "remove", "cut"])
def test_a_damaged_file_is_an_error(tmp_path, name, damage):
    path = made(a=1).save(tmp_path) / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(
        InputError, match=rf"{name} does not match its manifest: run `ntkft run demo --tier quick` again"
    ):
        Result.load(tmp_path)


def test_a_result_interrupted_while_it_is_written_over_an_old_one_is_noticed(tmp_path, monkeypatch):
    made(a=1).save(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez_compressed", interrupt)
        made(a=2).save(tmp_path)
    with pytest.raises(InputError, match="does not match its manifest"):
        Result.load(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quick.json", "quick.manifest.json", "quick.npz"]
    made(a=2).save(tmp_path)
    assert Result.load(tmp_path).values["a"] == 2


def test_a_result_is_stale_when_its_code_has_changed(copy, tmp_path):
    made(a=1).save(tmp_path / "demo")
    assert not Result.load(tmp_path / "demo").stale
    copy.edit("spectrum", "NEGATIVE = 1e-6", "NEGATIVE = 1e-5")
    assert Result.load(tmp_path / "demo").stale


# --- Files --------------------------------------------------------------------------------------------------


def interrupt(*args, **options):
    raise KeyboardInterrupt


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "note.json"
    write_json(target, {"a": 1})
    for error in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), atomic_path(target) as temporary:
            temporary.write_text("half")
            assert temporary.parent == tmp_path and temporary.suffix == ".json"
            assert read_json(target) == {"a": 1}  # not touched while the new one is written
            raise error
        assert read_json(target) == {"a": 1} and list(tmp_path.iterdir()) == [target]


def test_a_failure_without_an_old_file_leaves_none(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "new" / "note.json", object())
    assert list((tmp_path / "new").iterdir()) == []


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "note.json"
    write_json(target, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.Path, "replace", interrupt)
        write_json(target, 2)
    assert read_json(target) == 1 and list(tmp_path.iterdir()) == [target]


def test_a_written_file_is_complete_readable_and_known_by_its_hash(tmp_path):
    target = tmp_path / "deep" / "er" / "note.json"
    write_json(target, {"σ": [1, None]})
    assert read_json(target) == {"σ": [1, None]} and list(target.parent.iterdir()) == [target]
    plain = tmp_path / "plain"
    plain.touch()
    assert target.stat().st_mode == plain.stat().st_mode
    assert sha256_file(target) == sha256_text(target.read_text(encoding="utf-8"))
    assert sha256_text("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


# --- What is stored in the repository -----------------------------------------------------------------------


def complaint_about_result(path: Path) -> str | None:
    """Say what is wrong with the stored result of this manifest, None if nothing is."""
    tier = path.name.removesuffix(".manifest.json")
    try:
        result = Result.load(path.parent, tier)
    except InputError as error:
        return str(error)
    if result.chapter != path.parent.name:
        return f"{path} says it belongs to {result.chapter}"
    if result.stale:
        return f"{path} is stale: run `ntkft run {result.chapter} --tier {tier}` again"
    return None


def complaint_about_kernel(path: Path) -> str | None:
    """Say what is wrong with a stored kernel, None if nothing is."""
    try:
        kernel = Kernel.load(path)
    except InputError as error:
        return str(error)
    if len(kernel.texts) != kernel.n or "code_sha256" not in kernel.info:
        again = f"`ntkft run {path.parent.name} --tier full`"
        return f"{path} does not say of which texts and which code it is: compute it again ({again})"
    return None


def stored_results(root: Path) -> list[Path]:
    return sorted(root.glob("*/full.manifest.json"))


def stored_kernels(root: Path) -> list[Path]:
    arrays = ("quick.npz", "full.npz")  # of a Result; training runs have a test of their own
    return sorted(p for p in root.rglob("*.npz") if p.name not in arrays and p.parent.name != "runs")


def name_of(path: Path | None) -> str:
    return "none" if path is None else str(path.relative_to(RESULTS))


@pytest.mark.parametrize("path", stored_results(RESULTS) or [None], ids=name_of)
def test_every_stored_result_is_whole_and_up_to_date(path):
    if path is None:
        pytest.fail(
            f"{RESULTS} holds no stored result (*/full.manifest.json): run `ntkft run CHAPTER --tier full`"
        )
    complaint = complaint_about_result(path)
    assert complaint is None, complaint


@pytest.mark.parametrize("path", stored_kernels(RESULTS) or [None], ids=name_of)
def test_every_stored_kernel_is_whole(path):
    if path is None:
        pytest.fail(f"{RESULTS} holds no stored kernel (*.npz): run `ntkft run stopping_rule --tier full`")
    complaint = complaint_about_kernel(path)
    assert complaint is None, complaint


def test_no_result_is_half_there():
    """Arrays or values of a full tier without their manifest."""
    for path in (*RESULTS.glob("*/full.npz"), *RESULTS.glob("*/full.json")):
        assert (path.parent / "full.manifest.json").is_file(), f"{path} has no manifest: it is half a result"


def test_the_complaints_about_stored_files_are_made(tmp_path, monkeypatch):
    good = made("full", a=1).save(tmp_path / "demo") / "full.manifest.json"
    assert complaint_about_result(good) is None and stored_results(tmp_path) == [good]
    moved = made("full", a=1).save(tmp_path / "other") / "full.manifest.json"
    assert "other/full.manifest.json says it belongs to demo" in str(complaint_about_result(moved))
    write_json(good, read_json(good) | {"code_sha256": "0"})
    assert "demo/full.manifest.json is stale: run `ntkft run demo --tier full`" in str(
        complaint_about_result(good)
    )
    (good.parent / "full.json").write_text("{}")
    assert "full.json does not match" in str(complaint_about_result(good))

    whole = Kernel(np.eye(2), np.zeros(2), info={"code_sha256": "0"}, texts=("a", "b"))
    kernel = whole.save(tmp_path / "demo" / "k.npz")
    assert complaint_about_kernel(kernel) is None and stored_kernels(tmp_path) == [kernel]
    Kernel(np.eye(2), np.zeros(2)).save(kernel)
    assert "k.npz does not say of which texts and which code it is" in str(complaint_about_kernel(kernel))
    np.savez(kernel, curve=np.zeros(2))
    assert "k.npz is no ntkft kernel" in str(complaint_about_kernel(kernel))
