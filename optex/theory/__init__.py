"""The paper's quantities, measured on a run: calibration of predictions, information gain, bounds."""

from optex.theory.bounds import error_bound, stationarity_bound
from optex.theory.calibration import Calibration, CalibrationSummary, Comparison
from optex.theory.information import InformationGain, information_gain

__all__ = [
    "Calibration",
    "CalibrationSummary",
    "Comparison",
    "InformationGain",
    "error_bound",
    "information_gain",
    "stationarity_bound",
]
