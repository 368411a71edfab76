"""Advice: whether OptEx pays on a user's own model, measured there."""

from optex.advice.answer import Advice
from optex.advice.candidate import Candidate
from optex.advice.function import advise

__all__ = ["Advice", "Candidate", "advise"]
