"""OptEx on several ranks walks the way it walks on one, whoever holds which part of it."""

import argparse
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import rosen, rosen_der
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

import optex
from optex import (
    DistributedEvaluator,
    OptEx,
    PlainStepWarning,
    RankLostError,
    SeparableEstimator,
    SequentialEvaluator,
    VectorizedEvaluator,
    WithinTolerance,
)
from optex.distributed import checkpoint
from optex.distributed.ranks import Ranks
from optex.distributed.sharding import ShardedSpace
from optex.stepping.bases import ELEMENTWISE
from optex.vector_space import VectorSpace
from tests.bases import BASES
from tests.models import network, regression_batches, squared_error, weight_of
from tests.ranks import run_ranks

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_distributed.py"


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def trajectory(optimizer, model, batches, objective=None):
    """Parameters and accepted steps of every round, with the parameters gathered in between."""
    points, accepted = [], []
    for report in optimizer.rounds(batches, objective or squared_error(model)):
        optimizer.gather()
        points.append(flat(model))
        accepted.append(report.accepted)
    return torch.stack(points).numpy(), accepted


def assert_alike(answers, expected, tolerance):
    """Every rank's trajectory is the first one's to the bit, and the expected one to ``tolerance``."""
    for points, accepted in answers:
        assert accepted == expected[1]
        assert (points == answers[0][0]).all()
        assert abs(points - expected[0]).max() <= tolerance * abs(expected[0]).max()


# ---------------------------------------------------------------- the sequential trajectory

# Ranks add up inner products in another order than one process does, and step slices that begin elsewhere in a
# vector register: differences in the last bit, which systems of equations with little noise enlarge by their
# condition number. With noise 1e-2 that is small; the defaults go down to 1e-9.
STEADY = SeparableEstimator(noise_variance=1e-2, prior_mean="last")
MAKERS = {
    "verified": lambda base, n, **options: OptEx(base, parallelism=n, estimator=STEADY, **options),
    "paper": lambda base, n, **options: OptEx.from_paper(base, n, noise_variance=1e-2, **options),
    "default": lambda base, n, **options: OptEx(base, parallelism=n, **options),
}
TOLERANCES = {"verified": 1e-12, "paper": 1e-12, "default": 1e-8}
STEPPED = ("sgd", "momentum", "adam", "adamw")


def run_case(maker, base, n, evaluator=None, shard=None, steps=20):
    model = network()
    optimizer = MAKERS[maker](BASES[base](model.parameters()), n, evaluator=evaluator, shard=shard)
    return trajectory(optimizer, model, regression_batches(steps))


def split_cases(rank, cases):
    return [run_case(*case, evaluator=DistributedEvaluator(), shard=True) for case in cases]


@pytest.mark.parametrize("size", [2, 4])
def test_split_runs_go_the_sequential_way(size):
    cases = [(maker, base, n) for maker in ("verified", "paper") for base in STEPPED for n in (size, 2 * size)]
    cases = cases if size == 2 else cases[::3]
    cases += [("default", base, size) for base in ("momentum", "adam")]
    answers = run_ranks(split_cases, size, cases)
    for i, case in enumerate(cases):
        assert_alike([answer[i] for answer in answers], run_case(*case), TOLERANCES[case[0]])


def replicated_cases(rank, cases):
    return [run_case(*case, evaluator=DistributedEvaluator(), shard=False) for case in cases]


def strided(rank=None, shard=None):
    model = network()
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    evaluator = None if rank is None else DistributedEvaluator()
    optimizer = OptEx(
        base, parallelism=2, deterministic=True, estimator=STEADY, evaluator=evaluator, shard=shard
    )
    points, accepted = trajectory(optimizer, model, regression_batches(1) * 24)
    assert sum(accepted) > 30  # more than were evaluated
    return points, accepted


@pytest.mark.parametrize("shard", [True, False])
def test_strides_are_the_sequential_ones(shard):
    assert_alike(run_ranks(strided, 2, shard), strided(), 1e-11 if shard else 0)


def test_replicated_runs_are_the_sequential_ones_bit_for_bit():
    cases = [("default", "adafactor", 3), ("default", "adam", 2), ("paper", "sgd", 5)]
    answers = run_ranks(replicated_cases, 2, cases)
    for i, case in enumerate(cases):
        assert_alike([answer[i] for answer in answers], run_case(*case), 0)


# ---------------------------------------------------------------- what a slice may hold


class Parts(nn.Module):
    """Parameters of several shapes and kinds: frozen, without gradient, of one number, in another order."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.unused = nn.Parameter(torch.ones(7, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
        self.first.weight.data = self.first.weight.data.t().contiguous().t()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))) * self.scale + self.frozen


def run_base(name, shard):
    model = Parts()
    groups = [
        {"params": model.first.parameters()},
        {"params": [model.unused, model.frozen, *model.second.parameters()], "weight_decay": 0.1},
        {"params": [model.scale], "lr": 0.001},
    ]
    base = BASES[name](groups)
    scheduler = LambdaLR(base, lambda step: 0.9**step)
    split = {} if shard is None else {"evaluator": DistributedEvaluator(), "shard": shard}
    optimizer = OptEx.from_paper(base, 4, noise_variance=1e-2, scheduler=scheduler, **split)
    points = trajectory(optimizer, model, regression_batches(8))
    assert model.unused.eq(1).all()
    return points


def base_cases(rank, names):
    return [run_base(name, True) for name in names]


def elementwise_names():
    one = [nn.Parameter(torch.zeros(1))]
    return [name for name, make in BASES.items() if name != "muon" and type(make(one)) in ELEMENTWISE]


def test_groups_schedules_and_missing_gradients_in_every_elementwise_optimizer():
    # What it means to be on the list, for each that is.
    names = elementwise_names()
    assert len(names) >= 15
    answers = run_ranks(base_cases, 3, names)
    for i, name in enumerate(names):
        assert_alike([answer[i] for answer in answers], run_base(name, None), 1e-12)


def unusual_cases(rank):
    out = {}
    for dtype in (torch.float32, torch.bfloat16):  # slices keep the parameters' own dtype
        model = network(dtype=dtype)
        optimizer = OptEx(
            BASES["adam"](model.parameters()), parallelism=4, evaluator=DistributedEvaluator(), shard=True
        )
        list(optimizer.rounds(regression_batches(8, dtype=dtype), squared_error(model)))
        out[str(dtype)] = flat(model).to(torch.float64).numpy()
    few = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))  # fewer numbers than ranks
    optimizer = OptEx(
        torch.optim.Adam([few], lr=0.1), parallelism=4, evaluator=DistributedEvaluator(), shard=True
    )
    for _ in range(5):
        optimizer.step(lambda: _backward(few.square().sum()))
    optimizer.gather()
    out["few"] = few.detach().numpy()
    return out


def _backward(loss):
    loss.backward()
    return loss


def test_slices_of_low_precision_and_fewer_numbers_than_ranks_go_the_sequential_way():
    answers = run_ranks(unusual_cases, 3)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model = network(dtype=dtype)
        optimizer = OptEx(BASES["adam"](model.parameters()), parallelism=4)
        list(optimizer.rounds(regression_batches(8, dtype=dtype), squared_error(model)))
        for answer in answers:
            np.testing.assert_allclose(answer[str(dtype)], flat(model).to(torch.float64), atol=tolerance)
    few = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = OptEx(torch.optim.Adam([few], lr=0.1), parallelism=4)
    for _ in range(5):
        optimizer.step(lambda: _backward(few.square().sum()))
    for answer in answers:
        np.testing.assert_allclose(answer["few"], few.detach(), rtol=1e-6)


def deal_and_collect(rank, sizes):
    for d, n in sizes:
        check_deal_and_collect(d, n)
    return True


def check_deal_and_collect(d, n):
    """Against the obvious: every rank knows the whole rows, and takes what is its own."""
    ranks = Ranks(None, torch.device("cpu"))
    space, whole = ShardedSpace(d, ranks), VectorSpace(d)
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    shares = ranks.shares(n)
    first = sum(shares[: ranks.rank])
    mine = rows[first : first + shares[ranks.rank]]
    slices = space.local(rows)
    assert slices.shape == (n, space.width)
    assert torch.equal(space.deal(slices), mine)
    assert torch.equal(space.collect(mine, n), slices)
    joined = space.whole(slices)
    assert isinstance(joined, DTensor)
    assert torch.equal(joined.full_tensor(), rows)
    assert torch.equal(space.local(joined), slices)
    assert torch.equal(space.gathered(slices[0]), rows[0])
    torch.testing.assert_close(space.inner_products(slices, slices), whole.inner_products(rows, rows))
    torch.testing.assert_close(space.norms(slices), whole.norms(rows))
    rows[n // 2, d // 2] = torch.inf
    assert torch.equal(space.finite(space.local(rows)), whole.finite(rows))


def test_rows_change_hands_whole():
    assert all(run_ranks(deal_and_collect, 3, [(1, 1), (2, 4), (7, 3), (12, 5)]))


# ---------------------------------------------------------------- beside data parallelism


def halves(batches, part):
    return [(x[4 * part : 4 * part + 4], y[4 * part : 4 * part + 4]) for x, y in batches]


def run_data(evaluator, shard, clipped, batches):
    model = network()
    hook = (lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.5)) if clipped else None
    base = BASES["adam"](model.parameters())
    optimizer = MAKERS["verified"](base, 4, evaluator=evaluator, shard=shard, gradient_hook=hook)
    return trajectory(optimizer, model, batches)


def data_cases(rank, cases):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("proxies", "data"))
    batches = halves(regression_batches(8), mesh.get_local_rank("data"))
    return [run_data(DistributedEvaluator(mesh), shard, clipped, batches) for shard, clipped in cases]


def test_parts_of_batches_are_averaged():
    cases = [(shard, clipped) for shard in (True, False) for clipped in (True, False)]
    answers = run_ranks(data_cases, 4, cases)
    for i, (_, clipped) in enumerate(cases):
        expected = run_data(None, None, clipped, regression_batches(8))
        assert_alike([answer[i] for answer in answers], expected, 1e-12)


# ---------------------------------------------------------------- random numbers


def run_dropout(rank, steps=12):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    optimizer = MAKERS["verified"](BASES["adam"](model.parameters()), 4, evaluator=DistributedEvaluator(seed=3))
    states = {}
    inner = squared_error(model)

    def objective(batch):
        states.setdefault(int(batch[2]), set()).add(torch.initial_seed())
        return inner(batch)

    batches = [(*batch, torch.tensor(i)) for i, batch in enumerate(regression_batches(steps))]
    before = torch.get_rng_state()
    points = trajectory(optimizer, model, batches, objective)
    assert torch.equal(torch.get_rng_state(), before)
    return points, states


def test_draws_belong_to_steps_not_to_ranks():
    two, four = run_ranks(run_dropout, 2), run_ranks(run_dropout, 4)
    for answers in (two, four):
        assert_alike([points for points, _ in answers], four[0][0], 1e-12)
    seeds = {}
    for _, states in two + four:
        for step, seen in states.items():
            seeds.setdefault(step, set()).update(seen)
    assert all(len(seen) == 1 for seen in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds) == 12


# ---------------------------------------------------------------- numbers sent


def count_traffic(rank, d, n):
    return [count_numbers(d, n, shard) for shard in (True, False)]


def count_numbers(d, n, shard):
    theta = nn.Parameter(torch.linspace(-1, 1, d))
    evaluator, base = DistributedEvaluator(), torch.optim.Adam([theta], lr=0.01)
    optimizer = MAKERS["verified"](base, n, evaluator=evaluator, shard=shard)
    rounds = optimizer.rounds(range(1, 6 * n), lambda i: (theta - i / 100).square().sum())
    next(rounds)
    traffic = evaluator.traffic
    assert traffic is not None
    before = (traffic.sent, traffic.received, traffic.small)
    for _ in range(3):
        next(rounds)
    after = (traffic.sent, traffic.received, traffic.small)
    return [(now - then) / 3 / 4 for now, then in zip(after, before, strict=True)]


@pytest.mark.parametrize("size", [2, 4])
def test_a_round_sends_two_gradients_whatever_the_ranks(size):
    d = 40_000
    for (sent, received, small), (replicated, _, _) in run_ranks(count_traffic, size, d, size):
        expected = 2 * d * (size - 1) / size
        assert sent == pytest.approx(expected, rel=0.001)
        assert received == pytest.approx(expected, rel=0.001)
        assert small < 0.05 * expected
        assert replicated == pytest.approx((size - 1) * d, rel=0.001)


# ---------------------------------------------------------------- what is refused, and how it is said


def said_by(action):
    try:
        action()
    except Exception as error:  # noqa: BLE001  (the message is the test's)
        return f"{type(error).__name__}: {error}"
    return None


def adam_run(network, batches, objective=None, **options):
    evaluator = options.pop("evaluator", None) or DistributedEvaluator()
    optimizer = OptEx(BASES["adam"](network.parameters()), parallelism=2, evaluator=evaluator, **options)
    return optimizer, lambda: list(optimizer.rounds(batches, objective or squared_error(network)))


def mistakes(rank):
    said, batches = {}, regression_batches(4)
    said["start"] = said_by(lambda: adam_run(network(seed=rank), batches))
    said["batches"] = said_by(adam_run(network(), regression_batches(1 + rank))[1])

    def failing(batch):
        if rank == 1:
            raise KeyError("data")
        return squared_error(model)(batch)

    model = network()
    optimizer, run = adam_run(model, batches, failing)
    before = flat(model)
    said["objective"] = said_by(run)
    optimizer.gather()
    assert torch.equal(flat(model), before)

    def normed():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()

    model = normed()
    said["buffers"] = said_by(adam_run(model, batches, model=model)[1])
    model = network()
    optimizer, _ = adam_run(model, batches)
    next(optimizer.rounds(batches, squared_error(model)))
    with torch.no_grad():
        weight_of(model[0]).zero_()
    said["stale"] = said_by(lambda: next(optimizer.rounds(batches, squared_error(model))))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ranks",))
    said["mesh"] = said_by(lambda: adam_run(network(), batches, evaluator=DistributedEvaluator(mesh)))
    return said


def test_mistakes_are_said_on_every_rank():
    first, second = run_ranks(mistakes, 2)
    for said in (first, second):
        assert re.search("ranks . and . have different parameters; seed them alike", said["start"])
        assert re.search("not at the same place.*equally many batches", said["batches"])
        assert re.search("BatchNorm's running statistics.*use torch.nn.GroupNorm", said["buffers"])
        assert re.search(r"changed between rounds.*call optimizer.gather\(\)", said["stale"])
        assert re.search(r"mesh must have the dimensions.*init_device_mesh", said["mesh"])
    assert second["objective"] == "KeyError: 'data'"
    assert re.search("failed on rank 1: KeyError: 'data'; see its traceback", first["objective"])


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"no process group; start the script with torchrun"):
        adam_run(network(), [])


def leave_early(rank):
    model = network()
    optimizer, _ = adam_run(model, [])
    rounds = optimizer.rounds(regression_batches(20), squared_error(model))
    next(rounds)
    if rank == 1:
        os._exit(1)
    with pytest.raises(RankLostError) as caught:
        list(rounds)
    return str(caught.value)


def test_a_rank_that_dies_is_missed():
    found, _ = run_ranks(leave_early, 2)
    assert re.search("rank 0 of 2 lost the others.*--max-restarts.*its last checkpoint", found)


# ---------------------------------------------------------------- changes between rounds


def changes(rank):
    evaluator = None if rank is None else DistributedEvaluator(local=SequentialEvaluator())
    model = network()
    base = torch.optim.Adam(model[0].parameters(), lr=0.02)
    optimizer = MAKERS["verified"](base, 4, evaluator=evaluator)
    batches = regression_batches(30)
    error = squared_error(model)
    for _ in optimizer.rounds(batches[:6], error):
        pass
    with torch.no_grad():  # whole after the last round
        weight_of(model[0]).mul_(0.9)
    optimizer.param_groups[0]["lr"] = 0.01
    list(optimizer.rounds(batches[6:12], error))
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.005})
    list(optimizer.rounds(batches[12:20], error))
    optimizer.zero_grad()
    error(batches[20]).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlainStepWarning)
        optimizer.step()
    vectorized = VectorizedEvaluator(model)
    if evaluator is None:
        optimizer.evaluator = vectorized
    else:
        evaluator.local = vectorized
    list(optimizer.rounds(batches[21:], error))
    return flat(model).numpy()


def test_parameters_groups_and_rates_changed_between_rounds():
    expected = changes(None)
    for found in run_ranks(changes, 2):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- checkpoints


def checkpointed(evaluator, base="adamw", shard=None):
    model = network()
    stepped = BASES[base](model.parameters())
    scheduler = LambdaLR(stepped, lambda step: 0.95**step)
    rule = WithinTolerance(0.3, adaptive=False)  # leaves steps in the window
    optimizer = MAKERS["verified"](
        stepped, 4, evaluator=evaluator, scheduler=scheduler, acceptance=rule, shard=shard
    )
    return model, optimizer


def save_cases(rank, cases):
    return [save_in_between(rank, *case) for case in cases]


def save_in_between(rank, directory, shard=True):
    """Save after each of three rounds; the last folder."""
    alone = rank is None
    model, optimizer = checkpointed(None if alone else DistributedEvaluator(), shard=None if alone else shard)
    rounds = optimizer.rounds(regression_batches(24), squared_error(model))
    folders = [
        checkpoint.save(directory, optimizer, {"round": report.number})
        for report in itertools.islice(rounds, 3)
    ]
    assert len(folders) == 3
    assert len(optimizer.state_dict()["optex"]["window"]) > 0
    return str(folders[-1])


def go_on_cases(rank, cases):
    return [go_on(rank, *case) for case in cases]


def go_on(rank, directory, shard=True):
    alone = rank is None
    model, optimizer = checkpointed(None if alone else DistributedEvaluator(), shard=None if alone else shard)
    extra = checkpoint.load(directory, optimizer)
    assert extra == {"round": 2}
    batches = regression_batches(24)[optimizer.batches_drawn :]
    list(optimizer.rounds(batches, squared_error(model)))
    assert optimizer.steps_taken == 24
    return flat(model).numpy()


def test_a_checkpoint_is_read_by_any_number_of_ranks(tmp_path):
    model, optimizer = checkpointed(None)
    list(optimizer.rounds(regression_batches(24), squared_error(model)))
    by_two, by_one, by_replicas = (tmp_path / name for name in ("two", "one", "replicas"))
    folder = run_ranks(save_cases, 2, [(by_two, True), (by_replicas, False)])[0][0]
    save_in_between(None, by_one)
    (by_two / "step-99999999").mkdir()  # a job that died while it wrote
    assert str(checkpoint.latest(by_two)) == folder
    assert len([path for path in by_two.iterdir() if (path / ".metadata").exists()]) == 2
    with pytest.warns(checkpoint.CheckpointWarning, match="step-99999999 has no manifest"):
        found = [go_on(None, by_two)]
    found += [go_on(None, by_one), *run_ranks(go_on, 4, by_two)]
    for ends in run_ranks(go_on_cases, 2, [(by_two, False), (by_one, True), (by_replicas, True)]):
        found += ends
    for end in found:
        np.testing.assert_allclose(end, flat(model), rtol=0, atol=1e-12)


def save_parts(rank, directory):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("proxies", "data"))
    model, optimizer = checkpointed(DistributedEvaluator(mesh))
    for _ in optimizer.rounds(halves(regression_batches(24), rank), squared_error(model)):
        break
    checkpoint.save(directory, optimizer)
    held = [batch[0].clone() for batch, *_ in optimizer.state_dict()["optex"]["window"]]
    model, optimizer = checkpointed(DistributedEvaluator(mesh))
    checkpoint.load(directory, optimizer)
    waiting = [batch for batch, *_ in optimizer.state_dict()["optex"]["window"]]
    assert all(torch.equal(a, batch[0]) for a, batch in zip(held, waiting, strict=True))
    _, optimizer = checkpointed(DistributedEvaluator())
    return said_by(lambda: checkpoint.load(directory, optimizer))


def test_a_checkpoint_keeps_every_part_of_the_batches(tmp_path):
    for said in run_ranks(save_parts, 2, tmp_path):
        assert re.search("another number of ranks along 'data'.*Load it with as many", said)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    _, optimizer = checkpointed(None)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint in"):
        checkpoint.load(tmp_path, optimizer)


def test_to_keep_no_checkpoint_is_refused(tmp_path):
    _, optimizer = checkpointed(None)
    with pytest.raises(ValueError, match="keep must be an integer of at least 1, got 0"):
        checkpoint.save(tmp_path, optimizer, keep=0)


def state_dicts(rank):
    """A state dict of the ranks' own, and one of the base optimizer alone, as before OptEx came."""
    found = []
    for kind in ("own", "base"):
        model, optimizer = checkpointed(DistributedEvaluator(), "adam")
        list(optimizer.rounds(regression_batches(8), squared_error(model)))
        state = optimizer.state_dict()
        assert isinstance(state["optex"]["history"]["gradients"], DTensor)
        twin, other = checkpointed(DistributedEvaluator(), "adam")
        if kind == "base":
            plain = BASES["adam"](twin.parameters())
            squared_error(twin)(regression_batches(1)[0]).backward()
            plain.step()
            state = plain.state_dict()
        else:
            twin.load_state_dict(model.state_dict())
        other.load_state_dict(state)
        list(other.rounds(regression_batches(8, seed=1), squared_error(twin)))
        found.append(flat(twin).numpy())
        if kind == "own":  # once more, back from where the parameters are not whole
            next(other.rounds(regression_batches(4, seed=2), squared_error(twin)))
            twin.load_state_dict(model.state_dict())
            other.load_state_dict(state)
            list(other.rounds(regression_batches(8, seed=1), squared_error(twin)))
            assert torch.equal(flat(twin), torch.from_numpy(found[0]))
    return found


def test_state_dicts_of_split_optimizers():
    model, optimizer = checkpointed(None, "adam")
    list(optimizer.rounds(regression_batches(8), squared_error(model)))
    list(optimizer.rounds(regression_batches(8, seed=1), squared_error(model)))
    twin, other = checkpointed(None, "adam")
    plain = BASES["adam"](twin.parameters())
    squared_error(twin)(regression_batches(1)[0]).backward()
    plain.step()
    other.load_state_dict(plain.state_dict())
    list(other.rounds(regression_batches(8, seed=1), squared_error(twin)))
    for own, base in run_ranks(state_dicts, 2):
        np.testing.assert_allclose(own, flat(model), rtol=0, atol=1e-12)
        np.testing.assert_allclose(base, flat(twin), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- minimize


def minimized(rank):
    evaluator = None if rank is None else DistributedEvaluator()
    result = optex.minimize(rosen, [1.3, 0.7, 0.8], jac=rosen_der, lr=0.05, maxiter=25, evaluator=evaluator)
    return result.x, result.nfev, result.nstep


def test_minimize_takes_ranks():
    expected = minimized(None)
    for found in run_ranks(minimized, 2):
        np.testing.assert_array_equal(found[0], expected[0])
        assert found[1:] == expected[1:]


def test_splitting_needs_ranks():
    with pytest.raises(ValueError, match="shard=True splits vectors among ranks, and there are none; pass"):
        OptEx(torch.optim.Adam(network().parameters()), shard=True)


# ---------------------------------------------------------------- the example


def train_example(rank, options):
    spec = importlib.util.spec_from_file_location("train_distributed", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.train(argparse.Namespace(**options))


def test_a_job_that_lost_a_rank_goes_on_to_the_same_end(tmp_path):
    pytest.importorskip("sklearn")
    options = {"steps": 32, "parallelism": 4, "every": 2, "checkpoints": tmp_path / "whole", "fail_at": None}
    first, second = run_ranks(train_example, 2, options)
    assert first == second
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--steps", "32", "--every", "2", "--checkpoints", str(tmp_path / "broken"), "--fail-at", "5"]
    done = subprocess.run(
        [*command, "--max-restarts", "1", str(EXAMPLE), *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    # What the other rank says then is another test's: torchrun may end it before it has said anything.
    assert re.search(r"exitcode: 1\) local_rank: 1 ", done.stderr)
    assert re.search(r"continuing after step \d+\n", done.stdout)
    assert done.stdout.splitlines()[-1] == f"loss over all pictures after 32 batches: {first:.6f}"
