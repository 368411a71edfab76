"""Several processes that work on one run: ranks, split vectors, checkpoints.

``optex.distributed.checkpoint`` is imported by name: it takes torch's checkpointing with it, seconds of import.
"""

from optex.distributed.layout import lay_out
from optex.distributed.ranks import Ranks, Traffic

__all__ = ["Ranks", "Traffic", "lay_out"]
