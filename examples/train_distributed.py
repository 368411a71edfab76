r"""Several ranks under torchrun
============================

A small network is trained on handwritten digits by several processes, each with its own proxies::

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 1 \
        examples/train_distributed.py --fail-at 20

Every rank runs this same script: same seed, same batches, same optimizer. A round's proxies are spread over the
ranks; the history, the parameters and Adam's moments are split among them. Every few rounds a checkpoint is
written, and a job that finds one goes on from it, on as many ranks as it has now. The second command lets a
rank die once, to see that: the job starts anew and ends at the same loss. (The variable gives a job that is
started anew a store of its own, where it does not find the addresses of the one before.)
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn

import optex
from optex.distributed import checkpoint


def digits() -> tuple[Tensor, Tensor]:  # [1797, 64], [1797]
    """Pictures of 8 × 8 pixels in 0..1, and which digits they show."""
    pixels, digits = load_digits(return_X_y=True)
    return torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)


def batches(count: int, size: int) -> Iterator[Tensor]:  # [size] each
    """Which pictures each step sees; pictures themselves are fetched by the rank that evaluates the step."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randint(0, 1797, (size,), generator=generator)


def train(options: argparse.Namespace) -> float:
    """Train to the end, from the last checkpoint if there is one; the loss over all pictures."""
    torch.manual_seed(0)  # the same start on every rank
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    pictures, labels = digits()
    optimizer = optex.OptEx(
        torch.optim.Adam(model.parameters(), lr=3e-3),
        parallelism=options.parallelism,
        evaluator=optex.DistributedEvaluator(),
    )

    def objective(chosen: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(pictures[chosen]), labels[chosen])

    if checkpoint.latest(options.checkpoints) is not None:
        checkpoint.load(options.checkpoints, optimizer)
        say(f"continuing after step {optimizer.steps_taken}")
    remaining = itertools.islice(batches(options.steps, 256), optimizer.batches_drawn, None)
    for report in optimizer.rounds(remaining, objective):
        if report.number == options.fail_at and dist.get_rank() == 1 and first_attempt():
            os._exit(1)
        if report.number % options.every == 0:
            checkpoint.save(options.checkpoints, optimizer)
            say(f"round {report.number}: loss {report.loss:.4f}, {report.accepted} steps")
    with torch.no_grad():  # the parameters are whole again: the rounds have ended
        return nn.functional.cross_entropy(model(pictures), labels).item()


def first_attempt() -> bool:
    """Whether torchrun has not restarted the job yet."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def say(text: str) -> None:
    """Print it once, not on every rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def main() -> None:
    """Read the options, join the job, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps",
        type=int,
        default=200,
        help="batches, one for each step with a gradient (default: %(default)s)",
    )
    parser.add_argument("--parallelism", type=int, default=4, help="proxies a round (default: %(default)s)")
    parser.add_argument(
        "--every", type=int, default=5, help="rounds between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--checkpoints", type=Path, default=Path("out/checkpoints"), help="where they go")
    parser.add_argument("--fail-at", type=int, help="the round at which rank 1 dies, once")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit("train_distributed.py: start it with torchrun --standalone --nproc-per-node 2")
    torch.set_num_threads(1)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=2))
    loss = train(options)
    say(f"loss over all pictures after {options.steps} batches: {loss:.6f}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
