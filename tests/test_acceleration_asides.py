"""Two asides of the study of acceleration: how fast gradients change, and which pairs a history keeps."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from optex.studies.problems import make_problem
from optex.studies.tables import fill_text
from optex.vector_space import VectorSpace

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def load(monkeypatch):
    """Import a script as python does that runs it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("script", "place"), [("gradient_change", "gradient-change"), ("nearest_history", "nearest-history")]
)
def test_the_page_has_the_records_table(load, script, place):
    module = load(script)
    page = (ROOT / "results" / "acceleration" / "README.md").read_text(encoding="utf-8")
    record = json.loads(module.PATH.read_text(encoding="utf-8"))
    assert fill_text(page, {place: module.table(record)}) == page


def test_a_gradient_is_compared_with_itself_at_the_later_point(load, monkeypatch):
    script = load("gradient_change")
    monkeypatch.setattr(script, "LATER", (1, 2))
    problem, rate = make_problem("digits-mlp", seed=3, batch_size=32), 0.1
    parameters, points, batches = list(problem.parameters()), [], []

    def gradient(point, batch):
        with torch.no_grad():
            for parameter, value in zip(parameters, point, strict=True):
                parameter.copy_(value)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(problem(batch), parameters)])

    point = [parameter.detach().clone() for parameter in parameters]
    for batch, _ in zip(problem.batches(), range(4), strict=False):
        points.append(point)
        batches.append(batch)
        slopes = gradient(point, batch).split([value.numel() for value in point])
        point = [value - rate * slope.view_as(value) for value, slope in zip(point, slopes, strict=True)]
    expected = []
    for k in (1, 2):
        held = [gradient(points[i], batches[i]) for i in range(4 - k)]
        later = [gradient(points[i + k], batches[i]) for i in range(4 - k)]
        ratios = [float((b - a).norm() / a.norm()) for a, b in zip(held, later, strict=True)]
        expected.append(sum(ratios) / len(ratios))
    assert script.changes("sgd", rate, 32, 3, steps=4) == pytest.approx(expected, rel=1e-4)


def test_the_nearest_pairs_stay_oldest_first(load):
    history = load("nearest_history").NearestHistory(3, VectorSpace(1), dtype=torch.float64)
    at = lambda *places: torch.tensor(places, dtype=torch.float64)[:, None]  # noqa: E731
    history.append(at(0.0, 9.0, 1.0), at(10.0, 19.0, 11.0))
    history.append(at(2.0, 8.0), at(12.0, 18.0))  # around 2: 9 and 8 are farthest
    assert history.gradients[:3, 0].tolist() == [10.0, 11.0, 12.0]
