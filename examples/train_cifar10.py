"""A ResNet on CIFAR-10
====================

A small one, with BatchNorm, augmentation, clipping, a cosine schedule and checkpoints::

    python examples/train_cifar10.py --optex 1 --steps 60      # the plain loop
    python examples/train_cifar10.py --optex 4 --steps 60      # as many steps in fewer rounds
    python examples/train_cifar10.py --optex 4 --checkpoint out/cifar10.pt --max-rounds 50
    python examples/train_cifar10.py --optex 4 --checkpoint out/cifar10.pt --resume

The images are found as ``optex fetch cifar10`` leaves them, or in ``$OPTEX_DATA``. Everything that has to do
with optex is in ``with_optex`` and in the lines of ``main`` that build the optimizer.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import optex
from optex.studies.problems.data import cifar10

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, hidden: Tensor) -> Tensor:  # [n, before, s, s] -> [n, after, s / stride, s / stride]
        branch = functional.relu(self.first_norm(self.first(hidden)))
        return functional.relu(self.second_norm(self.second(branch)) + self.shortcut(hidden))


def resnet(width: int, blocks: int) -> nn.Module:
    """Three stages of ``blocks`` blocks, 6 · blocks + 2 layers in all."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    before = width
    for stage in range(3):
        for i in range(blocks):
            after = width << stage
            layers.append(Block(before, after, stride=2 if stage and i == 0 else 1))
            before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class Images:
    """A split of CIFAR-10 in memory. Batches are known by their number, so a run can go on from any of them."""

    def __init__(self, split: Any, batch_size: int, seed: int, device: str) -> None:
        pixels, labels = cifar10(split)
        self.pixels, self.labels = torch.from_numpy(pixels), torch.from_numpy(labels).long()
        self.batch_size, self.seed, self.device = batch_size, seed, device

    @property
    def batches_an_epoch(self) -> int:
        return len(self.labels) // self.batch_size

    def batch(self, number: int) -> tuple[Tensor, Tensor]:  # [n, 3, 32, 32], [n]
        """One to train on: shuffled anew every epoch, shifted by up to 4 pixels, mirrored half of the time."""
        epoch, place = divmod(number, self.batches_an_epoch)
        order = torch.randperm(len(self.labels), generator=seeded(self.seed, 0, epoch))
        rows = order[place * self.batch_size : (place + 1) * self.batch_size]
        random = seeded(self.seed, 1, number)
        top, left = torch.randint(9, (2, self.batch_size, 1), generator=random)
        mirrored = torch.rand(self.batch_size, 1, generator=random) < 0.5
        down, across = top + torch.arange(32), left + torch.arange(32)
        across = torch.where(mirrored, across.flip(1), across)
        padded = functional.pad(self.pixels[rows], (4, 4, 4, 4))
        each, plane = torch.arange(self.batch_size)[:, None, None, None], torch.arange(3)[:, None, None]
        return self.prepared(padded[each, plane, down[:, None, :, None], across[:, None, None, :]], rows)

    def prepared(self, pixels: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = torch.tensor(MEAN)[:, None, None], torch.tensor(DEVIATION)[:, None, None]
        images = (pixels.float() / 255 - mean) / deviation
        return images.to(self.device), self.labels[rows].to(self.device)

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, as it is."""
        for rows in torch.arange(len(self.labels)).split(500):
            yield self.prepared(self.pixels[rows], rows)


def seeded(*numbers: int) -> torch.Generator:
    """Random numbers that follow from these alone, hashed because torch looks at 32 bits of a seed."""
    return torch.Generator().manual_seed(hash(numbers) % 2**63)


@torch.no_grad()
def test(model: nn.Module, images: Images) -> tuple[float, float]:
    """Loss and share of wrong answers. Between rounds the model is as the last step kept left it."""
    model.eval()
    loss = wrong = 0.0
    for pixels, labels in images.all():
        scores = model(pixels)
        loss += functional.cross_entropy(scores, labels, reduction="sum").item()
        wrong += (scores.argmax(1) != labels).sum().item()
    model.train()
    return loss / len(images.labels), wrong / len(images.labels)


def plain(
    base: torch.optim.Optimizer,
    schedule: LambdaLR,
    clip: Callable[[], Any],
    batches: Iterator[Any],
    objective: Callable[[Any], Tensor],
) -> Iterator[tuple[int, float]]:
    """The loop as it is without optex. Yields the steps taken since it last did, and a loss."""
    for batch in batches:
        base.zero_grad()
        loss = objective(batch)
        loss.backward()
        clip()
        base.step()
        schedule.step()
        yield 1, loss.item()


def with_optex(
    optimizer: optex.OptEx, batches: Iterator[Any], objective: Callable[[Any], Tensor]
) -> Iterator[tuple[int, float]]:
    """The loop with optex: gradients are cleared, clipped and stepped with inside a round."""
    for report in optimizer.rounds(batches, objective):
        yield report.accepted, report.loss


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--optex", type=int, default=4, metavar="N", help="gradients at once; 1 is the plain loop (default 4)")
    add("--tolerance", type=float, help="as in optex.WithinTolerance; 0 gives the plain loop's steps")
    add("--width", type=int, default=16, help="channels of the first stage (default 16)")
    add("--blocks", type=int, default=1, help="blocks a stage (default 1)")
    add("--optimizer", choices=("sgd", "adamw"), default="adamw", help="(default adamw)")
    add("--lr", type=float, help="peak learning rate (default 0.1 for sgd, 0.003 for adamw)")
    add("--batch-size", type=int, default=128, help="(default 128)")
    add("--steps", type=int, default=390, help="of the whole schedule (default 390, an epoch)")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient (default 1)")
    add("--max-rounds", type=int, help="stop after so many rounds in all, to compare or to go on later")
    add("--evaluate-every", type=int, help="steps between tests (default: an epoch)")
    add("--checkpoint", type=Path, help="written at every test and at the end")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, and say how it went."""
    args = arguments(argv)
    train = Images("train", args.batch_size, args.seed, args.device)
    held_out = Images("test", args.batch_size, args.seed, args.device)
    torch.manual_seed(args.seed)
    model = resnet(args.width, args.blocks).to(args.device)

    if args.optimizer == "sgd":
        lr = args.lr or 0.1
        base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    else:
        base = torch.optim.AdamW(model.parameters(), lr=args.lr or 3e-3, weight_decay=0.05)
    warm_up = min(100, args.steps // 10 + 1)
    schedule = LambdaLR(
        base,
        lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1, step / args.steps))),
    )

    def clip() -> Any:
        return nn.utils.clip_grad_norm_(model.parameters(), args.clip)

    def objective(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    optimizer: torch.optim.Optimizer = base
    if args.optex > 1:
        optimizer = optex.OptEx(
            base,
            parallelism=args.optex,
            acceptance=None if args.tolerance is None else optex.WithinTolerance(args.tolerance),
            scheduler=schedule,  # it ticks with every step, the drafted ones as well
            model=model,  # whose BatchNorm statistics follow the steps that are kept
            gradient_hook=clip,  # before anything is stepped with, or remembered
        )

    steps = rounds = drawn = 0
    if args.resume:
        # Without map_location: random generators' states have to stay on the CPU, the rest is where it was.
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        steps, rounds, drawn = state["steps"], state["rounds"], state["drawn"]

    def save() -> None:
        if args.checkpoint is None:
            return
        args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "steps": steps,
            "rounds": rounds,
            # Optex has drawn a few batches ahead; they are in its state.
            "drawn": optimizer.batches_drawn if isinstance(optimizer, optex.OptEx) else steps,
        }
        torch.save(state, args.checkpoint)

    batches = (train.batch(number) for number in range(drawn, args.steps))
    if isinstance(optimizer, optex.OptEx):
        loop = with_optex(optimizer, batches, objective)
    else:
        loop = plain(base, schedule, clip, batches, objective)
    every = args.evaluate_every or train.batches_an_epoch
    losses: list[float] = []
    started = time.perf_counter()

    def pause() -> tuple[float, float]:
        save()
        test_loss, test_error = test(model, held_out)
        print(
            f"step {steps:5d}   round {rounds:5d}   loss {losses[-1] if losses else math.nan:.4f}   "
            f"test loss {test_loss:.4f}   test error {test_error:.1%}   {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        return test_loss, test_error

    # Steps that draw no batch tick the schedule, too: its end may come before that of the batches.
    while steps < args.steps and (args.max_rounds is None or rounds < args.max_rounds):
        taken, loss = next(loop, (0, None))
        if loss is None:
            break
        losses.append(loss)
        rounds += 1
        before, steps = steps, steps + taken
        if steps // every > before // every and steps < args.steps:
            pause()
    test_loss, test_error = pause()
    return {
        "model": model,
        "steps": steps,
        "rounds": rounds,
        "losses": losses,
        "error": test_error,
        "test": test_loss,
    }


if __name__ == "__main__":
    main()
