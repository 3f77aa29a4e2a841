"""Turning a library's failure into one sentence: what did not fit in memory, or what did not fit the model."""

from __future__ import annotations

from torch import OutOfMemoryError

from maclin.core.errors import InputError, MaclinError

_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def explained(error: Exception, what: str, wanted: str) -> MaclinError:
    """The error to raise in place of a library's own.

    Args:
        error: what the library raised.
        what: what was being processed, for example "a batch of shape (8, 512)".
        wanted: what it should have fitted, for example "BertModel's inputs".
    """
    if isinstance(error, MemoryError | OutOfMemoryError) or any(sign in str(error).lower() for sign in _SIGNS):
        return MaclinError(f"{what} does not fit in memory; pass fewer or shorter documents at once")
    return InputError(f"wanted {wanted}, got {what} that fails ({type(error).__name__}: {error})")
