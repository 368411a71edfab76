"""The GPT with Hugging Face Accelerate
====================================

It is that of ``train_char_gpt.py``::

    python examples/accelerate_char_gpt.py --optex 4
    accelerate launch --mixed_precision bf16 examples/accelerate_char_gpt.py --optex 4

Model and loader are prepared, the optimizer is not. What ``accelerator.prepare(optimizer)`` adds is a
GradScaler for float16, which optex refuses, and skipping steps while gradients accumulate, which happens
inside a round here; its ``step`` does not return the loss, and it has no ``rounds``. Where other code
prepares all there is, the optimizer itself is ``prepared.optimizer``.

Flags are those of ``train_char_gpt.py``, without ``--device``: that is Accelerate's to choose.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from train_char_gpt import Batch, Text, arguments, build, decayed_and_not, held_loss, sample, warm_up_and_cosine

import optex
from optex import GradientSource


class AcceleratedBackward(GradientSource):
    """A step's gradient by ``accelerator.backward``, summed up over micro-batches."""

    def __init__(self, accelerator: Accelerator, objective: Callable[[Any], Tensor]) -> None:
        self.accelerator, self.objective = accelerator, objective

    def gradient(self, batch: Batch) -> tuple[Tensor, None]:
        total = torch.zeros((), device=self.accelerator.device)
        for micro_batch in batch:
            loss = self.objective(micro_batch) / len(batch)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total, None


class Windows(Dataset):
    """The training text cut into windows, one after the other."""

    def __init__(self, text: Text, context: int) -> None:
        self.codes, self.context = text.train, context

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.context

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        window = self.codes[i * self.context : (i + 1) * self.context + 1]
        return window[:-1], window[1:]


def batches(accelerator: Accelerator, loader: Any, args: argparse.Namespace, drawn: int) -> Iterator[Batch]:
    """Micro-batches for every step, epoch after epoch as one stream, after the first ``drawn`` ones.

    A call of ``rounds`` for every epoch would work, but its last rounds would run short of batches.
    """
    epoch, skip = divmod(drawn, len(loader))
    left = args.steps - drawn
    while left > 0:
        loader.set_epoch(epoch)
        for codes, following in accelerator.skip_first_batches(loader, skip) if skip else loader:
            if left <= 0:
                return
            left -= 1
            pieces = zip(codes.split(args.batch_size), following.split(args.batch_size), strict=True)
            yield list(pieces)
        epoch, skip = epoch + 1, 0


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, and say how it went."""
    args = arguments(argv, __doc__)
    # Left to the launcher unless the flag is given.
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else None,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    if accelerator.scaler is not None:
        raise SystemExit("--mixed_precision fp16 scales gradients by a factor that changes; use bf16")
    args.device = accelerator.device
    text, model = build(args)
    windows = Windows(text, args.context)
    loader = DataLoader(
        windows,
        batch_size=args.batch_size * args.accumulate,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(args.seed),  # or an epoch's start would disturb dropout's draws
    )
    model, loader = accelerator.prepare(model, loader)
    forward = torch.compile(model, backend=args.compile) if args.compile else model

    base = torch.optim.AdamW(decayed_and_not(model, args.decay), lr=args.lr, betas=(0.9, 0.99))
    optimizer = optex.OptEx(
        base,
        parallelism=args.optex,
        stride="auto" if args.optex > 1 else 1,  # --optex 1 is the plain loop here, too
        acceptance=None if args.tolerance is None else optex.WithinTolerance(args.tolerance),
        scheduler=warm_up_and_cosine(base, args.warm_up, args.steps),
        model=model,
        gradient_hook=lambda: accelerator.clip_grad_norm_(model.parameters(), args.clip),
    )

    def objective(micro_batch: tuple[Tensor, Tensor]) -> Tensor:
        codes, following = micro_batch
        scores = forward(codes)  # Accelerate has put its autocast around this
        return functional.cross_entropy(scores.float().flatten(0, 1), following.flatten())

    if args.resume:
        state = torch.load(args.checkpoint, weights_only=True)
        accelerator.unwrap_model(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])  # steps, schedule and random generators, too

    def pause(loss: float) -> float:
        if args.checkpoint is not None:
            args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            state = {"model": accelerator.get_state_dict(model), "optimizer": optimizer.state_dict()}
            accelerator.save(state, args.checkpoint)
        held = held_loss(model, text, objective)
        accelerator.print(f"step {optimizer.steps_taken:5d}   loss {loss:.4f}   held-out loss {held:.4f}")
        return held

    losses: list[float] = []
    source = AcceleratedBackward(accelerator, objective)
    stream = batches(accelerator, loader, args, optimizer.batches_drawn)
    before = optimizer.steps_taken
    rounds = optimizer.rounds(stream, source)
    # Steps that draw no batch tick the schedule, too: its end may come before that of the batches.
    while optimizer.steps_taken < args.steps and (report := next(rounds, None)) is not None:
        losses.append(report.loss)
        if optimizer.steps_taken // args.evaluate_every > before // args.evaluate_every:
            pause(report.loss)
        before = optimizer.steps_taken
        if args.max_rounds is not None and report.number + 1 >= args.max_rounds:
            break
    held = pause(losses[-1] if losses else math.nan)
    if args.sample:
        accelerator.print(sample(model, text, args.sample, args.seed))
    return {"model": model, "steps": optimizer.steps_taken, "losses": losses, "held": held}


if __name__ == "__main__":
    main()
