"""Variance of random features of <x, y>^n and of a whole kernel, in closed form and float64; one bound on their error.

Everything here is about one pair of vectors: the estimate <phi(x), phi(y)> against f(<x, y>). With

    k = <x, y>,  n2 = |x|^2 |y|^2,  s = sum_i x_i^2 y_i^2,

one rank of a feature is z = <w, x> <w, y> (conjugated for a complex w), and a feature of degree n is the product of n
independent ranks. Hence its mean k^n, and every second moment is the n-th power of that of one rank:

    Rademacher          E z^2 = n2 + 2 (k^2 - s) = mu        (E w^4 = 1 takes 2 s from the Gaussian)
    Gaussian            E z^2 = n2 + 2 k^2
    complex Rademacher  E |z|^2 = n2 + k^2 - s,  E z^2 = 2 k^2 - s   (w in {1, i, -1, -i}: E w^2 = 0)

Source: the moments are derived here and checked by enumeration in the tests; Wacker, Kanagawa & Filippone (2022,
"Improved Random Features for Dot Product Kernels" and "Complex-to-Real Sketches for Tensor Products") give the theory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.features import DEGREE_LAWS
from ...core.kernels import Kernel

SKETCHES = {
    "rademacher": "random signs",
    "gaussian": "normal directions",
    "complex": "complex-to-real: directions of 1, i, -1 and -i, real and imaginary part as two features",
    "srht": "rows of a Hadamard matrix with random signs, drawn without replacement for each rank on its own",
}
"""Ways to draw the directions of <x, y>^n, and what each is."""

LAWS = ("published", "kar_karnick")
"""Laws of degrees whose moments are known here."""

_LAW_DEGREES = {"published": range(1, 21), "kar_karnick": range(61)}  # the degrees that core.features draws
_P = 2.0  # of kar_karnick: P(n) = p^-(n+1), which sums to 1 for p = 2 only


@dataclass(frozen=True)
class Pair:
    """What the closed forms need to know of x and y."""

    dot: float  # k
    norms: float  # n2
    squares: float  # s
    l1: float  # |x|_1 |y|_1, for the bound

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Pair:
        """The moments of two vectors of the same width, in float64."""
        x, y = x.double(), y.double()
        squares = (x * x * y * y).sum()
        return cls(float(x @ y), float((x @ x) * (y @ y)), float(squares), float(x.abs().sum() * y.abs().sum()))

    def scaled(self, radius: float) -> Pair:
        """The moments of sqrt(radius) x and sqrt(radius) y: for unit vectors |x||y| is then the radius."""
        return Pair(radius * self.dot, radius**2 * self.norms, radius**2 * self.squares, radius * self.l1)

    @property
    def mu(self) -> float:
        """E (<w, x> <w, y>)^2 for random signs w."""
        return self.norms + 2 * (self.dot**2 - self.squares)


def sketch_variance(sketch: str, pair: Pair, degree: int, num_features: int, head_dim: int) -> float:
    """Variance of the mean of ``num_features`` features of <x, y>^degree.

        rademacher  (mu^n - k^2n) / M
        gaussian    ((n2 + 2 k^2)^n - k^2n) / M
        complex     2/M [(n2 + k^2 - s)^n / 2 + (2 k^2 - s)^n / 2 - k^2n]: M/2 complex features
        srht        1/M^2 [M (mu^n - k^2n) + m ((k^2 - (mu - k^2)/(D - 1))^n - k^2n)], m = sum_b M_b (M_b - 1)

    srht draws blocks of D rows at most. Each row alone is a vector of random signs. The mean over all D rows is k
    exactly, so two rows of a block have the covariance -(mu - k^2)/(D - 1) in one rank; ranks are independent, and so
    are blocks. At n = 1 and M a multiple of D nothing is left.

    Args:
        sketch: a name of ``SKETCHES``.
        pair: moments of x and y.
        degree: n >= 1.
        num_features: M, real ones; even for complex.
        head_dim: D; a power of two for srht, which alone needs it.
    """
    k2, n, m = pair.dot**2, degree, num_features
    if sketch == "gaussian":
        return ((pair.norms + 2 * k2) ** n - k2**n) / m
    if sketch == "complex":
        absolute = (pair.norms + k2 - pair.squares) ** n
        square = (2 * k2 - pair.squares) ** n
        return 2 / m * (absolute / 2 + square / 2 - k2**n)
    alone = (pair.mu**n - k2**n) / m
    if sketch == "rademacher":
        return alone
    together = (k2 - (pair.mu - k2) / (head_dim - 1)) ** n - k2**n
    whole, rest = divmod(m, head_dim)
    pairs = whole * head_dim * (head_dim - 1) + rest * (rest - 1)
    return max(alone + pairs / m**2 * together, 0.0)  # rounding may leave -1e-18 of nothing


def kernel_moments(law: str, kernel: Kernel, pair: Pair, num_features: int) -> tuple[float, float]:
    """Variance and bias of the estimate of f(k) by random Maclaurin features of that law of degrees.

        kar_karnick  Var = [sum_n a_n^2 mu^n / P(n) - f(k)^2] / M,  bias 0
        published    the same over n = 1 to 20 with M - 1 features, the constant being exact;
                     bias -sum_{n > 20} a_n k^n

    Returns:
        (variance, bias); the variance is infinite where the series diverges (kar_karnick: 2 mu >= radius^2).
    """
    degrees = _LAW_DEGREES[law]
    drawn = num_features - 1 if law == "published" else num_features
    if law == "kar_karnick" and _P * pair.mu >= kernel.radius**2:
        return math.inf, 0.0
    expected = DEGREE_LAWS[law].expected
    a = [float(kernel.coefficient(n)) for n in degrees]
    second = sum(c * c * pair.mu**n / expected(n, num_features) for n, c in zip(degrees, a, strict=True))
    mean = sum(c * pair.dot**n for n, c in zip(degrees, a, strict=True))
    exact = 0.0 if law == "kar_karnick" else float(kernel.coefficient(0))
    return second - mean**2 / drawn, exact + mean - kernel_value(kernel, pair.dot)


def seen_share(law: str, kernel: Kernel, pair: Pair, num_drawn: float) -> float:
    """Share of the second moment of one feature that a sample of ``num_drawn`` features can be expected to show.

    A product of degree n has about kappa^n times the square of its second moment as its fourth, with kappa that of
    normal directions, (9 + 72 c^2 + 24 c^4) / (1 + 2 c^2)^2 for a cosine c. So it takes kappa^n draws of that degree
    for a standard error as large as the moment itself; degrees with fewer count as not seen.
    """
    c2 = pair.dot**2 / pair.norms
    kappa = (9 + 72 * c2 + 24 * c2**2) / (1 + 2 * c2) ** 2
    seen = total = 0.0
    for n in _LAW_DEGREES[law]:
        probability = DEGREE_LAWS[law].expected(n, 2) / (1 if law == "published" else 2)
        moment = float(kernel.coefficient(n)) ** 2 * pair.mu**n / probability
        total += moment
        seen += moment if num_drawn * probability >= kappa**n else 0.0
    return seen / total


def best_variance(kernel: Kernel, pair: Pair, num_features: int) -> float:
    """The least variance that any law of degrees has on this pair, beside one exact constant.

    P(n) proportional to a_n mu^{n/2} minimises sum_n a_n^2 mu^n / P(n), which then is (sum_n a_n mu^{n/2})^2. With
    g = f - a_0 that leaves [g(sqrt(mu))^2 - g(k)^2] / (M - 1); infinite where sqrt(mu) is outside the domain of f.
    """
    root = math.sqrt(pair.mu)
    if root >= kernel.radius:
        return math.inf
    constant = float(kernel.coefficient(0))
    largest, mean = kernel_value(kernel, root) - constant, kernel_value(kernel, pair.dot) - constant
    return (largest**2 - mean**2) / (num_features - 1)


def kernel_value(kernel: Kernel, t: float) -> float:
    """f(t) in float64."""
    return float(kernel(torch.tensor(t, dtype=torch.float64)))


def feature_bound(law: str, kernel: Kernel, l1: float) -> float:
    """The largest that M times the product of one drawn feature at x and at y can be: C = max_n a_n l1^n / P(n).

    As |<w, x>| <= |x|_1 for signs w, the product of a feature of degree n is at most a_n / P(n) (|x|_1 |y|_1)^n, and
    one draw of signs and one choice of x and y attain it. Infinite where the terms have no bound.

    Args:
        law: "published" or "kar_karnick".
        kernel: its coefficients.
        l1: |x|_1 |y|_1.
    """
    if law == "kar_karnick" and _P * l1 > kernel.radius:
        return math.inf
    expected = DEGREE_LAWS[law].expected
    drawn = 2 if law == "published" else 1  # all features, so that one is drawn
    return max(float(kernel.coefficient(n)) / expected(n, drawn) * l1**n for n in _LAW_DEGREES[law])


def kar_karnick_bound(kernel: Kernel, l1: float) -> float:
    """Kar & Karnick's own bound on one feature of their law, C = p f(p l1) >= ``feature_bound``, p = 2.

    p^{n+1} a_n l1^n is one term of p f(p l1), and no term is negative. They state it for a set in the l1 ball of radius
    R, where l1 <= R^2. Infinite where p l1 leaves the domain of f.

    Source: Kar & Karnick 2012, arXiv 1201.6530; that it holds is derived above.
    """
    if _P * l1 >= kernel.radius:
        return math.inf
    return _P * kernel_value(kernel, _P * l1) if _P * l1 < 700 else math.inf


def hoeffding_error(bound: float, num_features: int, failure: float) -> float:
    """The error that Hoeffding's inequality promises but for some probability: C sqrt(2 log(2/failure) / M).

    M independent products in [-C, C] have P(|mean - f| >= eps) <= 2 exp(-2 M eps^2 / (2C)^2), which is
    2 exp(-M eps^2 / (2 C^2)). It holds for one pair, and a bias comes on top.

    Args:
        bound: C.
        num_features: M, the drawn ones: one less than all for the published law.
        failure: probability between 0 and 1.
    """
    return bound * math.sqrt(2 * math.log(2 / failure) / num_features)


def hoeffding_features(bound: float, error: float, failure: float = 1.0) -> float:
    """From how many drawn features on Hoeffding's inequality promises that error: 2 C^2 log(2/failure) / error^2.

    With ``failure`` 1 it is where the bound on the probability falls below 1, so where it says anything at all.
    """
    return 2 * bound**2 * math.log(2 / failure) / error**2
