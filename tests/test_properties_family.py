"""The family's sources, solvers, regularisers and minimizers under arguments of all kinds.

As in ``tests/test_properties.py``: a call works, with finite answers, or is refused with a TypeError, a
ValueError or an error of ``optex.errors`` whose message names an argument of the call.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import optex
from optex import regularisers, solvers, sources
from tests.arguments import FLAGS, SMALL, Door, merged, sweep, try_together
from tests.models import network, regression_batches, squared_error
from tests.references.maid import dense_quadratic
from tests.references.scalebio import Regression, Tower, line
from tests.references.transport import problem as transport_problem

F64: Final = torch.float64
MODEL = network(seed=4)
PARAMETERS = list(MODEL.parameters())
BATCH = regression_batches(1)[0]
POINT = nn.Parameter(torch.tensor([1.0, -1.0, 0.5], dtype=F64))
HALVES = [POINT, nn.Parameter(torch.tensor([[2.0]], dtype=F64))]


def loss(batch):
    return squared_error(MODEL)(BATCH if batch is None else batch)


def bowl(batch=None):
    return sum((0.5 * (p - 0.3).square().sum() for p in HALVES), torch.zeros((), dtype=F64))


def rows(points):  # of ConsensusSource and SPSASource, vectorized: one value a row
    return (points - 0.3).square().flatten(1).sum(1)


def asked(source, batch=None):
    """What a source answers, and the gradient it leaves."""
    for p in (*PARAMETERS, *HALVES):
        p.grad = None
    value, noise = source.gradient(batch)
    assert noise is None or float(noise) >= 0
    return value, [p.grad for p in (*PARAMETERS, *HALVES) if p.grad is not None]


def zeroth_order(kind):
    def call(parameters, vectorized=False, **options):
        function = (lambda _, *points: sum(map(rows, points))) if vectorized is True else bowl
        if kind is optex.CoordinateSource:
            return asked(kind(bowl, parameters, vectorized=vectorized, **options))
        if kind is optex.ConsensusSource and vectorized is True:
            function = lambda points, _: rows(points)  # noqa: E731
        return asked(kind(function, parameters, vectorized=vectorized, **options))

    return call


# ------------------------------------------------------------------ sources

_QUADRATIC = dense_quadratic(4, 3)
_LEVELS = {
    "lower": _QUADRATIC.lower,
    "upper": _QUADRATIC.upper,
    "start": torch.zeros(4, dtype=F64),
    **_QUADRATIC.constants(),
}


def smooth_bilevel(**options):
    theta = nn.Parameter(torch.ones(3, dtype=F64))
    levels = optex.SmoothBilevel(**options)
    source = optex.InexactBilevelSource(levels, [theta], epsilon=1e-2, delta=1e-2)
    return source.gradient(None)[0], theta.grad


def inexact(**options):
    source = optex.InexactBilevelSource(**options)
    return source.gradient(None)[0]


THETA = nn.Parameter(torch.ones(3, dtype=F64))
_REGRESSION = Regression(rows=6)


def penalty(**options):
    x = nn.Parameter(torch.ones(2, dtype=F64))
    source = optex.PenaltyHypergradient(
        lambda x, y, _: ((y[0] if isinstance(y, (list, tuple)) else y) - 1).square().sum(),
        lambda x, y, _: (y - x).square().sum() / 2,
        **merged({"parameters": x}, options),
    )
    return source.gradient(None)[0], x.grad


def minimax(layers=None, **options):
    source = optex.MinimaxPenaltySource(
        _REGRESSION.upper,
        _REGRESSION.lower,
        **merged({"model": line(), "weights": optex.SourceWeights(3, dtype=F64)}, options),
        layers=layers,
    )
    return source.gradient(None)[0]


def layer_sampler(**options):
    sampler = optex.LayerSampler(**options)
    source = optex.MinimaxPenaltySource(
        _REGRESSION.upper, _REGRESSION.lower, optex.SourceWeights(3, dtype=F64), Tower(), layers=sampler
    )
    return [source.gradient(batch)[0] for batch in sampler.numbered([None, None])]


def trajectory(**options):
    torch.manual_seed(0)
    found, _ = optex.TrajectorySource(**options).gradient(None)
    return found


def linear_quadratic(**options):
    system = optex.LinearQuadratic(**options)
    policy = optex.GaussianPolicy(system.observation_size, system.action_size, hidden=())
    torch.manual_seed(0)
    return optex.TrajectorySource(policy, system, 2).gradient(None)[0]


def gaussian_policy(**options):
    policy = optex.GaussianPolicy(**options)
    return policy, policy(torch.zeros(2, options["observations"], dtype=options.get("dtype"))).sample()


def softmax_policy(**options):
    policy = optex.SoftmaxPolicy(**options)
    return policy, policy(torch.zeros(2, options["observations"], dtype=options.get("dtype"))).sample()


def gymnasium_environment(**options):
    environment = optex.GymnasiumEnvironment(**options)
    episodes = environment.begin(1, torch.Generator().manual_seed(0))
    return environment.horizon, episodes.observations


def sketch(**options):
    made = optex.Sketch(**options)
    return made.desk(made.sk(torch.ones(8, dtype=F64), 3), 8, 3)


def sketched(**options):
    return asked(optex.SketchedSource(**options), torch.zeros(()))


def mask(**options):
    made = optex.DynamicMask(**options)
    return asked(optex.CoordinateSource(bowl, HALVES, mask=made))


def semi_dual(**options):
    alpha = nn.Parameter(torch.zeros(4, dtype=F64))
    source = optex.SemiDualSource(**merged({"alpha": alpha}, options))
    return source.gradient(torch.tensor([0]) if options.get("sampled") else None)[0]


_A, _B, _C = transport_problem(4, 3)
_TRANSPORT: dict[str, tuple[Any, ...]] = {
    "a": (_A, torch.from_numpy(_A)),
    "b": (_B, torch.from_numpy(_B)),
    "C": (_C, torch.from_numpy(_C)),
    "gamma": (0.5, 1),
    "k": (2, 4),
}
_ENVIRONMENT = optex.LinearQuadratic(horizon=3)
_GAUSSIAN = optex.GaussianPolicy(1, 1, hidden=())
_SKETCH = optex.Sketch("gaussian", 2)
_BLOCKS = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double()


def block_loss(**options):
    return asked(optex.CoordinateSource(optex.BlockLoss(**options), _BLOCKS.parameters()), BATCH)[0]


def privacy(**options):
    mechanism = optex.GaussianMechanism(**options)
    return mechanism.epsilon(2, 1e-5)


def grasp(**options):
    return optex.zo_grasp_ratios(optex.CoordinateSource(loss, PARAMETERS), PARAMETERS, BATCH, **options)


def attack(**options):
    gradient = lambda data: 2 * (data - 1).flatten()  # noqa: E731
    made = optex.leakage_attack(gradient, **options)
    return made.data, made.mismatch


SOURCES: dict[str, Door] = {
    "ObjectiveSource": Door(
        lambda **o: asked(optex.ObjectiveSource(**o)),
        {"objective": (loss,), "deterministic": FLAGS, "create_graph": (False,)},
    ),
    "ClosureSource": Door(
        lambda closure, **o: asked(
            sources.ClosureSource(closure if closure is not loss else lambda: backward(loss(None)), **o)
        ),
        {"closure": (loss,), "deterministic": FLAGS},
    ),
    "AccumulatingSource": Door(
        lambda **o: asked(optex.AccumulatingSource(**o), [BATCH, BATCH]),
        {"objective": (loss,), "parameters": (None, PARAMETERS), "create_graph": (False,)},
    ),
    "PerSampleSource": Door(
        lambda **o: asked(optex.PerSampleSource(**o), BATCH),
        {"objective": (loss,), "model": (MODEL,), "chunk_size": (None, 1, 5)},
    ),
    "LossModule": Door(lambda **o: sources.LossModule(**o)(BATCH), {"model": (MODEL,), "objective": (loss,)}),
    "backpropagate": Door(
        lambda loss, **o: sources.backpropagate(bowl() if loss is bowl else loss, **o),
        {"loss": (bowl,), "create_graph": (False,)},
    ),
    "SPSASource": Door(
        zeroth_order(optex.SPSASource),
        {
            "parameters": (HALVES, tuple(HALVES)),
            "epsilon": (1e-3, 1),
            "queries": (1, 3),
            "vectorized": (False,),
            "chunk": (None, 2),
        },
    ),
    "ConsensusSource": Door(
        zeroth_order(optex.ConsensusSource),
        {
            "parameters": (HALVES, tuple(HALVES)),
            "samples": (4, 7),
            "alpha": (100.0, 1),
            "sigma": (0.7, 1),
            "antithetic": FLAGS,
            "vectorized": FLAGS,
        },
        ("objective",),
    ),
    "CoordinateSource": Door(
        zeroth_order(optex.CoordinateSource),
        {
            "parameters": (HALVES, tuple(HALVES)),
            "mu": (5e-3, 1),
            "central": FLAGS,
            "mask": (None, optex.DynamicMask(HALVES, 0.5)),
            "vectorized": (False,),
            "chunk": (64, 1),
            "reuse": FLAGS,
            "deterministic": FLAGS,
            "executor": (None,),
            "workers": (2, 1),
            "group": (None,),
        },
    ),
    "BlockLoss": Door(
        block_loss,
        {
            "blocks": (_BLOCKS, list(_BLOCKS)),
            "loss": (lambda out, batch: (out - batch[1]).square().mean(),),
            "inputs": (lambda batch: batch[0],),
        },
    ),
    "DynamicMask": Door(
        mask, {"parameters": (HALVES,), "ratios": (0.5, 1.0, [0.5, 1.0]), "every": (5, 1), "seed": (0, 3)}
    ),
    "zo_grasp_ratios": Door(grasp, {"sparsity": (0.5, 0.9), "mu": (5e-3, 0.1), "signed": FLAGS}),
    "SmoothBilevel": Door(
        smooth_bilevel,
        {name: (value,) for name, value in _LEVELS.items()} | {"convex_upper": (True, False)},
        unswept=("start",),
        functions=("strong_convexity", "lower_lipschitz"),
    ),
    "InexactBilevelSource": Door(
        inexact,
        {
            "problem": (optex.SmoothBilevel(**_LEVELS),),
            "parameters": ([THETA],),
            "epsilon": (1e-2, 0.1),
            "delta": (1e-2, 0.1),
            "max_iterations": (500, 1000),
            "tell_noise": FLAGS,
        },
        unswept=("parameters",),
    ),
    "PenaltyHypergradient": Door(
        penalty,
        {
            "start": (torch.zeros(2, dtype=F64),),
            "sigma": (0.01, 1),
            "inner_steps": (100, 50),
            "tolerance": (1e-2, None),
            "rate": (None, 0.1),
            "deterministic": (True, False),
        },
        ("parameters",),
    ),
    "MinimaxPenaltySource": Door(
        minimax,
        {
            "weights": (optex.SourceWeights(3, dtype=F64),),
            "model": (line(seed=1),),
            "rival": (None, line(seed=2)),
            "alpha": (10.0, 1),
            "scale": (None, 0.5),
            "layers": (None,),
            "deterministic": FLAGS,
        },
    ),
    "LayerSampler": Door(
        layer_sampler,
        {
            "path": ("blocks",),
            "active": (2, 1),
            "interval": (20, 1),
            "seed": (0, 7),
            "frozen": ("zero", "none"),
        },
    ),
    "SourceWeights": Door(
        lambda **o: optex.SourceWeights(**o)(),
        {
            "sources": (3, 2, ["a", "b"]),
            "dtype": (None, F64),
        },
    ),
    "TrajectorySource": Door(
        trajectory,
        {
            "policy": (_GAUSSIAN,),
            "environment": (_ENVIRONMENT,),
            "trajectories": (2, 5),
            "discount": (0.99, 1.0),
            "estimator": ("gpomdp", "reinforce"),
            "baseline": FLAGS,
        },
    ),
    "LinearQuadratic": Door(
        linear_quadratic,
        {
            "A": (0.9, torch.tensor([[0.5]])),
            "B": (0.5, torch.tensor([[0.5]])),
            "noise": (0.1, 0),
            "Q": (1.0, 2),
            "R": (1.0, 2),
            "start": (1.0, 0),
            "horizon": (3, 1),
        },
    ),
    "GaussianPolicy": Door(
        gaussian_policy,
        {
            "observations": (3, 1),
            "actions": (1, 2),
            "hidden": ((4,), (), [3, 2]),
            "deviation": (1.0, 0.5),
            "learn_deviation": FLAGS,
            "bias": FLAGS,
            "dtype": (None, F64),
        },
    ),
    "SoftmaxPolicy": Door(
        softmax_policy,
        {
            "observations": (3, 1),
            "actions": (2, 3),
            "hidden": ((4,), (), [3, 2]),
            "bias": FLAGS,
            "dtype": (None, F64),
        },
    ),
    "GymnasiumEnvironment": Door(
        gymnasium_environment, {"name": ("CartPole-v1",), "horizon": (5, None)}, functions=("name",)
    ),
    "Sketch": Door(sketch, {"kind": ("gaussian", "srht", "count", "ams"), "size": (2, 8), "seed": (0, 5)}),
    "SketchState": Door(lambda **o: optex.SketchState(**o), {"sketch": (_SKETCH,), "process_group": (None,)}),
    "SketchedSource": Door(
        sketched,
        {
            "source": (optex.ObjectiveSource(bowl),),
            "sketch": (_SKETCH,),
            "parameters": (HALVES, tuple(HALVES)),
            "fixed": FLAGS,
        },
    ),
    "GaussianMechanism": Door(
        privacy, {"clip": (1.0, 2), "noise_multiplier": (1.0, 0.5), "sensitivity": (2.0, 1)}
    ),
    "leakage_attack": Door(
        attack,
        {
            "observed": (torch.ones(3, dtype=F64),),
            "start": (torch.zeros(3, dtype=F64),),
            "sketch": (None,),
            "number": (0, 5),
            "steps": (2, 5),
            "lr": (1.0, 0.1),
        },
    ),
    "SemiDualSource": Door(
        semi_dual, {"alpha": (nn.Parameter(torch.zeros(4, dtype=F64)),)} | _TRANSPORT | {"sampled": FLAGS}
    ),
}


def backward(value):
    value.backward()
    return value


# ------------------------------------------------------------------ solvers

_SPD = np.array([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 5.0]])
_SYSTEM: dict[str, tuple[Any, ...]] = {
    "A": (_SPD, torch.tensor(_SPD)),
    "b": (np.ones(3), torch.ones(3, dtype=F64)),
    "omega": (1.0, 1.5),
    "x0": (None, np.zeros(3)),
    "tol": (1e-3, 0.5),
    "maxiter": (50, 1),
    "callback": (None, lambda intermediate_result: None),
}


def matching(call):
    """b and x0 as tensors where A is one: kinds that do not match are refused, which other tests hold."""

    def matched(**options):
        if isinstance(options.get("A"), torch.Tensor) and options["A"].shape == (3, 3):
            options = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
        return call(**options)

    return matched


def equality(**options):
    return optex.minimize_equality(
        lambda x: (x**2).sum(), lambda x: x[:1] + x[1:] - 1, **merged({"seed": 0, "maxiter": 5}, options)
    )


def scipy_equality(**options):
    constraint = {"type": "eq", "fun": lambda x: x[0] + x[1] - 1}
    return optex.equality_method(
        lambda x: (x**2).sum(),
        **{"x0": [1.0, 0.0], "constraints": constraint, "maxiter": 5, "jac": lambda x: 2 * x} | options,
    )


_IN_CONTEXT = {
    "inputs": (torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64),),
    "targets": (torch.linspace(-1, 1, 6, dtype=F64),),
}


def bandit(**options):
    if options["method"] == "chebcb" and options["contexts"] is None:
        options["contexts"] = (0.0, 2.0)  # which this method needs
    tuner = optex.BanditTuner(**options)
    context = 1.0 if options.get("contexts") is not None else None
    found = []
    for _ in range(3):
        found.append(float(tuner.suggest(context)))
        tuner.observe(3.0)
    return found


def transport_loss(**options):
    made = optex.SparseOTLoss(**options)
    return made(torch.from_numpy(_C), torch.from_numpy(_A), torch.from_numpy(_B))


_STEPS = {"tol": (1e-2, 0.1), "maxiter": (20, 1), "callback": (None, lambda intermediate_result: None)}
SOLVERS: dict[str, Door] = {
    "sor": Door(matching(optex.sor), _SYSTEM),
    "ssor_pcg": Door(matching(optex.ssor_pcg), _SYSTEM),
    "optimal_omega": Door(solvers.optimal_omega, {"A": (_SPD, torch.tensor(_SPD))}),
    "BanditTuner": Door(
        bandit,
        {
            "grid": ([0.5, 1.0, 1.5], (1, 2), np.array([1.0, 2.0])),
            "method": ("tsallis-inf", "chebcb"),
            "contexts": (None, (0.0, 2.0)),
            "features": (6, 1),
            "least": (0.0, 1),
            "seed": (0, None, 5),
        },
    ),
    "dcdm": Door(
        matching(optex.dcdm),
        {
            "A": (_SPD, torch.tensor(_SPD)),
            "b": (np.ones(3), torch.ones(3, dtype=F64)),
            "direction": (lambda r: r,),
            "memory": (2, 1),
            "x0": (None, np.zeros(3)),
            "patience": (10, None),
        }
        | _STEPS,
    ),
    "DCDMLoss": Door(
        lambda A: solvers.DCDMLoss(A)(torch.ones(1, 3), torch.ones(1, 3)),
        {"A": (torch.tensor(_SPD), _SPD)},
        functions=("A",),
    ),
    "DirectionNetwork": Door(
        lambda **o: solvers.DirectionNetwork(**o)(torch.ones((8,) * o.get("dimension", 2))),
        {"dimension": (2, 3), "channels": (2, 4), "levels": (1, 2)},
    ),
    "ritz_vectors": Door(
        lambda **o: list(vars(solvers.ritz_vectors(**o)).values()),
        {"A": (torch.tensor(_SPD), _SPD), "count": (2, 3), "shape": (None, (3,)), "seed": (0, 5)},
    ),
    "minimize_equality": Door(
        equality,
        {
            "x0": ([1.0, 0.0], torch.tensor([0.5, 0.5])),
            "lam0": (None, [0.0]),
            "linear_solver": ("minres", "direct", "gv", "rk"),
            "tol": (1e-4, 0.1),
            "maxiter": (5, 1),
            "eta1": (1.0, 2),
            "eta2": (0.1, 0.5),
            "delta": (0.1, 0.5),
            "beta": (0.1, 0.3),
            "nu": (1.5, 2),
            "theta": (1.0, 0.5),
            "xi_B": (0.1, 1),
            "inner_maxiter": (50, 100),
            "seed": (0, None, 5),
            "callback": (None, lambda intermediate_result: None),
        },
        ("c returns",),
    ),
    "equality_method": Door(
        scipy_equality,
        {
            "x0": ([1.0, 0.0],),
            "bounds": (None,),
            "hessp": (None,),
            "constraints": ({"type": "eq", "fun": lambda x: x[0] + x[1] - 1},),
            "linear_solver": ("minres", "direct"),
            "tol": (1e-4, 0.1),
            "maxiter": (5, 1),
        },
        ("hess", "method", "jac"),
        unswept=("x0",),
    ),
    "newton_schulz_inverse": Door(
        optex.newton_schulz_inverse,
        {
            "S": (_SPD, torch.tensor(_SPD)),
            "tol": (None, 1e-3),
            "maxiter": (30, 1),
            "init": ("trace", "norm", 0.05),
            "callback": (None, lambda intermediate_result: None),
        },
    ),
    "iterative_newton_predictor": Door(
        solvers.iterative_newton_predictor, _IN_CONTEXT | {"steps": (2, 1), "init": ("norm", "trace")}
    ),
    "gradient_descent_predictor": Door(
        solvers.gradient_descent_predictor, _IN_CONTEXT | {"steps": (2, 1), "lr": (0.01, 0.1)}
    ),
    "online_gradient_descent_predictor": Door(
        solvers.online_gradient_descent_predictor,
        _IN_CONTEXT | {"passes": (1, 2), "lr": (0.01, 0.1), "rule": ("constant", "normalised")},
    ),
    "similarity_of_errors": Door(
        solvers.similarity_of_errors,
        {
            "first": (torch.arange(12.0).view(2, 2, 3),),
            "second": (torch.arange(12.0).view(2, 2, 3).cos(),),
            "targets": (torch.zeros(2, 3),),
        },
    ),
    "sparse_ot": Door(
        optex.sparse_ot,
        _TRANSPORT
        | {
            "form": ("semi-dual", "dual"),
            "tol": (1e-3, 0.1),
            "maxiter": (20, 1),
            "alpha0": (None, np.zeros(4)),
        },
    ),
    "SparseOTLoss": Door(
        transport_loss,
        {
            "gamma": (0.5, 1),
            "k": (2, 4),
            "form": ("semi-dual", "dual"),
            "tol": (1e-3, 0.1),
            "maxiter": (50, 100),
            "reduction": ("mean", "sum", "none"),
        },
    ),
}


# ------------------------------------------------------------------ regularisers


def decay(t, u):
    return -u


def flow(**options):
    return regularisers.Flow(**options)(torch.ones(2, 1, dtype=F64))


def regularised(kind: Any):
    """A term of one solve, as the objective with that term has it."""
    made = regularisers.Flow(decay, rtol=1e-3, atol=1e-3)
    return optex.regularise(lambda _: made(torch.ones(1, 1, dtype=F64)).sum(), made, kind)(None)


_FLOW = regularisers.Flow(decay, rtol=1e-3, atol=1e-3)


def through(_):
    return _FLOW(torch.ones(1, 1, dtype=F64)).sum()


_KINDS = ("error", "stiffness")
REGULARISERS: dict[str, Door] = {
    "Flow": Door(
        flow, {"field": (decay,), "rtol": (1e-3, 1e-2), "atol": (1e-3, 1e-2), "max_steps": (200, 500)}
    ),
    "GlobalRegularizer": Door(
        lambda **o: regularised(regularisers.GlobalRegularizer(**o)),
        {"kind": _KINDS, "aggregate": (None, "mean", "sum", "max")},
    ),
    "LocalRegularizer": Door(
        lambda **o: regularised(regularisers.LocalRegularizer(**o)),
        {
            "kind": _KINDS,
            "mode": ("unbiased", "biased"),
            "published": FLAGS,
            "generator": (None, torch.Generator()),
        },
    ),
    "regularise": Door(
        lambda **o: optex.regularise(**o)(None),
        {"objective": (through,), "flow": (_FLOW,), "kind": ("local", "error"), "strength": (1.0, 0)},
    ),
    "RegularisedObjective": Door(
        lambda **o: regularisers.RegularisedObjective(**o)(None),
        {
            "objective": (through,),
            "flow": (_FLOW,),
            "term": (regularisers.LocalRegularizer(),),
            "strength": (1.0, 0.5),
        },
    ),
}


# ------------------------------------------------------------------ minimizers


def federated(**options):
    def fun(x, client):
        return ((x - (client if isinstance(client, float) else 0.0)) ** 2).sum()

    return optex.federated_minimize(fun, **options)


def bilevel(**options):
    return optex.solve_bilevel(
        lambda x, y, _: ((y - 1) ** 2).sum(), lambda x, y, _: ((y - x) ** 2).sum() / 2, **options
    )


def policies(**options):
    torch.manual_seed(0)
    return optex.policy_gradient(optex.GaussianPolicy(1, 1, hidden=()), _ENVIRONMENT, **options)


def reweighted(**options):
    torch.manual_seed(0)
    x = torch.randn(3, 6, 2)
    return optex.reweight_sources(
        nn.Linear(2, 1),
        lambda model, batch: (model(batch[0])[..., 0] - batch[1]).square(),
        {"a": (x[0], x[0].sum(1)), "b": (x[1], x[1].sum(1))},
        (x[2], x[2].sum(1)),
        **options,
    ).weights


MINIMIZERS: dict[str, Door] = {
    "federated_minimize": Door(
        federated,
        {
            "x0": (np.zeros(2), torch.zeros(2, dtype=F64)),
            "clients": ([0.0, 1.0],),
            "lr": (0.1, 0.2),
            "sketch": (None, _SKETCH),
            "local_steps": (1, 2),
            "server_lr": (None, 1.0),
            "privacy": (None, optex.GaussianMechanism(1.0, 1.0)),
            "seed": (0, 5),
            "first_round": (0, 3),
            "callback": (None, lambda intermediate_result: None),
            "maxiter": (2, 3),
            "gtol": (1e-5, 0.0),
            "disp": (False,),
        },
    ),
    "maid": Door(
        optex.maid,
        {
            "problem": (optex.SmoothBilevel(**_LEVELS),),
            "theta0": (torch.ones(3, dtype=F64), np.ones(3)),
            "epsilon": (0.1, 0.5),
            "delta": (0.1, 0.5),
            "beta": (0.1, 0.2),
            "eta": (1e-4, 1e-3),
            "rho": (0.9, 0.5),
            "tau": (0.5, 0.9),
            "nu": (1.05, 2.0),
            "max_backtracks": (3, 10),
            "maxiter": (2, 1),
            "max_evaluations": (None, 20),
            "max_iterations": (500, 1000),
            "gtol": (0.0, 0.1),
            "trials": (1, 2),
            "workers": (None, lambda function, *points: map(function, *points)),
            "callback": (None, lambda intermediate_result: None),
        },
        unswept=("theta0",),
    ),
    "policy_gradient": Door(
        policies,
        {
            "method": ("n-pg-igt", "harpg", "pg"),
            "steps": (2, 1),
            "environment_steps": (None, 20),
            "trajectories": (2, 3),
            "discount": (0.99, 1.0),
            "lr": (None, 0.1),
            "eta0": (1.0, 0.5),
            "optimizer": ("sgd",),
            "estimator": ("gpomdp", "reinforce"),
            "baseline": (None, True),
            "seed": (0, None),
            "callback": (None, lambda intermediate_result: None),
            "disp": (False,),
        },
    ),
    "reweight_sources": Door(
        reweighted,
        {
            "alpha": (10.0, 1),
            "tau": (1.0, 2),
            "outer": (1, 2),
            "batches": (2, 3),
            "lr": (1e-3, 1e-2),
            "lr_weights": (1e-2, 0.1),
            "weight_decay": (0.0, 0.1),
            "optimizer": ("adamw", "sgd", torch.optim.SGD),
            "batch_size": (2, None),
            "layers": (None,),
            "seed": (0, 3),
            "parallelism": (1, 2),
            "stride": (1, "auto"),
            "evaluator": (None,),
            "callback": (None, lambda intermediate_result: None),
            "disp": (False,),
        },
    ),
    "scipy_method": Door(
        lambda **o: optex.scipy_method(lambda x: (x**2).sum(), **merged({"maxiter": 2}, o)),
        {
            "x0": ([1.0, 2.0],),
            "hess": (None,),
            "hessp": (None,),
            "bounds": (None,),
            "constraints": ((),),
            "callback": (None, lambda x: None),
            "tol": (None, 1e-3),
            "lr": (0.1, None),
            "maxiter": (2, 1),
        },
        ("learning rate",),
    ),
    "solve_bilevel": Door(
        bilevel,
        {
            "x0": (np.zeros(2), torch.zeros(2, dtype=F64)),
            "y0": (np.zeros(2), torch.zeros(2, dtype=F64)),
            "sigma": (0.01, 0.1),
            "lr": (None, 0.1),
            "rate": (None, 0.1),
            "inner_steps": (20, 5),
            "tolerance": (1e-2, None),
            "optimizer": ("adam", "sgd"),
            "parallelism": (1, 2),
            "evaluator": (None,),
            "batches": (None,),
            "callback": (None, lambda intermediate_result: None),
            "maxiter": (2, 3),
            "gtol": (1e-5, 0.0),
            "disp": (False,),
        },
    ),
}

# What a call says of a lower level or a plan that few iterations leave open.
pytestmark = pytest.mark.filterwarnings(
    "ignore:scipy_method. the method does not use:RuntimeWarning",
    "ignore::optex.ConvergenceWarning",
    "ignore::optex.LowerLevelWarning",
    "ignore::optex.JitterWarning",
)
DOORS: dict[str, Door] = SOURCES | SOLVERS | REGULARISERS | MINIMIZERS


# ------------------------------------------------------------------ the tests


@pytest.mark.parametrize("name", DOORS)
def test_every_odd_argument_works_or_is_refused_by_name(name):
    sweep(DOORS[name])


@pytest.mark.parametrize("name", DOORS)
@settings(SMALL, max_examples=8)
@given(data=st.data())
def test_arguments_together_work_or_are_refused_by_name(name, data):
    try_together(DOORS[name], data)
