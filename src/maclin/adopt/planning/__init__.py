"""From an audit to a plan: what each layer is to become, and what that costs."""

from maclin.adopt.planning.costs import EXACT, Costs, Latencies, measure_costs, relative_cost
from maclin.adopt.planning.decide import plan
from maclin.adopt.planning.files import load_plan, save_plan
from maclin.adopt.planning.order import Step, frontier_order

__all__ = [
    "EXACT",
    "Costs",
    "Latencies",
    "Step",
    "frontier_order",
    "load_plan",
    "measure_costs",
    "plan",
    "relative_cost",
    "save_plan",
]
