"""ScaleBiO: the joint field against its twin, weights, absent sources, LISA's layers, and the front door."""

import copy
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import optex
from optex import (
    LayerSampler,
    MinimaxPenaltySource,
    NonFiniteError,
    NonFiniteWarning,
    OptEx,
    SourceWeights,
    reweight_sources,
)
from optex.sources.scalebio import NumberedBatch
from optex.studies.problems import SourceMixture
from tests.gradients import grad_of
from tests.models import same
from tests.references import scalebio

PROBLEM = scalebio.Regression()
CLEAN = ("clean-1", "clean-2")


def made(**options):
    """A source at three different weights and two different lines."""
    weights = SourceWeights(3, dtype=torch.float64)
    with torch.no_grad():
        weights.logits.copy_(torch.tensor([0.3, -0.2, 0.6]))
    options = {"deterministic": True, **options}
    lower = options.pop("training", PROBLEM.lower)
    upper = options.pop("validation", PROBLEM.upper)
    model, rival = options.pop("model", scalebio.line(seed=1)), options.pop("rival", scalebio.line(seed=2))
    return MinimaxPenaltySource(upper, lower, weights, model, rival, **options)


def answer(source, batch=None) -> tuple[torch.Tensor, list[Any]]:
    for p in source.parameters:
        p.grad = None
    loss, noise = source.gradient(batch)
    assert noise is None
    return loss, [None if p.grad is None else p.grad.clone() for p in source.parameters]


class TestField:
    @pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0, 1e4])
    def test_it_is_the_twins(self, alpha):
        source = made(alpha=alpha)
        loss, found = answer(source)
        value, expected = scalebio.field(
            PROBLEM.losses(), source.weights.logits, source.model, source.rival, alpha
        )
        torch.testing.assert_close(loss, value)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

    def test_losses_of_samples_are_those_of_sources(self):
        one, other = answer(made()), answer(made(training=PROBLEM.samples))
        torch.testing.assert_close(one, other)

    def test_descent_is_the_twins_in_lock_step(self):
        logits, model, rival = scalebio.descent(
            PROBLEM.losses(), 3, scalebio.line(), 10.0, lr=0.05, lr_weights=0.2, steps=40
        )
        weights, network = SourceWeights(3, dtype=torch.float64), scalebio.line()
        source = MinimaxPenaltySource(PROBLEM.upper, PROBLEM.lower, weights, network, deterministic=True)
        base = torch.optim.SGD(source.param_groups(lr=0.05, lr_weights=0.2, weight_decay=0.0))
        for _ in range(40):
            source.gradient(None)
            base.step()
        torch.testing.assert_close(weights.logits.detach(), logits)
        torch.testing.assert_close(source.model.weight, model.weight)
        torch.testing.assert_close(source.rival.weight, rival.weight)

    def test_equal_networks_leave_the_weights(self):
        source = made(rival=None)
        _, found = answer(source)
        assert not found[0].any()

    def test_the_scale_is_that_of_both_networks(self):
        one, other = answer(made(alpha=5.0)), answer(made(alpha=5.0, scale=1.0))
        torch.testing.assert_close(one[1][0], other[1][0])
        for a, b in zip(one[1][1:], other[1][1:], strict=True):
            torch.testing.assert_close(5 * a, b)

    def test_another_alpha_is_over_the_same_parameters_and_scale(self):
        source = made(alpha=5.0)
        other = source.at(50.0)
        assert (source.alpha, other.alpha, other.scale) == (5.0, 50.0, 0.2)
        assert all(p is q for p, q in zip(source.parameters, other.parameters, strict=True))
        with pytest.raises(ValueError, match="alpha must be positive"):
            source.at(0.0)

    def test_groups_have_the_published_rates(self):
        source = made()
        weights, networks = source.param_groups()
        assert (weights["lr"], weights["weight_decay"]) == (1e-2, 0.0)
        assert (networks["lr"], networks["weight_decay"]) == (1e-5, 5e-4)
        assert weights["params"] + networks["params"] == source.parameters

    def test_dropout_is_drawn_alike_for_both_networks(self):
        network = nn.Sequential(scalebio.line(), nn.Dropout(0.5))
        source = made(model=network, rival=None, deterministic=False)
        torch.manual_seed(0)
        _, found = answer(source)
        assert not found[0].any()
        torch.testing.assert_close(torch.rand(1), torch.rand(1, generator=_after_two(network)), rtol=0, atol=0)

    def test_frozen_parameters_of_the_caller_get_no_gradient(self):
        network = scalebio.Tower()
        network.enter.requires_grad_(False)
        source = made(model=network, rival=None)
        source.gradient(None)
        assert network.enter.weight.grad is None
        assert network.leave.weight.grad is not None

    def test_a_parameter_that_is_not_used_gets_zero(self):
        network = scalebio.line()
        network.idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
        source = made(model=network, rival=None)
        source.gradient(None)
        assert not grad_of(network.get_parameter("idle")).any()


def _after_two(network):
    """Where the global generator stands after L1's and L2's dropout of one network."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        PROBLEM.upper(network, None)
        PROBLEM.lower(network, None)
        generator = torch.Generator()
        generator.set_state(torch.get_rng_state())
    finally:
        torch.set_rng_state(state)
    return generator


class TestAbsentSources:
    @staticmethod
    def without(absent):
        def samples(network, batch):
            losses, sources = PROBLEM.samples(network, batch)
            kept = sources != absent
            return losses[kept], sources[kept]

        return samples

    @pytest.mark.parametrize("absent", range(3))
    def test_it_is_the_twins_over_those_that_are_there(self, absent):
        source = made(training=self.without(absent))
        loss, found = answer(source)

        def training(network, batch):
            losses = list(PROBLEM.lower(network, batch))
            return [None if k == absent else value for k, value in enumerate(losses)]

        value, expected = scalebio.field(
            (PROBLEM.upper, training), source.weights.logits, source.model, source.rival, 10.0
        )
        torch.testing.assert_close(loss, value)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)

    def test_its_logit_is_left_where_a_loss_of_0_would_move_it(self):
        source = made(training=self.without(1))
        _, found = answer(source)
        assert found[0][1] == 0
        q = source.weights().detach()
        excess = (PROBLEM.lower(source.model, None) - PROBLEM.lower(source.rival, None)).detach()
        excess[1] = 0
        assert (q * (excess - q @ excess))[1].abs() > 1e-3

    def test_a_batch_without_samples_is_refused(self):
        nothing = (torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
        with pytest.raises(ValueError, match="no samples of any source"):
            answer(made(training=lambda network, batch: nothing))


class TestHypergradient:
    def test_the_bias_falls_as_one_over_alpha(self):
        errors = []
        for alpha in (1.0, 10.0, 100.0, 1e3, 1e4):
            problem = SourceMixture(0, alpha=alpha)
            problem.settle()
            source = problem.source()
            source.gradient(None)
            assert max(float(grad_of(p).abs().max()) for p in source.parameters[1:]) < 1e-12
            exact = problem.hypergradient()
            errors.append(float((grad_of(problem.weights.logits) - exact).norm() / exact.norm()))
        known = (0.555, 0.113, 0.0126, 0.00128, 0.00013)
        assert all(1 / 2 < error / value < 2 for error, value in zip(errors, known, strict=True))
        assert all(8 < a / b < 12 for a, b in itertools.pairwise(errors[1:]))

    def test_the_exact_one_is_that_of_finite_differences(self):
        problem, slopes = SourceMixture(1), []
        problem.settle()
        exact = problem.hypergradient()
        for place in range(4):
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    problem.weights.logits[place] += sign * 1e-5
                    problem.settle()
                    ends.append(problem.evaluate())
                    problem.weights.logits[place] -= sign * 1e-5
            slopes.append((ends[0] - ends[1]) / 2e-5)
        torch.testing.assert_close(torch.tensor(slopes, dtype=torch.float64), exact, rtol=1e-6, atol=1e-9)

    @pytest.mark.parametrize("alpha", [1.0, 10.0, 100.0])
    def test_clean_sources_get_the_weight(self, alpha):
        problem = SourceMixture(0, alpha=alpha)
        source = problem.source()
        base = torch.optim.Adam(source.param_groups(lr=0.05, lr_weights=0.05, weight_decay=0.0))
        for _ in range(200):
            source.gradient(None)
            base.step()
        assert problem.weights.mass(CLEAN) >= 0.95

    def test_under_optex_it_takes_a_fraction_of_the_rounds(self):
        problem = SourceMixture(0)
        source = problem.source()
        base = torch.optim.Adam(source.param_groups(lr=0.05, lr_weights=0.05, weight_decay=0.0))
        work = OptEx(base, parallelism=4).rounds(itertools.repeat(None), source)
        for _ in itertools.islice(work, 12):
            pass
        assert problem.weights.mass(CLEAN) >= 0.95


class TestWeights:
    def test_they_are_a_softmax_with_names(self):
        weights = SourceWeights(["a", "b", "c"], dtype=torch.float64)
        assert weights.by_name() == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
        with torch.no_grad():
            weights.logits[2] = 1.0
        torch.testing.assert_close(weights(), torch.softmax(weights.logits, 0))
        assert weights.mass(["a", "c"]) == pytest.approx(1 - weights.by_name()["b"])
        assert "c=" in repr(weights)
        with pytest.raises(ValueError, match="no source 'd'"):
            weights.mass(["d"])

    @pytest.mark.parametrize("sources", [1, 0, -3, ["one"], []])
    def test_fewer_than_two_are_refused(self, sources):
        with pytest.raises(ValueError, match="at least 2 sources"):
            SourceWeights(sources)

    @pytest.mark.parametrize("sources", [True, 2.0, "ab", None, ["a", 3]])
    def test_what_is_no_list_of_names_is_refused(self, sources):
        with pytest.raises(TypeError, match="SourceWeights"):
            SourceWeights(sources)

    def test_two_of_one_name_are_refused(self):
        with pytest.raises(ValueError, match="one name"):
            SourceWeights(["a", "a"])

    @pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
    def test_logits_that_are_no_floats_are_refused(self, dtype):
        with pytest.raises(TypeError, match=f"SourceWeights: dtype must be floating-point, got {dtype}"):
            SourceWeights(2, dtype=dtype)


class TestBadInput:
    @pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf"), True, "10"])
    def test_alpha(self, alpha):
        with pytest.raises(ValueError, match="MinimaxPenaltySource: alpha must be positive"):
            made(alpha=alpha)

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"scale": 0.0}, ValueError, "scale must be positive"),
            ({"validation": 3}, TypeError, "validation must be a function"),
            ({"training": None}, TypeError, "training must be a function"),
            ({"model": "net"}, TypeError, "model must be a torch.nn.Module"),
            ({"model": nn.ReLU()}, ValueError, "no parameter"),
            ({"rival": 1}, TypeError, "rival must be"),
            ({"rival": scalebio.Tower()}, ValueError, "name for name"),
            ({"layers": 2}, TypeError, "layers must be a LayerSampler"),
            ({"layers": LayerSampler("blocks")}, ValueError, "'blocks' is not in Linear"),
        ],
    )
    def test_constructor(self, options, error, text):
        with pytest.raises(error, match=text):
            made(**options)

    def test_networks_that_share_parameters(self):
        network = scalebio.line()
        with pytest.raises(ValueError, match="shares parameters"):
            made(model=network, rival=network)

    def test_weights_that_are_a_tensor(self):
        weights: Any = torch.zeros(3)
        with pytest.raises(TypeError, match="weights must be a SourceWeights"):
            MinimaxPenaltySource(PROBLEM.upper, PROBLEM.lower, weights, scalebio.line())

    @pytest.mark.parametrize(
        ("training", "error", "text"),
        [
            (lambda n, b: 1.0, TypeError, "tensor of 3 losses"),
            (lambda n, b: PROBLEM.lower(n, b)[:2], ValueError, r"3 real losses.*\(2,\)"),
            (lambda n, b: PROBLEM.lower(n, b).detach(), ValueError, "training does not depend"),
            (lambda n, b: (PROBLEM.lower(n, b),), TypeError, "a pair"),
            (lambda n, b: (PROBLEM.lower(n, b), torch.arange(2)), ValueError, "whole numbers"),
            (lambda n, b: (PROBLEM.lower(n, b), torch.tensor([0, 1, 3])), ValueError, "from 0 to 2"),
        ],
    )
    def test_training(self, training, error, text):
        with pytest.raises(error, match=text):
            answer(made(training=training))

    @pytest.mark.parametrize(
        ("validation", "error", "text"),
        [
            (lambda n, b: None, TypeError, "validation: returned None"),
            (lambda n, b: n.weight, ValueError, "validation: the loss must be a scalar"),
            (lambda n, b: torch.tensor(1.0), ValueError, "validation does not depend"),
        ],
    )
    def test_validation(self, validation, error, text):
        with pytest.raises(error, match=text):
            answer(made(validation=validation))

    def test_training_that_draws_its_sources_is_refused(self):
        calls = itertools.count()

        def training(network, batch):
            losses, sources = PROBLEM.samples(network, batch)
            kept = sources != next(calls) % 2
            return losses[kept], sources[kept]

        with pytest.raises(ValueError, match="other sources at u"):
            answer(made(training=training))

    def test_nan_names_source_and_place_once_and_loses_nothing(self):
        def training(network, batch):
            losses = PROBLEM.lower(network, batch)
            return torch.cat([losses[:2], losses[2:] * torch.nan])

        source = made(training=training)
        before = [p.detach().clone() for p in source.parameters]
        optimizer = OptEx(torch.optim.SGD(source.parameters, lr=0.1), parallelism=2)
        with (
            pytest.warns(NonFiniteWarning, match="training is nan for source '2' at w.*at u"),
            pytest.raises(NonFiniteError),
        ):
            next(optimizer.rounds([None] * 4, source))
        assert same([p.detach() for p in source.parameters], before)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert source.gradient(None)[0].isnan()

    def test_validation_that_is_infinite_is_named(self):
        source = made(validation=lambda n, b: PROBLEM.upper(n, b) / 0)
        with pytest.warns(NonFiniteWarning, match="validation is inf at w"):
            source.gradient(None)


class TestLayers:
    def test_draws_are_of_seed_period_and_copy_alone(self):
        sampler = LayerSampler("blocks", active=2, interval=5, seed=3)
        draws = [sampler.chosen(number, 6) for number in range(40)]
        assert all(len(set(one)) == 2 and max(one) < 6 for one in draws)
        assert all(draws[number] == draws[number - number % 5] for number in range(40))
        assert len(set(draws)) > 3
        assert draws == [copy.deepcopy(sampler).chosen(number, 6) for number in range(40)]
        assert draws != [sampler.chosen(number, 6, copy=1) for number in range(40)]
        assert draws != [LayerSampler("blocks", interval=5, seed=4).chosen(n, 6) for n in range(40)]

    def test_every_block_has_its_share(self):
        sampler = LayerSampler("blocks", interval=1)
        counts = np.bincount([place for n in range(2000) for place in sampler.chosen(n, 4)])
        assert np.abs(counts / 2000 - 0.5).max() < 0.05

    @pytest.mark.parametrize("frozen", ["zero", "none"])
    def test_frozen_blocks_get_zero_or_none_and_the_rest_the_field(self, frozen):
        networks = {"model": scalebio.Tower(seed=1), "rival": scalebio.Tower(seed=2)}
        layers = LayerSampler("blocks", frozen=frozen)
        source = made(layers=layers, **networks)
        whole = dict(zip(map(id, source.parameters), answer(made(**networks))[1], strict=True))
        _, found = answer(source, NumberedBatch(0, None))
        gradients = dict(zip(map(id, source.parameters), found, strict=True))
        for number, network in enumerate(networks.values()):
            active = layers.chosen(0, 4, number)
            for name, p in network.named_parameters():
                still = name.startswith("blocks.") and int(name.split(".")[1]) not in active
                gradient, expected = gradients[id(p)], whole[id(p)]
                if still and frozen == "none":
                    assert gradient is None
                elif still:
                    assert not gradient.any()
                else:
                    torch.testing.assert_close(gradient, expected)

    def test_all_blocks_are_no_layers(self):
        networks = {"model": scalebio.Tower(seed=1), "rival": scalebio.Tower(seed=2)}
        one = answer(made(layers=LayerSampler("blocks", active=4), **networks), NumberedBatch(7, None))
        torch.testing.assert_close(one, answer(made(**networks)))

    def test_without_layers_numbers_are_passed_over(self):
        torch.testing.assert_close(answer(made(), NumberedBatch(3, None)), answer(made()))

    def test_numbers_go_on_in_a_run_that_is_resumed(self):
        sampler = LayerSampler("blocks")
        assert list(sampler.numbered("ab", first=7)) == [(7, "a"), (8, "b")]
        with pytest.raises(ValueError, match="first"):
            next(sampler.numbered("ab", first=-1))

    def test_a_batch_without_a_number_is_refused(self):
        source = made(layers=LayerSampler("blocks"), model=scalebio.Tower(), rival=None)
        with pytest.raises(TypeError, match=r"layers\.numbered\(batches\)"):
            source.gradient(None)

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ({"path": ""}, TypeError, "path"),
            ({"path": 3}, TypeError, "path"),
            ({"path": "blocks", "active": 0}, ValueError, "active"),
            ({"path": "blocks", "interval": 0}, ValueError, "interval"),
            ({"path": "blocks", "seed": -1}, ValueError, "seed"),
            ({"path": "blocks", "frozen": "gone"}, ValueError, "frozen"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, error, text):
        with pytest.raises(error, match=f"LayerSampler: {text} must"):
            LayerSampler(**arguments)

    def test_blocks_that_a_network_does_not_have(self):
        with pytest.raises(ValueError, match="fewer than active=5"):
            LayerSampler("blocks", active=5).blocks(scalebio.Tower())
        with pytest.raises(ValueError, match="which has enter, blocks, leave"):
            LayerSampler("layers").blocks(scalebio.Tower())


def rows(seed=0, count=120):
    draws = torch.Generator().manual_seed(seed)
    slope = torch.tensor([1.0, -2.0, 0.5])
    x = torch.randn(4, count, 3, generator=draws)
    y = x @ slope
    y[2] = torch.randn(count, generator=draws)
    return {"one": (x[0], y[0]), "two": (x[1], y[1]), "noise": (x[2], y[2])}, (x[3], y[3])


SOURCES, HELD = rows()
EMPTY = (torch.zeros(0, 3), torch.zeros(0))


def squares(network, batch):
    return (network(batch[0])[:, 0] - batch[1]).square()


FAST: dict[str, Any] = {"lr": 0.05, "lr_weights": 0.05, "weight_decay": 0.0, "batches": 120, "batch_size": 30}


def found(**options):
    sources, held = rows()
    torch.manual_seed(0)
    network = options.pop("model", None) or nn.Linear(3, 1)
    return reweight_sources(network, squares, options.pop("sources", sources), held, **{**FAST, **options})


class TestReweightSources:
    def test_noise_loses_its_weight_and_the_callers_network_stays(self):
        network = nn.Linear(3, 1)
        before = copy.deepcopy(network.state_dict())
        result = found(model=network)
        assert result.success
        assert result.status == 0
        assert result.weights["noise"] < 0.05
        np.testing.assert_allclose(list(result.weights.values()), result.x, rtol=1e-6)
        assert result.path.shape == (result.nit + 1, 3)
        np.testing.assert_allclose(result.path[0], 1 / 3)
        assert result.njev >= 120
        assert result.nstep == 120
        assert result.alpha == 10.0
        assert same(before.values(), network.state_dict().values())
        held = rows()[1]
        assert result.fun == pytest.approx(float(squares(result.rival, held).detach().mean()), rel=1e-5)
        assert result.model_fun == pytest.approx(float(squares(result.model, held).detach().mean()), rel=1e-5)

    def test_one_seed_is_one_run(self):
        one, other, third = found(), found(), found(seed=1)
        np.testing.assert_array_equal(one.path, other.path)
        assert not np.array_equal(one.x, third.x)

    def test_all_rows_at_once_and_sources_in_a_list(self):
        result = found(sources=list(rows()[0].values()), batch_size=None, batches=40, stride="auto")
        assert list(result.weights) == ["0", "1", "2"]
        assert result.weights["2"] < 0.1
        assert result.nstep > result.njev

    def test_alpha_grows_and_rates_fall_by_tau(self):
        rates = []

        def optimizer(groups):
            base = torch.optim.Adam(groups)
            base.register_step_pre_hook(lambda b, *_: rates.append(tuple(g["lr"] for g in b.param_groups)))
            return base

        result = found(optimizer=optimizer, alpha=2.0, tau=4.0, outer=3, batches=10, parallelism=1)
        assert result.alpha == 32.0
        assert result.nstep == 30
        assert rates[::10] == [(0.05, 0.05), (0.0125, 0.0125), (0.003125, 0.003125)]

    def test_a_callback_sees_the_result_and_stops(self):
        seen = []

        def callback(intermediate_result):
            seen.append(intermediate_result)
            return len(seen) == 3

        result = found(callback=callback)
        assert (result.status, result.nit, result.success) == (99, 3, False)
        assert seen[0].path.shape == (2, 3)
        assert found(callback=lambda x: x.shape == (3,)).nit == 1

    def test_nan_ends_the_run_where_it_stood(self):
        def loss(network, batch):
            value = squares(network, batch)
            return value * torch.nan if bool(network.weight.detach().abs().max() > 1) else value

        sources, held = rows()
        torch.manual_seed(0)
        with pytest.warns(NonFiniteWarning, match="training is nan"):
            result = reweight_sources(nn.Linear(3, 1), loss, sources, held, **{**FAST, "parallelism": 1})
        assert result.status == 2
        assert result.nit > 1
        assert all(p.isfinite().all() for p in result.rival.parameters())

    def test_noise_loses_its_weight_with_layers_in_turn(self):
        sources, held = rows()
        double = {name: tuple(part.double() for part in parts) for name, parts in sources.items()}
        held = tuple(part.double() for part in held)
        result = reweight_sources(
            scalebio.Tower(), squares, double, held, **{**FAST, "batches": 60, "layers": LayerSampler("blocks")}
        )
        assert result.weights["noise"] < 0.2

    def test_threads_find_what_this_one_does(self):
        with ThreadPoolExecutor(2) as threads:
            result = found(workers=threads, batches=20)
        np.testing.assert_allclose(result.path, found(batches=20).path, rtol=1e-5)

    def test_it_says_how_it_went(self, capsys):
        found(batches=4, disp=True)
        assert "Weights: one" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "error", "text"),
        [
            ({"alpha": 0.0}, ValueError, "alpha must be positive"),
            ({"tau": 0.5}, ValueError, "tau must be"),
            ({"outer": 0}, ValueError, "outer must be"),
            ({"batches": 0}, ValueError, "batches must be"),
            ({"seed": -1}, ValueError, "seed must be"),
            ({"parallelism": 0}, ValueError, "parallelism must be"),
            ({"batch_size": 2}, ValueError, "batch_size must be an integer of at least 3"),
            ({"optimizer": "sdg"}, ValueError, "'sdg' is not one of"),
            ({"optimizer": "scale"}, ValueError, "has to know the layers"),
            ({"optimizer": 3}, TypeError, "optimizer must be a name"),
            ({"optimizer": lambda groups: None}, TypeError, "optimizer must return"),
            ({"layers": LayerSampler("0"), "stride": "auto"}, ValueError, "stride must be 1"),
            ({"callback": 3}, TypeError, "callback must be callable"),
            ({"evaluator": 3}, TypeError, "evaluator must be"),
            ({"evaluator": optex.VectorizedEvaluator(nn.Linear(3, 1))}, ValueError, "no gradient of one"),
            ({"evaluator": optex.SequentialEvaluator(), "workers": 2}, ValueError, "leave one out"),
        ],
    )
    def test_bad_arguments(self, options, error, text):
        with pytest.raises(error, match=text):
            found(**options)

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"sources": {"one": SOURCES["one"]}}, ValueError, "at least 2 sources"),
            ({"sources": {**SOURCES, "none": EMPTY}}, ValueError, "source 'none' is empty"),
            ({"sources": {**SOURCES, "odd": (HELD[0], HELD[1][:5])}}, ValueError, "5 and 120 rows"),
            ({"sources": {**SOURCES, "odd": [1, 2]}}, TypeError, "source 'odd' must be a tensor of rows"),
            ({"sources": {**SOURCES, "odd": HELD[0]}}, ValueError, "all be tensors"),
            ({"sources": HELD[0]}, TypeError, "sources must be a dict or a list"),
            ({"validation": EMPTY}, ValueError, "validation is empty"),
            ({"loss": None}, TypeError, "loss must be a function"),
            ({"loss": lambda n, b: squares(n, b).mean()}, ValueError, "one loss for each of 30 rows"),
            ({"loss": lambda n, b: 1.0}, TypeError, "loss must return a tensor"),
            ({"model": 3}, TypeError, "model must be"),
        ],
    )
    def test_bad_data(self, change, error, text):
        given: dict[str, Any] = {
            "model": nn.Linear(3, 1),
            "loss": squares,
            "sources": SOURCES,
            "validation": HELD,
        }
        with pytest.raises(error, match=text):
            reweight_sources(**{**given, **change}, **FAST)


class TestSourceMixture:
    def test_forward_is_the_sources_loss_and_its_field_but_for_signs(self):
        problem = SourceMixture(2, alpha=3.0)
        with torch.no_grad():
            problem.model.weight += 0.5
        source = problem.source()
        loss, _ = source.gradient(None)
        torch.testing.assert_close(loss, problem().detach())
        along = torch.autograd.grad(problem(), source.parameters)
        for factor, gradient, p in zip((1, 3, -3), along, source.parameters, strict=True):
            torch.testing.assert_close(factor * grad_of(p), gradient)

    def test_half_of_the_sources_are_noise(self):
        problem = SourceMixture(0)
        problem.settle()
        least = problem.lower(problem.rival).detach()
        assert float(least[2:].min()) > 3 * float(least[:2].max())

    def test_alpha(self):
        with pytest.raises(ValueError, match="alpha must be positive"):
            SourceMixture(0, alpha=-1.0)
