"""Healing: a converted model is brought back to its original, by attention transfer and distillation."""

from .drift import drift, unknown_id_of
from .run import LAST_NAME, heal
from .settings import HealRecipe

__all__ = ["LAST_NAME", "HealRecipe", "drift", "heal", "unknown_id_of"]
