"""Records: what was measured, decided and concluded, as frozen dataclasses with units in the field names.

Every room may import this one; it imports nothing of ours. ``to_json`` and ``from_json`` are exact
inverses, so a report can be read back by another version of the same schema. A figure that was not
measured is ``None``, and the record says why; it is never zero and never estimated.
"""

from __future__ import annotations

from .adoption import (
    Alternative,
    Audit,
    DataInfo,
    FrontierPoint,
    HeadStatistics,
    LayerAudit,
    MechanismError,
    ModelInfo,
    Plan,
    PlanPoint,
    PlanRow,
)
from .arena import ArenaCost, ArenaLook, ArenaResult, ArenaRun, ArenaTask, ArenaTaskResult
from .base import SCHEMA_VERSION, Config, Environment
from .bench import BenchResult, BenchRow, Change, Comparison, Floor, Growth, Rates
from .choice import Choice, ChoiceRow, Diagnosis, HeadDiagnosis
from .codec import from_json, to_json
from .guard import GuardDrift, GuardEstimate, GuardHistogram, GuardLayer, GuardRate, GuardRates, GuardRecord
from .heal import Drift, HealLayer, HealLook, HealResult
from .report import Indicator, Report, RoiResult, RolloutStage, Verdict
from .study import HeatMap, Line, LineChart, Study, StudyTable
from .text import Cell, shown_options, text_table
from .timing import BreakEven, Timing

__all__ = [
    "SCHEMA_VERSION",
    "Alternative",
    "ArenaCost",
    "ArenaLook",
    "ArenaResult",
    "ArenaRun",
    "ArenaTask",
    "ArenaTaskResult",
    "Audit",
    "BenchResult",
    "BenchRow",
    "BreakEven",
    "Cell",
    "Change",
    "Choice",
    "ChoiceRow",
    "Comparison",
    "Config",
    "DataInfo",
    "Diagnosis",
    "Drift",
    "Environment",
    "Floor",
    "FrontierPoint",
    "Growth",
    "GuardDrift",
    "GuardEstimate",
    "GuardHistogram",
    "GuardLayer",
    "GuardRate",
    "GuardRates",
    "GuardRecord",
    "HeadDiagnosis",
    "HeadStatistics",
    "HealLayer",
    "HealLook",
    "HealResult",
    "HeatMap",
    "Indicator",
    "LayerAudit",
    "Line",
    "LineChart",
    "MechanismError",
    "ModelInfo",
    "Plan",
    "PlanPoint",
    "PlanRow",
    "Rates",
    "Report",
    "RoiResult",
    "RolloutStage",
    "Study",
    "StudyTable",
    "Timing",
    "Verdict",
    "from_json",
    "shown_options",
    "text_table",
    "to_json",
]
