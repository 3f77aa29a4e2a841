"""The main job: a real model, real documents, every mechanism, one verdict."""

from .run import DEFAULT_LENGTHS, ProofOfConcept, run

__all__ = ["DEFAULT_LENGTHS", "ProofOfConcept", "run"]
