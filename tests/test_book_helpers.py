"""The helpers that write numbers on the pages."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ntkft.book import with_interval


def test_a_mean_over_runs_comes_with_students_interval() -> None:
    runs = np.array([0.1, 0.2, 0.4, 0.5, 0.3])
    low, high = stats.ttest_1samp(runs, 0.0).confidence_interval(0.95)
    assert with_interval(runs) == f"0.30 ± {(high - low) / 2:.2f}"
    assert with_interval(runs, 3) == f"0.300 ± {(high - low) / 2:.3f}"


@pytest.mark.parametrize(
    ("runs", "text"),
    [([0.2], "0.20"), ([-0.001], "0.00"), ([-0.4, -0.6], "−0.50"), ([-1, -1, -1], "−1.00 ± 0.00")],
)
def test_two_runs_have_no_interval_and_minus_is_a_minus(runs: list[float], text: str) -> None:
    assert with_interval(np.array(runs)) == text
