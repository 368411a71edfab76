"""AdaHessian: against its twin, in closed form, and what an observing base needs of everything around it."""

import copy
import gc
import weakref

import pytest
import torch
from scipy.optimize import rosen, rosen_der
from torch import nn
from torch.func import functional_call, jacrev

import optex
from optex import NonFiniteError, OptEx, VectorizedEvaluator, WithinTolerance, WorkersEvaluator
from optex.optimizers import AdaHessian, hutchinson_diagonal
from optex.optimizers.adahessian import _signs
from optex.sources import backpropagate
from optex.stepping import FreezesWhileDrafting, ObservesEvaluations
from optex.studies.comparison import Comparison
from tests.gradients import grad_of
from tests.models import network, regression_batches, same, snapshot, squared_error
from tests.references.adahessian import ReferenceAdaHessian


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()


def whole_hessian(model, batch):
    """[d, d], by torch.func."""
    sizes = dict(model.named_parameters())

    def loss(vector):
        parts = vector.split([p.numel() for p in sizes.values()])
        values = {name: part.view(p.shape) for (name, p), part in zip(sizes.items(), parts, strict=True)}
        return (functional_call(model, values, (batch[0],)) - batch[1]).square().mean()

    return jacrev(jacrev(loss))(flat(sizes.values()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": "none"},
        {"block": "rows", "hessian_power": 0.5},
        {"block": 3, "weight_decay": 0.1},
        {"average": "signed"},
        {"average": "signed", "block": "rows", "betas": (0.5, 0.9)},
        {"average": "signed", "block": 5, "eps": 1e-2},
        {"hessian_power": 0.0, "block": 1},
    ],
)
def test_walks_with_its_twin(options):
    model = convolution()
    parameters = list(model.parameters())
    optimizer = AdaHessian(parameters, lr=0.02, **options)
    twin = ReferenceAdaHessian([tuple(p.shape) for p in parameters], 0.02, **options)
    expected = flat(parameters).tolist()
    generator = torch.Generator().manual_seed(1)
    for number in range(6):
        x = torch.randn(5, 1, 3, 3, generator=generator, dtype=torch.float64)
        batch = (x, torch.stack([x.sum((1, 2, 3)), x[:, 0, 0, 0].sin()], 1))
        H = whole_hessian(model, batch).tolist()
        optimizer.zero_grad()
        squared_error(model)(batch).backward(create_graph=True)
        gradient = flat([grad_of(p) for p in parameters]).tolist()
        torch.manual_seed(number)
        signs = flat([_signs(p) for p in parameters]).tolist()
        expected = twin.step(expected, gradient, H, signs)
        torch.manual_seed(number)
        optimizer.step()
        torch.testing.assert_close(
            flat(parameters), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


def quadratic(lr, steps, **options):
    """θ over θ₀ after each step of ½ Σ a_i θ_i², a from 1 to 10⁴: [steps, 50]."""
    scales = torch.logspace(0, 4, 50, dtype=torch.float64)
    theta = nn.Parameter(torch.ones(50, dtype=torch.float64))
    optimizer, rows = AdaHessian([theta], lr=lr, **options), []
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * scales * theta**2).sum().backward(create_graph=True)
        optimizer.step()
        rows.append(theta.detach().clone())
    return torch.stack(rows)


def test_all_coordinates_of_a_diagonal_quadratic_walk_alike():
    rows = quadratic(0.15, 62, eps=1e-12)
    assert (rows - rows[:, :1]).abs().max() < 1e-9


def test_a_rate_of_one_without_momentum_is_newtons_step():
    assert quadratic(1.0, 1, betas=(0.0, 0.999), eps=1e-14).abs().max() < 1e-12


# ---------------------------------------------------------------------- the diagonal


def test_hutchinsons_estimate_is_unbiased_with_the_known_variance():
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    H, probes = B @ B.T / 8, 4000
    theta = torch.randn(8, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    (gradient,) = torch.autograd.grad(0.5 * theta @ H @ theta, theta, create_graph=True)
    (found,) = hutchinson_diagonal([theta], [gradient], probes)
    deviation = (H.square().sum(1) - H.diagonal().square()).div(probes).sqrt()
    assert ((found - H.diagonal()).abs() < 4 * deviation).all()


def test_parameters_of_one_loss_share_their_probe():
    # H = [[0, 1], [1, 0]] over two parameters: z ⊙ Hz is the product of both signs in either place.
    a, b = (torch.ones(1, requires_grad=True) for _ in range(2))
    for seed in range(8):
        torch.manual_seed(seed)
        first, second = hutchinson_diagonal(
            [a, b], torch.autograd.grad((a * b).sum(), (a, b), create_graph=True)
        )
        assert first.abs() == 1
        assert torch.equal(first, second)


def test_a_constant_gradient_has_no_curvature_and_all_constant_ones_no_graph():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    backpropagate((a**3).sum() + 2 * b.sum(), create_graph=True)
    found = hutchinson_diagonal([a, b], [grad_of(a), grad_of(b)])
    assert torch.equal(found[0], torch.full((2,), 6.0))
    assert torch.equal(found[1], torch.zeros(2))
    with pytest.raises(ValueError, match=r"no gradient has a graph.*create_graph=True"):
        hutchinson_diagonal([b], [grad_of(b)])


def test_fewer_probes_than_one_are_refused():
    a = torch.ones(2, requires_grad=True)
    backpropagate((a**3).sum(), create_graph=True)
    with pytest.raises(ValueError, match="probes must be an integer of at least 1, got 0"):
        hutchinson_diagonal([a], [grad_of(a)], 0)


def test_signed_averages_cancel_noise_and_absolute_ones_keep_it():
    # Entry i of z ⊙ Hz is H_ii + noise of variance Σ H_ij²: over a long row the signed mean nears that of H_ii.
    torch.manual_seed(0)
    B = torch.randn(400, 400, dtype=torch.float64)
    H, states = B @ B.T / 400, {}
    for average in ("absolute", "signed"):
        theta = nn.Parameter(torch.randn(1, 400, dtype=torch.float64))
        optimizer = AdaHessian([theta], average=average, block="rows", betas=(0.9, 0.0))
        (0.5 * theta @ H @ theta.T).sum().backward(create_graph=True)
        optimizer.step()
        states[average] = optimizer.state[theta]["exp_hessian_diag_sq"].sqrt()[0, 0] / H.diagonal().mean()
    assert abs(states["signed"] - 1) < 0.1
    assert states["absolute"] > 1.1


def test_a_piecewise_linear_network_shows_the_losss_curvature_alone():
    torch.manual_seed(0)
    x = torch.randn(16, 4, dtype=torch.float64)
    layer = nn.Linear(4, 1).double()
    for loss, curved in ((torch.square, True), (torch.abs, False)):
        layer.zero_grad()
        backpropagate(loss(torch.relu(layer(x)) - 1).mean(), create_graph=True)
        parameters = list(layer.parameters())
        found = hutchinson_diagonal(parameters, [grad_of(p) for p in parameters])
        assert any(bool(part.any()) for part in found) == curved


# ---------------------------------------------------------------------- the graph


def test_a_step_without_a_graph_says_what_to_do():
    model = network()
    optimizer, before = AdaHessian(model.parameters()), snapshot(model)
    squared_error(model)(regression_batches(1)[0]).backward()
    with pytest.raises(ValueError, match=r"no gradient has a graph.*loss.backward\(create_graph=True\)"):
        optimizer.step()
    assert same(before, snapshot(model))
    assert not optimizer.state


def test_the_graph_is_gone_after_a_step():
    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    alive, model = weakref.WeakSet(), network()

    def pack(tensor):
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    optimizer = AdaHessian(model.parameters())
    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            squared_error(model)(regression_batches(1)[0]).backward(create_graph=True)
        assert alive
        optimizer.step()
        assert not alive
    finally:
        gc.enable()
    assert all(p.grad is not None and p.grad.grad_fn is None for p in model.parameters())


def test_parameters_that_a_loss_leaves_out_stay():
    used, unused = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = AdaHessian([used, unused])
    (used**2).sum().backward(create_graph=True)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(2))
    assert unused not in optimizer.state


def test_a_frozen_parameter_with_a_gradient_of_old_stays_while_its_curvature_is_unknown():
    free, frozen = (nn.Parameter(torch.ones(2)) for _ in range(2))
    frozen.requires_grad_(False).grad = torch.ones(2)
    optimizer = AdaHessian([free, frozen])
    (free**2).sum().backward(create_graph=True)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2))
    assert not torch.equal(free.detach(), torch.ones(2))


def test_curvature_that_is_not_finite_is_refused_before_anything_moves():
    theta = nn.Parameter(torch.zeros(2))
    optimizer = AdaHessian([theta])
    theta.abs().pow(1.5).sum().backward(create_graph=True)
    assert grad_of(theta).isfinite().all()
    with pytest.raises(NonFiniteError, match=r"product of the Hessian.*not finite"):
        optimizer.step()
    assert not theta.detach().any()
    assert not optimizer.state


def test_a_step_at_rate_0_makes_the_state_without_a_graph():
    # torch.distributed.checkpoint does so with gradients of zeros, to have something to load into.
    theta = nn.Parameter(torch.ones(3))
    optimizer = AdaHessian([theta], lr=0.0)
    theta.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.state[theta].keys() == {"step", "curvature_step", "exp_avg", "exp_hessian_diag_sq"}


def test_counters_keep_counting_in_low_precision():
    theta = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = AdaHessian([theta], lr=1e-3)
    backpropagate((theta**2).sum(), create_graph=True)
    optimizer.step()
    optimizer.state[theta].update(step=300, curvature_step=299)
    other = AdaHessian([theta])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    backpropagate((theta**2).sum(), create_graph=True)
    other.step()
    assert (other.state[theta]["step"], other.state[theta]["curvature_step"]) == (301, 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number at least 0, got -1.0"),
        ({"eps": 0.0}, "eps must be a finite number above 0, got 0.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be a finite number at least 0 and below 1, got 1.0"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"hessian_power": 1.5}, "hessian_power must be a finite number at least 0 and at most 1, got 1.5"),
        ({"average": "mean"}, "average must be one of absolute, signed, got 'mean'"),
        ({"block": "conv"}, "block must be one of none, kernels, rows, or how many"),
        ({"block": 0}, "at least 1, got 0"),
        ({"block": True}, "got True"),
        ({"block": 2.0}, "got 2.0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"AdaHessian: .*{message}"):
        AdaHessian([nn.Parameter(torch.ones(2))], **options)


# ---------------------------------------------------------------------- observing and drafting


def test_it_keeps_both_protocols():
    optimizer = AdaHessian([nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer, FreezesWhileDrafting)
    assert isinstance(optimizer, ObservesEvaluations)
    assert optimizer.needs_graph


def test_recalling_what_was_observed_is_the_plain_step():
    ends = []
    for observing in (False, True):
        model = network()
        optimizer = AdaHessian(model.parameters(), block="rows")
        for number, batch in enumerate(regression_batches(4)):
            optimizer.zero_grad()
            squared_error(model)(batch).backward(create_graph=True)
            torch.manual_seed(number)
            if observing:
                observation = optimizer.observe()
                assert all(not grad_of(p).requires_grad for p in model.parameters())
                optimizer.recall(observation)
            optimizer.step()
        ends.append(snapshot(model))
    assert same(*ends)


def test_an_observation_serves_one_step_whatever_comes_of_it():
    theta = nn.Parameter(torch.ones(2))
    optimizer = AdaHessian([theta])
    backpropagate((theta**2).sum(), create_graph=True)
    observation = optimizer.observe()
    optimizer.recall(observation)
    theta.grad = torch.full((2,), torch.nan)
    with pytest.raises(NonFiniteError, match="gradient"):
        optimizer.step()
    theta.grad = torch.ones(2)
    with pytest.raises(ValueError, match="no gradient has a graph"):
        optimizer.step()
    optimizer.recall(observation)
    optimizer.step()
    assert not torch.equal(theta.detach(), torch.ones(2))


def test_an_evaluation_without_finite_curvature_has_no_finite_gradient():
    rough, smooth = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))
    optimizer = AdaHessian([rough, smooth])
    backpropagate(rough.abs().pow(1.5).sum() + (smooth**2).sum(), create_graph=True)
    optimizer.observe()
    assert grad_of(rough).isnan().all()
    assert grad_of(smooth).isfinite().all()


def test_a_draft_without_any_curvature_goes_nowhere():
    theta = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = AdaHessian([theta], lr=0.1)
    with optimizer.drafting():
        theta.grad = torch.ones(2, dtype=torch.float64)
        optimizer.step()
    assert torch.equal(theta.detach(), torch.ones(2))


def test_drafted_steps_need_no_graph_and_leave_the_curvature_alone():
    theta = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = AdaHessian([theta], lr=0.1)
    backpropagate((3 * theta**2).sum(), create_graph=True)
    optimizer.step()
    before, entry = theta.detach().clone(), copy.deepcopy(optimizer.state[theta])
    with optimizer.drafting():
        theta.grad = torch.full((2,), 2.0, dtype=torch.float64)
        optimizer.step()
    state = optimizer.state[theta]
    assert torch.equal(state["exp_hessian_diag_sq"], entry["exp_hessian_diag_sq"])
    assert (state["step"], state["curvature_step"]) == (2, 1)
    # The second derivative is 6 throughout: m̂ / 6, m by hand.
    m = (0.9 * 0.1 * 6 + 0.1 * 2) / (1 - 0.9**2)
    torch.testing.assert_close(theta.detach(), before - 0.1 * m / (6 + 1e-4), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="no gradient has a graph"):
        optimizer.step()


# ---------------------------------------------------------------------- under OptEx


@pytest.mark.parametrize("evaluator", [lambda model: VectorizedEvaluator(model), lambda _: WorkersEvaluator(2)])
def test_evaluators_that_answer_gradients_alone_are_refused(evaluator):
    model = network()
    refused = evaluator(model)
    message = rf"evaluator {type(refused).__name__} answers gradients alone, and AdaHessian needs more"
    with pytest.raises(ValueError, match=message):
        OptEx(AdaHessian(model.parameters()), evaluator=refused)
    optimizer = OptEx(AdaHessian(model.parameters()))
    with pytest.raises(ValueError, match=message):
        optimizer.evaluator = refused


def test_algorithm_1_measures_curvature_once_a_round():
    model, batches = network(), regression_batches(30)
    base, before = AdaHessian(model.parameters(), lr=0.02), squared_error(model)(batches[0]).item()
    optimizer = OptEx.from_paper(base, parallelism=3)
    torch.manual_seed(0)
    reports = list(optimizer.rounds(batches, squared_error(model)))
    for state in base.state.values():
        assert state["step"] == optimizer.steps_taken == 30
        assert state["curvature_step"] == len(reports) == 10
    assert squared_error(model)(batches[0]).item() < before


def test_steps_on_predictions_alone_leave_the_curvature_alone():
    theta = nn.Parameter(torch.linspace(1, 2, 6, dtype=torch.float64))
    base = AdaHessian([theta], lr=0.01)
    optimizer = OptEx(base, parallelism=1, deterministic=True)
    reports = list(optimizer.rounds([None] * 40, lambda _: (theta**4).sum()))
    assert optimizer.steps_taken > len(reports)  # strides were taken
    assert base.state[theta]["step"] == optimizer.steps_taken
    assert base.state[theta]["curvature_step"] == len(reports)


@pytest.mark.parametrize("parallelism", [1, 4])
def test_declared_deterministic_it_is_still_the_plain_loop(parallelism):
    # The check of that declaration evaluates twice, and must not draw a probe of its own.
    (batch,) = regression_batches(1)
    plain, model = network(), network()
    base, objective, trajectory = AdaHessian(plain.parameters(), lr=0.05), squared_error(plain), []
    torch.manual_seed(3)
    for _ in range(8):
        base.zero_grad()
        objective(batch).backward(create_graph=True)
        base.step()
        trajectory.append(snapshot(plain))
    torch.manual_seed(3)
    optimizer = OptEx(
        AdaHessian(model.parameters(), lr=0.05), parallelism=parallelism, stride=1, deterministic=True,
        acceptance=WithinTolerance(0),
    )  # fmt: skip
    for _ in optimizer.rounds([batch] * 8, squared_error(model)):
        assert same(snapshot(model), trajectory[optimizer.steps_taken - 1])
    assert optimizer.steps_taken == 8


def test_dropout_and_probes_share_a_steps_random_numbers():
    def made():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()

    batches, plain, model, trajectory = regression_batches(8), made(), made(), []
    base = AdaHessian(plain.parameters(), lr=0.05)
    torch.manual_seed(3)
    for batch in batches:
        base.zero_grad()
        squared_error(plain)(batch).backward(create_graph=True)
        base.step()
        trajectory.append(snapshot(plain))
    torch.manual_seed(3)
    optimizer = OptEx(
        AdaHessian(model.parameters(), lr=0.05), parallelism=4, stride=1, acceptance=WithinTolerance(0)
    )
    for _ in optimizer.rounds(batches, squared_error(model)):
        assert same(snapshot(model), trajectory[optimizer.steps_taken - 1])
    assert optimizer.steps_taken == 8


def test_a_closure_has_to_keep_the_graph():
    model, (batch,) = network(), regression_batches(1)
    optimizer, before = OptEx(AdaHessian(model.parameters()), parallelism=2), snapshot(model)

    def closure(create_graph):
        def run():
            optimizer.zero_grad()
            loss = squared_error(model)(batch)
            loss.backward(create_graph=create_graph)
            return loss

        return run

    with pytest.raises(ValueError, match="create_graph=True"):
        optimizer.step(closure(False))
    assert same(before, snapshot(model))
    optimizer.step(closure(True))
    assert not same(before, snapshot(model))


def test_micro_batches_keep_their_graphs():
    batches, ends = regression_batches(6), []
    pairs = [batches[i : i + 2] for i in range(0, 6, 2)]

    def mean_over(objective):
        return lambda pair: (objective(pair[0]) + objective(pair[1])) / 2

    for sources in (mean_over, optex.AccumulatingSource):
        model = network()
        optimizer = OptEx(AdaHessian(model.parameters(), lr=0.05), parallelism=1, stride=1)
        torch.manual_seed(0)
        for _ in optimizer.rounds(pairs, sources(squared_error(model))):
            pass
        ends.append(flat(model.parameters()))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-13)


def test_a_batch_without_finite_curvature_is_skipped():
    theta = nn.Parameter(torch.tensor([0.0, 1.0]))
    optimizer = OptEx(AdaHessian([theta], lr=0.05), parallelism=2, on_nonfinite="skip")
    powers = [2.0, 1.5, 2.0, 2.0, 2.0, 2.0]  # the second one has none at 0
    with pytest.warns(optex.NonFiniteWarning):
        reports = list(optimizer.rounds(powers, lambda power: theta.abs().pow(power).sum()))
    assert theta.isfinite().all()
    assert sum(report.accepted for report in reports) == 5


# ---------------------------------------------------------------------- around it


@pytest.mark.parametrize("method", ["data-parallel", "line-search", "nowcast"])
def test_methods_that_step_with_gradients_alone_are_refused_in_one_line(method):
    comparison = Comparison(("quadratic",), methods=(method, "optex"), optimizer="adahessian", dim=4)
    with pytest.raises(
        ValueError, match=f"methods: {method} step with gradients alone, and adahessian"
    ) as found:
        comparison.check()
    assert "\n" not in str(found.value)


def test_minimize_differentiates_twice_or_says_why_it_cannot():
    result = optex.minimize(
        lambda x: (x**4 + x**2).sum(), [1.0, -2.0], optimizer="adahessian", lr=0.1, maxiter=200, tol=1e-4
    )
    assert result.success
    with pytest.raises(ValueError, match="needs second derivatives, and jac gives first ones alone"):
        optex.minimize(rosen, [1.3, 0.7], jac=rosen_der, optimizer="adahessian")
    with pytest.raises(ValueError, match="evaluator WorkersEvaluator answers gradients alone"):
        optex.minimize(lambda x: (x**2).sum(), [1.0], optimizer="adahessian", workers=2)


def test_atoms_have_no_second_derivatives():
    pytest.importorskip("ase")
    from ase.build import molecule
    from ase.calculators.emt import EMT

    from optex.ase import OptExOptimizer

    with pytest.raises(ValueError, match=r"AdaHessian needs more of an evaluation.*forces alone"):
        OptExOptimizer(molecule("N2", calculator=EMT()), optimizer="adahessian", logfile=None)


def test_advise_measures_it():
    model = network()
    before = snapshot(model)
    advice = optex.advise(
        AdaHessian(model.parameters()), regression_batches(24), squared_error(model), model=model, seconds=1.0,
        quiet=True,
    )  # fmt: skip
    assert "answers gradients alone" in advice.refused["vectorized"]
    assert same(before, snapshot(model))
