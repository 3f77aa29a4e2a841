"""accumulate: the sums of all keys, block by block, and their derivative.

    kv = sum_j w_j phi(k_j) v_j^T        z = sum_j w_j phi(k_j)

In the log domain phi is divided by exp(log_scale), the largest of each feature so far. Weights are those of the map,
times the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, exp_difference, finite
from .derive import Deriver
from .fill import Filler, Part
from .memory import block_tokens
from .spec import Side, Spec

DERIVED = 0.6
"""Of the tokens of a block, where derivatives are held beside features."""


@dataclass(frozen=True)
class Grid:
    """Blocks of the tokens of x (B, h, N, D), as rows (R, n, D) in the dtype that they are computed in."""

    x: Tensor
    size: int
    dtype: torch.dtype

    def __iter__(self) -> Iterator[slice]:
        """The tokens of each block."""
        length = self.x.shape[2]
        return (slice(start, min(start + self.size, length)) for start in range(0, length, self.size))

    def rows(self, x: Tensor, tokens: slice) -> Tensor:
        """The block of any tensor (B, h, N, W), without a copy where its strides allow."""
        block = x[:, :, tokens].flatten(0, 1)
        return block if block.dtype == self.dtype else block.to(self.dtype)


def grid(x: Tensor, spec: Spec, side: Side, width: int, share: float = 1.0) -> Grid:
    """How x is cut, with as many values of ``width`` beside its features; ``share`` of what a block may take."""
    projections = 0 if side.projection is None else side.projection.shape[-1]
    per_row = 2 * x.shape[3] + width + projections + 2 * features_beside(spec, projections)
    dtype = computed_in(x)
    size = block_tokens(x.shape[2], int(x.shape[0] * x.shape[1] * per_row * dtype.itemsize / share), x.device)
    return Grid(x, size, dtype)


def features_beside(spec: Spec, projections: int) -> int:
    """Features that take memory of their own."""
    if spec.family == "product":
        return spec.products
    return 2 * projections if spec.family == "fourier" else 0 if spec.family == "positive" else 1


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype of features: that of sums."""
    return accumulation_dtype(x.dtype)


def multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype in which features meet values: bfloat16 where x is and the processor has units for it."""
    if x.dtype == torch.bfloat16 and (x.device.type != "cpu" or has_bfloat16_units()):
        return x.dtype
    return accumulation_dtype(x.dtype)


def has_bfloat16_units() -> bool:
    """Whether this processor multiplies matrices in bfloat16 faster than in float32."""
    return torch.cpu._is_amx_tile_supported()  # pyright: ignore[reportPrivateUsage]


class Keys:
    """Blocks of keys and values as the sums take them: features, values times weights, weights.

    Args:
        filler: of the features.
        cut: of the keys.
        k: (B, Hk, S, D).
        v: (B, Hk, S, Dv).
        key_mask: (B, S) or None.
    """

    def __init__(self, filler: Filler, cut: Grid, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
        self.filler = filler
        self.cut = cut
        self.dtype = multiplied_in(v) if not filler.keeps else cut.dtype
        self.k = k
        self.v = v
        self.key_mask = key_mask
        self.values: Tensor  # as they are, 0 where masked
        self.weighted: Tensor  # times the weight
        self.given: list[Part]  # the features as they meet the values
        self.weight: Tensor | None = None
        self.dropped: Tensor | None = None
        self.known: Tensor | None = None  # sums over x, which cost least before anything else reads it

    def block(self, tokens: slice) -> list[Part]:
        """The features of these keys, logarithms in the log domain; masked ones add nothing."""
        filler, spec = self.filler, self.filler.spec
        x, v = self.cut.rows(self.k, tokens), self.v[:, :, tokens].flatten(0, 1).to(self.dtype)
        self.dropped = self.weight = None
        if self.key_mask is not None:
            mask = self.key_mask[:, tokens]
            if not (mask.device.type == "cpu" and bool(mask.all())):
                self.dropped = ~mask.repeat_interleave(self.k.shape[1], dim=0)[:, None]  # (R, 1, n)
                x, v = x.masked_fill(self.dropped.mT, 0.0), v.masked_fill(self.dropped.mT, 0.0)
        x = filler.prepare(x)
        self.known = (
            x.sum(1, dtype=accumulation_dtype(x.dtype))
            if spec.linear and self.dropped is None and not spec.weighted
            else None
        )
        parts = filler.fill(x)
        self.weight = filler.weight
        if self.dropped is not None:
            if spec.log_domain:
                parts = [Part(p.data.masked_fill(p.along(self.dropped), -torch.inf), p.tokens_last) for p in parts]
            else:
                kept = (~self.dropped).to(x.dtype)
                self.weight = kept if self.weight is None else self.weight * kept
        self.values = v
        self.weighted = v
        self.given = parts
        if self.dtype != x.dtype and self.dropped is None:
            self.given = filler.as_given(parts, self.k[:, :, tokens])
        if filler.weight is not None:  # where only the mask weighs, v is 0 already
            assert self.weight is not None
            self.weighted = v * self.weight.mT.to(v.dtype)
            if v.dtype == x.dtype:
                self.weighted = torch.mul(v, self.weight.mT, out=filler.buffers.take("v", *v.shape))
        return parts

    def sum_of(self, part: Part) -> Tensor:
        """(R, F): sum of the features over the block, with their weights."""
        wide = accumulation_dtype(part.data.dtype)
        if self.weight is not None:
            return torch.bmm(part.by_feature, self.weight.mT)[..., 0].to(wide)
        if self.known is not None and not part.tokens_last:
            return self.known
        return part.data.sum(part.tokens, dtype=wide)


class State:
    """Sums that grow: one pair (kv, z) per part, in float32 or 64."""

    def __init__(self) -> None:
        self.kv: list[Tensor] = []
        self.z: list[Tensor] = []
        self.log_scale: Tensor | None = None

    def rescale(self, part: Part) -> Tensor:
        """Take over a new largest logarithm per feature; returns it (R, F)."""
        top = part.data.amax(part.tokens).to(accumulation_dtype(part.data.dtype))
        old = self.log_scale
        if old is not None:
            top = torch.maximum(old, top)
            shrink = exp_difference(old, top)
            self.kv[0].mul_(shrink[..., None])
            self.z[0].mul_(shrink)
        self.log_scale = top
        return top

    def add(self, parts: list[Part], keys: Keys) -> None:
        """Add one block."""
        for i, part in enumerate(parts):
            phi, v, summed = keys.given[i].by_feature, keys.weighted, keys.sum_of(part)
            phi = phi if phi.dtype == v.dtype else phi.to(v.dtype)
            if i == len(self.kv):
                wide = accumulation_dtype(v.dtype)
                self.kv.append(torch.bmm(phi, v).to(wide))
                self.z.append(summed)
            else:
                if self.kv[i].dtype == v.dtype:
                    torch.baddbmm(self.kv[i], phi, v, out=self.kv[i])
                else:
                    self.kv[i].add_(torch.bmm(phi, v))
                self.z[i].add_(summed)

    def tensors(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """kv (B, h, F, Dv), z (B, h, F), log_scale (B, h, F or 0)."""
        kv, z = torch.cat(self.kv, dim=1).unflatten(0, (batch, -1)), torch.cat(self.z, dim=1).unflatten(0, (batch, -1))
        if self.log_scale is None:
            return kv, z, z[..., :0].clone()
        return kv, z, self.log_scale.unflatten(0, (batch, -1)).clone()


def attended(cut: Grid, key_mask: Tensor | None) -> Iterator[slice]:
    """The blocks in which any sample attends to anything; one in any case, for its shapes. On the CPU only."""
    if key_mask is None or key_mask.device.type != "cpu":
        yield from cut
        return
    blocks = list(cut)
    found = [tokens for tokens in blocks if bool(key_mask[:, tokens].any())]
    yield from found or blocks[:1]


def accumulate(
    k: Tensor,  # (B, Hk, S, D), S > 0
    v: Tensor,  # (B, Hk, S, Dv)
    key_mask: Tensor | None,  # (B, S)
    side: Side,
    spec: Spec,
) -> tuple[Tensor, Tensor, Tensor]:
    """kv (B, Hk, F, Dv), z (B, Hk, F) and log_scale (B, Hk, F, or 0 outside the log domain)."""
    cut = grid(k, spec, side, v.shape[3])
    like = k.new_empty(0, dtype=cut.dtype)
    filler = Filler(spec, side, k.shape[0], like, key=True)
    keys, state = Keys(filler, cut, k, v, key_mask), State()
    for tokens in attended(cut, key_mask):
        parts = keys.block(tokens)
        if spec.log_domain:
            top = finite(state.rescale(parts[0])).to(cut.dtype)
            keys.given = parts = [filler.exponentiate(parts[0], _beside(parts[0], top))]
        state.add(parts, keys)
    filler.close()
    return state.tensors(k.shape[0])


def accumulate_backward(
    dkv: Tensor,  # (B, Hk, F, Dv)
    dz: Tensor,  # (B, Hk, F)
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    log_scale: Tensor,
    side: Side,
    spec: Spec,
    wanted: frozenset[str],
) -> tuple[Tensor, Tensor, Deriver]:
    """Derivatives of k and v, and the deriver that holds those of the side; log_scale is taken as constant."""
    cut = grid(k, spec, side, v.shape[3], DERIVED)
    like = k.new_empty(0, dtype=cut.dtype)
    deriver = Deriver(spec, side, k.shape[0], like, key=True, wanted=wanted)
    keys = Keys(deriver, cut, k, v, key_mask)
    dkv, dz = (x.flatten(0, 1).to(cut.dtype) for x in (dkv, dz))
    top = finite(log_scale.flatten(0, 1)).to(cut.dtype)
    new = torch.empty_like if key_mask is None else torch.zeros_like  # of blocks that are left out
    dk, dv = new(k), new(v)
    for tokens in attended(cut, key_mask):
        parts = keys.block(tokens)
        if spec.log_domain:
            parts = [deriver.exponentiate(parts[0], _beside(parts[0], top))]
        of_keys, of_values = keys_backward(parts, keys, deriver, dkv, dz)
        dk[:, :, tokens] = of_keys.unflatten(0, k.shape[:2])
        dv[:, :, tokens] = of_values.unflatten(0, k.shape[:2])
    deriver.close()
    return dk, dv, deriver


def keys_backward(parts: list[Part], keys: Keys, deriver: Deriver, dkv: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of one block of keys and values (R, n, .), from those of the sums (R, F, Dv) and (R, F)."""
    start, dv = 0, deriver.buffers.take("dv", *keys.values.shape)
    derivatives: list[Tensor] = []
    for i, part in enumerate(parts):
        width = part.data.shape[1 if part.tokens_last else 2]
        of_kv, of_z = dkv[:, start : start + width], dz[:, start : start + width]
        start += width
        if i == 0:
            torch.bmm(part.by_feature.mT, of_kv, out=dv)
        else:
            torch.baddbmm(dv, part.by_feature.mT, of_kv, out=dv)
        out = deriver.buffers.take(f"d{i}", *part.data.shape)
        if part.tokens_last:
            torch.baddbmm(of_z[:, :, None], of_kv, keys.values.mT, out=out)
        else:
            torch.baddbmm(of_z[:, None], keys.values, of_kv.mT, out=out)
        derivatives.append(out)
    of_log_weight = None
    if keys.weight is not None:
        if deriver.weight is not None:
            of_log_weight = keys.weight * _dot(parts, derivatives)
            assert deriver.clamped is not None
            of_log_weight = of_log_weight.masked_fill_(deriver.clamped, 0.0)
        for part, d in zip(parts, derivatives, strict=True):
            d.mul_(part.along(keys.weight))
        dv = dv.mul_(keys.weight.mT)
    elif keys.dropped is not None:
        dv = dv.masked_fill_(keys.dropped.mT, 0.0)
    dx = deriver.backward(parts, derivatives, of_log_weight)
    if keys.dropped is not None:
        dx = dx.masked_fill(keys.dropped.mT, 0.0)
    return dx, dv


def _dot(parts: list[Part], derivatives: list[Tensor]) -> Tensor:
    """(R, 1, n): sum over the features of feature times derivative."""
    total = None
    for part, d in zip(parts, derivatives, strict=True):
        found = (part.data * d).sum(1 if part.tokens_last else 2)[:, None]
        total = found if total is None else total + found
    assert total is not None
    return total


def _beside(part: Part, per_feature: Tensor) -> Tensor:
    """(R, F) in the layout of the part."""
    return per_feature[:, :, None] if part.tokens_last else per_feature[:, None]
