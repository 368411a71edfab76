"""Classifying images: batches, augmentation, held batches and BatchNorm, each held to a slow twin."""

import copy
import pickle
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from optex import OptEx
from optex.studies.problems import data, make_problem
from optex.studies.problems.images import CIFAR10, FashionMNIST, shifted_and_mirrored
from optex.studies.problems.interface import seeded_generator
from optex.studies.problems.networks import CLASSIFIERS, evaluation_mode
from tests import datasets
from tests.test_data import real

made_up = pytest.mark.usefixtures("made_up_data")

SMALL_RESNET = {"model": "resnet", "width": 4, "depth": 8, "batch_size": 16}


def layers(problem: Any) -> Any:
    """The network's parts, by number: which kinds they are, only each test knows."""
    assert isinstance(problem.network, nn.Sequential)
    return problem.network


def snapshot(problem):
    return {name: value.clone() for name, value in problem.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def train(problem, steps, lr=0.01):
    optimizer = torch.optim.Adam(problem.parameters(), lr=lr)
    for batch in islice(problem.batches(), steps):
        optimizer.zero_grad()
        problem(batch).backward()
        optimizer.step()


def identified(images, problem):
    """Which images of the training set these are, by their pixels."""
    pixels, _ = problem._arrays("train")
    mean, deviation = np.array(problem.mean), np.array(problem.deviation)
    undone = images.double().numpy() * deviation[:, None, None] + mean[:, None, None]
    found = {image.tobytes(): i for i, image in enumerate(pixels)}
    return [found[image.tobytes()] for image in np.rint(255 * undone).astype(np.uint8)]


@made_up
class TestNetworks:
    @pytest.mark.parametrize(
        ("build", "options", "dimension"),
        [
            (FashionMNIST, {}, 101_770),
            (FashionMNIST, {"model": "cnn"}, 20_490),
            (FashionMNIST, {"width": 10, "depth": 3}, 7850 + 2 * 110 + 110),
            (CIFAR10, {}, 494_730),
            (CIFAR10, {"model": "resnet"}, 269_722),
            (CIFAR10, {"model": "resnet", "depth": 32}, 464_154),
        ],
    )
    def test_sizes_are_those_documented(self, build, options, dimension):
        assert build(**options).dimension == dimension

    @pytest.mark.parametrize("model", CLASSIFIERS)
    @pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
    def test_every_model_takes_the_images_of_both(self, name, model):
        options = {"depth": 8} if model == "resnet" else {}
        problem = make_problem(name, model=model, width=4, **options)
        problem(next(problem.batches())).backward()
        for parameter in problem.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0

    def test_resnet_halves_twice_and_its_shortcut_is_strided_and_padded(self):
        network = layers(CIFAR10(**SMALL_RESNET))
        hidden = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        block = network[4]  # stem 0 to 2, then one block a stage
        with torch.no_grad():
            block.second_norm.weight.zero_()  # only the shortcut is left
            out = block(hidden)
        expected = torch.zeros(2, 8, 16, 16)
        for channel in range(4):
            for i in range(16):
                for j in range(16):
                    expected[:, channel + 2, i, j] = hidden[:, channel, 2 * i, 2 * j].clamp(min=0)
        assert torch.equal(out, expected)

    def test_a_start_does_not_depend_on_precision(self):
        single, double = FashionMNIST(seed=3), FashionMNIST(seed=3).double()
        double.reset()
        for a, b in zip(single.parameters(), double.parameters(), strict=True):
            assert torch.equal(a.double(), b)


@made_up
class TestBatches:
    def test_an_epoch_shows_every_image_once_and_the_next_in_another_order(self):
        problem = CIFAR10(batch_size=30)
        epochs = [
            [row for images, _ in islice(batches, 4) for row in identified(images, problem)]
            for batches in [problem.batches()] * 2
        ]
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(datasets.TRAIN))
        assert epochs[0] != epochs[1]

    def test_images_keep_their_labels(self):
        problem = FashionMNIST(batch_size=20)
        images, labels = next(problem.batches())
        _, classes = problem._arrays("train")
        assert labels.tolist() == classes[identified(images, problem)].tolist()

    def test_a_batch_that_would_be_short_waits(self):
        problem = FashionMNIST(batch_size=50)
        assert [len(labels) for _, labels in islice(problem.batches(), 5)] == [50] * 5

    def test_a_smaller_training_set_is_the_same_for_every_seed_and_holds_the_held_batches(self):
        sets = []
        for seed in (0, 1):
            problem = CIFAR10(seed=seed, train_size=40, held_size=12, batch_size=40)
            sets.append(sorted(identified(next(problem.batches())[0], problem)))
            assert set(problem._order[:12].tolist()) <= set(sets[-1])
        assert sets[0] == sets[1]
        assert len(set(sets[0])) == 40


@made_up
class TestAugmentation:
    def test_equals_padding_cutting_and_mirroring_one_by_one(self):
        images = torch.from_numpy(datasets.images(50, 3, 32, seed=5)[0])
        found = shifted_and_mirrored(images, torch.Generator().manual_seed(4)).numpy()
        generator = torch.Generator().manual_seed(4)
        tops, lefts = torch.randint(9, (2, 50, 1), generator=generator).squeeze(2).tolist()
        mirrored = torch.randint(2, (50, 1), generator=generator).flatten().tolist()
        for image, top, left, flip, result in zip(images.numpy(), tops, lefts, mirrored, found, strict=True):
            cut = np.pad(image, np.array([(0, 0), (4, 4), (4, 4)]))[:, top : top + 32, left : left + 32]
            np.testing.assert_array_equal(result, cut[:, :, ::-1] if flip else cut)
        assert {min(tops), min(lefts), max(tops), max(lefts)} == {0, 8}
        assert 10 < sum(mirrored) < 40

    def test_draws_belong_to_the_batch(self):
        problem = CIFAR10(augment=True)
        first, second = (list(islice(problem.batches(), 3)) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])

    def test_changes_the_images_and_not_the_labels_nor_the_objective(self):
        plain, augmented = CIFAR10(), CIFAR10(augment=True)
        (images, labels), (changed, same) = next(plain.batches()), next(augmented.batches())
        assert torch.equal(labels, same)
        assert not torch.equal(images, changed)
        assert plain.evaluate() == augmented.evaluate()


@made_up
class TestEvaluation:
    def test_equals_the_mean_over_held_images_one_by_one(self, monkeypatch):
        monkeypatch.setattr("optex.studies.problems.images._CHUNK", 7)
        problem = FashionMNIST(held_size=25).double()
        pixels, labels = problem._arrays("train")
        rows = np.random.default_rng(0).permutation(datasets.TRAIN)[:25]
        losses = []
        for row in rows:
            image = (torch.tensor(pixels[row]).double() / 255 - 0.2860) / 0.3530
            scores = problem.logits(image[None])[0].detach()
            losses.append(float(torch.logsumexp(scores, 0) - scores[int(labels[row])]))
        assert problem.evaluate() == pytest.approx(np.mean(losses), rel=1e-12)

    def test_error_equals_counting_one_by_one(self, monkeypatch):
        monkeypatch.setattr("optex.studies.problems.images._CHUNK", 7)
        problem = FashionMNIST()
        pixels, labels = problem._arrays("test")
        images = (torch.tensor(pixels) / 255 - 0.2860) / 0.3530
        guesses = [int(problem.logits(image[None]).argmax()) for image in images]
        wrong = sum(guess != label for guess, label in zip(guesses, labels.tolist(), strict=True))
        assert problem.test_error() == wrong / datasets.TEST

    def test_learns(self):
        problem = FashionMNIST(batch_size=30)
        loss, error = problem.evaluate(), problem.test_error()
        train(problem, 20)
        assert problem.evaluate() < 0.1 * loss
        assert problem.test_error() < 0.1 < 0.7 < error

    def test_uses_the_running_statistics_and_changes_nothing(self):
        problem = CIFAR10(**SMALL_RESNET)
        train(problem, 3)
        before, training = snapshot(problem), layers(problem)[1].training
        first = problem.evaluate()
        problem.test_error()
        assert problem.evaluate() == first
        assert_same(snapshot(problem), before)
        assert layers(problem)[1].training is training is True
        images, labels = problem._tensors("train")
        held = problem._order[: problem.held_size]
        scores, classes = _scores(problem, images[held], labels[held])
        assert float(functional.cross_entropy(scores, classes)) != pytest.approx(first, rel=1e-3)

    def test_a_part_left_in_evaluation_mode_stays_there(self):
        problem = CIFAR10(**SMALL_RESNET)
        layers(problem)[1].eval()
        with evaluation_mode(problem):
            assert not any(part.training for part in problem.modules())
        assert not layers(problem)[1].training
        assert layers(problem)[4].first_norm.training


@torch.no_grad()
def _scores(problem, images, labels):
    inputs, classes = problem._prepared(images, labels)
    return problem.logits(inputs), classes


@made_up
class TestBatchNorm:
    def test_reset_brings_the_buffers_back_bit_for_bit(self):
        problem = CIFAR10(**SMALL_RESNET)
        start, loss = snapshot(problem), problem.evaluate()
        train(problem, 3)
        assert not torch.equal(layers(problem)[1].running_mean, start["network.1.running_mean"])
        problem.reset()
        assert_same(snapshot(problem), start)
        assert problem.evaluate() == loss

    def test_a_run_after_reset_is_the_first_run(self):
        problem = CIFAR10(**SMALL_RESNET, augment=True)
        ends = []
        for _ in range(2):
            problem.reset()
            train(problem, 3)
            ends.append(snapshot(problem))
        assert_same(*ends)

    def test_rounds_run(self):
        problem = CIFAR10(**SMALL_RESNET)
        loss = problem.evaluate()
        optimizer = OptEx(torch.optim.Adam(problem.parameters(), lr=0.01), parallelism=3)
        for _ in islice(optimizer.rounds(problem.batches(), problem), 6):
            pass
        assert problem.evaluate() < loss


@made_up
class TestLightness:
    def test_the_data_does_not_travel_with_the_problem(self):
        problem = CIFAR10(model="cnn", width=2, depth=1)
        size = len(pickle.dumps(problem))
        assert size < 4 * problem.dimension + 20_000 < datasets.TRAIN * 3072

    def test_a_copy_goes_its_own_way(self):
        problem = FashionMNIST()
        twin = copy.deepcopy(problem)
        train(problem, 2)
        assert twin.evaluate() != problem.evaluate()
        twin.reset()
        problem.reset()
        assert twin.evaluate() == problem.evaluate()

    def test_the_start_comes_from_its_own_stream(self):
        problem = FashionMNIST(seed=5)
        generator = seeded_generator(5, "start")
        expected = torch.empty(128, 784).uniform_(-1 / 28, 1 / 28, generator=generator)
        assert torch.equal(layers(problem)[1].weight, expected)


REFUSALS = {
    "model": ({"model": "vit"}, "CIFAR10: model 'vit' is not one of mlp, cnn, residual-mlp, resnet"),
    "width": ({"width": 0}, "CIFAR10: width must be between 1 and 65536, got 0"),
    "depth": ({"depth": 0}, "CIFAR10: depth must be between 1 and 1024, got 0"),
    "layers of a resnet": ({"model": "resnet", "depth": 18}, "resnet: depth must be 8, 14, 20, .* got 18"),
    "too few layers": ({"model": "resnet", "depth": 2}, "resnet: depth must be 8, 14, 20, .* got 2"),
    "halvings": ({"model": "cnn", "depth": 6}, "cnn: depth must be at most 5 for images of side 32, got 6"),
    "training set": ({"train_size": 121}, "CIFAR10: train_size must be between 1 and 120, got 121"),
    "batch": ({"train_size": 60, "batch_size": 61}, "batch_size must be between 1 and 60, got 61"),
    "held": ({"train_size": 60, "held_size": 61}, "held_size must be between 1 and 60, got 61"),
    "no held batches": ({"held_size": 0}, "held_size must be between 1 and 120, got 0"),
    "not a number": ({"batch_size": 2.5}, "batch_size must be between 1 and 120, got 2.5"),
}


@made_up
@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10(**options)


def test_without_the_data_says_how_to_get_it(tmp_path, monkeypatch):
    datasets.use(monkeypatch, tmp_path)
    with pytest.raises(FileNotFoundError, match="optex fetch cifar10"):
        make_problem("cifar10")


class TestRealData:
    @real("fashion-mnist")
    def test_fashion_mnist_is_learned(self):
        problem = FashionMNIST()
        assert problem.test_error() > 0.75
        train(problem, 200, lr=2e-3)
        assert problem.test_error() < 0.25
        assert problem.evaluate() < 0.65

    @real("cifar10")
    @pytest.mark.parametrize("options", [{}, {"augment": True}])
    def test_cifar10_is_learned(self, options):
        problem = CIFAR10(train_size=5_000, **options)
        assert data.find("cifar10") is not None
        train(problem, 100, lr=1e-3)
        assert problem.evaluate() < 2.05
        assert problem.test_error() < 0.7
