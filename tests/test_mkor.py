"""MKOR: factors held to inverses, steps to a slow twin, hooks to what runs a model twice or not at all."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import optex
from optex import NonFiniteError, NonFiniteWarning, OptEx, WithinTolerance
from optex.evaluators import VectorizedEvaluator
from optex.optimizers import MKOR
from optex.optimizers.mkor.factors import UPDATES, stabilised
from tests.gradients import grad_of
from tests.models import (
    assert_equal_trees,
    network,
    regression_batches,
    same,
    snapshot,
    squared_error,
)
from tests.references.mkor import TARGETS, SlowMKOR, published_update

every = pytest.mark.parametrize("variant", UPDATES)


def vectors(count, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64).to(dtype)


def images(count, seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(4, 2, size, size, generator=generator, dtype=torch.float64) for _ in range(count)]


def convolutional(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, **options), nn.Tanh(), nn.Conv2d(3, 2, (1, 2), bias=False), nn.Flatten()
    ).double()


def train(model, optimizer, batches, forward=None):
    objective = squared_error(forward or model)
    for batch in batches:
        optimizer.zero_grad()
        objective(batch).backward()
        optimizer.step()


def factors_of(optimizer):
    return {
        name: {side: factor.clone() for side, factor in pair.items()}
        for name, pair in optimizer.factors.items()
    }


# ---------------------------------------------------------------------- factors


@every
@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 12), count=st.integers(1, 20), decay=st.floats(0.5, 0.99), seed=st.integers(0, 99))
def test_updates_are_the_inverses_of_their_targets(variant, size, count, decay, seed):
    factor = torch.eye(size, dtype=torch.float64)
    for vector in vectors(count, size, seed):
        target = TARGETS[variant](factor, vector, decay)
        UPDATES[variant](factor, vector, decay)
        assert (factor - target).abs().max() <= 1e-10 * target.abs().max()
        assert (factor - factor.T).abs().max() <= 1e-13 * factor.max()


def test_exact_updates_invert_the_running_mean():
    factor, mean = torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    for vector in vectors(40, 6):
        UPDATES["exact"](factor, vector, 0.95)
        mean = 0.95 * mean + 0.05 * torch.outer(vector, vector)
    assert (factor - torch.linalg.inv(mean)).abs().max() <= 1e-10


def test_released_factors_stay_between_0_and_the_identity():
    # Which makes their reset, at entries above 2, one that never comes.
    factor = torch.eye(8, dtype=torch.float64)
    for vector in vectors(300, 8):
        UPDATES["released"](factor, 10 * vector, 0.95)
        values = torch.linalg.eigvalsh(factor)
        assert values[0] > 0
        assert values[-1] <= 1 + 1e-12


@every
def test_factors_stay_positive_definite_in_float32(variant):
    factor = torch.eye(24)
    for vector in vectors(2000, 24, dtype=torch.float32):
        UPDATES[variant](factor, vector, 0.95)
        stabilised([factor], 2.0, 0.1)
    assert torch.linalg.eigvalsh(factor.double())[0] > 0
    assert factor.max() <= 2.2


def test_the_published_equation_is_no_inverse_and_diverges():
    unit = torch.tensor([1.0, 0.0], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    once = published_update(eye, unit, 0.95)
    for target in TARGETS.values():
        assert (once - target(eye, unit, 0.95)).abs().max() > 0.04
    factor = eye
    for _ in range(400):
        factor = published_update(factor, unit, 0.95)
    assert factor[0, 0] > 1e30
    assert factor[1, 1] < 1e-8


def test_a_factor_above_the_threshold_is_pulled_to_the_identity():
    high, low = torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)
    stabilised([high, low], 2.0, 1.0)
    assert torch.equal(high, torch.eye(2))
    assert torch.equal(low, torch.eye(2))
    stabilised([], 2.0, 1.0)


# ---------------------------------------------------------------------- steps


@every
@pytest.mark.parametrize("threshold", [2.0, 1.01])
def test_steps_are_the_slow_twins(variant, threshold):
    model, twin = network(), network()
    optimizer = MKOR.with_sgd(model, 0.05, variant=variant, interval=2, threshold=threshold)
    slow = SlowMKOR(twin, 0.05, 0.9, variant, 2, threshold=threshold)
    for batch in regression_batches(30):
        for net, own in ((model, optimizer), (twin, slow)):
            net.zero_grad()
            squared_error(net)(batch).backward()
            own.step()
        for left, right in zip(snapshot(model), snapshot(twin), strict=True):
            assert (left - right).abs().max() <= 1e-10


@every
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": (2, 1), "dilation": 2},
        {"padding": "same", "dilation": (1, 2)},
        {"padding": "valid", "bias": False},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": (1, 2), "padding_mode": "reflect"},
    ],
)
def test_convolutions_are_the_slow_twins(variant, options):
    model, twin = convolutional(**options), convolutional(**options)
    optimizer = MKOR.with_sgd(model, 0.02, variant=variant, interval=2)
    slow = SlowMKOR(twin, 0.02, 0.9, variant, 2)
    for batch in images(5):
        for net, own in ((model, optimizer), (twin, slow)):
            net.zero_grad()
            (net(batch) - 1).square().mean().backward()
            own.step()
    for left, right in zip(snapshot(model), snapshot(twin), strict=True):
        assert (left - right).abs().max() <= 1e-10


def test_gradients_are_left_as_they_were_and_updates_as_long():
    model = network()
    optimizer = MKOR.with_sgd(model, 0.1, momentum=0.0, interval=1)
    (batch,) = regression_batches(1)
    squared_error(model)(batch).backward()
    before, gradients = snapshot(model), [grad_of(p).clone() for p in model.parameters()]
    optimizer.step()
    assert same(gradients, [p.grad for p in model.parameters()])
    moved = [(p - q).norm() / 0.1 for p, q in zip(before, snapshot(model), strict=True)]
    for i in (0, 2):
        assert float(moved[i] + moved[i + 1]) == pytest.approx(
            float(gradients[i].norm() + gradients[i + 1].norm())
        )


def test_without_factors_it_is_the_base_optimizer():
    plain, model = network(), network()
    optimizer = MKOR(model, torch.optim.Adam(model.parameters(), lr=0.01))
    optimizer.remove()
    train(plain, torch.optim.Adam(plain.parameters(), lr=0.01), regression_batches(5))
    train(model, optimizer, regression_batches(5))
    assert same(snapshot(plain), snapshot(model))


def test_any_optimizer_may_be_inside_and_its_groups_are_live():
    model = network()
    base = torch.optim.AdamW([{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}])
    optimizer = MKOR(model, base, interval=2)
    train(model, optimizer, regression_batches(3))
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert "exp_avg" in optimizer.state[model[0].weight]
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
    before = snapshot(model)
    train(model, optimizer, regression_batches(1))
    assert not any((p - q).abs().max() > 0 for p, q in zip(before, snapshot(model), strict=True))


def test_groups_that_are_added_get_factors():
    model = network()
    optimizer = MKOR(model, torch.optim.SGD(model[0].parameters(), lr=0.1), interval=1)
    train(model, optimizer, regression_batches(1))
    assert list(optimizer.factors) == ["0"]
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, optimizer, regression_batches(1))
    assert list(optimizer.factors) == ["0", "2"]


def test_factors_are_as_many_numbers_as_the_formula_says():
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 7, bias=False))
    optimizer = MKOR.with_sgd(model)
    model(torch.randn(3, 20)).square().mean().backward()
    optimizer.step()
    count = sum(factor.numel() for pair in optimizer.factors.values() for factor in pair.values())
    assert count == (32**2 + 21**2) + (7**2 + 32**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_float32_at_least(dtype):
    model = network(dtype=dtype)
    optimizer = MKOR.with_sgd(model, interval=1)
    train(model, optimizer, regression_batches(3, dtype=dtype))
    assert {f.dtype for pair in optimizer.factors.values() for f in pair.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_autocast_leaves_the_layers_outputs_in_its_own_dtype():
    model = network(dtype=torch.float32)
    optimizer = MKOR.with_sgd(model, interval=1)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(regression_batches(1, dtype=torch.float32)[0][0])
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
    optimizer.step()
    assert set(optimizer.factors) == {"0", "2"}


# ---------------------------------------------------------------------- what the hooks see


def test_passes_without_autograd_are_not_recorded():
    runs = []
    for extra in (False, True):
        model = network()
        optimizer = MKOR.with_sgd(model, interval=1)
        for batch in regression_batches(4):
            if extra:
                model.eval()
                with torch.no_grad():
                    model(100 * batch[0])
                with torch.inference_mode():
                    model(100 * batch[0])
                model.train()
            train(model, optimizer, [batch])
        runs.append(snapshot(model))
    assert same(*runs)


def test_evaluation_mode_counts_as_training_mode_does():
    runs = []
    for mode in (True, False):
        model = network().train(mode)
        train(model, MKOR.with_sgd(model, interval=1), regression_batches(4))
        runs.append(snapshot(model))
    assert same(*runs)


def test_several_backward_passes_are_one_batch():
    whole, parts = network(), network()
    optimizers = [MKOR.with_sgd(net, interval=1) for net in (whole, parts)]
    for x, y in regression_batches(4):
        train(whole, optimizers[0], [(x, y)])
        optimizers[1].zero_grad()
        for rows in (slice(0, 2), slice(2, 8)):
            ((parts(x[rows]) - y[rows]).square().sum() / y.numel()).backward()
        optimizers[1].step()
    for left, right in zip(snapshot(whole), snapshot(parts), strict=True):
        assert (left - right).abs().max() <= 1e-12


class Twice(nn.Module):
    """One layer used twice in a pass, under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.same = self.first
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.same(self.first(x).tanh()).tanh())


def test_a_layer_used_twice_sees_the_mean_of_its_uses():
    torch.manual_seed(0)
    model = Twice().double()
    optimizer = MKOR.with_sgd(model, interval=1)
    ((x, y),) = regression_batches(1)
    gradients = []
    first = model.first(x)
    second = model.first(first.tanh())
    for output in (first, second):
        output.register_hook(gradients.append)
    (model.last(second.tanh()) - y).square().mean().backward()
    optimizer.step()
    assert list(optimizer.factors) == ["first", "last"]
    mean = torch.cat([torch.cat([x, first.tanh()]).mean(0), torch.ones(1)]).detach()
    for side, vector in (("right", mean), ("left", gradients[0].sum(0) + gradients[1].sum(0))):
        expected = TARGETS["released"](torch.eye(len(vector), dtype=torch.float64), vector, 0.95)
        assert (optimizer.factors["first"][side] - expected).abs().max() <= 1e-12


def test_passes_with_weights_of_anothers_and_vmapped_ones_are_not_recorded():
    model = network()
    optimizer = MKOR.with_sgd(model, interval=1)
    x = regression_batches(1)[0][0]
    others = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    for run in (
        lambda: torch.func.functional_call(model, others, (x.requires_grad_(),)),
        lambda: torch.func.vmap(model)(x),
        lambda: torch.func.grad(lambda x: model(x).sum())(x),
    ):
        run().sum().backward()
        model.zero_grad()
    batches = regression_batches(1)
    train(model, optimizer, batches)
    clean = network()
    untouched = MKOR.with_sgd(clean, interval=1)
    train(clean, untouched, batches)
    assert_equal_trees(factors_of(optimizer), factors_of(untouched))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_model_takes_the_same_steps(reentrant):
    plain, model = network(), network()
    train(plain, MKOR.with_sgd(plain, interval=2), regression_batches(5))
    train(
        model,
        MKOR.with_sgd(model, interval=2),
        [(x.requires_grad_(), y) for x, y in regression_batches(5)],
        lambda x: checkpoint(model, x, use_reentrant=reentrant),
    )
    assert same(snapshot(plain), snapshot(model))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_takes_the_same_steps_without_a_graph_break(backend):
    torch._dynamo.reset()
    plain, model = network(), network()
    train(plain, MKOR.with_sgd(plain, interval=2), regression_batches(6))
    optimizer = MKOR.with_sgd(model, interval=2)
    counted = CompileCounterWithBackend(backend)
    train(model, optimizer, regression_batches(6), torch.compile(model, backend=counted, fullgraph=True))
    assert counted.frame_count == 2  # with what is recorded, and without
    for left, right in zip(snapshot(plain), snapshot(model), strict=True):
        assert (left - right).abs().max() <= 1e-14


def test_hooks_do_nothing_between_the_steps_that_use_them():
    model = network()
    optimizer = MKOR.with_sgd(model, interval=3)
    for number, batch in enumerate(regression_batches(7)):
        seen = []
        handle = model[0].register_forward_hook(lambda *a, seen=seen: seen.append(a[2].grad_fn.name()))
        optimizer.zero_grad()
        squared_error(model)(batch).backward()
        handle.remove()
        # The probe's sum is the output's last operation only where it is needed.
        assert seen[0].startswith("AddBackward" if number % 3 == 0 else "Addmm")
        optimizer.step()


def test_frozen_layers_have_no_factors_and_frozen_biases_stay():
    model = network()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = snapshot(model)
    optimizer = MKOR.with_sgd(model, interval=1)
    train(model, optimizer, regression_batches(3))
    assert list(optimizer.factors) == ["2"]
    after = snapshot(model)
    assert [torch.equal(p, q) for p, q in zip(before, after, strict=True)] == [True, True, False, True]


def test_layers_that_share_weights_and_grouped_convolutions_are_the_base_optimizers():
    model = nn.Sequential(
        nn.Conv2d(2, 2, 1, groups=2), nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1)
    )
    model[4].weight = model[2].weight
    optimizer = MKOR.with_sgd(model, interval=1)
    model(torch.rand(3, 2, 1, 2)).square().mean().backward()
    optimizer.step()
    assert list(optimizer.factors) == ["5"]


def test_a_layer_that_is_not_run_keeps_its_gradient():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "idle": nn.Linear(6, 3)}).double()
    optimizer = MKOR.with_sgd(model, interval=1)
    train(model, optimizer, regression_batches(2), lambda x: model["used"](input=x))
    assert list(optimizer.factors) == ["used"]


def test_multihead_attention_runs():
    # Its output layer is never called: its weights are the base optimizer's, with no factors.
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    optimizer = MKOR.with_sgd(model, interval=1)
    model(torch.randn(2, 5, 8)).square().mean().backward()
    optimizer.step()
    assert list(optimizer.factors) == ["linear1", "linear2"]


@pytest.mark.parametrize(
    ("layer", "sample"), [(nn.Conv2d(2, 3, 3), images(1)[0][0]), (nn.Linear(7, 3), vectors(1, 7)[0])]
)
def test_a_sample_without_a_batch_dimension_is_a_batch_of_one(layer, sample):
    found = []
    for batch in (sample, sample[None]):
        model = copy.deepcopy(layer).double()
        optimizer = MKOR.with_sgd(model, interval=1)
        model(batch).square().mean().backward()
        optimizer.step()
        found.append(factors_of(optimizer))
    assert_equal_trees(*found)
    assert list(found[0]) == [""]


def test_vectors_are_averaged_by_what_was_handed_over():
    batches, told = regression_batches(2), []

    def factors_with(average, batch):
        model = network()
        optimizer = MKOR.with_sgd(model, interval=1, average=average)
        train(model, optimizer, [batch])
        return factors_of(optimizer)

    for batch in batches:
        factors_with(lambda flat: told.append(flat.clone()), batch)
    mean = (told[0] + told[1]) / 2
    left, right = (factors_with(lambda flat: flat.copy_(mean), batch) for batch in batches)
    assert_equal_trees(left, right)
    assert len(mean) == (7 + 5) + (6 + 3)


# ---------------------------------------------------------------------- copies, removal, state


def test_hooks_come_off():
    model = network()
    with MKOR.with_sgd(model, interval=1) as optimizer:
        train(model, optimizer, regression_batches(2))
        held = factors_of(optimizer)
    assert not any(module._forward_hooks for module in model.modules())
    train(model, optimizer, regression_batches(2))
    assert_equal_trees(factors_of(optimizer), held)


def test_a_copy_of_the_model_alone_records_nothing():
    model = network()
    optimizer = MKOR.with_sgd(model, interval=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = other[0](regression_batches(1)[0][0])
        assert output.grad_fn.name().startswith("Addmm")
        assert pickle.loads(pickle.dumps(other))[0](regression_batches(1)[0][0]).requires_grad
    del optimizer
    assert model[0](regression_batches(1)[0][0]).grad_fn.name().startswith("Addmm")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_between_backward_and_step_go_on_by_themselves(copied):
    model = network()
    optimizer = MKOR.with_sgd(model, interval=1)
    first, *others = regression_batches(4)
    squared_error(model)(first).backward()
    twin, other = copied((model, optimizer))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        q.grad = grad_of(p).clone()  # which pickling leaves behind
    for net, own in ((model, optimizer), (twin, other)):
        own.step()
        train(net, own, others)
    assert same(snapshot(model), snapshot(twin))
    assert_equal_trees(factors_of(optimizer), factors_of(other))
    other.remove()
    assert not twin[0]._forward_hooks
    assert model[0]._forward_hooks


@every
def test_states_are_restored_to_the_bit(variant):
    model = network()
    optimizer = MKOR.with_sgd(model, variant=variant, interval=2, hybrid=True)
    train(model, optimizer, regression_batches(5))
    state = copy.deepcopy(optimizer.state_dict())
    other = MKOR.with_sgd(network(1), variant=variant, interval=2, hybrid=True)
    other.load_state_dict(state)
    assert_equal_trees(other.state_dict(), state)
    assert other.steps == 5
    other.factors["0"]["left"].zero_()
    assert_equal_trees(optimizer.state_dict(), state)  # what is loaded is a copy


def test_a_state_of_the_base_optimizer_alone_is_taken():
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    train(model, base, regression_batches(2))
    optimizer = MKOR.with_sgd(model, 0.1)
    optimizer.load_state_dict(base.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.steps == 0
    assert not optimizer.factors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own["factors"].update(elsewhere=own["factors"]["0"]), "elsewhere"),
        (lambda own: own["factors"]["0"].update(left=torch.eye(2)), "left"),
        (lambda own: own["factors"]["0"].pop("right"), "right"),
        (lambda own: own["factors"]["0"]["left"].fill_(torch.nan), "finite"),
        (lambda own: own.update(steps=-1), "steps"),
        (lambda own: own.pop("switch"), "switch"),
        (lambda own: own["switch"].pop("mean"), "mean"),
    ],
)
def test_broken_states_are_refused_whole(change, message):
    model = network()
    optimizer = MKOR.with_sgd(model, interval=1)
    train(model, optimizer, regression_batches(2))
    broken = copy.deepcopy(optimizer.state_dict())
    change(broken["mkor"])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken)
    assert_equal_trees(optimizer.state_dict(), before)


def test_state_hooks_run():
    model, calls = network(), []
    optimizer = MKOR.with_sgd(model)
    optimizer.register_state_dict_pre_hook(lambda own: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda own, state: {**state, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda own, state: {k: v for k, v in state.items() if k != "mine"}
    )
    optimizer.register_load_state_dict_post_hook(lambda own: calls.append("loaded"))
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert calls == ["save", "loaded"]


# ---------------------------------------------------------------------- what goes wrong


def test_a_gradient_that_is_not_finite_leaves_factors_and_the_next_step_clean():
    model, clean = network(), network()
    optimizer, other = MKOR.with_sgd(model, interval=2), MKOR.with_sgd(clean, interval=2)
    first, second = regression_batches(2)
    with pytest.raises(NonFiniteError, match="MKOR: the gradient"):
        train(model, optimizer, [(first[0] * torch.nan, first[1])])
    assert not optimizer.factors
    for net, own in ((model, optimizer), (clean, other)):
        train(net, own, [second])
    assert same(snapshot(model), snapshot(clean))


def test_inputs_that_are_not_finite_behind_a_finite_gradient_are_named():
    model = nn.Linear(2, 1)
    optimizer = MKOR.with_sgd(model, interval=1)
    x = torch.tensor([[1.0, 1.0], [torch.inf, 1.0]])
    model(x)[:1].sum().backward()
    grad_of(model.weight).nan_to_num_()
    with pytest.warns(NonFiniteWarning, match="layer ''"):
        optimizer.step()
    assert not optimizer.factors


def test_gradient_scalers_are_refused_with_the_reason():
    with pytest.raises(RuntimeError, match=r"MKOR: torch\.amp\.GradScaler"):
        _ = MKOR.with_sgd(network())._step_supports_amp_scaling


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"variant": "published"}, ValueError, "variant"),
        ({"interval": 0}, ValueError, "interval"),
        ({"interval": 1.5}, ValueError, "interval"),
        ({"decay": 1.0}, ValueError, "decay"),
        ({"decay": 0.0}, ValueError, "decay"),
        ({"threshold": 1.0}, ValueError, "threshold"),
        ({"reset": 0.0}, ValueError, "reset"),
        ({"reset": 1.1}, ValueError, "reset"),
        ({"period": 0}, ValueError, "period"),
        ({"lr": -1.0}, ValueError, "MKOR: lr must be"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, error, message):
    with pytest.raises(error, match=message):
        MKOR.with_sgd(network(), **settings)


def test_what_cannot_be_wrapped_is_refused():
    model = network()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        MKOR(
            list(model.parameters()),  # pyright: ignore[reportArgumentType]
            torch.optim.SGD(model.parameters(), lr=0.1),
        )
    with pytest.raises(TypeError, match="base_optimizer must be"):
        MKOR(model, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match="base_optimizer must be"):
        MKOR(model, 0.1)  # pyright: ignore[reportArgumentType]
    embedding = nn.Embedding(3, 2)
    with pytest.raises(ValueError, match="no layer of the model has factors"):
        MKOR.with_sgd(embedding)
    lazy = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ValueError, match="has no weights yet"):
        MKOR(lazy, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def test_it_shows_what_it_is():
    assert "variant='released'" in repr(MKOR.with_sgd(network()))


# ---------------------------------------------------------------------- MKOR-H


def closed(model, optimizer, batch, losses=None):
    def closure():
        optimizer.zero_grad()
        loss = squared_error(model)(batch)
        loss.backward()
        return loss if losses is None else torch.tensor(next(losses))

    return closure


def test_mkor_h_switches_for_good_when_the_loss_has_all_but_stopped_falling():
    model = network()
    optimizer = MKOR.with_sgd(model, 0.01, interval=2, hybrid=True, period=40)
    losses = iter([float(8 * 0.9**i) if i < 80 else 0.01 for i in range(1000)])
    switched = []
    for batch in regression_batches(1) * 400:
        optimizer.step(closed(model, optimizer, batch, losses))
        switched.append(optimizer.switched)
    # The running mean forgets the fall in about two periods; two slow ones in a row follow.
    when = switched.index(True) + 1
    assert when % 40 == 0
    assert 160 <= when <= 320
    assert all(switched[when:])
    assert not optimizer.factors
    plain = copy.deepcopy(model)
    base = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    base.load_state_dict({k: v for k, v in copy.deepcopy(optimizer.state_dict()).items() if k != "mkor"})
    train(plain, base, regression_batches(5))
    train(model, optimizer, regression_batches(5))
    assert same(snapshot(plain), snapshot(model))


def test_mkor_h_stays_while_the_loss_falls():
    model = network()
    optimizer = MKOR.with_sgd(model, 0.01, hybrid=True, period=10)
    losses = iter([0.99**i for i in range(200)])
    for batch in regression_batches(1) * 200:
        optimizer.step(closed(model, optimizer, batch, losses))
    assert not optimizer.switched


def test_mkor_h_passes_over_losses_that_are_not_finite_and_minds_the_sign():
    for sign in (1, -1):
        model = network()
        base = torch.optim.SGD(model.parameters(), lr=0.0, maximize=sign < 0)
        optimizer = MKOR(model, base, hybrid=True, period=2)
        for value in (torch.nan, sign * 4.0, torch.inf, sign * 2.0):
            optimizer.note_loss(value)
            train(model, optimizer, regression_batches(1))
        state = optimizer.state_dict()["mkor"]["switch"]
        assert float(state["mean"]) == pytest.approx(0.95 * 4 + 0.05 * 2)
        assert state["best"] == pytest.approx(0.1 / 4)


def test_mkor_h_without_losses_says_so_once():
    model = network()
    optimizer = MKOR.with_sgd(model, hybrid=True, period=2)
    with pytest.warns(UserWarning, match="no loss was seen") as caught:
        train(model, optimizer, regression_batches(6))
    assert len(caught) == 1


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, batch):
        return (self.inner(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("wrapped", [False, True])
def test_mkor_h_hears_a_model_that_returns_its_loss(wrapped):
    model, twin = WithLoss(), WithLoss()
    optimizer, told = (MKOR.with_sgd(net, hybrid=True, period=2, interval=2) for net in (model, twin))
    batches = regression_batches(6)
    for batch in batches:
        told.zero_grad()
        loss = twin(batch)
        loss.backward()
        with torch.no_grad():
            twin(regression_batches(1, seed=3)[0])
        told.note_loss(loss)
        told.step()
    if wrapped:
        rounds = OptEx(optimizer, parallelism=2, stride=1, acceptance=WithinTolerance(0)).rounds(batches, model)
        assert sum(report.accepted for report in rounds) == 6
    else:
        for batch in batches:
            optimizer.zero_grad()
            model(batch).backward()
            optimizer.step()
    assert_equal_trees(optimizer.state_dict()["mkor"], told.state_dict()["mkor"])
    assert optimizer.state_dict()["mkor"]["switch"]["best"] is not None


def test_without_hybrid_losses_are_nothing_to_it():
    model = network()
    optimizer = MKOR.with_sgd(model, period=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, regression_batches(3))
    optimizer.note_loss(1.0)
    assert not optimizer.switched


# ---------------------------------------------------------------------- under OptEx


def test_drafted_steps_use_the_factors_and_leave_them():
    model = network()
    optimizer = MKOR.with_sgd(model, interval=1)
    first, second = regression_batches(2)
    train(model, optimizer, [first])
    held, steps = factors_of(optimizer), optimizer.steps
    moved = network()
    moved.load_state_dict(model.state_dict())
    optimizer.zero_grad()
    squared_error(model)(second).backward()
    with optimizer.drafting():
        optimizer.step()
    assert_equal_trees(factors_of(optimizer), held)
    assert optimizer.steps == steps
    assert not same(snapshot(model), snapshot(moved))


@pytest.mark.parametrize("parallelism", [1, 4])
def test_clipped_convolutions_under_optex_at_tolerance_0_are_the_plain_loop(parallelism):
    batches = [(x, 1.0) for x in images(9)]
    plain, model = convolutional(padding=1), convolutional(padding=1)
    base, objective = MKOR.with_sgd(plain, 0.02, interval=2, variant="exact"), squared_error(plain)
    for batch in batches:
        base.zero_grad()
        objective(batch).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        base.step()
    wrapped = MKOR.with_sgd(model, 0.02, interval=2, variant="exact")
    optimizer = OptEx(
        wrapped,
        parallelism=parallelism,
        stride=1,
        acceptance=WithinTolerance(0),
        gradient_hook=lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    )
    for _ in optimizer.rounds(batches, squared_error(model)):
        pass
    assert same(snapshot(plain), snapshot(model))
    assert_equal_trees(factors_of(base), factors_of(wrapped))


def test_mkor_h_under_optex_hears_the_losses_in_its_objective():
    batches = regression_batches(12)
    plain, model = network(), network()
    base = MKOR.with_sgd(plain, interval=2, hybrid=True, period=2)
    for batch in batches:
        base.step(closed(plain, base, batch))
    wrapped = MKOR.with_sgd(model, interval=2, hybrid=True, period=2)
    objective = squared_error(model)

    def noted(batch):
        loss = objective(batch)
        wrapped.note_loss(loss)
        return loss

    for _ in OptEx(wrapped, parallelism=3, stride=1, acceptance=WithinTolerance(0)).rounds(batches, noted):
        pass
    assert same(snapshot(plain), snapshot(model))
    assert_equal_trees(wrapped.state_dict()["mkor"], base.state_dict()["mkor"])


def test_an_evaluation_that_fails_leaves_nothing_behind():
    batches = regression_batches(4)
    plain, model = network(), network()
    train(plain, MKOR.with_sgd(plain, interval=1), batches)
    optimizer = OptEx(MKOR.with_sgd(model, interval=1), parallelism=2, stride=1, acceptance=WithinTolerance(0))

    def broken(batch):
        model(100 * batch[0])
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        list(optimizer.rounds(batches, broken))
    for _ in optimizer.rounds([], squared_error(model)):  # the batches of the broken round are still in hand
        pass
    for _ in optimizer.rounds(batches[optimizer.batches_drawn :], squared_error(model)):
        pass
    assert same(snapshot(plain), snapshot(model))


def test_advice_leaves_everything_as_it_was():
    batches = regression_batches(6)
    plain, model = network(), network()
    bases = [MKOR.with_sgd(net, interval=2) for net in (plain, model)]
    for net, base in zip((plain, model), bases, strict=True):
        train(net, base, batches[:2])
    optex.advise(bases[1], batches, squared_error(model), model=model, seconds=0.3)
    for net, base in zip((plain, model), bases, strict=True):
        train(net, base, batches[2:])
    assert same(snapshot(plain), snapshot(model))
    assert_equal_trees(factors_of(bases[0]), factors_of(bases[1]))


def test_evaluators_that_cannot_observe_are_refused():
    model = network()
    with pytest.raises(ValueError, match="MKOR needs more of a backward pass"):
        OptEx(MKOR.with_sgd(model), evaluator=VectorizedEvaluator(model))


def test_default_rounds_are_ahead_of_the_plain_loop():
    batch = regression_batches(1, size=32)[0]
    plain, model = network(), network()
    train(plain, MKOR.with_sgd(plain, 0.02), [batch] * 15)
    optimizer = OptEx(MKOR.with_sgd(model, 0.02), parallelism=4, deterministic=True)
    objective = squared_error(model)
    for report in optimizer.rounds([None] * 60, lambda _: objective(batch)):
        if report.number == 14:
            break
    assert squared_error(model)(batch) < squared_error(plain)(batch)
