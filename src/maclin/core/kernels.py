"""Dot-product kernels f(t) = sum_n a_n t^n as rows of one table.

A kernel is its coefficients and the domain in which the series converges. ``KERNELS`` holds the five of
Macformer; a sixth needs no registration: pass a ``Kernel`` wherever a name is taken.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import OptionError

_CHECKED_DEGREES = 64  # random degrees beyond this have probability below 2^-64
_MAX_DEGREES = 10_000  # of a series that is summed
_SHIFT_DEGREES = 40  # of a series that is compared with that of exp


@dataclass(frozen=True)
class Kernel:
    """A dot-product kernel with non-negative Maclaurin coefficients.

    f(t) = sum_n a_n t^n for |t| < radius. By Schoenberg's theorem a_n >= 0 is exactly what makes
    f(<x, y>) positive definite in every dimension, and what random Maclaurin features need: their scale
    is the square root of a_n.

    Args:
        name: what messages and records call it.
        coefficient: n -> a_n, for every n >= 0.
        radius: bound of |t|; infinite where the series converges everywhere.
        closed_form: t -> f(t) in closed form; None sums the series.

    Raises:
        OptionError: a coefficient is negative or not finite, all are zero, or the radius is not positive.

    Example:
        >>> cosh = Kernel("cosh", lambda n: 0.0 if n % 2 else 1 / math.factorial(n))
        >>> maclin.mechanism("macformer", head_dim=64, num_heads=8, kernel=cosh)
    """

    name: str
    coefficient: Callable[[int], float]
    radius: float = math.inf
    closed_form: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        values = [float(self.coefficient(n)) for n in range(_CHECKED_DEGREES)]
        for n, value in enumerate(values):
            if not math.isfinite(value):
                raise OptionError(
                    f"kernel {self.name!r}: a_{n} is {value}; wanted a finite number, so give coefficients of a "
                    "power series that converges"
                )
            if value < 0:
                raise OptionError(
                    f"kernel {self.name!r}: a_{n} = {value:g} is negative; wanted a_n >= 0, because random Maclaurin "
                    "features scale with the square root of a_n and a kernel with a negative coefficient is not "
                    "positive definite; drop the term or use another kernel"
                )
        if not any(values):
            raise OptionError(f"kernel {self.name!r}: all coefficients are zero; wanted at least one a_n > 0")
        if not self.radius > 0:
            raise OptionError(f"kernel {self.name!r}: radius {self.radius} is not positive; wanted the bound of |t|")

    @property
    def is_exponential(self) -> bool:
        """Whether f(s + t) is f(s) f(t), as for exp and trigh: then a shift of q or k is a factor of f."""
        return all(
            math.isclose(self.coefficient(n) * math.factorial(n), 1.0, rel_tol=1e-9) for n in range(_SHIFT_DEGREES)
        )

    def __call__(self, t: Tensor) -> Tensor:
        """f(t), elementwise; the series is summed until its terms vanish where there is no closed form.

        Raises:
            OptionError: the series has not converged after 10,000 degrees at the largest |t|.
        """
        if self.closed_form is not None:
            return self.closed_form(t)
        largest = float(t.detach().abs().max()) if t.numel() else 0.0
        coefficients: list[float] = []
        last = 0  # the last degree whose term is not negligible
        for n in range(_MAX_DEGREES):
            coefficients.append(float(self.coefficient(n)))
            if not _negligible(coefficients[n], n, largest):
                last = n
            # many kernels have only even terms, some only a few: as many again must vanish
            if n >= max(2 * last, _CHECKED_DEGREES - 1):
                if 0 < coefficients[last] < sys.float_info.min:
                    break  # what follows has vanished by underflow, not by convergence
                total = torch.zeros_like(t)
                for a in reversed(coefficients[: last + 1]):
                    total = total * t + a
                return total
        raise OptionError(
            f"kernel {self.name!r}: the series has not converged at |t| = {largest:g}; wanted a smaller |t|, below "
            f"{self.radius:g}, or a kernel with a closed_form"
        )


def _negligible(coefficient: float, degree: int, largest: float) -> bool:
    """Whether a_n |t|^n < 1e-18, in logarithms, which do not overflow."""
    if coefficient == 0 or largest == 0:
        return coefficient == 0 or degree > 0
    return math.log(coefficient) + degree * math.log(largest) < math.log(1e-18)


def _sqrt_coefficient(n: int) -> float:
    # 2 - sqrt(1 - t): a_0 = 1, and for n >= 1 a_n = Gamma(n - 1/2) / (2 sqrt(pi) n!) = (2n-3)!! / (2^n n!)
    return 1.0 if n == 0 else math.exp(math.lgamma(n - 0.5) - math.lgamma(n + 1.0)) / (2.0 * math.sqrt(math.pi))


def _inverse_factorial(n: int) -> float:
    return math.exp(-math.lgamma(n + 1.0))


KERNELS: dict[str, Kernel] = {
    "exp": Kernel("exp", _inverse_factorial, math.inf, torch.exp),
    "inv": Kernel("inv", lambda n: 1.0, 1.0, lambda t: 1.0 / (1.0 - t)),
    "log": Kernel("log", lambda n: 1.0 / max(n, 1), 1.0, lambda t: 1.0 - torch.log1p(-t)),
    "sqrt": Kernel("sqrt", _sqrt_coefficient, 1.0, lambda t: 2.0 - torch.sqrt(1.0 - t)),
    "trigh": Kernel("trigh", _inverse_factorial, math.inf, lambda t: torch.sinh(t) + torch.cosh(t)),
}
"""The kernels of Macformer (Guo 2024): exp, inv, log, sqrt and trigh = sinh + cosh, the same function as exp."""


def kernel(spec: str | Kernel) -> Kernel:
    """The kernel of that name, or the given one.

    Raises:
        OptionError: the name is unknown; the message lists the known ones.
    """
    if isinstance(spec, Kernel):
        return spec
    if spec not in KERNELS:
        raise OptionError(
            f"unknown kernel {spec!r}; known are {', '.join(KERNELS)}, or pass maclin.Kernel(name, coefficient, radius)"
        )
    return KERNELS[spec]
