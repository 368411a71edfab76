"""``optex.advise``: measured on the user's own loop, everything put back, advice that follows from it."""

import io
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from typer.testing import CliRunner

import optex
from optex.advice.candidate import Candidate
from optex.advice.function import BATCHES
from optex.advice.judge import judge
from optex.advice.text import candidates_table
from optex.advice.timing import PlainLoop
from optex.studies import cli
from tests.models import network, regression_batches, squared_error

SHORT = {"seconds": 0.5, "quiet": True}
# Time for all rounds, wherever this runs; they end when they are done.
ALL = {"seconds": 40, "quiet": True}


def everything(base, modules, scheduler=None, optimizer=None):
    """All that has to be put back, in a form that torch.equal and == compare to the bit."""
    kept = {
        "base": base.state_dict(),
        "parameters": [p.detach() for group in base.param_groups for p in group["params"]],
        "grads": [p.grad for module in modules for p in module.parameters()],
        "buffers": [buffer for module in modules for buffer in module.buffers()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
        "schedule": None if scheduler is None else scheduler.state_dict(),
        "stepped": getattr(base, "_opt_called", None),
        "optex": None if optimizer is None else optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def loop_with_everything():
    """Adam with a schedule, BatchNorm, dropout, draws of three kinds, a frozen parameter with a gradient."""
    torch.manual_seed(0)
    first = nn.Linear(6, 5)
    model = nn.Sequential(first, nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3)).double()
    other = nn.Linear(3, 3).double()  # in the loss, and not optimised
    other.weight.grad = torch.ones_like(other.weight)
    first.weight.grad = torch.ones_like(first.weight)
    base = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = LambdaLR(base, lambda step: 0.9**step)

    def objective(batch):
        noise = random.random() + np.random.rand()
        return (other(model(batch[0])) - batch[1]).square().mean() + 1e-6 * noise

    whole = nn.ModuleList([model, other])
    return base, schedule, objective, whole


@contextmanager
def put_back(optimizer, whole, schedule):
    """What the block changes it has to put back."""
    base = optimizer.base if isinstance(optimizer, optex.OptEx) else optimizer
    given = optimizer if isinstance(optimizer, optex.OptEx) else None
    random.seed(1)
    np.random.seed(2)
    before = everything(base, [whole], schedule, given)
    grads = [p.grad for p in whole.parameters()]
    yield
    assert equal(before, everything(base, [whole], schedule, given))
    assert all(p.grad is grad for p, grad in zip(whole.parameters(), grads, strict=True))


class TestPutsBack:
    def test_of_a_plain_optimizer(self):
        base, schedule, objective, whole = loop_with_everything()
        with put_back(base, whole, schedule):
            advice = optex.advise(base, regression_batches(30), objective, model=whole, **SHORT)
        assert "BatchNorm" in advice.refused["vectorized"]
        assert not base.state  # it had taken no step

    def test_of_an_optimizer_under_way(self):
        base, schedule, objective, whole = loop_with_everything()
        for batch in regression_batches(3):
            objective(batch).backward()
            base.step()
            schedule.step()
        with put_back(base, whole, schedule):
            optex.advise(base, regression_batches(30), objective, model=whole, **SHORT)

    def test_of_an_optex_with_history_window_and_schedule(self):
        base, schedule, objective, whole = loop_with_everything()
        optimizer = optex.OptEx(base, parallelism=3, scheduler=schedule, model=whole)
        for report in optimizer.rounds(regression_batches(30), objective):
            if report.number == 4:
                break
        drawn, last = optimizer.batches_drawn, optimizer.last_report
        with put_back(optimizer, whole, schedule):
            advice = optex.advise(optimizer, regression_batches(30), objective, model=whole, **SHORT)
        assert advice.as_kwargs()["scheduler"] is schedule
        assert (optimizer.batches_drawn, optimizer.last_report) == (drawn, last)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("after", [0, 1, 5, 40, 90])
    def test_whatever_ends_it(self, error, after):
        base, schedule, objective, whole = loop_with_everything()
        optimizer = optex.OptEx(base, scheduler=schedule, model=whole)
        calls = []

        def failing(batch):
            calls.append(1)
            loss = objective(batch)
            if len(calls) > after:
                raise error("enough")
            return loss

        with put_back(optimizer, whole, schedule), pytest.raises(error, match="enough"):
            optex.advise(optimizer, regression_batches(30), failing, model=whole, **ALL)

    def test_where_the_batches_fail(self):
        base, schedule, objective, whole = loop_with_everything()

        def batches():
            yield from regression_batches(3)
            torch.rand(3)
            raise OSError("no more")

        with put_back(base, whole, schedule), pytest.raises(OSError, match="no more"):
            optex.advise(base, batches(), objective, model=whole, **ALL)

    def test_the_generator_that_a_loader_shuffles_by(self):
        base, schedule, objective, whole = loop_with_everything()
        data = torch.utils.data.TensorDataset(
            *(torch.cat(part) for part in zip(*regression_batches(4), strict=True))
        )
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
        with put_back(base, whole, schedule):
            advice = optex.advise(base, loader, objective, model=whole, **SHORT)
        assert advice.batches_drawn == BATCHES


class TestAdvice:
    def test_against_it_where_gradients_are_free_and_worthless(self):
        torch.manual_seed(0)
        model = nn.Linear(3, 1, bias=False)
        batches = [torch.randn(3) for _ in range(40)]
        base = torch.optim.SGD(model.parameters(), lr=1e-3)
        advice = optex.advise(base, batches, lambda x: (model.weight[0] * x).sum(), model=model, **ALL)
        assert advice.recommended is None
        assert "stay with SGD" in advice.reason
        assert advice.as_kwargs() == {"parallelism": 1, "stride": 1, "model": model}
        assert [c.parallelism for c in advice.candidates if c.evaluator == "sequential"] == [1, 4, 8]
        assert "vectorized" in advice.at_once

    def test_for_strides_where_a_smooth_gradient_is_dear(self):
        theta = nn.Parameter(torch.linspace(1, 3, 20))

        def objective(_):
            time.sleep(0.04)
            return (torch.linspace(0.5, 2, 20) * theta.square()).sum()

        printed = io.StringIO()
        base = torch.optim.Adam([theta], lr=0.01)
        advice = optex.advise(base, [None], objective, deterministic=True, seconds=6, file=printed)
        assert advice.batches_drawn == 1
        assert advice.recommended is not None
        assert advice.recommended.relative_time < 0.5
        assert advice.recommended.break_even_seconds < 0.04
        assert advice.candidates[0].parallelism == 1
        assert advice.candidates[0].steps > 4
        assert advice.candidates[0].prediction_error < 0.5
        assert advice.refused["vectorized"] == "needs the model: pass model="
        text = printed.getvalue()
        assert text == f"{advice}\n"
        assert "use OptEx with parallelism=" in text
        assert "L-BFGS" in text
        optimizer = optex.OptEx(base, **advice.as_kwargs())
        assert optimizer.deterministic
        assert next(optimizer.rounds([None], objective)).accepted == 1

    def test_none_where_the_time_is_too_short(self):
        theta = nn.Parameter(torch.ones(3))

        def objective(_):
            time.sleep(0.05)
            return theta.square().sum()

        base = torch.optim.Adam([theta], lr=0.01)
        advice = optex.advise(base, [None], objective, deterministic=True, seconds=0.05, quiet=True)
        assert advice.recommended is None
        assert advice.candidates == ()
        assert "Ask again with seconds=" in advice.reason
        assert advice.at_once["sequential"].keys() == {1, 2, 4, 8}

    def test_the_text_is_legible(self):
        model = network()
        base = torch.optim.Adam(model.parameters(), lr=1e-3)
        text = str(optex.advise(base, regression_batches(24), squared_error(model), model=model, **ALL))
        assert max(map(len, text.splitlines())) <= 80
        assert text.isascii()
        assert text.startswith("Adam, lr 0.001, 53 parameters, sampled gradients\n")
        assert "\n in turn " in text
        assert "\n vectorized " in text
        assert "\nAdvice: " in text

    def test_as_a_record(self):
        model = network()
        base = torch.optim.Adam(model.parameters(), lr=1e-3)
        advice = optex.advise(base, regression_batches(24), squared_error(model), model=model, **ALL)
        record = json.loads(json.dumps(advice.as_dict()))
        assert record["dimension"] == 53
        assert len(record["candidates"]) == len(advice.candidates)
        assert record["candidates"][0]["seconds_per_step"] == advice.candidates[0].seconds_per_step
        assert record["at_once"]["sequential"]["4"] == advice.at_once["sequential"][4]


class TestEvaluators:
    def test_what_vmap_cannot_do_is_said(self):
        model = network()

        def objective(batch):
            error = squared_error(model)(batch)
            return error if error.item() > -1 else -error

        advice = optex.advise(
            torch.optim.SGD(model.parameters(), 0.01), regression_batches(24), objective, model=model, **SHORT
        )
        assert "vmap" in advice.refused["vectorized"]
        assert list(advice.at_once) == ["sequential"]
        assert "vectorized: no, " in str(advice)

    def test_a_model_that_is_not_the_objectives_is_found_out(self):
        model, other = network(), network(1)
        base = torch.optim.SGD([*model.parameters(), *other.parameters()], 0.01)
        both = nn.ModuleList([model, other])
        hidden = list(model.parameters())

        def objective(batch):  # past the modules: vmap swaps what is never read
            x = torch.tanh(batch[0] @ hidden[0].T + hidden[1])
            return (x @ hidden[2].T + hidden[3] - batch[1]).square().mean()

        advice = optex.advise(base, regression_batches(24), objective, model=both, **SHORT)
        assert "not those in turn" in advice.refused["vectorized"]

    def test_dropout_is_vectorized_with_draws_of_its_own(self):
        model = nn.Sequential(network(), nn.Dropout(0.1))
        base = torch.optim.SGD(model.parameters(), 0.01)
        advice = optex.advise(base, regression_batches(24), squared_error(model), model=model, **SHORT)
        assert advice.at_once["vectorized"].keys() <= {1, 2, 4, 8}
        chosen = replace(advice, recommended=candidate(parallelism=4, evaluator="vectorized")).as_kwargs()
        assert chosen["evaluator"].randomness == "different"

    def test_workers_are_measured_where_asked_for(self):
        model = network()
        base = torch.optim.SGD(model.parameters(), 0.01)
        with ThreadPoolExecutor(2) as threads:
            advice = optex.advise(
                base, regression_batches(24), squared_error(model), model=model, workers=threads, **SHORT
            )
        assert "workers" in advice.at_once

    def test_what_cannot_be_sent_to_workers_is_said(self):
        model = network()

        class Stays:
            def __reduce__(self):
                raise TypeError("it stays here")

        stays = Stays()

        def objective(batch):
            assert stays
            return squared_error(model)(batch)

        base = torch.optim.SGD(model.parameters(), 0.01)
        advice = optex.advise(base, regression_batches(24), objective, workers=1, **SHORT)
        assert "it stays here" in advice.refused["workers"]
        assert "workers" not in advice.at_once

    def test_an_optexs_own_evaluator_is_one_of_them(self):
        model = network()

        class Other(optex.Evaluator):
            def evaluate(self, request):
                return optex.SequentialEvaluator().evaluate(request)

        for evaluator, named in ((Other(), "Other"), (optex.VectorizedEvaluator(model), "vectorized")):
            optimizer = optex.OptEx(torch.optim.SGD(model.parameters(), 0.01), evaluator=evaluator)
            advice = optex.advise(optimizer, regression_batches(24), squared_error(model), **SHORT)
            assert named in advice.at_once


class TestArguments:
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.01)

    @pytest.mark.parametrize(
        ("changed", "error", "message"),
        [
            ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer or an optex.OptEx"),
            ({"batches": 3}, TypeError, "batches must be iterable, got int"),
            ({"batches": []}, ValueError, "batches gave 0, and 24 are needed"),
            ({"batches": iter(regression_batches(23))}, ValueError, "batches gave 23, and 24 are needed"),
            ({"objective": 3}, TypeError, "objective must be a function of a batch"),
            ({"model": "model"}, TypeError, "model must be the torch.nn.Module"),
            ({"deterministic": 1}, TypeError, "deterministic must be True or False"),
            ({"quiet": None}, TypeError, "quiet must be True or False"),
            ({"seconds": 0}, ValueError, "seconds must be a positive, finite number"),
            ({"seconds": math.inf}, ValueError, "seconds must be a positive, finite number"),
            ({"seconds": "1"}, ValueError, "seconds must be a positive, finite number"),
            ({"workers": 0}, ValueError, "workers must be at least 1"),
        ],
    )
    def test_bad_ones_are_refused_by_name(self, changed, error, message):
        arguments = {
            "optimizer": self.base,
            "batches": regression_batches(24),
            "objective": squared_error(self.model),
            **SHORT,
            **changed,
        }
        with pytest.raises(error, match=message):
            optex.advise(**arguments)

    def test_optimizers_that_cannot_be_a_base_are_refused(self):
        with pytest.raises(TypeError, match="LBFGS"):
            optex.advise(torch.optim.LBFGS(self.model.parameters()), [None], lambda _: torch.zeros(()), **SHORT)

    def test_a_loss_that_is_not_finite_is_refused(self):
        objective = squared_error(self.model)
        with pytest.raises(optex.NonFiniteError, match="start elsewhere"):
            optex.advise(self.base, regression_batches(24), lambda batch: objective(batch) * math.nan, **SHORT)

    @pytest.mark.filterwarnings("error")
    def test_a_loss_that_is_no_number_contradicts_no_declaration(self):
        theta = nn.Parameter(torch.ones(3))
        base = torch.optim.Adam([theta], lr=0.1)
        with pytest.raises(optex.NonFiniteError, match="start elsewhere"):
            optex.advise(base, [None], lambda _: (theta * math.nan).sum(), deterministic=True, quiet=True)

    def test_a_declaration_that_does_not_hold_is_said(self):
        def objective(_):
            return squared_error(self.model)(regression_batches(1)[0]) * torch.rand(())

        with pytest.warns(optex.NotDeterministicWarning, match="the losses at one point were"):
            advice = optex.advise(self.base, regression_batches(24), objective, deterministic=True, **SHORT)
        assert not advice.deterministic
        assert "deterministic" not in advice.as_kwargs()

    def test_a_source_of_gradients_declares_for_itself(self):
        source = optex.AccumulatingSource(squared_error(self.model), list(self.model.parameters()))
        batches = [regression_batches(2, seed) for seed in range(24)]
        advice = optex.advise(self.base, batches, source, model=self.model, **SHORT)
        assert not advice.deterministic
        assert "cannot be vectorized" in advice.refused["vectorized"]


# ---------------------------------------------------------------------- the rule


def candidate(**changed):
    settings = {
        "parallelism": 1,
        "stride": "auto",
        "evaluator": "sequential",
        "rounds": 32,
        "steps": 4.0,
        "stride_reached": 4.0,
        "prediction_error": 0.2,
        "gradient_seconds": 0.1,
        "overhead_seconds": 0.05,
        "plain_gradient_seconds": 0.1,
        "plain_step_seconds": 0.01,
        "memory_bytes": 1000,
    }
    return Candidate(**{**settings, **changed})


def test_the_widest_row_fits():
    widest = candidate(
        parallelism=8,
        evaluator="AnEvaluatorOfOnesOwn",
        rounds=12,
        steps=128.0,
        stride_reached=16.0,
        prediction_error=math.inf,
        gradient_seconds=0.0999,
        overhead_seconds=0.0999,
        memory_bytes=999_000_000,
    )
    lines = candidates_table([widest, candidate(prediction_error=math.nan, overhead_seconds=1e-5)], widest)
    assert max(map(len, lines)) <= 80
    assert " *8  AnEvaluato " in lines[3]


class TestRule:
    loop = PlainLoop(0.1, 0.01, 0)

    def test_numbers_of_a_candidate(self):
        found = candidate()
        assert found.seconds_per_step == pytest.approx(0.15 / 4)
        assert found.relative_time == pytest.approx(0.15 / 4 / 0.11)
        assert found.gradient_ratio == 1
        # g + 0.05 = 4 (g + 0.01)
        assert found.break_even_seconds == pytest.approx(0.01 / 3)
        assert candidate(steps=1.0).break_even_seconds == math.inf
        assert candidate(steps=1.0, overhead_seconds=0.0).break_even_seconds == 0

    def test_the_quickest_is_recommended(self):
        slow, quick = candidate(), candidate(parallelism=8, evaluator="vectorized", steps=16.0)
        chosen, reason = judge([slow, quick], self.loop, "Adam", 1.0)
        assert chosen is quick
        assert "parallelism=8, vectorized. It takes 16.0 steps a round" in reason

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"steps": 1.4}, "would save 3%"),
            ({"overhead_seconds": 5.0}, "too cheap: it takes 100 ms, and a round of OptEx 5.00 s"),
            ({"steps": 1.0, "prediction_error": 0.9}, "off by 90%, too wrong"),
            ({"steps": 1.0, "prediction_error": math.inf}, "nothing in common"),
            ({"steps": 1.0, "prediction_error": math.nan}, "took 1.0 steps for its gradient."),
        ],
    )
    def test_the_reason_against_is_the_one_that_counts(self, changed, said):
        chosen, reason = judge([candidate(**changed)], self.loop, "Adam", 1.0)
        assert chosen is None
        assert reason.startswith("don't: stay with Adam.")
        assert said in reason

    def test_nothing_at_once_is_one_of_them(self):
        at_once = candidate(parallelism=4, gradient_seconds=0.4, steps=4.0)
        _, reason = judge([candidate(steps=1.0, prediction_error=0.9), at_once], self.loop, "Adam", 1.0)
        assert "4 gradients take 4.0 times as long as one, for 4.0 steps" in reason


# ---------------------------------------------------------------------- the command


def run(*arguments):
    return CliRunner().invoke(cli.app, ["advise", *arguments], env={"COLUMNS": "80", "TERM": "dumb"})


class TestCommand:
    def test_prints_and_writes(self, tmp_path):
        path = tmp_path / "new" / "advice.json"
        flags = ["--lr", "0.05", "--set", "size=6", "--seconds", "0.5", "--json", str(path)]
        result = run("heat", *flags)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("Adam, lr 0.05, 36 parameters, deterministic gradients\n")
        assert max(map(len, result.stdout.splitlines())) <= 80
        document = json.loads(path.read_text())
        assert document["problem"] == "heat"
        assert document["options"]["size"] == 6
        assert document["at_once"]["sequential"]["1"] > 0

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nope"], "problem: 'nope' is not one of"),
            (["sphere", "--optimizer", "nope"], "--optimizer: 'nope' is not one of"),
            (["sphere", "--lr", "0"], "--lr: must be positive"),
            (["sphere", "--seconds", "0"], "--seconds: must be positive"),
            (["sphere", "--set", "dim=3"], "--set: dim has an option of its own"),
            (["heat", "--set", "model=cnn"], "heat has no model to choose"),
            (["sphere", "--threads", "0"], "--threads: must be an integer of at least 1"),
            (["sphere", "--json", "."], "--json: . is a folder"),
        ],
    )
    def test_a_mistake_is_one_line_and_exit_code_two(self, arguments, message):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
