"""Blocks that wait elsewhere: the same iterates as MeZO's, and what is on the device meanwhile."""

import copy
import math
import weakref
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import optex
from optex.optimizers.mezo.streaming import BlockStreamer
from tests.models import same, snapshot

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def chain(blocks=4, width=5, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)) for _ in range(blocks))
    ).to(dtype)


def batches(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 8, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def loss_to(y):
    return lambda out: (out - y).square().mean()


class Masked(NamedTuple):
    hidden: Any
    mask: Any


def packed(kind, hidden, mask):
    if kind is Masked:
        return Masked(hidden, mask)
    return {"hidden": hidden, "mask": mask} if kind is dict else kind([hidden, mask])


def unpacked(value):
    return tuple(value.values() if isinstance(value, dict) else value)


class Handing(nn.Module):
    """A block that takes two tensors and hands two on."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(5, 5, dtype=torch.float64)

    def forward(self, value):
        hidden, mask = unpacked(value)
        return packed(self.kind, self.layer(hidden) * mask, mask)


class Counting(BlockStreamer):
    """Counts by itself what is on the device: working copies that are still alive."""

    def __init__(self, *arguments, **options):
        self.alive, self.most = weakref.WeakSet(), 0
        self.visits = []
        super().__init__(*arguments, **options)

    def _fetch(self, number):
        visit = super()._fetch(number)
        self.visits.append(number)
        for tensor in visit.tensors.values():
            self.alive.add(_Tag.of(tensor, number))
        self.most = max(self.most, len({tag.number for tag in self.alive}))
        return visit


class _Tag:
    """Lives as long as the tensor that it hangs on."""

    def __init__(self, number):
        self.number = number

    @classmethod
    def of(cls, tensor, number):
        tensor.tag = cls(number)
        return tensor.tag


class TestIterates:
    @pytest.mark.parametrize("store", ["cpu", "files"])
    def test_delayed_with_flush_is_immediate(self, store, tmp_path):
        streamed, plain = chain(), chain()
        where = "cpu" if store == "cpu" else tmp_path / "blocks"
        streamer = optex.optimizers.BlockStreamer(streamed, lr=0.02, weight_decay=0.1, store=where)
        immediate = optex.optimizers.MeZO(plain.parameters(), lr=0.02, weight_decay=0.1)
        exact = chain()
        copied = optex.optimizers.MeZO(exact.parameters(), lr=0.02, weight_decay=0.1, exact=True)
        for seed, (x, y) in enumerate(batches(50)):
            here = streamer.step(x, loss_to(y), seed=seed)
            there = immediate.step(lambda x=x, y=y: loss_to(y)(plain(x)), seed=seed)
            copied.step(lambda x=x, y=y: loss_to(y)(exact(x)), seed=seed)
            assert float(here) == pytest.approx(float(there), rel=1e-12)
        assert not same(snapshot(streamed), snapshot(exact))  # the last step is still to come
        streamer.flush()
        assert same(snapshot(streamed), snapshot(exact))
        for left, right in zip(snapshot(streamed), snapshot(plain), strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
        assert [entry[:2] for entry in streamer.log] == [entry[:2] for entry in copied.log]

    def test_its_log_is_one_for_mezo_to_replay(self):
        streamed, start = chain(), chain()
        streamer = optex.optimizers.BlockStreamer(streamed, lr=0.02)
        for x, y in batches(6):
            streamer.step(x, loss_to(y))
            streamer.lr *= 0.8
        streamer.flush()
        optex.optimizers.MeZO(start.parameters(), exact=True).replay(streamer.log)
        assert same(snapshot(streamed), snapshot(start))

    def test_dropout_is_the_same_in_both_passes_and_as_mezos(self):
        streamed, plain = chain(dropout=0.4), chain(dropout=0.4)
        streamer = optex.optimizers.BlockStreamer(streamed, lr=0.02)
        other = optex.optimizers.MeZO(plain.parameters(), lr=0.02, exact=True)
        for seed, (x, y) in enumerate(batches(5)):
            torch.manual_seed(seed)
            streamer.step(x, loss_to(y), seed=seed)
            torch.manual_seed(seed)
            other.step(lambda x=x, y=y: loss_to(y)(plain(x)), seed=seed)
        streamer.flush()
        assert same(snapshot(streamed), snapshot(plain))

    def test_forward_sees_all_steps_and_flush_twice_is_flush_once(self):
        streamed = chain()
        streamer = optex.optimizers.BlockStreamer(streamed, lr=0.05)
        (x, y), (probe, _) = batches(2)
        streamer.step(x, loss_to(y))
        seen = streamer.forward(probe)
        streamer.flush()
        after = snapshot(streamed)
        streamer.flush()
        assert same(after, snapshot(streamed))
        assert torch.equal(seen, streamed(probe))

    def test_seed_0_is_a_seed(self):
        ends = []
        for noise in (1, 2):
            streamed = chain()
            torch.manual_seed(noise)
            streamer = optex.optimizers.BlockStreamer(streamed, lr=0.05)
            (x, y) = batches(1)[0]
            streamer.step(x, loss_to(y), seed=0)
            streamer.flush()
            ends.append(snapshot(streamed))
        assert same(*ends)

    def test_a_block_may_change_its_input_in_place(self):
        streamed = nn.Sequential(nn.ReLU(inplace=True), chain(1))
        plain = nn.Sequential(nn.ReLU(), chain(1))
        (x, y) = batches(1)[0]
        kept = x.clone()
        here = optex.optimizers.BlockStreamer(streamed, lr=0.05).step(x.clone(), loss_to(y), seed=3)
        there = optex.optimizers.MeZO(plain.parameters(), exact=True).step(lambda: loss_to(y)(plain(x)), seed=3)
        assert torch.equal(x, kept)
        assert float(here) == pytest.approx(float(there), rel=1e-12)

    @pytest.mark.parametrize("kind", [tuple, list, Masked, dict])
    def test_blocks_may_hand_on_several_tensors(self, kind):
        torch.manual_seed(0)
        layers, (x, y) = [Handing(kind), Handing(kind)], batches(1)[0]
        plain = copy.deepcopy(layers)
        streamer = optex.optimizers.BlockStreamer(layers, lr=0.05)
        start = packed(kind, x, x > 0)

        def loss(answer):
            return (unpacked(answer)[0] - y.mean()).square().mean()

        def together():
            return loss(plain[1](plain[0](start)))

        here = streamer.step(start, loss, seed=3)
        streamer.flush()
        parameters = [p for layer in plain for p in layer.parameters()]
        there = optex.optimizers.MeZO(parameters, lr=0.05, exact=True).step(together, seed=3)
        assert float(here) == pytest.approx(float(there), rel=1e-12)
        assert isinstance(streamer.forward(start), kind)

    def test_frozen_parameters_stay_and_are_not_sent_back(self):
        streamed = chain(2)
        streamed[0].requires_grad_(False)
        frozen = snapshot(streamed[0])
        streamer = optex.optimizers.BlockStreamer(streamed, lr=0.05)
        for x, y in batches(2):
            streamer.step(x, loss_to(y))
        streamer.flush()
        assert same(frozen, snapshot(streamed[0]))
        assert streamer.traffic.offloads == [0, 2]

    def test_in_bfloat16_half_the_bytes_travel_and_the_device_computes_in_its_own(self):
        full, low = chain(dtype=torch.float32), chain(dtype=torch.float32)
        seen = []
        low[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
        streamers = [
            optex.optimizers.BlockStreamer(full, lr=0.05),
            optex.optimizers.BlockStreamer(low, lr=0.05, transfer_dtype=torch.bfloat16),
        ]
        for streamer in streamers:
            for seed, (x, y) in enumerate(batches(30, torch.float32)):
                streamer.step(x, loss_to(y), seed=seed)
            streamer.flush()
        assert streamers[0].traffic.bytes_moved == 2 * streamers[1].traffic.bytes_moved
        assert all(p.dtype is torch.bfloat16 for p in low.parameters())
        assert set(seen) == {torch.float32}
        for left, right in zip(snapshot(full), snapshot(low), strict=True):
            torch.testing.assert_close(left, right.float(), rtol=0, atol=0.05)


class TestTraffic:
    def test_few_blocks_are_resident_and_each_travels_once_a_step(self):
        streamer = Counting(chain(7), lr=0.02)
        for x, y in batches(4):
            streamer.step(x, loss_to(y))
            assert streamer.traffic.resident == 0
            assert not streamer.alive
        assert streamer.visits == list(range(7)) * 4
        assert streamer.most <= 3
        assert streamer.traffic.peak_resident == streamer.most == 2
        assert streamer.traffic.uploads == [4] * 7
        assert streamer.traffic.offloads == [3] * 7
        streamer.flush()
        assert streamer.traffic.offloads == [4] * 7
        assert streamer.traffic.bytes_moved == (5 + 4) * sum(p.nbytes for p in chain(7).parameters())

    def test_parameters_wait_in_files_that_outlive_the_streamer(self, tmp_path):
        blocks = chain(2)
        streamer = optex.optimizers.BlockStreamer(blocks, lr=0.02, store=tmp_path / "blocks")
        for x, y in batches(3):
            streamer.step(x, loss_to(y))
        streamer.flush()
        values = snapshot(blocks)
        files = sorted((tmp_path / "blocks").iterdir())
        assert files[0].name == "0000-0.bias.bin"
        assert sum(f.stat().st_size for f in files) == sum(p.nbytes for p in values)
        found = torch.from_file(str(files[0]), size=5, dtype=torch.float64)
        assert torch.equal(found, values[1])


class TestFailures:
    def test_a_loss_that_is_not_finite_changes_nothing(self):
        streamed, plain = chain(), chain()
        streamer = optex.optimizers.BlockStreamer(streamed, lr=0.02)
        other = optex.optimizers.MeZO(plain.parameters(), lr=0.02, exact=True)
        torch.manual_seed(7)
        for number, (x, y) in enumerate(batches(6)):
            other.step(lambda x=x, y=y: loss_to(y)(plain(x)), seed=number)
            if number in (1, 4):
                generator = torch.get_rng_state()
                with pytest.raises(optex.NonFiniteError, match=r"loss is nan ahead along the direction; no"):
                    streamer.step(x * math.nan, loss_to(y))
                assert torch.equal(generator, torch.get_rng_state())
            streamer.step(x, loss_to(y), seed=number)
        streamer.flush()
        assert same(snapshot(streamed), snapshot(plain))

    def test_a_block_that_fails_half_way_changes_nothing(self):
        streamed, plain = chain(), chain()
        streamer = optex.optimizers.BlockStreamer(streamed, lr=0.02)
        other = optex.optimizers.MeZO(plain.parameters(), lr=0.02, exact=True)
        (x, y), (u, v) = batches(2)
        streamer.step(x, loss_to(y), seed=0)
        handle = streamed[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            streamer.step(u, loss_to(v), seed=1)
        handle.remove()
        assert streamer.traffic.resident == 0
        streamer.step(u, loss_to(v), seed=1)
        streamer.flush()
        other.step(lambda: loss_to(y)(plain(x)), seed=0)
        other.step(lambda: loss_to(v)(plain(u)), seed=1)
        assert same(snapshot(streamed), snapshot(plain))

    def test_tied_weights_are_named(self):
        first, last = (nn.Sequential(nn.Linear(5, 5)) for _ in range(2))
        first[0].weight = last[0].weight
        with pytest.raises(ValueError, match=r"'0\.weight' of block 0 and '0\.weight' of block 2 are tied"):
            optex.optimizers.BlockStreamer([first, nn.Tanh(), last])
        with pytest.raises(ValueError, match=r"are tied"):
            optex.optimizers.BlockStreamer([first, first])

    def test_ties_within_a_block_are_kept_and_stepped_as_mezo_does(self):
        block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).double()
        block[2].weight = block[0].weight
        plain = copy.deepcopy(block)
        (x, y) = batches(1)[0]
        streamer = optex.optimizers.BlockStreamer([block], lr=0.1)
        streamer.step(x, loss_to(y), seed=0)
        streamer.flush()
        assert block[2].weight is block[0].weight
        other = optex.optimizers.MeZO(plain.parameters(), lr=0.1, exact=True)
        other.step(lambda: loss_to(y)(plain(x)), seed=0)
        assert same(snapshot(block), snapshot(plain))

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"epsilon": 0.0}, ValueError, "epsilon must be a finite number above 0"),
            ({"epsilon": math.inf}, ValueError, "epsilon must be"),
            ({"lr": -1.0}, ValueError, "lr must be"),
            ({"weight_decay": math.nan}, ValueError, "weight_decay must be"),
            ({"store": 3}, TypeError, "store must be 'cpu' or a folder, got 3"),
            ({"transfer_dtype": torch.int8}, TypeError, "transfer_dtype must be a floating dtype"),
        ],
    )
    def test_refuses(self, options, error, match):
        with pytest.raises(error, match=match):
            optex.optimizers.BlockStreamer(chain(1), **options)

    @pytest.mark.parametrize("blocks", [[], [nn.Tanh()]], ids=["none", "none with a parameter"])
    def test_refuses_blocks_without_a_parameter(self, blocks):
        with pytest.raises(ValueError, match="no block has a parameter"):
            optex.optimizers.BlockStreamer(blocks)

    def test_refuses_what_is_no_block(self):
        with pytest.raises(TypeError, match=r"block 0 must be a torch.nn.Module, got str"):
            optex.optimizers.BlockStreamer(["layer"])  # pyright: ignore[reportArgumentType]

    def test_refuses_complex_parameters(self):
        with pytest.raises(TypeError, match="'weight' of block 0 is complex"):
            optex.optimizers.BlockStreamer([nn.Linear(2, 2, dtype=torch.complex64)])

    def test_refuses_a_folder_in_use(self, tmp_path):
        (tmp_path / "other").write_text("mine")
        with pytest.raises(FileExistsError, match="is not empty"):
            optex.optimizers.BlockStreamer(chain(1), store=tmp_path)
        assert (tmp_path / "other").read_text() == "mine"

    def test_a_rate_set_wrong_is_refused_before_anything_happens(self):
        streamer = optex.optimizers.BlockStreamer(chain(1))
        streamer.lr = -1.0
        with pytest.raises(ValueError, match="lr must be"):
            streamer.step(torch.ones(1, 5, dtype=torch.float64), loss_to(0.0))
        assert streamer.traffic.uploads == [0]


class _GPTLayer(nn.Module):
    """Answers a tuple, as GPT-2's did."""

    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, hidden):
        return (hidden + self.inner(hidden),)


class _LlamaLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, hidden, *, position_ids, position_embeddings):
        cosine, _ = position_embeddings
        assert position_ids.shape == (1, hidden.shape[1])
        return hidden + cosine * self.inner(hidden)


class _Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([0.5]))

    def forward(self, hidden, places):
        angles = (places[..., None] * self.frequencies).to(hidden.dtype)
        return angles.cos(), angles.sin()


class _GPT(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa")
        self.tokens = nn.Embedding(7, width)
        self.transformer = nn.ModuleDict(
            {
                "wte": self.tokens,
                "wpe": nn.Embedding(9, width),
                "drop": nn.Dropout(0.0),
                "h": nn.ModuleList([_GPTLayer(width) for _ in range(3)]),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, 7, bias=False)


class _Llama(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(7, width),
                "layers": nn.ModuleList([_LlamaLayer(width) for _ in range(3)]),
                "norm": nn.LayerNorm(width),
                "rotary_emb": _Rotary(),
            }
        )
        self.lm_head = nn.Linear(width, 7, bias=False)


class TestLanguageModels:
    @pytest.mark.parametrize("make", [_GPT, _Llama])
    def test_entry_layers_and_exit_make_the_chain(self, make):
        torch.manual_seed(0)
        model = make()
        blocks = optex.optimizers.language_model_blocks(model)
        assert len(blocks) == 5
        codes = torch.randint(7, (2, 6))
        streamer = optex.optimizers.BlockStreamer(blocks, lr=0.01)
        scores = streamer.forward(codes)
        assert scores.shape == (2, 6, 7)
        torch.testing.assert_close(nn.Sequential(*blocks)(codes), scores)
        before = snapshot(model)
        streamer.step(codes, lambda out: nn.functional.cross_entropy(out.flatten(0, 1), codes.flatten()))
        streamer.flush()
        assert not any(torch.equal(a, b) for a, b in zip(before, snapshot(model), strict=True))

    def test_tied_embeddings_are_refused_by_name(self):
        model = _GPT()
        model.lm_head.weight = model.tokens.weight
        with pytest.raises(
            ValueError, match=r"'tokens\.weight' of block 0 and 'head\.weight' of block 4 are tied"
        ):
            optex.optimizers.BlockStreamer(optex.optimizers.language_model_blocks(model))

    def test_other_models_are_refused(self):
        with pytest.raises(ValueError, match=r"Sequential has neither model\.layers"):
            optex.optimizers.language_model_blocks(chain(1))

    def test_attention_that_needs_a_mask_is_refused(self):
        model = _GPT()
        model.config._attn_implementation = "eager"
        with pytest.raises(ValueError, match="attention 'eager' needs a mask"):
            optex.optimizers.language_model_blocks(model)

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_hugging_faces_own(self, kind):
        transformers = pytest.importorskip("transformers")
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=11, n_positions=16, n_embd=8, n_layer=2, n_head=2, tie_word_embeddings=False
            )
            model = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.LlamaConfig(
                vocab_size=11,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                tie_word_embeddings=False,
            )
            model = transformers.LlamaForCausalLM(config)
        model.eval()
        codes = torch.randint(11, (2, 6))
        with torch.no_grad():
            expected = model(codes).logits
        found = optex.optimizers.BlockStreamer(optex.optimizers.language_model_blocks(model)).forward(codes)
        torch.testing.assert_close(found, expected)


@CUDA
@pytest.mark.parametrize("transfer_dtype", [None, torch.bfloat16])
def test_on_a_gpu_the_iterates_are_those_of_mezo_there(transfer_dtype):
    streamed, plain = chain(8, dtype=torch.float32), chain(8, dtype=torch.float32).cuda()
    streamer = optex.optimizers.BlockStreamer(streamed, device="cuda", lr=0.02, transfer_dtype=transfer_dtype)
    other = optex.optimizers.MeZO(plain.parameters(), lr=0.02, exact=True)
    for seed, (x, y) in enumerate(batches(20, torch.float32)):
        x, y = x.cuda(), y.cuda()
        streamer.step(x, loss_to(y), seed=seed)
        other.step(lambda x=x, y=y: loss_to(y)(plain(x)), seed=seed)
    streamer.flush()
    assert streamer.traffic.peak_resident <= 3
    for left, right in zip(snapshot(streamed), snapshot(plain), strict=True):
        tolerance = 1e-5 if transfer_dtype is None else 0.1
        torch.testing.assert_close(left.float(), right.cpu(), rtol=0, atol=tolerance)
