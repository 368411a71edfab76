"""Regularised neural differential equations: a twin in plain floats, closed forms, and what may go wrong."""

import builtins
import math

import pytest
import torch

import optex
from optex.errors import NonFiniteError
from optex.regularisers import Flow, GlobalRegularizer, LocalRegularizer
from optex.regularisers.ode import error_estimate, stiffness_estimate
from optex.regularisers.ode.recording import one_step
from tests.references.neural_ode import B_ERROR, A, adaptive, heuristics

F64 = torch.float64
RTOL, ATOL = 2.0**-16, 2.0**-23  # torchode keeps tolerances in float32, which these are numbers of


def matrix(seed=0, scale=3.0, size=3):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(size, size, generator=generator, dtype=F64)


def field_of(weight):
    return lambda t, u: torch.tanh(u @ weight) + t[:, None].sin()


def plain_field(weight):
    rows = weight.detach().tolist()

    def field(time, state):
        return [
            math.tanh(sum(u * row[i] for u, row in zip(state, rows, strict=True))) + math.sin(time)
            for i in range(len(state))
        ]

    return field


def starts(n=4, seed=1):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gradient_of(weight):
    assert weight.grad is not None
    return weight.grad


def solved(weight, state=None, **options):
    flow = Flow(field_of(weight), **options)
    with flow.recording() as solves:
        end = flow(starts() if state is None else state)
    return flow, end, solves[0]


# ------------------------------------------------------------------ against the twin


def test_every_accepted_step_is_the_twins():
    weight = matrix()
    _, end, solve = solved(weight, rtol=RTOL, atol=ATOL)
    steps = solve.steps
    error, stiff = error_estimate(steps, RTOL, ATOL), stiffness_estimate(steps)
    assert not bool(steps.accepted.all())  # some were rejected, or waited
    for row, state in enumerate(starts().tolist()):
        first = float(steps.size[0, row])
        taken, last = adaptive(plain_field(weight), state, 1.0, first, RTOL, ATOL)
        mine = steps.accepted[:, row].nonzero()[:, 0]
        assert len(mine) == len(taken)
        for index, (time, size, before) in zip(mine.tolist(), taken, strict=True):
            assert float(steps.start[index, row]) == pytest.approx(time, abs=1e-8)
            assert float(steps.size[index, row]) == pytest.approx(size, rel=1e-6)
            assert steps.before[index, row].tolist() == pytest.approx(before, abs=1e-8)
            wanted = heuristics(plain_field(weight), time, before, size, RTOL, ATOL)
            assert float(error[index, row]) == pytest.approx(wanted[0], rel=1e-5)
            assert float(stiff[index, row]) == pytest.approx(wanted[1], rel=1e-6)
        assert end[row].tolist() == pytest.approx(last, abs=1e-9)


@pytest.mark.parametrize("kind", ["error", "stiffness"])
@pytest.mark.parametrize("aggregate", [None, "mean", "sum", "max"])
def test_the_global_term_gathers_accepted_steps_alone(kind, aggregate):
    weight = matrix()
    _, _, solve = solved(weight, rtol=RTOL, atol=ATOL)
    means = []
    for row, state in enumerate(starts().tolist()):
        taken, _ = adaptive(plain_field(weight), state, 1.0, float(solve.steps.size[0, row]), RTOL, ATOL)
        found = [heuristics(plain_field(weight), t, u, h, RTOL, ATOL) for t, h, u in taken]
        values = [
            pair[0] * h if kind == "error" else pair[1] for pair, (_, h, _) in zip(found, taken, strict=True)
        ]
        chosen = aggregate or ("mean" if kind == "error" else "max")
        means.append({"mean": sum(values) / len(values), "sum": sum(values), "max": max(values)}[chosen])
    wanted = sum(means) / len(means)
    assert GlobalRegularizer(kind, aggregate)(solve).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", ["error", "stiffness"])
@pytest.mark.parametrize("published", [False, True])
def test_the_local_terms_gradient_is_that_of_its_one_step(kind, published):
    # Of both forms; where the first stage is a constant, the twin's is taken with the unmoved field.
    weight, state = matrix().requires_grad_(), starts(1)
    local = LocalRegularizer(kind, published=published)
    time, size = torch.tensor([0.3], dtype=F64), torch.tensor([0.4], dtype=F64)
    local.at(field_of(weight), time, state, size, rtol=1e-4, atol=1e-4).backward()
    still = plain_field(weight)

    def value(moved):
        calls, field = [], plain_field(moved)

        def counted(t, u):
            calls.append(t)
            return still(t, u) if published and len(calls) == 1 else field(t, u)

        pair = heuristics(counted, 0.3, state[0].tolist(), 0.4, 1e-4, 1e-4)
        return pair[0] * 0.4 if kind == "error" else pair[1]

    for i, j in ((0, 0), (1, 2), (2, 1)):
        nudge = torch.zeros(3, 3, dtype=F64)
        nudge[i, j] = 1e-6
        slope = (value(weight + nudge) - value(weight - nudge)) / 2e-6
        assert float(gradient_of(weight)[i, j]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_a_constant_first_stage_breaks_the_errors_gradient():
    # The weights of the error sum to 0, so that what all stages share drops out; without one it does not.
    assert sum(B_ERROR) == pytest.approx(0.0, abs=1e-9)
    norms = []
    for published in (False, True):
        weight = (0.1 * matrix()).requires_grad_()
        step = torch.full((1,), 0.01, dtype=F64)
        local = LocalRegularizer(published=published)
        local.at(field_of(weight), step, starts(1), step, rtol=1e-4, atol=1e-4).backward()
        norms.append(float(gradient_of(weight).norm()))
    assert norms[1] > 1000 * norms[0]


# ------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("rate", [-7.0, 0.5])
def test_stiffness_of_a_linear_field_is_its_rate(rate):
    ones = torch.ones(2, dtype=F64)
    steps = one_step(lambda t, u: rate * u, 0 * ones, torch.ones(2, 3, dtype=F64), 0.2 * ones, first_stage=True)
    torch.testing.assert_close(stiffness_estimate(steps), ones[None] * abs(rate) / 3.5068)


def test_error_of_a_linear_field_is_its_polynomial():
    z = -0.8
    stages = []
    for weights in A:
        stages.append(1 + z * sum(a * k for a, k in zip(weights, stages, strict=True)))
    wanted = abs(z * sum(b * k for b, k in zip(B_ERROR, stages, strict=True))) / (1e-3 + 1e-3)
    one = torch.ones(1, dtype=F64)
    steps = one_step(lambda t, u: z * u, 0 * one, one[:, None], one, first_stage=True)
    assert float(error_estimate(steps, 1e-3, 1e-3)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("term", [GlobalRegularizer(), GlobalRegularizer("stiffness"), LocalRegularizer()])
def test_a_still_field_has_finite_gradients(term):
    # E = 0 and S = 0 / 0: neither may make a NaN.
    weight = torch.zeros(3, 3, dtype=F64, requires_grad=True)
    flow = Flow(lambda t, u: u @ weight)
    with flow.recording() as solves:
        loss = flow(starts()).square().sum()
    (loss + term(solves[0])).backward()
    assert term(solves[0]).item() == 0
    assert bool(gradient_of(weight).isfinite().all())
    assert bool(gradient_of(weight).any())


def test_gradients_of_the_solution_are_those_of_finite_differences():
    weight = matrix(scale=1.0).requires_grad_()
    flow = Flow(lambda t, u: torch.tanh(u @ weight), rtol=1e-9, atol=1e-9)
    flow(starts()).square().sum().backward()
    with torch.no_grad():
        for i, j in ((0, 1), (2, 2)):
            nudge = torch.zeros(3, 3, dtype=F64)
            nudge[i, j] = 1e-5
            ends = [
                Flow(lambda t, u, w=w: torch.tanh(u @ w), rtol=1e-9, atol=1e-9)(starts()).square().sum()
                for w in (weight + nudge, weight - nudge)
            ]
            assert float(gradient_of(weight)[i, j]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4)


# ------------------------------------------------------------------ the flow


def test_shapes_times_and_directions():
    flow = Flow(lambda t, u: -u + t[:, None, None], rtol=1e-8, atol=1e-8)
    state = torch.ones(5, 2, 3, dtype=F64)
    times = torch.tensor([0.0, 0.5, 2.0])
    states = flow(state, times)
    assert states.shape == (5, 3, 2, 3)
    exact = times - 1 + 2 * torch.exp(-times)
    torch.testing.assert_close(states[0, :, 0, 0], exact.to(F64), atol=1e-6, rtol=0)
    back = flow(states[:, -1], times.flip(0))
    torch.testing.assert_close(back[:, -1], state, atol=1e-5, rtol=0)
    assert Flow(lambda t, u: -u)(torch.ones(2, 4, 1)).dtype == torch.float32
    assert "rtol=1e-08" in repr(flow)


@pytest.mark.parametrize("backwards", [False, True])
def test_states_between_steps_and_draws(backwards):
    weight = matrix()
    flow = Flow(field_of(weight), rtol=1e-7, atol=1e-7)
    span = torch.tensor([1.0, 0.0] if backwards else [0.0, 1.0], dtype=F64)
    with flow.recording() as solves:
        flow(starts(), span)
    times = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=F64)
    found = solves[0].state_at(times)
    for row, time in enumerate(times):
        exact = flow(starts()[row : row + 1], torch.stack([span[0], time]))[0, -1]
        torch.testing.assert_close(found[row], exact, atol=1e-4, rtol=0)
    assert not found.requires_grad
    assert LocalRegularizer(mode="biased")(solves[0]).item() > 0
    assert LocalRegularizer(published=True)(solves[0]).item() > 0


def test_draws_are_seeded_and_within_the_solve():
    seen = []

    def field(t, u):
        seen.append(t)
        return torch.tanh(u @ matrix())

    flow = Flow(field)
    with flow.recording() as solves:
        flow(starts())
    seen.clear()
    values = []
    for mode in ("unbiased", "biased"):
        for _ in range(2):
            generator = torch.Generator().manual_seed(3)
            values.append(LocalRegularizer(mode=mode, generator=generator)(solves[0]).item())
    assert values[0] == values[1] != values[2] == values[3]
    assert len(seen) == 4 * 7
    times = torch.stack(seen)
    assert 0 <= float(times.min()) < float(times.max()) <= 1 + 1e-12
    unseeded = torch.random.get_rng_state()
    LocalRegularizer(generator=torch.Generator().manual_seed(0))(solves[0])
    assert torch.equal(unseeded, torch.random.get_rng_state())


# ------------------------------------------------------------------ the objective


@pytest.mark.parametrize(
    "kind", ["error", "stiffness", "local", "local-stiffness", GlobalRegularizer("error", "sum")]
)
def test_regularise_adds_its_term(kind):
    weight = matrix().requires_grad_()
    flow = Flow(field_of(weight))

    def plain(batch):
        return flow(batch).square().mean()

    objective = optex.regularise(plain, flow, kind, strength=0.5)
    loss = objective(starts())
    assert objective.last_term is not None
    assert loss.item() == pytest.approx(plain(starts()).item() + 0.5 * float(objective.last_term), rel=1e-12)
    assert float(objective.last_term) > 0
    loss.backward()
    assert bool(gradient_of(weight).isfinite().all())


def test_regularise_is_the_objective_where_it_is_off():
    flow = Flow(field_of(matrix().requires_grad_()))
    objective = optex.regularise(lambda batch: flow(batch).square().mean(), flow)
    plain = flow(starts()).square().mean()
    with torch.no_grad():
        assert torch.equal(objective(starts()), plain)
    flow.eval()
    assert torch.equal(objective(starts()), plain)
    flow.train()
    objective.strength = 0
    assert torch.equal(objective(starts()), plain)
    assert objective.last_term is None


def test_training_takes_fewer_evaluations_with_it():
    counts = {}
    for strength in (0.0, 10.0):
        torch.manual_seed(0)
        field = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        flow = Flow(lambda t, u, field=field: 4 * field(u))
        state = torch.randn(16, 2)
        objective = optex.regularise(
            lambda flow=flow, state=state: (flow(state) - state.flip(1)).square().mean(),
            flow,
            strength=strength,
        )
        optimizer = torch.optim.Adam(field.parameters(), lr=1e-2)
        for _ in range(25):
            optimizer.zero_grad()
            objective().backward()
            optimizer.step()
        with torch.no_grad():
            flow(state)
        counts[strength] = flow.evaluations
    assert counts[10.0] < 0.8 * counts[0.0]


def test_optex_steps_on_a_regularised_objective():
    weight = torch.nn.Parameter(matrix(scale=1.0))
    flow = Flow(field_of(weight))
    objective = optex.regularise(lambda batch: flow(batch).square().mean(), flow)
    optimizer = optex.OptEx(torch.optim.Adam([weight], lr=1e-2), parallelism=2)
    losses = [report.loss for report in optimizer.rounds([starts()] * 6, objective)]
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------ errors


def test_arguments_that_cannot_work():
    flow = Flow(lambda t, u: -u)
    with pytest.raises(TypeError, match="Flow: field must be callable"):
        Flow(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="Flow: rtol must be a finite number at least 0"):
        Flow(lambda t, u: u, rtol=-1.0)
    with pytest.raises(ValueError, match="Flow: atol must be a finite number at least 0"):
        Flow(lambda t, u: u, atol=-1.0)
    with pytest.raises(ValueError, match="Flow: max_steps"):
        Flow(lambda t, u: u, max_steps=0)
    for state in (torch.ones(3), torch.ones(0, 2), torch.ones(2, 2, dtype=torch.int64), [[1.0]]):
        with pytest.raises(ValueError, match="the state must be a floating-point tensor"):
            flow(state)
    with pytest.raises(ValueError, match=r"strictly increasing"):
        flow(torch.ones(1, 1), torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="a vector of two or more"):
        flow(torch.ones(1, 1), torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"slopes of the states' shape \(2, 3\)"):
        Flow(lambda t, u: u.sum(1))(torch.ones(2, 3))


def test_tolerances_below_the_dtype_are_refused():
    flow = Flow(lambda t, u: -u, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match=r"below what torch.float32 resolves.*float64"):
        flow(torch.ones(1, 1))
    flow(torch.ones(1, 1, dtype=F64))


def test_solves_that_fail_are_named():
    with pytest.raises(RuntimeError, match="max_steps=3 steps"):
        Flow(lambda t, u: torch.sin(50 * t)[:, None] + u, max_steps=3)(torch.ones(1, 1))
    with pytest.raises(NonFiniteError, match="blows up"):
        Flow(lambda t, u: u * math.nan)(torch.ones(1, 1))
    with pytest.raises(NonFiniteError, match="to start from"):
        Flow(lambda t, u: u)(torch.full((1, 1), math.inf))


def test_terms_and_objectives_that_cannot_work():
    flow = Flow(lambda t, u: -u)
    with pytest.raises(ValueError, match="GlobalRegularizer: kind must be one of 'error', 'stiffness'"):
        GlobalRegularizer("speed")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="GlobalRegularizer: aggregate"):
        GlobalRegularizer(aggregate="median")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="LocalRegularizer: mode"):
        LocalRegularizer(mode="random")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="LocalRegularizer: generator"):
        LocalRegularizer(generator=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="regularise: objective must be callable"):
        optex.regularise(3, flow)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="regularise: flow must be"):
        optex.regularise(lambda: torch.zeros(()), lambda t, u: u)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="regularise: kind must be one of 'error'"):
        optex.regularise(lambda: torch.zeros(()), flow, "speed")
    with pytest.raises(ValueError, match="regularise: strength"):
        optex.regularise(lambda: torch.zeros(()), flow, strength=-1)
    with pytest.raises(ValueError, match="did not call flow"):
        optex.regularise(lambda: torch.zeros(()), flow)()
    with pytest.raises(TypeError, match="must return a scalar tensor"):
        optex.regularise(lambda: flow(torch.ones(2, 1)), flow)()


def test_without_torchode_it_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("torchode"):
            raise ImportError("no torchode")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r'pip install "optex\[odes\]"'):
        Flow(lambda t, u: u)
