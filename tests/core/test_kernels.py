"""Kernels against exact rationals, closed forms and sums of their series."""

import math
from fractions import Fraction
from functools import partial

import pytest
import torch

from maclin.core.errors import OptionError
from maclin.core.kernels import KERNELS, Kernel, kernel
from maclin.core.mechanisms.macformer import Macformer
from maclin.core.mechanisms.taylor import Taylor


def falling_half(n: int) -> Fraction:
    """The coefficient of t^n in 2 - sqrt(1 - t), from the binomial series."""
    if n == 0:
        return Fraction(1)
    binomial = Fraction(1)  # of 1/2 over n
    for i in range(n):
        binomial *= (Fraction(1, 2) - i) / (i + 1)
    return -((-1) ** n) * binomial


EXACT = {
    "exp": lambda n: Fraction(1, math.factorial(n)),
    "inv": lambda n: Fraction(1),
    "log": lambda n: Fraction(1, max(n, 1)),
    "sqrt": falling_half,
    "trigh": lambda n: Fraction(1, math.factorial(n)),
}
CLOSED = {
    "exp": math.exp,
    "inv": lambda t: 1 / (1 - t),
    "log": lambda t: 1 - math.log(1 - t),
    "sqrt": lambda t: 2 - math.sqrt(1 - t),
    "trigh": lambda t: math.sinh(t) + math.cosh(t),
}
RADIUS = {"exp": math.inf, "inv": 1.0, "log": 1.0, "sqrt": 1.0, "trigh": math.inf}


def test_the_five_kernels():
    assert set(KERNELS) == set(EXACT)
    assert {name: row.name for name, row in KERNELS.items()} == {name: name for name in KERNELS}
    assert {name: row.radius for name, row in KERNELS.items()} == RADIUS


@pytest.mark.parametrize("name", EXACT)
def test_coefficients_are_the_exact_rationals(name):
    for n in range(64):
        assert KERNELS[name].coefficient(n) == pytest.approx(float(EXACT[name](n)), rel=1e-13), n


def test_sqrt_has_the_published_first_coefficients():
    published = [Fraction(1), Fraction(1, 2), Fraction(1, 8), Fraction(1, 16), Fraction(5, 128)]
    assert [falling_half(n) for n in range(5)] == published


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("closed_form", [True, False])
def test_values_match_the_closed_form(name, closed_form):
    row = KERNELS[name] if closed_form else Kernel(name, KERNELS[name].coefficient, KERNELS[name].radius)
    t = torch.linspace(-0.95, 0.95, 39, dtype=torch.float64)
    if math.isinf(row.radius):
        t = 6 * t
    wanted = torch.tensor([CLOSED[name](float(x)) for x in t], dtype=torch.float64)
    torch.testing.assert_close(row(t), wanted, rtol=1e-12, atol=1e-12)


def test_trigh_is_exp():
    assert [KERNELS["trigh"].coefficient(n) for n in range(64)] == [KERNELS["exp"].coefficient(n) for n in range(64)]
    t = torch.linspace(-3, 3, 31, dtype=torch.float64)
    torch.testing.assert_close(KERNELS["trigh"](t), KERNELS["exp"](t), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("degrees", [(0, 10), (60,), (3, 40, 41)])
def test_series_with_gaps_are_summed_whole(degrees):
    sparse = Kernel("sparse", lambda n: 2.0 if n in degrees else 0.0)
    t = torch.tensor([-1.1, 0.0, 0.3, 1.0, 1.1], dtype=torch.float64)
    torch.testing.assert_close(sparse(t), sum(2.0 * t**n for n in degrees), rtol=1e-13, atol=1e-300)


def test_a_series_far_from_zero():
    cosh = Kernel("cosh", lambda n: 0.0 if n % 2 else 1 / math.factorial(n))
    t = torch.tensor([-40.0, -5.0, 0.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(cosh(t), t.cosh(), rtol=1e-12, atol=0)


def test_the_series_has_a_gradient_and_keeps_shape_and_dtype():
    cosh = Kernel("cosh", lambda n: 0.0 if n % 2 else 1 / math.factorial(n))
    t = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3).requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(cosh(t).sum(), t)[0], t.detach().sinh(), rtol=1e-12, atol=1e-14)
    assert cosh(torch.empty(0, 3)).shape == (0, 3)
    assert cosh(torch.ones(2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("row", "t"),
    [
        (Kernel("harmonic", lambda n: 1.0, 1.0), 1.0),  # at the radius
        (Kernel("wild", lambda n: 1.0, 1.0), 2.0),  # beyond it
        (Kernel("early", lambda n: 1 / math.factorial(n)), 800.0),  # the coefficients end in zeros by underflow
    ],
)
def test_a_series_that_does_not_converge_is_refused(row, t):
    with pytest.raises(OptionError, match=f"kernel '{row.name}': the series has not converged at .t. = {t:g}"):
        row(torch.tensor([0.1, -t], dtype=torch.float64))


@pytest.mark.parametrize(
    ("coefficient", "radius", "message"),
    [
        (lambda n: -0.5 if n == 3 else 1.0, 1.0, r"a_3 = -0.5 is negative; wanted a_n >= 0.*not positive definite"),
        (lambda n: math.inf if n == 2 else 1.0, 1.0, r"a_2 is inf; wanted a finite number"),
        (lambda n: math.nan if n == 5 else 1.0, 1.0, r"a_5 is nan; wanted a finite number"),
        (lambda n: 0.0, 1.0, r"all coefficients are zero"),
        (lambda n: 1.0, 0.0, r"radius 0.0 is not positive"),
        (lambda n: 1.0, -1.0, r"radius -1.0 is not positive"),
        (lambda n: 1.0, math.nan, r"radius nan is not positive"),
    ],
)
def test_what_is_no_kernel_is_refused_with_the_reason(coefficient, radius, message):
    with pytest.raises(OptionError, match=f"kernel 'bad': {message}"):
        Kernel("bad", coefficient, radius)


def test_sin_and_tanh_have_negative_coefficients():
    def sine(n: int) -> float:
        return (-1) ** (n // 2) / math.factorial(n) if n % 2 else 0.0

    with pytest.raises(OptionError, match=r"a_3 = -0\.166667 is negative"):
        Kernel("sin", sine)


def test_names_and_kernels_are_both_taken():
    own = Kernel("own", lambda n: 1.0, 1.0)
    assert kernel(own) is own
    assert kernel("log") is KERNELS["log"]


@pytest.mark.parametrize("use", [kernel, partial(Macformer, 8, 2, None), partial(Taylor, 8, 2, None)])
def test_an_unknown_name_lists_the_known(use):
    with pytest.raises(OptionError, match="unknown kernel 'gauss'; known are exp, inv, log, sqrt, trigh"):
        use("gauss") if use is kernel else use(kernel="gauss")
