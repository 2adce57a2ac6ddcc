"""The claim ledger: every numbered statement of the book is in it, and every check holds and can fail."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from ntkft.checks import Verdict
from ntkft.claims import LEDGER, claim, verify
from ntkft.errors import InputError

CHAPTERS = Path(__file__).resolve().parents[1] / "chapters"
STATEMENTS = ("theorem", "lemma", "proposition", "corollary", "observation", "conjecture")
KINDS = {"numeric", "stored", "cited"}
each_claim = pytest.mark.parametrize("entry", LEDGER, ids=lambda entry: entry.id)


def statements(page: str) -> list[tuple[str, str | None]]:
    """Return kind and label (None if it has none) of each numbered statement of a MyST page; fenced examples do not count."""
    found: list[tuple[str, str | None]] = []
    fence = ""  # the fence of a code block that we are in
    lines = page.splitlines()
    for i, line in enumerate(lines):
        opening = re.match(r"\s*(`{3,}|:{3,}|~{3,})\s*(\{[^}]*\})?", line)
        if fence:
            if (
                opening
                and not opening[2]
                and opening[1].startswith(fence)
                and not line.strip().strip(fence[0])
            ):
                fence = ""
            continue
        if not opening:
            continue
        directive = (opening[2] or "").strip("{}")
        kind = directive.removeprefix("prf:")
        if directive.startswith("prf:") and kind in STATEMENTS:
            found.append((kind, _label(lines[i + 1 :])))
        elif (
            opening[1][0] != ":"
            and line.strip() != opening[1]
            and not directive.startswith(("prf:", "admonition"))
        ):
            fence = opening[1] if directive in ("", "code-block", "code-cell", "code") else ""
    return found


def _label(body: list[str]) -> str | None:
    """Read the label from a directive's options, ``:label: x`` or YAML between two ``---``."""
    for line in body:
        option = re.match(r"\s*:?(\w+):\s*(\S*)", line)
        if option and option[1] == "label":
            return option[2]
        if not option and line.strip() != "---":
            return None
    return None


def complaints(pages: Mapping[str, str], ledger: Iterable[tuple[str, str]]) -> list[str]:
    """Compare the statements of the pages (file stem -> text) with the ledger's (id, chapter)."""
    found: list[str] = []
    written: dict[str, str] = {}
    for stem, page in pages.items():
        for kind, label in statements(page):
            if label is None:
                found.append(f"{stem}: a {kind} has no label")
            elif label in written:
                found.append(f"{stem}: the label {label} is also in {written[label]}")
            else:
                written[label] = stem
    known = dict(ledger)
    found += [
        f"{stem}: {label} is not in the ledger (ntkft/claims.py)"
        for label, stem in written.items()
        if label not in known
    ]
    for label, chapter in known.items():
        if label not in written:
            found.append(f"{label} is in the ledger and no chapter states it (it should be in {chapter}.md)")
        elif written[label] != chapter:
            found.append(f"{label} is in {written[label]}.md and the ledger says {chapter}")
    return found


# --- The book -----------------------------------------------------------------------------------------------

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(CHAPTERS.glob("*.md"))}
MENTIONED = sorted(set(PAGES) | {entry.chapter for entry in LEDGER})


@pytest.mark.parametrize("chapter", MENTIONED)
def test_the_ledger_and_the_chapter_name_the_same_statements(chapter):
    everything = complaints(PAGES, ((entry.id, entry.chapter) for entry in LEDGER))
    mine = [text for text in everything if re.search(rf"\b{chapter}(:|\.md| and|$)", text)]
    assert not mine, "\n".join(mine)


def test_nothing_else_is_wrong_with_the_statements():
    """The same for all chapters at once, so that nothing falls between the chapters."""
    everything = complaints(PAGES, ((entry.id, entry.chapter) for entry in LEDGER))
    assert not everything, "\n".join(everything)


def test_the_chapters_have_statements():
    assert sum(len(statements(page)) for page in PAGES.values()) >= 6  # the parser reads the book


# --- The ledger ---------------------------------------------------------------------------------------------


@each_claim
def test_the_check_holds(entry):
    """For a refuted claim, that the data contradict it."""
    verdict = verify(entry.id)
    assert isinstance(verdict, Verdict) and isinstance(verdict.holds, bool), (
        f"holds is a {type(verdict.holds)}"
    )
    assert verdict.evidence.strip()
    assert verdict.holds, verdict.evidence


@each_claim
def test_the_check_can_fail(entry):
    verdict = entry.check(broken=True)
    assert verdict.holds is False, f"the check holds also for a wrong claim: {verdict.evidence}"


def test_ids_are_unique():
    ids = [entry.id for entry in LEDGER]
    assert sorted(set(ids)) == sorted(ids)


def test_every_check_backs_one_claim():
    checks = [entry.check for entry in LEDGER]
    assert len(set(checks)) == len(checks)


@each_claim
def test_entries_are_complete(entry):
    assert entry.kind in KINDS, entry.kind
    assert re.fullmatch(r"(thm|lem|prop|cor|obs|conj)-[a-z0-9-]+", entry.id), entry.id
    assert entry.statement.strip().endswith("."), entry.statement
    assert claim(entry.id) is entry


@each_claim
def test_the_kind_of_statement_is_that_of_its_label(entry):
    """A label ``lem-…`` belongs to a lemma."""
    kinds = {label: kind for kind, label in statements(PAGES.get(entry.chapter, ""))}
    if entry.id in kinds:  # if not, the comparison with the chapter says so
        assert kinds[entry.id].startswith(entry.id.split("-")[0].replace("thm", "theorem"))


def test_an_unknown_claim_is_an_error_that_lists_the_known():
    with pytest.raises(InputError, match=r"There is no claim 'thm-none': the ledger has .*thm-filter"):
        verify("thm-none")


# --- The comparison itself ----------------------------------------------------------------------------------

PAGE = """
```{prf:theorem} One
:label: thm-one
Text with {prf:ref}`lem-two`.
```
````{prf:lemma}
---
label: lem-two
class: dropdown
---
:::{prf:observation} Nested
:nonumber:
:label: obs-three
:::
````
```{prf:proof}
:label: proof-of-nothing
```
```{prf:definition} Not a claim
:label: def-four
```
~~~~markdown
```{prf:theorem} An example of how to write one
:label: thm-example
```
~~~~
```{code-cell} python
label = ":label: thm-code"
```
  ```{prf:corollary}
  :label: cor-indented
  ```
```{prf:conjecture} No label
The text.
:label: too-late
```
"""


def test_the_parser_reads_the_toy_page():
    assert statements(PAGE) == [
        ("theorem", "thm-one"), ("lemma", "lem-two"), ("observation", "obs-three"), ("corollary", "cor-indented"),
        ("conjecture", None),
    ]  # fmt: skip


def test_the_comparison_complains():
    page = "```{prf:theorem} One\n:label: thm-one\n```\n"
    assert complaints({"a": page}, [("thm-one", "a")]) == []
    assert complaints({"a": page}, []) == ["a: thm-one is not in the ledger (ntkft/claims.py)"]
    assert complaints({"a": page}, [("thm-one", "b")]) == ["thm-one is in a.md and the ledger says b"]
    assert complaints({"a": ""}, [("thm-one", "a")]) == [
        "thm-one is in the ledger and no chapter states it (it should be in a.md)"
    ]
    assert complaints({"a": page, "b": page}, [("thm-one", "a")]) == ["b: the label thm-one is also in a"]
    assert complaints({"a": page.replace(":label: thm-one", "")}, []) == ["a: a theorem has no label"]
