"""The torch path of the small algebra: the slow twin of NumPy's, compiled, and without waiting for the device.

On a machine without an accelerator `small.tensors()` takes that path in main memory.
"""

import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from optex import (
    CommitteeEstimator,
    CurlFreeEstimator,
    GradientHistory,
    HoldLast,
    OptEx,
    SeparableEstimator,
    small,
)
from optex.estimators.arrivals import Arrivals
from optex.estimators.committee import default_members
from optex.estimators.judgement import squared_errors
from optex.studies.problems import make_problem

CLOSE = 1e-9
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])

ESTIMATORS = {
    "curl-free": CurlFreeEstimator(),
    "gls": CurlFreeEstimator(prior_mean="gls", noise_variance=1e-2),
    "zero": CurlFreeEstimator("rational-quadratic", prior_mean="zero"),
    "rbf": CurlFreeEstimator("rbf", lengthscale=3.0, noise_variance=1e-6),
    "cg": CurlFreeEstimator(solver="cg", noise_variance=1e-3),
    "separable": SeparableEstimator(),
    "separable-last": SeparableEstimator("matern-3/2", prior_mean="last"),
    "separable-gls": SeparableEstimator("rbf", prior_mean="gls", noise_variance=1e-3),
    "leave-one-out": SeparableEstimator(lengthscale="leave-one-out", noise_variance="leave-one-out"),
    "hold-last": HoldLast(),
    "committee": CommitteeEstimator(),
}
CASES = {  # dimension, T0, pairs, of which the last is at the place of another, noise variance
    "one": (5, 4, 1, False, 0.0),
    "few dimensions": (2, 6, 6, False, 0.0),
    "overwritten": (12, 6, 9, False, 0.0),
    "long": (40, 16, 16, False, 0.0),
    "duplicate": (12, 6, 8, True, 0.0),
    "told noise": (12, 6, 8, True, 0.05),
    "unknown noise": (12, 6, 6, False, float("nan")),
}

# A run multiplies a start's last digit, on either path: without noise in the model by a million within five
# rounds, with some by a thousand a few rounds later. So rounds are few.
RUNS = {  # problem, options, deterministic, estimator, rounds
    "deterministic": ("rosenbrock", {"dim": 12}, True, None, 3),
    "deterministic, long": ("rosenbrock", {"dim": 12}, True, CurlFreeEstimator(noise_variance=1e-2), 5),
    "sampled": ("quadratic", {"dim": 12, "noise": 0.05}, False, None, 12),
    "network": ("digits-mlp", {"batch_size": 8}, False, None, 4),
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    yield
    torch._dynamo.reset()


def rows(count, dimension, seed):
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def field(points):
    """Gradients of something neither quadratic nor separable."""
    return torch.sin(points) + 0.3 * points.sum(1, keepdim=True).cos()


def history_of(case, device="cpu"):
    dimension, size, count, duplicate, noise = CASES[case]
    points = rows(count, dimension, seed=1)
    gradients = field(points)
    if duplicate:
        points[-1] = points[-3]
        gradients[-1] += 0.1
    history = GradientHistory(size, dimension, device=device)
    for start in range(0, count, 3):  # in pieces: duplicates and anchors are looked for each time
        part = slice(start, start + 3)
        variances = [noise] * len(points[part])
        history.append(points[part].to(device), gradients[part].to(device), variances)
    return history


def asked(case, device="cpu"):
    """Points to predict at, one of them a stored one, and others to take differences from."""
    dimension, _, count, _, _ = CASES[case]
    points, origins = rows(3, dimension, seed=2), rows(3, dimension, seed=3)
    points[0] = rows(count, dimension, seed=1)[-1]
    return points.to(device), origins.to(device)


def predictions(posterior, points, origins):
    here, there = posterior.locate(points), posterior.locate(origins)
    return posterior.means(here), posterior.differences(here, there)


def answers(estimator, case, device="cpu"):
    """All that a posterior is asked, as tensors in main memory."""
    history = history_of(case, device)
    posterior, (points, origins) = estimator.fit(history), asked(case, device)
    found = {
        "median distance": history.median_distance,
        "distances": posterior.locate(points).squared_distances,
    }
    for name, part in (("one", slice(1)), ("several", slice(3))):
        here = posterior.coefficients(posterior.locate(points[part]))
        for kind in ("on_gradients", "on_displacements", "on_offsets"):
            if (values := getattr(here, kind)) is not None:
                found[f"{kind}, {name}"] = values
        means, differences = predictions(posterior, points[part], origins[part])
        found |= {f"means, {name}": means, f"differences, {name}": differences}
    found["variances"] = torch.stack([posterior.variance(point) for point in points])
    return {name: small.tensor(values).to("cpu") for name, values in found.items()}


def assert_twins(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        largest = float(values.abs().max()) if values.numel() else 0.0
        torch.testing.assert_close(
            found[name], values, rtol=CLOSE, atol=CLOSE * largest, msg=lambda text, name=name: f"{name}: {text}"
        )


class TestTwins:
    @on_devices
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("name", ESTIMATORS)
    def test_posteriors_answer_the_same(self, name, case, device):
        expected = answers(ESTIMATORS[name], case)
        with small.tensors():
            assert_twins(answers(ESTIMATORS[name], case, device), expected)

    def test_the_torch_path_is_taken(self):
        with small.tensors():
            history = history_of("long")
            posterior = CurlFreeEstimator().fit(history)
            here = posterior.coefficients(posterior.locate(asked("long")[0]))
            assert isinstance(here.on_gradients, torch.Tensor)
            assert isinstance(history.median_distance, torch.Tensor)
        assert isinstance(history_of("long").median_distance, np.float64)

    @on_devices
    @pytest.mark.parametrize("case", ["overwritten", "duplicate", "told noise"])
    def test_members_are_judged_the_same(self, case, device):
        def judged(device):
            history, (points, origins) = history_of(case, device), asked(case, device)
            points = points + 0.01  # at a stored point an error is but rounding
            gradients = field(points.cpu()).to(device)
            held = [None, (origins[1], field(origins.cpu())[1].to(device)), None]
            fitted = [member.fit(history) for member in default_members()]
            committee = CommitteeEstimator()
            committee.judge(committee.fit(history), Arrivals(history, points, gradients), held)
            squares = squared_errors(fitted, Arrivals(history, points, gradients), held)
            return {"squared errors": squares.cpu(), "scores": committee.scores}

        expected = judged("cpu")
        with small.tensors():
            assert_twins(judged(device), expected)

    @on_devices
    @pytest.mark.parametrize("kind", RUNS)
    def test_runs_are_the_same(self, kind, device):
        name, options, deterministic, estimator, rounds = RUNS[kind]

        def run(device):
            problem = make_problem(name, **options).double().to(device)
            base = torch.optim.Adam(problem.parameters(), lr=0.01)
            optimizer = OptEx(base, parallelism=4, deterministic=deterministic, estimator=estimator)
            reports = list(itertools.islice(optimizer.rounds(problem.batches(), problem.source()), rounds))
            point = torch.cat([parameter.detach().reshape(-1) for parameter in problem.parameters()])
            taken = [(report.accepted, report.drafted, report.evaluated) for report in reports]
            return taken, {"point": point.cpu(), "losses": torch.tensor([float(r.loss) for r in reports])}

        steps, expected = run("cpu")
        with small.tensors():
            taken, found = run(device)
        assert taken == steps
        assert kind == "network" or max(drafted for _, drafted, _ in steps) > 4  # with steps between
        assert_twins(found, expected)


class TestCompiled:
    """Predicting is one graph: `fullgraph=True` refuses a break. The eager backend needs no compiler of C++."""

    @on_devices
    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("name", ESTIMATORS)
    def test_predictions_are_one_graph(self, name, count, device):
        with small.tensors():
            posterior = ESTIMATORS[name].fit(history_of("overwritten", device))
            _ = getattr(posterior, "chosen", None)  # a committee fits its member when first asked
            counter = CompileCounter()

            def predict(points, origins):
                return predictions(posterior, points, origins)

            compiled = torch.compile(predict, backend=counter, fullgraph=True)
            points, origins = (values[:count] for values in asked("overwritten", device))
            for shift in (0.0, 0.5):  # the points are not part of the graph
                for found, expected in zip(
                    compiled(points + shift, origins), predict(points + shift, origins), strict=True
                ):
                    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert counter.frame_count == 1

    def test_nothing_breaks_the_graph(self):
        with small.tensors():
            posterior = CurlFreeEstimator().fit(history_of("told noise"))
            explained = torch._dynamo.explain(predictions)(posterior, *asked("told noise"))
        assert (explained.graph_count, explained.graph_break_count) == (1, 0)

    @pytest.mark.parametrize(("name", "graphs"), [("curl-free", 5), ("separable", 1)])
    def test_posteriors_of_later_rounds_use_the_graphs_there_are(self, name, graphs):
        # Which slot is the newest is a number of the graph where the model uses it: one graph for each slot,
        # and one from before torch knows that the number varies.
        counter = CompileCounter()
        compiled = torch.compile(predictions, backend=counter, fullgraph=True)
        with small.tensors():
            history = GradientHistory(4, 12)
            history.append(rows(6, 12, seed=1), field(rows(6, 12, seed=1)))
            for seed in range(10, 20):
                points, origins = rows(1, 12, seed), rows(1, 12, seed + 20)
                posterior = ESTIMATORS[name].fit(history)
                found, expected = compiled(posterior, points, origins), predictions(posterior, points, origins)
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
                history.append(points, field(points))
        assert counter.frame_count <= graphs


class HostReadsError(AssertionError):
    """Something would have waited for the device."""


class _NoReadingOperators(TorchDispatchMode):
    """Refuses operators whose answer, or the size of it, the host has to know."""

    READ = frozenset({"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"})
    INDEX = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        indices = args[1] if name in self.INDEX else ()
        if name in self.READ or any(index is not None and index.dtype == torch.bool for index in indices):
            raise HostReadsError(str(function))
        return function(*args, **(kwargs or {}))


class _NoReadingMethods(TorchFunctionMode):
    """Refuses methods that hand numbers to the host without an operator."""

    READ = frozenset(
        {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "cpu"}
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.READ:
            raise HostReadsError(function.__name__)
        return function(*args, **(kwargs or {}))


@contextmanager
def host_reads_nothing():
    with small.tensors(), _NoReadingOperators(), _NoReadingMethods():
        yield


class TestNoWaiting:
    @pytest.mark.parametrize("read", [float, bool, torch.Tensor.tolist, torch.Tensor.numpy, lambda x: x[x > 0]])
    def test_reading_is_seen(self, read):
        with pytest.raises(HostReadsError), host_reads_nothing():
            read(torch.ones(()))

    @on_devices
    @pytest.mark.parametrize("count", [1, 3])
    @pytest.mark.parametrize("name", ESTIMATORS)
    def test_predicting_reads_nothing(self, name, count, device):
        with small.tensors():
            posterior = ESTIMATORS[name].fit(history_of("told noise", device))
            _ = getattr(posterior, "chosen", None)
        points, origins = (values[:count] for values in asked("told noise", device))
        with host_reads_nothing():
            predictions(posterior, points, origins)
            _ = posterior.locate(points)[0].squared_distances
            if name != "cg":  # which asks for its residual
                posterior.variance(points[0])

    @on_devices
    def test_judging_reads_nothing_before_it_has_the_errors(self, device):
        with small.tensors():
            history, (points, origins) = history_of("overwritten", device), asked("overwritten", device)
            fitted = [member.fit(history) for member in default_members()]
        held = [None, (origins[1], origins[2]), None]
        with host_reads_nothing():
            squared_errors(fitted, Arrivals(history, points, points.sin()), held)

    @on_devices
    @pytest.mark.parametrize("deterministic", [True, False])
    def test_drafting_reads_nothing_once_the_model_is_fitted(self, deterministic, device, monkeypatch):
        problem = make_problem("rosenbrock", dim=12).double().to(device)
        base = torch.optim.SGD(problem.parameters(), lr=1e-4, momentum=0.9)  # Adam reads its own step count
        optimizer = OptEx(base, parallelism=4, deterministic=deterministic)
        rounds, drafts = optimizer._rounds, []

        def watched(record, draft=rounds._draft):
            rounds.predictor.posterior()
            with host_reads_nothing():
                draft(record)
            drafts.append(record.steps)

        with small.tensors():
            run = optimizer.rounds(problem.batches(), problem)
            for _ in range(3):
                next(run)
            monkeypatch.setattr(rounds, "_draft", watched)
            for _ in range(3):
                next(run)
        assert len(drafts) == 3
        assert max(drafts) > 4 or not deterministic


@CUDA
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_prediction_can_be_captured_in_a_cuda_graph(name, count):
    posterior = ESTIMATORS[name].fit(history_of("overwritten", "cuda"))
    points, origins = (values[:count].clone() for values in asked("overwritten", "cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # cuBLAS takes its workspaces before the capture
        for _ in range(3):
            predictions(posterior, points, origins)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = predictions(posterior, points, origins)
    for seed in (4, 5):  # what the graph reads is filled anew
        points.copy_(rows(count, points.shape[1], seed))
        origins.copy_(rows(count, points.shape[1], seed + 10))
        graph.replay()
        torch.cuda.synchronize()
        expected = predictions(posterior, points.clone(), origins.clone())
        for found, wanted in zip(captured, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=CLOSE, atol=CLOSE)
