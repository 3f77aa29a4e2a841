"""An existing model made linear: capture, audit, plan, convert."""

from maclin.adopt.audit import audit, default_config
from maclin.adopt.capture import Captured, capture
from maclin.adopt.convert import convert_, restore_
from maclin.adopt.documents import Documents, python_documents, read_documents
from maclin.adopt.load import Loaded, load, packaged_model
from maclin.adopt.plan import Step, frontier_order, load_plan, plan, relative_cost, save_plan

__all__ = [
    "Captured",
    "Documents",
    "Loaded",
    "Step",
    "audit",
    "capture",
    "convert_",
    "default_config",
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
]
