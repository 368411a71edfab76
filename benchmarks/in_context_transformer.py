"""A small transformer learns linear regression in context, and is probed layer by layer.

    python benchmarks/in_context_transformer.py                     # train, probe, write the record
    python benchmarks/in_context_transformer.py --steps 50 --out /tmp/try.json

A decoder in the manner of GPT-2 reads x_1, y_1, x_2, y_2, ..., x_n and predicts y_t at x_t, as in Fu, Chen,
Jia, Sharan (NeurIPS 2024, arXiv 2310.17086), at a small fraction of its size. After training, a linear readout
is fitted by least squares to the hidden states behind every layer. Its errors are compared with those of the
iterative Newton method, gradient descent and online gradient descent by ``similarity_of_errors``. The record is
``results/family/in_context_transformer.json``; weights are not kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optex.solvers import (
    gradient_descent_predictor,
    iterative_newton_predictor,
    online_gradient_descent_predictor,
    similarity_of_errors,
)

RECORD = Path(__file__).parents[1] / "results" / "family" / "in_context_transformer.json"
NEWTON_STEPS = 20
DESCENT_STEPS = 1000
DESCENT_KEPT = (0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 90, 128, 181, 256, 362, 512, 724, 1000)
TUNED_AT = 32  # steps after which gradient descent's rate is chosen
DESCENT_RATES = (0.00625, 0.0125, 0.025, 0.05, 0.1)
ONLINE_RATES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Scale:
    """Sizes of the study; the paper's are d = 20, 41 points, 12 layers, width 256, 500,000 steps of 64."""

    dimension: int = 4
    points: int = 9  # 2 d examples, and one more to predict
    layers: int = 6
    width: int = 40
    heads: int = 4
    steps: int = 4000
    batch: int = 96
    lr: float = 3e-3
    seed: int = 0


class InContext(nn.Module):
    """A causal transformer over x_1, y_1, x_2, ..., x_n, and its prediction at every x."""

    def __init__(self, scale: Scale) -> None:
        super().__init__()
        self.entry = nn.Linear(scale.dimension + 1, scale.width)
        self.positions = nn.Parameter(0.02 * torch.randn(2 * scale.points - 1, scale.width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                scale.width,
                scale.heads,
                4 * scale.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(scale.layers)
        )
        self.norm, self.output = nn.LayerNorm(scale.width), nn.Linear(scale.width, 1)

    def hidden(
        self,
        inputs: Tensor,  # [b, n, d]
        targets: Tensor,  # [b, n]
    ) -> list[Tensor]:  # a layer's states at every x each, the entry's first, [b, n, width]
        zeros = torch.zeros_like(targets)[..., None]
        xs = torch.cat([inputs, zeros], dim=-1)  # [b, n, d + 1]
        ys = torch.cat([torch.zeros_like(inputs), targets[..., None]], dim=-1)
        tokens = torch.stack([xs, ys], dim=2).flatten(1, 2)[:, :-1]  # the last y is not read
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        state = self.entry(tokens) + self.positions
        found = [state[:, ::2]]
        for layer in self.layers:
            state = layer(state, src_mask=mask, is_causal=True)
            found.append(state[:, ::2])
        return found

    def forward(
        self,
        inputs: Tensor,  # [b, n, d]
        targets: Tensor,  # [b, n]
    ) -> Tensor:  # [b, n]
        return self.output(self.norm(self.hidden(inputs, targets)[-1]))[..., 0]


def sequences(
    scale: Scale, count: int, generator: torch.Generator, used: int | None = None
) -> tuple[Tensor, Tensor]:
    """Inputs [count, n, d] and targets [count, n] of as many tasks y = w·x, all standard normal.

    Coordinates from ``used`` on are 0: fewer unknowns, which training begins with.
    """
    inputs = torch.randn(count, scale.points, scale.dimension, generator=generator)
    if used is not None:
        inputs[..., used:] = 0.0
    weights = torch.randn(count, scale.dimension, 1, generator=generator)
    return inputs, (inputs @ weights)[..., 0]


def trained(scale: Scale, report: Callable[[str], None]) -> tuple[InContext, list[tuple[int, float]]]:
    """The transformer, and (step, mean squared error at the last point over d) as it learned."""
    torch.manual_seed(scale.seed)
    model, generator = InContext(scale), torch.Generator().manual_seed(scale.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=scale.lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, scale.lr, scale.steps, pct_start=0.1)
    held = sequences(scale, 512, torch.Generator().manual_seed(scale.seed + 1))
    found, started = [], time.perf_counter()
    for step in range(scale.steps + 1):
        if step % max(scale.steps // 30, 1) == 0 or step == scale.steps:
            with torch.no_grad():
                error = float((model(*held) - held[1])[:, -1].square().mean()) / scale.dimension
            found.append((step, error))
            report(f"step {step}: {error:.4f}  {time.perf_counter() - started:.0f} s")
        # One unknown more every twentieth of the steps, as the paper's models began with few.
        used = min(scale.dimension, 2 + 20 * step // max(scale.steps, 1))
        inputs, targets = sequences(scale, scale.batch, generator, used)
        loss = (model(inputs, targets) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step < scale.steps:
            optimizer.step()
            schedule.step()
    return model, found


@torch.no_grad()
def probed(model: InContext, scale: Scale) -> list[Tensor]:  # [1024, n] a layer, the entry first
    """Predictions by a readout of each layer, fitted on other sequences than it is read on."""
    seen = sequences(scale, 4096, torch.Generator().manual_seed(scale.seed + 2))
    found = []
    for known, state in zip(model.hidden(*seen), model.hidden(*fresh(scale)), strict=True):
        readout = torch.linalg.lstsq(
            _with_one(known).flatten(0, 1), seen[1].double().flatten()[:, None]
        ).solution
        found.append((_with_one(state) @ readout)[..., 0])
    return found


def fresh(scale: Scale) -> tuple[Tensor, Tensor]:
    """Sequences on which everything is compared."""
    return sequences(scale, 1024, torch.Generator().manual_seed(scale.seed + 3))


def _with_one(state: Tensor) -> Tensor:
    return torch.cat([state, torch.ones_like(state[..., :1])], dim=-1).double()


def studied(model: InContext, scale: Scale) -> dict[str, Any]:
    """Errors of every layer, and their similarity to those of the methods."""
    inputs, targets = (part.double() for part in fresh(scale))
    layers = torch.stack(probed(model, scale), dim=-2)  # [b, layers + 1, n]
    newton = iterative_newton_predictor(inputs, targets, NEWTON_STEPS)
    # The rate at which some steps come nearest, as one would tune it; some are too large and diverge.
    tuning = {lr: gradient_descent_predictor(inputs, targets, TUNED_AT, lr=lr) for lr in DESCENT_RATES}
    rate = min(tuning, key=lambda lr: _finite(_errors(tuning[lr], targets, scale)[-1][-1]))
    descent = gradient_descent_predictor(inputs, targets, DESCENT_STEPS, lr=rate)
    online = {}
    for rule in ("constant", "decaying", "normalised"):
        tried = {}
        for lr in ONLINE_RATES:
            found = online_gradient_descent_predictor(inputs, targets, 2, lr=lr, rule=rule)
            tried[lr] = found[..., 1:, :]
        best = min(tried, key=lambda lr: _finite(_errors(tried[lr], targets, scale)[0][-1]))
        online[rule] = {
            "lr": best,
            "errors": _errors(tried[best], targets, scale),
            "similarity": similarity_of_errors(layers, tried[best], targets).tolist(),
        }
    by_newton = similarity_of_errors(layers, newton, targets)
    by_descent = similarity_of_errors(layers, descent, targets)
    return {
        "errors": _errors(layers, targets, scale),
        "newton": {
            "errors": _errors(newton, targets, scale),
            "similarity": by_newton.tolist(),
            "best": by_newton.argmax(dim=-1).tolist(),
        },
        "descent": {
            "lr": rate,
            "kept": list(DESCENT_KEPT),
            "errors": _errors(descent[..., list(DESCENT_KEPT), :], targets, scale),
            "similarity": by_descent[:, list(DESCENT_KEPT)].tolist(),
            "best": by_descent.argmax(dim=-1).tolist(),
            "highest": by_descent.amax(dim=-1).tolist(),
        },
        "online": online,
        "methods": similarity_of_errors(newton, descent, targets)[:, list(DESCENT_KEPT)].tolist(),
    }


def _errors(
    predictions: Tensor,  # [b, k, n]
    targets: Tensor,  # [b, n]
    scale: Scale,
) -> list[list[float]]:  # [k, n]
    """Mean squared errors at each place, over d."""
    return ((predictions - targets[:, None]).square().mean(dim=0) / scale.dimension).tolist()


def _finite(value: float) -> float:
    return value if value < float("inf") else float("inf")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, probe, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Scale()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=RECORD)
    options = vars(parser.parse_args(arguments))
    out = options.pop("out")
    torch.set_num_threads(1)
    scale, started = Scale(**options), time.perf_counter()
    model, learned = trained(scale, lambda line: print(line, flush=True))
    record = {
        "scale": asdict(scale),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "learned": learned,
        "seconds": round(time.perf_counter() - started),
        **studied(model, scale),
    }
    out.write_text(json.dumps(rounded(record), indent=None, separators=(",", ":")) + "\n")
    print(
        f"{out}: layers match {record['newton']['best']} Newton iterations, {record['descent']['best']} steps"
    )


def rounded(value: Any) -> Any:
    """Numbers to five digits; what is not finite is null."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < float("inf") else None
    return value


if __name__ == "__main__":
    main()
