"""OptEx as a torch optimizer: groups, schedules, hooks, checkpoints, and what it refuses."""

import contextlib
import copy
import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

import optex
from optex import (
    HoldLast,
    JitterWarning,
    Last,
    LowestLoss,
    NonFiniteError,
    NotDeterministicWarning,
    NotPositiveDefiniteError,
    OptEx,
    PlainStepWarning,
    SequentialEvaluator,
    VectorizedEvaluator,
    WithinTolerance,
)
from tests.bases import BASES
from tests.models import (
    assert_equal_trees,
    assert_same_state,
    network,
    plain_run,
    regression_batches,
    same,
    snapshot,
    squared_error,
    weight_of,
)

MAKERS = {
    "paper": lambda base: OptEx.from_paper(base, parallelism=4),
    "lowest-loss": lambda base: OptEx.from_paper(base, parallelism=4, selection="lowest-loss"),
    "verified": lambda base: OptEx(base, parallelism=4),
}


def adam(parameters, **settings):
    return torch.optim.Adam(parameters, lr=0.02, **settings)


def closure_of(optimizer, model, batch):
    def closure():
        optimizer.zero_grad()
        loss = squared_error(model)(batch)
        loss.backward()
        return loss

    return closure


# ---------------------------------------------------------------- a torch.optim.Optimizer


def test_groups_and_state_are_the_base_optimizers_own():
    model = network()
    base = adam([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}])
    optimizer = OptEx(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    optimizer.param_groups[0]["lr"] = 0.5
    assert base.param_groups[0]["lr"] == 0.5
    optimizer.step(closure_of(optimizer, model, regression_batches(1)[0]))
    assert optimizer.state is base.state
    assert len(optimizer.state) == 4
    base.load_state_dict(base.state_dict())  # rebinds both
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_groups_with_rates_of_their_own(make):
    # With a hundredth of the rate, a group moves about a hundredth as far.
    model = network()
    before = snapshot(model)
    optimizer = make(adam([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 2e-4}]))
    list(optimizer.rounds(regression_batches(20), squared_error(model)))
    moved = [(a - b).abs().mean() for a, b in zip(snapshot(model), before, strict=True)]
    assert 30 < moved[0] / moved[2] < 300


def test_add_param_group_reaches_the_base_and_starts_a_new_history():
    model = network()
    optimizer = OptEx(adam(model[0].parameters()))
    batches = regression_batches(24)
    list(optimizer.rounds(batches[:12], squared_error(model)))
    assert len(optimizer.history) > 0
    before = snapshot(model)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.1})
    assert len(optimizer.base.param_groups) == 2
    assert len(optimizer.history) == 0
    list(optimizer.rounds(batches[12:], squared_error(model)))
    assert not any(torch.equal(a, b) for a, b in zip(snapshot(model), before, strict=True))


def test_unfreezing_a_parameter_is_noticed():
    model = network()
    model[0].requires_grad_(False)
    frozen = weight_of(model[0]).detach().clone()
    optimizer = OptEx(adam(model.parameters()))
    list(optimizer.rounds(regression_batches(8), squared_error(model)))
    assert torch.equal(weight_of(model[0]), frozen)
    model[0].requires_grad_(True)
    list(optimizer.rounds(regression_batches(8), squared_error(model)))
    assert not torch.equal(weight_of(model[0]), frozen)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("vectorized", [False, True])
def test_a_parameter_without_gradient_is_left_alone(make, vectorized):
    # Weight decay would move it if the base optimizer ever saw a gradient of zeros there.
    model = network()
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.register_parameter("unused", unused)
    optimizer = make(adam(model.parameters(), weight_decay=0.1))
    if vectorized:
        optimizer.evaluator = VectorizedEvaluator(model)
    list(optimizer.rounds(regression_batches(20), squared_error(model)))
    assert torch.equal(unused, torch.ones(3, dtype=torch.float64))
    assert unused not in optimizer.state


def test_groups_of_two_dtypes_are_stepped_as_by_the_base_alone():
    model = nn.Sequential(nn.Linear(6, 5).double(), nn.Tanh(), nn.Linear(5, 3).bfloat16())
    objective = lambda batch: (  # noqa: E731
        (model[2](model[1](model[0](batch[0])).bfloat16()) - batch[1]).square().float().mean()
    )
    optimizer = OptEx(adam(model.parameters()), acceptance=WithinTolerance(0.0))
    assert optimizer.history.gradients.dtype == torch.float64
    twin = copy.deepcopy(model)
    reports = list(optimizer.rounds(regression_batches(20), objective))
    assert reports[-1].loss < reports[0].loss
    base = adam(twin.parameters())
    for x, y in regression_batches(20):
        base.zero_grad()
        (twin[2](twin[1](twin[0](x)).bfloat16()) - y).square().float().mean().backward()
        base.step()
    assert same(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_history_dtype_is_apart_from_the_parameters(dtype):
    model = network()
    optimizer = OptEx(adam(model.parameters()), history_dtype=dtype)
    reports = list(optimizer.rounds(regression_batches(60, size=64), squared_error(model)))
    assert optimizer.history.gradients.dtype == dtype
    assert reports[-1].loss < reports[0].loss
    assert weight_of(model[0]).dtype == torch.float64


def test_step_without_closure_is_one_plain_step_that_counts_and_is_clipped():
    model, plain = network(), network()
    clip = lambda each: nn.utils.clip_grad_norm_(each.parameters(), 1e-3)  # noqa: E731
    optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=1.0), gradient_hook=lambda: clip(model))
    base = torch.optim.SGD(plain.parameters(), lr=1.0)

    def run():
        for batch in regression_batches(3):
            for each, opt in ((model, optimizer), (plain, base)):
                opt.zero_grad()
                squared_error(each)(batch).backward()
                if opt is base:
                    clip(plain)
                assert opt.step() is None

    with pytest.warns(PlainStepWarning, match=r"rounds\(batches, objective\), or .*step\(closure\)") as caught:
        run()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert same(snapshot(model), snapshot(plain))
    assert len(optimizer.history) == 0
    assert optimizer.steps_taken == 3


def test_a_warning_points_at_a_file_beside_the_package():
    package = Path(optex.errors.__file__).parent
    beside = str(package.with_name(f"{package.name}_script.py"))
    code = compile("warn('said', RuntimeWarning)", beside, "exec")
    with pytest.warns(RuntimeWarning, match="said") as caught:
        exec(code, {"warn": optex.errors.warn})
    assert caught[0].filename == beside


def test_a_step_at_rate_zero_warns_nobody():
    # torch.distributed.checkpoint takes one, to have the optimizer make its state.
    model = network()
    optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9))
    squared_error(model)(regression_batches(1)[0]).backward()
    optimizer.step()
    assert optimizer.state


# ---------------------------------------------------------------- schedules and hooks


def test_a_scheduler_outside_ticks_once_a_round():
    model = network()
    optimizer = OptEx(adam(model.parameters()), parallelism=4)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in optimizer.rounds(regression_batches(12), squared_error(model)):
        scheduler.step()
    assert optimizer.last_report is not None
    assert optimizer.base.param_groups[0]["lr"] == 0.02 * 0.5 ** (optimizer.last_report.number + 1)


@pytest.mark.parametrize("make", [OptEx, OptEx.from_paper], ids=["verified", "paper"])
def test_a_scheduler_inside_ticks_once_a_step_taken(make):
    model, rates = network(), []
    base = adam(model.parameters())
    scheduler = LambdaLR(base, lambda step: 1 / (1 + step))
    optimizer = make(base, parallelism=4, scheduler=scheduler)
    steps = 0
    for report in optimizer.rounds(regression_batches(22), squared_error(model)):
        steps += report.accepted
        rates.append(base.param_groups[0]["lr"])
        assert scheduler.last_epoch == steps
        assert rates[-1] == pytest.approx(0.02 / (1 + steps))
    assert steps == optimizer.steps_taken >= len(rates) >= 3


def test_hooks_of_the_wrapper_run_once_a_round_and_those_of_the_base_every_step():
    model, seen = network(), []
    optimizer = OptEx.from_paper(adam(model.parameters()), parallelism=3)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.base.register_step_pre_hook(lambda *_: seen.append("base"))
    list(optimizer.rounds(regression_batches(6), squared_error(model)))
    assert seen == ["before", "base", "base", "base", "after"] * 2


def test_a_hook_that_clips_gradients_does_not_reach_the_history():
    model = network()
    optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.1))

    def clip(base, args, kwargs):
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    optimizer.base.register_step_pre_hook(clip)
    before = snapshot(model)
    list(optimizer.rounds(regression_batches(4), squared_error(model)))
    moved = torch.cat([(a - b).flatten() for a, b in zip(snapshot(model), before, strict=True)]).norm()
    assert moved <= 4 * 1e-4 * 1.001
    assert optimizer.history.gradients[:4].norm(dim=1).min() > 1e-2


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("name", ["momentum", "adam", "adam-tensor-lr", "asgd"])
def test_a_checkpoint_continues_bit_for_bit(make, name):
    batches = regression_batches(40)
    model = network()
    optimizer = make(BASES[name](list(model.parameters())))
    iterator = iter(batches)
    list(itertools.islice(optimizer.rounds(iterator, squared_error(model)), 5))

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    rest = list(iterator)
    first = [r.losses for r in optimizer.rounds(rest, squared_error(model))]

    twin = network(seed=1)
    twin.load_state_dict(saved["model"])
    continued = make(BASES[name](list(twin.parameters())))
    continued.load_state_dict(saved["optimizer"])
    second = [r.losses for r in continued.rounds(rest, squared_error(twin))]
    assert same(first, second)
    assert same(snapshot(model), snapshot(twin))
    assert_same_state(optimizer.base, continued.base)


def test_a_checkpoint_of_the_base_alone_is_taken():
    model = network()
    base = adam(model.parameters())
    plain_run(model, base, regression_batches(3))
    optimizer = OptEx(adam(model.parameters()))
    optimizer.load_state_dict(base.state_dict())
    assert_same_state(optimizer.base, base)
    assert len(optimizer.history) == 0


def test_a_checkpoint_of_another_history_is_refused_and_changes_nothing():
    model = network()
    optimizer, other = (OptEx(adam(model.parameters()), history_size=size) for size in (8, 9))
    list(optimizer.rounds(regression_batches(8), squared_error(model)))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="build it with the same history_size and"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert torch.equal(before["optex"]["history"]["gradients"], after["optex"]["history"]["gradients"])
    assert_equal_trees(before, after)


def test_state_dict_hooks_run():
    model, seen = network(), []
    optimizer = OptEx(adam(model.parameters()))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    state = optimizer.state_dict()
    assert state.pop("note") == 1
    optimizer.load_state_dict(state)
    assert seen == ["pre", "load", "loaded"]


def test_a_deep_copy_runs_on_by_itself():
    model = network()
    optimizer = OptEx(adam(model.parameters()))
    list(optimizer.rounds(regression_batches(8), squared_error(model)))
    twin_model, twin = copy.deepcopy((model, optimizer))
    for each, opt in ((model, optimizer), (twin_model, twin)):
        list(opt.rounds(regression_batches(8, seed=1), squared_error(each)))
    assert same(snapshot(model), snapshot(twin_model))
    assert not same(snapshot(model), snapshot(network()))


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("count", [1, 3, 4, 5, 11])
def test_batches_that_end_inside_a_window_are_all_used(make, count):
    model, seen = network(), set()
    optimizer = make(adam(model.parameters()))
    error = squared_error(model)

    def objective(item):
        seen.add(item[0])
        return error(item[1])

    reports = list(optimizer.rounds(enumerate(regression_batches(count)), objective))
    assert seen == set(range(count))
    if optimizer.acceptance.keeps_window or isinstance(optimizer.acceptance, Last):
        assert sum(r.accepted for r in reports) == count


def test_leaving_the_loop_keeps_the_batches_not_yet_stepped_on():
    model, batches = network(), regression_batches(13)
    optimizer = OptEx(adam(model.parameters()), acceptance=WithinTolerance(0.0), estimator=HoldLast())
    iterator, taken = iter(batches), 0
    for report in optimizer.rounds(iterator, squared_error(model)):
        taken += report.accepted
        if taken >= 3:
            break
    taken += sum(r.accepted for r in optimizer.rounds(iterator, squared_error(model)))
    assert taken == 13
    plain = network()
    assert same(snapshot(model), plain_run(plain, adam(plain.parameters()), batches)[-1])


def test_a_closure_between_rounds_leaves_the_batches_in_hand():
    model, batches = network(), regression_batches(9)
    optimizer = OptEx(adam(model.parameters()), acceptance=WithinTolerance(0.0))
    iterator = iter(batches)
    next(optimizer.rounds(iterator, squared_error(model)))
    optimizer.step(closure_of(optimizer, model, regression_batches(1, seed=3)[0]))
    assert 1 + sum(r.accepted for r in optimizer.rounds(iterator, squared_error(model))) == 9


def test_report_says_what_happened():
    model = network()
    optimizer = OptEx.from_paper(adam(model.parameters()), parallelism=4)
    first, second = itertools.islice(optimizer.rounds(regression_batches(8), squared_error(model)), 2)
    assert (first.number, second.number) == (0, 1)
    assert (second.accepted, second.evaluated, second.dropped) == (4, 4, ())
    assert second.loss == second.losses[0]
    assert len(second.relative_errors) == 3
    assert math.isnan(first.prediction_error)  # nothing to predict from
    assert len(first.relative_errors) == 0
    assert (second.drafted, second.stride) == (4, 1.0)
    assert math.isnan(second.prediction_error)  # of sampled gradients, by two rounds alone
    assert 0 < second.gradient_seconds < second.seconds
    assert second.break_even_seconds == pytest.approx(second.overhead_seconds / 3)


def test_a_round_of_one_gradient_has_no_prediction_error_and_never_breaks_even():
    model = network()
    optimizer = OptEx(adam(model.parameters()), parallelism=1)
    report = next(optimizer.rounds(regression_batches(1), squared_error(model)))
    assert math.isnan(report.prediction_error)
    assert report.break_even_seconds == math.inf


# ---------------------------------------------------------------- what is refused


def one():
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: OptEx(one()),  # pyright: ignore[reportArgumentType]
            TypeError,
            "base must be a torch.optim.Optimizer instance, got list",
        ),
        (
            lambda: OptEx(adam(one()), parallelism=0),
            ValueError,
            "parallelism must be an integer of at least 1, got 0",
        ),
        (
            lambda: OptEx(adam(one()), parallelism=2.0),  # pyright: ignore[reportArgumentType]
            ValueError,
            "parallelism must be an integer",
        ),
        (lambda: OptEx(adam(one()), parallelism=True), ValueError, "parallelism must be an integer"),
        (
            lambda: OptEx(adam(one()), history_size=0),
            ValueError,
            "history_size must be an integer of at least 1",
        ),
        (
            lambda: OptEx(adam(one()), estimator="gp"),  # pyright: ignore[reportArgumentType]
            TypeError,
            "estimator must be an optex.estimators.Estimator",
        ),
        (
            lambda: OptEx(adam(one()), acceptance="last"),  # pyright: ignore[reportArgumentType]
            TypeError,
            "acceptance must be an optex.Acceptance",
        ),
        (
            lambda: OptEx(adam(one()), evaluator=max),  # pyright: ignore[reportArgumentType]
            TypeError,
            "evaluator must be an optex.evaluators",
        ),
        (
            lambda: OptEx(adam(one()), scheduler=0.9),  # pyright: ignore[reportArgumentType]
            TypeError,
            "scheduler must be a torch.optim.lr_scheduler",
        ),
        (
            lambda: OptEx(torch.optim.LBFGS(one())),
            TypeError,
            "LBFGS cannot be the base: it evaluates its closure several times",
        ),
        (
            lambda: OptEx(torch.optim.SparseAdam(one())),
            TypeError,
            "SparseAdam cannot be the base: it takes sparse gradients only",
        ),
        (
            lambda: OptEx(adam([nn.Parameter(torch.ones(2), requires_grad=False)])),
            ValueError,
            "base has no parameter that requires a gradient",
        ),
        (
            lambda: OptEx(adam([nn.Parameter(torch.ones(2, dtype=torch.complex64))])),
            TypeError,
            "complex parameters; optimise torch.view_as_real",
        ),
        (lambda: OptEx(adam(one(), differentiable=True)), ValueError, "differentiable=True"),
        (
            lambda: OptEx(torch.optim.SGD(one(), maximize=True), acceptance=LowestLoss()),
            ValueError,
            "base was built with maximize=True",
        ),
        (
            lambda: (base := adam(one())) and OptEx(base, scheduler=ReduceLROnPlateau(base)),
            TypeError,
            "scheduler cannot be ReduceLROnPlateau",
        ),
        (lambda: OptEx(OptEx(adam(one()))), TypeError, "base is an OptEx already"),
        (
            lambda: OptEx.from_paper(adam(one()), selection="best"),  # pyright: ignore[reportArgumentType]
            ValueError,
            "selection must be one of last, lowest",
        ),
        (
            lambda: OptEx.from_paper(adam(one()), evaluate="some"),  # pyright: ignore[reportArgumentType]
            ValueError,
            "evaluate must be 'all' or 'last'",
        ),
        (
            lambda: OptEx.from_paper(adam(one()), evaluate="last", selection="lowest-loss"),
            ValueError,
            "compares all proxies; it needs evaluate='all'",
        ),
        (lambda: OptEx.from_paper(adam(one()), kernel="gauss"), ValueError, "kernel: 'gauss' is not one of"),
    ],
)
def test_bad_settings_are_named(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


class TroubleError(Exception):
    pass


def raise_trouble(theta):
    raise TroubleError("of its own")


BAD_CLOSURES = {
    "no loss": (lambda theta: None, TypeError, "closure: returned None; it must return the loss"),
    "no scalar": (lambda theta: theta * 2, ValueError, r"closure: the loss must be a scalar, got shape \(2,\)"),
    "no number": (lambda theta: "low", TypeError, "closure: must return the loss as a scalar, got str"),
    "no backward": (lambda theta: theta.sum(), ValueError, "closure: no parameter received a gradient"),
    "its own error": (raise_trouble, TroubleError, "of its own"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("case", BAD_CLOSURES)
def test_bad_closures_leave_everything_as_it_was(make, case):
    bad, kind, message = BAD_CLOSURES[case]
    theta = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = make(adam([theta]))

    def good():
        optimizer.zero_grad()
        loss = theta.square().sum()
        loss.backward()
        return loss

    optimizer.step(good)
    before, state = theta.detach().clone(), copy.deepcopy(optimizer.base.state_dict())
    with pytest.raises(kind, match=message):
        optimizer.step(lambda: bad(theta))
    assert torch.equal(theta, before)
    assert optimizer.base.state_dict()["state"][0]["step"] == state["state"][0]["step"]
    assert torch.equal(optimizer.base.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert float(optimizer.step(good)) == pytest.approx(before.square().sum().item())


def test_objectives_must_depend_on_the_parameters():
    theta = nn.Parameter(torch.ones(2))
    with pytest.raises(
        ValueError, match="objective: the loss does not depend on any parameter through autograd"
    ):
        next(OptEx(adam([theta])).rounds([None], lambda _: theta.detach().sum()))


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = OptEx(torch.optim.SGD(embedding.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="sparse gradient; OptEx needs dense ones"):
        next(optimizer.rounds([torch.tensor([1])], lambda i: embedding(i).sum()))


def test_grad_scaler_is_refused_with_the_reason():
    theta = nn.Parameter(torch.ones(2))
    optimizer, scaler = OptEx(adam([theta])), torch.amp.GradScaler("cpu")
    scaler.scale(theta.sum()).backward()
    with pytest.raises(RuntimeError, match="use bfloat16 autocast"):
        scaler.step(optimizer)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_trouble_at_the_start_of_a_round_keeps_the_last_iterate(make, bad, what):
    model = network()
    optimizer = make(adam(model.parameters()))
    error = squared_error(model)
    batches = [(i, b) for i, b in enumerate(regression_batches(40))]
    poisoned = set()

    def objective(item):
        loss = error(item[1])
        if item[0] in poisoned:
            if what == "loss":
                return loss * bad
            hurt = weight_of(model[0]) * 1.0
            hurt.register_hook(lambda gradient: gradient * bad)
            return loss + 0 * hurt.sum() + 1e-9 * hurt.square().sum()
        return loss

    rounds = optimizer.rounds(iter(batches), objective)
    for _ in range(3):
        next(rounds)
    before, state = snapshot(model), copy.deepcopy(optimizer.base.state_dict())
    poisoned.update(range(40))
    with pytest.raises(NonFiniteError, match=rf"the {what}.* at the start of round 3 is not finite"):
        next(rounds)
    assert same(snapshot(model), before)
    assert optimizer.base.state_dict()["param_groups"] == state["param_groups"]
    for key, entries in state["state"].items():
        assert all(torch.equal(v, optimizer.base.state_dict()["state"][key][k]) for k, v in entries.items())
    assert optimizer.history.gradients.isfinite().all()
    poisoned.clear()
    assert list(optimizer.rounds(batches[20:30], objective))[-1].loss < 10


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("where", [1, 3])
def test_trouble_at_a_proxy_drops_that_proxy(make, where):
    model = network()
    optimizer = make(adam(model.parameters()))
    error, calls = squared_error(model), itertools.count()

    def objective(batch):
        call = next(calls)
        return error(batch) * (math.nan if call == 16 + where else 1.0)

    reports = list(itertools.islice(optimizer.rounds(regression_batches(60), objective), 8))
    assert reports[4].dropped == (where,)
    position = round(where * (reports[4].drafted - 1) / 3)
    assert reports[4].accepted <= (position if optimizer.acceptance.keeps_window else 4)
    assert all(r.dropped == () for i, r in enumerate(reports) if i != 4)
    assert optimizer.history.gradients.isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())
    assert reports[-1].loss < reports[0].loss


def test_steps_that_leave_the_numbers_are_undone():
    theta = nn.Parameter(torch.ones(2))
    optimizer = OptEx(torch.optim.SGD([theta], lr=1e38))
    with pytest.raises(
        NonFiniteError, match=r"round 0 led to parameters that are not finite.*Lower the learning rate"
    ):
        next(optimizer.rounds([None], lambda _: 1e3 * theta.sum()))
    assert torch.equal(theta, torch.ones(2))


# ---------------------------------------------------------------- a round that fails


def poisoned_at(numbers):
    return [(x, y * math.nan if i in numbers else y) for i, (x, y) in enumerate(regression_batches(12))]


def test_nothing_of_a_failed_round_is_kept_and_its_gradients_are_counted():
    # The last step of the replay leaves the numbers: by then the pairs were remembered.
    theta = nn.Parameter(torch.ones(2))
    optimizer = OptEx(
        torch.optim.SGD([theta], lr=1e38), parallelism=3, estimator=HoldLast(), on_nonfinite="skip"
    )
    objective = lambda batch: batch * theta.sum()  # noqa: E731
    rounds = optimizer.rounds([0.0, 1e-38, 1e3, 1e3, 1.0, 1.0], objective)
    with pytest.warns(RuntimeWarning, match="led to parameters that are not finite"):
        reports = [report for report, _ in zip(rounds, range(3), strict=False)]
    failed = next(report for report in reports if not report.accepted)
    assert failed.evaluated == 3
    kept = sum(report.evaluated for report in reports[: failed.number])
    assert len(optimizer.history) <= kept + sum(r.evaluated for r in reports[failed.number + 1 :])
    assert theta.isfinite().all()


def test_a_failed_round_leaves_the_state_dict_as_it_was():
    class Breaking(WithinTolerance):
        breaks = False

        def replay(self, record):
            kept = super().replay(record)
            if self.breaks:
                raise KeyboardInterrupt
            return kept

    model = network()
    optimizer = OptEx(adam(model.parameters()), model=model, acceptance=Breaking())
    rounds = optimizer.rounds(regression_batches(40), squared_error(model))
    for _ in range(3):
        next(rounds)
    before, start = copy.deepcopy(optimizer.state_dict()), snapshot(model)

    Breaking.breaks = True  # OptEx has a copy of the rule
    with pytest.raises(KeyboardInterrupt):
        next(optimizer.rounds(regression_batches(8, seed=1), squared_error(model)))
    after = copy.deepcopy(optimizer.state_dict())
    for state in (before, after):  # batches were drawn, and their steps have their random numbers
        for name in ("window", "batches_drawn"):
            del state["optex"][name]
    assert_equal_trees(before, after)
    assert same(snapshot(model), start)


def test_an_error_names_the_point_that_was_evaluated():
    model = network()
    optimizer = OptEx.from_paper(adam(model.parameters()), parallelism=4, evaluate="last")
    rounds = optimizer.rounds(poisoned_at([7]), squared_error(model))
    next(rounds)
    with pytest.raises(NonFiniteError, match=r"at proxy 3 of round 1 .*Check the batch.*\(Step 7, batch 7, "):
        next(rounds)
    left = list(optimizer.rounds([], squared_error(model)))
    assert sum(report.accepted for report in left) == 3  # batches 4 to 6 wait; 7 is gone


# ---------------------------------------------------------------- sampled or deterministic


@pytest.mark.parametrize(
    ("batches", "objective", "message"),
    [
        (5, torch.sum, r"OptEx.rounds: batches must be iterable, got int; hand over a list or a DataLoader"),
        ([None], 3, r"OptEx.rounds: objective must be a function of a batch .*, got int"),
    ],
)
def test_rounds_name_what_cannot_be_iterated_or_called(batches, objective, message):
    with pytest.raises(TypeError, match=message):
        OptEx(adam([nn.Parameter(torch.ones(2))])).rounds(batches, objective)


def drawing_closure(optimizer, model, batches):
    batches = iter(batches)

    def closure():
        optimizer.zero_grad()
        loss = squared_error(model)(next(batches))
        loss.backward()
        return loss

    return closure


def test_a_closure_counts_as_sampled_unless_declared():
    model = network()
    optimizer = OptEx(adam(model.parameters()))
    optimizer.step(drawing_closure(optimizer, model, regression_batches(8)))
    assert optimizer.history.is_sampled
    declared = OptEx(adam(model.parameters()), deterministic=True)
    declared.step(closure_of(declared, model, regression_batches(1)[0]))
    assert not declared.history.is_sampled
    assert declared.last_report is not None
    assert declared.last_report.evaluated == 2  # the start, once more to see whether it is true


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_the_evaluation_that_checks_a_declaration_is_counted(lr):
    # At rate 0 all proxies are one point, and the check costs nothing more.
    p = nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([p], lr=lr, weight_decay=0.1)
    optimizer = OptEx(sgd, acceptance=Last(), deterministic=True)
    asked = []

    def objective(batch):
        asked.append(batch)
        return p.square().sum()

    evaluated = [report.evaluated for report in optimizer.rounds([None] * 8, objective)]
    assert evaluated == [4 if lr == 0 else 5, 4]
    assert len(asked) == sum(evaluated)


def test_a_declaration_that_does_not_hold_is_said_once_and_dropped():
    model = network()
    optimizer = OptEx(adam(model.parameters()), deterministic=True)
    closure = drawing_closure(optimizer, model, regression_batches(80))

    def four_rounds():
        for _ in range(4):
            optimizer.step(closure)

    with pytest.warns(NotDeterministicWarning, match="losses at one point were .* count as sampled") as caught:
        four_rounds()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert optimizer.history.is_sampled


def test_dropout_contradicts_a_declaration():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    optimizer = OptEx(adam(model.parameters()), deterministic=True)
    with pytest.warns(NotDeterministicWarning):
        list(optimizer.rounds(regression_batches(1) * 8, squared_error(model)))


@pytest.mark.parametrize("make", [OptEx, OptEx.from_paper], ids=["verified", "paper"])
def test_a_declaration_that_holds_is_silent(make):
    model = network()
    optimizer = make(adam(model.parameters()), stride=1, deterministic=True)
    reports = list(optimizer.rounds(regression_batches(1) * 30, squared_error(model)))
    assert sum(report.accepted for report in reports) == 30


# ---------------------------------------------------------------- buffers of whom


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.double()

    def forward(self, batch):
        return (self.last(self.norm(self.first(batch[0]))) - batch[1]).square().mean()


def test_buffers_are_those_of_the_module_that_rounds_is_given():
    first, second = Normed(), Normed()
    optimizer = OptEx(adam([*first.parameters(), *second.parameters()]))
    for model in (first, second):
        list(optimizer.rounds(regression_batches(8), model))
        assert model.norm.num_batches_tracked == 8


# ---------------------------------------------------------------- bases that freeze state


class Preconditioned(torch.optim.Optimizer):
    """Scales by a running mean of squared gradients that drafts leave alone."""

    def __init__(self, params, lr, note):
        super().__init__(params, {"lr": lr})
        self.frozen, self.note = False, note

    @contextlib.contextmanager
    def drafting(self):
        self.frozen = True
        try:
            yield
        finally:
            self.frozen = False

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                curvature = state.setdefault("curvature", torch.ones_like(p))
                if self.frozen:
                    self.note("draft")
                else:
                    self.note("update")
                    curvature.mul_(0.9).add_(p.grad.square(), alpha=0.1)
                p.sub_(group["lr"] * p.grad / curvature.sqrt())


def test_a_base_freezes_what_it_says_while_drafting():
    plain, model = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
    model.load_state_dict(plain.state_dict())
    batches = [(x[:, :3], y[:, :1]) for x, y in regression_batches(20)]
    plainly, ours = [], []
    base = Preconditioned(plain.parameters(), 0.05, plainly.append)
    plain_run(plain, base, batches)
    twin = Preconditioned(model.parameters(), 0.05, ours.append)
    optimizer = OptEx(twin, acceptance=WithinTolerance(0.0))
    list(optimizer.rounds(batches, squared_error(model)))
    assert_same_state(twin, base)
    assert "draft" in ours
    assert ours.count("update") == len(plainly)  # replayed steps alone


def test_steps_kept_without_a_gradient_of_their_own_freeze_it_too():
    model, notes = nn.Linear(3, 1).double(), []
    batches = [(x[:, :3], y[:, :1]) for x, y in regression_batches(1)] * 12
    base = Preconditioned(model.parameters(), 0.01, notes.append)
    optimizer = OptEx(base, parallelism=1, stride=4, deterministic=True)
    reports = list(optimizer.rounds(batches, squared_error(model)))
    assert sum(report.accepted for report in reports) > len(reports)
    assert notes.count("update") == 2 * len(reports)  # two parameters; the first step has the round's gradient


class Counting(torch.optim.Optimizer):
    """Keeps its count of steps, and a running mean, where torch's optimizers would not."""

    def __init__(self, params, lr, keep):
        super().__init__(params, {"lr": lr})
        self.keep = keep(sum(p.numel() for group in self.param_groups for p in group["params"]))

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        flat = torch.cat([p.grad.reshape(-1) for group in self.param_groups for p in group["params"]])
        self.keep, rate = self.advanced(flat)
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * rate * p.grad)

    def advanced(self, flat):
        if isinstance(self.keep, int):
            return self.keep + 1, 1 / self.keep**0.5
        if isinstance(self.keep, torch.Tensor):
            self.keep.mul_(0.9).add_(flat, alpha=0.1)
            return self.keep, float(1 / (1 + self.keep.norm()))
        if isinstance(self.keep, list):
            self.keep.append(float(flat.norm()))
            return self.keep, 1 / len(self.keep)
        self.keep.count += 1
        return self.keep, 1 / self.keep.count


class Count:
    def __init__(self, _):
        self.count = 1


@pytest.mark.parametrize("keep", [lambda d: 1, lambda d: torch.zeros(d, dtype=torch.float64), lambda d: []])
def test_what_a_base_keeps_outside_its_state_is_put_back(keep):
    batches = regression_batches(15)
    plain, model = network(), network()
    trajectory = plain_run(plain, Counting(plain.parameters(), 0.05, keep), batches)
    base = Counting(model.parameters(), 0.05, keep)
    optimizer = OptEx(base, acceptance=WithinTolerance(0.0))
    for _ in optimizer.rounds(batches, squared_error(model)):
        assert same(snapshot(model), trajectory[optimizer.steps_taken - 1])
    assert optimizer.steps_taken == 15


def test_what_cannot_be_put_back_is_refused_by_name():
    model = network()
    optimizer = OptEx(Counting(model.parameters(), 0.05, Count), acceptance=WithinTolerance(0.0))
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"Counting changes its attribute 'keep' \(Count\) in place"):
        list(optimizer.rounds(regression_batches(15), squared_error(model)))
    assert same(snapshot(model), before)


def test_state_that_is_no_dict_is_refused():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p] = [1]

    model = network()
    optimizer = OptEx(Odd(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="Odd keeps a list as the state of a parameter"):
        list(optimizer.rounds(regression_batches(8), squared_error(model)))


# ---------------------------------------------------------------- what is done to the model behind our back


def test_parameters_of_another_kind_are_refused_by_name():
    model = network(dtype=torch.float32)
    optimizer = OptEx(adam(model.parameters()))
    batches = regression_batches(8, dtype=torch.float32)
    list(optimizer.rounds(batches, squared_error(model)))
    model.double()
    with pytest.raises(TypeError, match=r"parameter 0 was of torch.float32 on cpu .*is of torch.float64"):
        next(optimizer.rounds(regression_batches(8), squared_error(model)))
    model.float()
    weight_of(model[0]).data = torch.zeros(5, 7)
    with pytest.raises(ValueError, match="parameter 0 held 30 numbers when OptEx was built and holds 35 now"):
        next(optimizer.rounds(batches, squared_error(model)))


def test_nothing_to_optimise_is_refused():
    with pytest.raises(ValueError, match="no parameter that requires a gradient and holds a number"):
        OptEx(torch.optim.SGD([nn.Parameter(torch.zeros(0))], lr=0.1))


@pytest.mark.parametrize("way", ["closure", "objective"])
def test_an_iterator_that_ends_in_the_objective_is_named(way):
    model = network()
    optimizer, batches = OptEx(adam(model.parameters())), iter(regression_batches(2))
    error = squared_error(model)
    actions = {
        "closure": lambda: optimizer.step(drawing_closure(optimizer, model, regression_batches(2))),
        "objective": lambda: next(optimizer.rounds(range(9), lambda _: error(next(batches)))),
    }
    with pytest.raises(RuntimeError, match="raised StopIteration: an iterator that it draws from has ended"):
        actions[way]()


def test_a_history_that_cannot_be_fitted_holds_the_last_gradient():
    class Failing(HoldLast):
        def fit(self, history):
            if history.appended == 12:
                raise NotPositiveDefiniteError("kernel matrix of size 12")
            return super().fit(history)

    model, twin = network(), network()
    failing = OptEx(adam(model.parameters()), estimator=Failing())
    whole = OptEx(adam(twin.parameters()), estimator=HoldLast())
    with pytest.warns(JitterWarning, match="kernel matrix of size 12. The last gradient is held"):
        list(failing.rounds(regression_batches(30), squared_error(model)))
    list(whole.rounds(regression_batches(30), squared_error(twin)))
    assert same(snapshot(model), snapshot(twin))


class TestRoundsHaveALength:
    def test_it_is_at_least_what_is_made_and_exact_at_the_end(self):
        model = network()
        optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.05), parallelism=4)
        rounds = optimizer.rounds(regression_batches(22), squared_error(model))
        assert len(rounds) == 6  # 22 batches, four a round
        lengths = [len(rounds) for _ in rounds]
        made = len(lengths)
        assert len(rounds) == made
        assert sorted(lengths) == lengths
        assert all(6 <= length <= made for length in lengths)

    def test_batches_left_by_an_earlier_loop_count(self):
        model = network()
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        acceptance = WithinTolerance(0)  # one step a round: the others wait
        optimizer = OptEx(base, parallelism=4, acceptance=acceptance)
        first = optimizer.rounds(regression_batches(4), squared_error(model))
        next(first)
        first.close()
        assert len(first) == 1
        assert len(optimizer.rounds(regression_batches(5), squared_error(model))) == 2  # 3 + 5 batches

    def test_without_a_length_of_the_batches_there_is_none(self):
        model = network()
        optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.05))
        rounds = optimizer.rounds(iter(regression_batches(8)), squared_error(model))
        with pytest.raises(TypeError, match=r"rounds: batches are a \w+, which has no length; hand over"):
            len(rounds)
        assert len(list(rounds)) == len(rounds)


class TestEvaluatorByName:
    def test_vectorized_is_that_of_the_model(self):
        losses = []
        for by_name in (True, False):
            model = network()
            evaluator = "vectorized" if by_name else VectorizedEvaluator(model)
            base = torch.optim.SGD(model.parameters(), lr=0.05)
            optimizer = OptEx(base, parallelism=4, model=model, evaluator=evaluator)
            losses.append([r.loss for r in optimizer.rounds(regression_batches(20), squared_error(model))])
        assert losses[0] == losses[1]

    def test_sequential_is_the_default(self):
        model = network()
        optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.05), evaluator="sequential")
        assert isinstance(optimizer.evaluator, SequentialEvaluator)

    @pytest.mark.parametrize(("name", "message"), [("vectorized", "say which: model=model"), ("ray", "'ray'")])
    def test_what_it_cannot_be_is_refused(self, name, message):
        model = network()
        with pytest.raises(ValueError, match=f"OptEx: evaluator .*{message}"):
            OptEx(torch.optim.SGD(model.parameters(), lr=0.05), evaluator=name)


def test_its_representation_is_a_few_lines():
    model = network()
    groups: list[dict[str, Any]] = [{"params": [p]} for p in model.parameters()]
    groups[0]["lr"] = 0.5
    optimizer = OptEx(torch.optim.SGD(groups, lr=0.05), parallelism=3)
    list(optimizer.rounds(regression_batches(3), squared_error(model)))
    lines = repr(optimizer).splitlines()
    count = sum(p.numel() for p in model.parameters())
    assert lines[0] == f"OptEx(SGD, lr 0.5 or 0.05, {len(groups)} tensors of {count} numbers"
    assert lines[1].strip() == "parallelism=3, history_size=16, CommitteeEstimator of 6"
    assert lines[2].strip().startswith("WithinTolerance(")
    assert lines[3].strip() == "3 steps taken, 3 batches drawn)"
    assert max(map(len, lines)) <= 80
