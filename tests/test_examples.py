"""The scripts in examples/, run as they are on made-up data."""

import re
import sys
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import optex
from optex.studies.problems import data

EXAMPLES = Path(__file__).parents[1] / "examples"

CIFAR = ["--width", "4", "--batch-size", "12", "--steps", "24", "--device", "cpu"]
GPT = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch-size", "8"]
GPT += ["--steps", "24", "--warm-up", "3", "--sample", "0"]


@pytest.fixture(autouse=True)
def as_scripts(monkeypatch):
    """Import them as python does when it runs one: from their folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [path.stem for path in EXAMPLES.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return ["--text", str(path), "--device", "cpu"]


def same_model(left, right):
    left, right = left["model"].state_dict(), right["model"].state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def run(request, made_up_data, text):
    """main of a script, with the flags that make it small."""
    module = __import__(request.param)
    flags = CIFAR if "cifar" in request.param else [*GPT, *text, "--dropout", "0.1"]
    return lambda *more: module.main([*flags, *map(str, more)])


both = pytest.mark.parametrize("run", ["train_cifar10", "train_char_gpt"], indirect=True)


@both
def test_tolerance_0_takes_the_plain_loops_steps_to_the_bit(run):
    # BatchNorm's statistics, augmentation, dropout, clipping and the schedule with them.
    first, second = run("--optex", 1, "--steps", 12), run("--optex", 4, "--steps", 12, "--tolerance", 0)
    assert first["steps"] == second["steps"] == 12  # the images have been through once after 10
    assert same_model(first, second)
    assert first["losses"] == second["losses"]


@both
def test_loss_falls_in_fewer_rounds_than_steps(run):
    found = run("--optex", 4)
    assert found["steps"] >= 24
    assert found["rounds"] < 20
    assert sum(found["losses"][-3:]) < sum(found["losses"][:3])


@both
@pytest.mark.parametrize("parallelism", [1, 4])
def test_a_run_in_two_pieces_is_the_run_in_one(run, parallelism, tmp_path):
    whole = run("--optex", parallelism)
    flags = ["--optex", parallelism, "--checkpoint", tmp_path / "new" / "checkpoint.pt"]
    half = run(*flags, "--max-rounds", 6)
    torch.rand(5)  # what happens in between is of no consequence
    rest = run(*flags, "--resume")
    assert half["rounds"] == 6
    assert half["losses"] + rest["losses"] == whole["losses"]
    assert same_model(whole, rest)


@pytest.mark.parametrize("run", ["train_cifar10"], indirect=True)
def test_cifar10_with_sgd(run):
    flags = ["--optimizer", "sgd", "--steps", 6]
    assert same_model(run("--optex", 1, *flags), run("--optex", 3, "--tolerance", 0, *flags))


@pytest.mark.parametrize("run", ["train_cifar10"], indirect=True)
def test_cifar10_tests_once_an_epoch(run, capsys):
    found = run("--optex", 4)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3  # 120 images, 10 batches an epoch, 24 steps
    assert printed[-1].startswith(f"step    24   round {found['rounds']:5d}")


def test_cifar10_shows_each_image_once_an_epoch_each_time_anew(made_up_data):
    import train_cifar10

    images = train_cifar10.Images("train", 12, 0, "cpu")
    labels = torch.cat([images.batch(number)[1] for number in range(10, 20)])
    everything = torch.from_numpy(data.cifar10("train")[1]).long()
    assert torch.equal(labels.sort().values, everything.sort().values)
    assert not torch.equal(images.batch(0)[0], images.batch(10)[0])
    assert torch.equal(images.batch(3)[0], images.batch(3)[0])


def test_cifar10_images_are_originals_behind_a_black_margin_shifted_and_perhaps_mirrored(made_up_data):
    import train_cifar10

    images = train_cifar10.Images("train", 12, 0, "cpu")
    originals = torch.cat([pixels for pixels, _ in images.all()])
    black = (torch.zeros(3) - torch.tensor(train_cifar10.MEAN)) / torch.tensor(train_cifar10.DEVIATION)
    padded = black[:, None, None].repeat(len(originals), 1, 40, 40)
    padded[:, :, 4:36, 4:36] = originals
    cuts = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # [n, 3, 9, 9, 32, 32]
    for pixels in images.batch(0)[0][:4]:
        cut, mirrored = (
            (cuts == one[:, None, None]).flatten(4).all(4).all(1).sum() for one in (pixels, pixels.flip(2))
        )
        assert cut + mirrored >= 1


@pytest.mark.parametrize("run", ["train_char_gpt"], indirect=True)
def test_char_gpt_with_everything_switched_on(run):
    # Compiled by a backend that needs no compiler; the kernels of the usual one differ in the last digits.
    flags = ["--bf16", "--compile", "aot_eager", "--accumulate", 2, "--steps", 12]
    plain, found = run(*flags, "--optex", 1), run(*flags, "--optex", 4)
    assert found["rounds"] < plain["rounds"] == plain["steps"] == found["steps"]
    assert found["losses"][-1] < found["losses"][0]
    assert same_model(plain, run(*flags, "--optex", 4, "--tolerance", 0))


@pytest.mark.parametrize("run", ["train_char_gpt"], indirect=True)
def test_char_gpt_writes(run, capsys):
    run("--optex", 4, "--sample", 30)
    written = capsys.readouterr().out.splitlines()[-1]
    assert len(written) == 30
    assert set(written) <= set("abcdefghijklmnopqrstuvwxyz .")


def test_char_gpt_finds_shakespeare(made_up_data):
    import train_char_gpt

    assert train_char_gpt.main([*GPT, "--device", "cpu", "--steps", "2"])["steps"] == 2


def test_char_gpt_decays_matrices_alone():
    import train_char_gpt

    model = train_char_gpt.GPT(5, 1, 2, 8, 4, 0.0)
    decayed, rest = train_char_gpt.decayed_and_not(model, 0.1)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


# ---------------------------------------------------------------------- deep Q-learning


def test_dqn_learns_in_rounds():
    pytest.importorskip("gymnasium")
    import train_dqn

    found = train_dqn.main(["--optex", "4", "--rounds", "300"])
    assert found["steps"] > 400
    assert found["curve"][-1] > 1.5 * found["curve"][0]
    again = train_dqn.main(["--optex", "4", "--rounds", "20"])
    assert again["curve"] == found["curve"][:20]


def test_dqn_with_one_gradient_at_a_time_is_the_plain_loop(monkeypatch):
    pytest.importorskip("gymnasium")
    import train_dqn

    plain = train_dqn.main(["--optex", "1", "--rounds", "40"])

    def with_optex_instead(base, batches, objective):
        return train_dqn.with_optex(optex.OptEx(base, parallelism=1, stride=1), batches, objective)

    monkeypatch.setattr(train_dqn, "plain", with_optex_instead)
    wrapped = train_dqn.main(["--optex", "1", "--rounds", "40"])
    assert plain["steps"] == wrapped["steps"] == 40
    assert plain["returns"] == wrapped["returns"]
    for p, q in zip(plain["network"].parameters(), wrapped["network"].parameters(), strict=True):
        assert torch.equal(p, q)


# ---------------------------------------------------------------------- heat conduction


@pytest.fixture
def small_plate():
    import heat

    return heat.Misfit(heat.Plate(size=9, steps=4, spacing=3))


def test_heat_gradients_are_those_of_finite_differences(small_plate):
    generator = np.random.default_rng(0)
    m, direction = 0.3 * generator.standard_normal((2, 81))
    for heaters in (None, np.array([2]), np.array([3, 0])):
        slope = small_plate(m, heaters)[1] @ direction
        ends = [small_plate(m + step * direction, heaters)[0] for step in (1e-5, -1e-5)]
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_heat_sampled_gradients_are_the_whole_one_on_average(small_plate):
    import heat

    m = np.linspace(-0.5, 0.5, 81)
    value, gradient = small_plate(m)
    parts = [small_plate(m, np.array([heater])) for heater in range(4)]
    assert np.mean([part[0] for part in parts]) == pytest.approx(value)
    np.testing.assert_allclose(np.mean([part[1] for part in parts], axis=0), gradient)
    batches = list(islice(heat.drawn(3), 9))
    assert {len(set(batch)) for batch in batches} == {3}
    assert len({tuple(batch) for batch in batches}) > 4


def test_heat_sampled_without_optex_is_the_plain_loop(small_plate):
    import heat

    run = heat.solve_sampled(small_plate, at_once=1, rounds=6, lr=0.05, parallelism=None)
    m, batches = torch.zeros(81, dtype=torch.float64, requires_grad=True), heat.drawn(1)
    adam = torch.optim.Adam([m], lr=0.05)
    for _ in range(6):
        m.grad = torch.from_numpy(small_plate(m.detach().numpy(), next(batches))[1])
        adam.step()
    np.testing.assert_array_equal(run.result.x, m.detach().numpy())
    assert run.values[-1] == small_plate(run.result.x)[0]
    assert (run.result.nit, run.result.nstep, len(run.seconds)) == (6, 6, 6)


def test_heat_vanilla_is_the_plain_loop(small_plate):
    import heat

    run = heat.vanilla(small_plate, rounds=12, lr=0.05)
    m = torch.zeros(81, dtype=torch.float64, requires_grad=True)
    adam, values = torch.optim.Adam([m], lr=0.05), []
    for _ in range(12):
        value, gradient = small_plate(m.detach().numpy())
        values.append(value)
        m.grad = torch.from_numpy(gradient)
        adam.step()
    assert run.values == np.minimum.accumulate(values).tolist()
    assert run.result.nit == run.result.nstep == 12


@pytest.mark.parametrize("heaters", [2, 4])
def test_heat_prints_who_needed_how_many(heaters, tmp_path, capsys, monkeypatch):
    import heat

    flags = ["--size", "12", "--rounds", "12", "--workers", "1", "--plot", str(tmp_path / "heat.png")]
    monkeypatch.setattr(sys, "argv", ["heat.py", *flags, "--heaters-at-once", str(heaters)])
    heat.main()
    printed = capsys.readouterr().out
    found = {name: float(j) for name, j in re.findall(r"^(\S+) +J = (\S+) in \d+", printed, re.MULTILINE)}
    assert found.keys() == {"vanilla", "optex", "L-BFGS"}
    assert max(found["optex"], found["L-BFGS"]) <= found["vanilla"] + 1e-3
    assert ("2 of 4 heaters" in printed) == (heaters == 2)
    assert (tmp_path / "heat.png").stat().st_size > 10_000


def test_heat_quasi_newton_stops_where_it_was_told(small_plate):
    import heat

    start = small_plate(np.zeros(81))[0]
    run = heat.quasi_newton(small_plate, until=start / 10, evaluations=100)
    assert run.values[-1] <= start / 10 < run.values[-2]
    assert run.result.nit == len(run.values) == len(run.seconds) < 100
    assert len(heat.quasi_newton(small_plate, until=0.0, evaluations=7).values) == 7


# ---------------------------------------------------------------------- Lightning


@pytest.fixture
def lightning_run(made_up_data):
    # Lightning warns of many things that are as they should be here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lightning")
        import lightning_cifar10

        flags = ["--width", "4", "--batch-size", "12", "--batches", "9", "--epochs", "2"]
        flags += ["--accelerator", "cpu"]
        yield lambda *more: lightning_cifar10.main([*flags, *map(str, more)])


def same_network(left, right):
    left, right = (found["module"].network.state_dict() for found in (left, right))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_lightning_takes_the_plain_steps_at_tolerance_0(lightning_run):
    plain = lightning_run("--optex", 1)
    found = lightning_run("--optex", 4, "--tolerance", 0)
    assert same_network(plain, found)
    assert plain["trainer"].global_step == found["trainer"].global_step == 18


def test_lightning_takes_every_step_and_counts_it(lightning_run):
    found = lightning_run("--optex", 4)
    optimizer = found["trainer"].optimizers[0]
    assert isinstance(optimizer, optex.OptEx)
    assert optimizer.steps_taken == found["trainer"].global_step == 18
    assert optimizer.last_report is not None
    assert optimizer.last_report.number + 1 < 18
    assert not found["module"].queue


def test_lightning_is_quiet_where_it_is_asked_to_be(lightning_run, capfd, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):  # puts the level back
        lightning_run("--quiet")
    assert caplog.messages == []
    out, err = capfd.readouterr()
    assert re.fullmatch(r"step 18   loss .*\n", out)
    assert err == ""


def test_lightning_goes_on_from_a_checkpoint(lightning_run, tmp_path):
    whole = lightning_run("--optex", 4)
    path = tmp_path / "lightning.ckpt"
    half = lightning_run("--optex", 4, "--checkpoint", path, "--stop-after", 1)
    assert half["trainer"].global_step < 9  # some wait in window and queue
    rest = lightning_run("--optex", 4, "--checkpoint", path, "--resume")
    assert rest["trainer"].global_step == 18
    assert same_network(whole, rest)


def test_lightnings_wrapper_takes_a_closure(lightning_run):
    # What the script says of self.optimizers().step(closure), for an objective that needs no batch.
    import lightning

    class Bowl(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.theta = torch.nn.Parameter(torch.full((4,), 2.0))
            self.evaluations = []

        def configure_optimizers(self):
            return optex.OptEx(torch.optim.Adam([self.theta], lr=0.1), parallelism=3, deterministic=True)

        def training_step(self, batch, batch_idx):
            optimizer, points = self.optimizers(), []
            assert not isinstance(optimizer, list)
            self.evaluations.append(points)

            def closure():
                optimizer.zero_grad()
                loss = self.theta.square().sum()
                self.manual_backward(loss)
                points.append(float(loss))
                return loss

            optimizer.step(closure)

    module = Bowl()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(6))))
    # The first point twice, to see whether the closure is deterministic.
    assert [len(points) for points in module.evaluations] == [2, 3, 3, 3, 3, 3]
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, optex.OptEx)
    assert trainer.global_step == 6 < optimizer.steps_taken
    assert module.evaluations[-1][0] < module.evaluations[0][0] / 2


# ---------------------------------------------------------------------- Accelerate


@pytest.fixture
def accelerate_run(text):
    pytest.importorskip("accelerate")
    import accelerate_char_gpt
    from accelerate.state import AcceleratorState, GradientState

    flags = [*GPT, "--dropout", "0.1", "--accumulate", "2", "--batch-size", "4", *text]

    def run(*more):
        # Settings are kept for the life of a process; another run may have others.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return accelerate_char_gpt.main([*flags, *map(str, more)])

    return run


def test_accelerate_takes_the_plain_steps_at_tolerance_0(accelerate_run):
    plain, found = (
        accelerate_run("--optex", 1, "--tolerance", 0),
        accelerate_run("--optex", 4, "--tolerance", 0),
    )
    assert plain["steps"] == found["steps"] == 24
    assert same_model(plain, found)


def test_accelerate_goes_on_from_a_checkpoint(accelerate_run, tmp_path):
    whole = accelerate_run("--optex", 4, "--bf16")
    assert len(whole["losses"]) < 24 <= whole["steps"]
    assert whole["losses"][-1] < whole["losses"][0]
    flags = ["--optex", 4, "--bf16", "--checkpoint", tmp_path / "new" / "checkpoint.pt"]
    half = accelerate_run(*flags, "--max-rounds", 4)
    assert half["steps"] < 24
    torch.rand(5)
    rest = accelerate_run(*flags, "--resume")
    assert half["losses"] + rest["losses"] == whole["losses"]
    assert same_model(whole, rest)


def test_accelerates_wrapper_has_the_optimizer_inside(accelerate_run):
    from accelerate import Accelerator

    theta = torch.nn.Parameter(torch.full((4,), 2.0))
    optimizer = optex.OptEx(torch.optim.Adam([theta], lr=0.1), parallelism=3)
    reports = list(optimizer.rounds([None] * 7, lambda _: theta.square().sum()))
    prepared = Accelerator(cpu=True).prepare(optimizer)  # it saves and loads the state
    assert prepared.optimizer is optimizer
    reports += optimizer.rounds([None] * 7, lambda _: theta.square().sum())
    assert sum(report.accepted for report in reports) == optimizer.steps_taken == 14
    assert reports[-1].loss < reports[0].loss


def test_what_accelerate_prepares_has_rounds_inside():
    pytest.importorskip("accelerate")
    from accelerate import Accelerator

    theta = torch.nn.Parameter(torch.ones(3))
    prepared = Accelerator(cpu=True).prepare(optex.OptEx(torch.optim.SGD([theta], lr=0.1), parallelism=2))
    reports = list(prepared.optimizer.rounds([None] * 8, lambda _: theta.square().sum()))
    assert reports[-1].loss < reports[0].loss


def test_what_lightning_wraps_has_rounds():
    pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    theta = torch.nn.Parameter(torch.ones(3))
    wrapped = LightningOptimizer(optex.OptEx(torch.optim.SGD([theta], lr=0.1), parallelism=2))
    reports = list(wrapped.rounds([None] * 8, lambda _: theta.square().sum()))
    assert reports[-1].loss < reports[0].loss
