"""An existing model made linear: capture, audit, plan, convert."""

from maclin.adopt.audit import audit
from maclin.adopt.candidates import default_candidates, default_config
from maclin.adopt.capture import Captured, capture
from maclin.adopt.choose import Chosen, choose, tensor_candidates
from maclin.adopt.convert import calibrated_layers, convert_, restore_
from maclin.adopt.diagnose import diagnose, diagnose_layers
from maclin.adopt.documents import Documents, python_documents, read_documents
from maclin.adopt.load import Loaded, load, packaged_model
from maclin.adopt.plan import Step, frontier_order, load_plan, plan, relative_cost, save_plan

__all__ = [
    "Captured",
    "Chosen",
    "Documents",
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
    "frontier_order",
    "load",
    "load_plan",
    "packaged_model",
    "plan",
    "python_documents",
    "read_documents",
    "relative_cost",
    "restore_",
    "save_plan",
    "tensor_candidates",
]
