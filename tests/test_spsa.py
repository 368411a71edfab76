"""SPSA and MeZO: against a slow twin, closed forms, and what a user may get wrong."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import optex
from optex.optimizers.mezo.directions import direction, fresh_seed
from optex.stepping import bases
from tests.models import network, regression_batches, same, snapshot, squared_error
from tests.references.spsa import Bowl, estimate, mezo_step

HESSIAN = torch.diag(torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64))


class Loss(nn.Module):
    """A network with its loss, dropout between its layers."""

    def __init__(self, dropout=0.0, dtype=torch.float64):
        super().__init__()
        self.network = network(dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch):
        x, y = batch
        return (self.network[2](self.dropout(self.network[1](self.network[0](x)))) - y).square().mean()


def parameter(*values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def bowl(**options):
    parameters = [parameter(1.0, -2.0), parameter(3.0, 0.5)]
    return parameters, optex.SPSASource(Bowl(HESSIAN, parameters), parameters, **options)


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def exact(parameters):
    return HESSIAN @ flat(parameters)


class TestDirections:
    def test_depend_on_every_number_and_on_nothing_else(self):
        like = torch.zeros(50)
        before = torch.get_rng_state()
        first = direction(0, 0, 0, like)
        torch.manual_seed(9)
        assert torch.equal(first, direction(0, 0, 0, like))
        torch.set_rng_state(before)
        others = [direction(*key, like) for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1))]
        for other in others:
            assert abs(float(first @ other)) / 50 < 0.6
        assert torch.equal(before, torch.get_rng_state())

    def test_no_two_of_a_long_run_are_the_same(self):
        like = torch.zeros(2, dtype=torch.float64)
        rows = {
            tuple(direction(seed, query, place, like).tolist())
            for seed in range(12)
            for query in range(12)
            for place in range(12)
        }
        assert len(rows) == 12**3

    def test_are_standard_normal(self):
        z = torch.cat([direction(seed, 0, 0, torch.zeros(1000)) for seed in range(40)])
        assert abs(float(z.mean())) < 0.02
        assert abs(float(z.var()) - 1) < 0.03


class TestSPSASource:
    @pytest.mark.parametrize("queries", [1, 2, 5])
    def test_is_the_twin(self, queries):
        model = Loss()
        parameters = list(model.parameters())
        source = optex.SPSASource(model, parameters, 1e-3, queries)
        (batch,) = regression_batches(1)
        torch.manual_seed(1)
        seed = fresh_seed()
        torch.manual_seed(1)
        loss, noise = source.gradient(batch)
        gradient, variance, mean = estimate(lambda: model(batch), parameters, 1e-3, seed, queries)
        torch.testing.assert_close(flat([p.grad for p in parameters]), gradient, rtol=1e-9, atol=1e-12)
        assert float(loss) == pytest.approx(mean, rel=1e-12)
        assert (noise is None) == (variance is None)
        if noise is not None:
            assert float(noise) == pytest.approx(variance, rel=1e-9)
        assert source.evaluations == 2 * queries

    def test_is_exact_along_its_direction_on_a_quadratic(self):
        parameters, source = bowl(epsilon=0.3)
        torch.manual_seed(1)
        seed = fresh_seed()
        torch.manual_seed(1)
        source.gradient(None)
        z = flat([direction(seed, 0, place, p) for place, p in enumerate(parameters)])
        # Central differences of a quadratic have no error, however wide they are: ĝ = z zᵀ ∇L.
        torch.testing.assert_close(flat([p.grad for p in parameters]), z * (z @ exact(parameters)))

    def test_the_objective_may_answer_a_plain_number(self):
        parameters, source = bowl()
        answers = []
        for objective in (source.objective, lambda batch: float(source.objective(batch))):
            torch.manual_seed(0)
            loss, _ = optex.SPSASource(objective, parameters).gradient(None)
            answers.append((loss, flat([p.grad for p in parameters])))
        assert answers[0][1].count_nonzero() == 4
        assert all(torch.equal(left, right) for left, right in zip(*answers, strict=True))

    def test_the_noise_it_tells_is_the_noise_it_has(self):
        parameters, source = bowl(queries=8)
        truth, errors, told = exact(parameters), [], []
        for seed in range(400):
            torch.manual_seed(seed)
            _, noise = source.gradient(None)
            assert noise is not None
            told.append(float(noise))
            errors.append(float((flat([p.grad for p in parameters]) - truth).square().mean()))
        formula = 5 * float(truth @ truth) / 8 / 4
        assert sum(told) / 400 == pytest.approx(formula, rel=0.1)
        assert sum(errors) / 400 == pytest.approx(formula, rel=0.1)

    def test_the_cosine_is_that_of_a_random_subspace(self):
        model = Loss()
        parameters, (batch,) = list(model.parameters()), regression_batches(1)
        model(batch).backward()
        truth = flat([p.grad for p in parameters])
        torch.manual_seed(0)
        optex.SPSASource(model, parameters, 1e-4, 2000).gradient(batch)
        found = flat([p.grad for p in parameters])
        dimension = len(truth)
        cosine = float(found @ truth / found.norm() / truth.norm())
        assert cosine == pytest.approx(1 / math.sqrt(1 + (dimension + 1) / 2000), abs=0.01)

    @pytest.mark.parametrize("chunk", [None, 3])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_at_once_is_in_turn(self, chunk, dropout):
        model = Loss(dropout)
        parameters, (batch,) = list(model.parameters()), regression_batches(1)
        answers = []
        for options in ({}, {"vectorized": True, "chunk": chunk}):
            torch.manual_seed(2)
            source = optex.SPSASource(model, parameters, 1e-3, 4, **options)
            loss, noise = source.gradient(batch)
            answers.append((loss, noise, flat([p.grad for p in parameters])))
        for left, right in zip(*answers, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)

    def test_both_passes_draw_the_same_dropout(self):
        # With masks of their own the difference of the losses would be divided by 2ε = 2e-6.
        model = Loss(0.5)
        parameters, (batch,) = list(model.parameters()), regression_batches(1)
        torch.manual_seed(0)
        optex.SPSASource(model, parameters, 1e-6, 3).gradient(batch)
        assert float(flat([p.grad for p in parameters]).norm()) < 1e3

    @pytest.mark.parametrize("vectorized", [False, True])
    def test_a_loss_that_is_not_finite_is_named_and_nothing_moves(self, vectorized):
        model = Loss()
        parameters, ((x, y),) = list(model.parameters()), regression_batches(1)
        before = snapshot(model)
        source = optex.SPSASource(model, parameters, queries=2, vectorized=vectorized)
        with pytest.raises(
            optex.NonFiniteError, match=r"loss is nan ahead along direction 0; parameters are as"
        ):
            source.gradient((x * math.nan, y))
        assert same(before, snapshot(model))
        assert all(p.grad is None for p in parameters)

    def test_an_error_of_the_objective_passes_and_nothing_moves(self):
        x = parameter(1.0, 2.0)

        def broken(_):
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            optex.SPSASource(broken, [x]).gradient(None)
        assert x.tolist() == [1.0, 2.0]

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "match"),
        [
            ((3,), {}, TypeError, "objective must be callable, got int"),
            ((len,), {"epsilon": 0.0}, ValueError, "epsilon must be a finite number above 0, got 0.0"),
            ((len,), {"epsilon": -1.0}, ValueError, "epsilon must be"),
            ((len,), {"epsilon": math.nan}, ValueError, "epsilon must be"),
            ((len,), {"queries": 0}, ValueError, "queries must be an integer of at least 1, got 0"),
            ((len,), {"chunk": 0}, ValueError, "chunk must be"),
            ((len,), {"vectorized": True}, TypeError, "needs the torch.nn.Module"),
            ((nn.Linear(1, 1),), {"vectorized": True}, TypeError, "is not the objective's own"),
            ((len, torch.ones(2)), {}, TypeError, r"pass \[tensor\]"),
            ((len, [torch.arange(2)]), {}, TypeError, "got a tensor of torch.int64"),
            ((len, ["x"]), {}, TypeError, "got str"),
            ((len, []), {}, ValueError, "hold no number"),
        ],
    )
    def test_refuses(self, arguments, options, error, match):
        objective, parameters = arguments if len(arguments) > 1 else (*arguments, [parameter(1.0)])
        with pytest.raises(error, match=match):
            optex.SPSASource(objective, parameters, **options)

    @pytest.mark.parametrize(
        ("value", "error", "match"),
        [
            (torch.ones(2), ValueError, "real scalar, got shape"),
            (None, TypeError, "must be a scalar, got NoneType"),
            (torch.tensor(1j), ValueError, "complex64"),
        ],
    )
    def test_refuses_what_is_no_loss(self, value, error, match):
        x = parameter(1.0)
        with pytest.raises(error, match=match):
            optex.SPSASource(lambda _: value, [x]).gradient(None)
        assert x.tolist() == [1.0]


class TestMeZO:
    @pytest.mark.parametrize("exactly", [False, True])
    @pytest.mark.parametrize("queries", [1, 3])
    def test_is_the_twin_in_lock_step(self, exactly, queries):
        model, twin = network(), network()
        optimizer = optex.optimizers.MeZO(
            model.parameters(), lr=0.02, weight_decay=0.1, queries=queries, exact=exactly
        )
        for seed, batch in enumerate(regression_batches(30)):
            loss = optimizer.step(lambda batch=batch: squared_error(model)(batch), seed=seed)
            settings = {"lr": 0.02, "epsilon": 1e-3, "weight_decay": 0.1, "seed": seed, "queries": queries}
            mean = mezo_step(
                lambda batch=batch: squared_error(twin)(batch), list(twin.parameters()), **settings
            )
            assert float(loss) == pytest.approx(mean, rel=1e-9)
            for left, right in zip(snapshot(model), snapshot(twin), strict=True):
                torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12)

    def test_going_up_is_going_down_the_negative(self):
        up, down, (batch,) = network(), network(), regression_batches(1)
        climbing = optex.optimizers.MeZO(up.parameters(), lr=0.02, weight_decay=0.1, maximize=True)
        loss = climbing.step(lambda: squared_error(up)(batch), seed=3)
        descending = optex.optimizers.MeZO(down.parameters(), lr=0.02, weight_decay=0.1)
        negative = descending.step(lambda: -squared_error(down)(batch), seed=3)
        assert float(loss) == -float(negative)
        for left, right in zip(snapshot(up), snapshot(down), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)

    def test_the_loss_falls(self):
        model, (batch,) = network(), regression_batches(1)
        torch.manual_seed(0)
        optimizer = optex.optimizers.MeZO(model.parameters(), lr=0.01, queries=4)
        losses = [optimizer.step(lambda: squared_error(model)(batch)) for _ in range(150)]
        assert losses[-1] < 0.7 * losses[0]

    def test_seed_0_is_a_seed_and_draws_nothing(self):
        ends = []
        for noise in (1, 2):
            model, (batch,) = network(), regression_batches(1)
            torch.manual_seed(noise)
            before = torch.get_rng_state()
            optimizer = optex.optimizers.MeZO(model.parameters(), lr=0.01)
            optimizer.step(lambda: squared_error(model)(batch), seed=0)  # noqa: B023
            assert torch.equal(before, torch.get_rng_state())
            assert optimizer.log[0][0] == 0
            ends.append(snapshot(model))
        assert same(*ends)

    def test_seeds_come_from_torchs_global_generator(self):
        seeds = []
        for start in (5, 5, 6):
            torch.manual_seed(start)
            x = parameter(1.0)
            optimizer = optex.optimizers.MeZO([x])
            for _ in range(2):
                optimizer.step(lambda: x.sum())  # noqa: B023
            seeds.append([seed for seed, _, _ in optimizer.log])
        assert seeds[0] == seeds[1] != seeds[2]
        assert seeds[0][0] != seeds[0][1]

    def test_what_drifts_in_float32_is_below_a_millionth(self):
        torch.manual_seed(0)
        x = nn.Parameter(torch.randn(10_000))
        before = x.detach().clone()
        optimizer = optex.optimizers.MeZO([x], lr=0.0)
        worst = 0.0
        for _ in range(20):
            optimizer.step(lambda: x.square().sum())
            worst = max(worst, float((x.detach() - before).abs().max()))
            before = x.detach().clone()
        assert 0 < worst <= 1e-6

    def test_a_copy_brings_back_every_bit_even_in_bfloat16(self):
        torch.manual_seed(0)
        x = nn.Parameter(torch.randn(100, dtype=torch.bfloat16))
        before = x.detach().clone()
        optex.optimizers.MeZO([x], lr=0.0, exact=True, queries=3).step(lambda: x.float().square().sum())
        assert torch.equal(x, before)

    @pytest.mark.parametrize("exactly", [False, True])
    def test_a_run_is_walked_again_from_its_log(self, exactly):
        def groups(model):
            return [
                {"params": list(model[0].parameters()), "weight_decay": 0.1},
                {"params": list(model[2].parameters()), "lr": 0.003, "maximize": True},
            ]

        model = network(dtype=torch.float32)
        start = copy.deepcopy(model)
        optimizer = optex.optimizers.MeZO(groups(model), lr=0.01, queries=2, exact=exactly)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for batch in regression_batches(12, dtype=torch.float32):
            optimizer.step(lambda batch=batch: squared_error(model)(batch))
            scheduler.step()
        optex.optimizers.MeZO(groups(start), lr=7.0, queries=2, exact=exactly).replay(optimizer.log)
        assert same(snapshot(model), snapshot(start))

    def test_a_log_of_other_groups_is_refused(self):
        x = parameter(1.0)
        with pytest.raises(ValueError, match="rates for 2 groups, and there are 1"):
            optex.optimizers.MeZO([x]).replay([(0, [1.0], [0.1, 0.1])])
        assert x.tolist() == [1.0]

    def test_the_log_keeps_its_last_steps(self):
        x = parameter(1.0)
        optimizer = optex.optimizers.MeZO([x], log_length=3)
        for seed in range(5):
            optimizer.step(lambda: x.sum(), seed=seed)
        assert [seed for seed, _, _ in optimizer.log] == [2, 3, 4]
        assert optimizer.steps_taken == 5

    def test_goes_on_from_its_state_and_from_copies(self, tmp_path):
        model, (batch,) = network(), regression_batches(1)
        optimizer = optex.optimizers.MeZO(model.parameters(), lr=0.01)
        step = lambda net, own, seed: own.step(lambda: squared_error(net)(batch), seed=seed)  # noqa: E731
        step(model, optimizer, 1)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        loaded = network(seed=1)
        loaded.load_state_dict(model.state_dict())
        other = optex.optimizers.MeZO(loaded.parameters(), lr=0.5)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        shared = optex.optimizers.MeZO(network().parameters())
        shared.load_state_dict(optimizer.state_dict())
        pairs = [
            (loaded, other),
            copy.deepcopy((model, optimizer)),
            pickle.loads(pickle.dumps((model, optimizer))),
        ]
        for net, own in (*pairs, (model, optimizer)):
            step(net, own, 2)
            assert own.steps_taken == 2
            assert len(own.log) == 2
        for net, _ in pairs:
            assert same(snapshot(net), snapshot(model))
        assert len(shared.log) == 1

    def test_a_state_without_a_log_is_refused(self):
        x = parameter(1.0)
        with pytest.raises(ValueError, match="has no log"):
            optex.optimizers.MeZO([x]).load_state_dict(torch.optim.SGD([x]).state_dict())

    def test_frozen_parameters_stay(self):
        model, (batch,) = network(), regression_batches(1)
        first = model[0]
        assert isinstance(first, nn.Linear)
        first.weight.requires_grad_(False)
        frozen = first.weight.clone()
        optex.optimizers.MeZO(model.parameters(), lr=0.1).step(lambda: squared_error(model)(batch))
        assert torch.equal(frozen, first.weight)

    @pytest.mark.parametrize("exactly", [False, True])
    @pytest.mark.parametrize("bad", [1, 2, 3, 4])
    def test_a_loss_that_is_not_finite_is_named_and_nothing_is_stepped(self, exactly, bad):
        model, (batch,) = network(), regression_batches(1)
        before, calls = snapshot(model), []
        optimizer = optex.optimizers.MeZO(model.parameters(), lr=0.1, queries=2, exact=exactly)

        def closure():
            calls.append(1)
            return squared_error(model)(batch) * (math.inf if len(calls) == bad else 1)

        generator = torch.get_rng_state()
        side, query = ("ahead", "behind")[(bad - 1) % 2], (bad - 1) // 2
        with pytest.raises(optex.NonFiniteError, match=f"MeZO: the loss is inf {side} along direction {query}"):
            optimizer.step(closure)
        for left, right in zip(before, snapshot(model), strict=True):
            assert torch.equal(left, right) if exactly else torch.allclose(left, right, rtol=0, atol=1e-15)
        assert optimizer.log == []
        assert torch.equal(generator, torch.get_rng_state())

    def test_the_closure_leaves_no_tape(self):
        x, seen = parameter(1.0), []
        optex.optimizers.MeZO([x]).step(lambda: seen.append((x * 2).requires_grad) or x.sum())
        assert seen == [False, False]

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"lr": -1.0}, "lr must be"),
            ({"lr": math.nan}, "lr must be"),
            ({"epsilon": 0.0}, "epsilon must be a finite number above 0"),
            ({"epsilon": -1e-3}, "epsilon must be"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
            ({"queries": 0}, "queries must be"),
            ({"log_length": -1}, "log_length must be"),
        ],
    )
    def test_refuses(self, options, match):
        with pytest.raises(ValueError, match=match):
            optex.optimizers.MeZO([parameter(1.0)], **options)

    def test_refuses_what_no_step_can_be_of(self):
        x = parameter(1.0)
        with pytest.raises(TypeError, match="complex64"):
            optex.optimizers.MeZO([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
        with pytest.raises(ValueError, match="epsilon is one for all groups"):
            optex.optimizers.MeZO([{"params": [x], "epsilon": 0.1}])
        with pytest.raises(TypeError, match="needs a closure"):
            optex.optimizers.MeZO([x]).step()

    @pytest.mark.parametrize("seed", [-1, 1.5, True, 2**64])
    def test_refuses_a_seed_that_is_no_whole_number_of_64_bits(self, seed):
        x = parameter(1.0)
        with pytest.raises(ValueError, match="seed must be an integer"):
            optex.optimizers.MeZO([x]).step(lambda: x.sum(), seed=seed)

    def test_cannot_be_the_base_of_optex(self):
        assert optex.optimizers.MeZO in bases.REFUSED
        with pytest.raises(TypeError, match="MeZO cannot be the base: it evaluates its closure twice"):
            optex.OptEx(optex.optimizers.MeZO([parameter(1.0)]))
