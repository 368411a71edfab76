"""Which optimizers can be the base, and what is said of those that cannot."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from optex import optimizers
from optex.stepping.bases import (
    MODEL_OPTIMIZERS,
    OPTIMIZERS,
    REFUSED,
    base_optimizer,
    check_base,
    check_name,
    check_settings,
    default_rate,
)


def exactly(message):
    return f"^{re.escape(message)}$"


def layers():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("as_module", [True, False])
def test_optimizers_are_made_by_name_of_a_module_or_its_parameters(name, as_module):
    model = layers() if name != "muon" else nn.Linear(4, 3, bias=False)
    base = base_optimizer(name, model if as_module else model.parameters(), lr=0.03)
    wanted: Any = OPTIMIZERS[name]
    kind: Any = wanted.func if isinstance(wanted, partial) else wanted
    assert isinstance(base, kind)
    assert [id(p) for group in base.param_groups for p in group["params"]] == [
        id(p) for p in model.parameters()
    ]
    assert base.param_groups[0]["lr"] == 0.03
    check_base(base)


@pytest.mark.parametrize("name", MODEL_OPTIMIZERS)
def test_optimizers_of_a_model_are_made_of_its_layers(name):
    base = base_optimizer(name, layers(), lr=0.03)
    assert base.param_groups[0]["lr"] == 0.03
    with pytest.raises(
        ValueError, match=exactly(f"optimizer: {name} has to know the layers; hand it a torch.nn.Module")
    ):
        base_optimizer(name, layers().parameters())


def test_settings_that_are_not_named_are_the_optimizers_own():
    assert base_optimizer("adam", layers()).param_groups[0]["lr"] == 1e-3
    assert base_optimizer("momentum", layers()).param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("name", ["lbfgs", "", None])
def test_unknown_names_are_refused_with_those_that_are_known(name):
    known = ", ".join([*OPTIMIZERS, *MODEL_OPTIMIZERS])
    for refuse in (check_name, lambda name: base_optimizer(name, layers())):
        with pytest.raises(ValueError, match=exactly(f"optimizer: {name!r} is not one of {known}")):
            refuse(name)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *MODEL_OPTIMIZERS])
def test_known_names_are_taken(name):
    check_name(name)
    assert 0 < default_rate(name) <= 1


@pytest.mark.parametrize(("name", "rate"), [("sgd", 0.1), ("adam", 0.01), ("no such", 0.01)])
def test_the_rate_is_a_hundredth_where_none_is_known(name, rate):
    assert default_rate(name) == rate


# ---------------------------------------------------------------------- keywords


def test_unknown_keywords_are_refused_with_those_that_are_taken():
    with pytest.raises(TypeError) as error:
        check_settings("minimize", "sgd", {"momentum": 0.9, "speed": 1}, {})
    said = str(error.value)
    assert said.startswith("minimize: there is no argument 'speed'; optimizer 'sgd' takes momentum, dampening,")
    taken = said.partition("takes ")[2].split(", ")
    assert not {"params", "lr"} & set(taken)


def test_keywords_from_elsewhere_get_a_remedy():
    with pytest.raises(TypeError, match=exactly("minimize: there is no argument 'ftol'; pass tol")):
        check_settings("minimize", "adam", {"ftol": 1}, {"ftol": "pass tol"})


def test_unknown_keywords_of_a_factory_are_refused():
    with pytest.raises(TypeError, match=r"solve: there is no argument 'nesterov'; .*Adam.* takes betas"):
        check_settings("solve", torch.optim.Adam, {"nesterov": True}, {})


@pytest.mark.parametrize(
    "optimizer",
    [
        "sgd",
        "no such optimizer",  # that is said elsewhere
        lambda params, **settings: torch.optim.SGD(params, **settings),  # it takes anything
        dict,  # its signature is not known
    ],
    ids=["known", "no name", "any keyword", "builtin"],
)
def test_keywords_pass_where_nothing_speaks_against_them(optimizer):
    check_settings("minimize", optimizer, {"momentum": 0.9}, {})


# ---------------------------------------------------------------------- what cannot be the base


def one(value=1.0):
    return [nn.Parameter(torch.tensor([value]))]


def sparse():
    return nn.Parameter(torch.eye(2).to_sparse())


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: torch.optim.Adam,
            TypeError,
            "OptEx: base must be a torch.optim.Optimizer instance, got type; for example "
            "OptEx(torch.optim.Adam(model.parameters(), lr=1e-3))",
        ),
        (
            lambda: torch.optim.LBFGS(one()),
            TypeError,
            "OptEx: LBFGS cannot be the base: it evaluates its closure several times a step, so there is no "
            "single next gradient to predict",
        ),
        (
            lambda: type("Mine", (torch.optim.LBFGS,), {})(one()),
            TypeError,
            f"OptEx: Mine cannot be the base: {REFUSED[torch.optim.LBFGS]}",
        ),
        (
            lambda: torch.optim.SGD([torch.zeros(2)], lr=0.1),
            ValueError,
            "OptEx: base has no parameter that requires a gradient and holds a number; there is nothing to "
            "optimise",
        ),
        (
            lambda: torch.optim.SGD([nn.Parameter(torch.zeros(0))], lr=0.1),
            ValueError,
            "OptEx: base has no parameter that requires a gradient and holds a number; there is nothing to "
            "optimise",
        ),
        (
            lambda: torch.optim.SGD([*one(), nn.Parameter(torch.ones(2, dtype=torch.complex64))], lr=0.1),
            TypeError,
            "OptEx: base has complex parameters; optimise torch.view_as_real(parameter) instead",
        ),
        (
            lambda: torch.optim.SGD([*one(), sparse()], lr=0.1),
            TypeError,
            "OptEx: base has sparse parameters; use dense ones (parameter.to_dense())",
        ),
        (
            lambda: torch.optim.SGD([{"params": one()}, {"params": one(), "differentiable": True}], lr=0.1),
            ValueError,
            "OptEx: base was built with differentiable=True; drafted steps are taken back, so there is nothing "
            "to differentiate through. Build it without",
        ),
    ],
)
def test_what_cannot_be_the_base_is_refused_with_the_reason(make, kind, message):
    with pytest.raises(kind, match=exactly(message)):
        check_base(make())


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.optim.SGD([*one(), torch.zeros(2)], lr=0.1),  # one is frozen
        lambda: torch.optim.SGD([nn.Parameter(torch.zeros(0)), *one()], lr=0.1),  # one is empty
        lambda: torch.optim.SGD([*one(), torch.eye(2).to_sparse()], lr=0.1),  # sparse, but frozen
        lambda: torch.optim.Adam(one()),
        lambda: optimizers.NAG(one(), lr=0.1),
    ],
)
def test_what_can_be_the_base_passes(make):
    check_base(make())
