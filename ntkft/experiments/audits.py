"""Leakage and utility of a representation, as an auditor finds them on held-out samples."""

from __future__ import annotations

import numpy as np

from ntkft.infomin import audit

NETWORKS = 2  # pairs of networks among the auditors of each fold


def judged(found: dict[str, np.ndarray], attribute: np.ndarray, wanted: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return what is kept of a run that ended with the representation ``found["z"]`` (n, d).

    Parameters
    ----------
    found : dict of ndarray
        A run's outcome; its seconds, the task's losses and, where there is one, the share of right answers are kept.
    attribute, wanted : (n,) or (n, q)
        What should be forgotten, and what should be told.
    seed : int
        Of the auditor.

    Returns
    -------
    dict
        leakage and utility, each the dependence that the auditor finds, with the ends of its interval: (3,).
    """
    kept: dict[str, np.ndarray] = {key: found[key] for key in ("spent", "task", "right") if key in found}
    for name, target in (("leakage", attribute), ("utility", wanted)):
        report = audit(found["z"], target, seed=seed, networks=NETWORKS)
        kept[name] = np.array([report.dependence, report.low, report.high])
    return kept
