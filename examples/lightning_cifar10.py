"""The ResNet in Lightning
=======================

It is that of ``train_cifar10.py``; optimization is manual::

    python examples/lightning_cifar10.py --optex 4 --epochs 1 --batches 60
    python examples/lightning_cifar10.py --epochs 2 --checkpoint out/lightning.ckpt --stop-after 1
    python examples/lightning_cifar10.py --epochs 2 --checkpoint out/lightning.ckpt --resume

Lightning hands ``training_step`` one batch at a time; a round of optex needs as many new ones as the last
round kept steps. So batches are put in a queue, and a round is run when enough are there: ``batch_idx``,
progress bar and ``val_check_interval`` count batches, as in the plain loop, and a step has one batch for
good.

Why not ``self.optimizers().step(closure)``? It works, Lightning's wrapper hands the closure on. But a closure
knows one batch, and would be evaluated up to N times on that one: right where the objective is deterministic,
up to N steps on one minibatch where it is not. A closure that draws a new batch at every call uses up N
batches a round, however few steps are kept. ``rounds`` does neither.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from train_cifar10 import Images, resnet

import optex
from optex import GradientSource

Batch = tuple[Tensor, Tensor]


class ManualBackward(GradientSource):
    """A step's gradient by Lightning's ``manual_backward``, with its precision, hooks and strategy."""

    def __init__(self, module: Classifier) -> None:
        self.module = self.classifier = module  # ``module`` may be any torch module, this one has a loss

    def gradient(self, batch: Batch) -> tuple[Tensor, None]:
        loss = self.classifier.loss(batch)
        self.classifier.manual_backward(loss)
        return loss.detach(), None


class Classifier(lightning.LightningModule):
    """A network whose steps are optex's."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.args = args
        self.network = resnet(args.width, args.blocks)
        self.queue: deque[Batch | None] = deque()  # that came and are not in a round yet; None ends the run
        self.missing = args.optex  # batches that the next round waits for
        self.rounds: Iterator[optex.RoundReport] = iter(())

    def configure_optimizers(self) -> optex.OptEx:
        args = self.args
        base = torch.optim.AdamW(self.network.parameters(), lr=args.lr, weight_decay=0.05)
        steps = args.epochs * args.batches
        schedule = LambdaLR(base, lambda step: 0.5 * (1 + math.cos(math.pi * min(1, step / steps))))
        return optex.OptEx(
            base,
            parallelism=args.optex,
            stride=1,  # a step for every batch, so that Lightning's counts and the schedule's are one
            acceptance=None if args.tolerance is None else optex.WithinTolerance(args.tolerance),
            scheduler=schedule,  # optex ticks it and saves it; Lightning need not know it
            model=self.network,
            gradient_hook=lambda: nn.utils.clip_grad_norm_(self.network.parameters(), 1.0),
        )

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy."""
        images, labels = batch
        return functional.cross_entropy(self.network(images), labels)

    def on_train_start(self) -> None:
        # The optimizer itself: Lightning's wrapper of it knows step(closure) alone. With one optimizer there is
        # nothing to toggle.
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        self.rounds = optimizer.rounds(iter(self.queue.popleft, None), ManualBackward(self))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.queue.append(batch)
        self.missing -= 1
        last = self.trainer.is_last_batch and self.trainer.current_epoch + 1 == self.trainer.max_epochs
        if last:
            self.queue.append(None)
        while last or not self.missing:
            report = next(self.rounds, None)
            if report is None:
                return
            self.missing = max(1, report.accepted)
            self.count(report.accepted)
            self.log_dict({"loss": report.loss, "accepted": float(report.accepted)}, prog_bar=True)

    def count(self, steps: int) -> None:
        """Tell Lightning, which would count calls of its wrapper; checkpoints and loggers go by global_step."""
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        for _ in range(steps):
            progress.increment_ready()
            progress.increment_completed()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        scores = self.network(images)
        self.log("test_loss", functional.cross_entropy(scores, labels), batch_size=len(labels))
        self.log("test_error", (scores.argmax(1) != labels).float().mean(), batch_size=len(labels))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The window is in the optimizer's state; here are the batches that have not got there.
        checkpoint["waiting"] = {"queue": list(self.queue), "missing": self.missing}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.queue.extend(checkpoint["waiting"]["queue"])
        self.missing = checkpoint["waiting"]["missing"]


class Numbered(Dataset):
    """Whole batches, by their number."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images.batches_an_epoch

    def __getitem__(self, number: int) -> Batch:
        return self.images.batch(number)


class InOrder(Sampler):
    """The numbers of an epoch's batches; Lightning says which epoch it is."""

    def __init__(self, batches: int) -> None:
        self.batches, self.epoch = batches, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # When the first one is asked for: to resume, Lightning makes the iterator before it tells the epoch.
        yield from range(self.epoch * self.batches, (self.epoch + 1) * self.batches)

    def __len__(self) -> int:
        return self.batches


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--optex", type=int, default=4, metavar="N", help="gradients at once; 1 is the plain loop (default 4)")
    add("--tolerance", type=float, help="as in optex.WithinTolerance; 0 gives the plain loop's steps")
    add("--width", type=int, default=16, help="channels of the first stage (default 16)")
    add("--blocks", type=int, default=1, help="blocks a stage (default 1)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default 0.003)")
    add("--batch-size", type=int, default=128, help="(default 128)")
    add("--batches", type=int, default=60, help="in an epoch (default 60)")
    add("--epochs", type=int, default=1, help="of the whole schedule (default 1)")
    add("--stop-after", type=int, help="epochs to train now, to go on later (default: all)")
    # No "16-mixed": it scales gradients by a factor that changes, and the history would mix them.
    add("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="(default 32-true)")
    add("--checkpoint", type=Path, help="written at the end")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--accelerator", default="auto", help="as in Lightning's Trainer (default auto)")
    add("--quiet", action="store_true", help="no progress bar, and no messages of Lightning's own")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, and say how it went."""
    args = arguments(argv)
    if args.quiet:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
    lightning.seed_everything(args.seed, verbose=False)
    train = Images("train", args.batch_size, args.seed, "cpu")  # Lightning moves the batches
    args.batches = min(args.batches, train.batches_an_epoch)
    held_out = Images("test", args.batch_size, args.seed, "cpu")
    test_batches: Any = list(held_out.all())
    module = Classifier(args)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator=args.accelerator,
        devices=1,
        precision=args.precision,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not args.quiet,
        num_sanity_val_steps=0,
        callbacks=[] if args.stop_after is None else [StopAfter(args.stop_after)],
    )
    trainer.fit(
        module,
        DataLoader(Numbered(train), sampler=InOrder(args.batches), batch_size=None),
        DataLoader(test_batches, batch_size=None),
        ckpt_path=args.checkpoint if args.resume else None,
    )
    if args.checkpoint is not None:
        trainer.save_checkpoint(args.checkpoint)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(f"step {trainer.global_step}   " + "   ".join(f"{name} {value:.4f}" for name, value in found.items()))
    return {"module": module, "trainer": trainer, **found}


class StopAfter(lightning.Callback):
    """Ends the run at an epoch's end, as a job's time limit would."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.current_epoch + 1 >= self.epochs:
            trainer.should_stop = True


if __name__ == "__main__":
    main()
