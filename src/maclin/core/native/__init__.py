"""Compiled kernels for the CPU: features of a block in vector registers, contracted there.

The source is C++ beside this file; it is compiled once on the machine that runs it, by the compiler that is found
there, and kept. Without one, the blocked torch path runs. See docs/native.md.
"""

from __future__ import annotations

from .library import NativeStatus, native_status, use_native, wait_for_kernels

__all__ = ["NativeStatus", "native_status", "use_native", "wait_for_kernels"]
