"""The examples in the docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import types

import pytest

import ntkft

MODULES = ["ntkft", *(module.name for module in pkgutil.walk_packages(ntkft.__path__, "ntkft."))]


def run_examples(module: types.ModuleType) -> tuple[int, str]:
    """Run a module's examples; return how many there are and a report of those that fail, empty if none does."""
    report: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    attempted = 0
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__):
        attempted += runner.run(example, out=report.append).attempted
    return attempted, "".join(report)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name):
    _, report = run_examples(importlib.import_module(name))
    assert not report, report


@pytest.mark.parametrize("name", MODULES)
def test_the_docstring_of(name):
    assert (importlib.import_module(name).__doc__ or "").strip()


def test_a_wrong_example_is_reported():
    toy = types.ModuleType("toy", ">>> 1 + 1\n3\n>>> 2 + 2\n4\n>>> broken        # doctest: +SKIP\n")
    attempted, report = run_examples(toy)
    assert (
        attempted in (2, 3)
        and "Expected:\n    3\nGot:\n    2" in report
        and report.count("Failed example") == 1
    )
    toy.__doc__ = ">>> 1 + 1\n2\n"
    assert run_examples(toy) == (1, "")


def test_there_are_examples():
    from ntkft import spectrum, stopping

    assert run_examples(spectrum)[0] >= 4 and run_examples(stopping)[0] >= 4
