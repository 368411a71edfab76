"""ScaleBiO: weights of data sources by a minimax penalty, and LISA, which trains few layers at a time."""

from optex.sources.scalebio.layers import LayerSampler, NumberedBatch
from optex.sources.scalebio.penalty import MinimaxPenaltySource
from optex.sources.scalebio.weights import SourceWeights

__all__ = ["LayerSampler", "MinimaxPenaltySource", "NumberedBatch", "SourceWeights"]
