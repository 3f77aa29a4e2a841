"""The main job: a real model, real documents, every mechanism, one verdict; and the plan alone."""

from .planning import PlanJob, plan_model
from .run import DEFAULT_LENGTHS, ProofOfConcept, run

__all__ = ["DEFAULT_LENGTHS", "PlanJob", "ProofOfConcept", "plan_model", "run"]
