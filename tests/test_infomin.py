"""Slices, canonical correlations, the penalty and its rivals: against oracles, invariances and what the theory says of noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ntkft.errors import InputError
from ntkft.infomin import (
    Club,
    MaximalCorrelation,
    SliceDependence,
    audit,
    distance_correlation,
    gaussian_information,
    one_hot,
    pearson,
    slice_dependence,
)
from ntkft.infomin import slices as sl
from ntkft.infomin.cca import canonical, correlation, covariances, top_correlation


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Slices -------------------------------------------------------------------------------------------------


def test_directions_are_uniform_and_repeatable():
    d = sl.directions(3, 20_000, seed=4)
    torch.testing.assert_close(d.norm(dim=1), torch.ones(20_000, dtype=torch.float64))
    assert d.mean(0).abs().max() < 4 / np.sqrt(3 * 20_000)  # each coordinate has variance 1/3
    assert (d.T @ d / 20_000 - torch.eye(3) / 3).abs().max() < 0.01
    assert torch.equal(d, sl.directions(3, 20_000, seed=4)) and not torch.equal(d[:5], sl.directions(3, 5, seed=5))
    state = torch.random.get_rng_state()
    sl.directions(3, 5, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())  # nobody else's random numbers are used


def test_features_by_hand():
    z, d = normal(30, 3), sl.directions(3, 2, seed=0)
    got = sl.features(z, d, degree=3).numpy()
    for s in range(2):
        x = (z @ d[s]).numpy()
        u = np.tanh((x - x.mean()) / x.std())
        for k in range(3):
            expected = (u ** (k + 1) - (u ** (k + 1)).mean()) / (u ** (k + 1)).std()
            np.testing.assert_allclose(got[:, 3 * s + k], expected, atol=1e-12)


def test_scale_and_origin_do_not_matter():
    z, d = normal(50, 4), sl.directions(4, 6, seed=0)
    torch.testing.assert_close(sl.features(z, d, 4), sl.features(1e-4 * z + 7, d, 4), rtol=1e-6, atol=1e-6)


def test_constant_columns_are_zero_and_differentiable():
    z = torch.cat([normal(20, 1), torch.full((20, 1), 0.1, dtype=torch.float64)], 1).requires_grad_()
    out = sl.features(z, torch.eye(2, dtype=torch.float64), degree=2)
    assert torch.equal(out[:, 2:], torch.zeros(20, 2, dtype=torch.float64))
    (grad,) = torch.autograd.grad((out**3).sum(), z)
    assert torch.isfinite(grad).all() and grad[:, 1].abs().max() == 0


def test_one_hot():
    got = one_hot(np.array(["b", "a", "b"]))
    assert got.tolist() == [[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    assert torch.equal(one_hot(torch.tensor([5, 2, 5])), got)


# --- Canonical correlations ---------------------------------------------------------------------------------


def symmetric_root(c):
    values, vectors = np.linalg.eigh(c)
    return vectors / np.sqrt(values) @ vectors.T


@pytest.mark.parametrize(("p", "q", "ridge"), [(4, 3, 0.0), (3, 5, 0.2), (1, 1, 0.0), (40, 2, 0.1)])
def test_closed_form(p, q, ridge):
    """Against the symmetric whitening of the formula, and the weights against their constraints."""
    a = normal(25, p)
    b = normal(25, q, seed=1) + a[:, :1]
    best = canonical(a, b, ridge)
    c_aa, c_ab, c_bb = (c.numpy() for c in covariances(a, b))
    np.testing.assert_allclose(c_aa, np.cov(a.numpy().T, bias=True).reshape(p, p), atol=1e-12)
    matrix = symmetric_root(c_aa + ridge * np.eye(p)) @ c_ab @ symmetric_root(c_bb + ridge * np.eye(q))
    np.testing.assert_allclose(best.correlations, np.linalg.svd(matrix, compute_uv=False), atol=1e-10)
    w, v = best.w.numpy(), best.v.numpy()
    np.testing.assert_allclose(w.T @ (c_aa + ridge * np.eye(p)) @ w, np.eye(min(p, q)), atol=1e-9)
    np.testing.assert_allclose(w.T @ c_ab @ v, np.diag(best.correlations), atol=1e-9)


def test_without_ridge_it_is_invariant_and_is_a_correlation():
    a, b = normal(200, 3), normal(200, 2, seed=1)
    b[:, 0] += a[:, 1]
    base = canonical(a, b, 0.0)
    moved = canonical(a @ normal(3, 3, seed=2) + 3, b @ normal(2, 2, seed=3) - 1, 0.0)
    torch.testing.assert_close(base.correlations, moved.correlations)
    x, y = a @ base.w[:, 0], b @ base.v[:, 0]
    assert np.corrcoef(x, y)[0, 1] == pytest.approx(float(base.correlations[0]), abs=1e-12)
    assert float(correlation(x, y)) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)


def test_a_ridge_lowers_what_is_reported_and_less_than_what_is_there():
    a, b = normal(60, 5), normal(60, 4, seed=1)
    before = 1.0
    for ridge in (0.0, 1e-3, 1e-2, 0.1, 1.0):
        best = canonical(a, b, ridge)
        value = float(best.correlations[0])
        achieved = float(correlation(a @ best.w[:, 0], b @ best.v[:, 0]))
        assert value < before and value <= achieved + 1e-12 <= float(canonical(a, b, 0.0).correlations[0]) + 2e-12
        before = value


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_the_envelope_has_the_gradient_of_the_largest_correlation(ridge):
    z = normal(40, 3).requires_grad_()
    t = sl.features(normal(40, 1, seed=2), torch.ones(1, 1, dtype=torch.float64), 3)
    directions = sl.directions(3, 2, seed=0)

    def value(x, fixed):
        a = sl.features(x, directions, 2)
        return top_correlation(a, t, ridge) if fixed else canonical(a, t, ridge).correlations[0]

    gradients = [torch.autograd.grad(value(z, fixed), z)[0] for fixed in (True, False)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)
    assert gradients[0].norm() > 1e-3
    assert value(z, True).item() == pytest.approx(value(z, False).item(), abs=1e-12)
    move, h = normal(40, 3, seed=5), 1e-6
    slope = (value(z + h * move, False) - value(z - h * move, False)) / (2 * h)
    assert slope.item() == pytest.approx((gradients[0] * move).sum().item(), rel=1e-5)


def test_held_out_weights_are_no_supremum():
    """On other samples the weights are not optimal, so it matters whether they are held fixed; through them is the true slope."""
    z, t, move, h = normal(60, 2).requires_grad_(), normal(60, seed=3), normal(60, 2, seed=5), 1e-6

    def value(x, fixed):
        return slice_dependence(x, t, slices=3, degree=2, heldout=True, fixed_weights=fixed)

    fixed, whole = (float((torch.autograd.grad(value(z, f), z)[0] * move).sum()) for f in (True, False))
    slope = float((value(z.detach() + h * move, True) - value(z.detach() - h * move, True)) / (2 * h))
    assert whole == pytest.approx(slope, rel=1e-4) and abs(fixed - whole) > 0.05 * abs(whole)


def test_singular_features_need_a_ridge():
    a = normal(30, 2)
    doubled = torch.cat([a, a], 1)
    with pytest.raises(InputError, match="4 features is singular with ridge 0"):
        canonical(doubled, a, 0.0)
    with pytest.raises(InputError, match="singular"):
        canonical(normal(5, 10), a[:5], 0.0)
    with pytest.raises(InputError, match="ridge is -1"):
        canonical(a, a, -1.0)
    assert float(canonical(doubled, a, 1e-8).correlations[0]) == pytest.approx(1.0, abs=1e-6)


# --- The penalty --------------------------------------------------------------------------------------------


def test_it_sees_what_correlation_does_not():
    z = normal(600, 3)
    t = (z[:, 0] * z[:, 1]).sign() * normal(600, seed=1).abs()  # uncorrelated with each coordinate and square
    assert pearson(z, t) < 0.15
    assert slice_dependence(z, t, slices=50, degree=3, heldout=True) > 0.4
    assert slice_dependence(z, normal(600, seed=9), slices=50, degree=3, heldout=True).abs() < 4 / np.sqrt(300)


def test_more_slices_and_more_degrees_see_more():
    """Nested features, so the reported correlation cannot fall; an exact statement of the sample, without a ridge to speak of."""
    z, t = normal(400, 3), normal(400, 2, seed=1)
    all_z, all_t = sl.directions(3, 4, seed=0), sl.directions(2, 4, seed=1)

    def value(slices, degree):
        a, b = sl.features(z, all_z[:slices], degree), sl.features(t, all_t[:slices], degree)
        return float(canonical(a, b, 1e-10).correlations[0])

    grid = np.array([[value(s, d) for d in (1, 2, 3)] for s in (1, 2, 3, 4)])
    assert (np.diff(grid, axis=0) >= -1e-6).all() and (np.diff(grid, axis=1) >= -1e-6).all()
    assert grid[-1, -1] > grid[0, 0] + 0.05


def test_held_out_correlation_of_noise_is_centred():
    """E r = 0 and E r² = 1/(m-1) for whatever weights; in-sample it is far above."""
    values, inside = [], []
    for seed in range(200):
        z, t = normal(40, 2, seed=2 * seed), normal(40, seed=2 * seed + 1)
        values.append(float(slice_dependence(z, t, slices=5, degree=3, seed=seed, heldout=True)))
        inside.append(float(slice_dependence(z, t, slices=5, degree=3, seed=seed)))
    sd = 1 / np.sqrt(19)
    assert abs(np.mean(values)) < 4 * sd / np.sqrt(200)
    assert np.mean(np.square(values)) == pytest.approx(sd**2, rel=0.4)  # sd of the mean of 200 squares is a tenth of it
    assert np.mean(inside) > 0.4


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("heldout", [True, False])
def test_gradients_are_finite_and_useful(fixed, heldout):
    z = normal(120, 2).float().requires_grad_()
    value = slice_dependence(z, z[:, 0].detach() ** 2, slices=8, degree=3, heldout=heldout, fixed_weights=fixed)
    value.backward()
    assert torch.isfinite(z.grad).all() and z.grad.norm() > 0
    with torch.no_grad():
        t = z[:, 0] ** 2
        lower = slice_dependence(z - 0.5 * z.grad / z.grad.norm(), t, slices=8, degree=3, heldout=heldout)
        assert lower < value.detach()


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.ones(20, 2), normal(20)),  # a constant z
        lambda: (normal(20, 2), torch.zeros(20)),  # a constant t
        lambda: (normal(9, 30), normal(9)),  # fewer samples than coordinates
        lambda: (normal(10, 2)[:1].repeat(20, 1), normal(20)),  # one sample, repeated
        lambda: (normal(20, 2).repeat(3, 1), normal(20).repeat(3)),  # doubled rows
        lambda: (1e12 * normal(20, 2), 1e-12 * normal(20)),
        lambda: (normal(20).numpy(), (normal(20) > 0).numpy()),
        lambda: (normal(20, 3), one_hot(np.arange(20) % 3)),
        lambda: (normal(20, 3), torch.arange(20) % 2),
    ],
)
def test_odd_inputs_give_finite_values(make):
    z, t = make()
    z = torch.as_tensor(z).requires_grad_()
    for heldout in (False, True):
        value = slice_dependence(z, t, slices=10, degree=4, heldout=heldout)
        (grad,) = torch.autograd.grad(value, z, allow_unused=True)
        assert torch.isfinite(value) and abs(value) <= 1 + 1e-9 and (grad is None or torch.isfinite(grad).all())


@pytest.mark.parametrize(
    ("z", "t", "words"),
    [
        (torch.tensor([[1.0], [np.nan], [2.0]]), torch.zeros(3), r"1 of 3 rows of z are not finite"),
        (torch.zeros(3, 2), torch.tensor([0.0, np.inf, np.inf]), r"2 of 3 rows of t"),
        (torch.zeros(3, 2), torch.zeros(4), "z has 3 samples and t has 4"),
        (torch.zeros(3, 2, 2), torch.zeros(3), r"z has shape \(3, 2, 2\)"),
        (torch.zeros(9, 2), torch.arange(9), r"integers of more than two values.*one_hot\(t\).*t\.float\(\)"),
        (torch.zeros(1, 2), torch.zeros(1), "z has 1 sample"),
    ],
)
def test_bad_inputs(z, t, words):
    with pytest.raises(InputError, match=words):
        slice_dependence(z, t)


def test_bad_options():
    z, t = normal(20, 2), normal(20)
    for options, words in (({"slices": 0}, "slices is 0"), ({"degree": 0}, "degree is 0"), ({"ridge": -1.0}, "ridge is -1")):
        with pytest.raises(InputError, match=words):
            slice_dependence(z, t, **options)
    with pytest.raises(InputError, match="There are 6 samples and two halves need 8"):
        slice_dependence(z[:6], t[:6], heldout=True)


def test_the_regulariser_makes_an_encoder_forget():
    """Adam in an ordinary loop; what is to be forgotten is a square, invisible to correlation. Judged by the auditor."""
    x = normal(800, 3).float()
    t = x[:, 0] ** 2 + 0.3 * normal(800, seed=1).float()
    encoder, penalty = torch.nn.Linear(3, 1), SliceDependence(slices=10, degree=3, seed=0)
    with torch.no_grad():
        encoder.weight.copy_(torch.tensor([[1.0, 0.7, 0.0]]))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)

    def leak():
        with torch.no_grad():
            return audit(encoder(x), t, networks=0).dependence

    before = leak()
    for _ in range(150):
        optimizer.zero_grad()
        # The task wants the first two coordinates, the attribute is in the first.
        (((encoder(x)[:, 0] - x[:, 0] - x[:, 1]) ** 2).mean() + 20 * penalty(encoder(x), t)).backward()
        optimizer.step()
    weights = encoder.weight.detach()[0]
    # The task alone would have both weights 1: a leak of about a half.
    assert before > 0.6 and leak() < 0.25
    assert weights[0] < 0.55 and weights[1] > 0.9


def test_whitening_by_the_covariance():
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.standard_normal((300, 3)) @ rng.standard_normal((3, 5)))  # rank three in five coordinates
    axes = sl.whitening(z)
    assert axes.shape == (5, 3)
    torch.testing.assert_close(torch.cov((z @ axes).T, correction=0), torch.eye(3, dtype=torch.float64), rtol=1e-8, atol=1e-8)
    assert sl.whitening(torch.ones(10, 2, dtype=torch.float64)).shape == (2, 1)  # nothing varies: one column stays


@pytest.mark.parametrize("fitted", [False, True])
def test_whitened_slices_hear_a_whisper(fitted):
    rng = np.random.default_rng(1)
    t = torch.tensor(rng.standard_normal(1000))
    z = torch.cat([torch.tensor(rng.standard_normal((1000, 4))), t[:, None] / 1000], 1).requires_grad_()
    deaf, keen = (SliceDependence(slices=50, degree=3, whiten=w) for w in (False, True))
    if fitted:
        for penalty in (deaf, keen):
            penalty.fit(z[:500], t[:500])
    assert deaf(z, t) < 0.1 < 0.9 < keen(z, t)
    (slope,) = torch.autograd.grad(keen(z, t), z)
    assert torch.isfinite(slope).all() and slope[:, 4].abs().mean() > 10 * slope[:, 0].abs().mean()


def test_fitted_weights_stay_until_the_next_fit():
    z, t = normal(100, 2), normal(100)
    penalty = SliceDependence(slices=5, degree=2)
    first = penalty.fit(z, z[:, 0])
    assert first is penalty and torch.equal(penalty(z, t), penalty(z, t))
    assert penalty(z, z[:, 0]) > 0.8 > penalty(z, t)
    assert not torch.equal(penalty.forget()(z, t), penalty(z, t))  # new slices, new split
    fixed = SliceDependence(slices=5, degree=2, redraw=False)
    assert torch.equal(fixed(z, t), fixed(z, t))
    assert penalty(z.float(), t).dtype == torch.float32
    root = SliceDependence(slices=5, degree=2, redraw=False, squared=False)
    torch.testing.assert_close(root(z, t) ** 2, fixed(z, t))


# --- Rivals -------------------------------------------------------------------------------------------------


def test_distance_correlation_by_its_definition():
    z, t = normal(12, 2).numpy(), normal(12, seed=1).numpy()

    def centred(x):
        n = len(x)
        d = np.array([[np.linalg.norm(x[i] - x[j]) for j in range(n)] for i in range(n)])
        h = np.eye(n) - 1 / n
        return h @ d @ h

    a, b = centred(z), centred(t[:, None])
    expected = np.sqrt((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    assert float(distance_correlation(z, t)) == pytest.approx(expected, rel=1e-12)
    assert float(distance_correlation(z, 2 - 3 * z)) == pytest.approx(1.0)
    assert float(distance_correlation(z, np.ones(12))) == 0.0


def test_distance_correlation_against_the_library():
    """The values are those of the package dcor 0.7, which is not a dependency."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((60, 3))
    t = z[:, :2] ** 2 + rng.standard_normal((60, 2))
    assert float(distance_correlation(z, t)) == pytest.approx(0.5463611304489481, rel=1e-12)
    assert float(distance_correlation(z, t[:, 0])) == pytest.approx(0.46266958153289156, rel=1e-12)


def test_distance_correlation_has_a_gradient():
    z = normal(15, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distance_correlation(x, normal(15, seed=3)), z)


def test_pearson_is_the_largest_of_the_coordinates():
    z, t = normal(40, 3), normal(40, 2, seed=1)
    expected = np.abs(np.corrcoef(z.T, t.T)[:3, 3:]).max()
    assert float(pearson(z, t)) == pytest.approx(expected, abs=1e-12)
    assert float(pearson(z, -z)) == pytest.approx(1.0)  # the sign does not matter


def test_the_adversary_finds_the_maximal_correlation_of_gaussians():
    """For two Gaussians it is |ρ| itself (Gebelein), so training must approach it and, on fresh data, not exceed it."""
    z = normal(4000)
    t = 0.6 * z + 0.8 * normal(4000, seed=1)
    adversary = MaximalCorrelation(1, 1, seed=0)
    adversary.step(z[:2000], t[:2000], steps=300)
    assert float(adversary(z[2000:], t[2000:]).detach()) == pytest.approx(0.6, abs=0.05)


def test_club_by_the_table_of_all_pairs():
    z, t = normal(9, 2).float(), normal(9, 3, seed=1).float()
    club = Club(2, 3, seed=0)
    mean, log_variance = club.mean(z), torch.tanh(club.log_variance(z) / 6) * 6

    def log_q(i, j):
        return -0.5 * (((t[j] - mean[i]) ** 2 / log_variance[i].exp()) + log_variance[i]).sum()

    own = torch.stack([log_q(i, i) for i in range(9)]).mean()
    every = torch.stack([log_q(i, j) for i in range(9) for j in range(9)]).mean()
    torch.testing.assert_close(club(z, t), own - every)


def test_trained_club_bounds_the_information_of_gaussians():
    z = normal(4000)
    t = 0.8 * z + 0.6 * normal(4000, seed=1)
    club = Club(1, 1, seed=0)
    club.step(z, t, steps=600)
    # With the true q the bound is ρ²/(1-ρ²) in the limit: 1.78, above the information, -log(1-ρ²)/2 = 0.51.
    assert 0.51 < float(club(z, t).detach()) == pytest.approx(0.64 / 0.36, rel=0.15)


def test_training_an_adversary_leaves_the_encoder_and_the_global_seed_alone():
    state = torch.random.get_rng_state()
    z = normal(30, 2).float().requires_grad_()
    for adversary in (MaximalCorrelation(2, 1, seed=3), Club(2, 1, seed=3)):
        adversary.step(z, normal(30), steps=2)
        assert z.grad is None
        adversary(z, normal(30)).backward()
        assert z.grad.norm() > 0
        z.grad = None
    assert torch.equal(state, torch.random.get_rng_state())


# --- The auditor --------------------------------------------------------------------------------------------


def test_the_auditor_hears_a_high_frequency_and_nothing_in_noise():
    z = normal(800, 2)
    heard = audit(z, torch.sin(4 * z[:, 0]) + 0.1 * normal(800, seed=1), networks=0)
    assert 0.8 < heard.low < heard.dependence < heard.high
    silent = [audit(z, normal(800, seed=10 + k), networks=0, seed=k) for k in range(12)]
    values = np.array([report.dependence for report in silent])
    assert abs(values.mean()) < 4 / np.sqrt(12 * 799)
    assert sum(report.low <= 0 <= report.high for report in silent) >= 9  # 11 are expected
    assert all(report.validation > report.dependence - 0.3 for report in silent)


def test_the_auditor_hears_a_whisper():
    """The attribute along a rotated direction of tiny variance: all of it is there, and raw features do not show it."""
    z = torch.cat([normal(600, 3), normal(600, 1, seed=1) / 1000], 1)
    rotation = torch.linalg.qr(normal(4, 4, seed=2))[0]
    report = audit(z @ rotation, z[:, 3], networks=0)
    assert report.low > 0.9 and all("whitened" in judge for judge in report.judges)
    assert slice_dependence(z @ rotation, z[:, 3], heldout=True) < 0.5


def test_the_auditors_networks_are_stopped_by_validation():
    z = normal(240, 1)
    report = audit(z, z[:, 0].abs(), networks=1, looks=8)
    assert report.low > 0.8
    again = audit(z, z[:, 0].abs(), networks=1, looks=8)
    assert report == again


def test_the_auditor_wants_enough_samples():
    with pytest.raises(InputError, match="There are 79 samples and an audit needs 80"):
        audit(normal(79, 2), normal(79))
    assert audit(normal(80, 2), torch.ones(80), networks=1, looks=2).dependence == 0.0


# --- Gaussian information -----------------------------------------------------------------------------------


def test_gaussian_information_by_determinants_and_by_correlations():
    root = normal(5, 5)
    c = root @ root.T + 0.1 * torch.eye(5)
    value = float(gaussian_information(c, 2))
    rho = canonical_of(c.numpy(), 2)
    assert value == pytest.approx(-0.5 * np.log1p(-(rho**2)).sum(), rel=1e-10)
    change = torch.block_diag(normal(2, 2, seed=1), normal(3, 3, seed=2))
    assert float(gaussian_information(change @ c @ change.T, 2)) == pytest.approx(value, rel=1e-8)


def canonical_of(c, d):
    matrix = symmetric_root(c[:d, :d]) @ c[:d, d:] @ symmetric_root(c[d:, d:])
    return np.linalg.svd(matrix, compute_uv=False)


def test_gaussian_information_of_degenerate_variables():
    c = torch.tensor([[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [0.5, 0.5, 1.0]], dtype=torch.float64)
    assert float(gaussian_information(c, 2)) == pytest.approx(-0.5 * np.log(0.75))  # a doubled coordinate adds nothing
    assert float(gaussian_information(torch.ones(2, 2), 1)) == float("inf")
    assert float(gaussian_information(torch.eye(3), 1)) == 0.0
    one = torch.eye(2, dtype=torch.float64).requires_grad_()
    assert torch.isfinite(torch.autograd.grad(gaussian_information(one, 1), one)[0]).all()
    with pytest.raises(InputError, match="negative eigenvalue"):
        gaussian_information(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1)
    with pytest.raises(InputError, match=r"shape \(2, 2\) and Z 2"):
        gaussian_information(torch.eye(2), 2)
