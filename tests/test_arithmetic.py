"""Task vectors in closed form, against weights of small linear models that are trained step by step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

import ntkft
from ntkft import interference as inter
from ntkft.arithmetic import FineTuning, Quadratic, TaskVectors
from ntkft.errors import InputError
from ntkft.multitask import Joint
from ntkft.ntk import Kernel

N, P = 40, 25
STEPS = 57


class World:
    """A linear model f(x) = f0(x) + φ(x)·δ with three tasks of unequal size, trained by hand."""

    def __init__(self, seed: int = 0, intercept: bool = False, p: int = P) -> None:
        rng = np.random.default_rng(seed)
        self.phi, self.f0 = rng.standard_normal((N, p)) / p**0.5, rng.standard_normal(N)
        order = rng.permutation(N)
        trains, tests = (order[:7], order[7:16], order[16:28]), (order[28:32], order[32:35], order[35:])
        self.step = 0.3
        self.tunings = [
            FineTuning(
                train,
                rng.standard_normal(train.size) + 1,
                STEPS * self.step,
                self.step,
                intercept,
                test,
                rng.standard_normal(test.size),
            )
            for train, test in zip(trains, tests, strict=True)
        ]
        self.vectors = TaskVectors(self.phi @ self.phi.T, self.tunings, self.f0)
        self.deltas = [self.train([t]) for t in self.tunings]

    def constant(self, tuning: FineTuning, delta: np.ndarray) -> float:
        gap = np.asarray(tuning.y) - self.f0[tuning.rows] - self.phi[tuning.rows] @ delta
        return float(gap.mean()) if tuning.intercept else 0.0

    def train(self, tunings: list[FineTuning], steps: int = STEPS) -> np.ndarray:
        """Gradient descent on the weights; free constants are fitted outright before each step."""
        delta = np.zeros(self.phi.shape[1])
        for _ in range(steps):
            slope = np.zeros_like(delta)
            for t in tunings:
                left = self.f0[t.rows] + self.phi[t.rows] @ delta + self.constant(t, delta) - np.asarray(t.y)
                slope += self.phi[t.rows].T @ left / len(left)
            delta -= self.step * slope
        return delta

    def score(self, delta: np.ndarray, rows: np.ndarray, task: int | None = None) -> np.ndarray:
        shift = 0.0 if task is None else self.constant(self.tunings[task], delta)
        return self.f0[rows] + self.phi[rows] @ delta + shift

    def loss(self, task: int, delta: np.ndarray, held_out: bool = False) -> float:
        t = self.tunings[task]
        rows, target = (t.held_out, t.reference) if held_out else (t.rows, t.y)
        return float(((self.score(delta, rows, task) - np.asarray(target)) ** 2).mean() / 2)


@pytest.fixture(params=[False, True], ids=["plain", "intercept"], scope="module")
def world(request: pytest.FixtureRequest) -> World:
    return World(intercept=request.param)


ALL = np.arange(N)
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


# --- The vectors -----------------------------------------------------------------------------------------------------------


def test_the_vector_is_what_training_does_to_the_weights(world: World) -> None:
    for t, alpha, delta in zip(world.tunings, world.vectors.coefficients, world.deltas, strict=True):
        assert np.allclose(world.phi[t.rows].T @ alpha, delta, **TIGHT)
        assert not t.intercept or abs(alpha.sum()) < 1e-12


def test_lengths_and_angles_are_those_of_the_weights(world: World) -> None:
    gram = np.array([[u @ v for v in world.deltas] for u in world.deltas])
    size = np.sqrt(np.diag(gram))
    assert np.allclose(world.vectors.gram(), gram, **TIGHT)
    assert np.allclose(world.vectors.norms, size, **TIGHT)
    assert np.allclose(world.vectors.cosines(), gram / np.outer(size, size), **TIGHT)


def test_outputs_under_any_weights_are_those_of_the_summed_model(world: World) -> None:
    c = np.array([[0.7, -1.3, 2.0], [1.0, 1.0, 1.0]])
    for weights, found in zip(c, world.vectors.outputs(c, ALL), strict=True):
        assert np.allclose(found, world.score(weights @ world.deltas, ALL), **TIGHT)
    for task in range(3):
        delta = c[0] @ world.deltas
        assert np.allclose(world.vectors.outputs(c[0], ALL, task), world.score(delta, ALL, task), **TIGHT)


def test_one_vector_alone_predicts_what_descent_predicts(world: World) -> None:
    for a, (t, descent) in enumerate(zip(world.tunings, world.vectors.descents, strict=True)):
        cross = (world.phi @ world.phi.T)[np.ix_(t.held_out, t.rows)]
        expected = descent.predict(t.eta, cross, world.f0[t.held_out])
        assert np.allclose(world.vectors.outputs(a, t.held_out, task=a), expected, **TIGHT)


def test_the_analogy_adds_one_and_takes_one_away(world: World) -> None:
    delta = world.deltas[2] + world.deltas[1] - world.deltas[0]
    assert np.allclose(world.vectors.analogy(0, 1, 2, ALL), world.score(delta, ALL), **TIGHT)
    assert np.allclose(world.vectors.analogy(0, 0, 2, ALL), world.vectors.outputs(2, ALL), **TIGHT)


def test_kernel_object_and_bare_array_agree(world: World) -> None:
    kernel = Kernel(world.phi @ world.phi.T, world.f0)
    assert np.allclose(TaskVectors(kernel, world.tunings).moves, world.vectors.moves, **TIGHT)


# --- Length ----------------------------------------------------------------------------------------------------------------


def test_expected_length_splits_into_signal_and_noise() -> None:
    """The mean over all signs of the noise is exact, for flow and descent, with intercept and without."""
    rng = np.random.default_rng(3)
    phi, truth, sigma = rng.standard_normal((6, 5)), rng.standard_normal(6), 0.6
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    for step, intercept in ((None, False), (0.1, False), (None, True)):
        tuning = FineTuning(range(6), truth, 0.9, step, intercept)
        signal = TaskVectors(phi @ phi.T, [tuning])
        total = np.mean(
            [TaskVectors(phi @ phi.T, [replace(tuning, y=truth + sigma * s)]).norms[0] ** 2 for s in signs]
        )
        assert np.isclose(total, signal.norms[0] ** 2 + signal.noise_length(0, sigma), rtol=1e-10)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(1.01, 5))
def test_length_grows_with_time_and_obeys_the_travel_bound(seed: int, eta: float, factor: float) -> None:
    rng = np.random.default_rng(seed)
    phi, y = rng.standard_normal((8, 5)), rng.standard_normal(8)
    early, late = (TaskVectors(phi @ phi.T, [FineTuning(range(8), y, e)]) for e in (eta, factor * eta))
    assert early.norms[0] <= late.norms[0] * (1 + 1e-9)
    assert early.noise_length(0, 1.0) <= late.noise_length(0, 1.0) * (1 + 1e-9)
    assert early.norms[0] ** 2 <= 0.4073 * eta * (y**2).mean() * (1 + 1e-9)


# --- Losses ----------------------------------------------------------------------------------------------------------------


def test_losses_are_exact_quadratics_of_the_scale(world: World) -> None:
    direction = np.array([0.5, -1.0, 1.5])
    for task in range(3):
        for held_out in (False, True):
            along = world.vectors.loss_along(task, direction, held_out)
            for c in (-1.0, 0.0, 0.4, 2.0):
                expected = world.loss(task, c * (direction @ world.deltas), held_out)
                assert np.isclose(along(c), expected, **TIGHT)
            assert along(along.best) <= min(along(along.best - 1e-3), along(along.best + 1e-3))


def test_negation_and_best_scale_of_ones_own_vector() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        phi, y = rng.standard_normal((9, 6)), rng.standard_normal(9)
        vectors = TaskVectors(phi @ phi.T, [FineTuning(range(9), y, float(rng.uniform(0.05, 20)))])
        along = vectors.loss_along(0, 0)
        assert along.best >= 1 - 1e-9
        assert along(0) < along(-1) <= 4 * along(0)
    assert Quadratic(1.0, 0.0, 0.0).best == 0.0


def test_best_scales_minimise_the_sum_of_losses(world: World) -> None:
    best = inter.best_scales(world.vectors)
    stacked, right = [], []
    for a, t in enumerate(world.tunings):  # least squares by hand
        zero = world.score(np.zeros(P), t.rows, a)
        columns = [world.score(d, t.rows, a) - zero for d in world.deltas]
        stacked.append(np.array(columns).T / len(zero) ** 0.5)
        right.append((np.asarray(t.y) - zero) / len(zero) ** 0.5)
    expected = np.linalg.lstsq(np.concatenate(stacked), np.concatenate(right), rcond=None)[0]
    assert np.allclose(best, expected, **TIGHT)


def test_best_scales_for_the_truth_minimise_the_mean_over_all_noise() -> None:
    """Two tasks of three texts: the risk is averaged over all 64 signs, and minimised as a quadratic by hand."""
    rng = np.random.default_rng(5)
    phi, sigma = rng.standard_normal((6, 5)), np.array([0.5, 0.9])
    truth = [rng.standard_normal(3), rng.standard_normal(3)]
    for intercept in (False, True):
        tunings = [FineTuning(range(3 * a, 3 * a + 3), truth[a], 0.8, None, intercept) for a in range(2)]
        clean = TaskVectors(phi @ phi.T, tunings)
        normal, right = np.zeros((2, 2)), np.zeros(2)
        for signs in np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T:
            noisy = [
                replace(t, y=truth[a] + sigma[a] * signs[3 * a : 3 * a + 3]) for a, t in enumerate(tunings)
            ]
            family = TaskVectors(phi @ phi.T, noisy)
            for a in range(2):
                seen = family.seen(a, family.moves)
                normal, right = normal + seen @ seen.T, right + seen @ clean.residual(a)
        expected = np.linalg.solve(normal, right)
        assert np.allclose(inter.best_scales(clean, truth, sigma), expected, rtol=1e-9)


# --- What tasks do to each other -------------------------------------------------------------------------------------------


def test_cross_talk_is_what_the_other_vector_does_here(world: World) -> None:
    for a in range(3):
        for b in range(3):
            for held_out in (False, True):
                rows = world.tunings[a].held_out if held_out else world.tunings[a].rows
                expected = world.score(world.deltas[b], rows, a) - world.score(np.zeros(P), rows, a)
                found = inter.cross_talk(world.vectors, a, b, held_out=held_out)
                assert np.allclose(found, expected, **TIGHT)
                sizes = inter.cross_talk_sizes(world.vectors, held_out=held_out)
                assert np.isclose(sizes[a, b], (expected**2).mean() ** 0.5, **TIGHT)


def test_interference_is_the_change_of_measured_losses(world: World) -> None:
    for held_out in (False, True):
        found = inter.interference(world.vectors, held_out=held_out)
        for a, b in ((0, 1), (2, 0), (1, 2)):
            together, alone, start = (
                world.loss(a, delta, held_out)
                for delta in (world.deltas[a] + world.deltas[b], world.deltas[a], np.zeros(P))
            )
            assert np.isclose(found[a, b], (together - alone) / start, **TIGHT)
        assert (np.diag(found) == 0).all()


def test_disentanglement_is_the_definition(world: World) -> None:
    a, b = 0, 2
    grid = np.array([-1.0, 0.0, 0.5, 2.0])
    for held_out in (False, True):
        found = inter.disentanglement(world.vectors, a, b, grid[:, None], grid, held_out=held_out)
        signs = inter.sign_disagreement(world.vectors, a, b, grid[:, None], grid, held_out=held_out)
        for i, c_a in enumerate(grid):
            for j, c_b in enumerate(grid):
                squares = changed = 0.0
                for task, scale in ((a, c_a), (b, c_b)):
                    rows = world.tunings[task].held_out if held_out else world.tunings[task].rows
                    own = world.score(scale * world.deltas[task], rows, task)
                    both = world.score(c_a * world.deltas[a] + c_b * world.deltas[b], rows, task)
                    squares += ((own - both) ** 2).mean()
                    changed += (np.sign(own) != np.sign(both)).mean()
                assert np.isclose(found[i, j], squares, **TIGHT)
                assert np.isclose(signs[i, j], changed, **TIGHT)


def test_overlap_is_the_cosine_of_the_covariances(world: World) -> None:
    covariances = []
    for t in world.tunings:
        centred = world.phi[t.rows] - world.phi[t.rows].mean(0)
        covariances.append(centred.T @ centred / len(centred))
    size = [np.linalg.norm(c) for c in covariances]
    expected = [
        [(u * v).sum() / (s * t) for v, t in zip(covariances, size, strict=True)]
        for u, s in zip(covariances, size, strict=True)
    ]
    assert np.allclose(inter.overlap(world.vectors), expected, **TIGHT)


def test_principal_cosine_is_that_of_the_spans(world: World) -> None:
    from scipy.linalg import subspace_angles

    def gradients(t: FineTuning) -> np.ndarray:
        rows = world.phi[t.rows]
        return (rows - rows.mean(0) if t.intercept else rows).T

    for a, b in ((0, 1), (1, 0), (0, 0)):
        angles = subspace_angles(gradients(world.tunings[a]), gradients(world.tunings[b]))
        if world.tunings[0].intercept:  # centring leaves one direction less, which scipy does not know
            angles = angles[angles < np.pi / 2 - 1e-9] if a != b else angles
        assert np.isclose(inter.principal_cosine(world.vectors, a, b), np.cos(angles.min()), atol=1e-9)


def test_noise_gain_is_the_mean_over_all_signs() -> None:
    rng = np.random.default_rng(7)
    phi = rng.standard_normal((9, 6))
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 5)).reshape(5, -1).T
    for intercept in (False, True):
        here, there = (
            FineTuning(range(5, 9), np.zeros(4), 1.0, None, intercept),
            FineTuning(range(5), np.zeros(5), 0.7, None, intercept),
        )
        family = TaskVectors(phi @ phi.T, [here, there])
        sizes = []
        for s in signs:
            noisy = TaskVectors(phi @ phi.T, [here, replace(there, y=s)])
            sizes.append((inter.cross_talk(noisy, 0, 1) ** 2).mean())
        assert np.isclose(inter.noise_gain(family, 0, 1), np.mean(sizes), rtol=1e-10)
        home = family.descents[1].filter(0.7)
        assert np.isclose(inter.noise_gain(family, 1, 1), (home**2).mean(), rtol=1e-9)


def test_transfer_is_the_largest_ratio_of_the_two_forms(world: World) -> None:
    for a, t in enumerate(world.tunings):
        rows = world.tunings[(a + 1) % 3].rows
        mean = world.phi[t.rows].mean(0) if t.intercept else 0.0
        here, home = world.phi[rows] - mean, world.phi[t.rows] - mean
        target = here.T @ here / len(rows)
        metric = home.T @ home / len(home) + np.eye(P) / t.eta
        expected = np.max(np.linalg.eigvals(np.linalg.solve(metric, target)).real)
        assert np.isclose(inter.transfer(world.vectors, a, rows), expected, rtol=1e-9)
        assert inter.transfer(world.vectors, a, t.rows) < 1


# --- Joint training --------------------------------------------------------------------------------------------------------


def test_joint_training_is_the_flow_of_the_weights(world: World) -> None:
    def slope(_: float, delta: np.ndarray) -> np.ndarray:
        total = np.zeros(P)
        for t in world.tunings:
            left = np.asarray(t.y) - world.score(delta, t.rows) - world.constant(t, delta)
            total += world.phi[t.rows].T @ left / len(left)
        return total

    joint = Joint(world.vectors)
    for eta in (0.4, 5.0):
        delta = solve_ivp(slope, (0, eta), np.zeros(P), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
        assert np.allclose(joint.outputs(eta, ALL), world.score(delta, ALL), rtol=1e-9, atol=1e-9)
        for a, t in enumerate(world.tunings):
            assert np.allclose(
                joint.outputs(eta, t.held_out, a), world.score(delta, t.held_out, a), rtol=1e-9, atol=1e-9
            )
            assert np.isclose(joint.losses(eta)[a], world.loss(a, delta), atol=1e-10)
            assert np.isclose(joint.losses(eta, held_out=True)[a], world.loss(a, delta, True), atol=1e-10)
    assert np.allclose(joint.move([0.4, 5.0]), [joint.move(0.4), joint.move(5.0)])


def test_joint_training_on_one_task_is_descent(world: World) -> None:
    one = replace(world.tunings[0], step_size=None, eta=1.7)
    vectors = TaskVectors(world.phi @ world.phi.T, [one], world.f0)
    assert np.allclose(Joint(vectors).outputs(1.7, ALL, 0), vectors.outputs(0, ALL, 0), **TIGHT)
    assert Joint(vectors).sum_against_joint(1.7)[0] < 1e-12


def test_residuals_are_those_of_the_three_models(world: World) -> None:
    eta = 2.3
    flows = TaskVectors(
        world.phi @ world.phi.T, [replace(t, step_size=None, eta=eta) for t in world.tunings], world.f0
    )
    joint = Joint(world.vectors)
    together, alone, added = joint.residuals(eta)
    total = flows.moves.sum(0)
    for found, move in (
        (together, lambda a: joint.move(eta)),
        (alone, lambda a: flows.moves[a]),
        (added, lambda a: total),
    ):
        expected = [
            (flows.residual(a) - flows.seen(a, move(a))) / len(flows.rows[a]) ** 0.5 for a in range(3)
        ]
        assert np.allclose(found, np.concatenate(expected), **TIGHT)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 300), st.floats(0, 1))
def test_the_sum_is_within_its_bound_of_joint_training(seed: int, eta: float, shared: float) -> None:
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(6)
    phi = rng.standard_normal((12, 6)) + 3 * shared * common
    tunings = [FineTuning(r, rng.standard_normal(len(r)), 1.0) for r in (range(4), range(4, 12))]
    distance, bound = Joint(TaskVectors(phi @ phi.T, tunings)).sum_against_joint(eta)
    assert distance <= bound * (1 + 1e-6) + 1e-12


def test_the_quadrature_of_the_bound_is_accurate() -> None:
    from scipy.integrate import quad

    world = World()
    joint = Joint(world.vectors)
    for eta in (0.2, 4.0, 200.0):
        top = np.linalg.eigvalsh(joint.kernel)[-1]

        def integrand(s: float, eta: float = eta, top: float = top) -> float:
            return min(1.0, (eta - s) * top) * float(np.linalg.norm(joint._off @ joint.residuals(s)[1]))

        expected = quad(integrand, 0, eta, limit=400, points=[max(eta - 1 / top, 0.0), min(1.0, eta / 2)])[0]
        assert np.isclose(joint.sum_against_joint(eta)[1], expected, rtol=1e-6)


def test_tasks_that_share_no_direction_add_up_exactly() -> None:
    rng = np.random.default_rng(2)
    phi = np.zeros((9, 8))
    phi[:4, :3], phi[4:, 3:] = rng.standard_normal((4, 3)), rng.standard_normal((5, 5))
    tunings = [
        FineTuning(range(4), rng.standard_normal(4), 3.0),
        FineTuning(range(4, 9), rng.standard_normal(5), 3.0),
    ]
    vectors = TaskVectors(phi @ phi.T, tunings)
    joint = Joint(vectors)
    assert np.allclose(joint.outputs(3.0, range(9)), vectors.outputs([1, 1], range(9)), **TIGHT)
    distance, bound = joint.sum_against_joint(3.0)
    assert distance < 1e-12 and bound == 0
    assert np.allclose(joint.spectrum.eigenvalues, joint.separate_spectrum.eigenvalues)
    assert np.allclose(vectors.cosines(), np.eye(2))
    assert (inter.interference(vectors) == 0).all() and inter.principal_cosine(vectors, 0, 1) == 0


def test_the_joint_spectrum_is_that_of_all_texts_when_tasks_are_of_one_size() -> None:
    rng = np.random.default_rng(4)
    phi = rng.standard_normal((12, 7))
    vectors = TaskVectors(
        phi @ phi.T, [FineTuning(range(4 * a, 4 * a + 4), np.ones(4), 1.0) for a in range(3)]
    )
    expected = ntkft.Spectrum(np.linalg.eigvalsh(phi @ phi.T / 12)).eigenvalues
    assert np.allclose(Joint(vectors).spectrum.eigenvalues, expected, atol=1e-12)


# --- Bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskVectors(np.eye(3), []), "tunings is empty"),
        (lambda: TaskVectors(np.ones((2, 3)), [FineTuning([0], [1.0], 1.0)]), r"\(2, 3\)"),
        (lambda: TaskVectors(np.eye(3), [FineTuning([0, 3], [1.0, 1.0], 1.0)]), "from 0 to 2"),
        (lambda: TaskVectors(np.eye(3), [FineTuning([1, 1], [1.0, 1.0], 1.0)]), "different"),
        (lambda: TaskVectors(np.eye(3), [FineTuning([0.5], [1.0], 1.0)]), "float64"),
        (lambda: TaskVectors(np.eye(3), [FineTuning([0, 1], [1.0], 1.0)]), "2 texts and y has 1"),
        (lambda: TaskVectors(np.eye(3), [FineTuning([0], [1.0], -1.0)]), "eta of task 0 is -1"),
        (lambda: TaskVectors(np.eye(3), [FineTuning([0], [1.0], np.inf)]), "eta of task 0 is inf"),
        (lambda: TaskVectors(np.eye(3), [FineTuning([0], [1.0], 1.0, held_out=[0])]), "1 of them held out"),
        (lambda: PAIR.outputs([1.0], [0]), "2 tasks"),
        (lambda: PAIR.outputs(2, [0]), "no task 2"),
        (lambda: PAIR.loss_along(0, 0, held_out=True), "held-out"),
        (lambda: inter.best_scales(PAIR, truth=[[1.0], [1.0]]), "belong together"),
        (lambda: inter.best_scales(PAIR, truth=[[1.0]], sigma=1.0), "truth has 1 entries and there are 2"),
        (lambda: inter.best_scales(PAIR, truth=[[1.0], [1.0]], sigma=[1.0] * 3), "one for each"),
        (
            lambda: inter.interference(TaskVectors(np.eye(2), [FineTuning([0], [0.0], 1.0)])),
            "no loss before training",
        ),
        (lambda: inter.overlap(PAIR), "one gradient for all texts"),
        (lambda: inter.transfer(PAIR, 0, []), "at least one text"),
        (lambda: Joint(PAIR).move(-1.0), "kernel time"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


PAIR = TaskVectors(np.eye(2), [FineTuning([0], [1.0], 1.0), FineTuning([1], [1.0], 1.0)])
