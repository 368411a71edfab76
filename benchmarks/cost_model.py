"""How long a round takes on R ranks, and when it beats data parallelism: a model, checked against measurements.

    python benchmarks/ranks.py --json results/distributed/measured.json
    python benchmarks/cost_model.py --measured results/distributed/measured.json --out results/distributed

A round of N proxies on R ranks, P along "proxies" and D = R / P along "data" (docs/distributed.md derives it):

    round = ⌈N / P⌉ gradient(D)                           evaluated at once
          + 2 ⌈N / P⌉ d (1 - 1 / R) itemsize / bandwidth  proxies dealt, gradients collected
          + messages(N) latency(R)                        sums of T0 numbers, one after the other
          + (c0 + c1 N) d / R + algebra                   every rank steps and predicts on its slice

with messages = 3 (N - 1) + 15. Writes ``predicted.json`` and fills the tables of ``README.md`` beside it:
rounds measured here against the model, whose constants are fitted on one rank alone (the price of a message and
of an exchange is taken from loops of nothing else), and predictions for many GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from acceleration import KEYS

from optex.studies.records import read_lines
from optex.studies.tables import fill, markdown_table

FIXED_MESSAGES, MESSAGES_A_STEP = 15, 3


@dataclass(frozen=True)
class Costs:
    """What a round is made of, in seconds.

    Attributes:
        message: a small sum over all ranks.
        byte: an all-to-all, for each byte that a rank sends.
        coordinate: arithmetic of a round on one coordinate, whatever N is.
        coordinate_and_step: for each of the N steps.
        algebra: on T0 × T0 matrices, which every rank does.
    """

    message: float
    byte: float
    coordinate: float
    coordinate_and_step: float
    algebra: float


def round_seconds(
    costs: Costs, *, dimension: int, parallelism: int, proxies: int, ranks: int, gradient: float
) -> float:
    """The model in float32; ``gradient`` in seconds, on the ranks that share one."""
    rows = -(-parallelism // proxies)
    sent = 2 * rows * dimension * 4 * (ranks - 1) / ranks
    messages = (FIXED_MESSAGES + MESSAGES_A_STEP * (parallelism - 1)) * (ranks > 1)
    arithmetic = (costs.coordinate + costs.coordinate_and_step * parallelism) * dimension / ranks
    return rows * gradient + sent * costs.byte + messages * costs.message + arithmetic + costs.algebra


# ---------------------------------------------------------------------- checked against measurements


def fitted(measured: dict[str, Any]) -> tuple[dict[str, float], dict[int, float]]:
    """Arithmetic from the smallest and the largest runs on one rank: shared constants, and algebra by N."""
    runs = next(job["runs"] for job in measured["jobs"] if job["ranks"] == 1)
    small, large = min(r["dimension"] for r in runs), max(r["dimension"] for r in runs)
    beyond = {
        (r["dimension"], r["parallelism"]): r["seconds"] - r["parallelism"] * measured["meta"]["pause"]
        for r in runs
    }
    few, many = sorted({r["parallelism"] for r in runs})
    slopes = {n: (beyond[large, n] - beyond[small, n]) / (large - small) for n in (few, many)}
    step = max((slopes[many] - slopes[few]) / (many - few), 0.0)
    algebra = {n: beyond[small, n] for n in (few, many)}
    return {"coordinate": slopes[few] - few * step, "coordinate_and_step": step}, algebra


def validated(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Every run beside the model's prediction."""
    constants, algebra = fitted(measured)
    rows = []
    for job in measured["jobs"]:
        ranks = job["ranks"]
        # More ranks than cores take turns; a pause needs no core.
        turns = max(1.0, ranks / measured["meta"]["cores"])
        longest = 4 * max(r["dimension"] for r in job["runs"]) * (ranks - 1) / ranks
        for run in job["runs"]:
            costs = Costs(
                message=job["message"],
                byte=job["exchange"] / longest if ranks > 1 else 0.0,
                coordinate=turns * constants["coordinate"],
                coordinate_and_step=turns * constants["coordinate_and_step"],
                algebra=turns * algebra[run["parallelism"]],
            )
            predicted = round_seconds(
                costs,
                dimension=run["dimension"],
                parallelism=run["parallelism"],
                proxies=ranks,
                ranks=ranks,
                gradient=measured["meta"]["pause"],
            )
            rows.append({**run, "predicted": predicted})
    return rows


def validation_table(rows: list[dict[str, Any]]) -> str:
    """Bytes and seconds of every run, measured and by formula."""
    head = ("ranks", "d", "N", "bytes sent, measured / formula", "sums and headers, %", "loopback / sent")
    lines = []
    for r in rows:
        messages = FIXED_MESSAGES + MESSAGES_A_STEP * (r["parallelism"] - 1)
        traffic = (
            [
                f"{r['sent'] / r['formula']:.3f}",
                f"{100 * r['small'] / r['sent']:.2g}",
                f"{r['loopback'] / r['all ranks sent']:.2f}",
                f"{r['messages']:.0f} ({messages})",
            ]
            if r["ranks"] > 1
            else ["–"] * 4
        )  # one rank sends nothing
        seconds = [f"{1e3 * r['seconds']:.0f}", f"{1e3 * r['predicted']:.0f}"]
        ratio = f"{r['predicted'] / r['seconds']:.2f}"
        lines.append([str(r["ranks"]), f"{r['dimension']:,}", str(r["parallelism"]), *traffic, *seconds, ratio])
    return markdown_table([*head, "messages (model)", "ms a round", "model", "ratio"], lines)


def agreement(rows: list[dict[str, Any]], within: float = 0.15) -> str:
    """In how many of the measurements on several ranks the model is right, in words."""
    ratios = [r["seconds"] / r["predicted"] for r in rows if r["ranks"] > 1]
    near = sum(abs(ratio - 1) <= within for ratio in ratios)
    return (
        f"Seconds on several ranks are within {100 * within:.0f} % of the model in {near} rows of "
        f"{len(ratios)}, and at most {100 * (max(ratios) - 1):.0f} % above it."
    )


# ---------------------------------------------------------------------- many GPUs


@dataclass(frozen=True)
class Cluster:
    """Assumptions, none of them measured here.

    Attributes:
        flops: a GPU's, that training reaches: 40 % of an H100's 989 · 10¹² in bfloat16.
        memory_bandwidth: bytes a second that elementwise work and matrix-vector products reach.
        bandwidth: bytes a second a GPU sends, while it receives as many: 400 Gb/s, of which 80 % arrive.
        hop: seconds; a small sum over R ranks takes log2(R) of them, and one to start it.
        launch: seconds of the host for each step drafted or replayed.
        algebra: seconds a round for what is T0 × T0.
        least_gradient: seconds; the kernels of a forward and backward pass take this to start, however small.
        tokens: in a sequence, which data parallelism does not cut.
    """

    flops: float = 0.4 * 989e12
    memory_bandwidth: float = 2.4e12
    bandwidth: float = 40e9
    hop: float = 15e-6
    launch: float = 1.5e-3
    algebra: float = 30e-3
    least_gradient: float = 10e-3
    tokens: int = 1024

    def gradient(self, dimension: int, sequences: int, gpus: int) -> float:
        """6 d tokens operations for a forward and backward pass, spread over whole sequences."""
        share = -(-sequences // gpus)
        return max(6 * dimension * share * self.tokens / self.flops, self.least_gradient)

    def costs(self, ranks: int, history: int) -> Costs:
        """A step reads the T0 rows of iterates and of gradients twice in the draft and twice in the replay."""
        number = 4 / self.memory_bandwidth
        return Costs(
            message=self.hop * (1 + math.log2(ranks)),
            byte=1 / self.bandwidth,
            coordinate=number * 8 * history,  # remembering, Gram matrices, judging
            coordinate_and_step=number * (8 * history + 60),  # 60: Adam twice, copies, the evaluator's passes
            algebra=self.algebra,
        )

    def data_parallel(self, dimension: int, sequences: int, gpus: int) -> float:
        """A step: a gradient in parts, an all-reduce that hides behind the backward pass, a split update."""
        used = min(gpus, sequences)
        sent = 2 * 4 * dimension * (used - 1) / used
        update = 4 * 12 * dimension / used / self.memory_bandwidth
        latency = 2 * self.hop * (1 + math.log2(used))
        forward = self.gradient(dimension, sequences, used) / 3
        return forward + max(2 * forward, sent / self.bandwidth) + latency + update

    def optex(self, dimension: int, sequences: int, gpus: int, proxies: int) -> float:
        """A round with N = P proxies, each shared by D = R / P GPUs; host and history included."""
        history = 16 if proxies <= 8 else 32
        data = gpus // proxies
        used = proxies * min(data, sequences)
        return 2 * proxies * self.launch + round_seconds(
            self.costs(used, history),
            dimension=dimension,
            parallelism=proxies,
            proxies=proxies,
            ranks=used,
            gradient=self.gradient(dimension, sequences, used // proxies),
        )


# d: sequences of a batch past which more do not help much, in the range that language models are trained with.
SIZES = {10**7: 64, 10**8: 256, 10**9: 512, 10**10: 2048}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
PROXIES = (2, 4, 8, 16, 32)
# Acceleration by N on digits with Adam, results/acceleration: minibatches of 32 at 1e-3 and at 1e-2.
CASES = {"adam 0.001": "steady", "adam 0.01": "rough"}


def accelerations(runs: Path) -> dict[str, dict[int, float]]:
    """Mean acceleration of ``optex`` by N for the two cases; at N = 2 on a line from 1 to that at N = 4."""
    found: dict[str, dict[int, list[float]]] = {name: {} for name in CASES.values()}
    for run in read_lines(runs, KEYS):
        case, _, base = run["case"].partition(", ")
        if case == "digits-mlp-32" and base in CASES and run["method"] == "optex":
            found[CASES[base]].setdefault(run["N"], []).append(run["acceleration"])
    means = {name: {n: sum(a) / len(a) for n, a in by_n.items()} for name, by_n in found.items()}
    for by_n in means.values():
        by_n[2] = 1 + (by_n[4] - 1) / 3
    return means


def predictions(cluster: Cluster, gains: dict[str, dict[int, float]]) -> list[dict[str, Any]]:
    """For every size and number of GPUs: a data-parallel step, the rounds of each N, and the best of them."""
    rows = []
    for dimension, sequences in SIZES.items():
        for gpus in GPUS:
            step = cluster.data_parallel(dimension, sequences, gpus)
            rounds = {p: cluster.optex(dimension, sequences, gpus, p) for p in PROXIES if p <= gpus}
            row: dict[str, Any] = {
                "dimension": dimension,
                "sequences": sequences,
                "gpus": gpus,
                "data-parallel step": step,
                "rounds": rounds,
                "break-even": {p: seconds / step for p, seconds in rounds.items()},
            }
            for name, by_n in gains.items():
                best = max(rounds, key=lambda p, by_n=by_n, rounds=rounds: by_n[p] / rounds[p])
                row[name] = {"N": best, "speed-up": by_n[best] * step / rounds[best]}
            rows.append(row)
    return rows


def prediction_table(rows: list[dict[str, Any]]) -> str:
    """Seconds, break-even steps and speed-ups."""
    head = ("d", "sequences", "GPUs", "data-parallel step, ms", "round at N = 4, ms", "N = 16, ms")
    head += ("break-even steps at N = 4", "N = 16", "best N, speed-up (steady)", "(rough)")
    lines = []
    for r in rows:
        size = [f"{r['dimension']:.0e}", str(r["sequences"]), str(r["gpus"])]
        step = f"{1e3 * r['data-parallel step']:.0f}"
        rounds = [f"{1e3 * r['rounds'][p]:.0f}" if p in r["rounds"] else "–" for p in (4, 16)]
        even = [f"{r['break-even'][p]:.1f}" if p in r["break-even"] else "–" for p in (4, 16)]
        best = [f"{r[name]['N']}, {r[name]['speed-up']:.2f}" for name in CASES.values()]
        lines.append([*size, step, *rounds, *even, *best])
    return markdown_table(head, lines)


def acceleration_table(gains: dict[str, dict[int, float]]) -> str:
    """The accelerations that the speed-ups assume."""
    sizes = sorted(next(iter(gains.values())))
    rows = [
        [base, *(f"{gains[name][n]:.2f}" for n in sizes)]
        for base, name in ((f"{base} (*{name}*)", name) for base, name in CASES.items())
    ]
    return markdown_table(["acceleration measured", *(f"N = {n}" for n in sizes)], rows)


def main() -> None:
    """Validate, predict, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent.parent / "results"
    parser.add_argument("--measured", type=Path, default=here / "distributed" / "measured.json")
    parser.add_argument("--runs", type=Path, default=here / "acceleration" / "runs.jsonl")
    parser.add_argument("--out", type=Path, default=here / "distributed")
    options = parser.parse_args()
    measured = json.loads(options.measured.read_text())
    rows, cluster = validated(measured), Cluster()
    gains = accelerations(options.runs)
    predicted = predictions(cluster, gains)
    tables = {
        "validation": validation_table(rows),
        "agreement": agreement(rows),
        "accelerations": acceleration_table(gains),
        "predictions": prediction_table(predicted),
    }
    print("\n\n".join(tables.values()))
    written = {
        "assumptions": asdict(cluster),
        "accelerations": gains,
        "validation": rows,
        "predictions": predicted,
    }
    (options.out / "predicted.json").write_text(json.dumps(written, indent=1) + "\n")
    if (options.out / "README.md").exists():
        fill(options.out / "README.md", tables)


if __name__ == "__main__":
    main()
