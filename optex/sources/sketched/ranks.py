"""All-reduce of sketches: s numbers for a bucket, as a communication hook of DistributedDataParallel."""

# No postponed annotations: DistributedDataParallel compares the hook's with the types themselves.
from typing import Any

import torch
import torch.distributed as dist

from optex.checks import saved_integer
from optex.sources.sketched.sketch import Sketch

__all__ = ["SketchState", "sketched_hook"]

_BUCKETS = 1 << 20  # more than a model has: each pair of step and bucket gets a number of its own


class SketchState:
    """What :func:`sketched_hook` has to know, and what it has counted.

    Args:
        sketch: the same on every rank. Its size is that of the message of each bucket; a bucket that is no
            longer is sent as it is.
        process_group: the group of the all-reduce; None is the default group.

    Attributes:
        number: steps so far: t of the next R_t.
        bytes_sent: handed to all-reduce by this rank so far.
        bytes_plain: what it would have been without a sketch.

    Raises:
        TypeError: ``sketch`` is no ``Sketch``.
    """

    def __init__(self, sketch: Sketch, process_group: Any = None) -> None:
        if not isinstance(sketch, Sketch):
            raise TypeError(f"SketchState: sketch must be a Sketch, got {type(sketch).__name__}")
        self.sketch = sketch
        self.process_group = process_group
        self.number: int = 0
        self.bytes_sent: int = 0
        self.bytes_plain: int = 0

    def state_dict(self) -> dict[str, int]:
        """The counts, which a resumed run needs to draw the same matrices."""
        return {"number": self.number, "bytes_sent": self.bytes_sent, "bytes_plain": self.bytes_plain}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from saved counts.

        Raises:
            ValueError: an entry is missing or no count; nothing has changed.
        """
        found = {name: saved_integer("SketchState", state, name) for name in self.state_dict()}
        self.number, self.bytes_sent, self.bytes_plain = (found[name] for name in self.state_dict())


def sketched_hook(state: SketchState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average gradients by an all-reduce of their sketches: Rᵀ mean(R g), R shared by all ranks.

    ``ddp.register_comm_hook(optex.SketchState(optex.Sketch("srht", 4096)), optex.sketched_hook)``, before the
    first backward pass. Averaging over ranks does not reduce the sketch's noise, because all ranks share R:
    take a rate 1 + ω times smaller, ω that of a bucket.

    Args:
        state: of this rank.
        bucket: gradients of some of the parameters, one vector.

    Source: Song, Wang, Yu, Zhang, ICML 2023, arXiv 2210.08371.
    """
    flat = bucket.buffer()
    size, number = state.sketch.size, state.number * _BUCKETS + bucket.index()
    group = state.process_group if state.process_group is not None else dist.group.WORLD
    plain = flat.numel() <= size
    message = flat if plain else state.sketch.sk(flat, number)
    message.div_(dist.get_world_size(group))
    state.bytes_sent += message.nbytes
    state.bytes_plain += flat.nbytes
    if bucket.is_last():
        state.number += 1
    work = dist.all_reduce(message, group=group, async_op=True)
    assert work is not None

    def averaged(future: torch.futures.Future) -> torch.Tensor:
        total = future.value()[0]
        return total if plain else state.sketch.desk(total, flat.numel(), number)

    return work.get_future().then(averaged)
