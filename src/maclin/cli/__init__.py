"""The ``maclin`` command: parses, calls, prints; no logic."""

from .app import main

__all__ = ["main"]
