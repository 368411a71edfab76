"""The benchmark of seconds to a loss: that it runs, what its tables say, and its own problem."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from optex.sources import LossModule
from optex.stepping import ParameterVector

ROOT = Path(__file__).parents[1]
MODULES = ("burgers", "made_up", "workloads", "cuda_evaluators", "measuring", "seconds_to_loss")


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The benchmark's files, as python finds them when it runs one."""
    sys.path.insert(0, str(ROOT / "benchmarks" / "gpu"))
    yield
    sys.path.remove(str(ROOT / "benchmarks" / "gpu"))
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_quick_run_measures_every_method_at_both_rates(tmp_path, capsys, monkeypatch):
    seconds_to_loss = importlib.import_module("seconds_to_loss")
    file = tmp_path / "quick.json"
    options = [
        "--workloads",
        "digits-mlp,burgers",
        "--evaluators",
        "sequential,vectorized",
        "--json",
        str(file),
    ]
    seconds_to_loss.main(["--quick", "--threads", "1", *options])
    document, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert document["meta"]["quick"]
    for name in ("digits-mlp", "burgers"):
        assert f"**{name}**" in printed
        result = document["workloads"][name]
        methods = result["methods"]
        predicted = {f"{m}, N = 4{how}" for m in ("optex", "optex-paper") for how in ("", ", sequential")}
        expected = predicted | {"optex, N = 1", "optex, N = 1, sequential", "data-parallel, N = 4", "vanilla"}
        assert methods.keys() == expected | {f"{method}, tuned" for method in expected}
        assert methods["vanilla, tuned"]["reached"]
        for method in expected:
            assert methods[method]["lr"] == 1e-3
            if method == "vanilla":
                continue  # the run that sets the goal is not among those it is tuned over
            best, own = methods[f"{method}, tuned"], methods[method]
            assert (best["reached"], -best["seconds"]) >= (own["reached"], -own["seconds"])
    page = tmp_path / "results" / "README.md"
    page.parent.mkdir()
    page.write_text("<!-- table:seconds-quick -->\n<!-- end -->\n")
    monkeypatch.setattr(
        seconds_to_loss, "__file__", str(tmp_path / "benchmarks" / "gpu" / "seconds_to_loss.py")
    )
    seconds_to_loss.main(["--report", "--json", str(file)])
    assert "| optex, N = 4, tuned |" in page.read_text()


def test_tables_of_earlier_runs_can_still_be_written():
    seconds_to_loss = importlib.import_module("seconds_to_loss")
    document = json.loads((ROOT / "results" / "gpu" / "cpu.json").read_text())
    assert document["workloads"]
    for name, result in document["workloads"].items():
        assert f"**{name}**" in seconds_to_loss.table(name, result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("option", [["--graphs"], ["--streams"], ["--device", "cuda"]])
def test_without_a_gpu_what_needs_one_is_refused(option, capsys):
    seconds_to_loss = importlib.import_module("seconds_to_loss")
    with pytest.raises(SystemExit):
        seconds_to_loss.main(option)
    assert f"{' '.join(option)} needs a CUDA device" in capsys.readouterr().err


def test_every_quick_workload_starts_with_made_up_data(monkeypatch):
    workloads = importlib.import_module("workloads")
    monkeypatch.setattr(workloads, "find", lambda name: None)
    assert workloads.QUICK.keys() == workloads.WORKLOADS.keys()
    for name, workload in workloads.QUICK.items():
        if name == "cartpole":
            pytest.importorskip("gymnasium")
        problem = workload.start("cpu")
        loss = problem(next(problem.batches()))
        assert loss.isfinite()
        stands_in = {"fashion-mnist", "cifar10", "shakespeare"}
        assert workload.stands_in == (workload.problem if workload.problem in stands_in else None)


def test_residuals_of_burgers_are_those_of_differences():
    burgers = importlib.import_module("burgers")
    problem = burgers.Burgers(width=5, depth=2).double()
    points, step = torch.tensor([[0.3, -0.4], [0.8, 0.9]], dtype=torch.float64), 1e-4
    t, x = torch.eye(2, dtype=torch.float64) * step
    u = lambda at: problem.network(at)[:, 0]  # noqa: E731
    u_t, u_x = ((u(points + d) - u(points - d)) / (2 * step) for d in (t, x))
    u_xx = (u(points + x) - 2 * u(points) + u(points - x)) / step**2
    expected = u_t + u(points) * u_x - burgers.VISCOSITY * u_xx
    torch.testing.assert_close(problem._residual(points), expected, rtol=1e-6, atol=1e-7)


def test_one_gradient_is_that_of_backward():
    one_gradient = importlib.import_module("cuda_evaluators").one_gradient
    problem = importlib.import_module("burgers").Burgers(width=4, depth=1)
    (batch,) = itertools.islice(problem.batches(), 1)
    vector = ParameterVector(list(problem.parameters()))
    names = [f"model.{name}" for name, _ in problem.named_parameters()]
    loss, gradient = one_gradient(LossModule(problem, problem), names, vector, vector.read(), batch)
    expected = problem(batch)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, vector.read_gradients()[0])
