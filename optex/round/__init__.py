"""A round, told in its order: draft, evaluate, remember, replay, keep."""

from optex.round.acceptance import SELECTIONS, Acceptance, Last, LowestLoss, SmallestGradient, WithinTolerance
from optex.round.alone import alone
from optex.round.describe import described
from optex.round.loop import RoundLoop
from optex.round.predictor import Predictor, default_history_size
from optex.round.record import RoundRecord
from optex.round.report import RoundReport
from optex.round.round import Rounds
from optex.round.stream import ReportStream, streamed
from optex.round.stride import read_stride
from optex.round.window import PlannedStep, Progress, RoundRequest

__all__ = [
    "SELECTIONS",
    "Acceptance",
    "Last",
    "LowestLoss",
    "PlannedStep",
    "Predictor",
    "Progress",
    "ReportStream",
    "RoundLoop",
    "RoundRecord",
    "RoundReport",
    "RoundRequest",
    "Rounds",
    "SmallestGradient",
    "WithinTolerance",
    "alone",
    "default_history_size",
    "described",
    "read_stride",
    "streamed",
]
