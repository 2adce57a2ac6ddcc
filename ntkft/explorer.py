r"""An interactive figure: squared bias, variance and the stopping time of a power-law spectrum, under three sliders.

Claim: everything that the figure shows follows from n, σ and ν alone. The script in the page computes it anew when a
slider moves; `explorer_numbers` computes the same with the package, and a test compares the two.

The problem: λ_j = j^(-2ν) for j ≤ n, gradient flow, R = 1, and a target of norm 1 that gives each eigenvector a share of
the squared norm in proportion to 1/j, θ_j² = λ_j / (j H_n) with H_n = Σ_{j≤n} 1/j.

Source: the book's chapter "Rates follow the eigenvalues".

Example
-------
>>> numbers = explorer_numbers(n=1000, sigma=0.5, nu=1.0)
>>> numbers["bias2"] <= numbers["bias2_bound"], numbers["variance"] <= numbers["variance_bound"]
(True, True)
"""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from ntkft.errors import InputError
from ntkft.spectrum import Spectrum, require_positive

NOTCHES = 20  # of the n slider, per factor of ten
N_RANGE, SIGMA_RANGE, NU_RANGE = (10, 10_000), (0.05, 1.0), (0.6, 2.5)
_NUMBER = count()  # a page may hold several figures; their ids must differ


def explorer_numbers(n: int, sigma: float, nu: float) -> dict[str, float]:
    """Return what the figure prints, computed with the package.

    Parameters
    ----------
    n : int
        Number of eigenvalues.
    sigma, nu : float
        Noise level; λ_j = j^(-2ν).

    Returns
    -------
    dict
        ``eta``, ``radius2``, ``steps`` (of size 1/λ_1 = 1) of the rule; ``bias2``, ``bias2_bound``, ``variance``,
        ``variance_bound``, ``risk`` there; ``oracle_eta``, ``oracle_risk`` at the best time; ``excess`` of the rule over it.

    Raises
    ------
    InputError
        If n, sigma or nu is not positive.

    Example
    -------
    >>> round(explorer_numbers(n=100, sigma=0.2, nu=1.0)["steps"])
    12
    """
    n = int(require_positive("n", n))
    j = np.arange(1.0, n + 1)
    eigenvalues = j ** (-2 * require_positive("nu", nu))
    theta2 = eigenvalues / (j * (1 / j).sum())
    spectrum = Spectrum(eigenvalues)

    def parts(eta: float) -> tuple[float, float]:
        left = np.exp(-eta * eigenvalues)
        return float((left**2 * theta2).sum()), float(sigma**2 * ((1 - left) ** 2).mean())

    def log_risk(log_eta: float) -> float:
        return float(np.log(sum(parts(float(np.exp(log_eta))))))

    radius2 = spectrum.critical_radius(sigma) ** 2
    grid = np.linspace(np.log(0.01), np.log(1e7), 201)
    k = int(np.clip(np.argmin([log_risk(u) for u in grid]), 1, 199))
    best = minimize_scalar(
        log_risk, bounds=(grid[k - 1], grid[k + 1]), method="bounded", options={"xatol": 1e-10}
    )
    eta = 1 / radius2
    bias2, variance = parts(eta)
    oracle = float(np.exp(best.fun))
    return {
        "eta": eta,
        "radius2": radius2,
        "steps": float(np.floor(eta)),
        "bias2": bias2,
        "bias2_bound": 1 / (2 * np.e * eta),
        "variance": variance,
        "variance_bound": sigma**2 * eta * float(spectrum.rademacher(eta**-0.5)) ** 2,
        "risk": bias2 + variance,
        "oracle_eta": float(np.exp(best.x)),
        "oracle_risk": oracle,
        "excess": (bias2 + variance) / oracle - 1,
    }


def rates_explorer(n: int = 1000, sigma: float = 0.5, nu: float = 1.0) -> Any:
    """Return the figure as an IPython HTML object that works in a static page; the arguments are where it starts.

    `n` is moved to the nearest notch of its slider, 20 to a factor of ten.

    Raises
    ------
    InputError
        If an argument is outside its slider.

    Example
    -------
    >>> "<svg" in rates_explorer().data
    True
    """
    from IPython.display import HTML

    for name, value, (low, high) in (
        ("n", n, N_RANGE),
        ("sigma", sigma, SIGMA_RANGE),
        ("nu", nu, NU_RANGE),
    ):
        if not low <= value <= high:
            raise InputError(f"{name} is {value} and its slider runs from {low} to {high}: start inside.")
    notch = round((np.log10(n) - 1) * NOTCHES)
    start = explorer_numbers(round(10 ** (1 + notch / NOTCHES)), sigma, nu)
    still = (
        f"This figure needs JavaScript. At its start (n = {round(10 ** (1 + notch / NOTCHES))}, σ = {sigma:g}, ν = {nu:g}) "
        f"the rule stops at η̂ = {start['eta']:.3g} with a risk of {start['risk']:.3g}; the best time is "
        f"{start['oracle_eta']:.3g}, with {start['oracle_risk']:.3g}."
    )
    text = _PAGE.replace("__SCRIPT__", _SCRIPT).replace("__STILL__", still)
    entries = {"ID": f"ra-explorer-{next(_NUMBER)}", "N": notch, "SIGMA": sigma, "NU": nu}
    for key, entry in entries.items():
        text = text.replace(f"__{key}__", str(entry))
    return HTML(text)


_PAGE = """
<div id="__ID__" role="group" aria-label="Interactive figure: bias, variance and stopping time of a power-law spectrum"
 style="color-scheme:light;background:#fff;color:#111;
border:1px solid #bbb;border-radius:6px;padding:12px;max-width:660px;font:15px/1.4 sans-serif">
<div style="display:flex;flex-wrap:wrap;gap:6px 18px">
<label for="__ID__-n" style="flex:1 1 170px">texts <i>n</i> = <output id="__ID__-n-out" for="__ID__-n"></output>
<input id="__ID__-n" type="range" min="0" max="60" step="1" value="__N__" style="width:100%"></label>
<label for="__ID__-s" style="flex:1 1 170px">noise <i>σ</i> = <output id="__ID__-s-out" for="__ID__-s"></output>
<input id="__ID__-s" type="range" min="0.05" max="1" step="0.05" value="__SIGMA__" style="width:100%"></label>
<label for="__ID__-v" style="flex:1 1 170px">decay <i>ν</i> = <output id="__ID__-v-out" for="__ID__-v"></output>
<input id="__ID__-v" type="range" min="0.6" max="2.5" step="0.1" value="__NU__" style="width:100%"></label>
</div>
<svg viewBox="0 0 480 330" role="img" aria-labelledby="__ID__-title __ID__-desc" style="width:100%;height:auto;display:block"
 font-family="sans-serif" font-size="13" fill="#111">
<title id="__ID__-title">Squared bias and variance against kernel time</title>
<desc id="__ID__-desc">Logarithmic axes. The squared bias falls, the variance rises, each below its dashed bound. A vertical
line marks the stop of the rule, a ring the best time on the curve of their sum. The numbers stand below the plot.</desc>
<defs><clipPath id="__ID__-clip"><rect x="52" y="12" width="416" height="270"/></clipPath></defs>
<g data-part="frame"></g><g data-part="curves" clip-path="url(#__ID__-clip)" fill="none"></g>
</svg>
<p style="margin:4px 0">
<span style="color:#0072b2"><b>━</b> squared bias, <b>╍</b> its bound 1/(2eη)</span>;
<span style="color:#b34700"><b>━</b> variance, <b>╍</b> its bound</span>;
<b>━</b> their sum, the risk; <b>┊</b> the rule's stop; <b>○</b> the best time</p>
<p data-part="numbers" aria-live="polite" style="margin:4px 0"></p>
<noscript><p>__STILL__</p></noscript>
</div>
<script>__SCRIPT__</script>
"""

_SCRIPT = """
(function () {
  var id = "__ID__", root = document.getElementById(id), NS = "http://www.w3.org/2000/svg", E = Math.E;
  function part(name) { return root.querySelector('[data-part="' + name + '"]'); }
  function input(name) { return document.getElementById(id + "-" + name); }
  function X(eta) { return 52 + 416 * (Math.log10(eta) + 1) / 7; }            // 0.1 to 1e6
  function Y(value) { return 12 + 270 * (1 - Math.log10(value)) / 7; }        // 10 down to 1e-6
  function draw(parent, tag, attributes, text) {
    var node = document.createElementNS(NS, tag), key;
    for (key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    parent.appendChild(node);
  }
  function power(k) {
    return k === 0 ? "1" : "10" + String(k).replace(/./g, function (c) { return "⁰¹²³⁴⁵⁶⁷⁸⁹"[+c] || "⁻"; });
  }
  function frame() {
    var g = part("frame"), k;
    for (k = -1; k <= 6; k++) {
      draw(g, "path", { d: "M" + X(Math.pow(10, k)) + " 12V282", stroke: "#ddd" });
      draw(g, "text", { x: X(Math.pow(10, k)), y: 298, "text-anchor": "middle" }, power(k));
    }
    for (k = -6; k <= 1; k++) {
      draw(g, "path", { d: "M52 " + Y(Math.pow(10, k)) + "H468", stroke: "#ddd" });
      draw(g, "text", { x: 46, y: Y(Math.pow(10, k)) + 4, "text-anchor": "end" }, power(k));
    }
    draw(g, "text", { x: 260, y: 319, "text-anchor": "middle" }, "kernel time η");
    draw(g, "text", { transform: "translate(13 147) rotate(-90)", "text-anchor": "middle" }, "squared error");
  }
  function problem(n, sigma, nu) {
    var lam = new Float64Array(n), theta2 = new Float64Array(n), H = 0, j;
    for (j = 1; j <= n; j++) H += 1 / j;
    for (j = 1; j <= n; j++) { lam[j - 1] = Math.pow(j, -2 * nu); theta2[j - 1] = lam[j - 1] / (j * H); }
    function at(eta) {
      var b = 0, v = 0, m = 0, left, i;
      for (i = 0; i < n; i++) {
        left = Math.exp(-eta * lam[i]);
        b += left * left * theta2[i]; v += (1 - left) * (1 - left); m += Math.min(1, eta * lam[i]);
      }
      var s = sigma * sigma / n;
      return { bias2: b, variance: s * v, risk: b + s * v, bias2_bound: 1 / (2 * E * eta), variance_bound: s * m };
    }
    // The rule: the last eta with variance bound <= 1/(4e² eta), by bisection in log eta.
    var low = -10, high = 30, mid, k;
    for (k = 0; k < 70; k++) {
      mid = (low + high) / 2;
      if (at(Math.exp(mid)).variance_bound <= 1 / (4 * E * E * Math.exp(mid))) low = mid; else high = mid;
    }
    var eta = Math.exp(low), best = 1, value = Infinity, a = Math.log(0.01), h = Math.log(1e9) / 200, risk;
    for (k = 0; k <= 200; k++) { risk = at(Math.exp(a + k * h)).risk; if (risk < value) { value = risk; best = k; } }
    best = Math.min(Math.max(best, 1), 199);
    var left = a + (best - 1) * h, right = left + 2 * h, golden = (Math.sqrt(5) - 1) / 2, p, q;
    for (k = 0; k < 45; k++) {
      p = right - golden * (right - left); q = left + golden * (right - left);
      if (at(Math.exp(p)).risk < at(Math.exp(q)).risk) right = q; else left = p;
    }
    var out = at(eta), oracle = Math.exp((left + right) / 2);
    out.eta = eta; out.radius2 = 1 / eta; out.steps = Math.floor(eta);
    out.oracle_eta = oracle; out.oracle_risk = at(oracle).risk; out.excess = out.risk / out.oracle_risk - 1;
    return { at: at, numbers: out };
  }
  function show() {
    var n = Math.round(Math.pow(10, 1 + input("n").value / 20)), sigma = +input("s").value, nu = +input("v").value;
    var p = problem(n, sigma, nu), out = p.numbers, g = part("curves"), lines = {}, k, eta, now, key;
    var style = { bias2: ["#0072b2", 2, ""], bias2_bound: ["#0072b2", 1.5, "6 4"], variance: ["#d55e00", 2, ""],
      variance_bound: ["#d55e00", 1.5, "6 4"], risk: ["#111", 2.5, ""] };
    [["n", n], ["s", sigma.toFixed(2)], ["v", nu.toFixed(1)]].forEach(function (item) {
      input(item[0] + "-out").textContent = item[1];
      input(item[0]).setAttribute("aria-valuetext", item[1]);
    });
    while (g.firstChild) g.removeChild(g.firstChild);
    for (key in style) lines[key] = "";
    for (k = 0; k <= 105; k++) {
      eta = Math.pow(10, -1 + k / 15); now = p.at(eta);
      for (key in style) lines[key] += (k ? "L" : "M") + X(eta).toFixed(1) + " " + Y(Math.max(now[key], 1e-9)).toFixed(1);
    }
    for (key in style) {
      draw(g, "path", { d: lines[key], stroke: style[key][0], "stroke-width": style[key][1], "stroke-dasharray": style[key][2] });
    }
    draw(g, "path", { d: "M" + X(out.eta) + " 12V282", stroke: "#111", "stroke-dasharray": "2 3" });
    draw(g, "circle", { cx: X(out.oracle_eta), cy: Y(out.oracle_risk), r: 6, stroke: "#111", "stroke-width": 2 });
    part("numbers").textContent = "The rule: ε̂² = " + out.radius2.toPrecision(3) + ", η̂ = " + out.eta.toPrecision(3) +
      ", T̂ = " + (out.steps || "0 (take smaller steps)") + " steps of 1/λ₁; risk " + out.risk.toPrecision(3) +
      ". The best time: η = " + out.oracle_eta.toPrecision(3) + ", risk " + out.oracle_risk.toPrecision(3) +
      ". The rule's risk is " + (100 * out.excess).toFixed(1) + " % above the best.";
    out.n = n; out.sigma = sigma; out.nu = nu;
    root.setAttribute("data-numbers", JSON.stringify(out));
  }
  frame();
  ["n", "s", "v"].forEach(function (name) { input(name).addEventListener("input", show); });
  show();
})();
"""
