"""AdaGradNorm against its recursion, and what only it promises."""

import math

import pytest
import torch
from torch import nn

from optex import NonFiniteError, OptEx
from optex.optimizers import AdaGradNorm
from tests.models import network, regression_batches, squared_error
from tests.references.adadagrad import adagrad_norm


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3)])
def test_takes_the_recursions_steps(lr):
    model, batches = network(), regression_batches(40)
    twin = network()

    def gradient_of(point, step):
        torch.nn.utils.vector_to_parameters(point, twin.parameters())
        twin.zero_grad()
        squared_error(twin)(batches[step]).backward()
        return torch.cat([p.grad.reshape(-1) for p in twin.parameters() if p.grad is not None])

    points, sums = adagrad_norm(gradient_of, flat(model), 0.3, 1e-2, 40)
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    optimizer = AdaGradNorm(groups, lr=lr)
    for batch, point, total in zip(batches, points, sums, strict=True):
        optimizer.zero_grad()
        squared_error(model)(batch).backward()
        optimizer.step()
        tolerance = 1e-12 if isinstance(lr, float) else 1e-6  # a float32 rate
        torch.testing.assert_close(flat(model), point, rtol=tolerance, atol=tolerance)
        assert float(optimizer.accumulator) == pytest.approx(total, rel=tolerance)


def test_on_a_bowl_the_sum_is_closed():
    # f = ‖x‖²/2: x shrinks by 1 - lr/√S, along one line.
    length, total = 5.0, 1e-2
    theta = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = AdaGradNorm([theta])
    for _ in range(100):
        optimizer.zero_grad()
        (theta.square().sum() / 2).backward()
        optimizer.step()
        total += length**2
        length *= 1 - 1 / math.sqrt(total)
    assert float(theta.detach().norm()) == pytest.approx(abs(length), rel=1e-12)
    assert float(optimizer.accumulator) == pytest.approx(total, rel=1e-13)


def test_rotations_and_splitting_change_nothing():
    # One number for all coordinates: torch's Adagrad, with one a coordinate, depends on both.
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    scales = torch.linspace(1, 9, 6, dtype=torch.float64)
    whole = nn.Parameter(torch.ones(6, dtype=torch.float64))
    turned = nn.Parameter(rotation.T @ whole.detach())
    pieces: list[torch.Tensor] = [nn.Parameter(part.clone()) for part in whole.detach().split((1, 2, 3))]
    runs = [
        (AdaGradNorm([whole]), lambda: whole),
        (AdaGradNorm([turned]), lambda: rotation @ turned),
        (AdaGradNorm(pieces), lambda: torch.cat(pieces)),
    ]
    for optimizer, point in runs:
        for _ in range(30):
            optimizer.zero_grad()
            (scales * point().square()).sum().backward()
            optimizer.step()
    for _, point in runs:
        torch.testing.assert_close(point().detach(), whole.detach(), rtol=1e-10, atol=1e-12)


def test_small_gradients_count_beside_a_large_sum():
    theta = nn.Parameter(torch.zeros(2))
    optimizer = AdaGradNorm([theta], initial_accumulator=1e6)
    theta.grad = torch.tensor([1e-3, 0.0])
    for _ in range(10):
        optimizer.step()
    assert float(optimizer.accumulator) - 1e6 == pytest.approx(1e-5, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_is_cast_when_loaded(dtype):
    theta, wide = nn.Parameter(torch.zeros(100, dtype=dtype)), nn.Parameter(torch.zeros(2))
    optimizer = AdaGradNorm([theta, wide])
    theta.grad, wide.grad = torch.full_like(theta, 3e4), torch.zeros_like(wide)
    optimizer.step()
    assert float(optimizer.accumulator) == pytest.approx(9e10, rel=1e-2)
    assert float(theta.detach()[0]) == pytest.approx(-0.1, rel=1e-2)
    other = AdaGradNorm([nn.Parameter(torch.zeros(100, dtype=dtype)), nn.Parameter(torch.zeros(2))])
    other.load_state_dict(optimizer.state_dict())
    assert other.accumulator.dtype == torch.float64
    assert torch.equal(other.accumulator, optimizer.accumulator)


def test_a_length_that_overflows_is_refused_before_anything_moves():
    theta = nn.Parameter(torch.ones(2))
    optimizer = AdaGradNorm([theta])
    theta.grad = torch.full((2,), 1e30)
    with pytest.raises(NonFiniteError, match=r"AdaGradNorm: the gradient is not finite in length"):
        optimizer.step()
    assert torch.equal(theta.detach(), torch.ones(2))
    assert float(optimizer.accumulator) == pytest.approx(1e-2)


def test_a_group_added_later_shares_the_sum():
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = AdaGradNorm([first], initial_accumulator=9.0)
    optimizer.add_param_group({"params": [second], "lr": 0.0})
    first.grad, second.grad = torch.zeros(1), torch.full((1,), 4.0)
    optimizer.step()
    assert float(optimizer.accumulator) == 25.0
    assert torch.equal(second.detach(), torch.ones(1))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, "much"])
def test_bad_starts_are_refused(value):
    with pytest.raises(ValueError, match="AdaGradNorm: initial_accumulator must be a finite number above 0"):
        AdaGradNorm([nn.Parameter(torch.ones(1))], initial_accumulator=value)


@pytest.mark.parametrize("name", ["initial_accumulator", "accumulator"])
def test_accumulators_of_groups_are_refused(name):
    groups = [{"params": [nn.Parameter(torch.ones(1))], name: 1.0}]
    with pytest.raises(ValueError, match=f"a group has '{name}', and there is one accumulator for all groups"):
        AdaGradNorm(groups)


def test_drafts_walk_the_sum_and_it_is_put_back():
    # What the base has summed up after a run are the gradients of the steps it kept, and no others.
    theta = nn.Parameter(torch.full((30,), 2.0, dtype=torch.float64))
    seen = []

    class Watched(AdaGradNorm):
        def step(self, closure=None):
            before = float(self.accumulator)
            super().step(closure)
            seen.append((before, float(self.accumulator)))

    base = Watched([theta], lr=0.5)
    optimizer = OptEx(base, parallelism=3, deterministic=True)
    scales = torch.linspace(0.1, 1, 30, dtype=torch.float64)
    rounds = optimizer.rounds([None] * 30, lambda _: (scales * theta.square()).sum() / 2)
    totals = [1e-2, *(float(base.accumulator) for _ in rounds)]
    assert len(seen) > optimizer.steps_taken  # drafts stepped, too
    assert totals == sorted(totals)
    # Every round began at the sum that the one before left, and ended with a step's.
    assert set(totals[:-1]) <= {before for before, _ in seen}
    assert set(totals[1:]) <= {after for _, after in seen}
