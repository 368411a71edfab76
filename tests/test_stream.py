"""Reports as plain numbers, and written to loggers on their way."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import optex


class Writer:
    """TensorBoard's."""

    def __init__(self):
        self.written = []

    def add_scalar(self, tag, value, step):
        self.written.append((tag, value, step))


class Logger:
    """Lightning's, and mlflow's."""

    def __init__(self):
        self.written = []

    def log_metrics(self, metrics, step):
        self.written += [(name, value, step) for name, value in metrics.items()]

    def log(self, numbers):
        raise AssertionError("log_metrics goes before log")


class Run:
    """wandb's, which counts for itself."""

    def __init__(self):
        self.written = []

    def log(self, numbers):
        step = numbers["optex/number"]
        self.written += [(name, value, step) for name, value in numbers.items()]


def optimizer_and_rounds(batches=12):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    data = [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(batches)]
    optimizer = optex.OptEx(torch.optim.SGD(model.parameters(), lr=0.05), parallelism=2)
    return optimizer, optimizer.rounds(data, lambda batch: (model(batch[0]) - batch[1]).square().mean())


@pytest.fixture(scope="module")
def reports():
    return list(optimizer_and_rounds()[1])


class TestNumbers:
    def test_every_number_is_plain_and_is_the_reports(self, reports):
        for report in reports:
            numbers = report.as_dict()
            assert all(type(value) in (int, float) for value in numbers.values())
            for name in numbers.keys() - {"dropped", "retried", "lost", "relative_error"}:
                value = getattr(report, name)
                assert numbers[name] == value or (math.isnan(numbers[name]) and math.isnan(value))

    def test_no_field_is_forgotten(self, reports):
        fields = {field.name for field in dataclasses.fields(optex.RoundReport)}
        left_out = {"losses", "relative_errors", "batch_numbers"}
        derived = {"loss", "relative_error", "overhead_seconds", "break_even_seconds"}
        assert reports[0].as_dict().keys() == fields - left_out | derived

    def test_indices_are_counted_and_errors_averaged_over_those_known(self, reports):
        errors = torch.tensor([0.5, math.nan, 1.5])
        report = dataclasses.replace(reports[0], dropped=(1, 3), lost=(2,), relative_errors=errors)
        numbers = report.as_dict()
        assert (numbers["dropped"], numbers["retried"], numbers["lost"]) == (2, 0, 1)
        assert numbers["relative_error"] == 1.0
        unknown = dataclasses.replace(report, relative_errors=torch.tensor([math.nan]))
        assert math.isnan(unknown.as_dict()["relative_error"])


@pytest.mark.parametrize("kind", [Writer, Logger, Run])
def test_every_finite_number_is_written_once_and_reports_are_passed_on(kind, reports):
    target = kind()
    passed = list(optex.streamed(reports, to=target))
    assert passed == reports
    assert target.written == [
        (f"optex/{name}", value, report.number)
        for report in reports
        for name, value in report.as_dict().items()
        if math.isfinite(value)
    ]
    assert any(not math.isfinite(value) for value in reports[0].as_dict().values()), "else nothing is left out"


def test_a_report_is_written_before_it_is_passed_on_and_not_sooner():
    writer = Writer()
    optimizer, rounds = optimizer_and_rounds()
    for made, report in enumerate(optex.streamed(rounds, to=writer), start=1):
        assert {step for _, _, step in writer.written} == set(range(made))
        assert report.number == made - 1
    assert writer.written
    assert optimizer.batches_drawn == 12


def test_the_prefix_is_a_choice(reports):
    writer = Writer()
    list(optex.streamed(reports[:1], to=writer, prefix="train/round/"))
    assert all(tag.startswith("train/round/") for tag, _, _ in writer.written)


class TestLength:
    def test_is_that_of_the_rounds_at_every_moment(self):
        _, rounds = optimizer_and_rounds()
        stream = optex.streamed(rounds, to=Writer())
        assert len(stream) == len(rounds) == 6
        for _ in stream:
            assert len(stream) == len(rounds)

    def test_is_missing_where_the_source_has_none(self, reports):
        stream = optex.streamed((report for report in reports), to=Writer())
        with pytest.raises(TypeError, match="reports are a generator, which has no length"):
            len(stream)
        assert list(stream) == reports


def test_closing_reaches_the_rounds():
    optimizer, rounds = optimizer_and_rounds()
    stream = optex.streamed(rounds, to=Writer())
    next(stream)
    stream.close()
    assert list(stream) == []
    assert len(stream) == 1
    assert optimizer.batches_drawn < 12


def test_a_list_of_reports_has_nothing_to_close(reports):
    stream = optex.streamed(reports, to=Writer())
    stream.close()
    assert len(list(stream)) == len(reports)


def test_what_cannot_be_written_to_is_refused_at_once():
    with pytest.raises(TypeError, match="to: a list has none of add_scalar, log_metrics and log; hand over"):
        optex.streamed([], to=[])


def test_an_error_of_the_logger_is_not_hidden(reports):
    class Full:
        def log(self, numbers):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        next(optex.streamed(reports, to=Full()))


def test_tensorboards_own_writer_takes_them(tmp_path, reports):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        list(optex.streamed(reports, to=writer))
    assert any(tmp_path.iterdir())
