"""The figures of the OptEx paper, reproduced: the runs, their record, the picture and the page."""

from __future__ import annotations

from optex.studies.reproduce.claims import Check, checks
from optex.studies.reproduce.numbers import CurveSummary, numbers
from optex.studies.reproduce.pages import write_page
from optex.studies.reproduce.pictures import draw
from optex.studies.reproduce.record import (
    PlannedRun,
    Record,
    meta,
    planned_runs,
    read_record,
    run_curve,
    run_missing,
    write_record,
)
from optex.studies.reproduce.studies import FIGURES, SCALES, Choice, Curve, Figure, Section, View, make_figure

__all__ = [
    "FIGURES",
    "SCALES",
    "PlannedRun",
    "Check",
    "Choice",
    "Curve",
    "Figure",
    "CurveSummary",
    "Record",
    "Section",
    "View",
    "planned_runs",
    "checks",
    "draw",
    "make_figure",
    "meta",
    "numbers",
    "read_record",
    "run_curve",
    "run_missing",
    "write_page",
    "write_record",
]
