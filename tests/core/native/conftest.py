"""Compiled kernels, and both ways beside each other: by them and in torch."""

import contextlib
from collections.abc import Iterator

import pytest

from maclin.core import native


@pytest.fixture(scope="package", autouse=True)
def kernels() -> None:
    """Wait for them; where there is no compiler, there is nothing to test."""
    if not native.wait_for_kernels():
        pytest.skip(f"no compiled kernels: {native.native_status().reason}")


@contextlib.contextmanager
def in_torch() -> Iterator[None]:
    """Without compiled kernels."""
    native.use_native(False)
    try:
        yield
    finally:
        native.use_native(True)
        assert native.wait_for_kernels()
