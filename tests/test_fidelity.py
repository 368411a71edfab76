"""What a training loop does beside stepping: with tolerance 0 all of it is the plain loop's, bit for bit."""

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

from optex import AccumulatingSource, NonFiniteError, NonFiniteWarning, OptEx, WithinTolerance
from optex.round.acceptance import Last
from optex.studies.problems import make_problem
from tests.models import (
    assert_equal_trees,
    assert_same_state,
    network,
    regression_batches,
    same,
    snapshot,
    squared_error,
)


class Normed(nn.Module):
    """Convolution, BatchNorm, dropout: every kind of state and draw."""

    def __init__(self, seed=0, dropout=0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv1d(1, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(16, 3)
        self.register_buffer("data", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.output(self.dropout(torch.tanh(self.norm(self.convolution(x[:, None])))).flatten(1))


def batches_of(count):
    return regression_batches(count, dtype=torch.float32)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def run_plain(model, base, batches, objective=None, scheduler=None, after_backward=None):
    objective = objective or squared_error(model)
    states = []
    for batch in batches:
        base.zero_grad()
        objective(batch).backward()
        if after_backward is not None:
            after_backward()
        base.step()
        if scheduler is not None:
            scheduler.step()
        states.append(state_of(model))
    return states


def run_optex(model, base, batches, objective=None, *, parallelism=4, tolerance=0.0, **options):
    """Rounds; the model's state after each, and the steps taken by then."""
    optimizer = OptEx(
        base, parallelism=parallelism, stride=1, acceptance=WithinTolerance(tolerance), model=model, **options
    )
    rounds = optimizer.rounds(batches, objective or squared_error(model))
    return optimizer, [(optimizer.steps_taken, state_of(model)) for _ in rounds]


def assert_same_states(states, plain):
    assert states[-1][0] == len(plain)
    for steps, state in states:
        for name, value in state.items():
            assert torch.equal(value, plain[steps - 1][name]), name


# ---------------------------------------------------------------------- buffers


def test_batchnorm_follows_the_steps_taken():
    batches, plain, model = batches_of(13), Normed(), Normed()
    expected = run_plain(plain, adam(plain), batches)
    _, states = run_optex(model, adam(model), batches)
    assert_same_states(states, expected)
    assert model.norm.num_batches_tracked == 13


def test_batchnorm_counts_steps_when_several_are_kept():
    model = Normed()
    optimizer, states = run_optex(model, adam(model), batches_of(40), tolerance=4.0)
    assert len(states) < 30
    assert model.norm.num_batches_tracked == optimizer.steps_taken == 40
    for steps, state in states:
        assert state["norm.num_batches_tracked"] == steps


@pytest.mark.parametrize(("evaluate", "passes"), [("all", 3), ("last", 1)])
def test_batchnorm_under_the_papers_rules(evaluate, passes):
    # A selection keeps the statistics of the proxies up to the one it goes on from.
    model = Normed()
    optimizer = OptEx(adam(model), parallelism=3, acceptance=Last(evaluate), model=model)
    reports = list(itertools.islice(optimizer.rounds(batches_of(30), squared_error(model)), 5))
    assert [report.accepted for report in reports] == [3] * 5
    assert model.norm.num_batches_tracked == 5 * passes


def test_a_module_as_objective_brings_its_buffers():
    class Problem(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Normed()

        def forward(self, batch):
            return squared_error(self.network)(batch)

    problem = Problem()
    optimizer = OptEx(adam(problem), acceptance=WithinTolerance(0.0))
    list(optimizer.rounds(batches_of(7), problem))
    assert problem.network.norm.num_batches_tracked == 7


def test_stray_statistics_are_refused_and_nothing_is_lost():
    model = Normed()
    before = state_of(model)
    optimizer = OptEx(adam(model))
    with pytest.raises(
        ValueError, match=r"BatchNorm1d updates buffers .BatchNorm's running statistics.*model=model\)"
    ):
        next(optimizer.rounds(batches_of(5), squared_error(model)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()  # nothing is updated there
    assert (
        sum(report.accepted for report in OptEx(adam(model)).rounds(batches_of(5), squared_error(model))) == 5
    )


def test_buffers_come_back_when_the_objective_fails():
    model, calls = Normed(), []
    error = squared_error(model)

    def objective(batch):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return error(batch)

    optimizer = OptEx(adam(model), parallelism=4, model=model, acceptance=WithinTolerance(0.0))
    rounds = optimizer.rounds(batches_of(9), objective)
    next(rounds)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        next(rounds)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_evaluation_mode_between_rounds_changes_nothing():
    batches, plain, model = batches_of(9), Normed(), Normed()
    expected = run_plain(plain, adam(plain), batches)
    optimizer = OptEx(adam(model), parallelism=3, acceptance=WithinTolerance(0.0), model=model)
    for _ in optimizer.rounds(batches, squared_error(model)):
        model.eval()
        with torch.no_grad():
            model(batches[0][0])
        model.train()
        assert same([*model.state_dict().values()], [*expected[optimizer.steps_taken - 1].values()])
    assert optimizer.steps_taken == 9


# ---------------------------------------------------------------------- random draws


def augmented(model):
    """Noise drawn while the batch is used, as an augmentation on the fly does."""
    return lambda batch: (model(batch[0] + 0.1 * torch.randn_like(batch[0])) - batch[1]).square().mean()


def test_a_steps_draws_are_its_own_however_often_it_is_evaluated():
    seen, model = {}, Normed(dropout=0.5)

    def objective(item):
        number, (x, y) = item
        noise = torch.rand(3)
        seen.setdefault(number, []).append(noise)
        return (model(x) - y).square().mean() * (1 + noise.mean())

    optimizer = OptEx(adam(model), parallelism=4, acceptance=WithinTolerance(0.0), model=model)
    list(optimizer.rounds(enumerate(batches_of(8)), objective))
    assert [len(draws) for draws in seen.values()] == [1, 2, 3, 4, 4, 4, 4, 4]
    for draws in seen.values():
        assert all(torch.equal(draws[0], other) for other in draws)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_augmentation_and_dropout_are_the_plain_loops():
    batches, plain, model = batches_of(13), Normed(dropout=0.5), Normed(dropout=0.5)
    torch.manual_seed(7)
    expected = run_plain(plain, adam(plain), batches, augmented(plain))
    torch.manual_seed(7)
    _, states = run_optex(model, adam(model), batches, augmented(model))
    assert_same_states(states, expected)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("clip", ["norm", "value", "relative"])
def test_clipping_is_the_plain_loops(clip):
    def clipper(model):
        if clip == "norm":
            return lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        if clip == "value":
            return lambda: nn.utils.clip_grad_value_(model.parameters(), 0.01)

        def relative():  # adaptive clipping looks at the parameters, too
            for p in model.parameters():
                p.grad.mul_((0.01 * p.detach().norm() / p.grad.norm()).clamp(max=1))

        return relative

    batches, plain, model = batches_of(11), Normed(), Normed()
    expected = run_plain(plain, adam(plain), batches, after_backward=clipper(plain))
    optimizer, states = run_optex(model, adam(model), batches, gradient_hook=clipper(model))
    assert_same_states(states, expected)
    if clip == "norm":  # what is remembered is clipped, too
        norms = optimizer.history.gradients.norm(dim=1)
        assert norms.max() <= 0.05 * (1 + 1e-5)
        assert norms.max() > 0.04


def test_accumulation_is_the_plain_loops():
    def micro_batches(count):
        return [[(x[:4], y[:4]), (x[4:6], y[4:6]), (x[6:], y[6:])] for x, y in batches_of(count)]

    plain, model = network(dtype=torch.float32), network(dtype=torch.float32)
    base, error = adam(plain), squared_error(plain)
    expected = []
    for batch in micro_batches(9):
        base.zero_grad()
        for part in batch:
            (error(part) / len(batch)).backward()
        base.step()
        expected.append(state_of(plain))
    source = AccumulatingSource(squared_error(model))
    _, states = run_optex(model, adam(model), micro_batches(9), source)
    assert_same_states(states, expected)


def test_a_batch_without_micro_batches_is_refused():
    model = network(dtype=torch.float32)
    source = AccumulatingSource(squared_error(model))
    with pytest.raises(ValueError, match="AccumulatingSource: a batch has no micro-batches"):
        next(OptEx(adam(model)).rounds([[], []], source))


def test_accumulation_in_a_closure_is_the_plain_loops():
    batches, plain, model = batches_of(12), network(dtype=torch.float32), network(dtype=torch.float32)
    base, twin = adam(plain), OptEx(adam(model), parallelism=3, acceptance=WithinTolerance(0.0))
    for first, second in zip(batches[::2], batches[1::2], strict=True):

        def closure(model=model, optimizer=twin, pair=(first, second)):
            optimizer.zero_grad()
            losses = [squared_error(model)(part) / 2 for part in pair]
            for loss in losses:
                loss.backward()
            return sum(losses)

        base.zero_grad()
        for part in (first, second):
            (squared_error(plain)(part) / 2).backward()
        base.step()
        twin.step(closure)
        assert same(snapshot(plain), snapshot(model))


# ---------------------------------------------------------------------- parameters


def test_groups_with_rates_and_weight_decay_of_their_own():
    def base(model):
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim == 1]
        return torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1, "lr": 3e-3}, {"params": rest, "weight_decay": 0.0}],
            lr=1e-2,
        )

    batches, plain, model = batches_of(11), Normed(), Normed()
    reference, twin = base(plain), base(model)
    expected = run_plain(plain, reference, batches)
    _, states = run_optex(model, twin, batches)
    assert_same_states(states, expected)
    assert_same_state(twin, reference)


class Tied(nn.Module):
    """A character model in little: input and output embedding are one, a part is frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle, self.frozen = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.output = nn.Linear(6, 11, bias=False)
        self.output.weight = self.embedding.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens):
        return self.output(self.frozen(torch.tanh(self.middle(self.embedding(tokens)))))


def token_error(model):
    return lambda batch: functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def token_batches(count):
    generator = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(11, (2, 4, 5), generator=generator)) for _ in range(count)]


def test_tied_and_frozen_parameters_are_the_plain_loops():
    plain, model = Tied(), Tied()
    expected = run_plain(plain, adam(plain), token_batches(11), token_error(plain))
    _, states = run_optex(model, adam(model), token_batches(11), token_error(model))
    assert_same_states(states, expected)
    assert model.output.weight is model.embedding.weight
    assert torch.equal(model.frozen.weight, Tied().frozen.weight)


# ---------------------------------------------------------------------- precision and compilation


def test_bfloat16_autocast_is_the_plain_loops():
    def in_bfloat16(model):
        error = squared_error(model)

        def objective(batch):
            with torch.autocast("cpu", torch.bfloat16):
                return error(batch)

        return objective

    batches, plain, model = batches_of(11), Normed(), Normed()
    expected = run_plain(plain, adam(plain), batches, in_bfloat16(plain))
    _, states = run_optex(model, adam(model), batches, in_bfloat16(model))
    assert_same_states(states, expected)


def test_autocast_around_the_rounds_does_not_keep_another_points_weights():
    # Autocast caches cast weights until it is left: the points of a round would all be evaluated at the first.
    model = network(dtype=torch.float32)
    optimizer = OptEx(adam(model), parallelism=3, acceptance=WithinTolerance(0.0))
    plain = network(dtype=torch.float32)
    base, error = adam(plain), squared_error(plain)
    for batch in batches_of(9):
        base.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = error(batch)
        loss.backward()
        base.step()
    with torch.autocast("cpu", torch.bfloat16):
        assert sum(r.accepted for r in optimizer.rounds(batches_of(9), squared_error(model))) == 9
    assert same(snapshot(model), snapshot(plain))


def test_bfloat16_parameters_are_the_plain_loops():
    def cast(batches):
        return [(x.bfloat16(), y.bfloat16()) for x, y in batches]

    plain, model = network(dtype=torch.bfloat16), network(dtype=torch.bfloat16)
    expected = run_plain(plain, adam(plain), cast(batches_of(9)))
    _, states = run_optex(model, adam(model), cast(batches_of(9)))
    assert_same_states(states, expected)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_models_are_the_plain_loops_and_compile_once():
    frames = []

    def backend(module, _):
        frames.append(module)
        return module.forward

    batches, plain, model = batches_of(9), Normed(), Normed()
    fast, slow = torch.compile(model, backend=backend), torch.compile(plain, backend="eager")
    expected = run_plain(plain, adam(plain), batches, squared_error(slow))
    _, states = run_optex(model, adam(model), batches, squared_error(fast))
    assert_same_states(states, expected)
    assert len(frames) == 1


# ---------------------------------------------------------------------- schedules


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("kind", ["warm-up and cosine", "function"])
def test_every_step_has_the_rate_of_the_plain_loop(kind):
    def schedule(base):
        if kind == "function":
            return LambdaLR(base, lambda step: min(1, (step + 1) / 5) / (1 + step) ** 0.5)
        parts = [LinearLR(base, 0.1, total_iters=4), CosineAnnealingLR(base, 8)]
        return SequentialLR(base, parts, milestones=[4])

    batches, plain, model = batches_of(11), Normed(), Normed()
    reference, twin = adam(plain), adam(model)
    expected = run_plain(plain, reference, batches, scheduler=schedule(reference))
    _, states = run_optex(model, twin, batches, scheduler=schedule(twin))
    assert_same_states(states, expected)
    assert twin.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


# ---------------------------------------------------------------------- numbers that are not finite


def poisoned(count, bad):
    batches = batches_of(count)
    for i in bad:
        batches[i] = (batches[i][0], batches[i][1] * float("nan"))
    return batches


def test_a_bad_batch_is_named_and_the_last_good_iterate_kept():
    model = Normed()
    optimizer = OptEx(adam(model), parallelism=3, acceptance=WithinTolerance(0.0), model=model)
    rounds = optimizer.rounds(poisoned(8, [4]), squared_error(model))
    for _ in range(4):
        next(rounds)
    before = state_of(model)
    with pytest.raises(NonFiniteError, match=r"loss \(nan\) at the start of round 4 .*\(Step 4, batch 4,"):
        next(rounds)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # Going on: the bad batch is gone, the others come in their order.
    plain = Normed()
    expected = run_plain(plain, adam(plain), [b for i, b in enumerate(batches_of(8)) if i != 4])
    for _ in optimizer.rounds(
        itertools.islice(poisoned(8, [4]), optimizer.batches_drawn, None), squared_error(model)
    ):
        pass
    assert same([*model.state_dict().values()], [*expected[-1].values()])


def test_bad_batches_are_skipped_on_request():
    batches, model, plain = poisoned(12, [0, 5, 6]), Normed(), Normed()
    optimizer = OptEx(
        adam(model), parallelism=4, acceptance=WithinTolerance(0.0), model=model, on_nonfinite="skip"
    )
    with pytest.warns(NonFiniteWarning, match=r"batch [056], counted from 0.\) The step is skipped") as caught:
        reports = list(optimizer.rounds(batches, squared_error(model)))
    assert len(caught) == 3
    assert sum(report.accepted for report in reports) == optimizer.steps_taken == 9
    assert [report.number for report in reports] == list(range(12))
    skipped = [report for report in reports if not report.accepted]
    assert len(skipped) == 3
    assert skipped[0].dropped == (0,)
    expected = run_plain(plain, adam(plain), [b for i, b in enumerate(batches_of(12)) if i not in (0, 5, 6)])
    assert same([*model.state_dict().values()], [*expected[-1].values()])


def test_a_closure_may_skip_too():
    theta = nn.Parameter(torch.ones(2))
    optimizer = OptEx(torch.optim.SGD([theta], lr=0.1), on_nonfinite="skip")

    def closure():
        optimizer.zero_grad()
        loss = (theta * float("inf")).sum()
        loss.backward()
        return loss

    with pytest.warns(NonFiniteWarning, match=r"\(Step 0, counted from 0.\)"):
        loss = optimizer.step(closure)
    assert loss.isinf()
    assert optimizer.last_report is not None
    assert optimizer.last_report.accepted == 0
    assert torch.equal(theta, torch.ones(2))


# ---------------------------------------------------------------------- checkpoints

PROGRAM = """
import itertools, sys
import torch
from tests.test_fidelity import Normed, augmented, batches_of, schedule_for
from optex import OptEx

folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = Normed(seed=first, dropout=0.3)  # another start: all must come from the file
base = torch.optim.AdamW(model.parameters(), lr=0.01)
optimizer = OptEx(base, parallelism=4, model=model, scheduler=schedule_for(base))
torch.manual_seed(first + 5)
if first:
    saved = torch.load(f"{folder}/{first}.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
rounds = optimizer.rounds(itertools.islice(batches_of(60), optimizer.batches_drawn, None), augmented(model))
losses = []
for report in itertools.islice(rounds, last - first):
    losses.append((report.loss, report.accepted))
saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
torch.save(saved, f"{folder}/{last}.pt")
"""


def schedule_for(base):
    return LambdaLR(base, Warmup())


class Warmup:
    """A schedule whose state is saved."""

    def __call__(self, step):
        return min(1.0, (step + 1) / 6)


def test_a_checkpoint_continues_bit_for_bit_in_a_new_process(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, stops in ((whole, (0, 8)), (parts, (0, 3, 8))):
        folder.mkdir()
        for first, last in itertools.pairwise(stops):
            command = [sys.executable, str(script), str(folder), str(first), str(last)]
            subprocess.run(command, check=True, env=_environment(), timeout=120)
    expected = torch.load(whole / "8.pt", weights_only=True)
    resumed = torch.load(parts / "8.pt", weights_only=True)
    assert resumed["losses"] == expected["losses"][3:]
    assert max(accepted for _, accepted in expected["losses"]) > 1
    assert_equal_trees(resumed["model"], expected["model"])
    assert_equal_trees(resumed["optimizer"], expected["optimizer"])


def _environment():
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}


def test_a_problem_of_the_package_trains_with_dropout_and_clipping():
    problem = make_problem("digits-mlp", seed=0)
    optimizer = OptEx(
        torch.optim.Adam(problem.parameters(), lr=1e-3),
        gradient_hook=lambda: nn.utils.clip_grad_norm_(problem.parameters(), 1.0),
    )
    before = problem.evaluate()
    for _ in itertools.islice(optimizer.rounds(problem.batches(), problem), 10):
        pass
    assert problem.evaluate() < before
    assert optimizer.steps_taken > 20
