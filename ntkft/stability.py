r"""How far a network can leave its tangent, and what that does to the time to stop.

Claim: let :math:`\|\nabla f(x;\theta)\| \le L_1` and :math:`\|\nabla^2 f(x;\theta)\|_{op} \le \beta` near θ0, wherever θ0 comes
from. A model of H heads, :math:`f = H^{-1/2}\sum_h a(x;\theta_h)`, has :math:`\beta = L_2/\sqrt H`. Then for weights at
distance R_t from θ0, and for gradient flow up to kernel time η,

.. math::
    \|\nabla f - \nabla f_0\| \le \beta R_t, \quad |k_\theta - k_0| \le 2 L_1 \beta R_t, \quad
    |f - f_{lin}| \le \tfrac12 \beta R_t^2, \quad R_t \le \sqrt{\eta L_0},

and the trained network stays within :math:`\tfrac{4\sqrt2}{3} L_1 \beta L_0 \eta^{3/2}` of the trained tangent.

Source: the book's chapter "Pretrained beginnings", where each bound is proved; Liu, Zhu & Belkin 2020 for the Hessian of
wide networks.

Example
-------
>>> round(kernel_change(gradient=2.0, curvature=head_curvature(3.0, heads=144), distance=0.5), 3)
0.5
"""

from __future__ import annotations

import numpy as np

from ntkft.errors import InputError
from ntkft.spectrum import Spectrum, require_positive


def head_curvature(hessian: float, heads: float) -> float:
    """Return β = L2/√H, the bound on the Hessian of a sum of H heads (`lem-curvature`)."""
    return hessian / float(np.sqrt(require_positive("heads", heads)))


def gradient_change(curvature: float, distance: float) -> float:
    """Return βR, the bound on ‖∇f(x;θ) - ∇f(x;θ0)‖ at distance R (`lem-gradient`)."""
    return curvature * distance


def kernel_change(gradient: float, curvature: float, distance: float) -> float:
    """Return 2 L1 β R, the bound on |k_θ - k_0| and on ‖K_θ - K‖_op (`lem-kernel`)."""
    return 2 * gradient * curvature * distance


def tangent_gap(curvature: float, distance: float) -> float:
    """Return βR²/2, the bound on |f(x;θ) - f_lin(x;θ)| at the same weights (`lem-tangent`)."""
    return 0.5 * curvature * distance**2


def travel(eta: float, loss: float, final_loss: float = 0.0, *, descent: bool = False) -> float:
    """Return the bound on ‖θ_t - θ0‖: √(η(L0-L_t)) for flow, √(2η(L0-L_t)) for descent with safe steps (`lem-travel`)."""
    return float(np.sqrt((2 if descent else 1) * eta * (loss - final_loss)))


def safe_step(gradient: float, curvature: float, loss: float) -> float:
    """Return 1/(L1² + β√(2L0)), up to which a step of gradient descent lowers the loss (`lem-travel`)."""
    return 1 / (gradient**2 + curvature * float(np.sqrt(2 * loss)))


def dynamics_gap(
    gradient: float, curvature: float, loss: float, eta: float, *, step_size: float | None = None
) -> float:
    r"""Return the bound on :math:`\|f_{\theta_t} - f_{lin,t}\|_n`, network against trained tangent (`thm-gap`).

    For flow (4√2/3) L1 β L0 η^{3/2}; for descent of step size ε, (8/3) L1 β L0 η^{3/2} + ε β L0.
    """
    if step_size is None:
        return 4 * np.sqrt(2) / 3 * gradient * curvature * loss * eta**1.5
    return 8 / 3 * gradient * curvature * loss * eta**1.5 + step_size * curvature * loss


def short_path(
    gradient: float, curvature: float, loss: float, eta: float, tangent_travel: float
) -> tuple[float, float]:
    r"""Return the certificate and the bound of the short path (`thm-short`).

    Parameters
    ----------
    gradient, curvature : float
        L1 and β.
    loss : float
        L0, the loss before training.
    eta : float
        Kernel time of gradient flow.
    tangent_travel : float
        How far the weights of the trained *tangent* are from θ0 at η (`tangent_travel`).

    Returns
    -------
    certificate : float
        β η (L1 r + √(2L0)) with r the tangent's travel; the bound holds if this is below 1/2.
    bound : float
        4√2 L1 β r √L0 η, on ‖f_θt - f_lin,t‖_n.
    """
    certificate = curvature * eta * (gradient * tangent_travel + np.sqrt(2 * loss))
    return float(certificate), float(4 * np.sqrt(2 * loss) * gradient * curvature * tangent_travel * eta)


def tangent_travel(eigenvalues: np.ndarray, target: np.ndarray, eta: float) -> float:
    r"""Return ‖θ_lin,η - θ0‖ of gradient flow on the tangent: :math:`[\sum_j s_j^2 z_j^2/\lambda_j]^{1/2}`.

    Parameters
    ----------
    eigenvalues : (n,)
        λ_j of K.
    target : (n,)
        z_j = u_jᵀ(y - f0)/√n, the labels' part along each eigenvector.
    eta : float
        Kernel time.
    """
    lam, z = np.asarray(eigenvalues, float), np.asarray(target, float)
    share = -np.expm1(-eta * lam)
    weights = np.where(lam > 0, share**2 / np.where(lam > 0, lam, 1.0), 0.0)
    return float(np.sqrt((weights * z**2).sum()))


def heads_needed(
    gradient: float, hessian: float, loss: float, radius: float, norm: float = 1.0
) -> float:
    """Return (64/9) L1² L2² L0² ε̂⁻⁸/R², the number of heads from which stopping at 1/ε̂² is guaranteed (`thm-guarantee`)."""
    return 64 / 9 * (gradient * hessian * loss / norm) ** 2 * radius**-8


def heads_needed_short(
    gradient: float, hessian: float, loss: float, radius: float, tangent_travel: float, norm: float = 1.0
) -> float:
    """Return the number of heads asked by the short path, of order ε̂⁻⁶ (`cor-short`)."""
    close = 8 * gradient * tangent_travel * np.sqrt(loss) / norm * radius**-3
    inside = 2 * (gradient * tangent_travel + np.sqrt(2 * loss)) * radius**-2
    return float((hessian * max(close, inside)) ** 2)


def stopping_interval(
    spectrum: Spectrum,
    sigma: float,
    norm: float = 1.0,
    *,
    change: float | None = None,
    ratio: float | None = None,
) -> tuple[float, float]:
    r"""Return bounds on the stopping time η̂' of a kernel K' that is close to K (`lem-perturbation`).

    Parameters
    ----------
    spectrum : Spectrum
        Of K.
    sigma, norm : float
        Of the rule.
    change : float, optional
        δ with :math:`|\hat R'(\epsilon)^2 - \hat R(\epsilon)^2| \le \delta` at all ε, such as
        (1/n)Σ|λ_j - λ'_j| or ‖K - K'‖_op.
    ratio : float, optional
        κ in [0, 1) with (1-κ) λ_j ≤ λ'_j ≤ (1+κ) λ_j for all j, such as from (1-κ)K ⪯ K' ⪯ (1+κ)K.

    Returns
    -------
    low, high : float
        η̂' lies between; `high` is infinite where the lemma says nothing.

    Raises
    ------
    InputError
        Unless exactly one of `change` and `ratio` is given and not negative.

    Example
    -------
    >>> low, high = stopping_interval(Spectrum([1.0, 0.1]), 0.5, ratio=0.1)
    >>> round(high / low, 3)
    1.222
    """
    if (change is None) == (ratio is None):
        raise InputError("stopping_interval needs one of change= and ratio=: say how close the kernels are.")
    radius = spectrum.critical_radius(sigma, norm)
    eta = radius**-2
    if ratio is not None:
        if not 0 <= ratio < 1:
            raise InputError(f"ratio is {ratio} and must be at least 0 and below 1: it is a relative change.")
        return eta / (1 + ratio), eta / (1 - ratio)
    assert change is not None
    if change < 0:
        raise InputError(f"change is {change} and must not be negative: it is a bound on a distance.")
    relative = change / float(spectrum.rademacher(radius)) ** 2
    low = eta * 2 / (1 + np.sqrt(1 + 4 * relative))
    high = eta * 2 / (1 + np.sqrt(1 - 4 * relative)) if relative <= 0.25 else np.inf
    return float(low), float(high)
