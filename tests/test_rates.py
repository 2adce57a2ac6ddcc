"""The interactive figure against the package, and the helpers of the rates experiment against brute force."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

import ntkft
from ntkft.errors import InputError
from ntkft.experiments import rates
from ntkft.explorer import explorer_numbers, rates_explorer
from ntkft.stopping import rademacher_rule


def by_the_package(n, sigma, nu):
    """The same problem as a kernel matrix, solved by `descend` and the rules."""
    j = np.arange(1.0, n + 1)
    eigenvalues = j ** (-2 * nu)
    target = np.sqrt(n * eigenvalues / (j * (1 / j).sum()))
    path = ntkft.descend(n * np.diag(eigenvalues), target)
    return path, target, rademacher_rule(path.spectrum, sigma)


@pytest.mark.parametrize(("n", "sigma", "nu"), [(10, 0.05, 0.6), (60, 0.5, 1.0), (200, 1.0, 2.0)])
def test_numbers_are_those_of_the_package(n, sigma, nu):
    numbers = explorer_numbers(n, sigma, nu)
    path, target, stop = by_the_package(n, sigma, nu)
    assert path.hilbert_norm(target, floor=0) == pytest.approx(1)
    assert numbers["eta"] == pytest.approx(stop.eta)
    assert numbers["steps"] == stop.steps(step_size=1.0)
    assert numbers["bias2"] == pytest.approx(float(path.bias2(stop.eta, target)))
    assert numbers["variance"] == pytest.approx(float(path.variance(stop.eta, sigma)))
    times = np.geomspace(0.01, 1e7, 4001)
    risk = path.bias2(times, target) + path.variance(times, sigma)
    assert numbers["oracle_risk"] == pytest.approx(risk.min(), rel=1e-4)
    assert numbers["oracle_risk"] <= risk.min()


def browser_numbers(page, tmp_path):
    """Open the page in a headless browser; return what the script has written into it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on the path")
    path = tmp_path / "page.html"
    path.write_text(f"<!doctype html><meta charset='utf-8'><body>{page}</body>", encoding="utf-8")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, [
        json.loads(html.unescape(found)) for found in re.findall(r'data-numbers="([^"]*)"', done.stdout)
    ]


@pytest.mark.slow
def test_the_script_computes_what_the_package_computes(tmp_path):
    starts = [(10, 0.05, 0.6), (1000, 0.5, 1.0), (10_000, 1.0, 2.5), (316, 0.1, 0.8)]
    pages = "".join(rates_explorer(*start).data for start in starts)
    dom, found = browser_numbers(pages, tmp_path)
    assert len(found) == len(starts)
    for (n, sigma, nu), script in zip(starts, found, strict=True):
        assert (script["n"], script["sigma"], script["nu"]) == (n, sigma, nu)
        for key, value in explorer_numbers(n, sigma, nu).items():
            # A minimum is flat: its place is known to the root of its depth's precision.
            assert script[key] == pytest.approx(value, rel=1e-5 if key == "oracle_eta" else 1e-7, abs=1e-9), (
                key
            )
    assert dom.count("<path") >= 20 * len(starts) and "NaN" not in dom


def test_the_figure_is_accessible_and_needs_no_network():
    page = rates_explorer().data
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("<input") == 3 == page.count("<label for=")
    for needed in ("<noscript>", 'role="img"', "<title", "<desc", "aria-live", "viewBox", "aria-valuetext"):
        assert needed in page
    assert "__" not in page  # no placeholder is left


def test_ids_are_unique_when_a_page_holds_two_figures():
    both = rates_explorer().data + rates_explorer().data
    ids = re.findall(r'\bid="([^"]+)"', both)
    assert len(ids) == len(set(ids)) > 10


def test_a_start_outside_the_sliders_is_refused():
    with pytest.raises(InputError, match="n is 5 and its slider runs from 10 to 10000"):
        rates_explorer(n=5)
    with pytest.raises(InputError, match="sigma is 3"):
        rates_explorer(sigma=3)
    with pytest.raises(InputError, match="nu is -1"):
        explorer_numbers(10, 0.5, -1)


@pytest.mark.parametrize("nu", [1, 2])
def test_the_circle_kernel_is_its_series(nu):
    t, j = np.linspace(-1.3, 1.3, 27), np.arange(1, 100_001)
    series = 1 + 2 * np.cos(2 * np.pi * np.outer(t, j)) @ j ** (-2.0 * nu)
    np.testing.assert_allclose(rates.circle_kernel(t, nu), series, atol=3e-5)


@pytest.mark.parametrize("nu", [1, 2])
def test_the_circle_target_has_norm_one(nu):
    x = (np.arange(8192) + 0.5) / 8192  # more points than twice the harmonics: the transform is exact
    power = np.abs(np.fft.rfft(rates.circle_target(x, nu))[1:] / len(x)) ** 2
    j = np.arange(1, len(power) + 1)
    assert (2 * power * j ** (2.0 * nu))[: rates.HARMONICS].sum() == pytest.approx(1)


def test_simulation_is_exact_and_its_mean_is_the_expected_error():
    """Few coordinates by plain formulas; many draws against the expectation."""
    eigenvalues, sigma = np.arange(1, 301) ** -1.5, 0.5
    out = rates.simulate(eigenvalues, sigma, 1, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    d = rates.hard_dimension(eigenvalues, out["radius2"])
    theta = np.zeros(300)
    theta[:d] = rng.choice([-1.0, 1.0], d) * sigma / np.sqrt(300)
    noise = sigma * rng.standard_normal(300) / np.sqrt(300)
    assert (theta[:d] ** 2 / eigenvalues[:d]).sum() <= 1
    share = -np.expm1(-eigenvalues / out["radius2"])
    assert out["stop"][0] == pytest.approx(((share * (theta + noise) - theta) ** 2).sum(), rel=1e-5)
    many = rates.simulate(eigenvalues, sigma, 4000, np.random.default_rng(4))
    spread = many["stop"].std() / np.sqrt(4000)
    assert abs(many["stop"].mean() - many["expected"]) < 4 * spread
    assert (many["oracle"] <= many["stop"]).all()


def test_a_slope_is_found_and_its_interval_covers():
    rng, log_n, hits = np.random.default_rng(5), np.log(np.geomspace(10, 1000, 9)), 0
    for trial in range(100):
        errors = np.exp(-0.7 * log_n)[:, None] * rng.chisquare(10, (9, 40)) / 10
        interval = rates.slope_interval(log_n, errors, trial)
        hits += interval["low"] <= -0.7 <= interval["high"]
    assert 86 <= hits <= 100


def test_population_radius_solves_its_equation():
    n, nu = 100, 1
    u = rates.population_radius2(n, nu)
    mu = np.r_[1.0, np.repeat(np.arange(1.0, 200_001) ** -2, 2)]
    assert np.minimum(mu, u).sum() / n == pytest.approx(u**2 / (4 * np.e**2 * rates.SIGMA**2))
