"""Errors of the house: each message names what was wanted, what was got, and what to pass instead."""

from __future__ import annotations


class MaclinError(Exception):
    """Base of every error that maclin raises on purpose."""


class CapabilityError(MaclinError, ValueError):
    """A mechanism was asked for something it cannot do; nothing falls back in silence."""


class OptionError(MaclinError, ValueError):
    """An option, name or configuration is not valid."""


class InputError(MaclinError, ValueError):
    """A tensor, mask or sequence description does not have the form that the contract asks for."""
