"""DeepZero's coordinate-wise gradients: against slow twins, over workers and ranks, and what is refused."""

import copy
import itertools
import math
import os
import pickle
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import optex
from tests.gradients import grad_of
from tests.models import regression_batches, same, snapshot
from tests.ranks import _CONTEXT, run_ranks
from tests.references.deepzero import block_loss, blocks, coordinate_gradient, grasp_scores, squared


def answer(source, batch, seed=0):
    torch.manual_seed(seed)
    loss, noise = source.gradient(batch)
    assert noise is None
    return float(loss), [p.grad.clone() for p in source.parameters]


def close(left, right, tolerance):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def parameter(*values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


class Counting:
    """Counts how many blocks are evaluated, by hooks; a vmapped pass counts as one."""

    def __init__(self, sequence):
        self.blocks = 0
        for block in sequence:
            block.register_forward_hook(self._one)

    def _one(self, *_):
        self.blocks += 1


class InThisProcess(Executor):
    """Runs a task where it is submitted, on what pickling leaves of it."""

    def __init__(self):
        self.tasks = 0

    def submit(self, fn, /, *args, **kwargs):
        self.tasks += 1
        future, before = Future(), torch.get_rng_state()
        try:
            future.set_result(fn(*pickle.loads(pickle.dumps(args)), **kwargs))
        except Exception as error:  # noqa: BLE001
            future.set_exception(error)
        torch.set_rng_state(before)
        return future


class TestCoordinateSource:
    @pytest.mark.parametrize("options", [{}, {"vectorized": True, "chunk": 7}, {"chunk": 1}])
    @pytest.mark.parametrize("reuse", [False, True])
    @pytest.mark.parametrize("central", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_is_the_twin(self, options, reuse, central, dropout):
        model, (batch,) = block_loss(dropout), regression_batches(1)
        source = optex.CoordinateSource(model, model.parameters(), central=central, reuse=reuse, **options)
        loss, gradients = answer(source, batch)
        torch.manual_seed(0)
        base, twin = coordinate_gradient(model, batch, 5e-3, central=central)
        assert loss == pytest.approx(base, rel=1e-12)
        close(gradients, twin, 1e-10)

    @pytest.mark.parametrize("vectorized", [False, True])
    def test_reused_features_change_nothing_and_save_blocks(self, vectorized):
        (batch,), counts, found = regression_batches(1), [], []
        for reuse in (False, True):
            model = block_loss(0.3)
            source = optex.CoordinateSource(model, model.parameters(), reuse=reuse, vectorized=vectorized)
            counted = Counting(model.blocks)
            found.append(answer(source, batch))
            counts.append(counted.blocks)
            if not vectorized:
                assert counted.blocks == pytest.approx(3 * source.evaluations)
        close(found[0][1], found[1][1], 1e-12)
        assert counts[1] < counts[0]

    def test_evaluations_are_those_of_the_function(self):
        model, calls = blocks(), itertools.count()

        def objective(batch):
            next(calls)
            return squared(model(batch[0]), batch)

        (batch,) = regression_batches(1)
        for central in (False, True):
            calls = itertools.count()
            source = optex.CoordinateSource(objective, model.parameters(), central=central)
            source.gradient(batch)
            assert next(calls) == source.evaluations == 1 + (2 if central else 1) * 74

    def test_is_exact_where_the_difference_is(self):
        x = parameter([1.0, -2.0], [0.5, 3.0])
        curvature = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
        objective = lambda _: (0.5 * curvature * x.square()).sum()  # noqa: E731
        for central, bias in ((False, 0.05 * curvature), (True, 0)):
            optex.CoordinateSource(objective, [x], 0.1, central=central).gradient(None)
            torch.testing.assert_close(x.grad, curvature * x.detach() + bias, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("vectorized", [False, True])
    @pytest.mark.parametrize("reuse", [False, True])
    def test_a_mask_leaves_out_coordinates_and_nothing_else(self, vectorized, reuse):
        model, (batch,) = block_loss(), regression_batches(1)
        whole = answer(optex.CoordinateSource(model, model.parameters(), reuse=reuse), batch)[1]
        generator = torch.Generator().manual_seed(1)
        mask = [torch.rand(p.shape, generator=generator) < 0.3 for p in model.parameters()]
        mask[1][:] = False
        source = optex.CoordinateSource(
            model, model.parameters(), mask=mask, vectorized=vectorized, reuse=reuse, chunk=3
        )
        before = snapshot(model)
        close(answer(source, batch)[1], [g * m for g, m in zip(whole, mask, strict=True)], 1e-11)
        assert same(before, snapshot(model))

    def test_a_weight_in_two_blocks_counts_from_the_first(self):
        first, last = nn.Linear(6, 6), nn.Linear(6, 6)
        last.weight = first.weight
        model = optex.BlockLoss([first, nn.Tanh(), last], lambda out, _: out.square().mean()).double()
        (batch,), found = regression_batches(1), []
        for reuse, vectorized in itertools.product((False, True), repeat=2):
            source = optex.CoordinateSource(model, model.parameters(), reuse=reuse, vectorized=vectorized)
            found.append(answer(source, batch)[1])
        for other in found[1:]:
            close(found[0], other, 1e-12)

    def test_blocks_that_work_in_place_do_not_spoil_what_is_kept(self):
        found = []
        for inplace, reuse in ((False, False), (True, True)):
            torch.manual_seed(0)
            parts = [nn.Linear(6, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 3)]
            entered = [parts[0], nn.Sequential(*parts[1:])]
            model = optex.BlockLoss(entered, squared).double()
            (batch,) = regression_batches(1)
            found.append(answer(optex.CoordinateSource(model, model.parameters(), reuse=reuse), batch)[1])
        close(found[0], found[1], 1e-12)

    @pytest.mark.parametrize("reuse", [False, True])
    def test_buffers_and_draws_end_where_one_pass_leaves_them(self, reuse):
        ends = []
        for estimated in (False, True):
            torch.manual_seed(0)
            parts = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)]
            model, (batch,) = optex.BlockLoss(parts, squared).double(), regression_batches(1)
            torch.manual_seed(5)
            if estimated:
                optex.CoordinateSource(model, model.parameters(), reuse=reuse).gradient(batch)
            else:
                model(batch)
            ends.append(([b.clone() for b in model.buffers()], torch.get_rng_state()))
        close(ends[0][0], ends[1][0], 1e-12)
        assert torch.equal(ends[0][1], ends[1][1])

    def test_a_step_is_as_long_as_the_precision_has_it(self):
        # In bfloat16 4 + 0.05 is 4.0625: a slope over 0.05 would be a quarter too steep.
        x = parameter(4.0, dtype=torch.bfloat16)
        optex.CoordinateSource(lambda _: 3 * x.double().sum(), [x], 0.05).gradient(None)
        assert float(grad_of(x)) == 3.0

    def test_a_shift_that_rounding_swallows_is_refused(self):
        x = parameter(1.0, 300.0, dtype=torch.bfloat16)
        source = optex.CoordinateSource(lambda _: x.double().sum(), [x], 0.05)
        with pytest.raises(
            ValueError, match=r"lost in the rounding .* beside 300, at coordinate 1 of parameter 0"
        ):
            source.gradient(None)
        assert x.tolist() == [1.0, 300.0]

    def test_scalars_and_parameters_out_of_order_in_memory(self):
        x, y = nn.Parameter(torch.tensor(2.0).double()), nn.Parameter(torch.randn(3, 4).double().T)
        assert not y.is_contiguous()
        weights = torch.arange(12.0).view(4, 3).double()
        optex.CoordinateSource(lambda _: x * 3 + (weights * y).sum(), [x, y]).gradient(None)
        torch.testing.assert_close(x.grad, torch.tensor(3.0).double())
        torch.testing.assert_close(y.grad, weights, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("vectorized", [False, True])
    def test_a_loss_that_is_not_finite_is_named_and_nothing_moves(self, vectorized):
        class Root(nn.Module):
            def __init__(self):
                super().__init__()
                self.x = parameter(1.0, 4.0, 1.0)

            def forward(self, _):
                return (4.001 - self.x).sqrt().sum()

        model = Root()
        source = optex.CoordinateSource(model, [model.x], vectorized=vectorized)
        with pytest.raises(
            optex.NonFiniteError, match=r"nan with coordinate 1 of parameter 0 shifted by \+0\.005"
        ):
            source.gradient(None)
        assert model.x.tolist() == [1.0, 4.0, 1.0]
        assert model.x.grad is None

    def test_a_loss_that_is_not_finite_at_the_parameters(self):
        x = parameter(1.0)
        with pytest.raises(
            optex.NonFiniteError, match="loss is inf at the parameters; parameters are as before"
        ):
            optex.CoordinateSource(lambda _: math.inf, [x]).gradient(None)

    def test_an_error_of_the_objective_passes_and_nothing_moves(self):
        x, calls = parameter(1.0, 2.0), itertools.count()

        def broken(_):
            if next(calls) == 2:
                raise KeyError("mine")
            return x.sum()

        with pytest.raises(KeyError, match="mine"):
            optex.CoordinateSource(broken, [x]).gradient(None)
        assert x.tolist() == [1.0, 2.0]
        assert x.grad is None

    def test_a_number_of_another_program_will_do(self):
        x = parameter(1.0, 2.0)
        optex.CoordinateSource(lambda _: float(x.detach().square().sum()), [x], central=True).gradient(None)
        torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "match"),
        [
            ((3,), {}, TypeError, "objective must be callable, got int"),
            ((len,), {"mu": 0.0}, ValueError, "mu must be a finite number above 0, got 0.0"),
            ((len,), {"mu": math.nan}, ValueError, "mu must be"),
            ((len,), {"chunk": 0}, ValueError, "chunk must be an integer of at least 1, got 0"),
            ((len,), {"workers": 0}, ValueError, "workers must be"),
            ((len,), {"vectorized": True}, TypeError, "needs the torch.nn.Module"),
            ((nn.Linear(1, 1),), {"vectorized": True}, TypeError, "is not the objective's own"),
            ((len, torch.ones(2)), {}, TypeError, r"pass \[tensor\]"),
            ((len, [torch.arange(2)]), {}, TypeError, "got a tensor of torch.int64"),
            ((len, ["x"]), {}, TypeError, "got str"),
            ((len, []), {}, ValueError, "hold no number"),
            ((len,), {"mask": [torch.ones(1)]}, TypeError, "tensors of torch.bool, or a DynamicMask"),
            ((len,), {"mask": [1]}, TypeError, "got int"),
            ((len,), {"mask": [torch.ones(2).bool()]}, ValueError, r"shapes, \[\(1,\)\], got \[\(2,\)\]"),
            ((len,), {"mask": [torch.zeros(1).bool()]}, ValueError, "no coordinate active"),
            ((len,), {"executor": 4}, TypeError, "concurrent.futures.Executor, got int"),
            ((len,), {"group": 4}, ValueError, "call init_process_group first"),
        ],
    )
    def test_refuses(self, arguments, options, error, match):
        objective, parameters = arguments if len(arguments) > 1 else (*arguments, [parameter(1.0)])
        with pytest.raises(error, match=match):
            optex.CoordinateSource(objective, parameters, **options)

    def test_a_block_that_is_there_twice(self):
        layer = nn.Linear(6, 6)
        model = optex.BlockLoss([layer, nn.Tanh(), layer], lambda out, _: out.square().mean()).double()
        (batch,) = regression_batches(1)
        sources = (
            optex.CoordinateSource(model, model.parameters(), reuse=False),
            optex.CoordinateSource(model, model.parameters()),
            optex.CoordinateSource(model, model.parameters(), vectorized=True),
        )
        found = [answer(source, batch)[1] for source in sources]
        close(found[0], found[1], 1e-12)
        close(found[0], found[2], 1e-9)

    def test_refuses_threads(self):
        with ThreadPoolExecutor(1) as threads, pytest.raises(TypeError, match="pass a ProcessPoolExecutor"):
            optex.CoordinateSource(len, [parameter(1.0)], executor=threads)

    @pytest.mark.parametrize(
        ("value", "error", "match"),
        [
            (torch.ones(2), ValueError, "must be a scalar, got shape"),
            (None, TypeError, "must return the loss"),
            (torch.tensor(1j), TypeError, "complex"),
        ],
    )
    def test_refuses_what_is_no_loss(self, value, error, match):
        x = parameter(1.0)
        with pytest.raises(error, match=match):
            optex.CoordinateSource(lambda _: value, [x]).gradient(None)
        assert x.tolist() == [1.0]

    def test_active_coordinates_are_the_masks(self):
        mask = optex.DynamicMask([torch.zeros(5, 5)], 0.4)
        source = optex.CoordinateSource(len, [nn.Parameter(torch.zeros(5, 5))], mask=mask, chunk=4)
        assert [len(part) for part in source.active()] == [10]
        assert same(source.active(), mask.active())


class TestBlockLoss:
    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ((nn.Linear(1, 1), len), TypeError, "torch.nn.Sequential or a list of modules, got Linear"),
            (([], len), ValueError, "blocks is empty"),
            (([3], len), TypeError, "must be torch.nn.Module, got int"),
            (([nn.Tanh()], 3), TypeError, "loss must be callable, got int"),
            (([nn.Tanh()], len, 3), TypeError, "inputs must be callable, got int"),
        ],
    )
    def test_refuses(self, arguments, error, match):
        with pytest.raises(error, match=match):
            optex.BlockLoss(*arguments)

    def test_entered_at_a_block_is_the_whole_from_there(self):
        model, (batch,) = block_loss(), regression_batches(1)
        value = model.blocks[0](batch[0])
        assert torch.equal(model(batch), model(batch, 1, value))


class TestSpread:
    @pytest.mark.parametrize("options", [{}, {"vectorized": True}, {"central": True}])
    @pytest.mark.parametrize("workers", [1, 3, 50])
    def test_workers_answer_the_same_bits(self, options, workers):
        model, (batch,) = block_loss(0.3), regression_batches(1)
        alone = optex.CoordinateSource(model, model.parameters(), chunk=5, **options)
        executor = InThisProcess()
        spread = optex.CoordinateSource(
            model, model.parameters(), chunk=5, executor=executor, workers=workers, **options
        )
        (loss, gradients), (other, others) = answer(alone, batch), answer(spread, batch)
        assert loss == other
        assert same(gradients, others)
        assert executor.tasks == min(workers, 16)

    def test_processes_answer_the_same_bits(self):
        model, (batch,) = block_loss(0.3), regression_batches(1)
        with ProcessPoolExecutor(2, mp_context=_CONTEXT) as executor:
            spread = optex.CoordinateSource(model, model.parameters(), chunk=5, executor=executor)
            (loss, gradients) = answer(optex.CoordinateSource(model, model.parameters(), chunk=5), batch)
            (other, others) = answer(spread, batch)
            assert loss == other
            assert same(gradients, others)
            broken = optex.CoordinateSource(Dying(parameter(1.0)), model.parameters(), executor=executor)
            with pytest.raises(optex.WorkerLostError, match="a worker died"):
                broken.gradient(os.getpid())

    def test_an_error_in_a_worker_is_the_callers(self):
        model, ((x, y),) = block_loss(), regression_batches(1)
        source = optex.CoordinateSource(model, model.parameters(), executor=InThisProcess())
        with pytest.raises(RuntimeError, match="size of tensor"):
            source.gradient((x, y[:, :2]))

    def test_what_cannot_be_sent_is_refused_with_a_remedy(self):
        x, batch = parameter(1.0), (value for value in ())
        source = optex.CoordinateSource(Dying(x), [x], executor=InThisProcess())
        with pytest.raises(TypeError, match=r"cannot be \(.*generator.*\); define the objective"):
            source.gradient(batch)

    def test_a_copy_evaluates_alone(self):
        model, (batch,) = block_loss(), regression_batches(1)
        source = optex.CoordinateSource(model, model.parameters(), executor=InThisProcess())
        twin = pickle.loads(pickle.dumps(source))
        assert twin.executor is None
        assert same(answer(source, batch)[1], answer(twin, batch)[1])
        assert copy.deepcopy(source).executor is None

    def test_ranks_answer_the_same_bits(self):
        loss, gradients = _on_a_rank(0, None)
        expected, answers = [loss, *gradients], run_ranks(_on_ranks, 2)
        for found in answers:
            loss, gradients = found["answer"]
            assert loss == expected[0]
            assert same([torch.tensor(g, dtype=torch.float64) for g in gradients], expected[1:])
            assert "rank 1" in found["failed"][0]
            assert "losses at the parameters differ" in found["apart"]
            assert "both given" in found["both"]
            assert "must be a torch.distributed process group" in found["none"]
        failures = [found["failed"] for found in answers]
        assert [kind for _, kind in failures] == ["RuntimeError", "KeyError"]


class Dying:
    """A loss whose evaluation ends any process but the one that the batch names."""

    def __init__(self, x):
        self.x = x

    def __call__(self, batch):
        if os.getpid() != batch:
            os._exit(1)
        return self.x.sum()


def _on_a_rank(_, group):
    model, (batch,) = block_loss(0.3), regression_batches(1)
    source = optex.CoordinateSource(model, model.parameters(), chunk=5, vectorized=True, group=group)
    return answer(source, batch)


def _message(act):
    try:
        act()
    except Exception as error:  # noqa: BLE001
        return str(error), type(error).__name__
    return "", ""


def _on_ranks(rank):
    group = dist.group.WORLD
    loss, gradients = _on_a_rank(rank, group)
    x = parameter(*range(1, 6))

    def failing(_):
        if rank and x[0] == 1.0:
            raise KeyError("rank 1")
        return x.sum()

    apart = optex.CoordinateSource(lambda _: x.sum() + rank, [x], group=group)
    return {
        "answer": (loss, [g.tolist() for g in gradients]),
        "failed": _message(lambda: optex.CoordinateSource(failing, [x], group=group).gradient(None)),
        "apart": _message(lambda: apart.gradient(None))[0],
        "both": _message(lambda: optex.CoordinateSource(len, [x], group=group, executor=InThisProcess()))[0],
        "none": _message(lambda: optex.CoordinateSource(len, [x], group=3))[0],
    }


class TestDynamicMask:
    PARAMETERS = (torch.zeros(20, 30), torch.zeros(20), torch.zeros(3, 20))

    def test_has_as_many_as_the_ratios_say_and_others_every_few_epochs(self):
        mask = optex.DynamicMask(self.PARAMETERS, [0.1, 1.0, 0.25], every=3)
        drawn = [mask.at(epoch) for epoch in range(7)]
        for parts in drawn:
            assert [len(part) for part in parts] == mask.counts == [60, 20, 15]
            assert all(torch.equal(part, part.unique()) for part in parts)
        assert same(drawn[0], drawn[2])
        assert same(drawn[3], drawn[5])
        assert not torch.equal(drawn[2][0], drawn[3][0])
        assert not torch.equal(drawn[5][2], drawn[6][2])

    def test_one_number_leaves_vectors_whole(self):
        for ratio in (0.1, np.float64(0.1), np.float32(0.1)):
            assert optex.DynamicMask(self.PARAMETERS, ratio).counts == [60, 20, 6]

    def test_an_epoch_depends_on_nothing_that_was_asked_before(self):
        mask, other = (optex.DynamicMask(self.PARAMETERS, 0.1, seed=4) for _ in range(2))
        for epoch in (90, 3, 17):
            mask.epoch = epoch
            mask.active()
        mask.epoch = other.epoch = 11
        torch.rand(3)
        assert same(mask.active(), other.active())

    def test_draws_nothing_from_torch_and_differs_by_seed(self):
        before = torch.get_rng_state()
        masks = [optex.DynamicMask(self.PARAMETERS, 0.1, seed=seed).active()[0] for seed in range(4)]
        assert torch.equal(before, torch.get_rng_state())
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))

    def test_covers_all_coordinates_in_time(self):
        mask, seen = optex.DynamicMask([torch.zeros(10, 10)], 0.1, every=1), set()
        for epoch in range(100):
            seen |= set(mask.at(epoch)[0].tolist())
        assert len(seen) == 100

    def test_is_saved_and_put_back(self):
        mask = optex.DynamicMask(self.PARAMETERS, [0.1, 0.5, 0.3], every=2, seed=9)
        mask.epoch = 7
        other = optex.DynamicMask(self.PARAMETERS)
        other.load_state_dict(copy.deepcopy(mask.state_dict()))
        assert same(mask.active(), other.active())
        assert other.epoch == 7
        assert other.counts == mask.counts

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"ratios": torch.ones(2)}, "saved ratios must be a floating-point tensor"),
            ({"epoch": -1}, "saved epoch must be"),
            ({"every": 0}, "saved every must be"),
            ({"seed": None}, "saved seed must be"),
        ],
    )
    def test_refuses_another_state_and_keeps_its_own(self, change, match):
        mask = optex.DynamicMask(self.PARAMETERS, 0.2, seed=3)
        before = mask.active()
        with pytest.raises(ValueError, match=match):
            mask.load_state_dict({**mask.state_dict(), **change})
        assert same(before, mask.active())

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"ratios": 1.5}, "ratios must be a finite number at least 0 and at most 1, got 1.5"),
            ({"ratios": [0.1]}, "ratios must be one a parameter, 3, got 1"),
            ({"ratios": [0, 0, 0]}, "no coordinate is active"),
            ({"every": 0}, "every must be"),
            ({"seed": -1}, "seed must be"),
        ],
    )
    def test_refuses(self, options, match):
        with pytest.raises(ValueError, match=match):
            optex.DynamicMask(self.PARAMETERS, **options)

    def test_refuses_an_epoch_below_0(self):
        mask = optex.DynamicMask(self.PARAMETERS)
        with pytest.raises(ValueError, match="epoch must be an integer of at least 0"):
            mask.epoch = -1

    def test_weights_that_are_not_active_still_decay(self):
        model, (batch,) = block_loss(), regression_batches(1)
        mask = optex.DynamicMask(model.parameters(), 0.2)
        source = optex.CoordinateSource(model, model.parameters(), mask=mask)
        before = snapshot(model)
        source.gradient(batch)
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5).step()
        idle = torch.ones(30).bool().index_fill(0, mask.active()[0], False)
        torch.testing.assert_close(snapshot(model)[0].view(-1)[idle], 0.95 * before[0].view(-1)[idle])

    @pytest.mark.parametrize("workers", [False, True])
    def test_epochs_reach_workers_and_resumed_runs(self, workers):
        def made(workers=workers):
            model = block_loss()
            mask = optex.DynamicMask(model.parameters(), 0.2, every=1)
            source = optex.CoordinateSource(model, model.parameters(), mask=mask)
            evaluator = optex.WorkersEvaluator(2) if workers else optex.SequentialEvaluator()
            base = torch.optim.SGD(model.parameters(), lr=0.1)
            return model, mask, source, evaluator, optex.OptEx(base, parallelism=2, evaluator=evaluator)

        def run(mask, source, optimizer, batches):
            for _ in optimizer.rounds(batches, source):
                mask.epoch += 1

        batches = regression_batches(16)
        alone, whole, source, _, optimizer = made(workers=False)
        run(whole, source, optimizer, iter(batches))
        model, mask, source, evaluator, optimizer = made()
        rounds = optimizer.rounds(iter(batches), source)
        for _ in itertools.islice(rounds, 3):
            mask.epoch += 1
        drawn, here = optimizer.batches_drawn, snapshot(model)
        saved, epoch = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(mask.state_dict())
        for _ in rounds:
            mask.epoch += 1
        other, twin, source, twins_evaluator, resumed = made()
        with torch.no_grad():
            for p, value in zip(other.parameters(), here, strict=True):
                p.copy_(value)
        resumed.load_state_dict(saved)
        twin.load_state_dict(epoch)
        run(twin, source, resumed, iter(batches[drawn:]))
        for used in (evaluator, twins_evaluator):
            if isinstance(used, optex.WorkersEvaluator):
                used.close()
        assert mask.epoch == twin.epoch == whole.epoch
        for expected, *found in zip(snapshot(alone), snapshot(model), snapshot(other), strict=True):
            for end in found:
                torch.testing.assert_close(end, expected, rtol=1e-9, atol=1e-12)


class TestRatios:
    def model(self):
        torch.manual_seed(0)
        return optex.BlockLoss([nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)], squared).double()

    def kept(self, scores, sparsity, signed=False):
        """Shares of the two weights by exact scores."""
        flat = torch.cat([scores[0].flatten(), scores[2].flatten()])
        order = flat.sort().indices if signed else flat.abs().sort(descending=True).indices
        chosen = torch.zeros(len(flat), dtype=torch.float64)
        chosen[order[: len(flat) - round(sparsity * len(flat))]] = 1
        return [float(chosen[:72].mean()), 1.0, float(chosen[72:].mean()), 1.0]

    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize("backward", [False, True])
    def test_are_those_of_exact_scores(self, signed, backward):
        model, (batch,) = self.model(), regression_batches(1, size=40)
        parameters = list(model.parameters())
        expected = self.kept(grasp_scores(model, batch), 0.7, signed)
        source = optex.CoordinateSource(model, parameters, 1e-5, central=True)
        if backward:
            source = optex.ObjectiveSource(model)
        found = optex.zo_grasp_ratios(source, parameters, batch, 0.7, 1e-4, signed=signed)
        assert found == pytest.approx(expected, abs=1e-12)
        assert 72 * found[0] + 36 * found[2] == pytest.approx(108 - round(0.7 * 108))

    def test_random_directions_come_near_because_both_estimates_share_them(self):
        model, (batch,) = self.model(), regression_batches(1, size=40)
        parameters = list(model.parameters())
        exact = self.kept(grasp_scores(model, batch), 0.5)
        torch.manual_seed(0)
        source = optex.SPSASource(model, parameters, 5e-3, queries=192)
        found = optex.zo_grasp_ratios(source, parameters, batch, 0.5)
        assert abs(found[0] - exact[0]) < 0.15

    def test_leave_parameters_and_gradients_as_they_were(self):
        model, (batch,) = self.model(), regression_batches(1)
        parameters = list(model.parameters())
        for number, p in enumerate(parameters):
            p.grad = torch.full_like(p, number)
        before = snapshot(model)
        optex.zo_grasp_ratios(optex.ObjectiveSource(model), parameters, batch)
        assert same(before, snapshot(model))
        assert all(bool((p.grad == number).all()) for number, p in enumerate(parameters))

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"sparsity": 1.0}, ValueError, "sparsity must be a finite number at least 0 and below 1, got 1.0"),
            ({"sparsity": -0.1}, ValueError, "sparsity must be"),
            ({"mu": 0.0}, ValueError, "mu must be"),
            ({"source": len}, TypeError, "source must be an optex.GradientSource, got builtin"),
            ({"parameters": [torch.zeros(3)]}, ValueError, "no parameter has two dimensions"),
        ],
    )
    def test_refuse(self, options, error, match):
        model, (batch,) = self.model(), regression_batches(1)
        arguments = {
            "source": optex.ObjectiveSource(model),
            "parameters": list(model.parameters()),
            "batch": batch,
        }
        with pytest.raises(error, match=match):
            optex.zo_grasp_ratios(**{**arguments, **options})

    def test_a_score_that_is_not_finite_is_refused_and_nothing_moves(self):
        x = nn.Parameter(torch.ones(2, 2))
        source = optex.ObjectiveSource(lambda _: (x * math.inf).sum())
        with pytest.raises(optex.NonFiniteError, match="a score is NaN or infinite"):
            optex.zo_grasp_ratios(source, [x], None)
        assert x.tolist() == [[1.0, 1.0], [1.0, 1.0]]
        assert x.grad is None
