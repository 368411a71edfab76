"""What M-FAC alone promises: the dense inverse's steps, a window that is kept, and pruning by saliency."""

import copy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from optex import JitterWarning, NonFiniteError, OptEx
from optex.optimizers import MFAC
from optex.optimizers.mfac import gradient_rows, inverse_diagonal, inverse_product, obs_mask, obs_update
from optex.optimizers.mfac.fisher import row_coefficients
from tests.models import network, regression_batches, same, snapshot, squared_error
from tests.references.mfac import DenseMFAC, Recursion, dense_fisher, naive_woodbury

DOUBLE = torch.float64


def normal(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def stepped(optimizer, theta, gradients):
    for gradient in gradients:
        theta.grad = gradient.to(theta.dtype).clone()
        optimizer.step()


def memory(optimizer):
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


class TestSteps:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"momentum": 0.9},
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "decoupled_weight_decay": True},
            {"momentum": 0.5, "weight_decay": 0.1, "decoupled_weight_decay": True},
        ],
    )
    @pytest.mark.parametrize(("size", "damping"), [(1, 1e-2), (5, 1e-3), (40, 0.3)])
    def test_in_lock_step_with_the_dense_inverse(self, options, size, damping):
        theta = nn.Parameter(normal(12))
        optimizer = MFAC([theta], lr=0.1, window_size=size, damping=damping, **options)
        twin = DenseMFAC(theta.detach(), 0.1, size, damping, **options)
        for gradient in normal(17, 12, seed=1):
            stepped(optimizer, theta, [gradient])
            twin.step(gradient)
            assert relative(theta.detach(), twin.theta) < 1e-10

    def test_one_gradient_is_divided_by_its_squared_length(self):
        theta = nn.Parameter(torch.zeros(3, dtype=DOUBLE))
        stepped(MFAC([theta], lr=1.0, damping=0.5), theta, [torch.tensor([1.0, 2.0, 2.0])])
        expected = -torch.tensor([1.0, 2.0, 2.0], dtype=DOUBLE) / 9.5
        assert torch.allclose(theta.detach(), expected, rtol=1e-14)

    def test_until_the_window_is_full_the_mean_is_over_what_there_is(self):
        # Divided by m from the start, the first step would be 1 / (λ + 1/m) = 4, not 1 / (λ + 1).
        theta = nn.Parameter(torch.zeros(1, dtype=DOUBLE))
        stepped(MFAC([theta], lr=1.0, window_size=4, damping=1e-12), theta, [torch.ones(1)])
        assert theta.item() == pytest.approx(-1.0, rel=1e-9)

    def test_the_same_gradient_again_and_again(self):
        gradient, theta = normal(20), nn.Parameter(torch.zeros(20, dtype=DOUBLE))
        optimizer = MFAC([theta], lr=1.0, window_size=5, damping=1e-5)
        stepped(optimizer, theta, [gradient] * 9)
        expected = -9 * gradient / (1e-5 + gradient.square().sum())
        assert relative(theta.detach(), expected) < 1e-9

    def test_a_gradient_of_zeros_moves_nothing(self):
        theta = nn.Parameter(torch.ones(4))
        stepped(MFAC([theta], window_size=3), theta, [torch.zeros(4)] * 5)
        assert torch.equal(theta.detach(), torch.ones(4))

    @settings(deadline=None, max_examples=30)
    @given(
        rows=st.integers(1, 12),
        dimension=st.integers(1, 30),
        damping=st.sampled_from([1e-12, 1e-5, 1.0, 1e3]),
        scale=st.sampled_from([1e-6, 1.0, 1e4]),
    )
    def test_a_step_is_never_longer_than_m_along_its_gradient(self, rows, dimension, damping, scale):
        theta = nn.Parameter(torch.zeros(dimension, dtype=DOUBLE))
        optimizer = MFAC([theta], lr=1.0, window_size=7, damping=max(damping, 1e-9 * scale**2))
        gradients = scale * normal(rows, dimension, seed=rows)
        stepped(optimizer, theta, gradients[:-1])
        before = theta.detach().clone()
        stepped(optimizer, theta, gradients[-1:])
        along = float((before - theta.detach()) @ gradients[-1])
        assert 0 <= along <= min(rows, 7) * (1 + 1e-6)

    def test_layers_and_groups_share_one_matrix(self):
        flat = nn.Parameter(torch.zeros(12, dtype=DOUBLE))
        parts = [nn.Parameter(torch.zeros(shape, dtype=DOUBLE)) for shape in ((2, 3), (4,), (2,))]
        whole = MFAC([flat], lr=0.1, window_size=3)
        split = MFAC([{"params": parts[:2]}, {"params": parts[2:]}], lr=0.1, window_size=3)
        for gradient in normal(6, 12):
            stepped(whole, flat, [gradient])
            for p, piece in zip(parts, gradient.split([6, 4, 2]), strict=True):
                p.grad = piece.view_as(p).clone()
            split.step()
        assert torch.allclose(torch.cat([p.detach().flatten() for p in parts]), flat.detach(), rtol=1e-12)

    def test_a_parameter_without_a_gradient_counts_as_zeros(self):
        parts = [nn.Parameter(torch.zeros(3, dtype=DOUBLE)) for _ in range(2)]
        optimizer = MFAC(parts, lr=1.0, window_size=4, damping=1e-3)
        gradients = normal(2, 6)
        for p, piece in zip(parts, gradients[0].split(3), strict=True):
            p.grad = piece.clone()
        optimizer.step()
        before = snapshot(nn.ParameterList(parts))
        parts[0].grad, parts[1].grad = gradients[1, :3].clone(), None
        optimizer.step()
        rows = torch.stack([gradients[0], torch.cat([gradients[1, :3], torch.zeros(3, dtype=DOUBLE)])])
        expected = torch.linalg.solve(dense_fisher(rows, 1e-3), rows[1])
        assert torch.allclose(before[0] - parts[0].detach(), expected[:3], rtol=1e-9)
        assert torch.equal(before[1], parts[1].detach())


class TestPrecision:
    @pytest.mark.parametrize(
        ("rows", "dimension", "damping"), list(product((1, 8, 32), (20, 200), (1e-3, 1e-1, 10.0)))
    )
    def test_float64_is_the_dense_inverse(self, rows, dimension, damping):
        gradients = normal(rows, dimension)
        found = gradients.mT @ row_coefficients(gradients @ gradients.mT, rows - 1, damping)
        expected = torch.linalg.solve(dense_fisher(gradients, damping), gradients[-1])
        assert relative(found, expected) < 1e-9

    def test_float32_keeps_its_digits_where_woodburys_formula_has_none(self):
        gradients = normal(32, 300, dtype=torch.float32)
        theta = nn.Parameter(torch.zeros(300))
        optimizer = MFAC([theta], lr=1.0, window_size=32)
        stepped(optimizer, theta, gradients[:-1])
        with torch.no_grad():
            theta.zero_()
        stepped(optimizer, theta, gradients[-1:])
        expected = torch.linalg.solve(dense_fisher(gradients, 1e-5), gradients[-1].double())
        assert relative(-theta.detach(), expected) < 1e-6
        assert relative(naive_woodbury(gradients, gradients[-1], 1e-5), expected) > 1e-3

    def test_a_window_in_half_precision_is_that_of_rounded_gradients(self):
        gradients = normal(6, 5_000, dtype=torch.float32)
        theta = nn.Parameter(torch.zeros(5_000))
        optimizer = MFAC([theta], lr=1.0, window_size=6, damping=1e-2, window_dtype=torch.bfloat16)
        stepped(optimizer, theta, gradients[:-1])
        with torch.no_grad():
            theta.zero_()
        stepped(optimizer, theta, gradients[-1:])
        assert memory(optimizer)["window"].dtype == torch.bfloat16
        rounded = gradients.bfloat16().double()
        coefficients = row_coefficients(rounded @ rounded.mT, 5, 1e-2)
        assert relative(-theta.detach(), rounded.mT @ coefficients) < 1e-5

    def test_the_gram_matrix_of_replaced_rows_is_that_of_the_window(self):
        theta = nn.Parameter(torch.zeros(6_000))
        optimizer = MFAC([theta], window_size=5)
        gradients = normal(13, 6_000, dtype=torch.float32)
        stepped(optimizer, theta, gradients)
        kept = memory(optimizer)
        assert int(kept["step"]) == 13
        expected = torch.stack([gradients[i] for i in (10, 11, 12, 8, 9)])  # a ring: 13 = 2 · 5 + 3
        assert torch.equal(kept["window"], expected)
        assert torch.allclose(kept["gram"], expected.double() @ expected.double().mT, rtol=1e-6, atol=1e-3)


class TestState:
    def test_a_saved_window_is_loaded_as_it_was(self, tmp_path):
        theta, gradients = nn.Parameter(torch.ones(9)), normal(8, 9, dtype=torch.float32)
        settings = {"lr": 0.1, "window_size": 3, "window_dtype": torch.bfloat16}
        optimizer = MFAC([theta], **settings)
        stepped(optimizer, theta, gradients[:5])
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        twin = nn.Parameter(theta.detach().clone())
        other = MFAC([twin], **settings)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for name, value in memory(optimizer).items():
            loaded = memory(other)[name]
            assert loaded.dtype == value.dtype
            assert torch.equal(loaded, value)
            assert loaded.data_ptr() != value.data_ptr()
        stepped(optimizer, theta, gradients[5:])
        stepped(other, twin, gradients[5:])
        assert torch.equal(theta, twin)

    def test_a_window_of_other_parameters_is_refused_and_nothing_changes(self):
        theta, twin = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(5))
        optimizer, other = MFAC([theta], window_size=2), MFAC([twin], window_size=2)
        stepped(optimizer, theta, [torch.ones(4)])
        stepped(other, twin, [torch.ones(5)])
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=r"saved window is \(2, 4\).*need \(2, 5\)"):
            other.load_state_dict(optimizer.state_dict())
        assert torch.equal(memory(other)["window"], before["state"][0]["window"])

    def test_a_state_from_before_the_first_step_is_loaded(self):
        optimizer = MFAC([nn.Parameter(torch.ones(4))])
        optimizer.load_state_dict(MFAC([nn.Parameter(torch.ones(4))], lr=0.5).state_dict())
        assert optimizer.param_groups[0]["lr"] == 0.5

    def test_a_new_group_starts_the_window_anew(self):
        first, second = nn.Parameter(torch.ones(3, dtype=DOUBLE)), nn.Parameter(torch.ones(2, dtype=DOUBLE))
        optimizer = MFAC([first], lr=1.0, window_size=4, damping=1e-3)
        stepped(optimizer, first, normal(3, 3))
        optimizer.add_param_group({"params": [second]})
        before = torch.cat([first.detach(), second.detach()])
        gradient = normal(5)
        first.grad, second.grad = gradient[:3].clone(), gradient[3:].clone()
        optimizer.step()
        moved = before - torch.cat([first.detach(), second.detach()])
        assert torch.allclose(moved, gradient / (1e-3 + gradient.square().sum()), rtol=1e-9)

    def test_a_gradient_that_is_nan_does_not_enter_the_window(self):
        theta = nn.Parameter(torch.ones(3))
        optimizer = MFAC([theta], window_size=2)
        stepped(optimizer, theta, normal(3, 3))
        before = copy.deepcopy(memory(optimizer))
        with pytest.raises(NonFiniteError):
            stepped(optimizer, theta, [torch.tensor([1.0, torch.nan, 0.0])])
        assert all(torch.equal(before[name], value) for name, value in memory(optimizer).items())

    def test_squares_that_overflow_leave_no_trace(self):
        theta = nn.Parameter(torch.ones(5_000))
        optimizer = MFAC([theta], window_size=3)
        stepped(optimizer, theta, normal(2, 5_000))
        before, place = copy.deepcopy(memory(optimizer)), theta.detach().clone()
        with pytest.raises(NonFiniteError, match="squares of the gradients overflow"):
            stepped(optimizer, theta, [torch.full((5_000,), 1e25)])
        assert torch.equal(theta, place)
        assert all(torch.equal(before[name], value) for name, value in memory(optimizer).items())

    def test_damping_beneath_rounding_is_said(self):
        theta = nn.Parameter(torch.zeros(3, dtype=DOUBLE))
        optimizer = MFAC([theta], window_size=8, damping=1e-30)
        with pytest.warns(JitterWarning, match="larger damping"):
            stepped(optimizer, theta, normal(8, 3))
        assert theta.isfinite().all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"window_size": 0}, "MFAC: window_size must be an integer of at least 1, got 0"),
            ({"window_size": 2.5}, "window_size must be an integer"),
            ({"damping": 0.0}, "MFAC: damping must be a finite number above 0, got 0.0"),
            ({"momentum": 1.0}, "momentum must be .* below 1"),
            ({"weight_decay": -1.0}, "weight_decay must be"),
            (
                {"window_dtype": torch.int8},
                "window_dtype must be None or a floating-point dtype, got torch.int8",
            ),
            ({"window_dtype": "half"}, "window_dtype must be None or a floating-point dtype, got 'half'"),
        ],
    )
    def test_settings_out_of_range(self, settings, message):
        with pytest.raises(ValueError, match=message):
            MFAC([nn.Parameter(torch.ones(2))], **settings)

    @pytest.mark.parametrize(
        "settings", [{"window_size": 4}, {"damping": 1.0}, {"window_dtype": torch.float64}]
    )
    def test_what_is_one_for_all_groups_cannot_differ(self, settings):
        optimizer = MFAC([nn.Parameter(torch.ones(2))])
        with pytest.raises(ValueError, match="one for all groups"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **settings})
        assert len(optimizer.param_groups) == 1


class TestUnderOptEx:
    def test_a_drafted_step_is_the_true_one_that_leaves_no_trace(self):
        theta = nn.Parameter(normal(12))
        optimizer = MFAC([theta], lr=0.1, window_size=4, damping=1e-3, momentum=0.5)
        twin = DenseMFAC(theta.detach(), 0.1, 4, 1e-3, momentum=0.5)
        gradients = normal(11, 12, seed=1)
        for number, gradient in enumerate(gradients):
            drafted = number in (0, 2, 7, 8)
            kept = copy.deepcopy(dict(memory(optimizer)))
            if drafted:
                with optimizer.drafting():
                    stepped(optimizer, theta, [gradient])
                now = memory(optimizer)
                assert all(
                    torch.equal(kept[name], now[name]) for name in ("window", "gram", "step") if name in kept
                )
            else:
                stepped(optimizer, theta, [gradient])
            twin.step(gradient, drafted=drafted)
            assert relative(theta.detach(), twin.theta) < 1e-10
        assert int(memory(optimizer)["step"]) == 7

    def test_a_draft_within_a_draft_ends_with_the_outer_one(self):
        theta = nn.Parameter(torch.ones(2))
        optimizer = MFAC([theta])
        stepped(optimizer, theta, [torch.ones(2)])
        with optimizer.drafting():
            with optimizer.drafting():
                pass
            stepped(optimizer, theta, [torch.ones(2)])
        assert int(memory(optimizer)["step"]) == 1
        stepped(optimizer, theta, [torch.ones(2)])
        assert int(memory(optimizer)["step"]) == 2

    def test_no_predicted_gradient_enters_the_window(self):
        # Stride 1: every kept step has a gradient of its own; with tolerance at its default all are corrected
        # to where they are used, so what must hold is their number.
        model = network()
        base = MFAC(model.parameters(), lr=0.01, window_size=32, damping=1e-2)
        optimizer = OptEx(base, parallelism=4, stride=1)
        for _ in optimizer.rounds(regression_batches(12), squared_error(model)):
            pass
        assert int(memory(base)["step"]) == optimizer.steps_taken

    def test_steps_on_predictions_alone_leave_the_window(self):
        model = network()
        base = MFAC(model.parameters(), lr=0.002, window_size=64, damping=1.0)
        optimizer = OptEx(base, parallelism=1, deterministic=True)
        (batch,) = regression_batches(1)
        for _ in optimizer.rounds([batch] * 25, squared_error(model)):
            pass
        assert optimizer.steps_taken > optimizer.batches_drawn  # or there is nothing to see here
        assert int(memory(base)["step"]) < optimizer.steps_taken


class TestStatic:
    @settings(deadline=None, max_examples=30)
    @given(
        rows=st.integers(1, 12),
        dimension=st.integers(1, 30),
        damping=st.sampled_from([1e-3, 1e-1, 10.0]),
        block_size=st.sampled_from([None, 1, 4, 13, 100]),
    )
    def test_is_the_dense_inverse_of_the_blocks(self, rows, dimension, damping, block_size):
        gradients, vector = normal(rows, dimension), normal(dimension, seed=3)
        fisher = dense_fisher(gradients, damping)
        size = block_size or dimension
        places = torch.arange(dimension) // size
        inverse = torch.linalg.inv(torch.where(places[:, None] == places, fisher, 0.0))
        diagonal = inverse_diagonal(gradients, damping, block_size=block_size)
        assert relative(diagonal, inverse.diagonal()) < 1e-9
        assert (
            relative(inverse_product(gradients, vector, damping, block_size=block_size), inverse @ vector)
            < 1e-9
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_is_the_papers_recursion(self, dtype):
        gradients, vector = normal(16, 70, dtype=dtype), normal(70, seed=1)
        twin = Recursion(gradients, 1e-3)
        assert relative(inverse_diagonal(gradients, 1e-3), twin.diagonal()) < 1e-9
        assert relative(inverse_product(gradients, vector, 1e-3), twin.product(vector)) < 1e-9

    def test_pieces_of_long_rows_are_put_together(self, monkeypatch):
        gradients, vector = normal(6, 50), normal(50, seed=1)
        expected = inverse_diagonal(gradients), inverse_product(gradients, vector)
        keep = obs_mask(vector, gradients, 0.5)
        updated = obs_update(vector, gradients, keep)
        monkeypatch.setattr("optex.optimizers.mfac.fisher._SLAB", 7)
        assert torch.allclose(inverse_diagonal(gradients), expected[0], rtol=1e-9)
        assert torch.allclose(inverse_product(gradients, vector), expected[1], rtol=1e-9)
        assert torch.allclose(obs_update(vector, gradients, keep), updated, rtol=1e-9)

    def test_the_least_salient_are_dropped(self):
        gradients, weights = normal(10, 40), normal(40, seed=1)
        inverse = torch.linalg.inv(dense_fisher(gradients, 1e-3))
        saliency = weights.square() / (2 * inverse.diagonal())
        keep = obs_mask(weights, gradients, 0.3, 1e-3)
        assert int((~keep).sum()) == 12
        assert saliency[~keep].max() <= saliency[keep].min()
        assert obs_mask(weights, gradients, 0.0).all()
        assert not obs_mask(weights, gradients, 1.0).any()

    @pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
    def test_the_kept_weights_make_up_for_the_dropped_ones_as_well_as_they_can(self, share):
        gradients, weights = normal(10, 40), normal(40, seed=1)
        fisher = dense_fisher(gradients, 1e-3)
        keep = obs_mask(weights, gradients, share, 1e-3)
        found = obs_update(weights, gradients, keep, 1e-3)
        expected = weights.clone()
        if keep.any():
            system = fisher[keep][:, keep]
            expected[keep] += torch.linalg.solve(system, fisher[keep][:, ~keep] @ weights[~keep])
        expected[~keep] = 0
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)

    def test_one_weight_dropped_is_optimal_brain_surgeons_formula(self):
        gradients, weights = normal(10, 40), normal(40, seed=1)
        inverse = torch.linalg.inv(dense_fisher(gradients, 1e-3))
        keep = torch.ones(40, dtype=torch.bool)
        keep[7] = False
        expected = weights - inverse[:, 7] * weights[7] / inverse[7, 7]
        expected[7] = 0
        for together in (True, False):
            found = obs_update(weights, gradients, keep, 1e-3, together=together)
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
        change = expected - weights
        fisher = dense_fisher(gradients, 1e-3)
        assert float(change @ fisher @ change / 2) == pytest.approx(
            float(weights[7] ** 2 / (2 * inverse[7, 7])), rel=1e-9
        )

    @pytest.mark.parametrize("together", [True, False])
    def test_blocks_make_up_for_their_own_alone(self, together):
        gradients, weights = normal(5, 24), normal(24, seed=1)
        keep = normal(24, seed=2) > 0
        found = obs_update(weights, gradients, keep, block_size=8, together=together)
        parts = [
            obs_update(weights[i : i + 8], gradients[:, i : i + 8], keep[i : i + 8], together=together)
            for i in (0, 8, 16)
        ]
        assert torch.equal(found, torch.cat(parts))

    def test_weights_come_back_in_their_own_precision(self):
        gradients, weights = normal(5, 24), normal(24, seed=1, dtype=torch.float32)
        keep = obs_mask(weights, gradients, 0.5)
        assert obs_update(weights, gradients, keep).dtype == torch.float32

    def test_rows_are_the_gradients_of_the_batches(self):
        model, batches = network(), regression_batches(3)
        objective = squared_error(model)
        unused = nn.Parameter(torch.ones(2, dtype=DOUBLE))
        rows = gradient_rows([*model.parameters(), unused], objective, batches, dtype=torch.float32)
        assert rows.dtype == torch.float32
        assert all(p.grad is None for p in model.parameters())
        for row, batch in zip(rows, batches, strict=True):
            model.zero_grad()
            objective(batch).backward()
            expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            assert torch.equal(row[:-2], expected.float())
            assert not row[-2:].any()

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: inverse_diagonal(torch.ones(3)), "inverse_diagonal: rows must be a matrix"),
            (lambda: inverse_diagonal(torch.ones(0, 3)), "rows must be a matrix"),
            (lambda: inverse_diagonal(torch.ones(2, 3, dtype=torch.int64)), "rows must be a matrix"),
            (lambda: inverse_diagonal(torch.full((2, 3), torch.nan)), "rows hold numbers that are not finite"),
            (lambda: inverse_diagonal(torch.ones(2, 3), 0.0), "damping must be a finite number above 0"),
            (lambda: inverse_diagonal(torch.ones(2, 3), block_size=0), "block_size must be an integer"),
            (lambda: inverse_product(torch.ones(2, 3), torch.ones(2)), "vector must be .* of 3 numbers"),
            (lambda: obs_mask(torch.ones(2), torch.ones(2, 3), 0.5), "weights must be .* of 3 numbers"),
            (lambda: obs_mask(torch.ones(3), torch.ones(2, 3), 1.5), "sparsity must be .* at most 1, got 1.5"),
            (
                lambda: obs_update(torch.ones(3), torch.ones(2, 3), torch.ones(3)),
                "keep must be a boolean tensor",
            ),
            (lambda: gradient_rows([], torch.sum, [1]), "there is no parameter"),
            (lambda: gradient_rows([nn.Parameter(torch.ones(1))], torch.sum, []), "there is no batch"),
        ],
    )
    def test_arguments_out_of_range(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()

    def test_a_batch_without_a_finite_gradient_is_named(self):
        weight = nn.Parameter(torch.ones(1))
        batches = [torch.ones(1), torch.full((1,), torch.inf)]
        with pytest.raises(NonFiniteError, match="batch 1 is not finite"):
            gradient_rows([weight], lambda x: (weight * x).sum(), batches)


def test_two_runs_under_optex_are_one_to_the_bit():
    # A round takes the window back from a snapshot; whoever breaks that breaks the next run.
    ends = []
    for _ in range(2):
        model = network()
        optimizer = OptEx(MFAC(model.parameters(), lr=0.01, window_size=6, damping=1e-2), parallelism=3)
        for _ in optimizer.rounds(regression_batches(18), squared_error(model)):
            pass
        ends.append(snapshot(model))
    assert same(*ends)


def test_full_batches_want_more_damping():
    # Gradients that differ by little: what they differ by is divided by its own square.
    (batch,), losses = regression_batches(1, size=64), {1e-5: [], 1e-2: []}
    for damping, found in losses.items():
        model = network()
        optimizer = MFAC(model.parameters(), lr=0.01, window_size=16, damping=damping)
        for _ in range(100):
            optimizer.zero_grad()
            loss = squared_error(model)(batch)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    published, damped = losses.values()
    assert max(published) > 1.2 * published[0]
    assert max(damped) == damped[0]
    assert damped[-1] < 0.2 * damped[0]
