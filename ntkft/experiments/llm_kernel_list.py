"""Which kernels the chapters on language models use, in the order of making; the command that makes them.

A module of its own, so that a longer list does not make stale what was computed from the shorter one.

    python -m ntkft.experiments.llm_kernel_list
"""

from __future__ import annotations

import time

from ntkft.experiments.llm_kernels import DOMAINS, TOPICS, Wanted, make

KERNELS = [
    *(Wanted("minilm", "pretrained", task, 1024) for task in DOMAINS),
    Wanted("minilm", "pretrained", "newsgroups", 1024),
    *(Wanted("minilm", "random", task, 512) for task in DOMAINS),
    *(Wanted("smollm2", "pretrained", task, 1024) for task in ("amazon", "tweets", "movies", "nyt")),
    Wanted("minilm", "pretrained", "reuters", 512),
    *(Wanted("minilm", "pretrained", task, 512, head) for head in (1, 2) for task in DOMAINS),
    *(Wanted("minilm", "random", task, 256) for task in TOPICS),
    *(Wanted("smollm2", "random", task, 192) for task in ("amazon", "tweets")),
    *(Wanted("smollm2", "pretrained", task, 192) for task in TOPICS),
]


def make_all() -> None:
    """Compute what is missing, one kernel after the other; an interrupt loses at most the one under way."""
    for wanted in KERNELS:
        started = time.perf_counter()
        make(wanted)
        print(f"{wanted.name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    make_all()
