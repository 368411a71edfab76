"""Small models and data shared by the suites."""

import torch
from torch import nn

from optex.evaluators import EvaluationRequest, RandomDraws


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def regression_batches(count, seed=0, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        x = torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype)
        batches.append((x, torch.stack([x.sum(1), x[:, 0] * x[:, 1], x[:, 2].sin()], 1)))
    return batches


def squared_error(model):
    return lambda batch: (model(batch[0]) - batch[1]).square().mean()


def plain_run(model, base, batches, scheduler=None):
    """The loop optex replaces; the parameters after every step."""
    objective, trajectory = squared_error(model), []
    for batch in batches:
        base.zero_grad()
        objective(batch).backward()
        base.step()
        if scheduler is not None:
            scheduler.step()
        trajectory.append(snapshot(model))
    return trajectory


def request(source, vector, points, batches, **options):
    """What an evaluator is asked, each point with random draws of its own."""
    return EvaluationRequest(source, vector, points, batches, [RandomDraws() for _ in points], **options)


def weight_of(layer: nn.Module) -> torch.Tensor:
    """That of a linear layer; what ``model[0]`` is, only the caller knows."""
    assert isinstance(layer, nn.Linear)
    return layer.weight


def snapshot(model):
    return [p.detach().clone() for p in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_same_state(left, right):
    """Two optimizers' state dicts, compared to the bit."""
    left, right = left.state_dict(), right.state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for key, entries in left["state"].items():
        for name, value in entries.items():
            other = right["state"][key][name]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name


def assert_equal_trees(left, right, path=""):
    """Nested containers, compared to the bit."""
    assert type(left) is type(right), path
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_equal_trees(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal_trees(a, b, f"{path}/{i}")
    else:
        assert left == right, path
