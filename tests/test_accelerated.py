"""Nesterov's method, triple momentum, heavy ball: sequences, rates, estimates, and points to go on from."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from optex import OptEx, WithinTolerance
from optex.optimizers import NAG, HeavyBall, TripleMomentum
from tests.models import network, regression_batches, same, snapshot, squared_error
from tests.references import accelerated as reference

EVERY = [NAG, TripleMomentum, HeavyBall]
TWINS = {NAG: reference.nesterov, TripleMomentum: reference.triple_momentum, HeavyBall: reference.heavy_ball}
every = pytest.mark.parametrize("rule", EVERY)


def vector(values):
    return nn.Parameter(torch.as_tensor(values, dtype=torch.float64).clone())


def curvatures(count=7, largest=100.0):
    return np.geomspace(1.0, largest, count)


def run(optimizer, parameter, gradient, steps):
    """Query points y_0..y_n and output points x_0..x_n."""
    ys, xs = [parameter.detach().numpy().copy()], [parameter.detach().numpy().copy()]
    for _ in range(steps):
        parameter.grad = torch.tensor(gradient(ys[-1]))
        optimizer.step()
        ys.append(parameter.detach().numpy().copy())
        optimizer.eval()
        xs.append(parameter.detach().numpy().copy())
        optimizer.train()
    return np.array(ys), np.array(xs)


# ---------------------------------------------------------------------- the sequences


@every
def test_lock_step_with_the_papers_sequences(rule):
    eigenvalues, start = curvatures(), np.linspace(-1, 2, 7)

    def gradient(y):
        return eigenvalues * y + 0.1 * np.sin(3 * y)  # L = 100.3, mu = 0.7

    theta = vector(start)
    ys, xs = run(rule([theta], L=100.3, mu=0.7), theta, gradient, 100)
    twin_ys, twin_xs = TWINS[rule](gradient, start, 100.3, 0.7, 100)
    np.testing.assert_allclose(ys, twin_ys, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(xs, twin_xs, rtol=1e-12, atol=1e-12)


def test_lock_step_of_the_convex_rule():
    eigenvalues, start = np.append(curvatures(), 0.0), np.ones(8)
    theta = vector(start)
    optimizer = NAG([theta], L=100.0, rule="convex")
    ys, xs = run(optimizer, theta, lambda y: eigenvalues * y, 100)
    twin_ys, twin_xs = reference.nesterov_convex(lambda y: eigenvalues * y, start, 100.0, 100)
    np.testing.assert_allclose(ys, twin_ys, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(xs, twin_xs, rtol=1e-12, atol=1e-13)


@every
@pytest.mark.parametrize("known", [{}, {"L": 100.0}, {"lr": 0.02}, {"mu": 2.0}])
def test_estimates_are_those_of_the_slow_twin_and_are_used(rule, known):
    eigenvalues, points, gradients = curvatures(), [], []
    theta = vector(np.ones(7))
    optimizer = rule([theta], **known)
    group = optimizer.param_groups[0]
    for k in range(60):
        points.append(theta.detach().numpy().copy())
        gradients.append(eigenvalues * points[-1])
        theta.grad = torch.tensor(gradients[-1])
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        L, mu = (row[-1] for row in reference.estimates(points, gradients))
        if k:
            assert 1.3 * float(group["estimated_L"]) == pytest.approx(L, rel=1e-12)
            assert float(group["estimated_mu"]) == pytest.approx(mu, rel=1e-12)
        if k and "lr" not in known:  # the next step is the one with constants known to be these
            L, twin = known.get("L", L), vector(points[-1])
            mu = min(max(known.get("mu", mu), 1e-6 * L), L)
            other = rule([twin], L=L, mu=mu)
            other.state[twin]["momentum_buffer"] = before["state"][0]["momentum_buffer"]
            twin.grad = torch.tensor(gradients[-1])
            other.step()
            assert torch.allclose(twin, theta, rtol=1e-10, atol=1e-13)
    assert 0.7 * 100 < float(group["estimated_L"]) <= 100.0 * (1 + 1e-9)
    assert float(group["estimated_mu"]) >= 1.0 - 1e-9


def test_the_first_step_without_a_rate_is_short():
    theta = vector([3.0, 4.0])
    optimizer = NAG([theta])
    theta.grad = torch.tensor([1e6, 0.0], dtype=torch.float64)
    optimizer.step()
    assert theta.tolist() == pytest.approx([3.0 - 5e-4, 4.0], rel=1e-12)
    still = vector([0.0, 0.0])
    optimizer = NAG([still])
    still.grad = torch.zeros(2, dtype=torch.float64)
    optimizer.step()
    optimizer.step()
    assert still.tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------- rates


@pytest.mark.parametrize("rule", [NAG, TripleMomentum])
@pytest.mark.parametrize(("L", "mu"), [(1.0, 0.1), (25.0, 1.0), (1000.0, 1.0)])
def test_losses_stay_below_the_proved_bounds(rule, L, mu):
    eigenvalues = np.geomspace(mu, L, 20)
    start = np.random.default_rng(0).standard_normal(20)
    theta = vector(start)
    _, xs = run(rule([theta], L=L, mu=mu), theta, lambda y: eigenvalues * y, 80)
    losses, n = 0.5 * (eigenvalues * xs**2).sum(1), np.arange(81)
    distance = (start**2).sum()
    rho = 1 - math.sqrt(mu / L)
    if rule is NAG:
        bounds = rho**n * (losses[0] + mu / 2 * distance)
    else:
        bounds = rho ** (2 * n) * L**2 / (2 * mu) * distance
    assert (losses <= bounds).all()


def test_the_convex_rule_keeps_its_bound_without_strong_convexity():
    # Nesterov's worst function: a chain, whose least curvature falls with the square of its length.
    size = 120
    chain = 2 * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1)
    linear = np.eye(size)[0]
    least = np.linalg.solve(chain, linear)
    theta = vector(np.zeros(size))
    optimizer = NAG([theta], L=4.0, rule="convex")
    _, xs = run(optimizer, theta, lambda y: chain @ y - linear, 50)
    losses = np.array([0.5 * (x - least) @ chain @ (x - least) for x in xs])[1:]
    assert (losses <= 2 * 4.0 * (least**2).sum() / (np.arange(1, 51) + 1) ** 2).all()


def test_the_heavy_ball_circles_where_the_others_arrive():
    theta = vector([3.3])
    ys, _ = run(HeavyBall([theta], L=25.0, mu=1.0), theta, reference.circling, 300)
    np.testing.assert_allclose(sorted(ys[-3:, 0]), [-1.802449, 0.646531, 2.115918], atol=1e-6)
    for rule in (NAG, TripleMomentum):
        theta = vector([3.3])
        ys, xs = run(rule([theta], L=25.0, mu=1.0), theta, reference.circling, 300)
        assert abs(xs[-1, 0]) < 1e-6 > abs(ys[-1, 0])


@every
def test_equal_constants_are_gradient_descent(rule):
    theta, plain = vector([1.0, -2.0]), vector([1.0, -2.0])
    ours, descent = rule([theta], L=5.0, mu=5.0), torch.optim.SGD([plain], lr=0.2)
    for _ in range(5):
        for parameter, optimizer in ((theta, ours), (plain, descent)):
            parameter.grad = torch.tensor([3.0, 4.0], dtype=torch.float64) * parameter.detach().sin()
            optimizer.step()
    assert torch.allclose(theta, plain, rtol=1e-14)


def test_nag_is_torchs_nesterov_momentum_with_the_right_numbers():
    momentum = (1 - 0.1) / (1 + 0.1)
    batches, ends = regression_batches(20), []
    for make in (
        lambda p: NAG(p, L=10.0, mu=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, nesterov=True),
    ):
        model = network()
        optimizer = make(model.parameters())
        for batch in batches:
            optimizer.zero_grad()
            squared_error(model)(batch).backward()
            optimizer.step()
        ends.append(snapshot(model))
    for left, right in zip(*ends, strict=True):
        assert torch.allclose(left, right, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------- the rate is live


@every
def test_a_lower_rate_is_a_larger_constant(rule):
    halved, known = vector([1.0, 2.0]), vector([1.0, 2.0])
    optimizer = rule([halved], L=10.0, mu=0.5)
    optimizer.param_groups[0]["lr"] /= 2
    run(optimizer, halved, lambda y: np.array([0.5, 10.0]) * y, 30)
    run(rule([known], L=20.0, mu=0.5), known, lambda y: np.array([0.5, 10.0]) * y, 30)
    assert torch.allclose(halved, known, rtol=1e-12)


@every
def test_a_rate_above_one_over_mu_is_gradient_descent(rule):
    theta = vector([1.0])
    optimizer = rule([theta], L=10.0, mu=4.0)
    optimizer.param_groups[0]["lr"] = 0.5
    run(optimizer, theta, lambda y: y, 3)
    assert theta.item() == pytest.approx(0.5**3)


@every
@pytest.mark.parametrize("known", [{}, {"L": 10.0, "mu": 0.1}])
def test_a_rate_of_zero_stands_still_in_the_middle_of_a_run(rule, known):
    theta = vector([1.0, 2.0])
    optimizer = rule([theta], **known)
    run(optimizer, theta, lambda y: np.array([0.5, 10.0]) * y, 5)
    before = theta.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    _, xs = run(optimizer, theta, lambda y: np.array([0.5, 10.0]) * y, 3)
    assert torch.equal(theta, before)
    assert np.isfinite(xs).all()


def test_an_estimated_rate_is_scaled():
    theta, plain = vector([1.0, 2.0]), vector([1.0, 2.0])
    optimizer, other = NAG([theta]), NAG([plain], rule="convex")
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] == 1.0
    optimizer.param_groups[0]["lr"] = 0.5
    run(optimizer, theta, lambda y: np.array([0.5, 10.0]) * y, 1)
    run(other, plain, lambda y: np.array([0.5, 10.0]) * y, 1)
    assert torch.allclose(1 - theta[0], (1 - plain[0]) / 2, rtol=1e-6)


# ---------------------------------------------------------------------- query point and output point


@every
@pytest.mark.parametrize("known", [{}, {"L": 10.0, "mu": 0.1}])
def test_eval_and_train_come_back_to_the_bit_and_may_be_repeated(rule, known):
    theta = vector([1.0, 2.0])
    optimizer = rule([theta], **known)
    optimizer.eval()  # before any step, both points are one
    assert theta.tolist() == [1.0, 2.0]
    optimizer.train()
    run(optimizer, theta, lambda y: np.array([0.5, 10.0]) * y, 4)
    before, state = theta.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.eval()
    output = theta.detach().clone()
    optimizer.eval()
    assert torch.equal(theta, output)
    assert torch.equal(theta, before) == (rule is HeavyBall)
    optimizer.train()
    optimizer.train()
    assert torch.equal(theta, before)
    assert optimizer.state_dict()["state"][0].keys() == state[0].keys()


@every
def test_a_step_at_the_output_point_is_refused(rule):
    theta = vector([1.0])
    optimizer = rule([theta], L=10.0, mu=0.1)
    optimizer.eval()
    called = []
    with pytest.raises(RuntimeError, match=rf"{rule.__name__}: step\(\) after eval\(\).*call train\(\)"):
        optimizer.step(lambda: called.append(1))
    assert not called
    optimizer.train()
    optimizer.step()


@pytest.mark.parametrize("rule", [NAG, TripleMomentum])
@pytest.mark.parametrize("known", [{}, {"L": 10.0, "mu": 0.1}])
@pytest.mark.parametrize("training", [True, False])
def test_a_state_of_either_point_goes_on(rule, known, training, tmp_path):
    def gradient(y):
        return np.array([0.5, 10.0]) * y

    theta = vector([1.0, 2.0])
    optimizer = rule([theta], **known)
    run(optimizer, theta, gradient, 5)
    if not training:
        optimizer.eval()
    torch.save((theta.detach(), optimizer.state_dict()), tmp_path / "state.pt")
    there, state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.train()
    expected, _ = run(optimizer, theta, gradient, 5)
    twin = vector(there)
    other = rule([twin], **known)
    other.eval()  # whatever it was
    other.load_state_dict(state)
    if not training:
        with pytest.raises(RuntimeError, match="eval"):
            other.step()
    other.train()
    found, _ = run(other, twin, gradient, 5)
    assert np.array_equal(found, expected)


def test_a_copy_at_the_output_point_goes_on():
    theta = vector([1.0, 2.0])
    optimizer = NAG([theta], L=10.0)
    run(optimizer, theta, lambda y: np.array([0.5, 10.0]) * y, 5)
    optimizer.eval()
    point, other = pickle.loads(pickle.dumps((theta, optimizer)))
    for p, own in ((theta, optimizer), (point, other)):
        own.train()
        run(own, p, lambda y: np.array([0.5, 10.0]) * y, 5)
    assert torch.equal(theta, point)


def test_the_output_point_is_of_the_last_steps_rate_whatever_a_schedule_did_since():
    theta = vector([1.0, 2.0])
    optimizer = NAG([theta], L=10.0, mu=0.1)
    _, xs = run(optimizer, theta, lambda y: np.array([0.5, 10.0]) * y, 5)
    optimizer.param_groups[0]["lr"] *= 0.1
    optimizer.eval()
    assert theta.tolist() == xs[-1].tolist()


# ---------------------------------------------------------------------- groups


def test_a_group_added_later_shares_the_estimates():
    first, second = vector([1.0, 2.0]), vector([3.0])
    optimizer = NAG([first])
    run(optimizer, first, lambda y: np.array([0.5, 10.0]) * y, 5)
    optimizer.add_param_group({"params": [second]})
    known, new = optimizer.param_groups
    assert new["estimated_L"] == known["estimated_L"] > 0
    assert new["estimated_mu"] == known["estimated_mu"]
    optimizer.eval()
    optimizer.add_param_group({"params": [third := vector([1.0])]})
    assert not optimizer.param_groups[2]["train_mode"]
    optimizer.train()
    third.grad = second.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert third.item() < 1.0
    assert second.item() < 3.0


def test_groups_estimate_together():
    whole = vector([1.0, 2.0, 3.0])
    parts: list[torch.Tensor] = [vector([1.0]), vector([2.0, 3.0])]
    eigenvalues = torch.tensor([1.0, 5.0, 30.0], dtype=torch.float64)
    together, apart = NAG([whole]), NAG([{"params": [part]} for part in parts])
    for _ in range(20):
        whole.grad = eigenvalues * whole.detach()
        for part, of in zip(parts, (eigenvalues[:1], eigenvalues[1:]), strict=True):
            part.grad = of * part.detach()
        together.step()
        apart.step()
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-10)


def test_a_groups_own_rate_takes_the_place_of_the_default_constant():
    optimizer = NAG([{"params": [vector([1.0])], "lr": 0.5}, {"params": [vector([1.0])]}], L=10.0, mu=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]
    assert [group["L"] for group in optimizer.param_groups] == [2.0, 10.0]


@pytest.mark.parametrize(
    ("dtype", "known"),
    [(torch.float32, {}), (torch.float32, {"L": 10.0, "mu": 0.5}), (torch.bfloat16, {"L": 10.0, "mu": 0.5})],
)
def test_short_numbers(dtype, known):
    theta = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = NAG([theta], **known)
    for _ in range(80):
        theta.grad = torch.tensor([0.5, 1.0, 5.0, 10.0]).to(dtype) * theta.detach()
        optimizer.step()
    assert theta.dtype == dtype
    assert theta.detach().float().norm() < 0.2


@pytest.mark.parametrize("known", [{}, {"L": 10.0}, {"mu": 1.0}, {"rule": "convex"}])
def test_numbers_too_short_to_estimate_from_are_refused(known):
    with pytest.raises(ValueError, match=r"NAG: torch.bfloat16 is too coarse to estimate L and mu from"):
        NAG([nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], **known)


def test_short_numbers_are_taken_where_nothing_is_estimated():
    optimizer = NAG([nn.Parameter(torch.ones(4, dtype=torch.bfloat16))], L=10.0, rule="convex")
    assert optimizer.param_groups[0]["lr"] == 0.1


# ---------------------------------------------------------------------- what is refused

REFUSED = {
    "rate and constant": ({"L": 10.0, "lr": 0.5}, "lr=0.5 contradicts L=10, as lr is 1 / L; give one"),
    "no rate": ({"lr": -1.0}, "lr must be a finite number at least 0, got -1.0"),
    "infinite constant": ({"L": math.inf}, "L must be a finite number above 0, got inf"),
    "no constant": ({"L": 0.0}, "L must be a finite number above 0, got 0.0"),
    "constant in words": ({"L": "big"}, "L must be a finite number above 0, got 'big'"),
    "mu of zero": ({"L": 1.0, "mu": 0.0}, r"mu must be above 0, got 0.0; NAG\(rule='convex'\) is the rule"),
    "negative mu": ({"L": 1.0, "mu": -1.0}, "mu must be a finite number at least 0, got -1.0"),
    "mu above L": ({"L": 1.0, "mu": 2.0}, "mu=2 is above L=1"),
    "mu above the rate's L": ({"lr": 0.5, "mu": 3.0}, "mu=3 is above L=2"),
}


@every
@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses_with_a_reason(rule, settings, message):
    with pytest.raises(ValueError, match=f"{rule.__name__}: {message}"):
        rule([vector([1.0])], **settings)


def test_rules_are_refused_by_name():
    with pytest.raises(ValueError, match="NAG: rule must be 'strongly-convex' or 'convex', got 'nesterov'"):
        NAG([vector([1.0])], rule="nesterov")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"NAG: rule='convex' is the one for mu = 0 and takes no mu, got 0\.1"):
        NAG([vector([1.0])], L=1.0, mu=0.1, rule="convex")
    with pytest.raises(TypeError, match="dict"):
        NAG([vector([1.0])]).add_param_group([vector([1.0])])  # pyright: ignore[reportArgumentType]


@every
def test_a_rate_that_agrees_with_the_constant_is_no_contradiction(rule):
    assert rule([vector([1.0])], L=10.0, lr=0.1).param_groups[0]["lr"] == 0.1


# ---------------------------------------------------------------------- under OptEx


@every
def test_drafting_freezes_the_estimates_and_their_window(rule):
    theta = vector([1.0, 2.0])
    optimizer = rule([theta])
    run(optimizer, theta, lambda y: np.array([0.5, 10.0]) * y, 5)
    frozen = ("previous_point", "previous_gradient")
    before = {name: optimizer.state[theta][name].clone() for name in frozen}
    group = optimizer.param_groups[0]
    L, mu = group["estimated_L"].clone(), group["estimated_mu"].clone()
    with optimizer.drafting():
        run(optimizer, theta, lambda y: 1e6 * y, 2)
        with optimizer.drafting():
            pass
        run(optimizer, theta, lambda y: 1e6 * y, 1)
    assert all(torch.equal(optimizer.state[theta][name], before[name]) for name in frozen)
    assert (group["estimated_L"], group["estimated_mu"]) == (L, mu)
    run(optimizer, theta, lambda y: 1e6 * y, 1)
    assert group["estimated_L"] > L


@every
def test_predictions_leave_the_estimates_of_the_plain_loop(rule):
    batches = regression_batches(1) * 12
    plain, model = network(), network()
    base, twin = rule(plain.parameters()), rule(model.parameters())
    for batch in batches:
        base.zero_grad()
        squared_error(plain)(batch).backward()
        base.step()
    optimizer = OptEx(twin, parallelism=4, acceptance=WithinTolerance(0), model=model)
    for _ in optimizer.rounds(batches, squared_error(model)):
        pass
    assert same(snapshot(plain), snapshot(model))
    for name in ("estimated_L", "estimated_mu"):
        assert base.param_groups[0][name] == twin.param_groups[0][name]


def test_optex_says_that_the_base_is_at_its_output_point():
    theta = vector([1.0, 2.0])
    base = NAG([theta], L=10.0, mu=0.5)
    optimizer = OptEx(base, parallelism=2, deterministic=True)

    def closure():
        optimizer.zero_grad()
        loss = (theta**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    base.eval()
    with pytest.raises(RuntimeError, match=r"call train\(\)"):
        optimizer.step(closure)
    base.train()
    optimizer.step(closure)
