"""Measuring what was trained: how good it is, and what it costs."""

from visiondistill.eval.calibration import Bins, fit_temperature, reliability
from visiondistill.eval.classify import Answers, Scores, agreement, calibration_error, collect, evaluate
from visiondistill.eval.cost import Cost, Costs, cost_table, measure_costs
from visiondistill.eval.identity import preprocessing, weights_hash
from visiondistill.eval.report import AccuracyReport, accuracy_report
from visiondistill.models import evaluating

__all__ = [
    "AccuracyReport",
    "Answers",
    "Bins",
    "Cost",
    "Costs",
    "Scores",
    "accuracy_report",
    "agreement",
    "calibration_error",
    "collect",
    "cost_table",
    "evaluate",
    "evaluating",
    "fit_temperature",
    "measure_costs",
    "preprocessing",
    "reliability",
    "weights_hash",
]
