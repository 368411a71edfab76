"""Adaptive batch sizes: statistics against slow loops, tests and controller by hand, the sampler, OptEx."""

import copy
import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import optex
from optex import AccumulatingSource, OptEx, PerSampleSource
from optex.batching import (
    AdaptiveBatches,
    AugmentedInnerProductTest,
    BatchSizeController,
    CoordinateTest,
    GradientMoments,
    GradientStatistics,
    InnerProductTest,
    NormTest,
    variance_of_mean,
)
from tests.gradients import grad_of
from tests.models import network, regression_batches, same, snapshot, squared_error
from tests.references import adadagrad as slow

NAMES = ("squared_norm", "variance", "inner_product_variance", "orthogonal_variance", "coordinate_ratio")


def assert_statistics(found, expected, rel=1e-9):
    for name in NAMES:
        assert getattr(found, name) == pytest.approx(expected[name], rel=rel), name


# ---------------------------------------------------------------------- statistics


def random_rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, generator=generator, dtype=torch.float64) + 0.3


@pytest.mark.parametrize("each", [1, 5])
def test_statistics_of_gradients_and_of_micro_batches_are_the_loops(each):
    rows = random_rows(6)
    parts = [rows[:, :1].reshape(6), rows[:, 1:5].reshape(6, 2, 2), rows[:, 5:]]
    found = GradientStatistics.of_gradients(parts, samples_each=each)
    assert_statistics(found, slow.statistics(rows.tolist(), each))
    assert found.batch_size == 6 * each


def test_parameters_are_flattened_into_one():
    # The same numbers in one tensor or in seven; sums of products a parameter would leave out what they share.
    rows = random_rows(9)
    whole = GradientStatistics.of_gradients([rows])
    pieces = GradientStatistics.of_gradients(list(rows.unbind(1)))
    for name in NAMES:
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    apart = sum(GradientStatistics.of_gradients([rows[:, j]]).inner_product_variance for j in range(7))
    assert apart != pytest.approx(whole.inner_product_variance, rel=0.2)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_moments_of_chunks_are_those_of_the_whole(sizes):
    rows, moments = random_rows(sum(sizes)), GradientMoments()
    for chunk in rows.split(sizes):
        moments.add([chunk[:, :3], chunk[:, 3:]])
    found = moments.statistics(inner_products=moments.inner_products([rows[:, :3], rows[:, 3:]]))
    assert moments.count == sum(sizes)
    torch.testing.assert_close(torch.cat(moments.mean), rows.mean(0))
    if sum(sizes) < 2:
        assert math.isnan(found.variance)
    else:
        assert_statistics(found, slow.statistics(rows.tolist()))


def test_coordinates_that_no_sample_moves_have_no_say():
    rows = torch.tensor([[0.0, 1.0], [0.0, 3.0]])
    assert GradientStatistics.of_gradients([rows]).coordinate_ratio == 0.5
    rows = torch.tensor([[1.0, 1.0], [-1.0, 3.0]])
    assert GradientStatistics.of_gradients([rows]).coordinate_ratio == math.inf


def test_half_precision_is_summed_in_single():
    rows = torch.full((4, 1000), 200.0, dtype=torch.float16)
    rows[0] = 100.0
    found = GradientStatistics.of_gradients([rows])
    assert found.variance == pytest.approx(2500 * 1000, rel=1e-3)


def test_the_variance_of_a_mean_is_what_sources_tell():
    rows = random_rows(8)
    found = variance_of_mean(rows.square().sum(1), rows.mean(0).square().sum())
    statistics = GradientStatistics.of_gradients([rows])
    assert float(found) == pytest.approx(statistics.variance / 8)
    assert statistics.noise_variance(7) == pytest.approx(float(found) / 7)
    norm = statistics.squared_norm**0.5
    back = GradientStatistics.of_noise(statistics.noise_variance(7), 7, norm, batch_size=8)
    assert back.variance == pytest.approx(statistics.variance)
    assert back.squared_norm == pytest.approx(statistics.squared_norm)
    assert math.isnan(back.inner_product_variance)


@pytest.mark.parametrize(
    "rows", [[], [torch.ones(2, 1), torch.ones(3, 1)], [torch.ones(())], [torch.ones(0, 2)]]
)
def test_rows_that_do_not_match_are_refused(rows):
    with pytest.raises(ValueError, match=r"GradientMoments: gradients must be tensors \[n, ...\]"):
        GradientStatistics.of_gradients(rows)


def test_a_micro_batch_has_a_sample():
    with pytest.raises(ValueError, match="GradientStatistics: samples_each must be an integer of at least 1"):
        GradientStatistics.of_gradients([torch.ones(2, 1)], samples_each=0)


# ---------------------------------------------------------------------- per-sample gradients


@pytest.mark.parametrize("chunk_size", [None, 3, 8, 100])
def test_per_sample_gradients_are_the_loops(chunk_size):
    model, (batch,) = network(), regression_batches(1, size=8)
    objective = squared_error(model)
    expected = slow.statistics(slow.sample_gradients(objective, model, batch))
    source = PerSampleSource(objective, model, chunk_size=chunk_size)
    loss, found = source.measure(batch)
    assert_statistics(found, expected)
    assert found.batch_size == 8
    gradients = [grad_of(p).clone() for p in model.parameters()]
    model.zero_grad()
    whole = objective(batch)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad)
    _, noise = source.gradient(batch)
    dimension = sum(p.numel() for p in model.parameters())
    assert noise is not None
    assert float(noise) == pytest.approx(expected["variance"] / (8 * dimension))


def test_micro_batches_tell_the_same_noise_as_samples():
    # Micro-batches of one sample: AccumulatingSource's formula and the samples' own.
    model, (batch,) = network(), regression_batches(1, size=8)
    objective = squared_error(model)
    _, per_sample = PerSampleSource(objective, model).gradient(batch)
    model.zero_grad()
    micro = list(zip(batch[0].split(1), batch[1].split(1), strict=True))
    _, accumulated = AccumulatingSource(objective, list(model.parameters())).gradient(micro)
    assert accumulated is not None
    assert per_sample is not None
    assert float(accumulated) == pytest.approx(float(per_sample), rel=1e-9)


def test_frozen_and_unreached_parameters_get_no_gradient():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return (x * self.used * self.frozen).sum(-1)

    model = Partly()
    PerSampleSource(lambda x: model(x).square().mean(), model).measure(torch.randn(4, 2))
    assert model.used.grad is not None
    assert model.idle.grad is None
    assert model.frozen.grad is None


def test_what_is_no_sample_goes_to_all():
    model = nn.Linear(2, 1)
    source = PerSampleSource(lambda b: b["scale"] * (model(b["x"]) - b["shift"]).square().mean(), model)
    x = torch.randn(5, 2)
    source.measure({"x": x, "scale": 2.0, "shift": torch.tensor(1.0)})
    gradient = grad_of(model.weight).clone()
    model.zero_grad()
    (2 * (model(x) - 1).square().mean()).backward()
    torch.testing.assert_close(gradient, model.weight.grad)


def test_dropout_is_drawn_a_sample_and_alike_in_both_passes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 1)).double()
    x = torch.ones(6, 3, dtype=torch.float64)  # one sample, six times
    objective = lambda x: model(x).square().mean()  # noqa: E731
    found = []
    for chunk_size in (None, 2):
        torch.manual_seed(1)
        source = PerSampleSource(objective, model, chunk_size=chunk_size)
        found.append(source.measure(x)[1])
        assert found[-1].variance > 0
        along, across = found[-1].inner_product_variance, found[-1].orthogonal_variance
        assert 0 < across < found[-1].variance
        assert along > 0


def test_one_sample_tells_no_noise():
    model = nn.Linear(2, 1)
    source = PerSampleSource(lambda x: model(x).square().mean(), model)
    assert source.gradient(torch.randn(1, 2))[1] is None
    _, found = source.measure(torch.randn(1, 2))
    assert math.isnan(found.variance)
    with pytest.raises(
        ValueError, match=r"NormTest: the statistics have no variance \(NaN\); one sample has none"
    ):
        NormTest().proposal(found)


def test_per_sample_source_refuses_with_a_reason():
    model = nn.Linear(2, 1)
    objective = lambda x: model(x).square().mean()  # noqa: E731
    with pytest.raises(TypeError, match=r"PerSampleSource: model must be a torch.nn.Module, got function"):
        PerSampleSource(objective, lambda x: x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="PerSampleSource: chunk_size must be an integer of at least 1, got 0"):
        PerSampleSource(objective, model, chunk_size=0)
    source = PerSampleSource(objective, model)
    for batch in ((torch.ones(2, 2), torch.ones(3)), torch.ones(0, 2), 1.0):
        with pytest.raises(ValueError, match="PerSampleSource: a batch has tensors whose first dimension"):
            source.gradient(batch)
    with pytest.raises(ValueError, match="PerSampleSource: the loss does not depend on any parameter"):
        PerSampleSource(lambda x: x.sum(), model).gradient(torch.ones(2, 2))
    with pytest.raises(ValueError, match="PerSampleSource: no parameter of the model requires a gradient"):
        PerSampleSource(objective, nn.Linear(2, 1).requires_grad_(False)).gradient(torch.ones(2, 2))


def test_batch_norm_is_refused_in_training_mode_alone():
    normed = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    source = PerSampleSource(lambda x: normed(x).square().mean(), normed)
    with pytest.raises(ValueError, match="PerSampleSource: the model has BatchNorm in training mode"):
        source.gradient(torch.ones(2, 2))
    normed.eval()
    loss, _ = source.gradient(torch.randn(2, 2))
    assert loss.isfinite()


# ---------------------------------------------------------------------- tests and controller


STATISTICS = GradientStatistics(10, 4.0, 30.0, inner_product_variance=8.0, coordinate_ratio=50.0)


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        (NormTest(0.5), 30 / (0.25 * 4)),
        (NormTest(), 30 / (0.01 * 4)),
        (InnerProductTest(0.5), 8 / (0.25 * 16)),
        (InnerProductTest(), 8 / (0.01 * 16)),
        (AugmentedInnerProductTest(0.5, 1.0), (30 - 8 / 4) / 4),
        (AugmentedInnerProductTest(0.1, 10.0), 8 / (0.01 * 16)),
        (CoordinateTest(0.5), 50 / 0.25),
    ],
)
def test_proposals_by_hand(test, expected):
    assert test.proposal(STATISTICS) == pytest.approx(expected)


@pytest.mark.parametrize("test", [NormTest(), InnerProductTest(), AugmentedInnerProductTest()])
def test_no_gradient_asks_for_all_and_no_noise_for_nothing(test):
    assert test.proposal(replace(STATISTICS, squared_norm=0.0)) == math.inf
    assert test.proposal(GradientStatistics(10, 0.0, 0.0, 0.0, 0.0)) == 0.0


@pytest.mark.parametrize("test", [InnerProductTest(), AugmentedInnerProductTest(), CoordinateTest()])
def test_what_a_report_does_not_tell_is_asked_for_by_name(test):
    found = GradientStatistics.of_noise(0.1, 5, 1.0, 8)
    with pytest.raises(
        ValueError, match=rf"{type(test).__name__.replace('Augmented', '')}: the statistics have no"
    ):
        test.proposal(found)


@pytest.mark.parametrize(
    "make",
    [
        lambda v: NormTest(eta=v),
        lambda v: CoordinateTest(eta=v),
        lambda v: InnerProductTest(theta=v),
        lambda v: AugmentedInnerProductTest(theta=v),
        lambda v: AugmentedInnerProductTest(nu=v),
    ],
)
def test_bad_constants_are_refused(make):
    for bad in (0.0, -1.0, math.nan, "strict"):
        with pytest.raises(ValueError, match=r"(eta|theta|nu) must be a finite number above 0"):
            make(bad)


def test_the_controller_never_shrinks_and_is_capped():
    controller = BatchSizeController(8, 100, test=NormTest(1.0), growth=3.0)
    wants = [5.0, 8.4, 20.0, 3.0, 1000.0, 1000.0]
    sizes = [controller.update(GradientStatistics(8, 1.0, v)) for v in wants]
    assert sizes == [8, 9, 20, 20, 60, 100]
    assert controller.update(GradientStatistics(8, 0.0, 1.0)) == 100


def test_growth_without_a_limit_goes_to_the_cap_at_once():
    assert BatchSizeController(8, 100, growth=math.inf).update(GradientStatistics(8, 0.0, 1.0)) == 100


def test_a_controller_goes_on_from_its_state():
    controller, other = BatchSizeController(50, 100), BatchSizeController(8, 100)
    other.load_state_dict(controller.state_dict())
    assert other.batch_size == 50


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 8), {}, "batch_size must be between 2 and 8, got 1"),
        ((9, 8), {}, "batch_size must be between 2 and 8, got 9"),
        ((2, 1), {}, "maximum must be an integer of at least 2, got 1"),
        ((2, 8), {"growth": 1.0}, "growth must be a finite number above 1, got 1.0"),
        ((2, 8), {"growth": math.nan}, "growth must be a finite number above 1"),
    ],
)
def test_bad_controllers_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=f"BatchSizeController: {message}"):
        BatchSizeController(*arguments, **options)


def test_a_test_is_a_test():
    with pytest.raises(
        TypeError, match=r"BatchSizeController: test must be a BatchSizeTest such as NormTest\(\)"
    ):
        BatchSizeController(2, 8, test=0.1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("size", [200, 6600])
def test_the_proposal_at_unit_distance_is_as_derived(size):
    # f_i = ½‖x - x_i‖² in d = 100 with x_i normal: V = d, and ‖ḡ‖² is 1 + d/b in the mean.
    generator, dimension, eta = torch.Generator().manual_seed(0), 100, 0.1
    point = torch.zeros(dimension)
    point[0] = 1.0
    proposals = []
    for _ in range(4):
        rows = point - torch.randn(size, dimension, generator=generator)
        proposals.append(NormTest(eta).proposal(GradientStatistics.of_gradients([rows])))
    expected = dimension / (eta**2 * (1 + dimension / size))
    assert sum(proposals) / 4 == pytest.approx(expected, rel=0.1)


# ---------------------------------------------------------------------- the sampler


def drawn(batches, epochs, resize=None):
    found = []
    while batches.epoch < epochs:
        for indices in batches:
            found.append(indices)
            if resize is not None:
                batches.batch_size = resize(batches)
    return found


@pytest.mark.parametrize("drop_last", [False, True])
@given(count=st.integers(2, 40), size=st.integers(2, 40), grown=st.integers(2, 40), seed=st.integers(0, 3))
def test_every_epoch_has_every_sample_once(drop_last, count, size, grown, seed):
    size, grown = min(size, count), min(grown, count)
    batches = AdaptiveBatches(count, size, drop_last=drop_last, seed=seed)
    for epoch in range(3):
        ahead, found = len(batches), []
        for i, indices in enumerate(batches):
            found.append(indices)
            if epoch == 1 and i == 1:
                batches.batch_size = grown
        if epoch != 1:
            assert ahead == len(found)
        flat = list(itertools.chain.from_iterable(found))
        assert len(set(flat)) == len(flat)
        assert min(map(len, found), default=2) >= 2
        if drop_last:
            assert count - len(flat) < batches.batch_size
        else:
            assert sorted(flat) == list(range(count))
    assert batches.epoch == 3


def test_the_order_is_the_seeds_whatever_the_sizes():
    one, other = AdaptiveBatches(50, 4, seed=3), AdaptiveBatches(50, 7, seed=3)
    left = drawn(one, 2, lambda b: min(50, b.batch_size + 1))
    right = drawn(other, 2)
    assert list(itertools.chain(*left)) == list(itertools.chain(*right))
    assert list(itertools.chain(*drawn(AdaptiveBatches(50, 4, seed=4), 1))) != left[:50]
    assert one.samples_drawn == 100


def test_without_shuffling_the_order_is_the_datas():
    plain = AdaptiveBatches(range(5), 2, shuffle=False)
    assert list(plain) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize("stop", [0, 3, 9, 13])
def test_goes_on_from_a_saved_state_to_the_bit(stop):
    def growing():
        return AdaptiveBatches(60, 4, seed=1, growth=1.5, test=NormTest(1.0))

    def run(batches, upto):
        found = []
        while batches.batches_drawn < upto:
            for indices in batches:
                found.append(indices)
                batches.update(GradientStatistics(len(indices), 1.0, 1.1 * len(indices)))
                if batches.batches_drawn == upto:
                    break
        return found

    whole = growing()
    expected = run(whole, 30)
    first = growing()
    run(first, stop)
    saved = pickle.loads(pickle.dumps(first.state_dict()))
    other = growing()
    other.load_state_dict(saved)
    assert run(other, 30) == expected[stop:]
    assert other.state_dict() == whole.state_dict()


def test_states_that_do_not_fit_are_refused_and_change_nothing():
    batches = AdaptiveBatches(20, 4)
    next(iter(batches))
    good = batches.state_dict()
    for changes, message in [
        ({"count": 21}, "saved count is 21, and this sampler's is 20"),
        ({"seed": 5}, "saved seed is 5"),
        ({"place": 20}, "saved place must be between 0 and 19"),
        ({"epoch": -1}, "saved epoch must be an integer of at least 0"),
        ({"sizes": [4, 4]}, "saved sizes are of 2 batches, and fewer were drawn"),
        ({"sizes": [0]}, "saved sizes must be an integer of at least 1"),
        ({"controller": {"batch_size": 21}}, "batch_size must be between 2 and 20, got 21"),
    ]:
        with pytest.raises(ValueError, match=message):
            batches.load_state_dict(good | changes)
        assert batches.state_dict() == good
    del good["place"]
    with pytest.raises(ValueError, match="the saved state has no entry 'place'"):
        batches.load_state_dict(good)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 2), {}, "data must be an integer of at least 2, got 1"),
        ((10, 1), {}, "batch_size must be between 2 and 10, got 1"),
        ((10, 4), {"maximum": 11}, "maximum must be between 2 and 10, got 11"),
        ((10, 4), {"maximum": 3}, "batch_size must be between 2 and 3, got 4"),
        ((10, 4), {"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
)
def test_bad_samplers_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=f"AdaptiveBatches: {message}"):
        AdaptiveBatches(*arguments, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_drives_a_data_loader(workers):
    data = TensorDataset(torch.arange(40))
    batches = AdaptiveBatches(data, 4, seed=2)
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers)
    assert len(loader) == 10
    sizes = []
    for (x,) in loader:
        sizes.append(len(x))
        batches.batch_size = min(40, 4 + 2 * len(sizes))
    assert sum(sizes) == 40
    assert max(sizes) > 4
    if not workers:
        assert sizes == [4, 6, 8, 10, 12]


# ---------------------------------------------------------------------- with OptEx


def noisy_regression(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    y = torch.stack([x.sum(1), x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
    return x, y + 0.5 * torch.randn(400, 3, generator=generator, dtype=torch.float64)


def run_with_optex(source_of, *, parallelism=3, evaluator=None, **options):
    x, y = noisy_regression()
    model = network()
    optimizer = OptEx(
        torch.optim.SGD(model.parameters(), lr=0.05), parallelism=parallelism, evaluator=evaluator
    )
    batches = AdaptiveBatches(400, 6, test=NormTest(0.7), **options)
    reports, sizes = [], []
    for report in optimizer.rounds(((x[i], y[i]) for i in batches), source_of(model)):
        reports.append(report)
        sizes.append(batches.update(report))
    return optimizer, batches, reports, sizes


def per_sample(model):
    return PerSampleSource(squared_error(model), model)


def test_rounds_feed_the_sizes():
    optimizer, batches, reports, sizes = run_with_optex(per_sample)
    assert sizes == sorted(sizes)
    assert sizes[-1] > 6
    numbers = [n for report in reports for n in report.batch_numbers]
    assert set(numbers) == set(range(batches.batches_drawn))
    assert optimizer.batches_drawn == batches.batches_drawn < 400 / 6
    for report in reports:
        assert report.noise_variance > 0
        assert report.gradient_norm > 0
        assert report.dimension == sum(p.numel() for p in network().parameters())


def test_the_report_has_what_the_samples_say():
    x, y = noisy_regression()
    model = network()
    objective = squared_error(model)
    optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.05), parallelism=1, stride=1)
    batch = (x[:16], y[:16])
    expected = slow.statistics(slow.sample_gradients(objective, model, batch))
    (report,) = optimizer.rounds([batch], per_sample(model))
    found = GradientStatistics.of_noise(report.noise_variance, report.dimension, report.gradient_norm, 16)
    assert found.variance == pytest.approx(expected["variance"])
    assert found.squared_norm == pytest.approx(expected["squared_norm"])
    assert report.batch_numbers == (0,)


def test_gradient_norm_is_the_one_at_the_rounds_start():
    # Whether it comes from the comparison of predictions, or is asked for.
    x, y = noisy_regression()
    for parallelism in (1, 3):
        model = network()
        optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.05), parallelism=parallelism, stride=1)
        starts = []

        class Watched(PerSampleSource):
            def gradient(self, batch, starts=starts, model=model):
                answer = super().gradient(batch)
                square = sum(grad_of(p).square().sum() for p in model.parameters())
                starts.append(float(square) ** 0.5)
                return answer

        source = Watched(squared_error(model), model)
        batches = [(a, b) for a, b in zip(x.split(20), y.split(20), strict=True)]
        for report in optimizer.rounds(batches, source):
            assert report.gradient_norm == pytest.approx(starts[0], rel=1e-12)
            starts.clear()


@pytest.mark.parametrize("deterministic", [True, False])
def test_without_told_noise_nothing_is_asked(deterministic):
    model, (batch,) = network(), regression_batches(1)
    optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.05), deterministic=deterministic)
    batches = AdaptiveBatches(8, 4)
    reports = list(optimizer.rounds([batch] * 9, squared_error(model)))
    for report in reports:
        assert report.noise_variance == 0 if deterministic else math.isnan(report.noise_variance)
        assert math.isnan(report.gradient_norm)
    if not deterministic:
        with pytest.raises(ValueError, match="the round's source told no noise"):
            batches.update(reports[-1])


def test_closures_have_no_batch_numbers():
    model, (batch,) = network(), regression_batches(1)
    optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.05))

    def closure():
        optimizer.zero_grad()
        loss = squared_error(model)(batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last_report is not None
    assert optimizer.last_report.batch_numbers == ()


def test_sizes_of_batches_under_way_are_reckoned_with():
    batches = AdaptiveBatches(100, 4, test=NormTest(1.0), growth=math.inf)
    stream = iter(batches)
    next(stream)
    batches.batch_size = 12
    next(stream)
    _, _, (report, *_), _ = run_with_optex(per_sample)
    told = replace(report, batch_numbers=(0, 1), noise_variance=0.5, dimension=10, gradient_norm=1.0)
    # V / b was 5, in the mean over batches of 4 and 12 samples, whose harmonic mean is 6.
    assert batches.update(told) == 30
    with pytest.raises(ValueError, match=r"batches \(1, 2\) are not among the last ones drawn here, 0 to 1"):
        batches.update(replace(told, batch_numbers=(1, 2)))
    with pytest.raises(ValueError, match=r"batches \(\) are not among"):
        batches.update(replace(told, batch_numbers=()))
    assert batches.update(replace(told, accepted=0, noise_variance=math.nan)) == 30


def test_sizes_follow_statistics_and_reports_alone():
    with pytest.raises(TypeError, match="told must be GradientStatistics or the report of a round, got float"):
        AdaptiveBatches(100, 4).update(1.0)  # pyright: ignore[reportArgumentType]


def test_sampler_and_rounds_go_on_from_a_checkpoint():
    x, y = noisy_regression()

    def made():
        model = network()
        optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.05), parallelism=3)
        return model, optimizer, AdaptiveBatches(400, 6, test=NormTest(0.7))

    def run(model, optimizer, batches, rounds):
        reports = optimizer.rounds(((x[i], y[i]) for i in batches), per_sample(model))
        for report in itertools.islice(reports, rounds):
            batches.update(report)

    model, optimizer, batches = made()
    run(model, optimizer, batches, 4)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), batches.state_dict()))
    run(model, optimizer, batches, 6)
    other = made()
    for part, state in zip(other, saved, strict=True):
        part.load_state_dict(state)
    run(*other, 6)
    assert same(snapshot(model), snapshot(other[0]))
    assert batches.state_dict() == other[2].state_dict()


def test_on_workers_and_with_micro_batches():
    with ThreadPoolExecutor(2) as threads:
        evaluator = optex.WorkersEvaluator(threads)
        _, _, reports, sizes = run_with_optex(per_sample, evaluator=evaluator)
    expected = run_with_optex(per_sample)[3]
    assert sizes == expected
    assert all(report.noise_variance > 0 for report in reports)

    def accumulating(model):
        inner = AccumulatingSource(squared_error(model), list(model.parameters()))

        class Cut(optex.GradientSource):
            def gradient(self, batch):
                return inner.gradient(list(zip(batch[0].split(1), batch[1].split(1), strict=True)))

        return Cut()

    assert run_with_optex(accumulating)[3] == expected


def test_a_skipped_round_is_reported_and_changes_nothing():
    x, y = noisy_regression()
    x[:6] = torch.inf
    model = network()
    optimizer = OptEx(torch.optim.SGD(model.parameters(), lr=0.05), parallelism=1, on_nonfinite="skip")
    batches = AdaptiveBatches(400, 6, shuffle=False)
    rounds = optimizer.rounds(((x[i], y[i]) for i in batches), per_sample(model))
    with pytest.warns(optex.NonFiniteWarning):
        report = next(rounds)
    assert report.accepted == 0
    assert math.isnan(report.noise_variance)
    assert batches.update(report) == 6
