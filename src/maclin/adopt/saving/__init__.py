"""Converted models as folders that load again."""

from maclin.adopt.saving.manifest import MANIFEST
from maclin.adopt.saving.store import load_converted, save_converted

__all__ = ["MANIFEST", "load_converted", "save_converted"]
