"""An existing model made linear: capture, audit, plan, convert."""

from maclin.adopt.capture import Captured, capture
from maclin.adopt.choose import Chosen, choose, tensor_candidates
from maclin.adopt.convert import calibrated_layers, convert_, restore_
from maclin.adopt.documents import Documents, python_documents, read_documents
from maclin.adopt.guard import Flag, Guard, GuardWarning, guard, guard_rates, unguard
from maclin.adopt.heal import HealRecipe, drift, heal, unknown_id_of
from maclin.adopt.load import Loaded, load, packaged_model
from maclin.adopt.measuring.audit import audit
from maclin.adopt.measuring.candidates import default_candidates, default_config, plan_candidates
from maclin.adopt.measuring.diagnose import diagnose
from maclin.adopt.measuring.layers import diagnose_layers
from maclin.adopt.planning import (
    Costs,
    Latencies,
    Step,
    frontier_order,
    load_plan,
    measure_costs,
    plan,
    relative_cost,
    save_plan,
)
from maclin.adopt.saving import load_converted, save_converted

__all__ = [
    "Captured",
    "Chosen",
    "Costs",
    "Documents",
    "Flag",
    "Guard",
    "GuardWarning",
    "HealRecipe",
    "Latencies",
    "Loaded",
    "Step",
    "audit",
    "calibrated_layers",
    "capture",
    "choose",
    "convert_",
    "default_candidates",
    "default_config",
    "diagnose",
    "diagnose_layers",
    "drift",
    "frontier_order",
    "guard",
    "guard_rates",
    "heal",
    "load",
    "load_converted",
    "load_plan",
    "measure_costs",
    "packaged_model",
    "plan",
    "plan_candidates",
    "python_documents",
    "read_documents",
    "relative_cost",
    "restore_",
    "save_converted",
    "save_plan",
    "tensor_candidates",
    "unguard",
    "unknown_id_of",
]
