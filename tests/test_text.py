"""The transformer and its text: attention, windows and losses, each held to a slow twin."""

import math
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from optex.studies.problems import data, make_problem
from optex.studies.problems.networks import initialise
from optex.studies.problems.text import Shakespeare, Transformer, _Block, _encoded
from tests import datasets
from tests.test_data import real

made_up = pytest.mark.usefixtures("made_up_data")

SMALL: dict[str, Any] = {"layers": 1, "heads": 2, "width": 8, "context": 10, "batch_size": 6}


def decoded(codes):
    alphabet = sorted(set(data.shakespeare()))
    return "".join(alphabet[code] for code in codes.tolist())


def train(problem, steps, lr=0.01):
    optimizer = torch.optim.Adam(problem.parameters(), lr=lr)
    for batch in islice(problem.batches(), steps):
        optimizer.zero_grad()
        problem(batch).backward()
        optimizer.step()


def random_transformer(layers=2, context=12):
    """One whose every parameter matters, in double precision."""
    network = Transformer(alphabet=7, layers=layers, heads=2, width=6, context=context, dropout=0.0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network


class TestTransformer:
    @pytest.mark.parametrize(
        ("sizes", "dimension"), [((2, 4, 64, 64), 112_577), ((6, 6, 384, 256), 10_795_841)]
    )
    def test_sizes_are_those_documented(self, sizes, dimension):
        network = Transformer(65, *sizes, dropout=0.0)
        assert sum(parameter.numel() for parameter in network.parameters()) == dimension

    @torch.no_grad()
    def test_attention_equals_its_sum_written_out(self):
        block = random_transformer().blocks[0]
        assert isinstance(block, _Block)
        hidden = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found = block._attend(hidden)
        for n in range(2):
            query, key, value = block.attention(hidden[n]).split(6, dim=1)
            for head in (slice(0, 3), slice(3, 6)):
                for t in range(5):
                    weights = [
                        math.exp(float(query[t, head] @ key[s, head]) / math.sqrt(3)) for s in range(t + 1)
                    ]
                    mixed = sum(w * value[s, head] for s, w in enumerate(weights)) / sum(weights)
                    torch.testing.assert_close(found[n, t, head], mixed)

    def test_a_character_sees_none_that_follow(self):
        network = random_transformer()
        codes = torch.randint(7, (1, 12), generator=torch.Generator().manual_seed(2))
        changed = codes.clone()
        changed[0, 8] = (codes[0, 8] + 1) % 7
        before, after = network(codes)[0], network(changed)[0]
        assert torch.equal(before[:8], after[:8])
        assert (before[8:] != after[8:]).any(1).all()

    def test_places_matter(self):
        network = random_transformer(layers=1)
        scores = network(torch.zeros(1, 12, dtype=torch.int64))[0]
        assert len(torch.unique(scores[:, 0])) == 12

    def test_starts_as_torch_does(self):
        torch.manual_seed(0)
        expected, network = (Transformer(65, 8, 4, 64, 64, dropout=0.0) for _ in range(2))
        initialise(network, torch.Generator().manual_seed(0))
        for (name, ours), theirs in zip(network.named_parameters(), expected.parameters(), strict=True):
            ours, theirs = ours.detach().double(), theirs.detach().double()
            assert float(ours.std(correction=0)) == pytest.approx(float(theirs.std(correction=0)), rel=0.3), (
                name
            )
            assert abs(float(ours.mean() - theirs.mean())) <= 0.3 * float(theirs.std(correction=0)), name

    def test_starts_as_gpt_2_does(self):
        network = Transformer(65, 8, 4, 64, 64, dropout=0.0)
        network.initialise_as_gpt_2(torch.Generator().manual_seed(0))
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()
            elif "norm" in name:
                assert torch.equal(parameter, torch.ones_like(parameter))
            else:
                ends_a_branch = "projection" in name or "narrow" in name
                assert float(parameter.detach().std()) == pytest.approx(
                    0.005 if ends_a_branch else 0.02, rel=0.05
                ), name


@made_up
class TestBatches:
    def test_what_follows_is_the_text_one_further(self):
        codes, following = next(Shakespeare(**SMALL).batches())
        assert codes.shape == following.shape == (6, 10)
        text = data.shakespeare()
        for window, after in zip(codes, following, strict=True):
            assert decoded(window)[1:] == decoded(after)[:-1]
            assert decoded(window) + decoded(after)[-1] in text[:2700]

    def test_an_epoch_shows_no_character_twice_and_the_next_is_cut_elsewhere(self):
        problem = Shakespeare(**SMALL)
        codes = torch.arange(2700)  # every character known by its place
        batches = (pair for pair in _places(problem, codes))
        epoch = 269 // 6
        first, second = (torch.cat(list(islice(batches, epoch))).flatten().tolist() for _ in range(2))
        assert len(set(first)) == len(first) == epoch * 60
        assert {place % 10 for place in first[::10]} != {place % 10 for place in second[::10]}
        assert first[::10] != sorted(first[::10])

    def test_the_end_of_the_text_is_held_out(self, monkeypatch, tmp_path):
        text = "abcdefghi " * 270 + "X" * 300
        (tmp_path / "tinyshakespeare").mkdir()
        (tmp_path / "tinyshakespeare" / "input.txt").write_text(text)
        datasets.use(monkeypatch, tmp_path)
        problem = Shakespeare(**SMALL)
        seen = {
            code
            for batch in islice(problem.batches(), 300)
            for part in batch
            for code in part.unique().tolist()
        }
        assert decoded(torch.tensor(sorted(seen))) == " abcdefghi"
        with torch.no_grad():
            problem.network.output.bias[0] = 50.0  # sure of X, which is the first of the alphabet but one
            problem.network.output.bias[1] = 100.0
        assert problem.test_error() < 1e-6 < problem.evaluate()

    def test_codes_are_places_in_the_sorted_alphabet(self):
        codes, size = _encoded("b€a b")
        assert (codes.tolist(), size) == ([2, 3, 1, 0, 2], 4)


def _places(problem, codes):
    """The problem's windows on another text of the same length."""
    problem._text = lambda: (codes, codes, 10)
    for window, _ in problem.batches():
        yield window


@torch.no_grad()
def mean_loss(problem, codes, starts):
    losses = []
    for start in starts:
        window = codes[start : start + problem.context + 1]
        scores = problem.network(window[None, :-1])[0].log_softmax(1)
        losses += [-float(scores[t, window[t + 1]]) for t in range(problem.context)]
    return np.mean(losses)


@made_up
class TestEvaluation:
    def test_equals_the_mean_over_held_characters_one_by_one(self, monkeypatch):
        monkeypatch.setattr("optex.studies.problems.text._CHUNK", 3)
        problem = Shakespeare(**SMALL, held_size=8).double()
        codes, _, _ = problem._text()
        starts = [int(i * (2700 - 11) / 7) for i in range(8)]
        assert problem.evaluate() == pytest.approx(mean_loss(problem, codes, starts), rel=1e-10)

    def test_test_error_covers_the_held_out_text(self):
        problem = Shakespeare(**SMALL).double()
        _, codes, _ = problem._text()
        assert len(codes) == 300
        assert problem.test_error() == pytest.approx(mean_loss(problem, codes, range(0, 290, 10)), rel=1e-10)

    def test_loss_of_a_batch_is_its_mean(self):
        problem = Shakespeare(**SMALL)
        codes, following = next(problem.batches())
        scores = problem.network(codes)
        each = [functional.cross_entropy(s, f) for s, f in zip(scores, following, strict=True)]
        torch.testing.assert_close(problem((codes, following)), torch.stack(each).mean())

    def test_a_small_start_guesses(self):
        assert Shakespeare(**SMALL, start="gpt2").evaluate() == pytest.approx(math.log(10), rel=0.02)

    def test_dropout_is_off_and_comes_back(self):
        problem = Shakespeare(**SMALL, dropout=0.5)
        batch = next(problem.batches())
        assert problem.evaluate() == problem.evaluate()
        assert problem.evaluate() == Shakespeare(**SMALL).evaluate()
        assert problem.network.training
        assert problem(batch) != problem(batch)

    def test_learns(self, monkeypatch, tmp_path):
        (tmp_path / "tinyshakespeare").mkdir()
        (tmp_path / "tinyshakespeare" / "input.txt").write_text("abcdefghijk" * 270)
        datasets.use(monkeypatch, tmp_path)
        problem = Shakespeare(**SMALL)
        train(problem, 150)
        assert problem.evaluate() < 0.3
        assert problem.test_error() < 0.3


REFUSALS = {
    "layers": ({"layers": 0}, "Shakespeare: layers must be between 1 and 1024, got 0"),
    "heads": ({"heads": 3}, "Shakespeare: heads must divide the width of 8, got 3"),
    "more heads than width": ({"heads": 9}, "heads must be between 1 and 8, got 9"),
    "context": ({"context": 1351}, "context must be between 1 and 1350, got 1351"),
    "dropout": ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    "batch": ({"batch_size": 270}, "batch_size must be between 1 and 269, got 270"),
    "start": ({"start": "zero"}, "start must be 'torch' or 'gpt2', got 'zero'"),
    "held": ({"held_size": 0}, "held_size must be between 1 and 269, got 0"),
}


@made_up
@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses_with_a_reason(options, message):
    with pytest.raises(ValueError, match=message):
        Shakespeare(**{**SMALL, **options})


@made_up
def test_the_largest_batch_is_never_short():
    problem = Shakespeare(**{**SMALL, "batch_size": 269})
    assert [len(codes) for codes, _ in islice(problem.batches(), 20)] == [269] * 20


def test_without_the_text_says_how_to_get_it(tmp_path, monkeypatch):
    datasets.use(monkeypatch, tmp_path)
    with pytest.raises(FileNotFoundError, match="optex fetch shakespeare"):
        make_problem("shakespeare")


@real("shakespeare")
def test_shakespeare_is_learned():
    problem = make_problem("shakespeare")
    assert problem.dimension == 112_577
    assert problem.evaluate() > math.log(65)  # that of a guess
    train(problem, 40, lr=1e-3)
    assert 2.5 < problem.evaluate() < 3.3
