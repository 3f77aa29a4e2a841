"""First-order expansion of a dot-product kernel: the yardstick of random features."""

from __future__ import annotations

from ..contract import Features
from ..kernels import Kernel
from ..kernels import kernel as kernel_of
from ..maps import first_order_maps
from .base import Exponent, FeatureMechanism, kernel_option


class Taylor(FeatureMechanism):
    """Attention weights proportional to a_0 + a_1 t, t = scale q k: constant and linear term of f, exactly.

    For t < -a_0 / a_1 a weight is negative; the denominator policy counts where that reaches a denominator.

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H).
        kernel: name or ``maclin.Kernel``.

    Cost: (N + S) x (D + 1) x (Dv + 1) multiply-adds per head.
    Source: the expansion of Kar & Karnick 2012, arXiv 1201.6530, section 3, cut after degree 1.
    """

    name = "taylor"

    def __init__(
        self, head_dim: int, num_heads: int, num_kv_heads: int | None = None, *, kernel: str | Kernel = "exp"
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        self.kernel = kernel_of(kernel)
        self.config = {"kernel": kernel_option(kernel)}

    def features(self, scale: float) -> Features:
        """phi(x) = [sqrt(a_0), sqrt(a_1 scale^(1/2)) x] on both sides."""
        return Features.of(first_order_maps(self.kernel, scale, self.num_kv_heads, self.head_dim), self.head_dim + 1)

    def exponent(self, scale: float) -> Exponent | None:
        """exp(scale q k), of the exponential kernel."""
        return Exponent.of_product(scale) if self.kernel.is_exponential else None
