"""SCALE: held to its loops, to torch's AdamW and to SGD; the roles of layers; the state that is kept."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from optex import OptEx
from optex.optimizers import SCALE, scale_param_groups
from optex.stepping import base_optimizer
from tests.models import network, regression_batches, same, snapshot, squared_error
from tests.references.scale import SlowSCALE


class Language(nn.Module):
    """Next symbols from symbols, with a layer of every kind."""

    def __init__(self, symbols=7, width=4, tied=False, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(symbols, width)
        self.mixing = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width, bias=False)
        self.sharpness = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(width, symbols)
        if tied:
            self.head.weight = self.table.weight
        self.to(dtype)

    def forward(self, codes):  # [n, t]
        mixed = self.mixing(self.table(codes).mT).mT
        return self.sharpness * self.head(self.hidden(self.norm(mixed)).tanh())


def language_loss(model, number):
    generator = torch.Generator().manual_seed(number)
    codes = torch.randint(7, (3, 6), generator=generator)
    return functional.cross_entropy(model(codes).flatten(0, 1), (3 * codes + 1).flatten() % 7)


def roles_of(groups):
    return {name: group["role"] for group in groups for name, _ in group["params"]}


LAYERS = {
    "table.weight": "embedding",
    "mixing.weight": "hidden",
    "mixing.bias": "vector",
    "norm.weight": "vector",
    "norm.bias": "vector",
    "hidden.weight": "hidden",
    "sharpness": "vector",
    "head.weight": "last",
    "head.bias": "vector",
}


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.5, "betas": (0.8, 0.95), "weight_decay": 0.3},
        {"momentum": 0.0, "eps": 1e-2},
        {"maximize": True},
    ],
)
def test_steps_are_those_of_the_loops(settings):
    model, twin = Language(), Language()
    optimizer = SCALE.of(model, lr=0.01, **settings)
    slow = SlowSCALE([(p, LAYERS[name]) for name, p in twin.named_parameters()], lr=0.01, **settings)
    for number in range(25):
        for net, own in ((model, optimizer), (twin, slow)):
            net.zero_grad()
            language_loss(net, number).backward()
            own.step()
        for left, right in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(left, right, rtol=1e-11, atol=1e-13)


def test_every_column_of_a_step_has_the_rate_as_its_root_mean_square():
    model = Language()
    optimizer, before = SCALE.of(model, lr=0.03), copy.deepcopy(model)
    language_loss(model, 0).backward()
    optimizer.step()
    moved = {
        name: p.detach() - q.detach()
        for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
    }
    for name, along in {
        "hidden.weight": 1,
        "head.weight": 1,
        "mixing.weight": (1, 2),
        "table.weight": 0,
    }.items():
        sizes = moved[name].square().mean(along).sqrt()
        assert torch.allclose(sizes, torch.full_like(sizes, 0.03), rtol=1e-9)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_however_a_kernel_lies_in_memory(memory_format):
    weight = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = nn.Parameter(weight.clone().to(memory_format=memory_format))
    p.grad = gradient.to(memory_format=memory_format)
    SCALE([p], lr=0.1, role="last").step()
    size = gradient.flatten(1).square().mean(1).sqrt()[:, None, None, None]
    assert torch.allclose(p, weight - 0.1 * gradient / size, rtol=1e-12)


def test_vectors_are_stepped_as_by_torchs_adamw():
    p = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    q = nn.Parameter(p.detach().clone())
    own = SCALE([p], lr=0.05, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-6)
    torchs = torch.optim.AdamW([q], lr=0.05, betas=(0.8, 0.9), weight_decay=0.1, eps=1e-6)
    for _ in range(30):
        for x, optimizer in ((p, own), (q, torchs)):
            optimizer.zero_grad()
            (x - 0.3).square().sum().backward()
            optimizer.step()
    assert torch.allclose(p, q, rtol=1e-12, atol=1e-14)


def test_the_role_vector_is_adamw_whatever_the_shape():
    model, twin = network(), network()
    own = SCALE(model.parameters(), lr=0.02, role="vector", weight_decay=0.01)
    torchs = torch.optim.AdamW(twin.parameters(), lr=0.02)
    for batch in regression_batches(10):
        for net, optimizer in ((model, own), (twin, torchs)):
            optimizer.zero_grad()
            squared_error(net)(batch).backward()
            optimizer.step()
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(left, right, rtol=1e-11, atol=1e-13)


def test_the_length_of_a_gradient_does_not_matter():
    ends = []
    for factor in (1.0, 1e4):
        model = Language()
        optimizer = SCALE.of(model, lr=0.01, eps=1e-300)
        for number in range(5):
            optimizer.zero_grad()
            (factor * language_loss(model, number)).backward()
            optimizer.step()
        ends.append(snapshot(model))
    for left, right in zip(*ends, strict=True):
        assert torch.allclose(left, right, rtol=1e-10, atol=1e-13)


def test_columns_without_a_gradient_stay_and_tiny_ones_are_not_blown_up():
    p = nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    p.grad = torch.tensor([[0.0, 0.0], [1e-10, 1e-10], [3.0, 3.0]], dtype=torch.float64)
    SCALE([p], lr=0.1, role="hidden").step()  # eps is 1e-8
    expected = torch.tensor([0.0, 1e-3, 0.1], dtype=torch.float64)
    assert torch.allclose(1 - p.detach(), expected[:, None].expand(3, 2), rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_parameters(dtype):
    p = nn.Parameter(torch.zeros(4, 600, dtype=dtype))
    p.grad = torch.full_like(p, 6e4 if dtype is torch.float16 else 1e10)  # a sum of squares no float16 holds
    vector = nn.Parameter(torch.zeros(3, dtype=dtype))
    vector.grad = torch.ones_like(vector)
    SCALE([{"params": [p], "role": "last"}, {"params": [vector]}], lr=0.5).step()
    assert torch.allclose(p.float(), torch.full((4, 600), -0.5), rtol=1e-2)
    assert torch.allclose(vector.float(), torch.full((3,), -0.5), rtol=1e-2)


def test_the_rate_may_be_a_tensor():
    ends = []
    for lr in (0.02, torch.tensor(0.02, dtype=torch.float64)):
        model = Language()
        optimizer = SCALE.of(model, lr=lr, weight_decay=0.1)
        for number in range(3):
            optimizer.zero_grad()
            language_loss(model, number).backward()
            optimizer.step()
        ends.append(snapshot(model))
    for left, right in zip(*ends, strict=True):
        assert torch.allclose(left, right, rtol=1e-12, atol=1e-14)


def test_a_parameter_whose_gradient_comes_late_begins_its_own_count():
    early, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = SCALE([early, late], lr=0.1)
    early.grad = torch.ones(2)
    for _ in range(3):
        optimizer.step()
    late.grad = torch.ones(2)
    optimizer.step()
    assert torch.allclose(late.detach(), torch.full((2,), -0.1))
    assert [int(optimizer.state[p]["step"]) for p in (early, late)] == [4, 1]


# ---------------------------------------------------------------------- state


def numbers(state):
    return sum(value.numel() for entry in state.values() for value in entry.values())


def test_state_is_in_the_last_layer_and_vectors_alone():
    model = Language(symbols=11, width=6)
    optimizer = SCALE.of(model)
    functional.cross_entropy(
        model(torch.tensor([[1, 2, 10]])).flatten(0, 1), torch.tensor([2, 3, 0])
    ).backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    with_state = {name for name, p in parameters.items() if optimizer.state.get(p)}
    assert with_state == {name for name, role in LAYERS.items() if role in ("last", "vector")}
    vectors = [p for name, p in parameters.items() if LAYERS[name] == "vector"]
    assert numbers(optimizer.state) == 11 * 6 + 2 * sum(p.numel() for p in vectors) + len(vectors)


def test_without_momentum_the_last_layer_has_none():
    model = Language()
    optimizer = SCALE.of(model, momentum=0)
    language_loss(model, 0).backward()
    optimizer.step()
    assert not optimizer.state.get(model.head.weight)


# ---------------------------------------------------------------------- roles


def test_roles_are_read_off_the_layers():
    groups = scale_param_groups(Language())
    assert roles_of(groups) == LAYERS
    assert [group["role"] for group in groups] == ["hidden", "embedding", "last", "vector"]


def test_empty_groups_are_left_out():
    model = nn.Linear(3, 2, bias=False)
    assert roles_of(scale_param_groups(model)) == {"weight": "last"}


@pytest.mark.parametrize("by", ["name", "module"])
def test_the_output_layer_may_be_named(by):
    model = Language()
    roles = roles_of(scale_param_groups(model, last="hidden" if by == "name" else model.hidden))
    assert roles == {**LAYERS, "hidden.weight": "last", "head.weight": "hidden"}


def test_a_weight_in_factors_keeps_its_layers_role():
    model = Language()
    nn.utils.parametrizations.weight_norm(model.head)
    roles = roles_of(scale_param_groups(model))
    assert {role for name, role in roles.items() if name.startswith("head.parametrizations")} == {"last"}
    assert roles["hidden.weight"] == "hidden"


@pytest.mark.parametrize("role", ["last", "embedding"])
def test_a_tied_weight_has_the_role_that_is_asked_for(role):
    roles = roles_of(scale_param_groups(Language(tied=True), tied=role))
    assert roles["table.weight"] == role
    assert "head.weight" not in roles
    model = Language(tied=True)
    optimizer = SCALE.of(model, tied=role)
    language_loss(model, 0).backward()
    optimizer.step()
    assert bool(optimizer.state.get(model.table.weight)) == (role == "last")


def test_a_tied_head_is_found_wherever_it_was_registered():
    model = Language(tied=True)
    model.afterwards = nn.Linear(2, 2)
    assert roles_of(scale_param_groups(model, tied="last"))["table.weight"] == "last"


@pytest.mark.parametrize("last", [None, "table"])
def test_tied_weights_are_refused_without_a_role(last):
    # Named as the last layer: an embedding whose weight is used again as a function's argument.
    with pytest.raises(ValueError, match=r"shares its weight with an embedding.*tied='last'.*tied='embedding'"):
        scale_param_groups(Language(tied=last is None), last=last)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: scale_param_groups(model, tied="hidden"),
            "tied must be one of last, embedding, got 'hidden'",
        ),
        (lambda model: scale_param_groups(model, tied="last"), "'head' shares no weight.*leave it out"),
        (
            lambda model: scale_param_groups(model, last="tail"),
            r"last must be one of .*\(table, mixing.*got 'tail'",
        ),
        (lambda model: scale_param_groups(model, last=nn.Linear(2, 2)), "a Linear that is not in the model"),
        (lambda model: scale_param_groups(model, last="norm"), "last='norm' has no matrix"),
        (lambda _: scale_param_groups(nn.Conv1d(2, 2, 1)), "Conv1d has no torch.nn.Linear.*last="),
        (lambda model: SCALE(model.parameters()), r"matrix \(7, 4\) and no role.*SCALE.of\(model\)"),
        (lambda model: SCALE(model.parameters(), role="head"), "role must be one of hidden, embedding.*'head'"),
        (lambda model: SCALE.of(model, momentum=1.0), "momentum must be .* below 1, got 1.0"),
        (lambda model: SCALE.of(model, betas=(0.9, 1.0)), r"betas\[1\]"),
        (lambda model: SCALE.of(model, betas=0.9), "betas must be a pair"),
        (lambda model: SCALE.of(model, eps=0.0), "eps must be .* above 0"),
        (lambda model: SCALE.of(model, weight_decay=-1.0), "weight_decay"),
        (lambda model: base_optimizer("scale", model.parameters()), "scale has to know the layers"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(Language())


def test_parameters_in_place_of_a_model_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module.*got list.*'role'"):
        scale_param_groups(list(Language().parameters()))  # pyright: ignore[reportArgumentType]


def test_vectors_need_no_role():
    assert SCALE([nn.Parameter(torch.ones(3))]).param_groups[0]["role"] is None


def test_a_refused_group_is_not_added():
    optimizer = SCALE.of(Language())
    with pytest.raises(ValueError, match="no role"):
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(2, 2)))]})
    assert len(optimizer.param_groups) == 4


def test_an_error_names_the_parameter():
    model = Language()
    optimizer = SCALE.of(model)
    language_loss(model, 0).backward()
    assert model.hidden.weight.grad is not None
    model.hidden.weight.grad[0, 0] = math.inf
    with pytest.raises(ArithmeticError, match=r"parameter 'hidden.weight' \(4, 4\)"):
        optimizer.step()


# ---------------------------------------------------------------------- under OptEx


def test_rounds_of_a_model_with_all_roles_lower_its_loss():
    model = Language()
    optimizer = OptEx(SCALE.of(model, lr=0.003), parallelism=3, model=model)
    before = sum(language_loss(model, i).item() for i in range(5))
    for _ in optimizer.rounds(range(60), lambda number: language_loss(model, number)):
        pass
    assert sum(language_loss(model, i).item() for i in range(5)) < 0.8 * before


def test_the_registry_makes_it_of_a_model():
    model = Language()
    assert same(base_optimizer("scale", model, lr=0.1).param_groups[2]["params"], [model.head.weight])
