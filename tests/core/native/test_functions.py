"""The kernels' own exp, log, sin and cos, in units in the last place of float32, against float64."""

import ctypes

import numpy as np
import pytest

from maclin.core.native.library import library

POINTER = ctypes.POINTER(ctypes.c_float)


def called(name: str, x: np.ndarray, outputs: int = 1) -> list[np.ndarray]:
    kernels = library()
    assert kernels is not None
    x = np.ascontiguousarray(x, dtype=np.float32)
    found = [np.empty_like(x) for _ in range(outputs)]
    pointers = [a.ctypes.data_as(POINTER) for a in (x, *found)]
    getattr(kernels, name)(*pointers, ctypes.c_int64(len(x)))
    return found


def ulps(got: np.ndarray, exact: np.ndarray) -> float:
    return float(np.max(np.abs(got - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)))


def grid(low: float, high: float, count: int = 1 << 20) -> np.ndarray:
    return np.linspace(low, high, count).astype(np.float32)


def test_exp():
    x = grid(-87.3, 88.7)
    assert ulps(called("maclin_exp", x)[0], np.exp(x.astype(np.float64))) < 1.5
    tail = grid(-110, -87.3)
    assert np.abs(called("maclin_exp", tail)[0] - np.exp(tail.astype(np.float64))).max() < 1.5e-45
    special = np.array([0.0, -np.inf, np.inf, np.nan, 89.0, 1e30, -1e30, -0.0] * 2)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(called("maclin_exp", special)[0], np.exp(special.astype(np.float32)))


def test_log():
    x = np.exp(np.linspace(-80, 80, 1 << 20)).astype(np.float32)
    assert ulps(called("maclin_log", x)[0], np.log(x.astype(np.float64))) < 1.5
    near = grid(0.7, 1.5)
    exact = np.log(near.astype(np.float64))
    assert np.abs(called("maclin_log", near)[0] - exact).max() < 6e-8
    assert called("maclin_log", np.ones(16))[0].max() == 0.0


@pytest.mark.parametrize("limit", [1.0, 30.0, 8000.0])
def test_sin_and_cos(limit):
    x = grid(-limit, limit)
    s, c = called("maclin_sincos", x, 2)
    wide = x.astype(np.float64)
    # absolute: near a zero of either, only that is to be had
    assert np.abs(s - np.sin(wide)).max() < 1.2e-7
    assert np.abs(c - np.cos(wide)).max() < 1.2e-7


def test_sin_and_cos_of_what_is_huge_or_no_number():
    x = np.array([1e5, -3e7, 1e30, np.inf, np.nan, 9000.0, 0.0, -0.0] * 2, dtype=np.float32)
    s, c = called("maclin_sincos", x, 2)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(s, np.sin(x.astype(np.float64)), atol=1e-6)
        np.testing.assert_allclose(c, np.cos(x.astype(np.float64)), atol=1e-6)
