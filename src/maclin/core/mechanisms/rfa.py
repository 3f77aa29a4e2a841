"""Random feature attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..contract import Features
from ..errors import OptionError
from ..fast.maps import Maps
from ..fast.spec import Side, Spec
from ..norms import unit_norm
from .base import Exponent, FeatureMechanism, check_num_features


class Rfa(FeatureMechanism):
    """Softmax attention over unit vectors estimated by random Fourier features.

    With |q| = |k| = 1, exp(q k / temperature) is a Gaussian kernel of (q - k) / sqrt(temperature) up to a
    constant that cancels. Both are divided by their norm, then by sqrt(temperature). With ``gate`` the causal
    sums are a moving average: S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T, g_t = sigmoid(w k_t + b).

    Args:
        head_dim: D.
        num_heads: H.
        num_kv_heads: Hk (default H); one draw per key head.
        num_features: M, even: M / 2 frequencies.
        temperature: of the softmax over cosines; 1 as in the paper. ``scale`` of a call, if given, replaces it
            by 1 / scale.
        gate: learn a gate per key head; such a mechanism is causal only.
        generator: of the draw; None is torch's own.

    Cost: (N + S) x M x (D / 2 + Dv + 1) multiply-adds and M sines and cosines per token and head.
    Source: Peng et al. 2021, arXiv 2103.02143, sections 3.1 and 3.2; deviations: the gate is computed from k
        instead of the layer's input, which attention does not see; no learned variances of the frequencies.
    """

    name = "rfa"
    frequencies: Tensor

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        num_features: int = 128,
        temperature: float = 1.0,
        gate: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, num_kv_heads)
        check_num_features(self.name, num_features, 2, multiple=2)
        if not (math.isfinite(temperature) and temperature > 0):
            raise OptionError(f"rfa: temperature is {temperature}; wanted a positive number")
        self.bidirectional = not gate  # a gate forgets along time
        self.num_features = num_features
        self.temperature = temperature
        self.config = {"num_features": num_features, "temperature": temperature, "gate": gate}
        self.register_buffer("frequencies", self._draw(generator))
        # a gate that starts open forgets slowly: sigmoid(4) = 0.98
        self.gate_weight = nn.Parameter(torch.zeros(self.num_kv_heads, head_dim)) if gate else None
        self.gate_bias = nn.Parameter(torch.full((self.num_kv_heads,), 4.0)) if gate else None

    def resample_(self, generator: torch.Generator | None = None) -> None:
        """Draw new frequencies, in place."""
        self.frequencies.copy_(self._draw(generator))

    def features(self, scale: float) -> Features:
        """[sin, cos] of unit vectors times scale^(1/2)."""
        maps, half = self.kept_maps(lambda: self._maps(scale), scale, self.frequencies), self.num_features // 2
        weight, bias = self.gate_weight, self.gate_bias
        if weight is None or bias is None:
            return Features.of(maps, self.num_features, num_projections=half)

        def log_gate(k: Tensor) -> Tensor:
            logits = torch.einsum("bhnd,hd->bhn", k, weight.to(k.dtype)) + bias.to(k.dtype)[:, None]
            return nn.functional.logsigmoid(logits)

        return Features.of(maps, self.num_features, log_gate=log_gate, num_projections=half)

    def exponent(self, scale: float) -> Exponent | None:
        """exp(scale q k) of unit vectors; the features leave out exp(scale). None with a gate, which weighs by age."""
        if self.gate_weight is not None:
            return None
        return Exponent(lambda q: unit_norm(q) * scale, unit_norm, lambda q: torch.full_like(q[..., 0], scale))

    def _maps(self, scale: float) -> Maps:
        spec = Spec("fourier", norm="unit")
        side = Side(self.frequencies * math.sqrt(scale))
        factor = math.sqrt(2.0 / self.num_features)
        weights = self.frequencies.new_full((self.num_kv_heads, 1), factor, dtype=torch.float64)
        weights = weights.expand(-1, self.num_features)
        return Maps(spec, spec, side, side, weights, weights)

    def _scale(self, scale: float | None) -> float:
        return 1.0 / self.temperature if scale is None else float(scale)

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        return torch.randn(self.num_kv_heads, self.head_dim, self.num_features // 2, generator=generator)
