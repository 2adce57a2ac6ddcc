r"""Several task vectors made into one: sums and means, and the rules that first throw most of each vector away.

* ``"sum"`` and ``"mean"``: :math:`\sum_k w_k\tau_k`, and the same divided by :math:`\sum_k w_k`.
* ``"magnitude_prune"``: the sum of what is left when of each vector only the largest entries are kept.
* ``"ties"``: the same pruning; then each entry elects a sign, by the sum of the pruned vectors, and averages those that have it.
* ``"dare_linear"``, ``"dare_ties"``: entries are dropped at random instead, and the others divided by `density`, so that the
  pruned vector has τ as its expectation.

The rules are those of `peft.utils.merge_utils`. They see one parameter at a time, so `density` holds in each tensor, where
the paper on TIES prunes the vector as a whole; the sign is elected without the weights.

Sources: Ilharco et al. 2023 (arXiv:2212.04089) for the sum; Yadav et al. 2023 (arXiv:2306.01708) for TIES; Yu et al. 2024
(arXiv:2311.03099) for DARE.

Example
-------
>>> import torch
>>> a = TaskVector.from_tensors({"w": torch.tensor([4.0, 1.0, -2.0, 0.0])})
>>> b = TaskVector.from_tensors({"w": torch.tensor([2.0, -1.0, 6.0, 0.0])})
>>> merge([a, b], "mean").tensors["w"].tolist()
[3.0, 0.0, 2.0, 0.0]
>>> merge([a, b], "ties", density=0.5).tensors["w"].tolist()   # 4, -2 and 2, 6 are kept; the third entry elects +
[3.0, 0.0, 6.0, 0.0]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ntkft.errors import InputError
from ntkft.task_vectors import TaskVector, common_base, common_dtype, linear_combination, shared_names

LINEAR = ("sum", "mean")
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


def merge(
    vectors: Sequence[TaskVector],
    method: str = "sum",
    *,
    weights: Sequence[float] | None = None,
    density: float = 0.2,
    seed: int = 0,
) -> TaskVector:
    r"""Merge task vectors into one.

    Parameters
    ----------
    vectors : list of TaskVector
        Of the same shapes; of the same names too, unless they have one base (`ntkft.task_vectors.shared_names`).
    method : {"sum", "mean", "ties", "dare_linear", "dare_ties", "magnitude_prune"}
        The rule.
    weights : list of float, optional
        :math:`w_k`, one for each vector; all 1 by default. A mean needs a sum that is not zero.
    density : float
        Share of each tensor's entries that is kept, in (0, 1]; not used by "sum" and "mean". Of p entries a rule by
        magnitude keeps ⌊density·p⌋, which may be none.
    seed : int
        Of the random pruning; torch's global generator is left as it was.

    Returns
    -------
    TaskVector
        Summed in float64. Its base is the vectors' if they have one in common.

    Raises
    ------
    InputError
        If there is no vector, they do not fit together, or an option is out of range.

    Example
    -------
    >>> tau = TaskVector.from_tensors({"w": torch.ones(1000)})
    >>> merge([tau], "dare_linear", density=0.5, seed=1).tensors["w"].unique().tolist()
    [0.0, 2.0]
    """
    vectors = list(vectors)
    if not vectors or not all(isinstance(vector, TaskVector) for vector in vectors):
        raise InputError(f"merge was given {[type(v).__name__ for v in vectors]} and needs a list of at least one TaskVector.")
    if method not in LINEAR + PRUNING:
        raise InputError(f"method is {method!r}: choose one of {', '.join(LINEAR + PRUNING)}.")
    w = [1.0] * len(vectors) if weights is None else [float(x) for x in weights]
    if len(w) != len(vectors) or not all(map(math.isfinite, w)):
        raise InputError(f"weights is {w} and there are {len(vectors)} task vectors: give one finite number for each.")
    if method == "mean":
        if sum(w) == 0:
            raise InputError(f"The weights {w} sum to zero and have no mean: take method='sum'.")
        w = [x / sum(w) for x in w]
    if not 0 < density <= 1:
        raise InputError(f"density is {density} and must be in (0, 1]: it is the share of entries that is kept.")
    if method in LINEAR:
        return linear_combination(vectors, w)
    return _pruned(vectors, _rule(method), torch.tensor(w, dtype=torch.float64), float(density), seed)


def _pruned(vectors: Sequence[TaskVector], rule: Callable[..., Tensor], weights: Tensor, density: float, seed: int) -> TaskVector:
    merged = {}
    # peft draws from the global generator and warns at density 1, where nothing is pruned.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density")
        torch.default_generator.manual_seed(seed)  # of the CPU only: torch.manual_seed would reseed every GPU
        for name in shared_names(vectors):
            there = [vector.tensors[name] for vector in vectors if name in vector.tensors]
            nothing = torch.zeros_like(there[0], dtype=torch.float64)
            parts = [vector.tensors[name].double() if name in vector.tensors else nothing for vector in vectors]
            merged[name] = rule(parts, weights, density=density).to(common_dtype(there))
    out = TaskVector.from_tensors({}, base=common_base(vectors))
    out.tensors = merged
    return out


def _rule(method: str) -> Any:
    try:
        from peft.utils import merge_utils
    except ImportError:
        raise InputError(f"method={method!r} needs the package peft, which is not installed: pip install peft.") from None
    return getattr(merge_utils, method)
