"""The stored kernels of SmolLM2 against the present engine: a few entries, computed anew.

Results do not go stale when the engine is rewritten. This is what holds it to the numbers that are stored.
"""

from __future__ import annotations

import numpy as np
import pytest

import ntkft
from ntkft.experiments.llm_kernel_list import KERNELS
from ntkft.experiments.llm_kernels import stored
from ntkft.experiments.stopping_rule import DOMAINS, TEXTS, stored_kernel
from tests.helpers import relative


@pytest.fixture(scope="module")
def readout() -> ntkft.Readout:
    return ntkft.prompt_readout(ntkft.load_model("smollm2"))


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
def test_entries_are_what_the_engine_computes_today(readout, domain):
    task = ntkft.load_task(domain, n=TEXTS, seed=0)
    stored = stored_kernel(domain)
    assert stored.matches(task.texts)
    rows = np.argsort([len(text) for text in task.texts])[
        [0, 60, 128]
    ]  # short ones: the check should be quick
    texts = [task.texts[i] for i in rows]
    fresh = ntkft.empirical_ntk(readout, texts, progress=False)
    error = relative(stored.block(rows).matrix, fresh.matrix)
    assert error < 1e-5, (
        f"the stored kernel of {domain} differs by {error:.1e}: `ntkft run stopping_rule --tier full`"
    )
    np.testing.assert_allclose(fresh.scores, stored.scores[rows], atol=1e-3)


# --- The kernels of the chapters on language models ---------------------------------------------------------

LANGUAGE = [wanted for wanted in KERNELS if wanted.model == "minilm"] + [
    wanted for wanted in KERNELS if wanted.model == "smollm2" and wanted.task in ("tweets", "newsgroups")
]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", LANGUAGE, ids=lambda wanted: wanted.name)
def test_two_texts_of_each_language_model_kernel(wanted):
    kernel, task = stored(wanted.name)
    assert kernel.n == wanted.n
    rows = np.argsort([len(text) for text in task.texts], kind="stable")[[0, 9]]
    fresh = ntkft.empirical_ntk(wanted.readout(), [task.texts[i] for i in rows], progress=False)
    # the random twins' gradients are nearly parallel: single precision of the file and of the passes shows a little more
    assert relative(kernel.block(rows).matrix, fresh.matrix) < 1e-5
    np.testing.assert_allclose(fresh.scores, kernel.scores[rows], atol=1e-3)
    assert kernel.info["manifest"], "a stored kernel says where it comes from"
