"""The main job: a real model, real documents, every mechanism, one verdict."""

from .run import ProofOfConcept, run

__all__ = ["ProofOfConcept", "run"]
