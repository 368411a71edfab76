"""A GPT on characters
===================

A small one in one file, in the manner of nanoGPT::

    python examples/train_char_gpt.py --optex 1              # the plain loop
    python examples/train_char_gpt.py --optex 4              # as many steps in fewer rounds
    python examples/train_char_gpt.py --optex 4 --bf16 --compile --accumulate 4
    python examples/train_char_gpt.py --optex 4 --checkpoint out/gpt.pt --max-rounds 50
    python examples/train_char_gpt.py --optex 4 --checkpoint out/gpt.pt --resume

The text is tinyshakespeare, found as ``optex fetch shakespeare`` leaves it or in ``$OPTEX_DATA``; or any other,
``--text FILE``. Nine tenths are trained on, the last tenth is held out. Everything that has to do with optex is
in ``with_optex`` and in the lines of ``main`` that build the optimizer.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

import optex
from optex.studies.problems.data import shakespeare

Batch = list[tuple[Tensor, Tensor]]  # micro-batches: characters [n, context], and what follows each


class Block(nn.Module):
    """Attention to what came before, then two layers for each character; both beside a shortcut."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:  # [n, t, width] -> [n, t, width]
        hidden = hidden + self.drop(self.projection(self.attend(self.attention_norm(hidden))))
        return hidden + self.drop(self.narrow(functional.gelu(self.wide(self.norm(hidden)))))

    def attend(self, hidden: Tensor) -> Tensor:  # [n, t, width] -> [n, t, width]
        count, length, width = hidden.shape
        parts = self.attention(hidden).view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(*parts, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).reshape(count, length, width)

    def drop(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, self.dropout, self.training)


class GPT(nn.Module):
    """Characters so far in, scores of the next one out. The embedding is the output layer, too."""

    def __init__(
        self, alphabet: int, layers: int, heads: int, width: int, context: int, dropout: float
    ) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(alphabet, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                branch_ends = "projection" in name or "narrow" in name
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if branch_ends else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, codes: Tensor) -> Tensor:  # [n, t] -> [n, t, alphabet]
        hidden = self.characters(codes) + self.positions.weight[: codes.shape[1]]
        return self.norm(self.blocks(self.dropout(hidden))) @ self.characters.weight.T


def decayed_and_not(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for matrices and embeddings, none for biases and norms."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def warm_up_and_cosine(base: torch.optim.Optimizer, warm_up: int, steps: int) -> LambdaLR:
    """Up to the full rate in ``warm_up`` steps, then down to a tenth of it at the end."""

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        done = min(1.0, (step - warm_up) / max(1, steps - warm_up))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return LambdaLR(base, factor)


class Text:
    """Codes of the characters. Batches are known by their number, so a run can go on from any of them."""

    def __init__(self, text: str, args: argparse.Namespace) -> None:
        self.alphabet = sorted(set(text))
        places = {character: i for i, character in enumerate(self.alphabet)}
        codes = torch.tensor([places[character] for character in text])
        self.train, self.held_out = codes[: len(codes) * 9 // 10], codes[len(codes) * 9 // 10 :]
        self.args = args

    def windows(self, codes: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = codes[starts[:, None] + torch.arange(self.args.context + 1)].to(self.args.device)
        return rows[:, :-1], rows[:, 1:]

    def batch(self, number: int) -> Batch:
        """One to train on: windows from random places, seeded by the number."""
        args = self.args
        random = torch.Generator().manual_seed(hash((args.seed, number)) % 2**63)
        starts = torch.randint(
            len(self.train) - args.context, (args.accumulate, args.batch_size), generator=random
        )
        return [self.windows(self.train, row) for row in starts]

    def held(self, count: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """The same windows of the text held out each time."""
        starts = torch.linspace(0, len(self.held_out) - self.args.context - 1, count).long()
        for part in starts.split(32):
            yield self.windows(self.held_out, part)


@torch.no_grad()
def held_loss(model: nn.Module, text: Text, objective: Callable[[Any], Tensor]) -> float:
    """Cross entropy on text held out. Between rounds the model stands at the last step kept."""
    model.eval()
    losses = [objective(windows).item() for windows in text.held()]
    model.train()
    return sum(losses) / len(losses)


@torch.no_grad()
def sample(model: nn.Module, text: Text, count: int, seed: int) -> str:
    """So many characters, one drawn after the other."""
    model.eval()
    random = torch.Generator().manual_seed(seed)
    codes = torch.zeros(1, 1, dtype=torch.long, device=text.args.device)
    for _ in range(count):
        chances = model(codes[:, -text.args.context :])[0, -1].float().softmax(0).cpu()
        drawn = torch.multinomial(chances, 1, generator=random).to(codes.device)
        codes = torch.cat([codes, drawn[None]], dim=1)
    model.train()
    return "".join(text.alphabet[i] for i in codes[0, 1:].tolist())


def plain(
    base: torch.optim.Optimizer,
    schedule: LambdaLR,
    clip: Callable[[], Any],
    batches: Iterator[Batch],
    objective: Callable[[Any], Tensor],
) -> Iterator[tuple[int, float]]:
    """The loop as it is without optex. Yields the steps taken since it last did, and a loss."""
    for batch in batches:
        base.zero_grad()
        total = torch.zeros(())
        for micro_batch in batch:
            loss = objective(micro_batch) / len(batch)
            loss.backward()
            total = total + loss.detach().cpu()
        clip()
        base.step()
        schedule.step()
        yield 1, total.item()


def with_optex(
    optimizer: optex.OptEx, batches: Iterator[Batch], objective: Callable[[Any], Tensor]
) -> Iterator[tuple[int, float]]:
    """The loop with optex: gradients are cleared, summed up, clipped and stepped with inside a round."""
    for report in optimizer.rounds(batches, optex.AccumulatingSource(objective)):
        yield report.accepted, report.loss


def arguments(argv: Sequence[str] | None, description: str | None = __doc__) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optex", type=int, default=4, metavar="N", help="gradients at once; 1 is the plain loop (default 4)")
    add("--tolerance", type=float, help="as in optex.WithinTolerance; 0 gives the plain loop's steps")
    add("--text", type=Path, help="a file to learn (default: tinyshakespeare)")
    add("--layers", type=int, default=4, help="(default 4)")
    add("--heads", type=int, default=4, help="(default 4)")
    add("--width", type=int, default=64, help="numbers for each character (default 64)")
    add("--context", type=int, default=64, help="characters in a window (default 64)")
    add("--dropout", type=float, default=0.0, help="(default 0)")
    add("--batch-size", type=int, default=16, help="windows in a micro-batch (default 16)")
    add("--accumulate", type=int, default=1, help="micro-batches in a batch (default 1)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default 0.001)")
    add("--warm-up", type=int, default=20, help="steps until it is reached (default 20)")
    add("--decay", type=float, default=0.1, help="weight decay of matrices (default 0.1)")
    add("--clip", type=float, default=1.0, help="largest norm of a gradient (default 1)")
    add("--steps", type=int, default=300, help="of the whole schedule (default 300)")
    add("--max-rounds", type=int, help="stop after so many rounds in all, to compare or to go on later")
    add("--evaluate-every", type=int, default=100, help="steps between evaluations (default 100)")
    add("--checkpoint", type=Path, help="written at every evaluation and at the end")
    add("--resume", action="store_true", help="go on from the checkpoint")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the model")
    add("--sample", type=int, default=200, help="characters to write at the end (default 200)")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.resume and args.checkpoint is None:
        parser.error("--resume needs --checkpoint")
    return args


def build(args: argparse.Namespace) -> tuple[Text, GPT]:
    """The data and the model, both from the seed."""
    text = Text(args.text.read_text() if args.text else shakespeare(), args)
    torch.manual_seed(args.seed)
    model = GPT(len(text.alphabet), args.layers, args.heads, args.width, args.context, args.dropout)
    return text, model.to(args.device)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, and say how it went."""
    args = arguments(argv)
    text, model = build(args)
    forward = torch.compile(model, backend=args.compile) if args.compile else model

    base = torch.optim.AdamW(decayed_and_not(model, args.decay), lr=args.lr, betas=(0.9, 0.99))
    schedule = warm_up_and_cosine(base, args.warm_up, args.steps)

    def clip() -> Any:
        return nn.utils.clip_grad_norm_(model.parameters(), args.clip)

    def objective(micro_batch: tuple[Tensor, Tensor]) -> Tensor:
        codes, following = micro_batch
        # float16 would need a GradScaler, whose changing scale has no place in a history; bfloat16 needs none.
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            scores = forward(codes)
        return functional.cross_entropy(scores.float().flatten(0, 1), following.flatten())

    optimizer: torch.optim.Optimizer = base
    if args.optex > 1:
        optimizer = optex.OptEx(
            base,
            parallelism=args.optex,
            acceptance=None if args.tolerance is None else optex.WithinTolerance(args.tolerance),
            scheduler=schedule,  # it ticks with every step, the drafted ones as well
            model=model,  # not needed here, as it has no buffers; a model with BatchNorm needs it
            gradient_hook=clip,  # after the micro-batches are summed up, before anything is stepped with
        )

    steps = rounds = drawn = 0
    if args.resume:
        # Without map_location: random generators' states have to stay on the CPU, the rest is where it was.
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        steps, rounds, drawn = state["steps"], state["rounds"], state["drawn"]
        set_random_state(state["random"])

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
            "random": random_state(),  # where dropout goes on
        }
        torch.save(state, args.checkpoint)

    batches = (text.batch(number) for number in range(drawn, args.steps))
    if isinstance(optimizer, optex.OptEx):
        loop = with_optex(optimizer, batches, objective)
    else:
        loop = plain(base, schedule, clip, batches, objective)
    losses: list[float] = []
    started = time.perf_counter()

    def pause() -> float:
        save()
        held = held_loss(model, text, objective)
        print(
            f"step {steps:5d}   round {rounds:5d}   loss {losses[-1] if losses else math.nan:.4f}   "
            f"held-out loss {held:.4f}   {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        return held

    # Steps that draw no batch tick the schedule, too: its end may come before that of the batches.
    while steps < args.steps and (args.max_rounds is None or rounds < args.max_rounds):
        taken, loss = next(loop, (0, None))
        if loss is None:
            break
        losses.append(loss)
        rounds += 1
        before, steps = steps, steps + taken
        if steps // args.evaluate_every > before // args.evaluate_every and steps < args.steps:
            pause()
    held = pause()
    if args.sample:
        print(sample(model, text, args.sample, args.seed))
    return {"model": model, "steps": steps, "rounds": rounds, "losses": losses, "held": held}


def random_state() -> list[Tensor]:
    """Where torch's generators stand: the CPU's, then those of CUDA's devices."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(states: list[Tensor]) -> None:
    """Put them back there."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


if __name__ == "__main__":
    main()
